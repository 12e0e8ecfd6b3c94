"""Executions that wait, by their steps, for nothing."""

from __future__ import annotations

from django.db import connections
from django.db.models import Exists, OuterRef, Q

from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.models.step import Step
from conductor_app.states import OPEN_STATUSES, ExecutionStatus
from conductor_app.store.statements import Literal


def waiting_for_nothing(executions: ExecutionQuerySet) -> ExecutionQuerySet:
    """Return those that wait without a pending step, or for a child that has ended or is gone: it must not happen."""
    # Two ways to say the same. By the status SQLite would read all pending steps, once for each execution.
    is_sqlite = connections[executions.db].vendor == "sqlite"
    is_pending = Q(finished_at__isnull=True) if is_sqlite else Q(status=Literal("pending"))
    # A started child, a timer and a message are awaited by their gather alone. A map or gather that is undecided counts
    # as awaited (``auditing.in_vain`` looks at its children): beside OR, that makes PostgreSQL read whole tables.
    is_awaited = ~Q(kind__in=["invoke", "start", "timer", "message"]) | Q(
        kind="invoke", child__status__in=sorted(OPEN_STATUSES)
    )
    pending = Step.objects.using(executions.db).filter(is_pending, is_awaited, execution=OuterRef("pk"))
    return executions.with_status(ExecutionStatus.WAITING).filter(~Exists(pending))
