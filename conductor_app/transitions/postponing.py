"""Put off what the worker that got it cannot run, and another one can.

During a deployment, workers of two versions serve one queue. The older ones do not know what the newer code calls, or
know it with other arguments. None of that is an attempt.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import Any

from django.db import transaction

from conductor_app.exceptions import Failure
from conductor_app.models import Execution, database
from conductor_app.models.execution import PUT_OFF_AT_FENCE
from conductor_app.states import ExecutionStatus, RunOutcome
from conductor_app.store import clock
from conductor_app.transitions import dispatch, guards
from conductor_app.values.failures import dump_failure, load_failure

#: The pause is a second, and grows by this factor up to so many seconds.
PAUSE_FACTOR, MAX_PAUSE_SECONDS = 1.5, 60.0
#: An execution that nobody could run for so many seconds, since the first of them had tried, is put off no more.
MAX_SECONDS = 3_600.0


def put_off(execution: Execution, failure: Failure) -> float | None:
    """running → queued, at no cost of an attempt: its arguments do not fit the task as this process knows it.

    Returns:
        In how many seconds it is due; ``None``, and nothing is written, if it was put off for ``MAX_SECONDS`` already.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
    """

    def work() -> float | None:
        with transaction.atomic(using=database()):
            noted, delay = _noted(execution.pk, execution.fence, failure)
            if noted is None:
                return None
            guards.leave_running(
                execution,
                RunOutcome.RELEASED,
                failure,
                status=ExecutionStatus.QUEUED,
                cancel_requested=False,
                error=noted,
                **_due_in(delay),
            )
        return delay

    return guards.persist(work)


def put_off_unknown(execution_id: uuid.UUID, task: str, failure: Failure) -> float | None:
    """queued → queued: the worker that got its message does not know its task.

    Args:
        task: The task that the message named; a forged one may name another than the execution's.

    Returns:
        In how many seconds it is due; ``None`` if it is not queued and due.
    """

    def work() -> float | None:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id, task=task).claimable()
            fence = rows.values_list("fence", flat=True).first()
            if fence is None:
                return None
            noted, delay = _noted(execution_id, fence, failure, is_limited=False)
            return delay if rows.filter(fence=fence).update(error=noted, **_due_in(delay)) else None

    return guards.persist_briefly(work)


def _due_in(delay: float) -> dict[str, Any]:
    due = clock.after(delay)
    return {"due_at": due, "dispatch_at": dispatch.first_instant(due, is_due=False), "dispatches": 0}


def _noted(
    execution_id: uuid.UUID, fence: int, failure: Failure, *, is_limited: bool = True
) -> tuple[str | None, float]:
    """Return the failure as it is to be stored, with what the next one has to know, and the pause; ``None``: no more.

    It is kept with the failure, so that it goes with it: when another one is stored, or the execution succeeds.
    """
    error = Execution.objects.using(database()).filter(pk=execution_id).values_list("error", flat=True).first()
    before = (load_failure(error).attributes or {}) if error else {}
    now = clock.read(database())
    times, since = 0, now
    # The claim that finds it unfit raises the fence; a run that got further ends the row of them.
    if before.get(PUT_OFF_AT_FENCE) in (fence, fence - 1):
        times = int(before["put_off_times"])
        since = before["put_off_since"] if isinstance(before["put_off_since"], dt.datetime) else now
    if is_limited and (now - since).total_seconds() >= MAX_SECONDS:
        return None, 0.0
    attributes = {PUT_OFF_AT_FENCE: fence, "put_off_times": times + 1, "put_off_since": since}
    noted = dump_failure(dataclasses.replace(failure, args=None, attributes=attributes))
    return noted, min(PAUSE_FACTOR ** min(times, 20), MAX_PAUSE_SECONDS)
