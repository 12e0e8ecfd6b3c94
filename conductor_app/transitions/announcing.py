"""Who tells Celery of a final status, and when."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

from django.db import transaction
from django.db.models import BooleanField, Q
from django.db.models.lookups import Exact

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.moves import Move, Update
from conductor_app.store.slots import Given, given
from conductor_app.transitions import guards, parts

_NEVER = dt.datetime(9999, 1, 1)  # noqa: DTZ001 - `clock.aware` makes it what the project stores
#: Of one end, and of no other: a retry may have brought the next one meanwhile.
_ANNOUNCED = Move(
    Update(
        "told",
        Execution,
        Q(
            id=given(Execution, "id"),
            fence=given(Execution, "fence"),
            announce_at__isnull=False,
            finished_at__lt=given(Execution, "finished_at", "ended_before"),
        )
        & Q(Exact(parts.STATUS, given(Execution, "status"))),
        {"announce_at": None},
    ),
    may_be_lost=Q(Given("is_alone", BooleanField())),
)


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
    # Two cancels may come with no run between them, and so with the same fence. SQLite compares texts, and has stored
    # three digits of the second's fraction where Django writes six or none.
    ended_before = clock.aware(_NEVER)
    if execution.is_final and execution.finished_at is not None:
        ended_before = execution.finished_at + dt.timedelta(milliseconds=1)
    end: dict[str, Any] = {"id": execution.pk, "status": status, "fence": execution.fence, "ended_before": ended_before}
    return bool(guards.persist_briefly(lambda: _ANNOUNCED.make(database(), is_alone=is_alone, **end)))


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
