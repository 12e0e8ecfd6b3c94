"""Run executions in this process, one after another: for eager mode and for tests. No broker, no worker, no threads."""

from __future__ import annotations

import datetime as dt
import logging
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from celery import states
from celery.app.trace import build_tracer
from celery.result import EagerResult
from django.db.models import Q

from conductor_app import transitions
from conductor_app.body.plain import is_invocable
from conductor_app.body.run import current_context
from conductor_app.engine import announcements, schedules, sweeper
from conductor_app.exceptions import ExecutionCancelled, UnknownTask
from conductor_app.host import durable_runs, plain_runs
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.models.execution import IS_PAUSED
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock, eager
from conductor_app.transitions import dispatch, limiting
from conductor_app.values.failures import load_failure, revive
from conductor_app.values.limits import limits_of

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

#: More runs than this in one go are taken for a loop.
MAX_RUNS = 100_000


def run_once(execution: Execution, app: Celery) -> None:
    """Run one queued execution's body once, through Celery's own tracer: signals, result and callbacks included."""
    task = app.tasks.get(execution.task)
    if task is None:
        raise UnknownTask(
            f"Execution {execution.pk} is of {execution.task}, which is not registered. "
            "Is its module imported (tasks.py in an installed app)?"
        )
    request = {
        "id": str(execution.pk),
        "task": execution.task,
        "hostname": "inline",
        "root_id": str(execution.root_id),
        "parent_id": str(execution.parent_id) if execution.parent_id else None,
        "delivery_info": {"is_eager": True},
        "is_eager": True,
        "ignore_result": True,
        "headers": {dispatch.HEADER: dispatch.DOORBELL},
        "retries": execution.attempt - 1,
    }
    tracer = build_tracer(task.name, task, app=app, eager=True, propagate=False)
    if is_invocable(task):
        tracer = durable_runs.guard(task, tracer)
    else:
        options = execution.get_options()
        request.update(callbacks=options.get("link"), errbacks=options.get("link_error"))
        tracer = plain_runs.guard(task, tracer)
    ended = tracer(str(execution.pk), [], {}, request)
    row = Execution.objects.using(database()).claimable().filter(pk=execution.pk, fence=execution.fence)
    # One that has just been handed the start for which it was parked is due again.
    if row.exists() and not limits_of(task):
        why = ended.info.retval if ended.info else "it says that it has ended"
        raise RuntimeError(
            f"The run of {execution.task} {execution.pk} has left the execution queued and due as it was, and would be "
            f"repeated for ever. Celery's tracer says: {why!r}"
        )


def run_until_idle(app: Celery, root_id: uuid.UUID | None = None, max_runs: int = MAX_RUNS) -> int:
    """Run all that is due, with all that follows from it, until nothing is.

    Args:
        app: The Celery app whose tasks are run.
        root_id: Only this tree; nothing of another one is claimed, decided or told.
        max_runs: More runs than this are taken for a loop.

    Returns:
        How many runs there were.

    Raises:
        UnknownTask: The task of an execution that is due is not registered.
        RuntimeError: There were ``max_runs`` runs, and more is due.
    """
    runs: Counter[str] = Counter()
    while True:
        sweeper.sweep(reclaim=False, publish=False, root_id=root_id)
        rows = Execution.objects.using(database()).claimable().order_by("due_at", "position", "id")
        if root_id is not None:
            rows = rows.filter(root_id=root_id)
        execution = rows.first()
        if execution is None:
            return runs.total()
        if runs.total() >= max_runs:
            task, most = runs.most_common(1)[0] if runs else (execution.task, 0)
            raise RuntimeError(
                f"{max_runs} runs, {most} of them of {task}, and still not idle; {execution.task} {execution.pk} is "
                "next. Do executions queue each other, or retry or sleep for no time, without an end?"
            )
        run_once(execution, app)
        runs[execution.task] += 1


def run_eagerly(execution: Execution, app: Celery, throw: bool | None = None) -> EagerResult[Any]:
    """Run a whole tree at once, skipping over due times, and return its result as Celery's eager mode does.

    Args:
        execution: The root.
        app: The Celery app whose tasks are run.
        throw: Whether to raise what fails it; ``CELERY_TASK_EAGER_PROPAGATES`` by default.
    """
    with eager.running(execution.root_id) as tree:
        row = _run_to_the_end(execution, app, tree)
    result = _eager_result(row)
    if app.conf.task_eager_propagates if throw is None else throw:
        result.get(disable_sync_subtasks=False)
    return result


def _run_to_the_end(execution: Execution, app: Celery, tree: eager.Tree) -> Execution:
    while True:
        run_until_idle(app, tree.root_id)
        row = Execution.objects.using(database()).get(pk=execution.pk)
        if row.is_final:
            return row
        if row.predecessor is not None:
            _await_end(row, row.predecessor)
            continue
        _must_go_on(tree.root_id)
        instant = next_instant(tree.root_id)
        if instant is not None:
            tree.skipped += time_until(instant)
        elif _is_running_elsewhere(tree.root_id):
            time.sleep(0.05)
        else:
            raise RuntimeError(
                f"Execution {execution.pk} is {row.status} and nothing in its tree is due. Does it wait for an "
                "event? Then start it with .delay(), and send the event between two calls of "
                "conductor_app.testing.drain()."
            )


def _await_end(execution: Execution, predecessor: uuid.UUID) -> None:
    """Wait for the end of the one whose unique key an execution has taken over: a worker runs it, or ends it."""
    transitions.cancel_flagged(predecessor)
    row = Execution.objects.using(database()).filter(pk=predecessor).first()
    if row is not None and row.is_final:
        return
    running = current_context.get()
    if row is None or row.status != ExecutionStatus.RUNNING or (running and running.execution_id == predecessor):
        raise RuntimeError(
            f"Execution {execution.pk} is queued until {predecessor}, which had its unique key, has ended, and nothing "
            "ends that here. It is stored, and workers run it."
        )
    time.sleep(0.05)


def _must_go_on(root_id: uuid.UUID) -> None:
    """Refuse to wait for what somebody holds."""
    tree = Execution.objects.using(database()).filter(root_id=root_id)
    stopped = tree.held().first() or tree.of_paused_tasks().first()
    if stopped is not None:
        why = "held" if stopped.is_held else f"of {stopped.task}, which is paused"
        raise RuntimeError(
            f"Execution {stopped.pk} is {why}, and eager mode does not wait for that to end. It is stored: a worker "
            "goes on with it then."
        )


def _is_running_elsewhere(root_id: uuid.UUID) -> bool:
    """Tell whether a worker has taken a part of the tree, as its sweeper may do."""
    tree = Execution.objects.using(database()).filter(root_id=root_id)
    return tree.filter(status=ExecutionStatus.RUNNING).exists()


def next_instant(root_id: uuid.UUID | None = None, after: dt.datetime | None = None) -> dt.datetime | None:
    """Return when something is due next: a countdown, retry, sleep, timeout, schedule, rate, a start or end too late.

    Args:
        root_id: Only in this tree.
        after: Only later than this.
    """
    queued = Execution.objects.using(database()).filter(~Q(IS_PAUSED), status=ExecutionStatus.QUEUED, held_at=None)
    pending = Step.objects.using(database()).filter(status=StepStatus.PENDING)
    if root_id is not None:
        queued, pending = queued.filter(root_id=root_id), pending.filter(execution__root_id=root_id)
    instants: list[dt.datetime] = []
    if root_id is None and (tick := schedules.next_instant(after)) is not None:
        instants.append(tick)
    if root_id is None and (start := limiting.next_start(after)) is not None:
        instants.append(start)
    unstarted = queued.filter(started_at__isnull=True)
    bounded = Execution.objects.using(database()).filter(finished_at=None, cancel_requested_at=None)
    bounded = bounded if root_id is None else bounded.filter(pk=root_id)
    for rows, column in (
        *((queued, "due_at"), (pending, "deadline_at"), (unstarted, "deadline_at")),
        (bounded, "tree_deadline_at"),
    ):
        later = {f"{column}__isnull": False} if after is None else {f"{column}__gt": after}
        instants += rows.filter(**later).order_by(column).values_list(column, flat=True)[:1]
    return min(instants, default=None)


def time_until(instant: dt.datetime) -> dt.timedelta:
    """Return how far to move the clock to be just after ``instant``; never back."""
    # SQLite's clock counts milliseconds.
    return max(instant - clock.read(database()) + dt.timedelta(milliseconds=1), dt.timedelta())


def _eager_result(execution: Execution) -> EagerResult[Any]:
    result = _result_of(execution)
    cast(Any, result).execution_id = execution.pk
    return result


def _result_of(execution: Execution) -> EagerResult[Any]:
    task_id = announcements.celery_id(execution)
    if execution.status == ExecutionStatus.SUCCEEDED:
        return EagerResult(task_id, execution.get_result(), states.SUCCESS)
    if execution.status == ExecutionStatus.CANCELLED:
        return EagerResult(task_id, ExecutionCancelled(execution.error_message), states.REVOKED)
    trace = FailedExecution.objects.using(database()).filter(pk=execution.pk).values_list("traceback", flat=True)
    error = revive(load_failure(execution.error))
    return EagerResult(task_id, error, states.FAILURE, traceback=next(iter(trace), None))
