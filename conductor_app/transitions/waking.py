"""Hand a child's outcome to its parent, and wake it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from django.db import transaction
from django.db.models import Case, F, QuerySet, Value, When
from django.db.models.expressions import Combinable

from conductor_app import signals
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.statements import update_returning
from conductor_app.transitions import claiming, dispatch, guards, steps
from conductor_app.values.failures import dump_failure


def settle_parent(child: Execution, status: StepStatus, *, error: str | None = None) -> None:
    """Hand a child's outcome to its parent, in the transaction that decides it."""
    if child.parent_id is None:
        return
    if child.position is None:
        settle(child.parent_id, child.step, status, error=error, root_id=child.root_id)
    else:
        _settle_map(child, child.parent_id, status, error=error)


def settle(
    execution_id: uuid.UUID,
    name: str,
    status: StepStatus,
    *,
    error: str | None = None,
    only_overdue: bool = False,
    root_id: uuid.UUID | None = None,
) -> bool:
    """Decide a pending step, and wake the execution if this is what it waits for.

    Returns:
        ``False`` if the step was decided already.
    """
    gather = None if status == StepStatus.SUCCEEDED else steps.awaiting_gather(execution_id, name)
    if gather is not None:
        return _settle_failed_member(
            execution_id, name, status, error, gather=gather, only_overdue=only_overdue, root_id=root_id
        )
    step = steps.settle(execution_id, name, status, error=error, only_overdue=only_overdue)
    if step is None:
        return False
    _pass_on(step, execution_id, status, error=error, root_id=root_id)
    return True


def _pass_on(
    step: Step, execution_id: uuid.UUID, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None
) -> None:
    """Tell whoever waits for a step that has just been decided."""
    if step.kind != StepKind.START:
        wake(execution_id, root_id)
    elif step.group_id is not None:
        gather = Step.objects.using(database()).filter(pk=step.group_id)
        _count_down(gather, status, child_id=step.child_id, error=error, root_id=root_id)


def _settle_failed_member(
    execution_id: uuid.UUID,
    name: str,
    status: StepStatus,
    error: str | None,
    *,
    gather: int,
    only_overdue: bool,
    root_id: uuid.UUID | None,
) -> bool:
    """Decide a started child's step, its gather, and the steps of those that need not start any more."""
    with transaction.atomic(using=database()):
        # Children before steps, as everywhere.
        reason = f"its sibling {name} {status}"
        siblings = cancel_unstarted(steps.members_beside(execution_id, name, gather), reason)
        step = steps.settle(execution_id, name, status, error=error, only_overdue=only_overdue)
        if step is None:
            transaction.set_rollback(True, using=database())
            return False
        # The cause first: it is what the gather raises.
        _pass_on(step, execution_id, status, error=error, root_id=root_id)
        for row in siblings:
            steps.settle(execution_id, row.step, StepStatus.CANCELLED, error=row.error)
    return True


def _settle_map(child: Execution, parent_id: uuid.UUID, status: StepStatus, *, error: str | None) -> None:
    # Children before steps: the sibling that is let go, or those that are cancelled, may be changing just now, and
    # whoever changes one of them then asks for the step.
    counted = steps.of(parent_id, child.step)
    if status != StepStatus.SUCCEEDED and counted.filter(status=StepStatus.PENDING, fails_fast=True).exists():
        with transaction.atomic(using=database()):
            cancel_unstarted(steps.children_of(parent_id, child.step), f"its sibling {_name(child)} {status}")
            if not _count_down(counted, status, child_id=child.pk, error=error, root_id=child.root_id):
                # The map was decided by something else just before, which is to say what becomes of its children.
                transaction.set_rollback(True, using=database())
        return
    if child.get_options().get("throttled") and not _is_held(child):
        _release_sibling(child)
    _count_down(counted, status, child_id=child.pk, error=error, root_id=child.root_id)


def _count_down(
    counted: QuerySet[Step],
    status: StepStatus,
    *,
    child_id: uuid.UUID | None,
    error: str | None,
    root_id: uuid.UUID | None,
) -> bool:
    step = steps.count_down(counted, status, child_id=child_id, error=error)
    if step is not None and step.status != StepStatus.PENDING:
        wake(step.execution_id, root_id)
    return step is not None


def _is_held(child: Execution) -> bool:
    """Tell whether a child that is ending had never been let go; a running one had."""
    return child.status == ExecutionStatus.QUEUED and child.due_at is None


def release_held(children: QuerySet[Execution], count: int | None) -> None:
    """held → queued, for so many children of a map of which none is in flight; the audit's repair.

    Past rows that others have locked: a transition that ends one of them lets another go.
    """
    for execution in list(locked(_held(children), skip=True)[:count]):
        _release(execution)


def _held(children: QuerySet[Execution]) -> QuerySet[Execution]:
    held = children.filter(status=ExecutionStatus.QUEUED, due_at__isnull=True, cancel_requested_at__isnull=True)
    return held.order_by("position")


def _release_sibling(child: Execution) -> None:
    """held → queued: a place in the map is free."""
    held = _held(Execution.objects.using(database()).filter(parent_id=child.parent_id, step=child.step))
    # Past those that other ending siblings are just letting go; then wait for these, lest one of them gives up.
    found = locked(held, skip=True).first() or locked(held).first()
    if found is not None:
        _release(found)


def _release(execution: Execution) -> None:
    """held → queued, for a row that is locked or that nobody else can change."""
    Execution.objects.using(database()).filter(
        pk=execution.pk, status=ExecutionStatus.QUEUED, due_at__isnull=True
    ).update(**guards.queue_now(execution))
    dispatch.on_commit(execution)


def _name(child: Execution) -> str:
    return f"{child.step}[{child.position}]"


def cancel_unstarted(children: QuerySet[Execution], reason: str) -> list[Execution]:
    """queued → cancelled, for those of ``children`` that no run has started: they have no children to cancel."""
    failure = dump_failure(Failure(type="Cancelled", message=f"Cancelled: {reason}"))
    cancelled = update_returning(
        children.filter(status=ExecutionStatus.QUEUED, started_at__isnull=True),
        ("id", "task", "root_id", "parent_id", "step", "attempt", "error"),
        status=ExecutionStatus.CANCELLED,
        error=failure,
        cancel_reason=reason,
        finished_at=clock.now(),
        **guards.NOT_QUEUED,
    )
    for row in cancelled:
        guards.send_signal(signals.execution_finished, row, status=ExecutionStatus.CANCELLED)
    return cancelled


def wake(execution_id: uuid.UUID, root_id: uuid.UUID | None = None) -> None:
    """waiting → queued. Writes the row whatever its status.

    The unconditional write takes the row's lock. A parent that is just suspending either commits first, and is found
    waiting here, or blocks on this write, and then sees the settled step. With ``WHERE status = 'waiting'`` neither
    would wait for the other, and the wake-up would be lost.
    """
    _wake(Execution.objects.using(database()).filter(pk=execution_id), root_id)


def wake_all(execution_ids: Sequence[uuid.UUID]) -> None:
    """waiting → queued, for executions whose rows the current transaction has locked."""
    if execution_ids:
        _wake(Execution.objects.using(database()).filter(pk__in=execution_ids), None)


def _wake(executions: QuerySet[Execution], root_id: uuid.UUID | None) -> None:
    waiting = When(status=ExecutionStatus.WAITING, then=Value(ExecutionStatus.QUEUED.value))
    rows = update_returning(
        executions,
        (*dispatch.DOORBELL_FIELDS, "status"),
        due_at=_if_waiting(clock.now(), "due_at"),
        dispatch_at=_if_waiting(dispatch.first_instant(clock.now(), is_due=True, root_id=root_id), "dispatch_at"),
        # Last: MySQL assigns from left to right, and the conditions above are about the old status.
        status=Case(waiting, default=F("status")),
    )
    for row in rows:
        # Queued by this write or already before it: a second ring of the bell is harmless.
        if row.status == ExecutionStatus.QUEUED:
            claiming.ring(row)


def _if_waiting(value: Combinable, column: str) -> Case:
    return Case(When(status=ExecutionStatus.WAITING, then=value), default=F(column))
