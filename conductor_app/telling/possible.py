"""Which executions an operator's action is for, as they stand now. The action itself looks again when it writes."""

from __future__ import annotations

from django.db.models import Exists, OuterRef, Q

from conductor_app.models import Step, database
from conductor_app.models.execution import IS_STOPPED, PARKED_UNTIL
from conductor_app.states import FINAL_STATUSES, OPEN_STATUSES, ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import kinds

#: Those that a retry runs again.
RETRIED_STATUSES = frozenset({ExecutionStatus.FAILED, ExecutionStatus.CANCELLED})


def to_retry() -> Q:
    """Failed and cancelled roots."""
    return Q(parent__isnull=True, status__in=sorted(RETRIED_STATUSES))


def to_rerun() -> Q:
    """Roots that have ended."""
    return Q(parent__isnull=True, status__in=sorted(FINAL_STATUSES))


def to_cancel() -> Q:
    """Those that are open."""
    return Q(status__in=sorted(OPEN_STATUSES))


def to_hold() -> Q:
    """Those that are open, and that nobody holds."""
    return to_cancel() & Q(held_at__isnull=True)


def to_release() -> Q:
    """Those that are held."""
    return to_cancel() & Q(held_at__isnull=False)


def to_send() -> Q:
    """Those that take events: open ones."""
    return to_cancel()


def to_wake() -> Q:
    """Those that wait for an instant: a sleep, a retry, a countdown."""
    sleeps = Step.objects.using(database()).filter(
        execution=OuterRef("pk"), kind__in=kinds.those(lambda kind: kind.is_until_instant), status=StepStatus.PENDING
    )
    is_later = Q(status=ExecutionStatus.QUEUED, due_at__gt=clock.now(), cancel_requested_at__isnull=True)
    is_later &= ~Q(due_at=clock.aware(PARKED_UNTIL))
    return Q(held_at__isnull=True) & (is_later | (Q(status=ExecutionStatus.WAITING) & Q(Exists(sleeps))))


def to_publish(seconds: float = 0) -> Q:
    """Those that are queued, and have been due for so many seconds, as far as nobody keeps them from beginning."""
    due = Q(status=ExecutionStatus.QUEUED, due_at__lte=clock.after(-seconds), cancel_requested_at__isnull=True)
    return due & ~IS_STOPPED
