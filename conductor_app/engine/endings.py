"""How an attempt ends: with a result, a failure, a suspension, a cancel; what is stored then, and Celery told.

Whatever ends a run, something is stored of it while its lease is held: what the tracer raises around the body, a
``BaseException``, an error in a run's own last write (``come_to_end``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from django.db import DatabaseError, IntegrityError, InterfaceError, connections

from conductor_app import transitions
from conductor_app.body import left_open
from conductor_app.body.context import ExecutionContext
from conductor_app.body.misuse import as_misuse, unclean
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, hand_off, outcomes
from conductor_app.engine.claims import handing_off
from conductor_app.engine.draining import is_ending
from conductor_app.engine.run import Run, RunEnded
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ChildError,
    EndAttempt,
    EventTimedOut,
    Failure,
    LeaseLost,
    NoneSucceeded,
    NotSerializable,
    OutcomeLost,
    PayloadTooLarge,
    ReleaseExecution,
    RetryExecution,
    UncleanConnection,
    WorkerLost,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store.errors import is_read_only
from conductor_app.store.process import process
from conductor_app.store.transactions import raising_read_only
from conductor_app.transitions import dispatch
from conductor_app.values.failures import describe
from conductor_app.values.payloads import dumps, loads
from conductor_app.values.retries import RetryPolicy

T = TypeVar("T")

logger = logging.getLogger("conductor_app.execution")


class GoOn(Exception):
    """The body can be run again at once."""


def come_to_end(started: Run, act: Callable[[], T]) -> T:
    """Let a run come to its end, which is stored whatever happens on the way."""
    try:
        try:
            return act()
        except (RunEnded, AbandonRun, LeaseLost):
            raise
        except BaseException as error:
            if started.is_over:
                raise
            # One of the run's own writes, most often. What stood in its way must not stand in the next one's.
            started.limit.hold_back()
            report(started.execution, "could not end as it was to", error)
            left_open.discard(database())
            fail_by(started, error)
    except AbandonRun as error:
        started.is_over = True
        logger.error("Run of execution %s is abandoned: %s", started.execution.pk, error)
        raise RunEnded("abandoned", str(error)) from None
    except LeaseLost as error:
        started.is_over = True
        logger.warning("%s", error, extra={"execution_id": str(started.execution.pk)})
        started.lease.on_loss()
        raise RunEnded("dropped", "its lease is lost") from None
    except DatabaseError as error:
        if started.is_over:
            raise
        # Not even the failure can be stored. Nothing else is left to try.
        started.is_over = True
        logger.critical("What became of execution %s cannot be stored: %s", started.execution.pk, error)
        _lose_unstorable(started, error)


def fail_by(started: Run, error: BaseException) -> NoReturn:
    """End a run whose body has not raised this, or cannot be asked."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        leave(started, error)
    end_attempt(started, error)


def leave(started: Run, error: SystemExit | KeyboardInterrupt) -> NoReturn:
    """End the run of a body that was to end its process, and let the exception pass where there is one to end."""
    if is_ending(error):
        store_end(started, lambda: transitions.release(started.execution))
        raise error
    if process.is_told_to_end():
        # A revoke, or the hard time limit: the worker's main process knows why, and what becomes of the execution.
        started.is_over = True
        raise error
    try:
        end_attempt(started, error)
    except Exception:
        if started.is_over and process.worker.gate.is_own_process:
            raise error from None
        raise


def store_end(started: Run, write: Callable[[], T], *, reads_only: list[str] | None = None) -> T:
    """Carry out the write that ends a run; on a new connection if the body's session does not take it.

    Args:
        reads_only: Gets what the body left, if that is why.

    Raises:
        UncleanConnection: The body left a read-only session; only with ``reads_only``.
    """
    try:
        with raising_read_only(reads_only is not None):
            done = write()
    except (DatabaseError, InterfaceError) as error:
        if isinstance(error, IntegrityError) or connections[database()].in_atomic_block:
            raise
        only_reads = is_read_only(error)
    else:
        started.is_over = True
        return done
    # Not before: the error keeps its cursor, and SQLite the transaction of a statement as long as that.
    left_open.discard(database())
    if reads_only is not None and only_reads and not left_open.is_server_read_only(database()):
        reads_only.append(f'{left_open.READ_ONLY} on the connection "{database()}"')
        raise unclean(started.execution.task, reads_only)
    done = write()
    started.is_over = True
    return done


def succeed(started: Run, value: Any) -> Any:
    """Store what the body has returned, and return it as it is stored."""
    execution = started.execution
    try:
        text = dumps(value, f"result of {execution.task}", conductor_settings().MAX_RESULT_BYTES)
    except (NotSerializable, PayloadTooLarge) as error:
        end_attempt(started, error)
    cancelled: Failure | None = None

    def write() -> None:
        nonlocal cancelled
        try:
            transitions.succeed(execution, text, offer)
        except CancelExecution:
            cancelled = transitions.cancel_running(execution, offer, result=text)

    try:
        with handing_off(execution) as offer:
            store_end(started, write, reads_only=[])
    except UncleanConnection as error:
        end_attempt(started, error)
    if cancelled is not None:
        _end_cancelled(started, cancelled, "its body had returned a result, which a retry adopts")
    if delivery := hand_off.delivery_of(execution.pk):
        delivery.settle(execution, text)
        delivery.suspended.clear()
    result = loads(text)
    tell_celery(started, outcomes.Outcome(ExecutionStatus.SUCCEEDED, result))
    return result


def suspend(started: Run, context: ExecutionContext) -> NoReturn:
    """Store that the body waits.

    Raises:
        RunEnded: It does.
        GoOn: What it waits for is there.
    """
    assert context.suspension is not None
    execution = started.execution
    wait, _place = context.suspension
    try:
        with handing_off(execution) as offer:
            suspended = store_end(
                started,
                lambda: transitions.suspend(execution, wait, _state_writer(started, wait, context), offer),
                reads_only=[],
            )
    except CancelExecution:
        cancel(started)
    except ReleaseExecution:
        # It would have stored children, and somebody holds it.
        started.lease.on_hold = True
        release(started)
    except OutcomeLost as lost:
        raise EndAttempt(lost) from None
    except UncleanConnection as error:
        end_attempt(started, error)
    if not suspended:
        started.is_over = False
        raise GoOn
    if (delivery := hand_off.delivery_of(execution.pk)) and isinstance(wait, transitions.Invocation):
        delivery.keep(execution, wait, context.memory)
        if delivery.claimed is not None:
            delivery.suspended.append(execution)
    detail = f"waiting for step {wait.step!r}{wait.detail}"
    raise RunEnded("suspended", detail, wait.due_in, wait.step) from None


def _state_writer(started: Run, wait: transitions.Wait, context: ExecutionContext) -> Callable[[], None] | None:
    """Return what shows in the result backend that an execution waits, and what it tells, while its row is locked.

    ``None`` without a result backend, and if the body has said there how it stands.
    """
    execution = started.execution
    if started.reports_state or not announcements.is_shown(execution):
        return None
    child = None if wait.child_id is None else str(wait.child_id)
    info = {"waiting_for": wait.step, "child": child, **context._told().info()}
    state = conductor_settings().REPORTED_STATE
    return lambda: announcements.show(execution, state, info, started.hostname)


def release(started: Run) -> NoReturn:
    """Give an execution back: whatever its body did after it was told so, it is run again from what is recorded."""
    is_held = started.lease.on_hold
    store_end(started, lambda: transitions.release(started.execution, is_held=is_held))
    raise RunEnded("released", "somebody holds it" if is_held else "the worker shuts down") from None


def cancel(started: Run, detail: str = "") -> NoReturn:
    """End an execution that is to be cancelled.

    Args:
        detail: What the log is to say beside the reason.
    """
    execution = started.execution
    with handing_off(execution) as offer:
        failure = store_end(started, lambda: transitions.cancel_running(execution, offer))
    if failure is None:
        raise RunEnded("released", "its cancellation was withdrawn") from None
    _end_cancelled(started, failure, detail)


def _end_cancelled(started: Run, failure: Failure, detail: str) -> NoReturn:
    tell_celery(started, outcomes.cancelled(failure.message))
    reason = started.execution.cancel_reason
    raise RunEnded("cancelled", "; ".join(filter(None, (reason, detail))), 0.0) from None


def end_attempt(started: Run, error: BaseException) -> NoReturn:
    """Retry later if the policy allows and attempts are left; else fail for good and raise the error."""
    task, execution = started.task, started.execution
    error = as_misuse(error, task.name)
    limit = conductor_settings().MAX_ERROR_BYTES
    policy: RetryPolicy = task.retry_policy  # type: ignore[attr-defined]  # DurableTask has it
    # What is no Exception is tried again where any Exception would be, unless it is named.
    is_retried = policy.allows(error) or (
        not isinstance(error, (Exception, *policy.dont_autoretry_for)) and policy.allows(Exception())
    )
    delay: float | None = policy.delay(execution.attempt) if is_retried else None
    if isinstance(error, RetryExecution):
        delay = policy.delay(execution.attempt) if error.countdown is None else error.countdown
        if isinstance(error.exc, Exception):
            error = error.exc
    failure = _failure(execution, error, limit)
    if delay is not None and execution.has_attempts_left:
        seconds = delay
        try:
            store_end(started, lambda: transitions.retry_later(execution, failure, seconds))
        except CancelExecution:
            cancel(started, _raised(failure))
        raise RunEnded(
            "retrying",
            f"attempt {execution.attempt} failed ({next(iter(failure.message.splitlines()), '')}), "
            f"the next one is due in {delay:.3g}s",
            delay,
        ) from None
    if isinstance(error, RetryExecution):
        error.args = (f"ctx.retry() asked for another attempt, but attempt {execution.attempt} was the last one.",)
        failure = describe(error, limit)
    step = error.step if isinstance(error, (ChildError, EventTimedOut, NoneSucceeded, OutcomeLost)) else ""
    child_id = error.child_id if isinstance(error, ChildError) else None
    try:
        with handing_off(execution) as offer:
            store_end(
                started, lambda: transitions.fail(execution, failure, step=step, child_id=child_id, hand_off=offer)
            )
    except CancelExecution:
        cancel(started, _raised(failure))
    is_death = isinstance(error, KeyboardInterrupt)
    told = WorkerLost(failure.message) if is_death else outcomes.portable(error, failure.message)
    tell_celery(started, outcomes.Outcome(ExecutionStatus.FAILED, error=told, traceback=failure.traceback))
    raise told


def _failure(execution: Execution, error: BaseException, limit: int) -> Failure:
    failure = describe(error, limit)
    # Not an error that code raises: somebody, or something, interrupts the process.
    return transitions.worker_lost(execution, failure) if isinstance(error, KeyboardInterrupt) else failure


def _raised(failure: Failure) -> str:
    return f"its body raised {failure.type}: {failure.message}".splitlines()[0]


def _lose_unstorable(started: Run, error: BaseException) -> NoReturn:
    try:
        left_open.discard(database())
        transitions.lose(started.execution.pk, owner=started.execution.lease_owner)
    except DatabaseError as again:
        logger.critical("Execution %s is left to its lease: %s", started.execution.pk, again)
    raise RunEnded("abandoned", f"its outcome cannot be stored: {error}") from None


def tell_celery(started: Run, outcome: outcomes.Outcome) -> None:
    """Tell Celery of the outcome, which is committed; what fails here, the sweeper does again."""
    execution = started.execution
    options = execution.get_options()
    if not options.get("announce") or dispatch.is_left_to_sweeper(options) or announcements.is_resting():
        return
    try:
        announcements.tell(execution, outcome, started.hostname)
    except (Exception, AbandonRun) as error:  # noqa: BLE001 - whatever broker and result backend raise
        logger.warning(
            "Execution %s %s, but Celery could not be told (%s: %s). It will be told again.",
            execution.pk,
            outcome.status,
            type(error).__name__,
            error,
            extra={"execution_id": str(execution.pk)},
        )


def report(execution: Execution, what: str, error: BaseException) -> None:
    """Log an error with its traceback, whatever its class makes of that."""
    failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
    logger.error(
        "Execution %s %s: %s: %s",
        execution.pk,
        what,
        failure.type,
        failure.message,
        exc_info=outcomes.portable(error, failure.message),
        extra={"execution_id": str(execution.pk)},
    )
