"""Hand a child's outcome to its parent, and wake it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from django.db.models import BooleanField, Case, F, Q, QuerySet, TextField, Value, When
from django.db.models.expressions import Combinable

from conductor_app import signals
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.moves import Lock, Update
from conductor_app.store.slots import Found, Given, given
from conductor_app.store.statements import update_returning
from conductor_app.store.texts import Column
from conductor_app.transitions import claiming, dispatch, guards, kinds, parts, steps, uniqueness
from conductor_app.values.failures import dump_failure

#: What a claim changes of a parent that is known here.
_CHANGED = ("id", "status", "fence", "due_at", "run_started_at")
_WAS_WAITING, _IS_CLAIMED, _WAS_KNOWN = (Found("found", name) for name in ("was_waiting", "is_claimed", "was_known"))


def wake_by(where: Q) -> tuple[Lock, Update]:
    """waiting → queued, or → running if this process goes on with it; as a part of moves.

    A parent that is just suspending either commits first, and is found waiting, or comes after this, and finds its step
    settled. It is written whatever it does: at REPEATABLE READ, a suspension that has not seen the settled step has to
    fail and be run again.

    Args:
        where: Which execution.
    """

    is_waiting = Q(status=ExecutionStatus.WAITING)
    is_claimed = is_waiting & Q(Given("is_claimed", BooleanField())) & parts.IS_LET
    is_known = Q(fence=given(Execution, "fence", "known"))
    # It travels only to a run that does not have it.
    payload = Case(When(Q(_IS_CLAIMED) & ~Q(_WAS_KNOWN), then=F("payload")), default=None, output_field=TextField())
    columns: list[Column] = [("payload", payload) if name == "payload" else name for name in claiming.CLAIM_FIELDS]
    lock = Lock(
        "found",
        Execution,
        where,
        finds=[
            ("was_waiting", parts.flag(is_waiting)),
            ("is_claimed", parts.flag(is_claimed)),
            ("was_known", parts.flag(is_known)),
        ],
    )
    update = Update(
        "parent",
        Execution,
        Q(),
        parts.either(Execution, (_IS_CLAIMED, parts.CLAIMED), (_WAS_WAITING, parts.QUEUED)),
        of="found",
        returning=[*columns, ("is_claimed", _IS_CLAIMED), ("was_known", _WAS_KNOWN)],
    )
    return lock, update


def woken(row: Sequence[Any], known: Execution | None, offer: claiming.HandOff | None) -> tuple[Execution | None, bool]:
    """Return the parent as ``wake_by`` tells of it, ``None`` if it is not woken, and whether it is claimed here.

    Args:
        known: As its last run in this process had it, if there was one.
        offer: Who claims it.
    """
    *columns, is_claimed, was_known = row
    if is_claimed is None:
        return None, False
    if is_claimed and was_known and known is not None and offer is not None:
        # No other run had it since, so whatever else a run reads is as it was.
        changed = {name: columns[claiming.CLAIM_FIELDS.index(name)] for name in _CHANGED}
        return known.copied(**changed, lease_owner=offer.owner), True
    return Execution.from_db(database(), claiming.CLAIM_FIELDS, columns), bool(is_claimed)


def settle_parent(child: Execution, status: StepStatus, *, error: str | None = None) -> None:
    """Hand a child's outcome to its parent, in the transaction that decides it."""
    if child.parent_id is None:
        return
    if child.position is None:
        settle(child.parent_id, child.step, status, error=error, root_id=child.root_id)
    else:
        kinds.of(StepKind.MAP).child_ended(child, status, error=error)


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
        return kinds.of(StepKind.START).member_failed(
            execution_id, name, status, error, gather=gather, only_overdue=only_overdue, root_id=root_id
        )
    step = steps.settle(execution_id, name, status, error=error, only_overdue=only_overdue)
    if step is None:
        return False
    pass_on(step, execution_id, status, error=error, root_id=root_id)
    return True


def pass_on(
    step: Step, execution_id: uuid.UUID, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None
) -> None:
    """Tell whoever waits for a step that has just been decided."""
    kind = kinds.of(step.kind)
    if kind.suspends:
        wake(execution_id, root_id)
    else:
        kind.pass_on(step, status, error=error, root_id=root_id)


def count_down(
    counted: QuerySet[Step],
    status: StepStatus,
    *,
    child_id: uuid.UUID | None,
    error: str | None,
    root_id: uuid.UUID | None,
    member: str | None = None,
) -> bool:
    """Count one child of a map, or one member of a gather, as ended, and wake the execution if that decides it."""
    step = steps.count_down(counted, status, child_id=child_id, error=error, member=member)
    if step is not None and step.status != StepStatus.PENDING:
        kinds.of(step.kind).decided(step, by=member)
        wake(step.execution_id, root_id)
    return step is not None


def cancel_unstarted(children: QuerySet[Execution], reason: str, *, skip: bool = False) -> list[Execution]:
    """queued → cancelled, for those of ``children`` that no run has started: they have no children to cancel.

    Args:
        children: Which ones.
        reason: Stored and shown.
        skip: Whether those stay as they are that somebody has locked, to start them most often; for whoever has locked
            a step, and so must not wait for children.
    """
    failure = dump_failure(Failure(type="Cancelled", message=f"Cancelled: {reason}"))
    unstarted = children.filter(status=ExecutionStatus.QUEUED, started_at__isnull=True)
    if skip:
        free = list(locked(unstarted, skip=True).values_list("pk", flat=True))
        unstarted = unstarted.filter(pk__in=free)
    cancelled = update_returning(
        unstarted,
        ("id", "task", "root_id", "parent_id", "step", "attempt", "error", "created_at", "options"),
        status=ExecutionStatus.CANCELLED,
        error=failure,
        cancel_reason=reason,
        finished_at=clock.now(),
        **parts.FINAL,
        **parts.NOT_QUEUED,
    )
    for row in cancelled:
        uniqueness.release_successor(row)
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
