"""Worlds, and moves in them: each hot move where it is let through, and where something refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from conductor_app import transitions
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.transitions import Gather, HandOff, Sleep, waking
from conductor_app.values.uniqueness import Unique
from tests.support.executions import (
    FAILURE,
    OWNER,
    TASK,
    claimed,
    family,
    invocation,
    invoke,
    map_of,
    mapping,
    napping,
    queued,
    running,
    starting,
)

ANOTHER = "test@host/2"
ANNOUNCED = '{"announce":true,"ignore_result":false}'


class Case(NamedTuple):
    """One move in one world.

    Attributes:
        make: Makes the world, and returns what ``act`` needs of it.
        act: The move.
    """

    make: Callable[[], Any]
    act: Callable[[Any], Any]


def changed(execution: Execution, **values: Any) -> Execution:
    """Write to a row past all moves."""
    Execution.objects.filter(pk=execution.pk).update(**values)
    return execution


def flagged(execution: Execution) -> Execution:
    assert transitions.request_cancel(execution.pk, "enough")
    return execution


def taken_over(run: Execution) -> Execution:
    """Another process has it now; the run does not know."""
    transitions.lose(run.pk, owner=OWNER)
    claimed(run, ANOTHER)
    return run


#: Of an execution with a unique key.
KEYED: dict[str, Any] = {"unique": Unique("k"), "options": '{"unique":"k"}'}


def replaced() -> tuple[Execution, Execution]:
    """One that runs, and the one that has its key by now, after a debounced call."""
    run = running(**KEYED)
    return run, queued(**{**KEYED, "unique": Unique("k", debounce=60.0)}, countdown=60)


def handed_off(act: Callable[[HandOff], Any], *known: Execution, accepts: bool = True) -> HandOff:
    """Make a move after which this process may go on."""
    parents = {execution.pk: execution for execution in known}
    hand_off = HandOff(OWNER, lambda following: accepts, parents.get)
    act(hand_off)
    return hand_off


def on_hold(execution: Execution) -> Execution:
    assert transitions.hold(execution.pk, "bank incident", "ana", tree=False)
    return execution


def paused(execution: Execution, task: str = TASK) -> Execution:
    """Its task, or another one, is paused."""
    assert transitions.pause(task, "bank incident", "ana")
    return execution


def with_steps() -> Execution:
    """Queued again, with a step of each outcome behind it."""
    run = running()
    transitions.record_step(run, "charge", result='{"paid":true}')
    transitions.record_step(run, "refund", failure=FAILURE)
    transitions.release(run)
    return run


def claim(execution: Execution, task: str | None = None) -> Execution | None:
    return transitions.claim(execution.pk, OWNER, task)


CLAIM = {
    "queued": Case(queued, claim),
    "queued, of the task that the message names": Case(queued, lambda row: claim(row, TASK)),
    "queued, of another task than the message names": Case(queued, lambda row: claim(row, "another.task")),
    "queued again after a run with steps": Case(with_steps, claim),
    "queued for later": Case(lambda: queued(countdown=60), claim),
    "queued, and its start is too late": Case(lambda: changed(queued(), deadline_at=clock.after(-30)), claim),
    "queued, with time to start": Case(lambda: changed(queued(), deadline_at=clock.after(30)), claim),
    "queued again, and only its start would be too late": Case(
        lambda: changed(with_steps(), deadline_at=clock.after(-30)), claim
    ),
    "queued and to be cancelled": Case(lambda: flagged(queued()), claim),
    "queued and held": Case(lambda: on_hold(queued()), claim),
    "queued, of a paused task": Case(lambda: paused(queued()), claim),
    "queued, and another task is paused": Case(lambda: paused(queued(), "another.task"), claim),
    "running": Case(running, claim),
    "waiting": Case(napping, claim),
}


def record(run: Execution, **outcome: Any) -> Any:
    return transitions.record_step(run, "charge", **(outcome or {"result": '{"paid":true}'}))


def recorded() -> Execution:
    run = running()
    record(run)
    return run


RECORD_STEP = {
    "a result": Case(running, record),
    "a failure": Case(running, lambda run: record(run, failure=FAILURE)),
    "another one": Case(recorded, lambda run: transitions.record_step(run, "ship", result="2")),
    "of one that is to be cancelled": Case(lambda: flagged(running()), record),
    "of one that is held": Case(lambda: on_hold(running()), record),
    "of one that another process has": Case(lambda: taken_over(running()), record),
}

EVERYTHING: dict[str, Any] = {"timeout": 60, "on_timeout": "abandon", "priority": 3, "payload": '[[1],{"a":"b"}]'}


def suspend(run: Execution, **options: Any) -> Any:
    return transitions.suspend(run, invocation(run, **options))


SUSPEND = {
    "on a child": Case(running, suspend),
    "on a child with everything": Case(running, lambda run: suspend(run, **EVERYTHING)),
    "on a child that is due later": Case(running, lambda run: suspend(run, countdown=60)),
    "on a child that expires": Case(running, lambda run: suspend(run, expires=60)),
    "on a child, after a step": Case(recorded, suspend),
    "on a child with a unique key": Case(running, lambda run: suspend(run, **KEYED)),
    "on a child of a child": Case(family, lambda pair: suspend(pair[1])),
    "on a child that this process goes on with": Case(
        running,
        lambda run: handed_off(lambda offer: transitions.suspend(run, invocation(run, timeout=60), hand_off=offer)),
    ),
    "on a child that this process may not go on with": Case(
        running,
        lambda run: handed_off(lambda offer: transitions.suspend(run, invocation(run), hand_off=offer), accepts=False),
    ),
    "on a child of a paused task that this process would go on with": Case(
        lambda: paused(running()),
        lambda run: handed_off(lambda offer: transitions.suspend(run, invocation(run, timeout=60), hand_off=offer)),
    ),
    "of one that is to be cancelled, on a child": Case(lambda: flagged(running()), suspend),
    "of one that is held, on a child": Case(lambda: on_hold(running()), suspend),
    "of one that another process has, on a child": Case(lambda: taken_over(running()), suspend),
    "on a map": Case(running, lambda run: transitions.suspend(run, map_of(run, 3))),
    "on a map with everything": Case(
        running,
        lambda run: transitions.suspend(
            run, map_of(run, 3, max_parallel=2, timeout=60, fails_fast=False, on_timeout="abandon")
        ),
    ),
    "on a map that lets failures pass": Case(
        running, lambda run: transitions.suspend(run, map_of(run, 2, max_failures=1))
    ),
    "on a map with room": Case(running, lambda run: transitions.suspend(run, map_of(run, 2, max_parallel=5))),
    "on a map of none": Case(running, lambda run: transitions.suspend(run, map_of(run, 0))),
    "of one that is to be cancelled, on a map": Case(
        lambda: flagged(running()), lambda run: transitions.suspend(run, map_of(run, 2))
    ),
    "of one that another process has, on a map": Case(
        lambda: taken_over(running()), lambda run: transitions.suspend(run, map_of(run, 2))
    ),
    "of one that is held, on a map": Case(
        lambda: on_hold(running()), lambda run: transitions.suspend(run, map_of(run, 2))
    ),
    "of one that is held, on a sleep": Case(
        lambda: on_hold(running()), lambda run: transitions.suspend(run, Sleep("nap", seconds=60))
    ),
    "on a sleep": Case(running, lambda run: transitions.suspend(run, Sleep("nap", seconds=60))),
}


def succeed(run: Execution) -> None:
    transitions.succeed(run, '"done"')


def early(*, queue: bool = False) -> Execution:
    """A child whose parent was woken before its end, and runs elsewhere unless it still has to ``queue``."""
    parent, child = family()
    waking.wake(parent.pk)
    if not queue:
        claimed(parent, ANOTHER)
    return child


def to_be_cancelled() -> tuple[Execution, Execution]:
    """The parent is to be cancelled, and the child has not heard of it."""
    parent, child = family()
    return changed(parent, cancel_requested_at=clock.now()), child


def held_family() -> tuple[Execution, Execution]:
    """The parent is held, and its child is not."""
    parent, child = family()
    return on_hold(parent), child


def paused_family() -> tuple[Execution, Execution]:
    """The task of both is paused, and the child runs."""
    parent, child = family()
    return paused(parent), child


def late_family() -> tuple[Execution, Execution]:
    """The parent has heard of the timeout of its child, which was let go on."""
    parent, child = family(timeout=60, on_timeout="abandon")
    Step.objects.filter(execution=parent).update(deadline_at=clock.after(-30))
    assert transitions.decide_overdue(Step.objects.get(execution=parent))
    return parent, child


def overdue_family() -> tuple[Execution, Execution]:
    """The child's time is over, and nobody has noticed."""
    parent, child = family(timeout=60)
    Step.objects.filter(execution=parent).update(deadline_at=clock.after(-30))
    return parent, child


def late_and_flagged() -> tuple[Execution, Execution]:
    """The same, and the child is to be cancelled for it."""
    parent, child = family(timeout=60)
    Step.objects.filter(execution=parent).update(deadline_at=clock.after(-30))
    assert transitions.decide_overdue(Step.objects.get(execution=parent))
    return parent, child


def mapped(count: int, ended: int = 0, **options: Any) -> Execution:
    """The next of a map's children to end, as its run sees it."""
    _, children = mapping(count, **options)
    for child in children[:ended]:
        transitions.succeed(claimed(child), "0")
    return claimed(children[ended])


def mapped_and_failed(**options: Any) -> Execution:
    _, children = mapping(3, **options)
    runs = [claimed(child) for child in children[:2]]
    transitions.fail(runs[0], FAILURE)
    return runs[1]


def gathered(count: int, ended: int = 0, **options: Any) -> Execution:
    """The next of the gathered children to end, as its run sees it."""
    parent, children = starting(count)
    names = [child.step for child in children]
    assert transitions.suspend(parent, Gather("gather", names, **{"fails_fast": True, **options}))
    for child in children[:ended]:
        transitions.succeed(child, "0")
    return children[ended]


def go_on(pair: tuple[Execution, Execution], *, is_known: bool = True, accepts: bool = True) -> Any:
    parent, child = pair
    return handed_off(
        lambda offer: transitions.succeed(child, '"done"', offer), *[parent] if is_known else [], accepts=accepts
    )


SUCCEED = {
    "a root": Case(running, succeed),
    "a root of which Celery is told": Case(lambda: running(options=ANNOUNCED), succeed),
    "a root with steps": Case(recorded, succeed),
    "a root with a unique key": Case(lambda: running(**KEYED), succeed),
    "a root whose unique key another one has, which waits": Case(replaced, lambda pair: succeed(pair[0])),
    "a child with a unique key": Case(lambda: family(**KEYED), lambda pair: succeed(pair[1])),
    "a root that is to be cancelled": Case(lambda: flagged(running()), succeed),
    "a root that another process has": Case(lambda: taken_over(running()), succeed),
    "a child, and its parent waits": Case(family, lambda pair: succeed(pair[1])),
    "a child, and its parent is woken already": Case(lambda: early(queue=True), succeed),
    "a child, and its parent runs": Case(early, succeed),
    "a child, and its parent is to be cancelled": Case(to_be_cancelled, lambda pair: succeed(pair[1])),
    "a child that is to be cancelled": Case(lambda: flagged(family()[1]), succeed),
    "a child that another process has": Case(lambda: taken_over(family()[1]), succeed),
    "a child of a child": Case(lambda: claimed(invoke(family()[1])), succeed),
    "a child whose time is over, unnoticed": Case(overdue_family, lambda pair: succeed(pair[1])),
    "a child whose time is over, and that was let go on": Case(late_family, lambda pair: succeed(pair[1])),
    "a child that is to be cancelled for its timeout": Case(late_and_flagged, lambda pair: succeed(pair[1])),
    "a child whose parent this process goes on with": Case(family, go_on),
    "a child whose parent this process goes on with, and has not run": Case(
        family, lambda pair: go_on(pair, is_known=False)
    ),
    "a child whose parent this process may not go on with": Case(family, lambda pair: go_on(pair, accepts=False)),
    "a child whose parent this process goes on with, and knows as it was": Case(
        family, lambda pair: go_on((pair[0].copied(fence=0, payload='[["as it was"],{}]', attempt=7), pair[1]))
    ),
    "a child whose parent this process would go on with, and is to be cancelled": Case(to_be_cancelled, go_on),
    "a child, and its parent is held": Case(held_family, lambda pair: succeed(pair[1])),
    "a child whose parent this process would go on with, and is held": Case(held_family, go_on),
    "a child whose parent this process would go on with, and is of a paused task": Case(paused_family, go_on),
    "the first of a map": Case(lambda: mapped(3), succeed),
    "the last of a map": Case(lambda: mapped(3, ended=2), succeed),
    "one of a map with a held sibling": Case(lambda: mapped(3, max_parallel=1), succeed),
    "one of a map, after a failure": Case(mapped_and_failed, succeed),
    "one of a map, after a failure that is waited through": Case(lambda: mapped_and_failed(fails_fast=False), succeed),
    "a started child, and its parent runs": Case(lambda: starting(2)[1][0], succeed),
    "the first of the gathered": Case(lambda: gathered(2), succeed),
    "the first of the gathered, which is enough": Case(lambda: gathered(2, max_failures=1), succeed),
    "one of the gathered, with which there are not enough": Case(lambda: gathered(3, max_failures=1), succeed),
    "the last of the gathered": Case(lambda: gathered(2, ended=1), succeed),
}


def ended(**fields: Any) -> Execution:
    run = running(options=ANNOUNCED, **fields)
    succeed(run)
    return run


def told(run: Execution) -> Execution:
    assert transitions.announced(run, ExecutionStatus.SUCCEEDED)
    return run


def failed_twice() -> Execution:
    """A retry has failed as the run before it did; here as the first one still knows it."""
    run = running(options=ANNOUNCED)
    transitions.fail(run, FAILURE)
    transitions.reopen(run.pk)
    transitions.fail(claimed(run), FAILURE)
    return run


ANNOUNCE = {
    "by the run": Case(ended, lambda run: transitions.announced(run, ExecutionStatus.SUCCEEDED)),
    "by a sweeper": Case(
        lambda: Execution.objects.get(pk=ended().pk),
        lambda row: transitions.announced(row, ExecutionStatus.SUCCEEDED),
    ),
    "once more": Case(lambda: told(ended()), lambda run: transitions.announced(run, ExecutionStatus.SUCCEEDED)),
    "of the end before a retry": Case(failed_twice, lambda run: transitions.announced(run, ExecutionStatus.FAILED)),
    "of another end": Case(ended, lambda run: transitions.announced(run, ExecutionStatus.CANCELLED)),
}


def due(*queues: str) -> None:
    for number, queue in enumerate(queues):
        changed(queued(queue=queue), dispatch_at=clock.after(-60 + 10 * number), dispatches=number)


def take(limit: int = 10, queues: list[str] | None = None) -> list[tuple[Any, int]]:
    """The rows in their order; not whole ones, since a durable task's message needs no payload."""
    return [(row.pk, row.dispatches) for row in transitions.take_for_dispatch(limit, queues)]


TAKE_FOR_DISPATCH = {
    "all that are due": Case(lambda: due("a", "b", "a"), lambda _: take()),
    "the first ones": Case(lambda: due("a", "b", "a"), lambda _: take(2)),
    "of some queues": Case(lambda: due("a", "b", "a"), lambda _: take(queues=["b"])),
    "none that is held": Case(lambda: changed(on_hold(queued()), dispatch_at=clock.after(-1)), lambda _: take()),
    "none of a paused task": Case(lambda: changed(paused(queued()), dispatch_at=clock.after(-1)), lambda _: take()),
    "none that is published soon enough": Case(queued, lambda _: take()),
    "none that is due later": Case(lambda: queued(countdown=60), lambda _: take()),
    "none that waits": Case(napping, lambda _: take()),
}

CASES: dict[str, Case] = {
    f"{move}: {where}": case
    for move, cases in {
        "claim": CLAIM,
        "record a step": RECORD_STEP,
        "suspend": SUSPEND,
        "succeed": SUCCEED,
        "note that Celery was told": ANNOUNCE,
        "take for publication": TAKE_FOR_DISPATCH,
    }.items()
    for where, case in cases.items()
}
