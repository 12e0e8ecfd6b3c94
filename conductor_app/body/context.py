"""``ExecutionContext``: what a durable body calls."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, cast, overload

from celery import Task
from celery.canvas import Signature

from conductor_app import logs, transitions
from conductor_app.body import headers
from conductor_app.body.children import (
    ChildHandle,
    ChildOptions,
    EventHandle,
    Handle,
    TimerHandle,
    check_failures,
    check_members,
    check_need,
    check_own_keys,
    check_parallel,
    check_payloads,
    child_arguments,
    filled,
    looks_like_milliseconds,
    resolve_child,
)
from conductor_app.body.names import batch_name, check_name, gather_name, peek_name, step_name
from conductor_app.body.outcomes import child_error, outcome_of, outcomes_of_map
from conductor_app.body.plain import Invocable
from conductor_app.body.run import BodyRun
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    ChildError,
    DuplicateExecution,
    EventTimedOut,
    InvalidArgument,
    InvalidArgumentType,
    LimitDeadlock,
    MaxDepthExceeded,
    NoneSucceeded,
    RetryExecution,
    StepMismatch,
    class_path,
)
from conductor_app.states import OnTimeout, StepKind, StepStatus
from conductor_app.store import interrupted, observing
from conductor_app.store.event_loops import finished
from conductor_app.store.ids import derive_child_id
from conductor_app.transitions import steps
from conductor_app.values.arguments import check_duration, check_instant
from conductor_app.values.failures import revive_in_body
from conductor_app.values.payloads import digest, round_trip
from conductor_app.values.tags import check_tags
from conductor_app.values.texts import shown

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H", bound=Handle[Any])

#: ``ctx.checkpoint`` asks the database at most this often, in seconds.
CHECKPOINT_INTERVAL_SECONDS = 1.0
#: A step's function begins on what the database said at most so many seconds ago. Each step that is recorded says it
#: anew, so steps in quick succession never ask; after a pause, a look takes a fraction of that.
STEP_FRESH_SECONDS = 0.01


class ExecutionContext(BodyRun):
    """The first argument of a durable body, good for one run in one thread."""

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
            DuplicateExecution: An open execution has the child's unique key. Remembered, if the body catches it.
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
            self._raise_if_refused(step)
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
        self._check_limits([new])
        self._hint_at_milliseconds(step, given.timeout, seconds)
        self._refuse_duplicates(step, [new])
        new = headers.collect(new, self._execution)
        self._tag(new.tags)
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

    def _refuse_duplicates(self, step: str, children: Sequence[transitions.NewExecution]) -> None:
        """Raise if an open execution has the unique key of a child that is about to be stored.

        Remembered as a step's failure is: if the body catches it, a replay takes the same branch.
        """
        with self._beyond_the_body():
            error = self._journal.duplicate_of(children)
        if error is not None:
            self._keep_in_mind(step, error)
            raise error

    def _raise_if_refused(self, step: str) -> None:
        """Raise again that a child was refused. No child stands behind it, so it was recorded as a step that failed."""
        remembered = self._memory[step]
        if remembered.kind != StepKind.STEP or remembered.status != StepStatus.FAILED:
            return
        failure = remembered.get_failure()
        if failure.type == class_path(DuplicateExecution):
            self._replayed += 1
            raise cast(Exception, revive_in_body(failure))

    def _check_depth(self, call: str, task: str) -> None:
        limit = conductor_settings().MAX_DEPTH
        if self._execution.depth + 1 > limit:
            raise MaxDepthExceeded(
                f"{call} would be execution number {limit + 1} in a chain of parents and children; the limit is "
                f'{limit}. Does {task} invoke itself without an end? The limit is CONDUCTOR["MAX_DEPTH"].'
            )

    def _check_limits(self, children: Sequence[transitions.NewExecution]) -> None:
        """Refuse children that would wait for a place which this execution, or one above it, has until it ends."""
        wanted = dict.fromkeys(pair for new in children for pair in new.limits)
        if not wanted:
            return
        with self._beyond_the_body():
            found = self._journal.find_deadlock(list(wanted))
        if found is None:
            return
        limit, key, holder = found
        named = f' (key "{key}")' if key else ""
        whose = "its parent" if holder == self._execution.pk else "an execution above it,"
        raise LimitDeadlock(
            f'{children[0].task} needs a place of limit "{limit.name}"{named}, which {whose} {holder} holds until it '
            'ends. Use holds="run", or another key.'
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
        max_failures: None = ...,
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
        max_failures: int | None = ...,
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
        max_failures: int | None = None,
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
            max_failures: So many children may end without a result: ``ChildFailed`` or ``ChildCancelled`` is put in
                their places, and the others go on. The next such end is raised.
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
            DuplicateExecution: An open execution has the unique key of one child. No child is stored.
        """
        step = step_name(step, "map")
        call = f'ctx.map("{step}")'
        self._enter(step, call)
        given = ChildOptions(timeout, on_timeout, queue, priority)
        seconds, late, options = given.checked()
        parallel = None if max_parallel is None else check_parallel(max_parallel)
        failures = None if max_failures is None else check_failures(max_failures)
        if failures is not None and return_exceptions:
            raise InvalidArgument(f"{call} got max_failures and return_exceptions. With the latter all may fail.")
        each = check_payloads(payloads, call)
        resolved = [
            self._resolve(*filled(child, payload, call, what := f"payloads[{number}]"), call, what)
            for number, payload in enumerate(each)
        ]
        texts = [invocable.stored_payload(args, kwargs) for invocable, args, kwargs, _ in resolved]
        task = resolved[0][0].name if resolved else self._resolve(child, None, call)[0].name
        payload_digest = digest(" ".join(digest(text) for text in texts))
        if step in self._memory:
            self._raise_if_refused(step)
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
            self._check_limits(children)
            check_own_keys(children, call)
            self._refuse_duplicates(step, children)
            children = [headers.collect(new, self._execution) for new in children]
            self._tag({key: value for new in children for key, value in new.tags.items()})
            fails_fast = not return_exceptions
            self._suspend(
                transitions.Map(step, task, children, payload_digest, seconds, late, parallel, fails_fast, failures),
            )
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()
        lets_pass = return_exceptions or failures is not None
        return self._map_outcome(remembered, return_exceptions=return_exceptions, lets_pass=lets_pass)

    def _map_outcome(self, remembered: steps.Memory, *, return_exceptions: bool, lets_pass: bool) -> list[Any]:
        is_decided_by_one = not return_exceptions and remembered.status != StepStatus.SUCCEEDED
        with self._beyond_the_body():
            if is_decided_by_one:
                outcomes: list[tuple[Any, ChildError | None]] = [(None, child_error(remembered))]
            else:
                outcomes = outcomes_of_map(remembered, self._journal.outcomes_of_map(remembered))
        first = next((error for _, error in outcomes if error is not None), None)
        if first is not None and (is_decided_by_one or not lets_pass):
            raise first
        return [value if error is None else error for value, error in outcomes]

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
            try:
                with self._beyond_the_body():
                    remembered = self._journal.start_child(wait)
            except DuplicateExecution as error:  # it was taken just now
                self._keep_in_mind(step, error)
                raise
            self._memory[remembered.name] = remembered
            self._replayed += 1
        self._lease_must_hold()
        return ChildHandle(remembered.name, remembered.child_id, self)

    def gather(self, *handles: Handle[Any], need: int | None = None, return_exceptions: bool = False) -> list[Any]:
        """Wait for started children, events and timers; return their results, in the order of ``handles``.

        The worker is released, and the body runs again once: when all have ended, or when the first of them has failed
        for good.

        Args:
            handles: What ``ctx.start``, ``ctx.event`` and ``ctx.timer`` returned in this run.
            need: So many results are enough: those that came first are returned, and which ones these are is
                remembered. The other children go on. It fails as soon as so many cannot be had any more.
            return_exceptions: Wait for all, and put ``ChildFailed``, ``ChildTimedOut`` or ``ChildCancelled`` in the
                place of a result that there is not, instead of raising.

        Raises:
            ChildFailed, ChildTimedOut, ChildCancelled: The outcome of the first child that has no result; with ``need``
                that of the one that made it impossible. The others go on; those that no worker had started are
                cancelled.
        """
        names = self._names_of(handles, "ctx.gather")
        if need is not None:
            if return_exceptions:
                raise InvalidArgument("ctx.gather() got need and return_exceptions. With need, failures are let pass.")
            need = check_need(need, len(names))
        step = gather_name(names, return_exceptions=return_exceptions, need=need)
        self._enter(step, "ctx.gather()", may_repeat=True)
        if not names:
            return []
        remembered = self._recall(step, StepKind.GATHER)
        if remembered is None and any(self._is_open(name) for name in names):
            let_pass = None if need is None else len(names) - need
            more = _members(handles)
            self._suspend(transitions.Gather(step, names, not return_exceptions, max_failures=let_pass, **more))
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
            elif need is not None:
                names = self._needed(names, need, remembered)
            those = {handle.step: handle for handle in handles}
            outcomes = {name: self._outcome_of(those[name]) for name in names}
        first = next((error for _, error in outcomes.values() if error is not None), None)
        if first is not None and not return_exceptions:
            raise first
        if need is not None:
            return [value for value, _ in outcomes.values()]
        return [value if error is None else error for value, error in (outcomes[handle.step] for handle in handles)]

    def _needed(self, names: list[str], need: int, remembered: steps.Memory | None) -> list[str]:
        """Return which steps have given the results that were enough; all if there are not so many."""
        if remembered is not None:
            counted = set(remembered.counted_names)
            return [name for name in names if name in counted]
        # All had ended before they were gathered, so each replay finds the same.
        succeeded = [name for name in names if self._memory[name].status == StepStatus.SUCCEEDED]
        return succeeded[:need] if len(succeeded) >= need else names

    def _names_of(self, handles: Sequence[object], call: str) -> list[str]:
        """Check handles; return the names of their steps, each once."""
        for handle in handles:
            if not isinstance(handle, Handle):
                raise InvalidArgumentType(
                    f"{call} takes the handles that ctx.start, ctx.event and ctx.timer return, got "
                    f"{type(handle).__name__}. A list of them is passed as {call}(*handles)."
                )
            if handle._context is not self:
                raise InvalidArgument(
                    f'The handle of step "{handle.step}" is of another run or execution. Make it in this run; '
                    "nothing is started twice."
                )
        return list(dict.fromkeys(cast(Handle[Any], handle).step for handle in handles))

    def event(self, step: str, event: str) -> EventHandle:
        """Return a handle of an event, to wait for it beside other things; nothing is recorded by this call.

        While a ``ctx.first``, ``ctx.as_completed`` or ``ctx.gather`` waits for it, it is taken when it is sent, or if
        it was sent before, as by ``ctx.wait_for``. If something else decides that wait, the event stays in the mailbox.

        Args:
            step: Name of the step that takes it, unique within this execution and stable across deployments.
            event: Name of the event.
        """
        step = step_name(step, "event")
        self._enter(step, f'ctx.event("{step}")')
        event = check_name(event, "event name")
        self._recall(step, StepKind.MESSAGE, task=event)
        return EventHandle(step, event, self)

    def timer(self, step: str, seconds: float | dt.timedelta) -> TimerHandle:
        """Start a timer that ends in ``seconds`` (or a ``timedelta``), and go on: to wait for it beside other things.

        Its time is counted from the first run that gets here, by the database's clock; replays never extend it.
        """
        step = step_name(step, "timer")
        call = f'ctx.timer("{step}")'
        self._enter(step, call)
        duration = check_duration(seconds, f"seconds of {call}")
        if self._recall(step, StepKind.TIMER) is None:
            self._give_way()
            with self._beyond_the_body():
                self._memory[step] = self._journal.start_timer(step, duration)
            self._replayed += 1
        self._lease_must_hold()
        return TimerHandle(step, self)

    def first(
        self,
        step: str,
        *members: Handle[R],
        until: Literal["decided", "succeeded"] = "decided",
        losers: Literal["abandon", "cancel"] = "abandon",
    ) -> tuple[Handle[R], R]:
        """Wait for the first of several children, events and timers; return its handle and its value.

        Which one was first is recorded in the transaction that decides it, and every replay takes it. If several are
        decided when this is called, the first argument wins. Others may be awaited later.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            members: 1 to 1,000 handles of this run.
            until: ``"decided"``: the first that ends, well or not. ``"succeeded"``: failures pass until all have
                failed.
            losers: ``"cancel"`` asks the other children to stop, ``"abandon"`` lets them go on. Losing events stay in
                the mailbox, losing timers go on.

        Returns:
            The winner's handle, as it was passed, and a child's result, an event's payload, or ``None`` of a timer.

        Raises:
            ChildFailed, ChildTimedOut, ChildCancelled: The winner's outcome.
            NoneSucceeded: With ``until="succeeded"``: all have failed.
        """
        step = step_name(step, "first")
        call = f'ctx.first("{step}")'
        names = self._names_of(members, "ctx.first")
        check_members(members, names, call)
        if until not in ("decided", "succeeded"):
            raise InvalidArgument(f'until must be "decided" or "succeeded", got {shown(until)}.')
        if losers not in list(OnTimeout):
            raise InvalidArgument(f'losers must be "cancel" or "abandon", got {shown(losers)}.')
        self._enter(step, call)
        remembered = self._recall(step, StepKind.FIRST)
        if remembered is None:
            passes = until == "succeeded"
            self._suspend(
                transitions.First(
                    step,
                    names,
                    fails_fast=passes,
                    max_failures=len(names) - 1 if passes else None,
                    losers=OnTimeout(losers),
                    **_members(members),
                )
            )
        if remembered.is_pending:
            self._replayed -= 1
            self._suspend(transitions.Pending(step))
        self._lease_must_hold()
        if losers == "cancel" and any(
            isinstance(handle, ChildHandle) and self._is_open(handle.step) for handle in members
        ):
            with self._beyond_the_body():
                self._journal.cancel_losers(step)
        return self._first(remembered, members)

    def _first(self, remembered: steps.Memory, members: Sequence[Handle[R]]) -> tuple[Handle[R], R]:
        if not remembered.counted_names:
            with self._beyond_the_body():
                errors = [self._outcome_of(handle)[1] for handle in members]
            failed = tuple(error for error in errors if error is not None)
            told = "; ".join(f"{error.step}: {error}" for error in failed[:_SHOWN_ERRORS])
            raise NoneSucceeded(
                f"None of {len(members)} has succeeded (step '{remembered.name}'): {told}",
                step=remembered.name,
                errors=failed,
            )
        winner = next((handle for handle in members if handle.step == remembered.counted_names[0]), None)
        if winner is None:
            raise StepMismatch(
                f'Step "{remembered.name}" recorded that "{remembered.counted_names[0]}" was the first, and the code '
                "now does not wait for that. Give the new call its own step name."
            )
        with self._beyond_the_body():
            value, error = self._outcome_of(winner)
        if error is not None:
            raise error
        return winner, value

    def as_completed(self, step: str, *handles: H) -> Iterator[H]:
        """Yield handles of children, events and timers one after another, in the order in which they are decided.

        That order is recorded, and the same on every replay. Between two of them the body may do anything. Of those
        that were decided when it comes to wait, all come without another wait. ``handle.result()`` then returns the
        result, or raises the error.

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            handles: At most 1,000 handles of this run.
        """
        step = step_name(step, "as_completed")
        call = f'ctx.as_completed("{step}")'
        names = self._names_of(handles, "ctx.as_completed")
        if handles:
            check_members(handles, names, call)
        self._enter(step, call)
        return self._completed(step, call, {handle.step: handle for handle in handles})

    def _completed(self, step: str, call: str, left: dict[str, H]) -> Iterator[H]:
        number = 0
        while left:
            number += 1
            name = batch_name(step, number)
            if number > 1:
                self._enter(name, call)
            remembered = self._recall(name, StepKind.AS_COMPLETED)
            if remembered is None:
                self._suspend(transitions.AsCompleted(name, list(left), fails_fast=False, **_members(left.values())))
            if remembered.is_pending:
                self._replayed -= 1
                self._suspend(transitions.Pending(name))
            self._lease_must_hold()
            for each in remembered.counted_names:
                if each in left:
                    yield left.pop(each)

    def _is_open(self, step: str) -> bool:
        """Whether the step of a handle is undecided; that of an event is there once something waits for it."""
        remembered = self._memory.get(step)
        return remembered is None or remembered.is_pending

    def _outcome_of(self, handle: Handle[Any]) -> tuple[Any, ChildError | None]:
        if isinstance(handle, TimerHandle):
            return None, None
        return outcome_of(self._memory[handle.step])

    def _result_of(self, handle: Handle[Any]) -> Any:
        """Wait for one handle; for its ``result``."""
        return self.gather(handle)[0]

    def _peek(self, handle: Handle[Any]) -> bool:
        """Tell whether the step of a handle is decided; for its ``peek``.

        Only that it is not, is recorded. That it is, each replay finds again.
        """
        (step,) = self._names_of([handle], "handle.peek")
        self._peeks[step] = number = self._peeks.get(step, 0) + 1
        name = peek_name(step, number)
        self._enter(name, "handle.peek()")
        if name in self._memory:
            self._recall(name, StepKind.STEP)
            return False
        if not self._is_open(step):
            return True
        self._recall(name, StepKind.STEP)
        self._give_way()
        event = handle.event if isinstance(handle, EventHandle) else None
        with self._beyond_the_body():
            found = self._journal.look(step, name, event)
            if found is None and event is None:
                raise self._memory[step].lost("row")
            if found is not None and not found.is_pending:
                self._replayed += step not in self._memory
                self._memory[step] = found
                return True
            self._memory[name] = self._journal.record(name, result="false")
        self._replayed += 1
        return False

    # --------------------------------------------------------------------------------------------------------- steps

    @overload
    def step(self, step: str, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def step(self, step: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Run ``fn(*args, **kwargs)`` once and remember its result.

        ``fn`` runs at least once: if the worker dies after its effect and before the result is stored, it runs again.
        An exception of ``fn`` is raised as it is; if the body catches it and goes on to another ``ctx`` call, it is
        remembered too, so that a replay takes the same branch. (``SystemExit`` and ``KeyboardInterrupt`` are not.)

        Args:
            step: Name of the step, unique within this execution and stable across deployments.
            fn: Any callable; a coroutine function is run in an event loop of its own. It must not call ``ctx``.

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
            return value
        with self._nested(call), logs.in_step(step), observing.stepping(self._execution, step):
            try:
                result = finished(fn(*args, **kwargs), call)
            except BaseException as error:
                interrupted.close_raised_in(error)
                self._keep_in_mind(step, error)
                raise
        self._must_be_in_its_process(call)
        self._must_be_closed(self._watch.added(), call)
        text, value = _encode_result(result, call)
        with self._beyond_the_body():
            memory = self._journal.record(step, result=text)
        self._checked_at = time.monotonic()
        self._memory[step] = memory
        self._replayed += 1
        return value if memory.result == text else memory.get_result()

    @overload
    def atomic_step(
        self, step: str, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    @overload
    def atomic_step(self, step: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def atomic_step(self, step: str, fn: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Any:
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
            return value
        with self._nested(call), logs.in_step(step), observing.stepping(self._execution, step):
            try:
                with self._beyond_the_body():
                    done = self._journal.record_together(
                        step,
                        lambda: self._closing(lambda: _encode_result(finished(fn(*args, **kwargs), call), call), call),
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
        return done.value

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
            self._journal.begin(step)
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

    # ----------------------------------------------------------------------------------------------------------- tags

    def tag(self, key: str, value: str) -> None:
        """Tag the tree of this execution, for people to find it by; the last value of a key counts.

        No step is recorded: each run that gets here says it again.

        Args:
            key: At most 64 characters, none of them ``:`` or ``=``.
            value: At most 128 characters.

        Raises:
            InvalidArgument, InvalidArgumentType: The key or the value cannot be stored.
            TooManyTags: The tree has 10 other tags.
        """
        self._usable("ctx.tag()")
        tags = check_tags({key: value})
        self.flush()
        self._lease_must_hold()
        self._tag(tags)

    def _tag(self, tags: Mapping[str, str]) -> None:
        if tags:
            with observing.tagging(self._execution, tags), self._beyond_the_body():
                self._journal.tag(tags)

    # ---------------------------------------------------------------------------------------------- what a body tells

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Tell how far the body is, for whoever watches: ``api.state``, the admin, ``AsyncResult.info``.

        No step is recorded, and nothing waits for it. It is stored at most once a second, and at the end of the run;
        what a replay tells again is not. It may be called in the function of a ``ctx.step``, too.

        Args:
            done: From 0; it may be more than ``total``, if that was an estimate.
            total: How many there are; ``None`` if nobody knows.
            note: What is being done, in a few words.

        Raises:
            InvalidArgument, InvalidArgumentType, NotSerializable: It cannot be stored.
            PayloadTooLarge: The note and all that is published have more than 16 KiB.
            LeaseLost: Another run has taken over.
        """
        self._tell("ctx.progress()", lambda again: self._teller.progress(done, total, note, is_replay=again))

    def publish(self, key: str, value: object) -> None:
        """Tell a value, for whoever watches: ``api.state``, the admin, ``AsyncResult.info``; the last one counts.

        It is stored as ``ctx.progress`` is.

        Args:
            key: 1–128 ASCII letters, digits and ``_ . : -``.
            value: JSON, with the same types as a payload.

        Raises:
            InvalidArgument, InvalidArgumentType, NotSerializable: It cannot be stored.
            PayloadTooLarge: All that is published and the note have more than 16 KiB.
            LeaseLost: Another run has taken over.
        """
        name = check_name(key, "key of ctx.publish()")
        self._tell("ctx.publish()", lambda again: self._teller.publish(name, value, is_replay=again))

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
        self._pass_on()
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


#: So many failures are told by the error of a ``ctx.first``.
_SHOWN_ERRORS = 5


def _members(handles: Iterable[Handle[Any]]) -> dict[str, Any]:
    """Return what a wait has to know of its members that are no children."""
    given = list(handles)
    return {
        "events": {handle.step: handle.event for handle in given if isinstance(handle, EventHandle)},
        "has_timers": any(isinstance(handle, TimerHandle) for handle in given),
    }


def _encode_result(result: object, call: str) -> tuple[str, Any]:
    return round_trip(result, f"result of {call}", conductor_settings().MAX_RESULT_BYTES)
