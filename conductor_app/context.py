"""``ExecutionContext``: what a durable body calls."""

from __future__ import annotations

import datetime as dt
import difflib
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

from celery import Task, current_app
from celery.canvas import Signature
from django.db import connections, transaction

from conductor_app import clock, steps, transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildTimedOut,
    ContextClosed,
    InvalidArgument,
    InvalidArgumentType,
    InvokeInsideTransaction,
    LeaseLost,
    MaxDepthExceeded,
    NestedDurableCall,
    ReleaseExecution,
    RetryExecution,
    StepMismatch,
    StepNameReused,
    SuspendExecution,
    TooManySteps,
    UnknownTask,
    WrongThread,
)
from conductor_app.ids import derive_child_id
from conductor_app.leases import Lease
from conductor_app.models import Execution, database
from conductor_app.serialization import describe, digest, revive, round_trip, shown
from conductor_app.sql import is_outage
from conductor_app.states import OnTimeout, StepKind, StepStatus

P = ParamSpec("P")
R = TypeVar("R")

#: A timeout longer than this draws a hint: it may have been meant as milliseconds. Seconds.
LONG_TIMEOUT_SECONDS = 86_400
#: Longest timeout and longest sleep, in seconds (about 100 years).
MAX_SECONDS = 100 * 366 * 86_400
#: ``ctx.checkpoint`` asks the database at most this often, in seconds.
CHECKPOINT_INTERVAL_SECONDS = 1.0

_STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")
_STEP_NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.:-]*"
_STEP_NAME_LENGTH = 128

logger = logging.getLogger("conductor_app.execution")

#: The context of the body that runs in this thread.
current_context: ContextVar[ExecutionContext | None] = ContextVar("conductor_app_context", default=None)


@runtime_checkable
class Invocable(Protocol):
    """A task that can be a child; ``DurableTask`` is one."""

    name: str

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        execution_id: uuid.UUID | None = None,
    ) -> transitions.NewExecution:
        """Check the arguments against the task's signature and return the execution to store."""
        ...


class ExecutionContext:
    """The first argument of a durable body, good for one run in one thread."""

    def __init__(
        self,
        execution: Execution,
        memory: dict[str, steps.Memory],
        lease: Lease,
        task: Task[Any, Any] | None = None,
        *,
        draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._execution = execution
        self._memory = memory
        self._lease = lease
        self._task = task
        self._draining = draining
        self._replayed = 0
        self._used: dict[str, str] = {}
        self._inside: str | None = None
        self._unrecorded: tuple[str, BaseException] | None = None
        self._suspension: tuple[transitions.Wait, str] | None = None
        self._closed = False
        self._thread = threading.get_ident()
        self._atomic_depths = _atomic_depths()
        self._checked_at = time.monotonic()
        #: Logs like any logger, with the execution's ids, and stays silent while the body replays what it did before.
        self.logger = ReplayAwareLogger(self)

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def execution_id(self) -> uuid.UUID:
        """Id of this execution; also its Celery task id."""
        return self._execution.pk

    @property
    def root_id(self) -> uuid.UUID:
        """Id of the root of this execution's tree."""
        return self._execution.root_id

    @property
    def parent_id(self) -> uuid.UUID | None:
        """Id of the parent, or ``None`` for a root."""
        return self._execution.parent_id

    @property
    def attempt(self) -> int:
        """The current attempt, counted from 1; suspensions do not count."""
        return self._execution.attempt

    @property
    def task(self) -> Task[Any, Any] | None:
        """The Celery task whose body this is."""
        return self._task

    @property
    def is_replaying(self) -> bool:
        """Whether the body has not yet passed all that earlier runs have done."""
        return self._replayed < len(self._memory)

    def idempotency_key(self, step: str) -> str:
        """Return a key for the outside world, the same on every attempt of this execution's ``step``."""
        return f"{self._execution.pk}:{_step_name(step)}"

    # -------------------------------------------------------------------------------------------------------- invoke

    @overload
    def invoke(
        self,
        step: str,
        child: Task[..., R] | Signature[R],
        payload: object = ...,
        *,
        timeout: float | dt.timedelta | None = ...,
        on_timeout: str = ...,
        queue: str | None = ...,
        priority: int | None = ...,
    ) -> R: ...

    @overload
    def invoke(
        self,
        step: str,
        child: str,
        payload: object = ...,
        *,
        timeout: float | dt.timedelta | None = ...,
        on_timeout: str = ...,
        queue: str | None = ...,
        priority: int | None = ...,
    ) -> Any: ...

    def invoke(
        self,
        step: str,
        child: Any,
        payload: object = None,
        *,
        timeout: float | dt.timedelta | None = None,
        on_timeout: str = "cancel",
        queue: str | None = None,
        priority: int | None = None,
    ) -> Any:
        """Run ``child`` as a durable step and return its result.

        The first call stores the child and ends this Celery run by raising ``SuspendExecution``; the run that follows
        the child's end gets the stored result from the same call.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            child: A durable task, its name, or a signature of it (then without ``payload``).
            payload: A mapping, the child's keyword arguments; anything else but ``None`` is its only argument. At most
                ``CONDUCTOR["MAX_PAYLOAD_BYTES"]`` bytes once encoded as JSON.
            timeout: Seconds, or a ``timedelta``, from the child's creation, its time in the queue and its retries
                included. ``None`` waits without limit.
            on_timeout: ``"cancel"`` cancels a child that is late, ``"abandon"`` lets it go on.
            queue: Celery queue of the child, instead of its task's own.
            priority: Priority of the child's messages, instead of its task's own.

        Returns:
            The child's return value after a JSON round trip: a tuple comes back as a list.

        Raises:
            ChildFailed: The child used up its attempts.
            ChildTimedOut: ``timeout`` ended first. Also a builtin ``TimeoutError``.
            ChildCancelled: Somebody cancelled the child.
            StepNameReused: ``step`` was used before in this run.
            StepMismatch: ``step`` was recorded for another task or kind.
            UnknownTask: ``child`` is not a registered durable task.
            NotSerializable: A part of ``payload`` would not come back from JSON as it went in.
            InvokeInsideTransaction: The call stands inside ``transaction.atomic()``.
        """
        step = _step_name(step)
        call = f'ctx.invoke("{step}")'
        self._enter(step, call)
        seconds = None if timeout is None else check_duration(timeout, "timeout", allow_zero=False)
        if on_timeout not in list(OnTimeout):
            raise InvalidArgument(f'on_timeout must be "cancel" or "abandon", got {shown(on_timeout)}.')
        invocable, args, kwargs, options = _resolve_child(child, payload, call)
        if queue is not None:
            options["queue"] = _check_type(queue, str, "queue")
        if priority is not None:
            options["priority"] = _check_type(priority, int, "priority")
        new = invocable.new_execution(
            args,
            kwargs,
            options,
            what=f"payload of {call}",
            execution_id=derive_child_id(self._execution.pk, step),
        )
        payload_digest = digest(new.payload)
        remembered = self._recall(step, StepKind.INVOKE, task=new.task, payload_digest=payload_digest)
        if remembered is None:
            limit = conductor_settings().MAX_DEPTH
            if self._execution.depth + 1 > limit:
                raise MaxDepthExceeded(
                    f"{call} would be execution number {limit + 1} in a chain of parents and children; the limit is "
                    f'{limit}. Does {new.task} invoke itself without an end? The limit is CONDUCTOR["MAX_DEPTH"].'
                )
            if seconds is not None and not isinstance(timeout, dt.timedelta) and _looks_like_milliseconds(seconds):
                self.logger.warning(
                    "timeout=%.15g of step %s means %s (timeouts are seconds). Did you mean %.15g?",
                    seconds,
                    step,
                    dt.timedelta(seconds=seconds),
                    seconds / 1_000,
                )
            self._suspend(
                transitions.Invocation(step, new, payload_digest, seconds, OnTimeout(on_timeout)),
            )
        return self._child_outcome(remembered)

    def _child_outcome(self, remembered: steps.Memory) -> Any:
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(remembered.name))
        self._lease_must_hold()
        if remembered.status == StepStatus.SUCCEEDED:
            return remembered.get_result()
        raise child_error(remembered)

    # --------------------------------------------------------------------------------------------------------- steps

    def step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn(*args, **kwargs)`` once and remember its result.

        ``fn`` runs at least once: if the worker dies after its effect and before the result is stored, it runs again.
        An exception of ``fn`` is raised as it is; if the body catches it and goes on to another ``ctx`` call, it is
        remembered too, so that a replay takes the same branch.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            fn: Any callable. It must not call ``ctx``.

        Returns:
            What ``fn`` returned, after a JSON round trip.

        Raises:
            NotSerializable: The result would not come back from JSON as it went in.
            PayloadTooLarge: The encoded result exceeds ``CONDUCTOR["MAX_RESULT_BYTES"]``.
            LeaseLost: Another run has taken over; the result is not recorded.
        """
        step = _step_name(step)
        call = f'ctx.step("{step}")'
        found, value = self._begin_step(step, fn, call)
        if found:
            return value  # type: ignore[no-any-return]
        with self._nested(call):
            try:
                result = fn(*args, **kwargs)
            except Exception as error:
                self._unrecorded = (step, error)
                raise
        text, value = _encode_result(result, call)
        memory = transitions.record_step(self._execution, step, result=text)
        self._memory[step] = memory
        self._replayed += 1
        return value if memory.result == text else memory.get_result()  # type: ignore[no-any-return]

    def atomic_step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn(*args, **kwargs)`` exactly once: its ORM writes and the memory of it are one transaction.

        That holds for writes to the database that stores the executions. If the worker dies or the lease is lost,
        neither the writes nor the memory remain.

        Args and errors: as for ``step``.
        """
        step = _step_name(step)
        call = f'ctx.atomic_step("{step}")'
        found, value = self._begin_step(step, fn, call)
        if found:
            return value  # type: ignore[no-any-return]
        using = database()
        with self._nested(call):
            try:
                with transaction.atomic(using=using):
                    result = fn(*args, **kwargs)
                    text, value = _encode_result(result, call)
                    # The execution's row last: until here only rows of the user's are locked.
                    cancelled = transitions.lock_held(self._execution)
                    steps.record(self._execution, step, result=text)
            except Exception as error:
                if not isinstance(error, LeaseLost) and not is_outage(error):
                    self._unrecorded = (step, error)
                raise
        self._memory.update(
            {
                step: steps.Memory(
                    step, StepKind.STEP, StepStatus.SUCCEEDED, "", "", None, None, text, None, self._execution.fence
                )
            }
        )
        self._replayed += 1
        if cancelled:
            raise CancelExecution
        return value  # type: ignore[no-any-return]

    def _begin_step(self, step: str, fn: object, call: str) -> tuple[bool, Any]:
        self._enter(step, call)
        if not callable(fn):
            raise InvalidArgumentType(
                f"{call} needs a callable, got {type(fn).__name__}. Pass the function, not its result."
            )
        remembered = self._recall(step, StepKind.STEP)
        if remembered is None:
            return False, None
        if remembered.status == StepStatus.FAILED:
            raise revive(remembered.get_failure())
        return True, remembered.get_result()

    # --------------------------------------------------------------------------------------------------------- sleeps

    def sleep(self, step: str, seconds: float | dt.timedelta) -> None:
        """Release the worker and go on after ``seconds`` (or a ``timedelta``), by the database's clock."""
        step = _step_name(step)
        call = f'ctx.sleep("{step}")'
        self._enter(step, call)
        duration = check_duration(seconds, f"seconds of {call}")
        self._sleep(step, transitions.Sleep(step, seconds=duration))

    def sleep_until(self, step: str, when: dt.datetime) -> None:
        """Release the worker and go on at the instant ``when``."""
        step = _step_name(step)
        call = f'ctx.sleep_until("{step}")'
        self._enter(step, call)
        self._sleep(step, transitions.Sleep(step, until=check_instant(when, f"when of {call}")))

    def _sleep(self, step: str, wait: transitions.Sleep) -> None:
        remembered = self._recall(step, StepKind.SLEEP)
        if remembered is None:
            self._suspend(wait)
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()

    # ------------------------------------------------------------------------------------------- control from outside

    def checkpoint(self) -> None:
        """In a long body: stop here if the execution was cancelled, its lease is lost, or the worker shuts down.

        On a shutdown the execution goes back to the queue without using up an attempt. The database is asked at most
        once a second.

        Raises:
            LeaseLost: Another run has taken over.
        """
        self._usable("ctx.checkpoint()")
        self._lease_must_hold()
        if self._draining():
            raise ReleaseExecution
        if time.monotonic() - self._checked_at >= CHECKPOINT_INTERVAL_SECONDS:
            self._checked_at = time.monotonic()
            transitions.check_held(self._execution)

    def retry(
        self, *, exc: BaseException | None = None, countdown: float | dt.timedelta | None = None
    ) -> RetryExecution:
        """Return an exception to raise: ``raise ctx.retry(countdown=10)`` ends this attempt and asks for another.

        Args:
            exc: The reason; the exception that is being handled by default.
            countdown: Seconds until then; the task's own delay by default. When no attempt is left, the execution
                fails with ``exc``.
        """
        self._usable("ctx.retry()")
        seconds = None if countdown is None else check_duration(countdown, "countdown")
        if exc is not None and not isinstance(exc, BaseException):
            raise InvalidArgumentType(f"exc of ctx.retry() must be an exception, got {type(exc).__name__}")
        return RetryExecution(exc if exc is not None else sys.exception(), seconds)

    # ------------------------------------------------------------------------------------------------------ the insides

    @property
    def suspension(self) -> tuple[transitions.Wait, str] | None:
        """What the body waits for, and where it said so; for the executor."""
        return self._suspension

    @contextmanager
    def entered(self) -> Any:
        """Make this the current context while the body runs, and close it afterwards; for the executor."""
        token = current_context.set(self)
        try:
            yield
        finally:
            current_context.reset(token)
            self._closed = True

    def flush(self) -> None:
        """Record a step's failure that the body has caught; for the executor."""
        if self._unrecorded is not None:
            step, error = self._unrecorded
            self._unrecorded = None
            failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
            self._memory[step] = transitions.record_step(self._execution, step, failure=failure)
            self._replayed += 1

    def _enter(self, step: str, call: str) -> None:
        """Check everything that is wrong with any call, whatever is remembered."""
        self._usable(call)
        place = _caller()
        if step in self._used:
            raise StepNameReused(
                f'Step name "{step}" was already used at {self._used[step]} and again at {place}; give each call its '
                f'own name, in a loop for example f"{step}-{{index}}".'
            )
        self._used[step] = place
        if _atomic_depths() != self._atomic_depths:
            raise InvokeInsideTransaction(
                f"{call} was called inside transaction.atomic(), which would undo the memory of it. Call it outside, "
                "or put the writes into ctx.atomic_step()."
            )
        self._lease_must_hold()
        self.flush()

    def _usable(self, call: str) -> None:
        if self._closed:
            raise ContextClosed(
                f"{call} was called after the run had ended. A context is good for one run of the body."
            )
        if threading.get_ident() != self._thread:
            raise WrongThread(f"{call} was called in another thread than the one that runs the body.")
        if self._inside is not None:
            raise NestedDurableCall(
                f"{call} was called inside {self._inside}. A step's function must not call ctx; call it from the body."
            )
        if self._suspension is not None:
            # The body swallowed the suspension and calls on. It gets no further.
            raise SuspendExecution

    def _lease_must_hold(self) -> None:
        if self._lease.lost:
            raise LeaseLost(
                f"The lease of execution {self._execution.pk} is lost: another run took over. "
                "This run can write no more."
            )
        if self._lease.cancel_requested:
            raise CancelExecution

    def _recall(self, step: str, kind: StepKind, *, task: str = "", payload_digest: str = "") -> Any:
        remembered = self._memory.get(step)
        if remembered is None:
            limit = conductor_settings().MAX_STEPS
            if len(self._memory) >= limit:
                raise TooManySteps(
                    f'"{step}" would be step number {limit + 1} of execution {self._execution.pk}; '
                    f'the limit is {limit}. Split the work into children, or raise CONDUCTOR["MAX_STEPS"].'
                )
            return None
        self._replayed += 1
        if remembered.kind != kind:
            raise StepMismatch(
                f'Step "{step}" was recorded as {remembered.kind} and the code now calls it as {kind}. '
                "Give the new call its own step name."
            )
        if remembered.task != task:
            raise StepMismatch(
                f'Step "{step}" recorded task {remembered.task} and the code now calls {task}. '
                "Give the new call its own step name."
            )
        if remembered.payload_digest != payload_digest:
            message = (
                f'Step "{step}" was recorded with another payload than the code now passes; '
                "the recorded outcome counts. "
                "Payloads should follow from the execution's own payload and earlier steps."
            )
            if conductor_settings().STRICT_REPLAY:
                raise StepMismatch(message)
            logger.warning(message, extra=self._log_extra())
        return remembered

    def _suspend(self, wait: transitions.Wait) -> NoReturn:
        self._suspension = (wait, self._used[wait.step])
        raise SuspendExecution(wait.step)

    @contextmanager
    def _nested(self, call: str) -> Any:
        self._inside = call
        try:
            yield
        finally:
            self._inside = None

    def _log_extra(self) -> dict[str, Any]:
        return {
            "execution_id": str(self._execution.pk),
            "root_id": str(self._execution.root_id),
            "task": self._execution.task,
            "attempt": self._execution.attempt,
        }


class ReplayAwareLogger(logging.LoggerAdapter[logging.Logger]):
    """``ctx.logger``: adds the execution's ids, and drops lines that an earlier run has already written."""

    def __init__(self, context: ExecutionContext) -> None:
        super().__init__(logger, {})
        self._context = context

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name is logging's
        """Whether a line of this level would be written now."""
        return not self._context.is_replaying and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the ids to the record."""
        kwargs["extra"] = {**self._context._log_extra(), **(kwargs.get("extra") or {})}
        return msg, kwargs


def child_error(remembered: steps.Memory) -> ChildError:
    """Return the exception that a child's remembered outcome raises in its parent."""
    where: dict[str, Any] = {"step": remembered.name, "child_id": remembered.child_id}
    if remembered.status == StepStatus.TIMED_OUT:
        return ChildTimedOut(
            f"Child execution timed out after {remembered.timeout_seconds:g}s (step '{remembered.name}')", **where
        )
    failure = remembered.get_failure()
    if remembered.status == StepStatus.CANCELLED:
        reason = failure.message if remembered.error else "Cancelled"
        return ChildCancelled(f"Child execution was cancelled (step '{remembered.name}'): {reason}", **where)
    return ChildFailed(f"Child execution failed: {failure.message}", error_class=failure.type, **where)


# ------------------------------------------------------------------------------------------------------------ arguments


def _step_name(step: object) -> str:
    if not isinstance(step, str):
        raise InvalidArgumentType(f"step name must be str, got {type(step).__name__}")
    if not step:
        raise InvalidArgument(f"step name must be 1–{_STEP_NAME_LENGTH} characters")
    if len(step) > _STEP_NAME_LENGTH:
        raise InvalidArgument(f"step name must be 1–{_STEP_NAME_LENGTH} characters: {len(step)} > {_STEP_NAME_LENGTH}")
    if not _STEP_NAME.match(step):
        raise InvalidArgument(f"step name {step!r} must match {_STEP_NAME_PATTERN}: ASCII letters, digits and _ . : -")
    return str.__str__(step)  # a member of an Enum is written by its value


def check_duration(value: object, name: str, *, allow_zero: bool = True, allow_past: bool = False) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidArgumentType: It is neither a number nor a ``timedelta``.
        InvalidArgument: It is NaN, infinite, negative (unless ``allow_past``), or longer than ``MAX_SECONDS``.
    """
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentType(f"{name} must be a number of seconds or a timedelta, got {type(value).__name__}")
    limit = "" if allow_past else "≥ 0 " if allow_zero else "> 0 "
    if value != value or value in (math.inf, -math.inf):
        raise InvalidArgument(f"{name} must be {limit or 'a finite number of '}seconds, got {value!r}")
    if not allow_past and (value < 0 or (value == 0 and not allow_zero)):
        raise InvalidArgument(f"{name} must be {limit}seconds, got {_shown(value)}")
    if abs(value) > MAX_SECONDS:
        raise InvalidArgument(f"{name} must be at most {MAX_SECONDS} seconds (100 years), got {_shown(value)}")
    return float(value)


def check_instant(value: object, name: str) -> dt.datetime:
    """Return an instant in the form that Django stores.

    Raises:
        InvalidArgumentType: It is no ``datetime``.
        InvalidArgument: It lies outside of what each database and each time zone can say.
    """
    if not isinstance(value, dt.datetime):
        raise InvalidArgumentType(f"{name} must be a datetime, got {type(value).__name__}")
    if not 1900 <= value.year <= 9000:
        raise InvalidArgument(f"{name} must lie between the years 1900 and 9000, got {value}")
    return clock.aware(value)


def _shown(value: float) -> str:
    return repr(value) if isinstance(value, float) or value.bit_length() < 64 else "a much larger one"


def _check_type(value: Any, expected: type[R], name: str) -> R:
    if isinstance(value, bool) or not isinstance(value, expected):
        raise InvalidArgumentType(f"{name} must be {expected.__name__}, got {type(value).__name__}")
    return value


def _looks_like_milliseconds(seconds: float) -> bool:
    return seconds > LONG_TIMEOUT_SECONDS or (seconds >= 10_000 and seconds % 1_000 == 0)


def _resolve_child(
    child: object, payload: object, call: str
) -> tuple[Invocable, list[Any], dict[str, Any], dict[str, Any]]:
    """Return the child's task, its arguments and its own Celery options."""
    options: dict[str, Any] = {}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(child, Signature):
        if child.get("subtask_type"):
            raise InvalidArgumentType(
                f"{call} runs one task at a time, got a {child['subtask_type']}. Invoke its tasks one after another."
            )
        if payload is not None:
            raise InvalidArgumentType(f"{call} got a signature and a payload. Put the arguments into the signature.")
        name, args, kwargs, options = str(child.task), list(child.args), dict(child.kwargs), dict(child.options)
    else:
        if isinstance(child, str):
            name = child
        elif isinstance(child, Task):
            name = child.name
        else:
            described = getattr(child, "__qualname__", None) or shown(child)
            raise UnknownTask(
                f"{call} needs a durable task, its name or a signature, got {type(child).__name__} {described}. "
                "Is @durable_task missing above its definition?"
            )
        if isinstance(payload, Mapping):
            for key in payload:
                if not isinstance(key, str):
                    raise InvalidArgumentType(
                        f"payload of {call} has the key {key!r} of type {type(key).__name__}: its keys are the child's "
                        "argument names, so they must be strings."
                    )
            kwargs = dict(payload)
        elif payload is not None:
            args = [payload]
    task = current_app.tasks.get(name)
    if task is None:
        raise UnknownTask(_unknown(name))
    if not isinstance(task, Invocable):
        raise UnknownTask(
            f'"{name}" is a plain Celery task. {call} runs durable tasks: put @durable_task above it instead of '
            "@shared_task."
        )
    return task, args, kwargs, options


def _unknown(name: str) -> str:
    durable = sorted(key for key, task in current_app.tasks.items() if isinstance(task, Invocable))
    nearest = difflib.get_close_matches(name, durable, n=1, cutoff=0.6)
    hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
    return (
        f'No durable task named "{shown(name)[1:-1]}".{hint} Known: {len(durable)}. '
        "Is its module imported (tasks.py in an installed app)?"
    )


def _encode_result(result: object, call: str) -> tuple[str, Any]:
    return round_trip(result, f"result of {call}", conductor_settings().MAX_RESULT_BYTES)


def _atomic_depths() -> tuple[tuple[str, int], ...]:
    """Return how many ``atomic()`` blocks are open on each connection that has any."""
    return tuple(
        (connection.alias, len(connection.atomic_blocks))
        for connection in connections.all(initialized_only=True)
        if connection.in_atomic_block
    )


_PACKAGE = os.path.dirname(__file__) + os.sep


def _caller() -> str:
    """Return file and line of the call in the user's code."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
