"""One run of a plain Celery task that is somebody's child: from a Celery delivery to its outcome.

Celery runs the body, retries it, stores its result and calls its callbacks as it always does. A guard around the
task's tracer, in the process that runs bodies, adds what ``executor`` does for a durable task: the delivery has to win
the claim of its execution, or is dropped as if the task had raised ``Ignore``; the lease is held until the tracer
returns; and the outcome is written to the execution. So a copy of the message is harmless, and the sweeper may publish
it again.

A delivery whose id no child has passes through, at the cost of a look at the id.
"""

from __future__ import annotations

import datetime as dt
import logging
import sys
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

from billiard.einfo import ExceptionInfo
from celery import Celery, current_app, states
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore, Reject, Retry
from django.db import DatabaseError, close_old_connections
from django.utils import timezone

from conductor_app import executor, observing, transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    LeaseLost,
    NotSerializable,
    PayloadTooLarge,
    TaskEndedWithoutOutcome,
)
from conductor_app.executor import RunEnded
from conductor_app.ids import as_child_id
from conductor_app.leases import keeper
from conductor_app.models import Execution, database
from conductor_app.plain import is_invocable
from conductor_app.serialization import describe, dump_call, dumps, loads
from conductor_app.soft_limits import soft_limit

logger = logging.getLogger("conductor_app.execution")

Tracer = Callable[..., Any]

#: The run whose tracer is at work in this thread.
_current: ContextVar[_Run | None] = ContextVar("conductor_app_plain_run", default=None)
#: Whether this is a process of a prefork pool: when it dies, the worker's main process notices.
_is_pool_process = False


def guard_tasks(app: Celery) -> None:
    """Put the guard around the tracer of each plain task of ``app``. Celery builds new ones on each reconnect."""
    for task in app.tasks.values():
        tracer = getattr(task, "__trace__", None)
        if tracer is not None and not is_invocable(task) and not hasattr(tracer, "is_conductor"):
            cast_task: Any = task
            cast_task.__trace__ = guard(task, tracer)


def guard_pool_process(**_kwargs: Any) -> None:
    """Guard the tasks in a new process of a prefork pool; receiver of ``celery.signals.worker_process_init``."""
    global _is_pool_process  # noqa: PLW0603
    _is_pool_process = True
    guard_tasks(current_app._get_current_object())  # type: ignore[attr-defined]


def guard(task: Any, tracer: Tracer) -> Tracer:
    """Return the tracer of a plain task, made to run the deliveries of children as their executions."""

    def guarded(task_id: Any, args: Any, kwargs: Any, request: dict[str, Any] | None = None) -> Any:
        execution_id = as_child_id(task_id)
        if execution_id is None:
            return tracer(task_id, args, kwargs, request)
        request = request or {}
        # A soft limit that comes now would be raised outside of the body.
        limit = soft_limit()
        limit.hold_back()
        try:
            execution = _claim(task, execution_id, request)
        except RunEnded as ended:
            return _drop(task, task_id, ended, request)
        finally:
            limit.forget()
        if execution is None:
            return tracer(task_id, args, kwargs, request)
        # The row's arguments, not the message's: a forged message has no authority.
        args, kwargs = loads(execution.payload)
        with keeper.hold(execution), observing.running(execution):
            return _Run(task, execution).trace(tracer, args, kwargs, request)

    guarded.is_conductor = True  # type: ignore[attr-defined]
    return guarded


def is_running(task_id: object) -> bool:
    """Tell whether this thread is inside the run of this id; then what Celery says of it is the run's business."""
    run = _current.get()
    return run is not None and run.task_id == task_id


def on_postrun(task_id: str, retval: Any = None, state: str | None = None, **_kwargs: Any) -> None:
    """Write the outcome of a run to its execution; receiver of ``celery.signals.task_postrun``.

    Not of ``task_success``, ``task_failure`` and ``task_retry``: they are sent after the result backend has stored the
    outcome, and not at all when it is away.
    """
    run = _current.get()
    if run is not None and run.task_id == task_id and not run.ended:
        run.end(state, sys.exception() if state is None else retval)


def _claim(task: Any, execution_id: uuid.UUID, request: dict[str, Any]) -> Execution | None:
    """Return the claimed execution; ``None`` if the delivery is none of ours.

    Raises:
        RunEnded: It is, and there is nothing to run.
    """
    retries = request.get("retries")
    attempt = (retries if isinstance(retries, int) else 0) + 1
    owner = executor.lease_owner(request.get("hostname"))
    try:
        execution = executor.claim(execution_id, owner, task.name, attempt)
        if execution is None:
            rows = Execution.objects.using(database()).filter(pk=execution_id, task=task.name)
            if rows.exists():
                raise RunEnded("dropped", "not queued, about another attempt, or another run has it")
    except DatabaseError as error:
        # Nothing was claimed, the row is queued: the sweeper publishes it again.
        logger.warning("Execution %s was not claimed, the database is away: %s", execution_id, error)
        raise RunEnded("abandoned", "the database is away") from None
    return execution


def _drop(task: Any, task_id: str, ended: RunEnded, request: dict[str, Any]) -> Any:
    """Return what the tracer returns for a task that raises ``Ignore``: the message is acknowledged, nobody is told."""
    logger.info("Task %s[%s] %s", task.name, task_id, ended)
    if not request.get("is_eager"):
        close_old_connections()
    try:
        raise ended
    except RunEnded:
        return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(states.IGNORED, ended), 0.0, None)


class _Run:
    """A claimed execution while Celery's tracer runs it."""

    def __init__(self, task: Any, execution: Execution) -> None:
        self._task = task
        self._execution = execution
        self.task_id = str(execution.pk)
        #: Whether the outcome was handed to the database.
        self.ended = False

    def trace(self, tracer: Tracer, args: list[Any], kwargs: dict[str, Any], request: dict[str, Any]) -> Any:
        """Run Celery's tracer, and see to it that the execution gets an outcome."""
        token = _current.set(self)
        error: BaseException | None = None
        try:
            return tracer(self.task_id, args, kwargs, request)
        except BaseException as raised:
            error = raised
            raise
        finally:
            _current.reset(token)
            if not self.ended and (error is None or isinstance(error, Exception)):
                self.end(None, error)
            elif not self.ended and not _is_pool_process:
                # The body ends its process, or its thread. Of a pool process the worker's main process hears.
                self._write(lambda: transitions.lose(self._execution.pk, owner=self._execution.lease_owner))

    def end(self, state: str | None, value: Any) -> None:
        """Write the outcome.

        Args:
            state: The tracer's; ``None`` if it got into trouble on the way, with the result backend for example.
            value: What belongs to the state: a result, or an exception.
        """
        error = value if isinstance(value, BaseException) else None
        if state is None:
            error = _raised_by_body(error)
            if error is not None and not isinstance(error, Exception):
                return  # the process ends
        if state == states.SUCCESS:
            self._write(lambda: self._succeed(value))
        elif isinstance(error, Retry):
            retry: Any = error
            self._write(lambda: self._retry(retry))
        elif isinstance(error, Reject) and getattr(error, "requeue", False):
            self._write(lambda: transitions.release(self._execution))
        elif isinstance(error, Reject) and isinstance(getattr(error, "reason", None), Exception):
            # How ``self.retry()`` ends when the broker does not take its message.
            failed = cast(Exception, cast(Any, error).reason)
            self._write(lambda: self._fail(failed))
        elif error is None or isinstance(error, (Ignore, Reject)):
            self._write(lambda: self._fail(_without_outcome(self._task.name, error)))
        else:
            raised = error
            self._write(lambda: self._fail(raised))

    def _write(self, act: Callable[[], object]) -> None:
        self.ended = True
        # The body is done: a soft limit that comes now is not to be raised in the middle of a COMMIT.
        limit = soft_limit()
        limit.hold_back()
        try:
            executor.close_broken_connections()
            try:
                act()
            except CancelExecution:
                transitions.cancel_running(self._execution)
        except LeaseLost as error:
            logger.warning("%s", error, extra={"execution_id": self.task_id})
        except (AbandonRun, DatabaseError) as error:
            logger.error("The outcome of execution %s is not written, its lease will lapse: %s", self.task_id, error)
        finally:
            limit.forget()

    def _succeed(self, value: Any) -> None:
        try:
            text = dumps(value, f"result of {self._task.name}", conductor_settings().MAX_RESULT_BYTES)
        except (NotSerializable, PayloadTooLarge) as error:
            self._fail(error)
        else:
            transitions.succeed(self._execution, text)

    def _fail(self, error: BaseException) -> None:
        transitions.fail(self._execution, describe(error, conductor_settings().MAX_ERROR_BYTES))

    def _retry(self, retry: Any) -> None:
        cause = retry.exc if isinstance(retry.exc, BaseException) else retry
        signature = retry.sig
        payload = None
        if signature is not None:
            # ``self.retry(args=…)``: what Celery's message says has to be said by ours, too.
            limit = conductor_settings().MAX_PAYLOAD_BYTES
            try:
                payload = dump_call(list(signature.args or ()), dict(signature.kwargs or {}), limit)
            except (NotSerializable, PayloadTooLarge) as error:
                self._fail(error)
                return
        transitions.retry_later(
            self._execution,
            describe(cause, conductor_settings().MAX_ERROR_BYTES),
            _seconds_until(retry.when),
            payload=payload,
            # ``raise Retry()`` alone publishes nothing, nor does a run without a worker.
            is_published=signature is not None and not retry.is_eager,
        )


def _seconds_until(when: Any) -> float:
    if isinstance(when, dt.datetime):
        now = timezone.now()
        return max((when - (timezone.make_naive(now) if timezone.is_naive(when) else now)).total_seconds(), 0.0)
    return max(float(when or 0), 0.0)


def _raised_by_body(error: BaseException | None) -> BaseException | None:
    """Return what the body raised, if Celery's tracer then failed to handle it.

    Of the exceptions that were raised while another one was handled, that is the innermost one that came up as far as
    the tracer's own frame; what lies behind it was handled inside the body.
    """
    found = link = error
    while link is not None:
        if _came_up_to_tracer(link):
            found = link
        link = link.__context__
    return found


def _came_up_to_tracer(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    return frame.f_code.co_name == "trace_task" and frame.f_globals.get("__name__") == "celery.app.trace"


def _without_outcome(task: str, error: BaseException | None) -> TaskEndedWithoutOutcome:
    raised = "" if error is None else f" by raising {type(error).__name__}({', '.join(map(repr, error.args))})"
    return TaskEndedWithoutOutcome(f"{task} ended with neither a result nor an error{raised}.")
