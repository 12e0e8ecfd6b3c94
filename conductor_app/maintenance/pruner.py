"""Delete old trees."""

from __future__ import annotations

import datetime as dt
import functools
import uuid

from django.db import transaction
from django.db.models import Exists, OuterRef

from conductor_app import clock
from conductor_app.models import Event, Execution, FailedExecution, Step, database
from conductor_app.models.querysets import ExecutionQuerySet
from conductor_app.sql import locked, persist_briefly
from conductor_app.states import FINAL_STATUSES


def prune(older_than: dt.timedelta, *, batch: int = 500, keep_failed: bool = False, dry_run: bool = False) -> int:
    """Delete whole trees whose root ended long ago, children first, a batch per transaction.

    A tree with an execution that is still open (an abandoned child) stays.

    Args:
        older_than: Age of the root's end.
        batch: Most roots per transaction.
        keep_failed: Keep trees whose root failed.
        dry_run: Only count.

    Returns:
        How many executions were deleted (or would be).
    """
    using = database()
    open_in_tree = Execution.objects.using(using).filter(root_id=OuterRef("pk")).open()
    statuses = [status for status in sorted(FINAL_STATUSES) if not (keep_failed and status == "failed")]
    roots = (
        Execution.objects.using(using)
        .filter(parent__isnull=True, status__in=statuses, finished_at__lt=clock.after(-older_than))
        .filter(~Exists(open_in_tree))
        .order_by("pk")
    )
    if dry_run:
        return Execution.objects.using(using).filter(root_id__in=roots.order_by().values("pk")).count()
    deleted = 0
    following = roots
    while found := list(following.values_list("pk", flat=True)[:batch]):
        deleted += persist_briefly(using, functools.partial(_delete, roots, found))
        following = roots.filter(pk__gt=found[-1])
    return deleted


def _delete(roots: ExecutionQuerySet, found: list[uuid.UUID]) -> int:
    """Delete the trees of those roots that are still to be pruned."""
    using = database()
    deleted = 0
    with transaction.atomic(using=using):
        # An operator's retry writes the root last of all: it is either seen here, or finds the root gone.
        ids = list(locked(roots.filter(pk__in=found), skip=True).values_list("pk", flat=True))
        tree = Execution.objects.using(using).filter(root_id__in=ids).order_by()
        # Table by table instead of Django's cascade, which would read every row first.
        for dependent in (Event, Step, FailedExecution):
            of_tree = dependent.objects.using(using).filter(execution_id__in=tree.values("pk"))
            of_tree.order_by()._raw_delete(using)
        for depth in sorted(set(tree.values_list("depth", flat=True).distinct()), reverse=True):
            deleted += tree.filter(depth=depth)._raw_delete(using)
    return deleted
