"""Run executions in this process, one after another: for eager mode and for tests. No broker, no worker, no threads."""

from __future__ import annotations

import datetime as dt
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from celery import states
from celery.app.trace import build_tracer
from celery.result import EagerResult

from conductor_app import clock, dispatch
from conductor_app.exceptions import ExecutionCancelled
from conductor_app.maintenance import sweeper
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.serialization import load_failure, revive
from conductor_app.states import ExecutionStatus

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

#: More runs than this in one go are a loop.
MAX_RUNS = 100_000


def run_once(execution: Execution, app: Celery) -> None:
    """Run one queued execution's body once, through Celery's own tracer: signals, result and callbacks included."""
    task = app.tasks[execution.task]
    request = {
        "id": str(execution.pk),
        "task": execution.task,
        "hostname": "inline",
        "root_id": str(execution.root_id),
        "parent_id": str(execution.parent_id) if execution.parent_id else None,
        "delivery_info": {"is_eager": True},
        "is_eager": True,
        "ignore_result": True,
        "headers": {"conductor": "doorbell"},
        "retries": execution.attempt - 1,
    }
    tracer = build_tracer(task.name, task, app=app, eager=True, propagate=False)
    tracer(str(execution.pk), [], {}, request)


def run_until_idle(app: Celery, root_id: uuid.UUID | None = None) -> int:
    """Run all that is due, with all that follows from it, until nothing is.

    Args:
        app: The Celery app whose tasks are run.
        root_id: Only this tree.

    Returns:
        How many runs there were.
    """
    runs = 0
    while runs < MAX_RUNS:
        sweeper.sweep(reclaim=False, publish=False)
        rows = Execution.objects.using(database()).claimable().order_by("due_at", "id")
        if root_id is not None:
            rows = rows.filter(root_id=root_id)
        execution = rows.first()
        if execution is None:
            return runs
        run_once(execution, app)
        runs += 1
    raise RuntimeError(f"{MAX_RUNS} runs and still not idle: do the executions queue each other without an end?")


def run_eagerly(execution: Execution, app: Celery, throw: bool | None = None) -> EagerResult[Any]:
    """Run a whole tree at once, skipping over due times, and return its result as Celery's eager mode does.

    Args:
        execution: The root.
        app: The Celery app whose tasks are run.
        throw: Whether to raise what fails it; ``CELERY_TASK_EAGER_PROPAGATES`` by default.
    """
    skipped = dt.timedelta()
    try:
        while True:
            with dispatch.inline():
                run_until_idle(app, execution.root_id)
            row = Execution.objects.using(database()).get(pk=execution.pk)
            if row.is_final:
                result = _eager_result(row)
                if app.conf.task_eager_propagates if throw is None else throw:
                    result.get()
                return result
            next_instant = _next_instant(execution.root_id)
            if next_instant is None and _is_running_elsewhere(execution.root_id):
                time.sleep(0.05)
                continue
            if next_instant is None:
                raise RuntimeError(f"Execution {execution.pk} is {row.status} and nothing in its tree is due.")
            step = next_instant - clock.read(database()) + dt.timedelta(milliseconds=1)
            clock.shift(step)
            skipped += step
    finally:
        clock.shift(-skipped)


def _is_running_elsewhere(root_id: uuid.UUID) -> bool:
    """Tell whether a worker has taken a part of the tree, as its sweeper may do."""
    tree = Execution.objects.using(database()).filter(root_id=root_id)
    return tree.filter(status=ExecutionStatus.RUNNING).exists()


def _next_instant(root_id: uuid.UUID) -> Any:
    using = database()
    due = Execution.objects.using(using).filter(root_id=root_id, status=ExecutionStatus.QUEUED).order_by("due_at")
    overdue = (
        Step.objects.using(using)
        .filter(execution__root_id=root_id, status="pending", deadline_at__isnull=False)
        .order_by("deadline_at")
    )
    instants: list[Any] = [
        *due.values_list("due_at", flat=True)[:1],
        *overdue.values_list("deadline_at", flat=True)[:1],
    ]
    return min(instants) if instants else None


def _eager_result(execution: Execution) -> EagerResult[Any]:
    task_id = str(execution.pk)
    if execution.status == ExecutionStatus.SUCCEEDED:
        return EagerResult(task_id, execution.get_result(), states.SUCCESS)
    if execution.status == ExecutionStatus.CANCELLED:
        return EagerResult(task_id, ExecutionCancelled(execution.error_message), states.REVOKED)
    trace = FailedExecution.objects.using(database()).filter(pk=execution.pk).values_list("traceback", flat=True)
    error = revive(load_failure(execution.error))
    return EagerResult(task_id, error, states.FAILURE, traceback=next(iter(trace), None))
