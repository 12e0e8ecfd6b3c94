"""What no transition leaves behind, and an UPDATE or DELETE by hand does: find it, and mend it."""

from __future__ import annotations

import uuid

from django.db import transaction
from django.db.models import Subquery

from conductor_app.models import Execution, Step, database
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import CHILD_KINDS, FINAL_STATUSES, ExecutionStatus, StepKind, StepStatus
from conductor_app.store.locks import locked
from conductor_app.store.statements import Literal
from conductor_app.transitions import guards, kinds, steps, uniqueness, waking
from conductor_app.transitions.waits import children


def overlooked(execution_id: uuid.UUID) -> list[tuple[str, str | None, StepStatus]]:
    """Return pending invocations whose child has ended or is gone, each with the error and outcome to settle it with.

    No transition leaves one behind; an UPDATE or DELETE by hand does.
    """
    pending = Step.objects.using(database()).filter(
        execution_id=execution_id, kind__in=sorted(CHILD_KINDS), status=StepStatus.PENDING
    )
    found = []
    for name, status, error in pending.values_list("name", "child__status", "child__error"):
        if status is None:
            found.append((name, children.deleted_error(), StepStatus.CANCELLED))
        elif status in FINAL_STATUSES:
            outcome = StepStatus(status)
            found.append((name, error if outcome == StepStatus.CANCELLED else None, outcome))
    return found


def in_vain(
    limit: int | None = None, *, execution_id: uuid.UUID | None = None, root_id: uuid.UUID | None = None
) -> list[Step]:
    """Return undecided steps, of maps and gathers, that are waited for while nothing of theirs is in flight.

    No transition leaves one behind; an UPDATE or DELETE by hand does.
    """
    waited_for = Step.objects.using(database()).filter(
        status=Literal(StepStatus.PENDING.value), execution__status=ExecutionStatus.WAITING
    )
    if execution_id is not None:
        waited_for = waited_for.filter(execution_id=execution_id)
    if root_id is not None:
        waited_for = waited_for.filter(execution__root_id=root_id)
    found: list[Step] = []
    for kind in StepKind:
        in_flight = kinds.of(kind).in_flight()
        if in_flight is None:
            continue
        # One row of each, not EXISTS: PostgreSQL would make that a join, and read all open executions for it.
        counted = waited_for.filter(kind=kind).annotate(in_flight=Subquery(in_flight.values("pk")[:1]))
        found += counted.filter(in_flight=None)[:limit]
    return found


def wake_stranded(execution_id: uuid.UUID) -> bool:
    """waiting → queued for an execution that waits for nothing. It should never be needed; the caller reports it.

    A map that waits for children that it holds back itself lets some of them go instead. Held → queued for one that
    waits for the end of an execution that has ended.
    """

    def work() -> bool:
        if uniqueness.release_orphan(execution_id):
            return True
        with transaction.atomic(using=database()):
            waiting = Execution.objects.using(database()).filter(pk=execution_id)
            is_stranded = waiting_for_nothing(waiting).exists()
            counted = [] if is_stranded else in_vain(execution_id=execution_id)
            if not is_stranded and not counted:
                return False
            for name, error, outcome in overlooked(execution_id):
                waking.settle(execution_id, name, outcome, error=error)
            for step in counted:
                _recount(step)
            if is_stranded:
                waking.wake(execution_id)
        return True

    guards.leave_if_locked(execution_id)
    return guards.persist_briefly(work)


def _recount(step: Step) -> None:
    """Count again what an undecided step waits for, and decide it if that is nothing."""
    # The row's lock first: whatever child has not counted it down by now is seen below as open.
    if locked(steps.of(step.execution_id, step.name).filter(status=StepStatus.PENDING)):
        kinds.of(step.kind).recount(step)
