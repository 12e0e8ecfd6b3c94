"""Moves: what changes together is declared once, and made in the form that the database is best at.

A move is a list of writes, in the order in which they take their locks. Guards and values are Django's expressions;
what a caller gives stands in them by its name. For example::

    RELEASE = Move(
        Update("held", Execution, HELD, {"status": ExecutionStatus.QUEUED, "due_at": NOW, **NO_LEASE}),
    )
    is_released = bool(RELEASE.make(using, id=execution.pk, fence=execution.fence, holder=execution.lease_owner))

A write that finds no row ends the move there. If that is the first one, its guard has refused, and nothing is written.

There are two forms. Both are made from the declaration when they are first used, and kept as texts:

- **One statement**, on PostgreSQL: one trip to the server, and no ``BEGIN`` and ``COMMIT`` around it. Each write names
  an earlier one, so PostgreSQL makes them in their order. All of them see the rows as they were when the statement
  began. So a move writes no row twice, and locks what is to be judged as it is *now* (``Lock``).
- **A script**: several statements in a transaction. On the other databases, and on PostgreSQL without autocommit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from django.conf import settings
from django.db import connections, transaction
from django.db.models import Expression, Q

from conductor_app.store import clock
from conductor_app.store.opened import one_statement
from conductor_app.store.scripts import Write
from conductor_app.store.statements import fetch
from conductor_app.store.texts import Statement, Text
from conductor_app.store.waits import at_work
from conductor_app.store.writes import Insert, Lock, Part, Update, is_there, select, told_by

__all__ = ["Insert", "Lock", "Move", "Part", "Update", "as_scripts", "prepare"]

_is_script: ContextVar[bool] = ContextVar("conductor_app_moves_as_scripts", default=False)


_declared: WeakSet[Move] = WeakSet()


class Move:
    """Writes that are made together or not at all.

    Args:
        parts: The writes, in the order of their locks.
        tells: The names of those whose columns the answer has, one after the other; else the first one.
        may_be_lost: When a crash of the database may undo the move, so that its commit waits for no disk: what it
            writes is on the disk with the next commit that waits, or a moment later. It never undoes what was written
            before. For the one statement only: a script's transaction may hold more.
        brings: A query. The one statement's answer has its value as another last column, and a script's has ``None``.
    """

    def __init__(
        self, *parts: Part, tells: Sequence[str] = (), may_be_lost: Q | Expression | None = None, brings: str = ""
    ) -> None:
        names = [part.name for part in parts]
        referred = {*tells, *(part.of for part in parts if isinstance(part, Update) and part.of)}
        if len(set(names)) < len(names) or not referred <= set(names):
            raise ValueError(f"a write's name stands twice, or is not there: {names}, {sorted(referred)}")
        self.parts = parts
        self.tells = [part for part in parts if part.name in (tells or [parts[0].name])]
        self.may_be_lost = may_be_lost
        self.brings = brings
        self._statements: dict[tuple[str, bool], Statement] = {}
        self._scripts: dict[tuple[str, bool, bool], list[Write]] = {}
        _declared.add(self)

    def make(self, using: str, *, savepoint: bool = True, at_once: bool = True, **given: Any) -> list[Sequence[Any]]:
        """Make it, and return what it tells: no row if it is refused; a row for each one that it takes.

        Args:
            using: The database.
            savepoint: Whether a transaction that is open stays usable if a write fails.
            at_once: Whether it may be one statement, past Django's cursors; not if that is too long, or is to be seen.
            given: What the declaration leaves to the caller, by name.
        """
        shift = clock.interval(0)
        if shift:
            given["shift"] = shift
        form = self._make_at_once if at_once and is_one_statement(using) else self._make_as_script
        return form(using, given, is_shifted=bool(shift), savepoint=savepoint)

    def _make_at_once(
        self, using: str, given: dict[str, Any], *, is_shifted: bool, savepoint: bool
    ) -> list[Sequence[Any]]:
        statement = self._statements.get((using, is_shifted)) or self._prepare(using, is_shifted=is_shifted)
        given.update(statement.constants)
        for name, columns in statement.rows.items():
            rows = given.pop(name)
            for column in columns:
                given[f"all_{column}"] = [row[column] for row in rows]
        return fetch(using, statement.sql, given, savepoint=savepoint)

    def _prepare(self, using: str, *, is_shifted: bool = False) -> Statement:
        self._statements[using, is_shifted] = statement = self.statement(using, is_shifted=is_shifted)
        return statement

    def statement(self, using: str, *, is_shifted: bool = False) -> Statement:
        """Return the one statement that makes it on PostgreSQL."""
        locks = [part.name for part in self.parts if isinstance(part, Lock)]
        text = Text(using, is_shifted=is_shifted, locks=locks)
        first = self.parts[0]
        is_single = len(self.parts) == 1 and not self.brings
        writes: list[str] = []
        before = ""
        for part in self.parts:
            more = ""
            if self.may_be_lost is not None and part is first:
                more = text.unless_it_may_be_lost(part.model, self.may_be_lost)
            write = _at_once(text, part, first=first.name if before else "", before=before, more=more)
            if is_single:
                return text.finished(write)
            writes.append(f"{part.name} AS ({write})")
            before = before if isinstance(part, Insert) and before else part.name
        answer = []
        for part in self.tells:
            # Short texts: psycopg keeps what it has made of one, up to 4,096 characters.
            is_whole = not isinstance(part, Lock) and not (part is first and self.may_be_lost)
            names = [_name_of(part, name) for name in text.names(told_by(part))]
            answer += [f"{part.name}.{name}" for name in (["*"] if names and is_whole else names)]
        if self.brings:
            answer.append(f"({self.brings})")
        others = "".join(f" LEFT JOIN {part.name} ON TRUE" for part in self.tells if part is not first)
        order = f" ORDER BY {first.name}_{first.order_by}" if isinstance(first, Lock) and first.order_by else ""
        return text.finished(
            f"WITH {', '.join(writes)} SELECT {', '.join(answer) or '1'} FROM {first.name}{others}{order}"
        )

    def _make_as_script(
        self, using: str, given: dict[str, Any], *, is_shifted: bool, savepoint: bool
    ) -> list[Sequence[Any]]:
        key = (using, is_shifted, settings.USE_TZ)
        steps = self._scripts.get(key)
        if steps is None:
            steps = self._scripts[key] = [Write(part, using, is_shifted=is_shifted) for part in self.parts]
        connection = connections[using]
        found: dict[str, list[Sequence[Any]]] = {}
        is_single = len(steps) == 1 and steps[0].is_single
        around: Any = one_statement(using) if is_single else transaction.atomic(using=using)
        if not savepoint and connection.in_atomic_block:
            around = nullcontext()
        with around, at_work(connection):
            for step in steps:
                rows = step.make(connection, given)
                if not rows:
                    break
                found[step.part.name] = rows
        told: list[Sequence[Any]] = []
        for number in range(len(found.get(self.parts[0].name, ()))):
            row: list[Any] = []
            for part in self.tells:
                row += found[part.name][number] if part.name in found else [None] * len(told_by(part))
            told.append([*row, None] if self.brings else row)
        return told


def prepare(using: str) -> None:
    """Make the texts of all moves now, for the processes that are forked from this one: it takes 20 ms."""
    if is_one_statement(using):
        for move in list(_declared):
            move._prepare(using)


def is_one_statement(using: str) -> bool:
    """Tell whether a move is one statement now: the database has statements of several writes, and commits each."""
    connection = connections[using]
    return connection.vendor == "postgresql" and bool(connection.settings_dict["AUTOCOMMIT"]) and not _is_script.get()


@contextmanager
def as_scripts() -> Iterator[None]:
    """Make the moves in the block as scripts on PostgreSQL, too, as the other databases get them. For tests."""
    token = _is_script.set(True)
    try:
        yield
    finally:
        _is_script.reset(token)


def _name_of(part: Part, column: str) -> str:
    """Return the name of what a write tells in the one statement.

    A lock's columns stand beside the table's in the UPDATE that follows it, so they have names of their own.
    """
    return f"{part.name}_{column}" if isinstance(part, Lock) else column


def _at_once(text: Text, part: Part, *, first: str, before: str, more: str) -> str:
    """Return one of the writes of the one statement.

    Args:
        first: The first write, whose row an INSERT selects from.
        before: The last one that may have found nothing, so that this is not to be made.
        more: What else it returns.
    """
    if isinstance(part, Lock):
        return select(text, part, before)
    table = text.table(part.model)
    if isinstance(part, Insert):
        told = text.columns(part.model, told_by(part)) or "1"
        names, values = text.row(part.model, part.values)
        source = text.source(first, part.rows) + (f" WHERE {is_there(before)}" if before != first else "")
        return f"INSERT INTO {table} ({names}) SELECT {values}{source} RETURNING {told}"
    key = part.model._meta.pk.column
    with text.joined(part.of):
        values = text.assigned(part.model, part.values)
        conditions = [f"{text.quote(key)} = {part.of}_{key}"] if part.of else []
        conditions += filter(None, [text.condition(part.model, part.where)])
        told = ", ".join(filter(None, [text.columns(part.model, told_by(part)), more])) or "1"
    if before not in ("", part.of):
        conditions.append(is_there(before))
    joined = f" FROM {part.of}" if part.of else ""
    return f"UPDATE {table} SET {values}{joined} WHERE {' AND '.join(conditions)} RETURNING {told}"
