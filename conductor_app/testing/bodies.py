"""Run one durable body alone: no database, no broker, no worker, no threads.

The body gets a real ``ExecutionContext`` that keeps in memory what production keeps in the database. Each call that
waits ends the run, as in production; its outcome comes from the test, and the body runs again from the top.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from django.db import connections, transaction

from conductor_app.body import apart, scopes
from conductor_app.body.children import resolve_child
from conductor_app.body.context import ExecutionContext
from conductor_app.body.misuse import unclean
from conductor_app.body.run import SWALLOWED_ADVICE, swallowed_suspension
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    EndAttempt,
    Failure,
    InvalidArgument,
    InvalidArgumentType,
    SuspendExecution,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.tasks.task import DurableTask
from conductor_app.testing.outcomes import BodyError, Outcomes, StepCall, remember
from conductor_app.transitions import Invocation, NewExecution, Together
from conductor_app.transitions.leases import Lease
from conductor_app.transitions.steps import ChildOutcome, Memory
from conductor_app.values.arguments import check_instant
from conductor_app.values.failures import dump_failure
from conductor_app.values.limits import Limit
from conductor_app.values.payloads import dump_options, loads, round_trip
from conductor_app.values.state import Told
from conductor_app.values.texts import shown

P = ParamSpec("P")
R = TypeVar("R")


def run(
    task: DurableTask[..., R] | str,
    payload: object = None,
    children: Mapping[Any, object] | None = None,
    *,
    steps: Mapping[str, object] | None = None,
    events: Mapping[str, object] | None = None,
    attempt: int = 1,
    scheduled_at: dt.datetime | None = None,
    deadline: dt.datetime | None = None,
    calls: list[StepCall] | None = None,
    tags: dict[str, str] | None = None,
    state: dict[str, Any] | None = None,
) -> R:
    """Run one durable body alone, and return its result or raise its error.

    Each ``ctx.invoke`` ends the run, as in production; the child's outcome is taken from ``children``, and the body
    runs again from the top. So a body that swallows the suspension, that takes other steps when it runs again, that
    uses a step's name twice, or that passes what JSON cannot hold, is noticed here. ``ctx.step`` and
    ``ctx.atomic_step`` run their functions once and remember the result; sleeps take no time. There is one attempt: an
    error is raised as it is, a ``RetryExecution`` too.

    ``ctx.map`` and ``ctx.start`` with ``ctx.gather`` work alike.

    An outcome is a result, an exception (an instance or a class; ``ChildTimedOut`` and ``ChildCancelled`` are the child
    timed out or cancelled), or a function, which is called with the payload's arguments and returns or raises. A
    durable task as the outcome of a child runs that task's body, with the same outcomes. Of a ``ctx.map``, a list has
    one outcome per child, and anything else is that of each child.

    Args:
        task: The durable task, or its name.
        payload: A mapping, the keyword arguments; anything else but ``None`` is the only argument.
        children: Outcomes of children, by the step's name, the task or the task's name; the step's name goes first.
        steps: Outcomes to take in the place of the functions of ``ctx.step`` and ``ctx.atomic_step``, by the step's
            name.
        events: Payloads of the events that the body waits for, by the step's name or the event's; ``EventTimedOut`` if
            it does not come in time.
        attempt: What ``ctx.attempt`` says, counted from 1.
        scheduled_at: What ``ctx.scheduled_at`` says.
        deadline: What ``ctx.deadline`` says; nothing is cancelled.
        calls: A list that gets a ``StepCall`` for each thing that the body does, in order.
        tags: A dict that gets the tags of the tree, beside those that it has already.
        state: A dict that gets what the body tells: ``done``, ``total`` and ``note`` of its last ``ctx.progress``, and
            ``published``, what it published by key.

    Returns:
        The body's result, after a JSON round trip.

    Raises:
        BodyError: The body would go wrong in production, or the test does not give an outcome.
        UncleanConnection: The body has left a transaction open, or a session that cannot write.
        Exception: What the body raises, and what is wrong with the arguments.
    """
    body, args, kwargs, _options = resolve_child(task, payload, "run()")
    if not isinstance(body, DurableTask):
        raise InvalidArgumentType(f"run() runs the body of a durable task; {body.name} is none.")
    if isinstance(attempt, bool) or not isinstance(attempt, int) or attempt < 1:
        raise InvalidArgument(f"attempt must be an int from 1 on, got {shown(attempt)}.")
    outcomes = Outcomes(children or {}, steps or {}, events or {}, [] if calls is None else calls, _run)
    outcomes.tags = {} if tags is None else tags
    outcomes.deadline = None if deadline is None else check_instant(deadline, "deadline of run()")
    outcomes.state = {} if state is None else state
    options = {} if scheduled_at is None else {"scheduled_at": check_instant(scheduled_at, "scheduled_at of run()")}
    result: R = _run(body, args, kwargs, outcomes, attempt, options)
    return result


def _run(
    task: DurableTask[..., Any],
    args: list[Any],
    kwargs: Mapping[str, Any],
    outcomes: Outcomes,
    attempt: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    new = task.new_execution(args, kwargs, {}, what=f"payload of {task.name}")
    execution = Execution(
        id=new.id,
        root_id=new.id,
        task=task.name,
        queue=new.queue,
        payload=new.payload,
        status=ExecutionStatus.RUNNING,
        attempt=attempt,
        max_attempts=new.max_attempts,
        options=dump_options(options),
    )
    outcomes.tag(new.tags)
    memory: dict[str, Memory] = {}
    before: list[str] = []
    while True:
        execution.fence += 1
        context = _MemoryContext(execution, memory, outcomes, task)
        ended, value, error = _run_once(context, execution)
        _check_replay(task.name, before, context.reached, error)
        before = context.reached
        if context.suspension is None:
            if error is not None:
                raise error
            return round_trip(value, f"result of {task.name}", conductor_settings().MAX_RESULT_BYTES)[1]
        if ended:
            how = "returned" if error is None else f"raised {type(error).__name__}"
            raise BodyError(f"{swallowed_suspension(context, task.name, how)}. {SWALLOWED_ADVICE}") from error
        wait, _place = context.suspension
        outcomes.settle(wait, memory)


def _run_once(context: _MemoryContext, execution: Execution) -> tuple[bool, Any, Exception | None]:
    """Run the body once; tell whether it came to an end of its own, and to which."""
    value, failed, is_suspended = None, None, False
    try:
        with context.entered():
            args, kwargs = context.body.body_arguments(*loads(execution.payload))
            value = apart.run(scopes.call_body, context.body, context, args, kwargs)
    except SuspendExecution:
        is_suspended = True
    except EndAttempt as ended:
        failed = ended.error
    except Exception as error:  # noqa: BLE001 - the body may raise anything
        failed = error
    context._tell_last()
    if (found := context._left_open(failed)) and failed is None:
        raise unclean(execution.task, found)
    return not is_suspended, value, failed


def _check_replay(task: str, before: list[str], now: list[str], error: Exception | None) -> None:
    """Compare the steps of two runs: the later one has to come to all of the earlier one's, in their order."""
    for number, step in enumerate(before):
        if number < len(now) and now[number] == step:
            continue
        came_to = f'came to "{now[number]}"' if number < len(now) else "ended"
        raise BodyError(
            f'{task} is not deterministic: it {came_to} where its run before had come to step "{step}". A body runs '
            "again from the top whenever it has waited, and has to take the same steps. Put what may differ from run "
            "to run (the time, random numbers, queries) into ctx.step()."
        ) from error


class _MemoryJournal:
    """A journal that is kept in memory, and starts no children: the test gives their outcomes."""

    def __init__(self, execution: Execution, outcomes: Outcomes) -> None:
        self._execution = execution
        self._outcomes = outcomes

    @property
    def is_strict(self) -> bool:
        return True

    def check_held(self) -> None:
        pass

    def begin(self, step: str) -> None:
        pass

    def record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> Memory:
        status = StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED
        error = None if failure is None else dump_failure(failure)
        return remember(step, StepKind.STEP, status, result=result, error=error, fence=self._execution.fence)

    def record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> Together:
        # A transaction only where one is open already, as in a TestCase: there is no telling what else has a database.
        using = database()
        is_open = connections[using].in_atomic_block
        try:
            with transaction.atomic(using=using) if is_open else contextlib.nullcontext():
                text, value = work()
        except Exception as error:  # noqa: BLE001 - the function may raise anything
            return Together(error=error)
        return Together(self.record(step, result=text), value)

    def start_child(self, wait: Invocation) -> Memory:
        return self._outcomes.start(wait)

    def start_timer(self, step: str, seconds: float) -> Memory:
        return self._outcomes.start_timer(step, seconds)

    def look(self, step: str, name: str, event: str | None = None) -> Memory | None:
        return self._outcomes.look(step, name, event)

    def cancel_losers(self, step: str) -> None:
        """Those of a test do not run."""

    def find_deadlock(self, wanted: Sequence[tuple[Limit, str]]) -> None:
        """One body alone waits for nobody."""

    def duplicate_of(self, children: Sequence[NewExecution]) -> None:
        return None

    def deadline(self) -> dt.datetime | None:
        """Return what the test says."""
        return self._outcomes.deadline

    def tag(self, tags: Mapping[str, str]) -> None:
        self._outcomes.tag(tags)

    def told(self) -> Told | None:
        return self._outcomes.told

    def tell(self, told: Told, *, is_new: bool, waits: bool) -> bool:
        del is_new, waits
        self._outcomes.tell(told)
        return True

    def outcomes_of_map(self, remembered: Memory) -> list[ChildOutcome]:
        return self._outcomes.maps[remembered.name]


class _MemoryContext(ExecutionContext):
    """A context whose steps' functions a test may replace."""

    def __init__(
        self, execution: Execution, memory: dict[str, Memory], outcomes: Outcomes, task: DurableTask[..., Any]
    ) -> None:
        journal = _MemoryJournal(execution, outcomes)
        super().__init__(execution, memory, Lease(execution), task, journal=journal)
        self.body = task
        self._outcomes = outcomes

    # Typed loosely: its caller is a body, which knows the class above.
    def step(self, step: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().step(step, self._outcomes.function(step, fn), *args, **kwargs)

    def atomic_step(self, step: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().atomic_step(step, self._outcomes.function(step, fn), *args, **kwargs)
