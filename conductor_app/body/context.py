"""``ExecutionContext``: what a durable body calls."""

from __future__ import annotations

import datetime as dt
import difflib
import inspect
import itertools
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import (
    Any,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
    overload,
)

import celery
from celery import Task, current_app
from celery.canvas import Signature
from celery.exceptions import Retry, TaskPredicate
from celery.local import Proxy
from django.db import DatabaseError, InterfaceError

from conductor_app import transitions
from conductor_app.body import headers, left_open
from conductor_app.body.plain import DjangoTask, Invocable, PlainTask, is_django_task, is_invocable
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildTimedOut,
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
    ProgrammingError,
    ReleaseExecution,
    RetryExecution,
    StepMismatch,
    StepNameReused,
    SuspendExecution,
    TooManyChildren,
    TooManySteps,
    UncleanConnection,
    UnknownTask,
    WrongThread,
)
from conductor_app.models import Execution
from conductor_app.states import OnTimeout, StepKind, StepStatus
from conductor_app.store import observing, sessions
from conductor_app.store.ids import derive_child_id
from conductor_app.transitions import steps
from conductor_app.transitions.leases import Lease
from conductor_app.values.arguments import check_duration, check_instant
from conductor_app.values.options import check_call_options
from conductor_app.values.serialization import (
    describe,
    digest,
    is_caught_by_bodies,
    read_result,
    revive_in_body,
    round_trip,
    shown,
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

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")
_NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.:-]*"
_NAME_LENGTH = 128

logger = logging.getLogger("conductor_app.execution")
#: Where ``ctx.logger`` writes: apart from the engine's own lines, so that a worker can show ids on the body's.
body_logger = logging.getLogger("conductor_app.execution.body")

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
        step = _step_name(step, "invoke")
        remembered = self._invocation(
            f'ctx.invoke("{step}")',
            StepKind.INVOKE,
            step,
            child,
            payload,
            _ChildOptions(timeout, on_timeout, queue, priority),
        )
        if isinstance(remembered, transitions.Invocation):
            self._suspend(remembered)
        return self._child_outcome(remembered)

    def _invocation(
        self, call: str, kind: StepKind, step: str, child: Any, payload: object, given: _ChildOptions
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
            return known[1], *_child_arguments(payload, call, what), {}
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
        if seconds is not None and not isinstance(timeout, dt.timedelta) and _looks_like_milliseconds(seconds):
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
            value, error = _outcome_of(remembered)
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
        step = _step_name(step, "map")
        call = f'ctx.map("{step}")'
        self._enter(step, call)
        given = _ChildOptions(timeout, on_timeout, queue, priority)
        seconds, late, options = given.checked()
        parallel = None if max_parallel is None else _check_parallel(max_parallel)
        each = _payloads(payloads, call)
        resolved = [
            self._resolve(*_filled(child, payload, call, what := f"payloads[{number}]"), call, what)
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
                outcomes = _outcomes_of_map(remembered, self._recall_map(remembered.name))
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
        step = _step_name(step, "start")
        remembered = self._invocation(
            f'ctx.start("{step}")',
            StepKind.START,
            step,
            child,
            payload,
            _ChildOptions(timeout, on_timeout, queue, priority),
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
            outcomes = {name: _outcome_of(self._memory[name]) for name in names}
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
        step = _step_name(step, "step")
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
        step = _step_name(step, "atomic_step")
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
        step = _step_name(step, "sleep")
        call = f'ctx.sleep("{step}")'
        self._enter(step, call)
        duration = check_duration(seconds, f"seconds of {call}")
        self._sleep(step, transitions.Sleep(step, seconds=duration))

    def sleep_until(self, step: str, when: dt.datetime) -> None:
        """Release the worker and go on at the instant ``when``."""
        step = _step_name(step, "sleep_until")
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
        step = _step_name(step, "wait_for")
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
        place = _caller()
        if step in self._used:
            raise StepNameReused(
                f'Step name "{step}" was already used at {_shown_place(self._used[step])} and again at '
                f"{_shown_place(place)}; give each call its "
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
        how = f"called on at {_shown_place(_caller())}"
        if self._suspension is not None:
            what = swallowed_suspension(self, self._execution.task, how)
        else:
            what = f"{self._execution.task} swallowed {type(self._ending).__name__} and {how}"
        if self._swallowed == 1:
            logger.error("%s. It gets no further. %s", what, SWALLOWED_ADVICE, extra=self._log_extra())
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
            logger.warning(message, extra=self._log_extra())
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

    def _log_extra(self) -> dict[str, Any]:
        return {
            "execution_id": str(self._execution.pk),
            "root_id": str(self._execution.root_id),
            "task": self._execution.task,
            "attempt": self._execution.attempt,
        }

    def _line_extra(self) -> dict[str, Any]:
        # By its own names for them Celery's formatter finds them in a thread that a step's function has started, too.
        return {**self._log_extra(), "task_id": str(self._execution.pk), "task_name": self._execution.task}


@dataclass(frozen=True)
class ChildHandle(Generic[R]):
    """A started child, for ``ctx.gather``; good for the run that got it from ``ctx.start``."""

    #: Name of the step that started it.
    step: str
    #: Id of the child execution.
    execution_id: uuid.UUID | None
    _context: ExecutionContext = field(repr=False, compare=False)


def _outcome_of(remembered: steps.Memory) -> tuple[Any, ChildError | None]:
    """Return the result of a child, or the exception that its outcome raises in its parent."""
    if remembered.is_pending:  # although it was awaited
        raise remembered.lost("outcome")
    if remembered.status == StepStatus.SUCCEEDED:
        return remembered.get_result(), None
    return None, child_error(remembered)


def _outcomes_of_map(
    remembered: steps.Memory, children: Sequence[steps.ChildOutcome]
) -> list[tuple[Any, ChildError | None]]:
    """Return what ``_outcome_of`` does for each child of a map, in the order of its payloads."""
    is_timed_out = remembered.status == StepStatus.TIMED_OUT
    late = set(read_result(remembered.result, lambda: remembered.lost("outcome"))) if is_timed_out else set()
    by_position = {child.position: child for child in children}
    if remembered.total is None:
        raise remembered.lost("outcome")
    outcomes: list[tuple[Any, ChildError | None]] = []
    for position in range(remembered.total):
        child = by_position.get(position)
        known = remembered._replace(child_id=None if child is None else child.child_id)
        if position in late or (is_timed_out and child is not None and child.is_open):
            outcomes.append((None, child_error(known)))
        elif child is None and remembered.status == StepStatus.CANCELLED:
            # Deleted while the map waited for it; that was recorded, with this reason.
            outcomes.append((None, child_error(known)))
        elif child is not None and child.is_open and remembered.status != StepStatus.SUCCEEDED:
            # The first failure decided the map, and now the code asks for all outcomes.
            outcomes.append((None, child_error(remembered)))
        elif child is None or child.is_open:
            raise remembered.lost("outcome")
        else:
            known = known._replace(status=StepStatus(child.status), result=child.result, error=child.error)
            outcomes.append(_outcome_of(known))
    return outcomes


def gather_name(members: Sequence[str], *, return_exceptions: bool) -> str:
    """Return the name under which a gather is remembered; no step of the user's can have it."""
    name = f"gather({','.join(members)}{',return_exceptions' if return_exceptions else ''})"
    if len(name) <= _NAME_LENGTH:
        return name
    return f"{name[:88]}…{digest(name)})"


class ReplayAwareLogger(logging.LoggerAdapter[logging.Logger]):
    """``ctx.logger``: adds the execution's ids, and drops lines that an earlier run has already written."""

    def __init__(self, context: ExecutionContext) -> None:
        super().__init__(body_logger, {})
        self._context = context

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name is logging's
        """Whether a line of this level would be written now."""
        return not self._context.is_replaying and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the ids to the record."""
        kwargs["extra"] = {**self._context._line_extra(), **(kwargs.get("extra") or {})}
        return msg, kwargs


_WRONG_CALL = re.compile(r"(?P<of>[\w.<>]+)\(\) (?P<how>(missing|takes|got) .*)", re.DOTALL)


def as_misuse(error: BaseException, task: str) -> BaseException:
    """Return what has ended a body, as the misuse that it is: a call that no retry would make right.

    Args:
        error: What the body raised.
        task: The name of its task.
    """
    found: BaseException | None = None
    if isinstance(error, TaskPredicate):
        instead = "`raise ctx.retry(countdown=…)`" if isinstance(error, Retry) else "`return`, or raise an error"
        found = ProgrammingError(
            f"{task} raised Celery's {type(error).__name__}, which would leave a durable execution without an outcome. "
            f"Use {instead}."
        )
    elif type(error) is TypeError:
        found = _wrong_call(error)
    elif type(error) is AttributeError and isinstance(error.obj, ExecutionContext) and isinstance(error.name, str):
        nearest = difflib.get_close_matches(error.name, _PUBLIC, n=1, cutoff=0.6)
        hint = f' Did you mean "{nearest[0]}"?' if nearest else f" It has {', '.join(_PUBLIC)}."
        found = (
            error if hasattr(ExecutionContext, error.name) else ProgrammingError(f'ctx has no "{error.name}".{hint}')
        )
    return error if found is None else found.with_traceback(error.__traceback__)


def _wrong_call(error: TypeError) -> InvalidArgumentType | None:
    """Return the misuse that a call of ``ctx``, or its call of a step's function, with other arguments is."""
    match = _WRONG_CALL.fullmatch(error.args[0]) if len(error.args) == 1 and type(error.args[0]) is str else None
    if match is None:
        return None
    cls, _dot, name = match["of"].rpartition(".")
    if cls == ExecutionContext.__qualname__ and name in _PUBLIC:
        signature = inspect.signature(getattr(ExecutionContext, name))
        parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()][1:]
        written = signature.replace(parameters=parameters, return_annotation=signature.empty)
        return InvalidArgumentType(f"ctx.{name}() {match['how']}. It is ctx.{name}{written}.")
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    # Python has not even entered the function.
    is_ours = last is not None and last.tb_frame.f_code.co_filename == __file__
    return InvalidArgumentType(str(error)) if is_ours else None


#: What a body may use.
_PUBLIC = tuple(
    name
    for name in (*sorted(vars(ExecutionContext)), "logger")
    if not name.startswith("_") and name not in ("ending", "entered", "flush", "memory", "suspension")
)

#: What to tell whoever wrote a body that swallows its suspension.
SWALLOWED_ADVICE = "Use `except Exception`, or re-raise conductor_app.SuspendExecution; do not return from `finally`."


def unclean(task: str, found: Sequence[str]) -> UncleanConnection:
    """Return the error of a body that has left its connections as ``left_open`` says."""
    return UncleanConnection(
        f"{task} left {' and '.join(found)} at its end. What it had written there and not committed is rolled back. "
        "Use `with transaction.atomic():`, which ends with its block, and undo what changes a session."
    )


def unclean_start(task: str, found: Sequence[str]) -> InvokeInsideTransaction:
    """Return the error of a run around whose body something else has opened what ``left_open`` says."""
    return InvokeInsideTransaction(
        f"The body of {task} was about to begin with {' and '.join(found)}. That would undo what its run remembers, "
        "and how it ends. Open it in the body or in ctx.atomic_step(), not in the task's base class, a hook or a "
        "receiver."
    )


def swallowed_suspension(context: ExecutionContext, task: str, how: str) -> str:
    """Return where a body swallowed its suspension, and how it went on (``returned``, ``raised ValueError``)."""
    assert context.suspension is not None
    wait, place = context.suspension
    return f"{task} swallowed the suspension at {_shown_place(place)} (step {wait.step!r}) and {how}"


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


def _step_name(step: object, call: str = "") -> str:
    if call and not isinstance(step, str):
        _check_not_forgotten(step, call)
    return check_name(step, "step name")


def _check_not_forgotten(step: object, call: str) -> None:
    """Refuse what comes second, a task or a function, in the place of a step's name.

    Raises:
        InvalidArgumentType: It is such a thing.
    """
    if issubclass(type(step), Proxy):
        step = cast(Any, step)._get_current_object()
    if isinstance(step, (Task, Signature)):
        what, name = f"the task {step.name}", str(step.name).rpartition(".")[2]
    elif callable(step):
        name = getattr(step, "__name__", "")
        what = f"{type(step).__name__} {getattr(step, '__qualname__', None) or shown(step)}"
    else:
        return
    name = name if name.isidentifier() else "…"
    raise InvalidArgumentType(
        f'step name must be str, got {what}. The step\'s name comes first: ctx.{call}("name", {name}, …)'
    )


def check_name(name: object, what: str) -> str:
    """Return the name of a step or an event.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is empty, too long, or has other characters than ASCII letters, digits and ``_ . : -``.
    """
    if type(name) is str and _NAME.match(name):
        return name
    if not isinstance(name, str):
        raise InvalidArgumentType(f"{what} must be str, got {type(name).__name__}")
    if not name:
        raise InvalidArgument(f"{what} must be 1–{_NAME_LENGTH} characters")
    if len(name) > _NAME_LENGTH:
        raise InvalidArgument(f"{what} must be 1–{_NAME_LENGTH} characters: {len(name)} > {_NAME_LENGTH}")
    if not _NAME.match(name):
        raise InvalidArgument(f"{what} {name!r} must match {_NAME_PATTERN}: ASCII letters, digits and _ . : -")
    return str.__str__(name)  # a member of an Enum is written by its value


def check_key(key: object, name: str) -> str:
    """Return a key that the caller has chosen.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is empty, longer than 255 characters, or would not be the same on every database.
    """
    if not isinstance(key, str):
        raise InvalidArgumentType(f"{name} must be str, got {type(key).__name__}")
    if not 1 <= len(key) <= 255:
        raise InvalidArgument(f"{name} must have 1–255 characters, got {len(key)}")
    # MySQL ignores spaces at the end when it compares, so two keys would be one there, and only there.
    if key != key.strip() or not key.isprintable():
        raise InvalidArgument(f"{name} must be printable text without spaces at its ends, got {key!r}. Strip it.")
    return str.__str__(key)


@dataclass(frozen=True)
class _ChildOptions:
    """What a call says about a child beside its payload, as it was given."""

    timeout: Any
    on_timeout: Any
    queue: Any
    priority: Any

    def checked(self) -> tuple[float | None, OnTimeout, dict[str, Any]]:
        """Return seconds, what a timeout does, and Celery's options."""
        if self.timeout is None and self.queue is None and self.priority is None and self.on_timeout == "cancel":
            return None, OnTimeout.CANCEL, {}
        seconds = None if self.timeout is None else check_duration(self.timeout, "timeout", allow_zero=False)
        if self.on_timeout not in list(OnTimeout):
            raise InvalidArgument(f'on_timeout must be "cancel" or "abandon", got {shown(self.on_timeout)}.')
        options: dict[str, Any] = {}
        if self.queue is not None:
            options["queue"] = _check_type(self.queue, str, "queue")
        if self.priority is not None:
            options["priority"] = _check_type(self.priority, int, "priority")
        return seconds, OnTimeout(self.on_timeout), options


def _check_parallel(value: object) -> int:
    count = _check_type(value, int, "max_parallel")
    if count < 1:
        raise InvalidArgument(f"max_parallel must be ≥ 1, got {count}; None is without limit")
    return count


def _payloads(payloads: object, call: str) -> list[Any]:
    if isinstance(payloads, (str, bytes, Mapping)) or not isinstance(payloads, Iterable):
        raise InvalidArgumentType(
            f"{call} needs a list of payloads, one per child, got {type(payloads).__name__}. "
            "For one child use ctx.invoke."
        )
    limit = conductor_settings().MAX_CHILDREN
    each = list(itertools.islice(payloads, limit + 1))
    if len(each) > limit:
        raise TooManyChildren(
            f"{call} got more than {limit} payloads. Map over parts of the work, in children that map themselves, "
            'or raise CONDUCTOR["MAX_CHILDREN"].'
        )
    return each


def _check_type(value: Any, expected: type[R], name: str) -> R:
    if isinstance(value, bool) or not isinstance(value, expected):
        raise InvalidArgumentType(f"{name} must be {expected.__name__}, got {type(value).__name__}")
    return value


def _looks_like_milliseconds(seconds: float) -> bool:
    """Tell whether a timeout is long, and not what somebody writes who means seconds: whole days, whole hours."""
    if seconds % _DAY == 0:
        return seconds > 0 and seconds % (1_000 * _DAY) == 0
    if seconds % 1_000 == 0:
        return seconds >= 10_000
    return seconds > _DAY and seconds % 1 == 0 and seconds % _HOUR != 0


_HOUR, _DAY = 3_600, 86_400


_NO_KEY = "The step's name is the key: its child is stored once, however often the body runs."


def resolve_child(
    child: object, payload: object, call: str, what: str = "payload"
) -> tuple[Invocable, list[Any], dict[str, Any], dict[str, Any]]:
    """Return the child's task, its arguments and its own Celery options.

    Args:
        child: A task, its name, or a signature of it.
        payload: As ``ctx.invoke`` takes it.
        call: How the call is named in an error.
        what: How the payload is.

    Raises:
        UnknownTask, InvalidArgumentType: There is no such task, or the payload cannot be its arguments.
    """
    django_task: Invocable | None = None
    options: dict[str, Any] = {}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if issubclass(type(child), Proxy):
        # Once: what a decorator returns in a module of tasks looks its task up whenever it is asked for anything.
        child = cast(Any, child)._get_current_object()
    if isinstance(child, Signature):
        if child.get("subtask_type"):
            raise InvalidArgumentType(
                f"{call} runs one task at a time, got a {child['subtask_type']}. Invoke its tasks one after another."
            )
        if payload is not None:
            raise InvalidArgumentType(f"{call} got a signature and a payload. Put the arguments into the signature.")
        check_call_options(child.options, f"The signature given to {call}", also=(), hint=_NO_KEY)
        if "task_id" in child.options and "reply_to" not in child.options:  # which Celery adds when it freezes one
            raise InvalidArgumentType(
                f"The signature given to {call} has a task_id. A child's id follows from its step."
            )
        name, args, kwargs, options = str(child.task), list(child.args), dict(child.kwargs), dict(child.options)
    else:
        if isinstance(child, str):
            name = child
        elif isinstance(child, Task):
            name = child.name
        elif is_django_task(child):
            django_task, name = DjangoTask(child), ""
        elif isinstance(child, Mapping):
            verb = call.partition("(")[0]
            raise UnknownTask(
                f"{call} got a payload where a task comes. Was the step's name forgotten? "
                f'It comes first: {verb}("name", task, payload)'
            )
        else:
            described = getattr(child, "__qualname__", None) or shown(child)
            raise UnknownTask(
                f"{call} needs a task, its name or a signature, got {type(child).__name__} {described}. "
                "Is @durable_task missing above its definition?"
            )
        args, kwargs = _child_arguments(payload, call, what)
    if django_task is not None:
        return django_task, args, kwargs, options
    task = current_app.tasks.get(name)
    if task is None:
        raise UnknownTask(_unknown(name))
    return task if is_invocable(task) else PlainTask(task), args, kwargs, options


def _filled(child: object, payload: object, call: str, what: str) -> tuple[object, object]:
    """Return a child and its payload; a signature gets the payload's arguments, as another signature."""
    if not isinstance(child, Signature) or child.get("subtask_type"):
        return child, payload
    if child.immutable and payload is not None:
        raise InvalidArgumentType(
            f"{call} got an immutable signature, which takes no payloads. Make it with .s() instead of .si()."
        )
    args, kwargs = _child_arguments(payload, call, what)
    return child.clone(tuple(args), kwargs), None


def _child_arguments(payload: object, call: str, what: str) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(payload, Mapping):
        for key in payload:
            if not isinstance(key, str):
                raise InvalidArgumentType(
                    f"{what} of {call} has the key {key!r} of type {type(key).__name__}: its keys are the child's "
                    "argument names, so they must be strings."
                )
        return [], dict(payload)
    return [] if payload is None else [payload], {}


def _unknown(name: str) -> str:
    known = sorted(name for name in current_app.tasks if not name.startswith(_BUILT_IN))
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f'Did you mean "{nearest[0]}"? ' if nearest else ""
    others = _like(name, known)
    if not nearest and others:
        hint = f"The nearest ones are {', '.join(others)}. "
    return f'No task named "{shown(name)[1:-1]}". {hint}Is its module imported (tasks.py in an installed app)?'


_BUILT_IN = ("celery.", "conductor_app.")


def _like(name: str, known: Sequence[str]) -> list[str]:
    """Return the names of some tasks, those first whose last part is most like another name's."""
    last = name[-_NAME_LENGTH:].rpartition(".")[2]

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()

    return sorted(known, key=likeness, reverse=True)[:_SHOWN_TASKS]


#: So many tasks are named to whoever has named none.
_SHOWN_TASKS = 3


def _encode_result(result: object, call: str) -> tuple[str, Any]:
    return round_trip(result, f"result of {call}", conductor_settings().MAX_RESULT_BYTES)


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_CELERY = os.path.dirname(celery.__file__) + os.sep


def _caller() -> tuple[str, int]:
    """Return file and line of the call in the user's code."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


#: Bodies and what they call by ``.delay()``, of which this process has told.
_told_of_calls: set[tuple[str, str]] = set()


def hint_at_repeated_call(task: str) -> None:
    """Tell once of a body that calls a durable task by ``.delay()``: each of its runs would call it again.

    Not in the function of a step, which a replay leaves out.

    Args:
        task: Name of the task that is called, by a call that nothing but itself identifies.
    """
    running = current_context.get()
    if running is None or running._inside is not None:
        return
    called = (running._execution.task, task)
    if called in _told_of_calls:
        return
    _told_of_calls.add(called)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _CELERY)):
        frame = frame.f_back
    logger.warning(
        "%s calls %s at %s with .delay() or .apply_async(), outside of a step. Each run of the body calls it again, "
        "and a body runs again whenever it has waited. Use ctx.start("
        '"name", task, payload), or call it inside of ctx.step, or with an idempotency_key.',
        *called,
        _shown_place((frame.f_code.co_filename, frame.f_lineno)),
        extra=running._log_extra(),
    )


def _shown_place(place: tuple[str, int]) -> str:
    return f"{os.path.basename(place[0])}:{place[1]}"
