"""``ExecutionContext``: what a durable body calls."""

from __future__ import annotations

import datetime as dt
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import (
    Any,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
    overload,
)

from celery import Task
from celery.canvas import Signature
from django.db import DatabaseError, InterfaceError

from conductor_app import transitions
from conductor_app.body import headers, left_open
from conductor_app.body.children import (
    ChildHandle,
    ChildOptions,
    check_parallel,
    check_payloads,
    child_arguments,
    filled,
    looks_like_milliseconds,
    resolve_child,
)
from conductor_app.body.logger import ReplayAwareLogger, log_extra
from conductor_app.body.names import check_name, gather_name, step_name
from conductor_app.body.outcomes import child_error, outcome_of, outcomes_of_map
from conductor_app.body.places import caller, shown_place
from conductor_app.body.plain import Invocable
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ChildError,
    ContextClosed,
    ControlFlow,
    EndAttempt,
    EventTimedOut,
    Failure,
    InvalidArgument,
    InvalidArgumentType,
    InvokeInsideTransaction,
    LeaseLost,
    MaxDepthExceeded,
    NestedDurableCall,
    NewerFormat,
    OutcomeLost,
    ReleaseExecution,
    RetryExecution,
    StepMismatch,
    StepNameReused,
    SuspendExecution,
    TooManySteps,
    WrongThread,
)
from conductor_app.models import Execution
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import observing, sessions
from conductor_app.store.ids import derive_child_id
from conductor_app.transitions import steps
from conductor_app.transitions.leases import Lease
from conductor_app.values.arguments import check_duration, check_instant
from conductor_app.values.serialization import (
    describe,
    digest,
    is_caught_by_bodies,
    revive_in_body,
    round_trip,
)

P = ParamSpec("P")
R = TypeVar("R")

#: ``ctx.checkpoint`` asks the database at most this often, in seconds.
CHECKPOINT_INTERVAL_SECONDS = 1.0
#: A step's function begins on what the database said at most so many seconds ago. Each step that is recorded says it
#: anew, so steps in quick succession never ask; after a pause, a look takes a fraction of that.
STEP_FRESH_SECONDS = 0.01

#: A body that swallows its end and makes so many calls after it is not going to stop.
MAX_SWALLOWED = 10


logger = logging.getLogger("conductor_app.execution")

#: The context of the body that runs in this thread.
current_context: ContextVar[ExecutionContext | None] = ContextVar("conductor_app_context", default=None)


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
        end_stuck: Callable[[ExecutionContext, str], None] = lambda _context, _what: None,
    ) -> None:
        self._execution = execution
        self._memory = memory
        self._lease = lease
        self._task = task
        self._draining = draining
        #: Ends a run whose body swallows its end again and again, where that can be ended.
        self._end_stuck = end_stuck
        self._swallowed = 0
        self._replayed = 0
        #: Where each step was called: file and line.
        self._used: dict[str, tuple[str, int]] = {}
        #: What each child that was invoked is, by its identity.
        self._children: dict[int, tuple[object, Invocable]] = {}
        self._inside: str | None = None
        self._unrecorded: tuple[str, BaseException] | None = None
        self._suspension: tuple[transitions.Wait, tuple[str, int]] | None = None
        self._ending: ControlFlow | None = None
        self._is_lost = False
        self._closed = False
        self._thread = threading.get_ident()
        self._process = os.getpid()
        self._watch = left_open.Watch()
        #: When the database last said that this run may go on.
        self._checked_at = lease.renewed_at
        #: Logs like any logger, with the execution's ids, and stays silent while the body replays what it did before.
        self.logger = ReplayAwareLogger(execution, lambda: self.is_replaying)

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
        return f"{self._execution.pk}:{step_name(step)}"

    # -------------------------------------------------------------------------------------------------------- invoke

    @overload
    def invoke(
        self,
        step: str,
        child: Task[..., R] | Signature[R],
        payload: object = ...,
        *,
        timeout: float | dt.timedelta | None = ...,
        on_timeout: Literal["cancel", "abandon"] = ...,
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
        on_timeout: Literal["cancel", "abandon"] = ...,
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
        on_timeout: Literal["cancel", "abandon"] = "cancel",
        queue: str | None = None,
        priority: int | None = None,
    ) -> Any:
        """Run ``child`` as a durable step and return its result.

        The first call stores the child and ends this Celery run by raising ``SuspendExecution``; the run that follows
        the child's end gets the stored result from the same call.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            child: A durable task, any other Celery task of the app, a task's name, or a signature (then without
                ``payload``).
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
            UnknownTask: ``child`` is not a registered task.
            NotSerializable: A part of ``payload`` would not come back from JSON as it went in.
            InvokeInsideTransaction: The call stands inside ``transaction.atomic()``.
        """
        step = step_name(step, "invoke")
        remembered = self._invocation(
            f'ctx.invoke("{step}")',
            StepKind.INVOKE,
            step,
            child,
            payload,
            ChildOptions(timeout, on_timeout, queue, priority),
        )
        if isinstance(remembered, transitions.Invocation):
            self._suspend(remembered)
        return self._child_outcome(remembered)

    def _invocation(
        self, call: str, kind: StepKind, step: str, child: Any, payload: object, given: ChildOptions
    ) -> transitions.Invocation | steps.Memory:
        """Check a call that stands for one child; return what is remembered of it, or the child to store."""
        self._enter(step, call)
        seconds, on_timeout, options = given.checked()
        invocable, args, kwargs, own = self._resolve(child, payload, call)
        if step in self._memory:
            # Whatever else was asked for when it was stored: a long replay is not to work that out for each child.
            stored = digest(invocable.stored_payload(args, kwargs))
            return cast(steps.Memory, self._recall(step, kind, task=invocable.name, payload_digest=stored))
        new = invocable.new_execution(
            args,
            kwargs,
            {**own, **options},
            what=f"payload of {call}",
            execution_id=derive_child_id(self._execution.pk, step),
        )
        self._recall(step, kind)
        self._check_depth(call, new.task)
        self._hint_at_milliseconds(step, given.timeout, seconds)
        new = headers.collect(new, self._execution)
        return transitions.Invocation(step, new, digest(new.payload), seconds, on_timeout)

    def _resolve(
        self, child: object, payload: object, call: str, what: str = "payload"
    ) -> tuple[Invocable, list[Any], dict[str, Any], dict[str, Any]]:
        """Do what ``resolve_child`` does, and look each task up once in a run; a long replay passes it often."""
        known = self._children.get(id(child))
        if known is not None:
            return known[1], *child_arguments(payload, call, what), {}
        resolved = resolve_child(child, payload, call, what)
        if not isinstance(child, Signature):
            # With the child itself, so that nothing else gets its identity meanwhile.
            self._children[id(child)] = (child, resolved[0])
        return resolved

    def _check_depth(self, call: str, task: str) -> None:
        limit = conductor_settings().MAX_DEPTH
        if self._execution.depth + 1 > limit:
            raise MaxDepthExceeded(
                f"{call} would be execution number {limit + 1} in a chain of parents and children; the limit is "
                f'{limit}. Does {task} invoke itself without an end? The limit is CONDUCTOR["MAX_DEPTH"].'
            )

    def _hint_at_milliseconds(self, step: str, timeout: object, seconds: float | None) -> None:
        if seconds is not None and not isinstance(timeout, dt.timedelta) and looks_like_milliseconds(seconds):
            self.logger.warning(
                "timeout=%.15g of step %s means %s (timeouts are seconds). Did you mean %.15g?",
                seconds,
                step,
                dt.timedelta(seconds=seconds),
                seconds / 1_000,
            )

    def _child_outcome(self, remembered: steps.Memory) -> Any:
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(remembered.name))
        self._lease_must_hold()
        with self._beyond_the_body():
            value, error = outcome_of(remembered)
        if error is not None:
            raise error
        return value

    # ------------------------------------------------------------------------------------------------------ parallel

    @overload
    def map(
        self,
        step: str,
        child: Task[..., R] | Signature[R],
        payloads: Iterable[object],
        *,
        timeout: float | dt.timedelta | None = ...,
        on_timeout: Literal["cancel", "abandon"] = ...,
        max_parallel: int | None = ...,
        return_exceptions: Literal[False] = ...,
        queue: str | None = ...,
        priority: int | None = ...,
    ) -> list[R]: ...

    @overload
    def map(
        self,
        step: str,
        child: Task[..., Any] | Signature[Any] | str,
        payloads: Iterable[object],
        *,
        timeout: float | dt.timedelta | None = ...,
        on_timeout: Literal["cancel", "abandon"] = ...,
        max_parallel: int | None = ...,
        return_exceptions: bool = ...,
        queue: str | None = ...,
        priority: int | None = ...,
    ) -> list[Any]: ...

    def map(
        self,
        step: str,
        child: Any,
        payloads: Iterable[object],
        *,
        timeout: float | dt.timedelta | None = None,
        on_timeout: Literal["cancel", "abandon"] = "cancel",
        max_parallel: int | None = None,
        return_exceptions: bool = False,
        queue: str | None = None,
        priority: int | None = None,
    ) -> list[Any]:
        """Run one child per payload, in parallel, and return their results in the order of the payloads.

        The children are stored at once. The worker is released, and the body runs again once: when all have ended, or
        when the first of them has failed for good.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            child: A task, its name, or a signature: its options, such as ``headers``, are for each child. Its arguments
                come after a payload that is no mapping, and its keyword arguments give way to the payload's, as in
                ``Signature.clone``.
            payloads: One payload per child, each as for ``invoke``; at most ``CONDUCTOR["MAX_CHILDREN"]``.
            timeout: Seconds, or a ``timedelta``, from the children's creation, for all of them together.
            on_timeout: ``"cancel"`` cancels the children that are late, ``"abandon"`` lets them go on.
            max_parallel: So many children may be in flight at once; the others are held back. ``None``: all.
            return_exceptions: Wait for all, and put ``ChildFailed``, ``ChildTimedOut`` or ``ChildCancelled`` in the
                place of a result that there is not, instead of raising.
            queue: Celery queue of the children, instead of their task's own.
            priority: Priority of the children's messages, instead of their task's own.

        Raises:
            ChildFailed: A child used up its attempts. Children that no worker had started are cancelled, the others
                go on.
            ChildTimedOut: ``timeout`` ended first.
            ChildCancelled: Somebody cancelled a child.
            TooManyChildren: There are too many payloads. Nothing is stored.
        """
        step = step_name(step, "map")
        call = f'ctx.map("{step}")'
        self._enter(step, call)
        given = ChildOptions(timeout, on_timeout, queue, priority)
        seconds, late, options = given.checked()
        parallel = None if max_parallel is None else check_parallel(max_parallel)
        each = check_payloads(payloads, call)
        resolved = [
            self._resolve(*filled(child, payload, call, what := f"payloads[{number}]"), call, what)
            for number, payload in enumerate(each)
        ]
        texts = [invocable.stored_payload(args, kwargs) for invocable, args, kwargs, _ in resolved]
        task = resolved[0][0].name if resolved else self._resolve(child, None, call)[0].name
        payload_digest = digest(" ".join(digest(text) for text in texts))
        remembered = self._recall(step, StepKind.MAP, task=task, payload_digest=payload_digest)
        if remembered is None:
            self._check_depth(call, task)
            self._hint_at_milliseconds(step, timeout, seconds)
            children = [
                invocable.new_execution(
                    args,
                    kwargs,
                    {**own, **options},
                    what=f"payloads[{number}] of {call}",
                    execution_id=derive_child_id(self._execution.pk, f"{step}[{number}]"),
                )
                for number, (invocable, args, kwargs, own) in enumerate(resolved)
            ]
            children = [headers.collect(new, self._execution) for new in children]
            fails_fast = not return_exceptions
            self._suspend(
                transitions.Map(step, task, children, payload_digest, seconds, late, parallel, fails_fast),
            )
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()
        return self._map_outcome(remembered, return_exceptions=return_exceptions)

    def _map_outcome(self, remembered: steps.Memory, *, return_exceptions: bool) -> list[Any]:
        with self._beyond_the_body():
            if not return_exceptions and remembered.status != StepStatus.SUCCEEDED:
                outcomes: list[tuple[Any, ChildError | None]] = [(None, child_error(remembered))]
            else:
                outcomes = outcomes_of_map(remembered, self._recall_map(remembered.name))
        first = next((error for _, error in outcomes if error is not None), None)
        if first is not None and not return_exceptions:
            raise first
        return [value if error is None else error for value, error in outcomes]

    def _recall_map(self, step: str) -> list[steps.ChildOutcome]:
        return transitions.patiently(lambda: steps.recall_map(self._execution.pk, step))

    def start(
        self,
        step: str,
        child: Task[..., R] | Signature[R] | str,
        payload: object = None,
        *,
        timeout: float | dt.timedelta | None = None,
        on_timeout: Literal["cancel", "abandon"] = "cancel",
        queue: str | None = None,
        priority: int | None = None,
    ) -> ChildHandle[R]:
        """Start ``child`` as a durable step and go on without waiting; ``ctx.gather`` waits for it.

        A child that is never gathered lives on when this execution has succeeded or failed, and is cancelled when this
        execution is cancelled.

        Args and errors: as for ``invoke``; the child's own outcome is raised by ``gather``.

        Returns:
            A handle for ``gather``, good for this run of the body.
        """
        step = step_name(step, "start")
        remembered = self._invocation(
            f'ctx.start("{step}")',
            StepKind.START,
            step,
            child,
            payload,
            ChildOptions(timeout, on_timeout, queue, priority),
        )
        if isinstance(remembered, transitions.Invocation):
            wait = remembered
            self._give_way()
            with self._beyond_the_body():
                remembered = self._start_child(wait)
            self._memory[remembered.name] = remembered
            self._replayed += 1
        self._lease_must_hold()
        return ChildHandle(remembered.name, remembered.child_id, self)

    def _start_child(self, wait: transitions.Invocation) -> steps.Memory:
        return transitions.start_child(self._execution, wait)

    def gather(self, *handles: ChildHandle[Any], return_exceptions: bool = False) -> list[Any]:
        """Wait for started children and return their results, in the order of ``handles``.

        The worker is released, and the body runs again once: when all have ended, or when the first of them has failed
        for good.

        Args:
            handles: What ``ctx.start`` returned in this run.
            return_exceptions: Wait for all, and put ``ChildFailed``, ``ChildTimedOut`` or ``ChildCancelled`` in the
                place of a result that there is not, instead of raising.

        Raises:
            ChildFailed, ChildTimedOut, ChildCancelled: The outcome of the first child that has no result. The others
                go on; those that no worker had started are cancelled.
        """
        for handle in handles:
            if not isinstance(handle, ChildHandle):
                raise InvalidArgumentType(
                    f"ctx.gather takes the handles that ctx.start returned, got {type(handle).__name__}. "
                    "A list of them is passed as ctx.gather(*handles)."
                )
            if handle._context is not self:
                raise InvalidArgument(
                    f'The handle of step "{handle.step}" is of another run or execution. Call ctx.start in this run; '
                    "it starts nothing twice."
                )
        names = list(dict.fromkeys(handle.step for handle in handles))
        step = gather_name(names, return_exceptions=return_exceptions)
        self._used.pop(step, None)
        self._enter(step, "ctx.gather()")
        if not names:
            return []
        remembered = self._recall(step, StepKind.GATHER)
        if remembered is None and any(self._memory[name].is_pending for name in names):
            self._suspend(transitions.Gather(step, names, fails_fast=not return_exceptions))
        if remembered is not None and remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()
        with self._beyond_the_body():
            if remembered is not None and remembered.child_id is not None:
                # Others may have failed by now. The one that ended the first wait is the one that counts.
                names = [name for name in names if self._memory[name].child_id == remembered.child_id]
                if not names:
                    raise remembered.lost("cause")
            outcomes = {name: outcome_of(self._memory[name]) for name in names}
        first = next((error for _, error in outcomes.values() if error is not None), None)
        if first is not None and not return_exceptions:
            raise first
        return [value if error is None else error for value, error in (outcomes[handle.step] for handle in handles)]

    # --------------------------------------------------------------------------------------------------------- steps

    def step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn(*args, **kwargs)`` once and remember its result.

        ``fn`` runs at least once: if the worker dies after its effect and before the result is stored, it runs again.
        An exception of ``fn`` is raised as it is; if the body catches it and goes on to another ``ctx`` call, it is
        remembered too, so that a replay takes the same branch. (``SystemExit`` and ``KeyboardInterrupt`` are not.)

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
        step = step_name(step, "step")
        call = f'ctx.step("{step}")'
        found, value = self._begin_step(step, fn, call)
        if found:
            return value  # type: ignore[no-any-return]
        with self._nested(call), observing.stepping(self._execution, step):
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                sessions.close_raised_in(error)
                self._keep_in_mind(step, error)
                raise
        self._must_be_in_its_process(call)
        self._must_be_closed(self._watch.added(), call)
        text, value = _encode_result(result, call)
        with self._beyond_the_body():
            memory = self._record(step, result=text)
        self._checked_at = time.monotonic()
        self._memory[step] = memory
        self._replayed += 1
        return value if memory.result == text else memory.get_result()  # type: ignore[no-any-return]

    def atomic_step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``fn(*args, **kwargs)`` with exactly one effect: its ORM writes and the memory of it are one transaction.

        That holds for writes to the database that stores the executions. If the worker dies or the lease is lost,
        neither the writes nor the memory remain. If the transaction is rolled back by a deadlock, a serialization
        failure or the end of its session, ``fn`` is called again: what it does beside such writes may happen more than
        once, and belongs into ``ctx.step``.

        Args and errors: as for ``step``.
        """
        step = step_name(step, "atomic_step")
        call = f'ctx.atomic_step("{step}")'
        found, value = self._begin_step(step, fn, call)
        if found:
            return value  # type: ignore[no-any-return]
        with self._nested(call), observing.stepping(self._execution, step):
            try:
                with self._beyond_the_body():
                    done = self._record_together(
                        step, lambda: self._closing(lambda: _encode_result(fn(*args, **kwargs), call), call)
                    )
            except BaseException as error:
                if not isinstance(error, Exception):
                    self._keep_in_mind(step, error)
                raise
            if done.error is not None:
                self._unrecorded = (step, done.error)
                raise done.error
        assert done.memory is not None
        self._memory[step] = done.memory
        self._replayed += 1
        self._checked_at = time.monotonic()
        if done.is_to_cancel:
            self._end(CancelExecution())
        return done.value  # type: ignore[no-any-return]

    def _begin_step(self, step: str, fn: object, call: str) -> tuple[bool, Any]:
        self._enter(step, call)
        if not callable(fn):
            raise InvalidArgumentType(
                f"{call} needs a callable, got {type(fn).__name__}. Pass the function, not its result."
            )
        remembered = self._recall(step, StepKind.STEP)
        if remembered is None:
            self._give_way()
            self._ask_unless_asked_within(STEP_FRESH_SECONDS)
            return False, None
        with self._beyond_the_body():
            error = revive_in_body(remembered.get_failure()) if remembered.status == StepStatus.FAILED else None
            value = remembered.get_result() if error is None else None
        if error is not None:
            raise error
        return True, value

    # --------------------------------------------------------------------------------------------------------- sleeps

    def sleep(self, step: str, seconds: float | dt.timedelta) -> None:
        """Release the worker and go on after ``seconds`` (or a ``timedelta``), by the database's clock."""
        step = step_name(step, "sleep")
        call = f'ctx.sleep("{step}")'
        self._enter(step, call)
        duration = check_duration(seconds, f"seconds of {call}")
        self._sleep(step, transitions.Sleep(step, seconds=duration))

    def sleep_until(self, step: str, when: dt.datetime) -> None:
        """Release the worker and go on at the instant ``when``."""
        step = step_name(step, "sleep_until")
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

    # --------------------------------------------------------------------------------------------------------- events

    def wait_for(self, step: str, event: str, *, timeout: float | dt.timedelta | None = None) -> Any:
        """Release the worker until an event of this name is sent to the execution, and return its payload.

        Events are sent with ``api.send_event``. One that was sent before is kept, and taken at once. Each is taken by
        one step, the oldest of its name first.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            event: Name of the event; several steps may wait for events of one name, one after another.
            timeout: Seconds, or a ``timedelta``, from the suspension of the first run that gets here; replays never
                extend it. ``None`` waits without limit, 0 only looks: what it has seen is remembered, too.

        Returns:
            The payload after a JSON round trip.

        Raises:
            EventTimedOut: ``timeout`` ended first. Also a builtin ``TimeoutError``. Remembered: each replay raises it,
                and an event that comes later is kept for the next ``wait_for``.
            StepNameReused: ``step`` was used before in this run.
            StepMismatch: ``step`` was recorded for another event or kind.
            InvokeInsideTransaction: The call stands inside ``transaction.atomic()``.
        """
        step = step_name(step, "wait_for")
        call = f'ctx.wait_for("{step}")'
        self._enter(step, call)
        event = check_name(event, "event name")
        seconds = None if timeout is None else check_duration(timeout, "timeout")
        remembered = self._recall(step, StepKind.EVENT, task=event)
        if remembered is None:
            self._hint_at_milliseconds(step, timeout, seconds)
            self._suspend(transitions.AwaitEvent(step, event, seconds))
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()
        if remembered.status == StepStatus.SUCCEEDED:
            with self._beyond_the_body():
                return remembered.get_result()
        raise EventTimedOut(
            f"Event '{event}' did not come within {remembered.timeout_seconds:g}s (step '{step}')",
            step=step,
            event=event,
        )

    # ------------------------------------------------------------------------------------------- control from outside

    def checkpoint(self) -> None:
        """In a long body: stop here if the execution was cancelled, its lease is lost, or the worker shuts down.

        On a shutdown the execution goes back to the queue without using up an attempt. The database is asked at most
        once a second.

        Raises:
            LeaseLost: Another run has taken over.
        """
        self._usable("ctx.checkpoint()")
        self.flush()
        self._lease_must_hold()
        self._give_way()
        self._ask_unless_asked_within(CHECKPOINT_INTERVAL_SECONDS)

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
    def suspension(self) -> tuple[transitions.Wait, tuple[str, int]] | None:
        """What the body waits for, and where it said so; for the executor."""
        return self._suspension

    @property
    def ending(self) -> ControlFlow | None:
        """What has ended the body, whatever that made of it; for the executor."""
        return self._ending

    @property
    def memory(self) -> Mapping[str, steps.Memory]:
        """All that the execution remembers by now; for the executor."""
        return self._memory

    def _has_come_to(self, step: str) -> bool:
        """Whether the body has called this step in this run; for the executor."""
        return step in self._used

    @contextmanager
    def entered(self) -> Any:
        """Make this the current context while the body runs, and close it afterwards; for the executor."""
        token = current_context.set(self)
        self._watch.begin()
        try:
            yield
        finally:
            current_context.reset(token)
            self._closed = True

    def _left_open(self, raised: BaseException | None = None) -> list[str]:
        """Clean this thread's connections after the body, and return what would have lost writes; for the executor."""
        return self._watch.end(None if isinstance(raised, ControlFlow) else raised)

    def _keep_in_mind(self, step: str, error: BaseException) -> None:
        """Let the next call record a step's failure: the body has caught it then."""
        if is_caught_by_bodies(type(error)):
            self._unrecorded = (step, error)

    def flush(self) -> None:
        """Record a step's failure that the body has caught; for the executor."""
        if self._unrecorded is not None:
            step, error = self._unrecorded
            self._unrecorded = None
            failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
            with self._beyond_the_body():
                self._memory[step] = self._record(step, failure=failure)
            self._replayed += 1

    def _enter(self, step: str, call: str) -> None:
        """Check everything that is wrong with any call, whatever is remembered."""
        self._usable(call)
        place = caller()
        if step in self._used:
            raise StepNameReused(
                f'Step name "{step}" was already used at {shown_place(self._used[step])} and again at '
                f"{shown_place(place)}; give each call its "
                f'own name, in a loop for example f"{step}-{{index}}".'
            )
        self._used[step] = place
        if found := self._watch.added():
            where = "inside transaction.atomic()" if "atomic() block" in found[0] else f"with {' and '.join(found)}"
            raise InvokeInsideTransaction(
                f"{call} was called {where}, which would undo the memory of it. Call it outside, "
                "or put the writes into ctx.atomic_step()."
            )
        # Before this call ends the body: it has seen the failure, and a later run must see it, too.
        self.flush()
        self._lease_must_hold()

    def _must_be_closed(self, found: list[str], call: str) -> None:
        """Refuse to record a step whose function has left a transaction open: the memory of it would be undone."""
        if found:
            raise InvokeInsideTransaction(
                f"The function of {call} left {' and '.join(found)}, which would undo the memory of it. "
                "Use `with transaction.atomic():`, which ends with its block."
            )

    def _usable(self, call: str) -> None:
        if self._closed:
            raise ContextClosed(
                f"{call} was called after the run had ended. A context is good for one run of the body."
            )
        self._must_be_in_its_process(call)
        if threading.get_ident() != self._thread:
            raise WrongThread(f"{call} was called in another thread than the one that runs the body.")
        if self._inside is not None:
            raise NestedDurableCall(
                f"{call} was called inside {self._inside}. A step's function must not call ctx; call it from the body."
            )
        if self._suspension is not None or self._ending is not None:
            # The body calls on after its end. It gets no further.
            self._note_swallowed()
            raise SuspendExecution if self._ending is None else self._ending

    def _note_swallowed(self) -> None:
        """Tell of the first call after the body's end, unless it unwinds, and end a body that does not stop calling."""
        if isinstance(sys.exception(), ControlFlow):
            return  # in a `finally`, most often
        self._swallowed += 1
        if self._swallowed not in (1, MAX_SWALLOWED):
            return
        how = f"called on at {shown_place(caller())}"
        if self._suspension is not None:
            what = swallowed_suspension(self, self._execution.task, how)
        else:
            what = f"{self._execution.task} swallowed {type(self._ending).__name__} and {how}"
        if self._swallowed == 1:
            logger.error("%s. It gets no further. %s", what, SWALLOWED_ADVICE, extra=log_extra(self._execution))
        else:
            self._end_stuck(self, f"{what}, {MAX_SWALLOWED} times")

    @property
    def _is_forked(self) -> bool:
        """Whether this is a copy of the context, in a process that the body has forked; for the executor."""
        return os.getpid() != self._process

    def _must_be_in_its_process(self, call: str) -> None:
        if self._is_forked:
            raise WrongThread(f"{call} was called in a process that was forked from the one that runs the body.")

    @contextmanager
    def _beyond_the_body(self) -> Any:
        """Let no error of ours reach the body where it could be caught.

        What the body does about an exception has to be what it does on each replay. Nothing remembers an error of one
        of our own statements, nor that a recorded outcome was gone.
        """
        try:
            yield
        except LeaseLost:
            self._is_lost = True  # each later call says so, too
            raise
        except CancelExecution:
            self._ending = CancelExecution()  # so does a body's that swallows it and calls on
            raise
        except AbandonRun as error:
            self._ending = AbandonRun(*error.args)
            raise
        except (DatabaseError, InterfaceError, OutcomeLost, NewerFormat) as error:
            self._ending = EndAttempt(error)
            raise self._ending from None

    def _lease_must_hold(self) -> None:
        if self._lease.lost or self._is_lost:
            raise LeaseLost(
                f"The lease of execution {self._execution.pk} is lost: another run took over. "
                "This run can write no more."
            )
        if self._lease.cancel_requested:
            self._end(CancelExecution())

    def _give_way(self) -> None:
        """Give the execution back if the worker shuts down, before a call that is not recorded does anything.

        One that suspends needs not ask: a suspension gives the worker free, too, and loses nothing.
        """
        if self._draining():
            self._end(ReleaseExecution())

    def _end(self, why: ControlFlow) -> NoReturn:
        """End the body; it gets no further, whatever it makes of that."""
        self._ending = why
        raise why

    def _ask_unless_asked_within(self, seconds: float) -> None:
        """Ask the database whether this run may go on, if it has not said so for a while."""
        if time.monotonic() - self._checked_at >= seconds:
            with self._beyond_the_body():
                self._check_held()
            self._checked_at = time.monotonic()

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
            noun, verb = ("event", "waits for") if kind == StepKind.EVENT else ("task", "calls")
            raise StepMismatch(
                f'Step "{step}" recorded {noun} {remembered.task} and the code now {verb} {task}. '
                "Give the new call its own step name."
            )
        if remembered.payload_digest != payload_digest:
            message = (
                f'Step "{step}" was recorded with another payload than the code now passes; '
                "the recorded outcome counts. "
                "Payloads should follow from the execution's own payload and earlier steps."
            )
            if self._is_strict:
                raise StepMismatch(message)
            logger.warning(message, extra=log_extra(self._execution))
        return remembered

    # What goes to the database from inside a body; the test kit's context keeps it in memory.

    def _record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> steps.Memory:
        return transitions.record_step(self._execution, step, result=result, failure=failure)

    def _record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> transitions.Together:
        return transitions.record_together(self._execution, step, work)

    def _closing(self, work: Callable[[], R], call: str) -> R:
        """Run the function of an ``atomic_step``, and refuse what it leaves open; inside of that step's block."""
        watch = left_open.Watch()
        try:
            done = work()
        except BaseException as error:
            sessions.close_raised_in(error, blocks=1)
            watch.clean()
            raise
        self._must_be_in_its_process(call)
        self._must_be_closed(watch.clean(), call)
        return done

    def _check_held(self) -> None:
        transitions.check_held(self._execution)

    @property
    def _is_strict(self) -> bool:
        return conductor_settings().STRICT_REPLAY

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


#: What to tell whoever wrote a body that swallows its suspension.
SWALLOWED_ADVICE = "Use `except Exception`, or re-raise conductor_app.SuspendExecution; do not return from `finally`."


def swallowed_suspension(context: ExecutionContext, task: str, how: str) -> str:
    """Return where a body swallowed its suspension, and how it went on (``returned``, ``raised ValueError``)."""
    assert context.suspension is not None
    wait, place = context.suspension
    return f"{task} swallowed the suspension at {shown_place(place)} (step {wait.step!r}) and {how}"


def _encode_result(result: object, call: str) -> tuple[str, Any]:
    return round_trip(result, f"result of {call}", conductor_settings().MAX_RESULT_BYTES)
