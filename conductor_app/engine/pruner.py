"""Delete old trees."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from django.db import IntegrityError, router, transaction
from django.db.models import Exists, OuterRef, QuerySet, deletion
from django.db.models.deletion import Collector, RestrictedError

from conductor_app.models import (
    Attempt,
    CopiedOutcome,
    Event,
    Execution,
    FailedExecution,
    Fork,
    Place,
    PublishedState,
    Step,
    Tag,
    database,
)
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import FINAL_STATUSES
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.transactions import persist_briefly
from conductor_app.transitions import operating

MODELS = (Attempt, Event, CopiedOutcome, Step, FailedExecution, Fork, Place, PublishedState, Tag, Execution)

#: How a row names the root of its tree, if not by its execution.
_TO_ROOT = {Execution: "root_id", Tag: "root_id", CopiedOutcome: "step__execution__root_id"}


@dataclasses.dataclass(frozen=True)
class Held:
    """A tree that stays, since something else refers to it."""

    root_id: uuid.UUID
    #: The model whose rows hold it, such as ``shop.Order``; or what the database said.
    by: str


def prune(
    older_than: dt.timedelta,
    *,
    batch: int = 500,
    keep_failed: bool = False,
    dry_run: bool = False,
    on_held: Callable[[Held], None] | None = None,
) -> int:
    """Delete whole trees whose root ended long ago, children first, a batch per transaction.

    A tree with an execution that is still open (an abandoned child) stays. The ``on_delete`` of other models' keys is
    honoured, and a tree that one of them holds (``PROTECT``, ``RESTRICT``) stays as well.

    Args:
        older_than: Age of the root's end.
        batch: Most roots per transaction.
        keep_failed: Keep trees whose root failed.
        dry_run: Only count.
        on_held: Called for each tree that something else holds.

    Returns:
        How many executions were deleted (or would be).
    """
    using = database()
    roots = ended(older_than, [status for status in sorted(FINAL_STATUSES) if not (keep_failed and status == "failed")])
    if dry_run and not _keys_of_others(using):
        return Execution.objects.using(using).filter(root_id__in=roots.order_by().values("pk")).count()
    handle = _count if dry_run else _delete
    held: list[Held] = []
    number = 0
    following = roots
    while found := list(following.values_list("pk", flat=True)[:batch]):
        number += _by_halves(functools.partial(handle, roots), found, held)
        following = roots.filter(pk__gt=found[-1])
    if on_held is not None:
        for tree in held:
            on_held(tree)
    return number


def ended(older_than: dt.timedelta, statuses: Iterable[str]) -> ExecutionQuerySet:
    """Return the roots that ended so long ago, with one of those statuses, and of whose trees nothing is open."""
    executions = Execution.objects.using(database())
    return (
        executions.filter(parent__isnull=True, status__in=list(statuses), finished_at__lt=clock.after(-older_than))
        .filter(~Exists(executions.filter(root_id=OuterRef("pk")).open()))
        .order_by("pk")
    )


def delete(roots: ExecutionQuerySet, found: list[uuid.UUID]) -> int:
    """Delete the trees of some roots that are still among ``roots``, in a transaction; return how many executions.

    What somebody has locked, or something else holds, stays.
    """
    return _by_halves(functools.partial(_delete, roots), found, [])


def prune_operations(older_than: dt.timedelta, *, batch: int = 500, dry_run: bool = False) -> int:
    """Delete operations that ended long ago, with what became of each execution; those of trees that stay, too.

    Returns:
        How many operations were deleted (or would be).
    """
    return operating.prune(clock.after(-older_than), batch, dry_run=dry_run)


_Handler = Callable[[list[uuid.UUID], list[Held]], int]


def _by_halves(handle: _Handler, found: list[uuid.UUID], held: list[Held]) -> int:
    """Handle those roots in one transaction; if one of them cannot go, find it, and handle the others."""
    skipped: list[Held] = []
    try:
        number = persist_briefly(database(), functools.partial(handle, found, skipped))
    except IntegrityError as error:
        if len(found) == 1:
            held.append(Held(found[0], _holder(error)))
            return 0
        middle = len(found) // 2
        return _by_halves(handle, found[:middle], held) + _by_halves(handle, found[middle:], held)
    held += skipped
    return number


def _holder(error: IntegrityError) -> str:
    objects = getattr(error, "protected_objects", None) or getattr(error, "restricted_objects", None)
    if objects:
        return ", ".join(sorted({row._meta.label for row in objects}))
    # A key that Django does not know, with DO_NOTHING, or of a row that has just come.
    return str(error).strip().partition("\n")[0]


def _delete(roots: ExecutionQuerySet, found: list[uuid.UUID], held: list[Held]) -> int:
    """Delete the trees of those roots that are still to be pruned."""
    using = database()
    deleted = 0
    with transaction.atomic(using=using):
        # An operator's retry writes the root last of all: it is either seen here, or finds the root gone.
        ids = _without_held(list(locked(roots.filter(pk__in=found), skip=True).values_list("pk", flat=True)), held)
        tree = Execution.objects.using(using).filter(root_id__in=ids).order_by()
        _collect(ids).delete()
        # Table by table instead of Django's cascade, which would read every row first.
        # Roots alone have what was copied.
        copied = Step.objects.using(using).filter(execution_id__in=ids, fence=0).order_by()
        CopiedOutcome.objects.using(using).filter(step__in=copied.values("pk")).order_by()._raw_delete(using)
        for dependent in (Attempt, Event, Step, FailedExecution, Fork, Place, PublishedState):
            of_tree = dependent.objects.using(using).filter(execution_id__in=tree.values("pk"))
            of_tree.order_by()._raw_delete(using)
        Tag.objects.using(using).filter(root_id__in=ids).order_by()._raw_delete(using)
        for depth in sorted(set(tree.values_list("depth", flat=True).distinct()), reverse=True):
            deleted += tree.filter(depth=depth)._raw_delete(using)
    return deleted


def _count(roots: ExecutionQuerySet, found: list[uuid.UUID], held: list[Held]) -> int:
    """Count what ``_delete`` would delete."""
    ids = _without_held(list(roots.filter(pk__in=found).values_list("pk", flat=True)), held)
    _collect(ids)
    return Execution.objects.using(database()).filter(root_id__in=ids).count()


# ------------------------------------------------------------------------------------------- the keys of other models


def _keys_of_others(using: str) -> list[tuple[Any, str]]:
    """Return the foreign keys of other models to ours, with the path from each to the root of the tree.

    Those of models whose tables are in another database are left alone, as Django does.
    """
    keys: list[tuple[Any, str]] = []
    for model in MODELS:
        relations: Iterable[Any] = deletion.get_candidate_relations_to_delete(cast("Any", model)._meta)
        to_root = _TO_ROOT.get(model, "execution__root_id")
        keys += [
            (relation.field, f"{relation.field.name}__{to_root}")
            for relation in relations
            if relation.related_model not in MODELS
            and not _is_left_to_the_database(relation.field.remote_field.on_delete)
            and router.allow_migrate_model(using, relation.related_model)
        ]
    return keys


def _is_left_to_the_database(on_delete: Any) -> bool:
    in_database = getattr(deletion, "DatabaseOnDelete", ())  # Django 6.1's DB_CASCADE and its like
    return on_delete is deletion.DO_NOTHING or isinstance(on_delete, in_database)


def _referring(using: str, key: Any, path: str, ids: list[uuid.UUID]) -> QuerySet[Any]:
    rows: QuerySet[Any] = key.model._base_manager.using(using).filter(**{f"{path}__in": ids})
    return rows


def _without_held(ids: list[uuid.UUID], held: list[Held]) -> list[uuid.UUID]:
    """Leave out the trees that a ``PROTECT`` key refers to: in one query, since they are met each time."""
    using = database()
    for key, path in _keys_of_others(using):
        if ids and key.remote_field.on_delete is deletion.PROTECT:
            found = set(_referring(using, key, path, ids).values_list(path, flat=True))
            held += [Held(root_id, key.model._meta.label) for root_id in ids if root_id in found]
            ids = [root_id for root_id in ids if root_id not in found]
    return ids


def _collect(ids: list[uuid.UUID]) -> Collector:
    """Return what other models' rows need before those trees go; Django's own collector, begun one step further on.

    Raises:
        ProtectedError, RestrictedError: One of the trees cannot go.
    """
    using = database()
    collector = Collector(using)
    if not ids:
        return collector
    for key, path in _keys_of_others(using):
        rows = _referring(using, key, path, ids)
        on_delete = key.remote_field.on_delete
        if getattr(on_delete, "lazy_sub_objs", False) or rows:
            on_delete(collector, key, rows, using)
    for model, rows_of_model in collector.data.items():
        collector.clear_restricted_objects_from_set(model, set(rows_of_model))
    for rows in collector.fast_deletes:
        collector.clear_restricted_objects_from_queryset(rows.model, rows)
    restricted = set(_restricted(collector))
    if restricted:
        raise RestrictedError("Rows of other models restrict the deletion of a tree.", restricted)
    return collector


def _restricted(collector: Collector) -> Iterator[Any]:
    for rows_by_key in collector.restricted_objects.values():
        for rows in rows_by_key.values():
            yield from rows
