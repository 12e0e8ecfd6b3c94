"""Who tells Celery of a final status, and when."""

from __future__ import annotations

import datetime as dt
import uuid

from django.db import transaction

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import guards, statements


def announced(execution: Execution, status: ExecutionStatus, *, is_alone: bool = False) -> bool:
    """Note that Celery has been told of an end, and of no other: a retry may have brought the next one meanwhile.

    Args:
        execution: As whoever told Celery knows it: to the run that brought the end about it is still running.
        status: How it ended.
        is_alone: Whether the transaction holds nothing but that, and what Celery's result backend writes. A crash of
            the database may undo it then, and Celery is told again.

    Returns:
        ``False`` if it is noted already, or the execution was reopened since.
    """
    # Two cancels may come with no run between them, and so with the same fence.
    ended_at = execution.finished_at if execution.is_final else None

    def work() -> bool:
        if statements.are_at_hand():
            return statements.announced(execution, status, ended_at, is_alone=is_alone)
        rows = Execution.objects.using(database()).filter(pk=execution.pk, status=status, fence=execution.fence)
        # SQLite compares texts, and has stored three digits of the second's fraction where Django writes six or none.
        ended = rows if ended_at is None else rows.filter(finished_at__lt=ended_at + dt.timedelta(milliseconds=1))
        return bool(ended.filter(announce_at__isnull=False).update(announce_at=None))

    return guards.persist_briefly(work)


def announce_now(execution_id: uuid.UUID) -> bool:
    """Let the sweeper tell Celery of a final status now: the process that was to do it is dead."""
    untold = Execution.objects.using(database()).filter(pk=execution_id, announce_at__isnull=False)
    guards.leave_if_locked(execution_id)
    return bool(guards.persist_briefly(lambda: untold.update(announce_at=clock.now())))


def take_for_announcement(limit: int, root_id: uuid.UUID | None = None) -> list[Execution]:
    """Take final executions of which Celery is to be told, so that no other sweeper tells it too.

    Args:
        limit: At most so many.
        root_id: Only of this tree.
    """

    def work() -> list[Execution]:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).to_announce()
            if root_id is not None:
                rows = rows.filter(root_id=root_id)
            taken = list(locked(rows, skip=True)[:limit])
            Execution.objects.using(database()).filter(pk__in=[row.pk for row in taken]).update(
                announce_at=clock.after(conductor_settings().LEASE_SECONDS)
            )
        return taken

    return guards.persist_briefly(work, skips_locked=True)
