"""Hand events to the steps that wait for them."""

from __future__ import annotations

import uuid

from django.db import transaction
from django.db.models import F

from conductor_app.exceptions import ExecutionFinished, IdempotencyConflict
from conductor_app.models import Event, Execution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.transitions import guards, mailbox, steps, waking
from conductor_app.values.payloads import digest

_ENDED = {
    ExecutionStatus.SUCCEEDED: "has succeeded",
    ExecutionStatus.FAILED: "has failed",
    ExecutionStatus.CANCELLED: "was cancelled",
}


def send(execution_id: uuid.UUID, event: str, payload: str, key: str | None = None) -> bool:
    """Store an event, in the current transaction if there is one; wakes the execution if it waits for that event.

    Args:
        event: Its name.
        payload: Stored text.
        key: The sender's own id of the event.

    Returns:
        ``False`` if it was sent with this ``key`` before.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFinished: It is final. Nothing is stored.
        IdempotencyConflict: ``key`` was sent with another payload.
    """
    # Without a key, one of its own: a repetition after a lost COMMIT has to recognise what it has stored.
    own = key or uuid.uuid4().hex
    is_mine = False

    def work() -> bool | None:
        nonlocal is_mine
        # Outside of the transaction: its first statement is to be a write, so that its snapshot is not older.
        known = mailbox.find(execution_id, event, own)
        if known is not None:
            _check_same(known, payload)
            return is_mine
        step = steps.awaiting(execution_id, event)
        with transaction.atomic(using=database()):
            # The step before the execution, as everywhere: somebody may just be deciding its timeout.
            if step is not None and not steps.settle(execution_id, step.name, StepStatus.SUCCEEDED, result=payload):
                step = None
            # A write, although it changes nothing: at REPEATABLE READ a suspension that has not seen the event has to
            # fail and be run again. Its lock also puts the events of one execution in order.
            if not Execution.objects.using(database()).filter(pk=execution_id).open().update(fence=F("fence")):
                raise _refusal(execution_id, event)
            # In a new statement: a suspension for which this has waited may have opened a step.
            has_missed_step = step is None and steps.awaiting(execution_id, event) is not None
            if has_missed_step or not mailbox.put(execution_id, event, payload, own, taken_by=step):
                transaction.set_rollback(True, using=database())
                return None
            if step is not None:
                waking.wake(execution_id)
            is_mine = True
        return True

    sent = None
    while sent is None:
        # Each time round, somebody else has come first: a suspension, or a sender of the same event.
        sent = guards.persist_briefly(work)
    return sent


def deliver(step: Step) -> bool:
    """Settle a pending step with the oldest event for which it waits, if there is one.

    Call it while the execution's row is locked, or while nobody can send to the execution because it is final.
    """
    payload = mailbox.take(step)
    if payload is None:
        return False
    settled = steps.settle(step.execution_id, step.name, StepStatus.SUCCEEDED, result=payload)
    return settled is not None


def _check_same(known: Event, payload: str) -> None:
    if digest(known.payload) != digest(payload):
        raise IdempotencyConflict(
            f"The id {known.key!r} belongs to an event {known.name!r} of execution {known.execution_id} with another "
            "payload. Use another id."
        )


def _refusal(execution_id: uuid.UUID, event: str) -> Exception:
    status = Execution.objects.using(database()).filter(pk=execution_id).values_list("status", flat=True).first()
    if status is None:
        return Execution.DoesNotExist(f"There is no execution {execution_id}. It has been pruned.")
    # Open again, if an operator has just retried it: it was final when the event was refused.
    how = _ENDED.get(ExecutionStatus(status), "had ended")
    return ExecutionFinished(f"Execution {execution_id} {how} and takes no more events: {event!r} was not stored.")
