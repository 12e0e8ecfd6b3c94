"""Fail an execution for good, with its ``FailedExecution``."""

from __future__ import annotations

import functools
import uuid
from typing import Any

from django.db import transaction

from conductor_app import signals
from conductor_app.exceptions import (
    Failure,
)
from conductor_app.models import Execution, FailedExecution, database
from conductor_app.states import ExecutionStatus, RunOutcome, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import attempts, claiming, guards, parts, uniqueness, waking
from conductor_app.values.failures import dump_failure


def fail(
    execution: Execution,
    failure: Failure,
    *,
    step: str = "",
    child_id: uuid.UUID | None = None,
    hand_off: claiming.HandOff | None = None,
) -> None:
    """running → failed, with its ``FailedExecution``; wakes the parent.

    Args:
        step: The step at which it failed, if the failure is a child's.
        child_id: That child.
        hand_off: Gets the parent, if that was woken.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled instead.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            values = failed_values(execution, failure, running=True)
            guards.leave_running(execution, RunOutcome.FAILED, failure, cancel_requested=False, **values)
            with claiming.handing_off(hand_off):
                store_failure(execution, failure, step=step, child_id=child_id)

    recorded = {"status": ExecutionStatus.FAILED, "error": dump_failure(failure)}
    guards.persist(work, unless_already=functools.partial(guards.is_mine, execution, **recorded))


def failed_values(execution: Execution, failure: Failure, *, running: bool = False) -> dict[str, Any]:
    return {
        "status": ExecutionStatus.FAILED,
        "error": dump_failure(failure),
        **parts.FINAL,
        "finished_at": clock.now(),
        "announce_at": guards.announcement_instant(execution, running=running),
    }


def store_failure(execution: Execution, failure: Failure, *, step: str = "", child_id: uuid.UUID | None = None) -> None:
    root_cause = None
    if child_id is not None:
        deeper = FailedExecution.objects.using(database()).filter(pk=child_id).values_list("root_cause_id", flat=True)
        root_cause = next(iter(deeper), None) or child_id
    FailedExecution.objects.using(database()).create(
        execution_id=execution.pk,
        task=execution.task,
        attempts=execution.attempt,
        **attempts.parts_of(failure),
        step=step,
        root_cause_id=root_cause,
        failed_at=clock.now(),
    )
    waking.settle_parent(execution, StepStatus.FAILED)
    uniqueness.release_successor(execution)
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.FAILED, failure=failure)
