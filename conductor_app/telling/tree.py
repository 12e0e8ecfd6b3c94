"""An execution's tree: which of it is read, and how it is drawn."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db import connections
from django.db.models import Case, Count, F, IntegerField, Q, QuerySet, Sum, When, Window
from django.db.models.functions import RowNumber

from conductor_app.models import Execution, PublishedState, database
from conductor_app.states import OPEN_STATUSES, ExecutionStatus
from conductor_app.telling.errors import ERROR_LENGTH, whole_failure
from conductor_app.telling.situation import Census

#: What is read of each execution of a tree; payloads and results stay in the database.
TREE_FIELDS = (
    "id",
    "task",
    "queue",
    "status",
    "attempt",
    "max_attempts",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "position",
    "fence",
    "lease_owner",
    "lease_expires_at",
    "due_at",
    "dispatch_at",
    "dispatches",
    "cancel_requested_at",
    "cancel_reason",
    "held_at",
    "held_by",
    "hold_reason",
    "created_at",
    "started_at",
    "run_started_at",
    "finished_at",
    "tree_deadline_at",
)
#: Most executions of a tree that are read, beside those on the way from the root to the execution.
MOST_NODES = 200
#: Most of them that are children of the execution, and of each other one: those that failed come first, then those that
#: are under way.
MOST_CHILDREN = 50
MOST_SIBLINGS = 20
#: Most children whose own waits are read, and most waits of each.
MOST_LANES = 40


@dataclass(frozen=True)
class Branch:
    """One execution of the tree as it is drawn."""

    execution: Execution
    depth: int
    #: Whether it is the one that the story is about.
    is_current: bool
    #: Whether it is that one, or stands between it and the root.
    is_on_path: bool
    children: list[Branch] = field(default_factory=list)
    #: How many children more it has.
    hidden: int = 0


@dataclass(frozen=True)
class Picked:
    """Which executions of a tree are read."""

    keys: list[uuid.UUID]
    #: The children whose own waits are read.
    lanes: list[uuid.UUID]
    #: How many the whole tree has.
    nodes: int
    #: How many children each parent of one of them has.
    children: dict[uuid.UUID | None, Census]


def ancestry(execution: Execution, tree: Mapping[uuid.UUID, Execution]) -> list[Execution]:
    """Return an execution, its parent and so on, as far up as they are known."""
    path = [execution]
    seen = {execution.pk}
    while (parent_id := path[-1].parent_id) is not None and parent_id in tree and parent_id not in seen:
        seen.add(parent_id)
        path.append(tree[parent_id])
    return path


def pick(execution: Execution, seen: QuerySet[Execution] | None) -> Picked:
    """Choose what is read of a tree: of narrow columns alone, since the database has to look at all of its rows."""
    # Of thousands of children those that somebody looks for: what failed, then what is under way.
    weight = Case(
        When(status=ExecutionStatus.FAILED, then=0),
        When(status__in=[ExecutionStatus.RUNNING, ExecutionStatus.WAITING], then=1),
        When(status=ExecutionStatus.SUCCEEDED, then=3),
        default=2,
        output_field=IntegerField(),
    )
    siblings: dict[str, Any] = {"partition_by": [F("parent_id")]}
    rows: QuerySet[Execution] = Execution.objects.using(database()) if seen is None else seen
    rows = rows.filter(root_id=execution.root_id)
    drawn = rows.annotate(
        place=Window(RowNumber(), order_by=[weight, F("created_at").asc(), F("id").asc()], **siblings),
        siblings=Window(Count("id"), **siblings),
        siblings_open=Window(Sum(_one_if(status__in=sorted(OPEN_STATUSES))), **siblings),
        siblings_cancelled=Window(Sum(_one_if(status=ExecutionStatus.CANCELLED)), **siblings),
        nodes=Window(Count("id")),
        # Children of the execution first, then level by level, so that no branch uses up what the others need.
        is_far=Case(When(parent_id=execution.pk, then=0), default=1, output_field=IntegerField()),
    ).filter(Q(place__lte=MOST_SIBLINGS) | Q(parent_id=execution.pk, place__lte=MOST_CHILDREN))
    found = drawn.order_by("is_far", "depth", "place", "id").values_list(
        "id", "parent_id", "siblings", "siblings_open", "siblings_cancelled", "nodes"
    )[:MOST_NODES]
    keys: list[uuid.UUID] = []
    lanes: list[uuid.UUID] = []
    children: dict[uuid.UUID | None, Census] = {}
    nodes = 1
    for key, parent_id, total, still_open, cancelled, nodes in found:  # noqa: B007 - the same in each row
        keys.append(key)
        if parent_id is not None:
            children[parent_id] = Census(total, int(still_open), int(cancelled))
        if parent_id == execution.pk and len(lanes) < MOST_LANES:
            lanes.append(key)
    return Picked(keys, lanes, nodes, children)


def _one_if(**condition: Any) -> Case:
    return Case(When(**condition, then=1), default=0, output_field=IntegerField())


def read_with_ancestors(keys: list[uuid.UUID], own: uuid.UUID) -> Iterator[Execution]:
    """Read executions and all that stand above them: the way from the root to each is never cut.

    Each has ``told``, its ``PublishedState`` without the instant, or ``None``.

    Args:
        keys: Which ones.
        own: Of which one to read what it publishes.
    """
    connection = connections[database()]
    meta = Execution._meta
    quote = connection.ops.quote_name
    columns = [field.column for field in meta.concrete_fields if field.attname in TREE_FIELDS]
    table, names = quote(meta.db_table), ", ".join(f"e.{quote(str(column))}" for column in columns)
    states = quote(PublishedState._meta.db_table)
    places = ", ".join(["%s"] * len(keys))
    # UNION, not UNION ALL: it ends with rows that point at each other, which nothing but an UPDATE by hand makes.
    sql = (
        f"WITH RECURSIVE up (id, parent_id) AS ("  # noqa: S608 - names of our own table
        f"SELECT id, parent_id FROM {table} WHERE id IN ({places}) UNION "
        f"SELECT a.id, a.parent_id FROM {table} a JOIN up ON a.id = up.parent_id) "
        f"SELECT {names}, SUBSTR(e.error, 1, {ERROR_LENGTH}) AS error_head, "
        f"s.done AS told_done, s.total AS told_total, s.note AS told_note, "
        f"CASE WHEN e.id = %s THEN s.published ELSE '' END AS told_published "
        f"FROM up JOIN {table} e ON e.id = up.id LEFT JOIN {states} s ON s.execution_id = e.id"
    )
    params = [meta.pk.get_db_prep_value(key, connection) for key in [*keys, own]]
    found: Iterable[Any] = Execution.objects.using(database()).raw(sql, params)
    for row in found:
        row.error = whole_failure(row.error_head)
        row.told = None
        if row.told_note is not None:
            row.told = PublishedState(
                done=row.told_done, total=row.told_total, note=row.told_note, published=row.told_published
            )
        yield row
