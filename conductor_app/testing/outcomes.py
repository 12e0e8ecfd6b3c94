"""What a test says of children and steps, and what a body that runs alone makes of it."""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from celery import Task

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildTimedOut,
    EventTimedOut,
    Failure,
    InvalidArgument,
    InvalidArgumentType,
)
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.tasks.task import DurableTask
from conductor_app.transitions import (
    AsCompleted,
    AwaitEvent,
    First,
    Gather,
    Invocation,
    Map,
    MembersWait,
    NewExecution,
    Wait,
)
from conductor_app.transitions.steps import ChildOutcome, Memory
from conductor_app.values.failures import describe, dump_failure
from conductor_app.values.payloads import dumps, loads, round_trip
from conductor_app.values.state import Told
from conductor_app.values.tags import check_number
from conductor_app.values.texts import shown

P = ParamSpec("P")
R = TypeVar("R")

#: How a child that ended so is stored; a late one is cancelled.
_EXECUTION_STATUS = {
    StepStatus.SUCCEEDED: ExecutionStatus.SUCCEEDED,
    StepStatus.FAILED: ExecutionStatus.FAILED,
    StepStatus.CANCELLED: ExecutionStatus.CANCELLED,
    StepStatus.TIMED_OUT: ExecutionStatus.CANCELLED,
}
_FAILED_PREFIX = "Child execution failed: "


class BodyError(AssertionError):
    """What ``run`` says of a body that would go wrong in production, or of an outcome that the test does not give."""


@dataclass(frozen=True)
class StepCall:
    """One thing that a body has done; for ``run(..., calls=[])``."""

    step: str
    kind: StepKind
    #: The child's task.
    task: str = ""
    #: Positional arguments: of the child, of the step's function; of a sleep its seconds, or its instant; of a wait the
    #: event's name.
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def payload(self) -> Any:
        """The arguments in the form in which ``ctx.invoke`` takes them."""
        if self.args and not self.kwargs:
            return self.args[0] if len(self.args) == 1 else list(self.args)
        return self.kwargs


def remember(step: str, kind: StepKind, status: StepStatus, **values: Any) -> Memory:
    """Return what is remembered of a step."""
    empty = {
        "task": "",
        "payload_digest": "",
        "child_id": None,
        "timeout_seconds": None,
        "result": None,
        "error": None,
        "fence": 0,
        "total": None,
    }
    return Memory(name=step, kind=kind, status=status, **{**empty, **values})


class Outcomes:
    """What the test says of children and steps, and what the body has asked for."""

    def __init__(
        self,
        children: Mapping[Any, object],
        steps: Mapping[str, object],
        events: Mapping[str, object],
        calls: list[StepCall],
        run_body: Callable[[DurableTask[..., Any], list[Any], Mapping[str, Any], Outcomes], Any],
    ) -> None:
        self._children = {
            (name := _key(key)): _checked(outcome, f'children["{name}"]') for key, outcome in children.items()
        }
        self._steps = {step: _checked(outcome, f'steps["{step}"]') for step, outcome in steps.items()}
        self._events = {name: _checked(outcome, f'events["{name}"]') for name, outcome in events.items()}
        self._calls = calls
        self._run_body = run_body
        self._started: dict[str, Invocation] = {}
        #: The seconds of each timer.
        self._timers: dict[str, float] = {}
        #: How the children of each map ended.
        self.maps: dict[str, list[ChildOutcome]] = {}
        #: Those of the tree; the bodies of children share them.
        self.tags: dict[str, str] = {}
        #: What ``ctx.deadline`` says.
        self.deadline: dt.datetime | None = None
        #: What the body has told, and what the test sees of that.
        self.told: Told | None = None
        self.state: dict[str, Any] = {}

    def for_another_body(self) -> Outcomes:
        """Return the same for the body of a child, whose steps may have the same names."""
        other = copy.copy(self)
        other._started, other._timers, other.maps = {}, {}, {}
        other.told, other.state = None, {}
        return other

    def function(self, step: str, fn: Callable[P, R]) -> Callable[P, R]:
        """Return what is to run in the place of a step's function."""
        if not callable(fn):
            return fn

        def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
            self._calls.append(StepCall(step, StepKind.STEP, args=args, kwargs=dict(kwargs)))
            if step not in self._steps:
                return fn(*args, **kwargs)
            return self._produce(self._steps[step], args, kwargs)  # type: ignore[no-any-return]

        return recorded

    def tag(self, tags: Mapping[str, str]) -> None:
        """Do what is done to the tags of a tree in production."""
        check_number({**self.tags, **tags}, "these tags")
        self.tags.update(tags)

    def tell(self, told: Told) -> None:
        """Keep what the body has told, and show it to the test."""
        self.told = told
        self.state.update(done=told.done, total=told.total, note=told.note, published=dict(told.published))

    def start(self, wait: Invocation) -> Memory:
        """Return what is remembered of a started child: its outcome is asked for when it is gathered."""
        self._note(wait.step, StepKind.START, wait.child)
        self._started[wait.step] = wait
        return remember(
            wait.step,
            StepKind.START,
            StepStatus.PENDING,
            task=wait.child.task,
            payload_digest=wait.payload_digest,
            child_id=wait.child.id,
            timeout_seconds=wait.timeout,
        )

    def start_timer(self, step: str, seconds: float) -> Memory:
        """Return what is remembered of a timer, which ends when something waits for it and nothing else is there."""
        self._calls.append(StepCall(step, StepKind.TIMER, args=(seconds,)))
        self._timers[step] = seconds
        return remember(step, StepKind.TIMER, StepStatus.PENDING if seconds else StepStatus.SUCCEEDED)

    def look(self, step: str, name: str, event: str | None) -> Memory | None:
        """Return what a look at a handle sees.

        A child has ended, an event is there that the test sends, and a timer goes on, unless the test says otherwise of
        that look.
        """
        says = self._produce(self._steps[name], (), {}) if name in self._steps else None
        if says is False or (says is None and step in self._timers):
            return None if event is not None else remember(step, StepKind.START, StepStatus.PENDING)
        if step in self._timers:
            return remember(step, StepKind.TIMER, StepStatus.SUCCEEDED)
        if event is not None:
            return self._message(step, event)
        return self._settle_child(self._started[step], StepKind.START)

    def _message(self, step: str, event: str) -> Memory | None:
        """Return what is remembered of an event that is awaited beside other things; ``None`` if it is not sent."""
        key = next((key for key in (step, event) if key in self._events), None)
        if key is None or isinstance(self._events[key], EventTimedOut):
            return None
        payload = self._produce(self._events[key], (), {})
        text, _ = round_trip(payload, f'events["{key}"]', conductor_settings().MAX_PAYLOAD_BYTES)
        return remember(step, StepKind.MESSAGE, StepStatus.SUCCEEDED, task=event, result=text)

    def _decide_member(self, wait: MembersWait, name: str, memory: dict[str, Memory], *, must: bool) -> bool:
        """Put the outcome of a member into the body's memory, as far as the test gives one; tell whether it did.

        Args:
            must: Whether the wait is for all of them, so that there has to be one.
        """
        if name in memory and not memory[name].is_pending:
            return True
        if name in wait.events:
            message = self._message(name, wait.events[name])
            if message is not None:
                memory[name] = message
            elif must:
                raise BodyError(
                    f'The body waits for the event "{wait.events[name]}" in step "{name}", and the test does not send '
                    f'it. Add events={{"{wait.events[name]}": …}} to run(): its payload.'
                )
            return message is not None
        if name in self._timers:
            if must:
                memory[name] = remember(name, StepKind.TIMER, StepStatus.SUCCEEDED)
            return must
        child = self._started[name]
        if must or name in self._children or child.child.task in self._children:
            memory[name] = self._settle_child(child, StepKind.START)
            return True
        return False

    def _settle_first(self, wait: First, memory: dict[str, Memory]) -> Memory:
        """Let the first argument win of those whose outcomes the test gives, or the one that ``steps=`` names."""
        order = list(wait.members)
        if wait.step in self._steps:
            order = [self._chosen(wait, self._produce(self._steps[wait.step], (), {}))]
        # Timers take as long as they say: nothing else is there when one ends.
        timers = sorted((name for name in order if name in self._timers), key=lambda name: self._timers[name])
        is_named = len(order) < len(wait.members)
        passes = wait.max_failures is not None
        for name in [*(name for name in order if name not in self._timers), *timers]:
            if not self._decide_member(wait, name, memory, must=is_named or name in self._timers):
                continue
            if not passes or memory[name].status == StepStatus.SUCCEEDED:
                return remember(wait.step, StepKind.FIRST, memory[name].status, counted=f"{name},")
        if passes and all(name in memory and not memory[name].is_pending for name in wait.members):
            return remember(wait.step, StepKind.FIRST, StepStatus.FAILED, counted="")
        raise BodyError(
            f'The body waits for the first of {", ".join(wait.members)} in step "{wait.step}", and the test gives no '
            "outcome of any that decides it. Add children= or events= to run()."
        )

    def _chosen(self, wait: MembersWait, name: Any) -> str:
        if name not in wait.members:
            raise BodyError(f'steps["{wait.step}"] is {shown(name)}, which the body does not wait for there.')
        return str(name)

    def _settle_completed(self, wait: AsCompleted, memory: dict[str, Memory]) -> Memory:
        """Let them end in the order of the arguments, or in the one that ``steps=`` gives."""
        order = list(wait.members)
        if wait.step in self._steps:
            given = self._produce(self._steps[wait.step], (), {})
            order = sorted(order, key=list(given).index) if set(order) <= set(given) else order
        for name in order:
            self._decide_member(wait, name, memory, must=True)
        return remember(wait.step, StepKind.AS_COMPLETED, StepStatus.SUCCEEDED, counted=",".join([*order, ""]))

    def settle(self, wait: Wait, memory: dict[str, Memory]) -> None:
        """Put the outcome of what the body waits for into its memory."""
        if isinstance(wait, Invocation):
            self._note(wait.step, StepKind.INVOKE, wait.child)
            memory[wait.step] = self._settle_child(wait, StepKind.INVOKE)
        elif isinstance(wait, Map):
            memory[wait.step] = self._settle_map(wait)
        elif isinstance(wait, Gather):
            self._calls.append(StepCall(wait.step, StepKind.GATHER, args=tuple(wait.members)))
            for name in wait.members:
                self._decide_member(wait, name, memory, must=True)
            memory[wait.step] = _gathered(wait, [memory[name] for name in wait.members])
        elif isinstance(wait, First):
            self._calls.append(StepCall(wait.step, StepKind.FIRST, args=tuple(wait.members)))
            memory[wait.step] = self._settle_first(wait, memory)
        elif isinstance(wait, AsCompleted):
            self._calls.append(StepCall(wait.step, StepKind.AS_COMPLETED, args=tuple(wait.members)))
            memory[wait.step] = self._settle_completed(wait, memory)
        elif isinstance(wait, AwaitEvent):
            self._calls.append(StepCall(wait.step, StepKind.EVENT, args=(wait.event,)))
            memory[wait.step] = self._settle_event(wait)
        else:
            self._calls.append(StepCall(wait.step, wait.kind, args=wait.arguments))
            memory[wait.step] = self._settle_other(wait)

    def _settle_child(self, wait: Invocation, kind: StepKind) -> Memory:
        key, outcome = self._find(wait.step, wait.child.task)
        status, result, error = self._end_of(wait.child, outcome, f'children["{key}"]', wait)
        return remember(
            wait.step,
            kind,
            status,
            task=wait.child.task,
            payload_digest=wait.payload_digest,
            child_id=wait.child.id,
            timeout_seconds=wait.timeout,
            result=result,
            error=error,
        )

    def _settle_map(self, wait: Map) -> Memory:
        ends: list[tuple[StepStatus, str | None, str | None]] = []
        if wait.children:
            key, outcome = self._find(wait.step, wait.task)
            outcomes = outcome if isinstance(outcome, list) else [outcome] * len(wait.children)
            if len(outcomes) != len(wait.children):
                raise BodyError(
                    f'children["{key}"] has {len(outcomes)} outcomes, and ctx.map("{wait.step}") has '
                    f"{len(wait.children)} children. Give a list with one for each, or one function for all."
                )
            for number, (child, each) in enumerate(zip(wait.children, outcomes, strict=True)):
                self._note(wait.step, StepKind.MAP, child)
                ends.append(
                    self._end_of(child, _checked(each, f'children["{key}"][{number}]'), f'children["{key}"]', wait)
                )
        self.maps[wait.step] = [
            ChildOutcome(child.id, number, _EXECUTION_STATUS[status], result, error)
            for number, (child, (status, result, error)) in enumerate(zip(wait.children, ends, strict=True))
        ]
        late = [number for number, end in enumerate(ends) if end[0] == StepStatus.TIMED_OUT]
        # A failure comes before the end of the time.
        failed = [number for number, end in enumerate(ends) if end[0] in (StepStatus.FAILED, StepStatus.CANCELLED)]
        status, error, child_id = StepStatus.SUCCEEDED, None, None
        let_pass = wait.max_failures or 0
        if len(failed) > let_pass and wait.fails_fast:
            status, _, error = ends[failed[let_pass]]
            child_id = wait.children[failed[let_pass]].id
        elif late:
            status = StepStatus.TIMED_OUT
        return remember(
            wait.step,
            StepKind.MAP,
            status,
            task=wait.task,
            payload_digest=wait.payload_digest,
            child_id=child_id,
            timeout_seconds=wait.timeout,
            result=dumps(late, "positions") if status == StepStatus.TIMED_OUT else None,
            error=error,
            total=len(wait.children),
        )

    def _settle_event(self, wait: AwaitEvent) -> Memory:
        key = next((key for key in (wait.step, wait.event) if key in self._events), None)
        if key is None:
            raise BodyError(
                f'The body waits for the event "{wait.event}" in step "{wait.step}", and the test does not send it. '
                f'Add events={{"{wait.event}": …}} to run(): its payload, or EventTimedOut.'
            )
        try:
            payload = self._produce(self._events[key], (), {})
        except EventTimedOut:
            if wait.timeout is None:
                raise InvalidArgument(
                    f'The event of step "{wait.step}" cannot time out: the body waits for it without timeout=.'
                ) from None
            return remember(
                wait.step, StepKind.EVENT, StepStatus.TIMED_OUT, task=wait.event, timeout_seconds=wait.timeout
            )
        text, _ = round_trip(payload, f'events["{key}"]', conductor_settings().MAX_PAYLOAD_BYTES)
        return remember(wait.step, StepKind.EVENT, StepStatus.SUCCEEDED, task=wait.event, result=text)

    def _settle_other(self, wait: Wait) -> Memory:
        """Let a wait of any other kind end well, at once, with the result that the test gives for its step, if any."""
        text: str | None = None
        if wait.step in self._steps:
            value = self._produce(self._steps[wait.step], (), {})
            text, _ = round_trip(value, f'steps["{wait.step}"]', conductor_settings().MAX_RESULT_BYTES)
        return remember(wait.step, wait.kind, StepStatus.SUCCEEDED, task=wait.named, result=text)

    def _end_of(
        self, child: NewExecution, outcome: object, where: str, wait: Invocation | Map
    ) -> tuple[StepStatus, str | None, str | None]:
        """Return how a child ends: its status, and its result or error as stored text."""
        args, kwargs = loads(child.payload)
        try:
            value = self._produce(outcome, args, kwargs)
        except BodyError:
            raise
        except Exception as error:
            if isinstance(error, AssertionError) and error is not outcome:
                raise  # what a stand-in of the test's asserts is no outcome
            status, text = _failure(error, wait)
            return status, None, text
        result, _ = round_trip(value, f"result of {where}", conductor_settings().MAX_RESULT_BYTES)
        return StepStatus.SUCCEEDED, result, None

    def _note(self, step: str, kind: StepKind, child: NewExecution) -> None:
        args, kwargs = loads(child.payload)
        self._calls.append(StepCall(step, kind, child.task, tuple(args), kwargs))

    def _find(self, step: str, task: str) -> tuple[str, object]:
        for key in (step, task):
            if key in self._children:
                return key, self._children[key]
        given = f" Given: {', '.join(sorted(self._children))}." if self._children else ""
        raise BodyError(
            f'The body invokes {task} as step "{step}", and the test does not say what becomes of it. '
            f'Add children={{"{step}": …}} to run(): a result, an exception, or a function that takes the '
            f"payload's arguments.{given}"
        )

    def _produce(self, outcome: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return the result that an outcome stands for, or raise its exception."""
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, DurableTask):
            return self._run_body(outcome, list(args), kwargs, self.for_another_body())
        return outcome(*args, **kwargs) if callable(outcome) else outcome


def _gathered(wait: Gather, members: list[Memory]) -> Memory:
    failed = [member for member in members if member.status != StepStatus.SUCCEEDED]
    let_pass = wait.max_failures or 0
    if len(failed) > let_pass and wait.fails_fast:
        cause = failed[let_pass]
        return remember(wait.step, StepKind.GATHER, cause.status, child_id=cause.child_id, total=len(members))
    counted = None
    if wait.counts_some:
        succeeded = [member.name for member in members if member.status == StepStatus.SUCCEEDED]
        counted = "".join(f"{name}," for name in succeeded[: len(members) - let_pass])
    return remember(wait.step, StepKind.GATHER, StepStatus.SUCCEEDED, counted=counted, total=len(members))


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, Task):
        return str(key.name)
    raise InvalidArgumentType(f"a key of children must be a step's name, a task or its name, got {shown(key)}.")


def _checked(outcome: object, where: str) -> object:
    """Return an outcome, with an instance in the place of an exception class."""
    is_class = isinstance(outcome, type) and issubclass(outcome, BaseException)
    cls: type = outcome if is_class else type(outcome)  # type: ignore[assignment]
    if issubclass(cls, BaseException) and not issubclass(cls, Exception):
        raise InvalidArgumentType(f"{where} is {cls.__name__}, and no child or step ends with that.")
    if not is_class:
        return outcome
    try:
        return cls("") if issubclass(cls, (ChildError, EventTimedOut)) else cls()
    except TypeError:
        raise InvalidArgumentType(
            f"{where} is the exception class {cls.__name__}, which cannot be made without arguments. Give an instance."
        ) from None


def _failure(error: Exception, wait: Invocation | Map) -> tuple[StepStatus, str | None]:
    """Return how a child that ended with ``error`` is remembered by its parent."""
    if isinstance(error, ChildTimedOut):
        if wait.timeout is None:
            raise InvalidArgument(
                f'The child of step "{wait.step}" cannot time out: the body invokes it without timeout=.'
            )
        return StepStatus.TIMED_OUT, None
    text = str(error)
    if isinstance(error, ChildCancelled):
        message = f"Cancelled: {text}" if text else "Cancelled"
        return StepStatus.CANCELLED, dump_failure(Failure(type="Cancelled", message=message))
    failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
    if isinstance(error, ChildFailed):
        # The error as the parent sees it: the child's message with the words in front, or without.
        failure = Failure(type=error.error_class or failure.type, message=text.removeprefix(_FAILED_PREFIX) or "failed")
    return StepStatus.FAILED, dump_failure(failure)
