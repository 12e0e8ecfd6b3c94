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
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore, Reject, Retry
from django.db import DatabaseError, InterfaceError
from django.utils import timezone

from conductor_app import logs, transitions
from conductor_app.body import apart, headers, left_open
from conductor_app.body.plain import PlainTask, is_invocable
from conductor_app.conf import conductor_settings
from conductor_app.engine import claims, draining, endings, misfits, outcomes
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    LeaseLost,
    NewerFormat,
    NotSerializable,
    PayloadTooLarge,
    TaskEndedWithoutOutcome,
)
from conductor_app.models import Execution, database
from conductor_app.store import observing, owners
from conductor_app.store.ids import as_child_id
from conductor_app.store.process import process
from conductor_app.store.soft_limits import soft_limit
from conductor_app.values.failures import describe
from conductor_app.values.payloads import dump_call, dumps, loads

logger = logging.getLogger("conductor_app.execution")

Tracer = Callable[..., Any]

#: The run whose tracer is at work in this thread.
_current: ContextVar[_Run | None] = ContextVar("conductor_app_plain_run", default=None)


def guard_tasks(app: Celery) -> None:
    """Put the guard around the tracer of each plain task of ``app``. Celery builds new ones on each reconnect."""
    for task in app.tasks.values():
        tracer = getattr(task, "__trace__", None)
        if tracer is not None and not is_invocable(task) and not hasattr(tracer, "is_conductor"):
            cast_task: Any = task
            cast_task.__trace__ = guard(task, tracer)


def guard_pool_process(**_kwargs: Any) -> None:
    """Guard the tasks in a new process of a prefork pool; receiver of ``celery.signals.worker_process_init``."""
    owners.join_worker()
    guard_tasks(current_app._get_current_object())  # type: ignore[attr-defined]


def guard(task: Any, tracer: Tracer) -> Tracer:
    """Return the tracer of a plain task, made to run the deliveries of children as their executions."""

    def guarded(task_id: Any, args: Any, kwargs: Any, request: dict[str, Any] | None = None) -> Any:
        execution_id = as_child_id(task_id)
        # From now on one that strikes a statement takes its connection along, whosever task it ends.
        limit = soft_limit()
        if execution_id is None:
            return tracer(task_id, args, kwargs, request)
        request = request or {}
        # A soft limit that comes now would be raised outside of the body.
        limit.hold_back()
        try:
            if not request.get("is_eager"):
                left_open.clear(f"{task.name}[{task_id}]")
            execution = _claim(task, execution_id, request)
        except RunEnded as ended:
            return _drop(task, task_id, ended, request)
        finally:
            limit.forget()
        if execution is None:
            return tracer(task_id, args, kwargs, request)
        postponed = _put_off_misfit(task, execution, request)
        if postponed is not None:
            return _drop(task, task_id, postponed, request)
        # Nor is the result the message's to keep or to ignore: Celery 5.6 publishes a retry without the caller's word.
        request = {
            **_with_headers(request, headers.kept_by(execution)),
            "ignore_result": bool(execution.get_options().get("ignore_result", task.ignore_result)),
        }
        with process.keeper.hold(execution), logs.about(execution), observing.running(execution):
            return _Run(task, execution).trace(tracer, request)

    guarded.is_conductor = True  # type: ignore[attr-defined]
    return guarded


def _with_headers(request: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Return a request with the headers that its execution keeps; those of a later message are another place's."""
    if not kept:
        return request
    shown = {} if request.get("headers") is None else {"headers": {**request["headers"], **kept}}
    return {**request, **kept, **shown}


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
    owner = owners.lease_owner(request.get("hostname"))
    try:
        execution = claims.claim(execution_id, owner, task.name, attempt)
        if execution is None:
            rows = Execution.objects.using(database()).filter(pk=execution_id, task=task.name)
            if rows.exists():
                raise RunEnded("dropped", "not queued, about another attempt, or another run has it")
    except (DatabaseError, InterfaceError) as error:
        raise claims.not_claimed(execution_id, error) from None
    return execution


def _put_off_misfit(task: Any, execution: Execution, request: dict[str, Any]) -> RunEnded | None:
    """Leave a claimed execution whose payload does not fit the task here to other workers, as ``misfits`` does.

    When that was tried enough, the task says itself what it misses.
    """
    if request.get("is_eager"):
        return None
    try:
        misfit = PlainTask(task).misfit(*loads(execution.payload))
    except NewerFormat as error:
        misfit = f"{task.name} here ({error})"
    if not misfit:
        return None
    try:
        return misfits.put_off(execution, misfit, request.get("hostname"))
    except CancelExecution:
        transitions.cancel_running(execution)
        return RunEnded("cancelled", execution.cancel_reason, 0.0)
    except (LeaseLost, AbandonRun, DatabaseError) as error:
        return RunEnded("abandoned", str(error))


def _drop(task: Any, task_id: str, ended: RunEnded, request: dict[str, Any]) -> Any:
    """Return what the tracer returns for a task that raises ``Ignore``: the message is acknowledged, nobody is told."""
    logger.info("Task %s[%s] %s", task.name, task_id, ended)
    if not request.get("is_eager"):
        left_open.close_old()
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
        self._watch = left_open.Watch()

    def trace(self, tracer: Tracer, request: dict[str, Any]) -> Any:
        """Run Celery's tracer, and see to it that the execution gets an outcome."""
        token = _current.set(self)
        self._watch.begin()
        try:
            # The row's arguments, not the message's: a forged message has no authority.
            args, kwargs = loads(self._execution.payload)
            outcome = apart.run(tracer, self.task_id, args, kwargs, request)
        except Exception as error:
            if not self.ended:
                self.end(None, error)
            raise
        except BaseException as error:  # noqa: BLE001 - stored, and raised again if it is to end the process
            return self._escaped(error, request)
        finally:
            _current.reset(token)
        if not self.ended:
            self.end(None, None)
        return outcome

    def _escaped(self, error: BaseException, request: dict[str, Any]) -> Any:
        """Store what has come out of the tracer and is no ``Exception``, and return or raise what Celery is to get."""
        is_exit = isinstance(error, (SystemExit, KeyboardInterrupt))
        if not self.ended and is_exit and draining.is_ending(error):
            # As at any end of a worker: what Celery would not run again is not run again here, either.
            if self._execution.runs_again:
                self._write(lambda: transitions.release(self._execution))
            else:
                self._lose(error)
        elif not self.ended and is_exit and not process.is_told_to_end():
            self._lose(error)
        elif not self.ended and not is_exit:
            self._write(lambda: self._fail(error))
        if is_exit and (process.worker.gate.is_own_process or draining.is_ending(error)):
            raise error
        # Of what is no Exception Celery would make an unreadable message, or a slot that is never free.
        told = outcomes.portable(error, describe(error, conductor_settings().MAX_ERROR_BYTES).message)
        try:
            raise told
        except Exception:  # noqa: BLE001 - what has just been raised
            info = TraceInfo(states.FAILURE, told)
            context = Context(request, called_directly=False)
            return trace_ok_t(info.handle_error_state(self._task, context), info, 0.0, None)

    def _lose(self, error: BaseException) -> None:
        ended_by = describe(error, conductor_settings().MAX_ERROR_BYTES)
        self._write(lambda: transitions.lose(self._execution.pk, owner=self._execution.lease_owner, ended_by=ended_by))

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
                return  # the tracer lets it out
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
            if found := self._watch.end():
                # Celery has its outcome by now, so it stays what it is.
                logger.error(
                    "%s left %s at its end. What it had written there and not committed is rolled back.",
                    self._task.name,
                    " and ".join(found),
                    extra={"execution_id": self.task_id},
                )
            try:
                self._try(act)
            except (DatabaseError, InterfaceError) as error:
                # Whatever this outcome is refused for, the execution has to get one while its process lives.
                endings.report(self._execution, "could not end as it was to", error)
                refused = error
                self._try(lambda: self._fail(refused))
        except LeaseLost as error:
            logger.warning("%s", error, extra={"execution_id": self.task_id})
        except (AbandonRun, DatabaseError, InterfaceError) as error:
            logger.error("The outcome of execution %s is not written, its lease will lapse: %s", self.task_id, error)
        finally:
            limit.forget()

    def _try(self, act: Callable[[], object]) -> None:
        def ended() -> None:
            try:
                act()
            except CancelExecution:
                transitions.cancel_running(self._execution)

        try:
            ended()
        except (DatabaseError, InterfaceError):
            if not left_open.discard(database()):
                raise
            ended()

    def _succeed(self, value: Any) -> None:
        try:
            text = dumps(value, f"result of {self._task.name}", conductor_settings().MAX_RESULT_BYTES)
        except (NotSerializable, PayloadTooLarge) as error:
            self._fail(error)
        else:
            try:
                transitions.succeed(self._execution, text)
            except CancelExecution:
                transitions.cancel_running(self._execution, result=text)

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
