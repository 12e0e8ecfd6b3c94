"""What an operator does not want to wait for: a due time, a sleep, a message."""

from __future__ import annotations

import uuid

from django.db import transaction
from django.db.models import F

from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, PausedTask, Step, database
from conductor_app.models.execution import PARKED_UNTIL
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import dispatch, guards, kinds, pausing, waking


def hasten(execution_id: uuid.UUID) -> None:
    """queued → queued, now instead of later; or waiting → queued, by ending a sleep.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It waits for no instant, or it is held.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            if _is_brought_forward(execution_id):
                return True
            # The steps before the execution, as everywhere. A cancel does so, too: one of the two finds nothing to end.
            return _end_sleeps(execution_id)

    if not guards.persist_briefly(work):
        raise _not_to_wake(Execution.objects.using(database()).get(pk=execution_id))


def _is_brought_forward(execution_id: uuid.UUID) -> bool:
    # A held child of a map has no due time: `max_parallel` lets it go, and nobody else.
    later = Execution.objects.using(database()).filter(
        pk=execution_id,
        status=ExecutionStatus.QUEUED,
        due_at__gt=clock.now(),
        due_at__lt=clock.aware(PARKED_UNTIL),
        cancel_requested_at__isnull=True,
        held_at__isnull=True,
    )
    execution = locked(later).first()
    if execution is None:
        return False
    later.update(**guards.queue_now(execution))
    dispatch.on_commit(execution)
    return True


def _end_sleeps(execution_id: uuid.UUID) -> bool:
    sleeps = Step.objects.using(database()).filter(
        execution_id=execution_id,
        kind__in=kinds.those(lambda kind: kind.is_until_instant),
        status=StepStatus.PENDING,
        execution__status=ExecutionStatus.WAITING,
        execution__held_at__isnull=True,
    )
    names = list(sleeps.values_list("name", flat=True))
    ended = [waking.settle(execution_id, name, StepStatus.SUCCEEDED) for name in names]
    return any(ended)


def _on_hold(execution: Execution) -> ActionRefused:
    return ActionRefused(
        f"Execution {execution.pk} is {guards.why_held(execution)}. Release it first.", reason="held: release it first"
    )


def _not_to_wake(execution: Execution) -> ActionRefused:
    if execution.is_held:
        return _on_hold(execution)
    why, reason = f"is {execution.status}", f"{execution.status}"
    if execution.status == ExecutionStatus.QUEUED:
        why, reason = "is queued and due already", "due already"
        if execution.predecessor is not None:
            why = f"waits until execution {execution.predecessor}, which had the same unique key, has ended"
            reason = "waiting for the end of another one"
        elif execution.due_at is None:
            why, reason = "is held back until max_parallel of its map lets it go", "held back by max_parallel"
        elif execution.is_parked:
            why, reason = "waits for a place of a limit, which is handed to it when one is free", "parked by a limit"
        elif execution.cancel_requested_at is not None:
            why, reason = "is to be cancelled", "to be cancelled"
    elif execution.status == ExecutionStatus.WAITING:
        why, reason = "waits for a child or an event, and not for an instant", "waiting for a child or an event"
    return ActionRefused(
        f"Execution {execution.pk} {why}. Only one that sleeps, or is queued for later, can be woken.",
        reason=reason,
        is_elsewhere=True,
    )


def publish_again(execution_id: uuid.UUID) -> bool:
    """queued → queued: a message again for one that is due, and the sweeper's pauses begin anew.

    Returns:
        Whether the broker took it. With ``memory://`` nothing is published, and workers find it in the database.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It is not queued, not due, held, of a paused task, or to be cancelled.
    """

    def work() -> Execution | None:
        with transaction.atomic(using=database()):
            due = Execution.objects.using(database()).filter(pk=execution_id).claimable()
            execution = locked(due).first()
            if execution is not None:
                next_publish = dispatch.first_instant(F("due_at"), is_due=True, root_id=execution.root_id)
                due.update(dispatch_at=next_publish, dispatches=0)
        return execution

    published = guards.persist_briefly(work)
    if published is None:
        raise _not_to_publish(Execution.objects.using(database()).get(pk=execution_id))
    # Now, even inside the caller's transaction: a message says nothing but "look at this row", which is there.
    return dispatch.is_embedded() or dispatch.is_inline(published.root_id) or dispatch.publish(published)


def _not_to_publish(execution: Execution) -> ActionRefused:
    if execution.is_held:
        return _on_hold(execution)
    paused = PausedTask.objects.using(database()).filter(pk=execution.task).first()
    if paused is not None and execution.status == ExecutionStatus.QUEUED:
        return ActionRefused(
            f"Execution {execution.pk} is of {execution.task}, which is {pausing.why_paused(paused)}. "
            "Unpause it first.",
            reason="of a paused task: unpause it first",
        )
    why, reason = f"is {execution.status}", f"{execution.status}"
    if execution.status == ExecutionStatus.QUEUED:
        why, reason = "is queued, but not to be started now", "not due, to be cancelled, or expired"
    return ActionRefused(
        f"Execution {execution.pk} {why}. A message is published again for one that is queued and due.",
        reason=reason,
        is_elsewhere=True,
    )
