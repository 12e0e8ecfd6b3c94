"""One run: from a Celery delivery to a suspension or an outcome.

``run`` is called by Celery's tracer in the place of the task's body. It returns the result and raises the final error
as any task does, so signals, hooks, log lines and Sentry see each execution once, at its real end. The result backend
and callbacks, chain and chord are told here (``announcements``). Every other way to end a run raises ``RunEnded``, a
``celery.exceptions.Ignore``.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from celery import Task
from celery.exceptions import Ignore
from django.db import DatabaseError

from conductor_app import announcements, dispatch, hand_off, observing, steps, transitions
from conductor_app.conf import conductor_settings
from conductor_app.context import SWALLOWED_ADVICE, ExecutionContext, swallowed_suspension
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ChildError,
    ControlFlow,
    EventTimedOut,
    LeaseLost,
    NotSerializable,
    PayloadTooLarge,
    ReleaseExecution,
    RetryExecution,
    SuspendExecution,
)
from conductor_app.leases import Lease, keeper
from conductor_app.models import Execution
from conductor_app.retries import RetryPolicy
from conductor_app.serialization import describe, dumps, loads
from conductor_app.soft_limits import SoftLimit, soft_limit
from conductor_app.sql import opened_connections
from conductor_app.states import ExecutionStatus

logger = logging.getLogger("conductor_app.execution")

#: Told by the worker: whether this worker shuts down.
is_draining: Callable[[], bool] = lambda: False  # noqa: E731


class RunEnded(Ignore):
    """A run has ended without a final outcome; Celery acknowledges the message and records nothing.

    It travels from the pool process to the worker's main process, which words the event and knows when to sweep next.

    Args:
        what: ``suspended``, ``retrying``, ``cancelled``, ``released``, ``dropped`` or ``abandoned``.
        detail: The rest of the log line.
        due_in: Seconds until the sweeper has something to do for this execution, if that is known.
        step: The awaited step of a suspension.
    """

    def __init__(self, what: str, detail: str = "", due_in: float | None = None, step: str = "") -> None:
        super().__init__(what, detail, due_in, step)
        self.what = what
        self.detail = detail
        self.due_in = due_in
        self.step = step

    def __str__(self) -> str:
        return f"{self.what}{': ' if self.detail else ''}{self.detail}"

    def __repr__(self) -> str:
        return f"<run {self}>"

    @staticmethod
    def describe(shown: str) -> str:
        """Return what ``repr()`` of a ``RunEnded`` says, or an empty string for another exception's."""
        return shown[5:-1] if shown.startswith("<run ") and shown.endswith(">") else ""


def lease_owner(hostname: str | None) -> str:
    """Return the name under which this process holds leases: the worker's node name and the process id."""
    return f"{hostname or socket.gethostname()}/{os.getpid()}"


def run(task: Task[Any, Any], execution_id: uuid.UUID) -> Any:
    """Claim one execution and run its body until it ends or waits.

    Returns:
        The decoded result, as every replay and ``AsyncResult.get()`` see it.

    Raises:
        RunEnded: The execution is suspended, retried later, cancelled, or not ours.
        Exception: What failed the execution for good.
    """
    limit = soft_limit()
    limit.hold_back()
    try:
        return _run(task, execution_id, limit)
    except RunEnded as ended:
        # Celery keeps the exception for a while, and with it the body's frames and all that they hold.
        raise ended.with_traceback(None) from None
    finally:
        limit.forget()  # the body is done, and what follows it is not the body's to fail


def _run(task: Task[Any, Any], execution_id: uuid.UUID, limit: SoftLimit) -> Any:
    request = task.request
    _keep_tracer_out(request)
    delivery = _delivery_of(execution_id)
    try:
        execution = None if delivery is None else delivery.take(execution_id)
        if execution is None:
            execution = claim(execution_id, lease_owner(request.hostname), task.name)
        if execution is not None and keeper.holds(execution_id, execution.fence):
            # The database has crashed and forgotten the claim of another thread's run, which is still at it and could
            # write what this one may. The next fence tells them apart.
            execution = transitions.claim_again(execution_id, execution.lease_owner, task.name)
    except DatabaseError as error:
        # Nothing was claimed, the row is queued: the sweeper rings again.
        logger.warning("Execution %s was not claimed, the database is away: %s", execution_id, error)
        raise RunEnded("abandoned", "the database is away") from None
    if execution is None:
        raise RunEnded("dropped", "not queued, not due, or another run has it")
    on_loss = functools.partial(resume_unsuspended, () if delivery is None else tuple(delivery.suspended))
    with keeper.hold(execution, on_loss) as lease, observing.running(execution):
        try:
            return _run_claimed(task, execution, lease, limit)
        except AbandonRun as error:
            logger.error("Run of execution %s is abandoned: %s", execution_id, error)
            raise RunEnded("abandoned", str(error)) from None
        except LeaseLost as error:
            logger.warning("%s", error, extra={"execution_id": str(execution_id)})
            on_loss()
            raise RunEnded("dropped", "its lease is lost") from None


def resume_unsuspended(parents: Sequence[Execution]) -> None:
    """Queue what waits for an execution that is lost, if that does not wait, either: the database has crashed.

    A suspension that this process goes on with does not wait for the disk. Undone, the row says that this process still
    runs the parent, and at the end of the lease the sweeper would take that for a death and an attempt.

    Args:
        parents: Each waited for the next one, and the last one for what is lost. Of those that the database remembers,
            the innermost is the one that it takes to be running.
    """
    for parent in reversed(parents):
        with suppress(LeaseLost, AbandonRun, DatabaseError):
            transitions.release(parent)
            logger.warning("Execution %s runs again: the database has forgotten its suspension.", parent.pk)
            return


def claim(execution_id: uuid.UUID, owner: str, task: str, attempt: int | None = None) -> Execution | None:
    """Claim an execution; see ``transitions.claim``.

    Raises:
        DatabaseError: The database is away. If its COMMIT was made all the same, the lease ends unused.
    """
    try:
        return transitions.claim(execution_id, owner, task, attempt)
    except DatabaseError:
        # A kept connection may not have outlived the pause between two runs.
        close_broken_connections()
        execution = transitions.claim(execution_id, owner, task, attempt)
        if execution is None and not keeper.holds(execution_id):
            execution = transitions.claim_again(execution_id, owner, task)
        return execution


def _run_claimed(task: Task[Any, Any], execution: Execution, lease: Lease, limit: SoftLimit) -> Any:
    # A first run has nothing to remember, so it does not ask.
    known: dict[str, steps.Memory] | None = {} if execution.fence == 1 else _known(execution)
    while True:
        memory = _recall(execution) if known is None else known
        known = None
        context = ExecutionContext(execution, memory, lease, task, draining=is_draining)
        try:
            result = _call_body(task, execution, context, limit)
        except _GoOn:
            continue  # the awaited step was decided while the body unwound
        return result


class _GoOn(Exception):
    """The body can be run again at once."""


def _delivery_of(execution_id: uuid.UUID) -> hand_off.Delivery | None:
    """Return the delivery that this run belongs to; none for one in eager mode, inside another body for example."""
    delivery = hand_off.current.get()
    return delivery if delivery is not None and delivery.running == execution_id else None


def _known(execution: Execution) -> dict[str, steps.Memory] | None:
    """Return what an execution remembers, if this process or its claim knows it already."""
    rows, execution.claimed_steps = execution.claimed_steps, None
    if rows is not None:
        return steps.memory_of(rows)
    delivery = _delivery_of(execution.pk)
    return None if delivery is None else delivery.recall(execution)


@contextmanager
def _handing_off(execution: Execution) -> Iterator[transitions.HandOff | None]:
    """Let the last transition of a run, which gets what this yields, claim what this process runs next."""
    delivery = _delivery_of(execution.pk)
    if delivery is None:
        yield None
        return
    offer = delivery.offer(execution)
    try:
        yield offer
    finally:
        delivery.claimed = offer.claimed or _claimed_unheard(offer.wanted, execution.lease_owner)


def _claimed_unheard(wanted: Execution | None, owner: str) -> Execution | None:
    """Take up a claim whose COMMIT got no answer, if it was made."""
    if wanted is None or keeper.holds(wanted.pk):
        return None
    try:
        close_broken_connections()
        return transitions.claim_again(wanted.pk, owner, wanted.task)
    except DatabaseError as error:
        logger.warning("Execution %s may be left to its lease, the database is away: %s", wanted.pk, error)
        return None


def _recall(execution: Execution) -> dict[str, steps.Memory]:
    return transitions.patiently(lambda: steps.recall(execution.pk))


def _call_body(task: Task[Any, Any], execution: Execution, context: ExecutionContext, limit: SoftLimit) -> Any:
    """Run the body once and carry out what it asks for."""
    try:
        with context.entered():
            args, kwargs = loads(execution.payload)
            try:
                limit.let_through()
                value = task.run(context, *args, **kwargs)
            finally:
                limit.hold_back()
        if context.suspension is not None:
            _report_swallowed(context, execution, "returned")
            raise SuspendExecution
    except SuspendExecution:
        _suspend(task, execution, context)
    except CancelExecution:
        _cancel(task, execution)
    except ReleaseExecution:
        transitions.release(execution)
        raise RunEnded("released", "the worker shuts down") from None
    except (ControlFlow, LeaseLost):
        raise
    except Exception as error:  # noqa: BLE001 - the body may raise anything
        if context.suspension is not None:
            _report_swallowed(context, execution, f"raised {type(error).__name__}")
            _suspend(task, execution, context)
        _end_attempt(task, execution, error)
    return _succeed(task, execution, value)


def _succeed(task: Task[Any, Any], execution: Execution, value: Any) -> Any:
    try:
        text = dumps(value, f"result of {execution.task}", conductor_settings().MAX_RESULT_BYTES)
    except (NotSerializable, PayloadTooLarge) as error:
        _end_attempt(task, execution, error)
    close_broken_connections()
    with _handing_off(execution) as offer:
        transitions.succeed(execution, text, offer)
    if delivery := _delivery_of(execution.pk):
        delivery.settle(execution, text)
        delivery.suspended.clear()
    result = loads(text)
    _tell_celery(task, execution, announcements.Outcome(ExecutionStatus.SUCCEEDED, result))
    return result


def _suspend(task: Task[Any, Any], execution: Execution, context: ExecutionContext) -> None:
    assert context.suspension is not None
    wait, _place = context.suspension
    close_broken_connections()
    try:
        with _handing_off(execution) as offer:
            suspended = transitions.suspend(execution, wait, _state_writer(task, execution, wait), offer)
    except CancelExecution:
        _cancel(task, execution)
    if not suspended:
        raise _GoOn
    if (delivery := _delivery_of(execution.pk)) and isinstance(wait, transitions.Invocation):
        delivery.keep(execution, wait, context.memory)
        if delivery.claimed is not None:
            delivery.suspended.append(execution)
    due_in = getattr(wait, "timeout", None) or getattr(wait, "seconds", None)
    detail = f"waiting for step {wait.step!r}"
    if isinstance(wait, transitions.Invocation):
        detail += f" ({wait.child.task} {wait.child.id})"
    elif isinstance(wait, transitions.Map):
        detail += f" ({len(wait.children)} of {wait.task})"
    elif isinstance(wait, transitions.AwaitEvent):
        detail += f" (event {wait.event!r})"
    raise RunEnded("suspended", detail, due_in, wait.step) from None


def _cancel(task: Task[Any, Any], execution: Execution) -> None:
    close_broken_connections()
    with _handing_off(execution) as offer:
        failure = transitions.cancel_running(execution, offer)
    if failure is None:
        raise RunEnded("released", "its cancellation was withdrawn") from None
    _tell_celery(task, execution, announcements.cancelled(failure.message))
    raise RunEnded("cancelled", execution.cancel_reason, 0.0) from None


def _end_attempt(task: Task[Any, Any], execution: Execution, error: Exception) -> None:
    """Retry later if the policy allows and attempts are left; else fail for good and raise the error."""
    limit = conductor_settings().MAX_ERROR_BYTES
    policy: RetryPolicy = task.retry_policy  # type: ignore[attr-defined]  # DurableTask has it
    delay: float | None = policy.delay(execution.attempt) if policy.allows(error) else None
    if isinstance(error, RetryExecution):
        delay = policy.delay(execution.attempt) if error.countdown is None else error.countdown
        if isinstance(error.exc, Exception):
            error = error.exc
    close_broken_connections()
    failure = describe(error, limit)
    if delay is not None and execution.has_attempts_left:
        try:
            transitions.retry_later(execution, failure, delay)
        except CancelExecution:
            _cancel(task, execution)
        raise RunEnded(
            "retrying",
            f"attempt {execution.attempt} failed ({failure.message.splitlines()[0]}), "
            f"the next one is due in {delay:.3g}s",
            delay,
        ) from None
    if isinstance(error, RetryExecution):
        error.args = (f"ctx.retry() asked for another attempt, but attempt {execution.attempt} was the last one.",)
        failure = describe(error, limit)
    step = error.step if isinstance(error, (ChildError, EventTimedOut)) else ""
    child_id = error.child_id if isinstance(error, ChildError) else None
    with _handing_off(execution) as offer:
        transitions.fail(execution, failure, step=step, child_id=child_id, hand_off=offer)
    _tell_celery(
        task, execution, announcements.Outcome(ExecutionStatus.FAILED, error=error, traceback=failure.traceback)
    )
    raise error


def _report_swallowed(context: ExecutionContext, execution: Execution, how: str) -> None:
    logger.error(
        "%s. It is suspended all the same. %s",
        swallowed_suspension(context, execution.task, how),
        SWALLOWED_ADVICE,
        extra={"execution_id": str(execution.pk)},
    )


def _keep_tracer_out(request: Any) -> None:
    """Take from Celery's tracer what it would act on when a run returns or raises; a message of others has it."""
    request.callbacks = request.errbacks = request.chain = request.chord = None
    request.ignore_result = True


def _tell_celery(task: Task[Any, Any], execution: Execution, outcome: announcements.Outcome) -> None:
    """Tell Celery of the outcome, which is committed; what fails here, the sweeper does again."""
    options = execution.get_options()
    if not options.get("announce") or dispatch.is_left_to_sweeper(options) or announcements.is_resting():
        return
    try:
        announcements.tell(execution, outcome, task.request.hostname)
    except (Exception, AbandonRun) as error:  # noqa: BLE001 - whatever broker and result backend raise
        logger.warning(
            "Execution %s %s, but Celery could not be told (%s: %s). It will be told again.",
            execution.pk,
            outcome.status,
            type(error).__name__,
            error,
            extra={"execution_id": str(execution.pk)},
        )


def _state_writer(task: Task[Any, Any], execution: Execution, wait: transitions.Wait) -> Callable[[], None] | None:
    """Return what shows SUSPENDED in the result backend, while the execution's row is locked; ``None`` without one."""
    if not announcements.is_shown(execution):
        return None
    child_id = wait.child.id if isinstance(wait, transitions.Invocation) else None
    info = {"waiting_for": wait.step, "child": None if child_id is None else str(child_id)}
    return lambda: announcements.show(execution, "SUSPENDED", info, task.request.hostname)


def close_broken_connections() -> None:
    """Close connections that the body left unusable, so that the outcome is written on a new one."""
    for connection in opened_connections():
        # Not Django's close_if_unusable_or_obsolete(): with CONN_MAX_AGE = 0 every connection is obsolete at once.
        if connection.errors_occurred and not connection.in_atomic_block and not connection.is_usable():
            connection.close()
