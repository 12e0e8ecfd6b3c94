"""Named reads: callers say what they look for, the condition stands here once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from django.db import connections, models
from django.db.models import Exists, OuterRef, Q

from conductor_app.states import LATE_REASON, OPEN_STATUSES, ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.statements import Literal

if TYPE_CHECKING:
    from conductor_app.models.execution import Execution


class ExecutionQuerySet(models.QuerySet["Execution"]):
    """Executions, by what may be done with them."""

    def with_status(self, status: ExecutionStatus) -> Self:
        """Executions of one status, in a form that a partial index serves."""
        return self.filter(status=Literal(status.value))

    def open(self) -> Self:
        """Not final."""
        return self.filter(status__in=sorted(OPEN_STATUSES))

    def held_by(self, run: Execution) -> Self:
        """The execution, if the run that claimed it as ``run`` still holds it.

        The fence alone does not tell: a claim that a crash of the database has undone, and the one that followed, have
        the same. They have other owners, or the second one raises the fence (``claims``).
        """
        return self.filter(pk=run.pk, fence=run.fence, lease_owner=run.lease_owner, status=ExecutionStatus.RUNNING)

    def claimable(self, attempt: int | None = None) -> Self:
        """Queued, due, neither cancelled nor expired.

        Args:
            attempt: That of a plain task's message. Celery's own retry message comes by a worker's clock, so being due
                does not count; being about this attempt does, or a copy of the last one's message would take it early.
        """
        ready = self.filter(
            Q(deadline_at__isnull=True) | Q(deadline_at__gt=clock.now()) | Q(started_at__isnull=False),
            status=ExecutionStatus.QUEUED,
            cancel_requested_at__isnull=True,
        )
        if attempt is None:
            return ready.filter(due_at__lte=clock.now())
        return ready.filter(due_at__isnull=False, attempt=attempt)

    def to_dispatch(self) -> Self:
        """Queued, and its message is to be published (again)."""
        return self.with_status(ExecutionStatus.QUEUED).filter(dispatch_at__lte=clock.now()).order_by("dispatch_at")

    def lapsed(self) -> Self:
        """Running, and the worker has not renewed the lease in time."""
        return (
            self.with_status(ExecutionStatus.RUNNING)
            .filter(lease_expires_at__lt=clock.now())
            .order_by("lease_expires_at")
        )

    def at_work(self) -> Self:
        """Running, and the worker renews the lease."""
        return self.with_status(ExecutionStatus.RUNNING).filter(lease_expires_at__gt=clock.now())

    def to_cancel(self) -> Self:
        """Flagged as cancelled, and no run is there to notice."""
        return self.filter(
            cancel_requested_at__isnull=False, status__in=[ExecutionStatus.QUEUED, ExecutionStatus.WAITING]
        ).order_by("cancel_requested_at")

    def unasked(self) -> Self:
        """Nobody has asked for its end: it is not flagged as cancelled, or only because it is late for a timeout."""
        return self.filter(Q(cancel_requested_at__isnull=True) | Q(cancel_reason__startswith=LATE_REASON))

    def expired(self) -> Self:
        """Queued past Celery's ``expires``, never started."""
        overdue = self.with_status(ExecutionStatus.QUEUED).filter(deadline_at__lte=clock.now())
        return overdue.filter(started_at__isnull=True).order_by("deadline_at")

    def to_announce(self) -> Self:
        """Final, and Celery has not been told."""
        return self.filter(announce_at__lte=clock.now()).order_by("announce_at")

    def waiting_for_nothing(self) -> Self:
        """Waiting without a pending step, or for a child that has ended or is gone: it must not happen."""
        from conductor_app.models.step import Step  # noqa: PLC0415 - Step refers to Execution

        # Two ways to say the same. By the status SQLite would read all pending steps, once for each execution.
        is_sqlite = connections[self.db].vendor == "sqlite"
        is_pending = Q(finished_at__isnull=True) if is_sqlite else Q(status=Literal("pending"))
        # A started child is awaited by its gather alone. A map or gather that is undecided counts as awaited
        # (``steps.in_vain`` looks at its children): beside OR, that makes PostgreSQL read whole tables.
        is_awaited = ~Q(kind__in=["invoke", "start"]) | Q(kind="invoke", child__status__in=sorted(OPEN_STATUSES))
        pending = Step.objects.filter(is_pending, is_awaited, execution=OuterRef("pk"))
        return self.with_status(ExecutionStatus.WAITING).filter(~Exists(pending))
