"""End a run that waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from django.db import IntegrityError, transaction

from conductor_app import signals
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, RunOutcome
from conductor_app.store.opened import is_transaction
from conductor_app.transitions import attempts, claiming, guards, parts
from conductor_app.transitions.waits.children import forgotten
from conductor_app.transitions.waits.wait import Wait


def suspend(
    execution: Execution,
    wait: Wait,
    before_commit: Callable[[], None] | None = None,
    hand_off: claiming.HandOff | None = None,
) -> bool:
    """running → waiting, after the body has unwound; stores the child, or opens the step, that is waited for.

    Args:
        before_commit: Called while the row is locked, so that nobody can resume the execution before it returns.
        hand_off: Gets the child that is waited for.

    Returns:
        ``False`` if the step is decided already (meanwhile, or by an event that was sent before), or a child's unique
        key was taken just now: the execution is still running, and its body can go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
        OutcomeLost: The children that are to be stored are there; somebody has deleted the step that stands for them.
    """

    def work() -> bool:
        # What stands beside it in its transaction says no more than that it waits.
        is_alone = is_transaction(database())
        is_one = wait.is_one_move and before_commit is None
        with contextlib.nullcontext() if is_one else transaction.atomic(using=database()):
            if wait.is_one_move:
                wait.suspend(execution, hand_off, is_alone=is_alone)
                guards.send_signal(signals.run_ended, execution, outcome=RunOutcome.SUSPENDED)
            elif not _suspended(execution, wait):
                return False
            if before_commit is not None:
                before_commit()
            guards.send_signal(signals.execution_suspended, execution, step=wait.step)
        return True

    try:
        is_suspended = guards.persist(work)
    except IntegrityError:
        if not wait.opens_first:
            if (lost := forgotten(execution, wait.step)) is not None:
                raise lost from None
            if not wait.has_keys:
                raise
            # Somebody has just taken a child's unique key. The body runs again, and is told so by the same call.
        # Recorded already, by this run, whose COMMIT got no answer: an event that it took, a gather of children that
        # had ended, a map of none. Had it been left waiting, the guards would have said so.
        return False
    if is_suspended:
        attempts.trim(execution)
    return is_suspended


def _suspended(execution: Execution, wait: Wait) -> bool:
    """End the run and open the step, one after the other; tell whether the execution waits."""
    if wait.is_there(execution):
        return False
    guards.leave_running(
        execution,
        RunOutcome.SUSPENDED,
        step=wait.step,
        status=ExecutionStatus.WAITING,
        cancel_requested=False,
        **parts.NOT_QUEUED,
    )
    if wait.open(execution):
        return True
    transaction.set_rollback(True, using=database())
    return False
