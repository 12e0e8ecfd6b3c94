"""The runs that follow one delivery of a durable task in the same process.

A guard around the task's tracer, where bodies run: when Celery has ended the run that was delivered, it lets Celery
run what that run handed off (``hand_off``), by that task's own tracer and with a request of its own, and so on. The
worker's main process sees one job; what it has to know of the others travels back with the job's runtime.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, current_app
from celery.app import trace
from celery.app.trace import trace_ok_t
from celery.exceptions import WorkerShutdown, WorkerTerminate
from django.db import DatabaseError

from conductor_app import dispatch, hand_off, transitions
from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.executor import RunEnded, close_broken_connections, resume_unsuspended
from conductor_app.ids import of_task_id
from conductor_app.models import Execution
from conductor_app.plain import is_invocable

logger = logging.getLogger("conductor_app.execution")

Tracer = Callable[..., Any]


class Runtime(float):
    """How long a delivered run took, in seconds; and what the main process has to know of those that followed it."""

    #: When the sweeper has something to do for one of them, by ``time.time()``.
    due_at: float | None = None
    #: Celery's events about them: type and fields.
    events: list[tuple[str, dict[str, Any]]] = []


class EndInfo(ExceptionInfo):
    """What Celery's tracer says of a run that has ended without an outcome: there is no error to trace."""

    def __init__(self, ended: RunEnded, internal: bool) -> None:
        vars(self).update(type=type(ended), exception=ended, tb=None, traceback="", internal=internal)


def _exception_info(exc_info: Any = None, internal: bool = False) -> ExceptionInfo:
    # Celery asks twice for each run that is suspended, and gets copies of the tracer's own frame, with the position of
    # each of its instructions, and the text of a traceback: a fifth of a short run.
    error = exc_info[1] if exc_info else sys.exc_info()[1]
    return EndInfo(error, internal) if isinstance(error, RunEnded) else ExceptionInfo(exc_info, internal)


def guard_tasks(app: Celery) -> None:
    """Put the guard around the tracer of each durable task of ``app``. Celery builds new ones on each reconnect."""
    vars(trace)["ExceptionInfo"] = _exception_info
    for task in app.tasks.values():
        tracer = getattr(task, "__trace__", None)
        if tracer is not None and is_invocable(task) and not hasattr(tracer, "is_conductor"):
            any_task: Any = task
            any_task.__trace__ = guard(task, tracer)


def guard_pool_process(**_kwargs: Any) -> None:
    """Guard the tasks in a new process of a prefork pool; receiver of ``celery.signals.worker_process_init``."""
    guard_tasks(current_app._get_current_object())  # type: ignore[attr-defined]


def guard(task: Any, tracer: Tracer) -> Tracer:
    """Return the tracer of a durable task, made to go on with what its runs hand off."""

    def guarded(task_id: Any, args: Any, kwargs: Any, request: dict[str, Any] | None = None) -> Any:
        request = request or {}
        if hand_off.current.get() is not None or not _may_go_on(task, request):
            return tracer(task_id, args, kwargs, request)
        execution_id = of_task_id(task_id)
        delivery = hand_off.Delivery(execution_id)
        token = hand_off.current.set(delivery)
        hand_off.gate.show(execution_id)
        try:
            outcome = _go_on(delivery, tracer(task_id, args, kwargs, request), request)
        finally:
            # What is shown stays: if the process ends by this, the main process has to know what it ran.
            hand_off.current.reset(token)
            _give_back(delivery)
        hand_off.gate.show(None)
        return outcome

    guarded.is_conductor = True  # type: ignore[attr-defined]
    return guarded


def _may_go_on(task: Any, request: dict[str, Any]) -> bool:
    """Tell whether other runs may follow a delivery; a time limit of its own would count for them, too."""
    return hand_off.gate.is_open() and not any(request.get("timelimit") or ()) and not hand_off.is_limited(task)


def _go_on(delivery: hand_off.Delivery, outcome: Any, request: dict[str, Any]) -> Any:
    """Run what was handed off, one after another, and return the outcome of the run that was delivered."""
    runtime = Runtime(outcome.runtime or 0.0)
    runtime.events = []
    while (execution := delivery.begin_next()) is not None:
        close_broken_connections()
        try:
            ended = _run(execution, request, runtime.events)
        except (WorkerShutdown, WorkerTerminate):
            raise
        except BaseException:
            if hand_off.gate.is_own_process:
                raise  # the process ends, and the main process hears of it
            _lose(execution)
            break
        due_at = _due_at(execution, ended)
        if due_at is not None:
            runtime.due_at = due_at if runtime.due_at is None else min(runtime.due_at, due_at)
        if delivery.claimed is execution:
            break  # its body has not begun: Celery's tracer got into trouble before
    return outcome._replace(runtime=runtime) if runtime.events else outcome


def _run(execution: Execution, delivered: dict[str, Any], events: list[tuple[str, dict[str, Any]]]) -> trace_ok_t:
    """Let Celery run an execution as if its message had been delivered."""
    task: Any = current_app.tasks[execution.task]
    request = request_of(execution, delivered)
    named = {"uuid": request["id"]}
    shown = ("root_id", "parent_id", "retries", "eta", "expires")
    received = {"name": execution.task, "args": "()", "kwargs": "{}", **{name: request[name] for name in shown}}
    events.append(("task-received", {**named, **received, "timestamp": time.time()}))
    events.append(("task-started", {**named, "timestamp": time.time()}))
    ended: Any = task.__trace__(request["id"], [], {}, request)
    kind, fields = _end_event(ended)
    if kind:
        events.append((kind, {**named, **fields, "timestamp": time.time()}))
    return ended  # type: ignore[no-any-return]


def request_of(execution: Execution, delivered: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a worker would make of an execution's message.

    Args:
        execution: It is claimed, and of a durable task.
        delivered: The request of a message that this process got.
    """
    task_id = str(execution.pk)
    like, mutable = _request_like(execution.task, execution.options, os.getpid())
    return {
        **like,
        # What a body may change is not for the next run.
        **{name: value.copy() for name, value in mutable.items()},
        "id": task_id,
        "root_id": like["root_id"] or str(execution.root_id),
        "parent_id": str(execution.parent_id) if execution.parent_id else like["parent_id"],
        "properties": {**like["properties"], "correlation_id": task_id},
        "correlation_id": task_id,
        "hostname": delivered.get("hostname"),
        "delivery_info": {"exchange": "", "routing_key": execution.queue, "priority": None, "redelivered": False},
        "args": [],
        "kwargs": {},
    }


@functools.lru_cache(maxsize=256)
def _request_like(task: str, options: str, pid: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the requests of executions of a task with the same options have in common, and what of it can change.

    Celery takes as long to make a message as a statement takes; most executions of a task differ in their ids alone.
    """
    del pid  # it is in the request's origin, and a process may be forked
    execution = Execution(task=task, options=options)
    message_options, own_ids = dispatch.message_of(execution), execution.get_options()
    message = current_app.amqp.as_task_v2("", task, **message_options)
    _args, _kwargs, embedded = message.body
    like = {
        **message.headers,
        **message_options["headers"],
        **embedded,
        "root_id": own_ids.get("root_id"),
        "parent_id": own_ids.get("parent_id"),
        "properties": message.properties,
        "reply_to": message.properties["reply_to"],
        "is_eager": False,
    }
    return like, {name: value for name, value in like.items() if isinstance(value, (dict, list))}


def _end_event(ended: Any) -> tuple[str, dict[str, Any]]:
    if not ended.info:
        return "task-succeeded", {"result": ended.retstr, "runtime": ended.runtime}
    error = ended.info.retval
    if isinstance(error, RunEnded):
        return ("task-suspended", {"step": error.step}) if error.what == "suspended" else ("", {})
    return "task-failed", {"exception": repr(error), "traceback": str(getattr(ended.retval, "traceback", ""))}


def _due_at(execution: Execution, ended: Any) -> float | None:
    """Return when the sweeper has something to do after a run, by ``time.time()``."""
    error = ended.info.retval if ended.info else None
    due_in = error.due_in if isinstance(error, RunEnded) else None
    if due_in is None and not isinstance(error, RunEnded) and dispatch.is_left_to_sweeper(execution.get_options()):
        due_in = 0.0
    return None if due_in is None else time.time() + due_in


def _lose(execution: Execution) -> None:
    """Give up a run whose body ended its thread: nobody else hears of it."""
    try:
        transitions.lose(execution.pk, owner=execution.lease_owner)
    except DatabaseError as error:
        logger.warning("Execution %s is left to its lease: %s", execution.pk, error)


def _give_back(delivery: hand_off.Delivery) -> None:
    """Queue what was claimed and will not be run here after all; that costs no attempt."""
    execution, delivery.claimed = delivery.claimed, None
    if execution is None:
        return
    try:
        transitions.release(execution)
    except (DatabaseError, LeaseLost, AbandonRun) as error:
        logger.warning("Execution %s is left to its lease: %s", execution.pk, error)
        resume_unsuspended(delivery.suspended)
