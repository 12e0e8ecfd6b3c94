"""The runs of one delivery of a durable task: the one that it is about, and those that follow in the same process.

A guard around the task's tracer, where bodies run. A delivery has to win the claim of its execution first, before
Celery's tracer, the task's base class, its hooks and the receivers of signals see any of it; so whatever they raise is
an attempt's error, and is stored as such. What they see is the row's: its arguments, its headers, its ids. A message
says no more than which execution is meant.

When Celery has ended the run that was delivered, the guard lets it run what that run handed off (``hand_off``), by that
task's own tracer, and so on. The worker's main process sees one job; what it has to know of the others travels back
with the job's runtime.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, current_app, states
from celery.app import trace
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import TaskPredicate
from celery.utils.serialization import get_pickleable_exception
from django.db import DatabaseError

from conductor_app import transitions
from conductor_app.body import left_open
from conductor_app.body.plain import is_invocable
from conductor_app.engine import claims, endings, executor, hand_off, misfits
from conductor_app.engine.run import Run, RunEnded
from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.models import Execution
from conductor_app.store.ids import of_task_id
from conductor_app.store.process import process
from conductor_app.store.soft_limits import soft_limit
from conductor_app.transitions import dispatch

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
    if not isinstance(error, RunEnded):
        return ExceptionInfo(exc_info, internal)
    if error.what == "suspended":
        _clear_in_sentry()
    return EndInfo(error, internal)


def _clear_in_sentry() -> None:
    """Make a suspension no failure in Sentry, if that is here.

    Its integration, up to version 2, gives the transaction of a run that ends by ``Ignore`` the status "aborted". This
    is called by Celery's tracer afterwards, and before the transaction ends.
    """
    sentry: Any = sys.modules.get("sentry_sdk")
    if sentry is None:
        return
    with suppress(Exception):
        span = sentry.get_current_span()
        if span is not None and span.status == "aborted":
            span.set_status("ok")


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
        # Another run's body in this process called it, or it may be followed by none.
        if hand_off.current.get() is not None or not _may_go_on(task, request):
            return _run_delivered(task, tracer, task_id, args, kwargs, request)
        execution_id = of_task_id(task_id)
        delivery = hand_off.Delivery(execution_id)
        token = hand_off.current.set(delivery)
        process.worker.gate.show(execution_id)
        try:
            outcome = _go_on(delivery, _run_delivered(task, tracer, task_id, args, kwargs, request), request)
        finally:
            # What is shown stays: if the process ends by this, the main process has to know what it ran.
            hand_off.current.reset(token)
            _give_back(delivery)
        process.worker.gate.show(None)
        return outcome

    guarded.is_conductor = True  # type: ignore[attr-defined]
    guarded.tracer = tracer  # type: ignore[attr-defined]
    return guarded


def _run_delivered(
    task: Any, tracer: Tracer, task_id: Any, args: Any, kwargs: Any, request: dict[str, Any]
) -> trace_ok_t:
    """Claim the execution that a message is about, and let Celery run it."""
    limit = soft_limit()
    limit.hold_back()
    try:
        if not request.get("is_eager"):
            process.worker.renew_connections()
            left_open.clear(f"{task.name}[{task_id}]")
        try:
            execution_id = _identify(task, task_id, args, kwargs, request)
        except RunEnded as ended:
            return _drop(task, task_id, ended, request)
        except Exception as refusal:  # noqa: BLE001 - whatever is wrong with what somebody else has published
            # It becomes no execution, and Celery records the failure as it does for any task.
            token = task.refused.set((task_id, refusal))
            try:
                return tracer(task_id, args, kwargs, request)  # type: ignore[no-any-return]
            finally:
                task.refused.reset(token)
        try:
            execution = claims.take(task, execution_id, request.get("hostname"))
        except RunEnded as ended:
            return _drop(task, task_id, ended, request)
        return _run_claimed(task, tracer, execution, lambda: request_of(execution, request, task_id), limit)
    finally:
        limit.forget()  # the body is done, and what follows it is not the body's to fail


def _identify(task: Any, task_id: Any, args: Any, kwargs: Any, request: dict[str, Any]) -> Any:
    """Return the id of the execution that a message is about; see ``DurableTask.identify``."""
    if (request.get(dispatch.HEADER) or (request.get("headers") or {}).get(dispatch.HEADER)) is not None:
        return of_task_id(task_id)
    return task.identify(Context(request, args=args, kwargs=kwargs, called_directly=False), args, kwargs)


def _run_claimed(
    task: Any, tracer: Tracer, execution: Execution, make_request: Callable[[], dict[str, Any]], limit: Any
) -> trace_ok_t:
    """Let Celery's tracer run a claimed execution, and see to it that something is stored of it."""
    with claims.held(task, execution, limit, None) as started:
        request: dict[str, Any] = {}
        try:
            request = make_request()
            started.hostname = request["hostname"]
            try:
                misfits.put_off_misfit(started, is_eager=request["is_eager"])
            except RunEnded as ended:
                return _drop(task, request["id"], ended, request)
            args, kwargs = started.arguments() or ([], {})
            outcome = tracer(request["id"], args, kwargs, request)
        except BaseException as error:  # noqa: BLE001 - whatever stands around the body
            return _escaped(started, error)
        return outcome if started.is_over else _settle(started, outcome)


def _settle(started: Run, outcome: Any) -> trace_ok_t:
    """Store how a run has ended that never came as far as its body."""
    error = outcome.info.retval if outcome.info else None
    started.watch.clean()
    try:
        if isinstance(error, BaseException):
            executor.end_by(started, error)
        else:
            executor.succeed_by(started, outcome.retval)
    except RunEnded as ended:
        return _ended_by(ended)
    except Exception as told:
        logger.debug("Execution %s has failed before its body.", started.execution.pk, exc_info=True)
        if isinstance(error, TaskPredicate):
            return _ended_by(told)  # Celery would be silent about it
    return outcome  # type: ignore[no-any-return]


def _escaped(started: Run, error: BaseException) -> trace_ok_t:
    """Store what came out of Celery's tracer, and return what Celery is to make of it.

    Only what ends the process may leave the pool's function: it would take anything else for an unreadable message, or
    never free the slot.
    """
    if started.is_over:
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise error
        endings.report(started.execution, "has ended, and what followed failed", error)
        if started.error is None:
            return trace_ok_t(started.result, None, 0.0, "")
        return _ended_by(started.error)
    started.watch.clean()
    try:
        executor.end_by(started, error)
    except Exception as told:  # noqa: BLE001 - what failed the execution for good, or ``RunEnded``
        endings.report(started.execution, "has failed outside of its body", error)
        return _ended_by(told)
    return _ended_by(error)


def _ended_by(error: BaseException) -> trace_ok_t:
    if isinstance(error, RunEnded):
        return trace_ok_t(EndInfo(error, True), TraceInfo(states.IGNORED, error), 0.0, None)
    told: Any = get_pickleable_exception(error)  # type: ignore[arg-type]  # it takes any
    return trace_ok_t(
        ExceptionInfo((type(told), told, error.__traceback__)), TraceInfo(states.FAILURE, told), 0.0, None
    )


def _drop(task: Any, task_id: Any, ended: RunEnded, request: dict[str, Any]) -> trace_ok_t:
    """Return what the tracer returns for a task that raises ``Ignore``: the message is acknowledged, nobody is told."""
    logger.info("Task %s[%s] %s", task.name, task_id, ended)
    if not request.get("is_eager"):
        process.worker.renew_connections()
    return _ended_by(ended)


def _may_go_on(task: Any, request: dict[str, Any]) -> bool:
    """Tell whether other runs may follow a delivery; a time limit of its own would count for them, too."""
    return process.worker.gate.is_open() and not any(request.get("timelimit") or ()) and not hand_off.is_limited(task)


def _go_on(delivery: hand_off.Delivery, outcome: Any, request: dict[str, Any]) -> Any:
    """Run what was handed off, one after another, and return the outcome of the run that was delivered."""
    runtime = Runtime(outcome.runtime or 0.0)
    runtime.events = []
    while (execution := delivery.begin_next()) is not None:
        ended = _run(execution, request, runtime.events)
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
    ended: Any = _run_handed_off(task, execution, request)
    if told := _end_event(ended):
        kind, fields = told
        events.append((kind, {**named, **fields, "timestamp": time.time()}))
    return ended  # type: ignore[no-any-return]


def _run_handed_off(task: Any, execution: Execution, request: dict[str, Any]) -> trace_ok_t:
    limit = soft_limit()
    limit.hold_back()
    try:
        left_open.clear(f"{task.name}[{execution.pk}]")
        try:
            taken = claims.take(task, execution.pk, request["hostname"])
        except RunEnded as ended:
            return _drop(task, request["id"], ended, request)
        return _run_claimed(task, task.__trace__.tracer, taken, lambda: request, limit)
    finally:
        limit.forget()


def request_of(execution: Execution, delivered: dict[str, Any], delivered_as: Any = None) -> dict[str, Any]:
    """Return the request that a worker would make of an execution's own message: a message is no authority.

    Args:
        execution: It is claimed, and of a durable task.
        delivered: The request of a message that this process got.
        delivered_as: The task id of that message, if it is about this execution; an adopted one's may be no UUID.
    """
    task_id = str(execution.pk if delivered_as is None else delivered_as)
    delivery_info = {"exchange": "", "routing_key": execution.queue, "priority": None, "redelivered": False}
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
        "delivery_info": delivery_info if delivered_as is None else delivered.get("delivery_info") or delivery_info,
        "is_eager": bool(delivered.get("is_eager")) and delivered_as is not None,
        "retries": execution.attempt - 1,
        # Whatever the tracer meets before it comes to the body: Celery is told by the run itself.
        "ignore_result": True,
        **dict.fromkeys(("callbacks", "errbacks", "chain", "chord")),
        "args": [],
        "kwargs": {},
    }


@functools.lru_cache(maxsize=256)
def _request_like(task: str, options: str, pid: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the requests of executions of a task with the same options have in common, and what of it can change.

    Celery takes as long to make a message as a statement takes; most executions of a task differ in their ids alone.
    """
    del pid  # it is in the request's origin, and a process may be forked
    execution = Execution(task=task, options=options, payload="[[],{}]")
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
    }
    return like, {name: value for name, value in like.items() if isinstance(value, (dict, list))}


def _end_event(ended: Any) -> tuple[str, dict[str, Any]] | None:
    if not ended.info:
        return "task-succeeded", {"result": ended.retstr, "runtime": ended.runtime}
    error = ended.info.retval
    if isinstance(error, RunEnded):
        return error.event()
    return "task-failed", {"exception": repr(error), "traceback": str(getattr(ended.retval, "traceback", ""))}


def _due_at(execution: Execution, ended: Any) -> float | None:
    """Return when the sweeper has something to do after a run, by ``time.time()``."""
    error = ended.info.retval if ended.info else None
    due_in = error.due_in if isinstance(error, RunEnded) else None
    if due_in is None and not isinstance(error, RunEnded) and dispatch.is_left_to_sweeper(execution.get_options()):
        due_in = 0.0
    return None if due_in is None else time.time() + due_in


def _give_back(delivery: hand_off.Delivery) -> None:
    """Queue what was claimed and will not be run here after all; that costs no attempt."""
    execution, delivery.claimed = delivery.claimed, None
    if execution is None:
        return
    try:
        transitions.release(execution)
    except (DatabaseError, LeaseLost, AbandonRun) as error:
        logger.warning("Execution %s is left to its lease: %s", execution.pk, error)
        claims.resume_unsuspended(delivery.suspended)
