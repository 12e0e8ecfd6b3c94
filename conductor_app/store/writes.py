"""The writes that a move (``store.moves``) consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from django.db.models import Model, Q

from conductor_app.store.texts import Column, Text


@dataclass(frozen=True, eq=False)
class Update:
    """Change the rows that a guard lets through.

    Attributes:
        name: By which later writes, and the move's answer, refer to it.
        where: Which rows; with ``of``, whether those that are locked.
        values: New values by column. MySQL assigns them from left to right: what reads an old value stands before it.
        of: The ``Lock`` that has found the rows.
        returning: Columns as they are afterwards, or expressions by a name.
    """

    name: str
    model: type[Model]
    where: Q
    values: Mapping[str, Any]
    _: KW_ONLY
    of: str = ""
    returning: Sequence[Column] = ()


@dataclass(frozen=True, eq=False)
class Insert:
    """Store a row, or many. Columns that are not named get the model's defaults.

    Attributes:
        values: The values by column; ``Each`` stands for those that differ between many rows.
        rows: The name by which the caller gives what differs: a list of mappings.
        returning: Columns of a single row as they are stored.
    """

    name: str
    model: type[Model]
    values: Mapping[str, Any]
    _: KW_ONLY
    rows: str = ""
    returning: Sequence[Column] = ()


@dataclass(frozen=True, eq=False)
class Lock:
    """Lock rows, and find out how they stand now, whoever has just changed them.

    A statement sees the rows as they were when it began, and may wait for one that somebody is changing. Only a locked
    row says how that stands now; so it is found by its key alone, locked, and judged then.

    Attributes:
        finds: Columns, or expressions by a name, for later writes and for the move's answer.
        order_by: The column by which many rows are ordered.
        limit: The name by which the caller says how many at most; without it there is one.
        skips_locked: Whether to pass over those that others have locked.
    """

    name: str
    model: type[Model]
    where: Q
    _: KW_ONLY
    finds: Sequence[Column] = ()
    order_by: str = ""
    limit: str = ""
    skips_locked: bool = False


Part = Update | Insert | Lock


def told_by(part: Part) -> Sequence[Column]:
    """Return what a write tells."""
    return part.finds if isinstance(part, Lock) else part.returning


def is_there(part: str) -> str:
    """Return the condition that a write of the one statement has found a row."""
    return f"EXISTS(SELECT FROM {part})"


def select(text: Text, part: Lock, before: str = "") -> str:
    """Return the statement that locks; what it finds has names, for other writes."""
    key = part.model._meta.pk.attname
    columns = text.columns(part.model, [*told_by(part), *([] if key in told_by(part) else [key])], name=part.name)
    where = text.condition(part.model, part.where)
    if before and f" FROM {before})" not in where:  # what it is looked for by tells already
        where += f" AND {is_there(before)}"
    sql = f"SELECT {columns} FROM {text.table(part.model)} WHERE {where}"
    if part.order_by:
        sql += f" ORDER BY {text.quote(part.order_by)}"
    if part.limit:
        sql += f" LIMIT {text.whole_number(part.limit)}"
    return sql + text.lock(skips_locked=part.skips_locked)
