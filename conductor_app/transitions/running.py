"""What a run does: remember steps, end."""

from __future__ import annotations

import functools
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F

from conductor_app import clock, dispatch, signals, steps
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    Failure,
)
from conductor_app.models import Execution, database
from conductor_app.serialization import dump_failure
from conductor_app.sql import locked
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.transitions import claiming, guards, statements, waking


def release(execution: Execution) -> None:
    """running → queued: the worker shuts down and gives the execution back; no attempt is used up."""

    def work() -> None:
        guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
        dispatch.on_commit(execution)

    guards.persist(work)


def record_step(
    execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None
) -> steps.Memory:
    """Remember the outcome of a function, once, and return what is remembered.

    Raises:
        LeaseLost: Another run has taken over; nothing is recorded.
        CancelExecution: The execution is to be cancelled; the outcome is recorded all the same.
    """

    status = StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED
    error = None if failure is None else dump_failure(failure)

    def work() -> bool:
        if statements.are_at_hand():
            cancelled = statements.record_step(execution, name, status, result=result, error=error)
            if cancelled is None:
                raise guards.lease_lost(execution)
            return cancelled
        with transaction.atomic(using=database()):
            cancelled = lock_held(execution)
            steps.record(execution, name, result=result, failure=failure)
        return cancelled

    try:
        cancelled = guards.persist(work)
    except IntegrityError:
        # Recorded already: by this run, whose COMMIT got no answer. What is stored counts.
        return guards.patiently(lambda: steps.recall(execution.pk, name))[name]
    if cancelled:
        raise CancelExecution
    return steps.Memory(
        name=name,
        kind=StepKind.STEP,
        status=status,
        task="",
        payload_digest="",
        child_id=None,
        timeout_seconds=None,
        result=result,
        error=error,
        fence=execution.fence,
    )


def lock_held(execution: Execution) -> bool:
    """Lock the row of a running execution until the end of the current transaction.

    Returns:
        Whether it is to be cancelled.

    Raises:
        LeaseLost: Another run has taken over.
    """
    held = Execution.objects.using(database()).held_by(execution)
    flags = list(locked(held).values_list("cancel_requested_at", flat=True))
    if not flags:
        raise guards.lease_lost(execution)
    return flags[0] is not None


def check_held(execution: Execution) -> None:
    """Raise if the run has no right to go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
    """

    def work() -> list[Any]:
        held = Execution.objects.using(database()).held_by(execution)
        return list(held.values_list("cancel_requested_at", flat=True))

    flags = guards.persist(work)
    if not flags:
        raise guards.lease_lost(execution)
    if flags[0] is not None:
        raise CancelExecution


def succeed(execution: Execution, result: str, hand_off: claiming.HandOff | None = None) -> None:
    """running → succeeded, with the stored result; wakes the parent.

    Args:
        hand_off: Gets the parent, if that was woken.

    Raises:
        LeaseLost: Another run has taken over; the result is discarded.
    """

    def work() -> None:
        if statements.are_at_hand() and _succeed_at_once(execution, result, hand_off):
            return
        with transaction.atomic(using=database()):
            guards.leave_running(
                execution,
                status=ExecutionStatus.SUCCEEDED,
                result=result,
                error=None,
                finished_at=clock.now(),
                announce_at=guards.announcement_instant(execution, running=True),
            )
            with claiming.handing_off(hand_off):
                waking.settle_parent(execution, StepStatus.SUCCEEDED)
            guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)

    is_recorded = functools.partial(guards.is_mine, execution, status=ExecutionStatus.SUCCEEDED, result=result)
    guards.persist(work, unless_already=is_recorded)


def _succeed_at_once(execution: Execution, result: str, hand_off: claiming.HandOff | None) -> bool:
    """Do it in one statement; ``False`` if that has refused, or is not enough."""
    if execution.position is not None and execution.get_options().get("throttled"):
        return False  # its end lets a sibling go
    # What is known of the parent here does not change while that waits; how it stands, the statement looks at.
    parent = None if hand_off is None or execution.parent_id is None else hand_off.recalls(execution.parent_id)
    offer = hand_off if parent is not None and hand_off is not None and hand_off.wants(parent) else None
    ended = statements.succeed(
        execution,
        result,
        None if offer is None else offer.owner,
        parent=parent,
        announce_in=guards.announcement_delay(execution, running=True),
    )
    if ended is None:
        return False
    if offer is not None and ended.claimed is not None:
        offer.confirm(ended.claimed)
    elif ended.queued is not None:
        # A claim of its own, just after the commit that woke it; as with a message, the sweeper makes up for a process
        # that dies between the two.
        claiming.pass_on(ended.queued, hand_off)
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)
    return True


def retry_later(
    execution: Execution, failure: Failure, delay: float, *, payload: str | None = None, is_published: bool = False
) -> None:
    """running → queued: the attempt failed, the next one is due in ``delay`` seconds.

    Args:
        payload: The arguments of the next attempt as stored text, if they are others.
        is_published: Whether Celery has published a message for it. With ``memory://`` that does not count: it may have
            stayed in the memory of a pool process.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled instead.
    """

    dispatch_at = dispatch.first_instant(clock.after(delay), is_due=delay <= 0)
    if is_published and not dispatch.is_embedded():
        dispatch_at = clock.after(max(delay, 0) + conductor_settings().REDISPATCH_SECONDS)
    changed = {} if payload is None else {"payload": payload}

    def work() -> None:
        with transaction.atomic(using=database()):
            guards.leave_running(
                execution,
                status=ExecutionStatus.QUEUED,
                cancel_requested=False,
                attempt=F("attempt") + 1,
                error=dump_failure(failure),
                due_at=clock.after(delay),
                dispatch_at=dispatch_at,
                dispatches=0,
                **changed,
            )
            if delay <= 0:
                # Also if Celery has published one: a worker may have dropped it, for it came before this commit.
                dispatch.on_commit(guards.next_attempt(execution, **changed))
            guards.send_signal(signals.execution_retrying, execution, failure=failure, delay=delay)

    guards.persist(work)
