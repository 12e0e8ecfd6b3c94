"""Completion, failure, timeout, cancellation and loss of one child: one of them wins, whatever the order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import CancelExecution, LeaseLost
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support import history
from tests.support.executions import FAILURE, claimed, families, fresh, invoke, mapping, running, starting, step_of
from tests.support.invariants import violations

pytestmark = pytest.mark.races


@pytest.fixture
def recorded(race: Race) -> Iterator[None]:
    """Let the database record every move."""
    with history.recording():
        yield


@dataclass(frozen=True)
class Family:
    """A waiting root, its waiting child with an overdue timeout, and the running grandchild, which has one too."""

    root: Execution
    parent: Execution
    child: Execution
    step: Step


def make_family() -> Family:
    root = running()
    parent, child = claimed(invoke(root, timeout=60)), None
    child = claimed(invoke(parent, timeout=60, max_attempts=1))
    Step.objects.filter(execution=parent.pk).update(deadline_at=clock.after(-1))
    Execution.objects.filter(pk=child.pk).update(lease_expires_at=clock.after(-1))
    return Family(root, parent, child, step_of(parent))


def end(run: Execution, act: Callable[[], object], result: str | None = None) -> None:
    """A run that is to be cancelled ends so; one that has lost its lease gives up."""
    with suppress(LeaseLost):
        try:
            act()
        except CancelExecution:
            transitions.cancel_running(run, result=result)


def complete(run: Execution) -> None:
    end(run, lambda: transitions.succeed(run, "1"), "1")


def fail(run: Execution) -> None:
    end(run, lambda: transitions.fail(run, FAILURE))


ACTS: dict[str, Callable[[Family], object]] = {
    "complete": lambda family: complete(family.child),
    "fail": lambda family: fail(family.child),
    "time out": lambda family: transitions.decide_overdue(family.step),
    "lose": lambda family: transitions.lose(family.child.pk),
    "cancel child": lambda family: api.cancel(family.child.pk),
    "cancel parent": lambda family: api.cancel(family.parent.pk),
    "cancel root": lambda family: api.cancel(family.root.pk),
}
#: Where the first one stops: it has decided the parent's step, or it has also locked and written the parent's row.
SETTLED = [(first, "after transitions.steps.settle") for first in ACTS if first not in ("fail", "cancel root")]
WRITTEN = [(first, BEFORE_COMMIT) for first in ("complete", "time out")]


def check(*families: Family) -> None:
    """After a last sweep nothing is stuck: each parent goes on, or has ended with all below it."""
    for family in families:
        child = fresh(family.child)
        if child.status == ExecutionStatus.RUNNING:
            # Cancelled or timed out while its body runs: the body notices.
            assert child.cancel_requested_at is not None
            transitions.cancel_running(family.child)
    sweeper.sweep(publish=False)
    for family in families:
        root, parent, child = fresh(family.root), fresh(family.parent), fresh(family.child)
        assert child.is_final
        assert step_of(parent).status != StepStatus.PENDING
        assert FailedExecution.objects.filter(pk=child.pk).exists() == (child.status == ExecutionStatus.FAILED)
        if parent.status == ExecutionStatus.QUEUED:
            assert root.status == ExecutionStatus.WAITING
        else:
            assert parent.status == ExecutionStatus.CANCELLED
            assert root.status in (ExecutionStatus.QUEUED, ExecutionStatus.CANCELLED)
    assert not violations()


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("first", "stop"), SETTLED + WRITTEN)
def test_of_two_one_wins_and_neither_waits_for_ever(race: Race, first: str, stop: str) -> None:
    families = []
    for second in ACTS.keys() - {first}:
        families.append(family := make_family())
        leader = race.start(first, ACTS[first], family, stop=stop)
        leader.is_stopped()
        follower = race.start(second, ACTS[second], family)
        follower.is_blocked(by=leader)
        leader.go_on().result()
        follower.result()
        assert not race.conflicts(), second
    check(*families)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"])
@pytest.mark.parametrize("order", list(itertools.permutations(["complete", "time out", "cancel child"])), ids=" ".join)
def test_completion_timeout_and_cancel_in_every_order_leave_one_outcome(
    race: Race, order: tuple[str, ...], isolation: IsolationLevel | None
) -> None:
    family = make_family()
    first, second, third = order
    leader = race.hold("first", ACTS[first], family, isolation=isolation)
    followers = [race.start(name, ACTS[name], family, isolation=isolation) for name in (second, third)]
    for follower in followers:
        follower.is_blocked()
    leader.go_on().result()
    for follower in followers:
        follower.result()
    assert set(race.conflicts()) <= {"40001"}
    if first == "complete":
        assert fresh(family.child).status == ExecutionStatus.SUCCEEDED
        assert step_of(family.parent).status == StepStatus.SUCCEEDED
    if first == "time out":
        assert step_of(family.parent).status == StepStatus.TIMED_OUT
    check(family)


def test_a_timeout_that_fires_while_the_result_is_committed_changes_nothing(race: Race) -> None:
    family = make_family()
    completing = race.hold("child", transitions.succeed, family.child, "1")
    timing_out = race.start("sweeper", transitions.decide_overdue, family.step).wait_blocked(by=completing)
    completing.go_on().result()
    assert timing_out.result() is False
    child = fresh(family.child)
    assert (child.status, child.cancel_requested_at) == (ExecutionStatus.SUCCEEDED, None)
    check(family)


def test_a_child_that_completes_while_it_times_out_keeps_its_result(race: Race) -> None:
    family = make_family()
    timing_out = race.hold("sweeper", transitions.decide_overdue, family.step)
    completing = race.start("child", transitions.succeed, family.child, "1").wait_blocked(by=timing_out)
    assert timing_out.go_on().result() is True
    completing.result()
    assert fresh(family.child).status == ExecutionStatus.SUCCEEDED
    assert step_of(family.parent).status == StepStatus.TIMED_OUT
    check(family)


def test_cancel_and_completion_never_wait_for_each_other(race: Race) -> None:
    """Child before parent, everywhere: PostgreSQL finds no deadlock."""
    pairs = families(200)
    with race.rounds(lambda pair: complete(pair[1]), lambda pair: api.cancel(pair[0].pk)) as play:
        for pair in pairs:
            assert play(pair) == [None, True]
    assert not race.conflicts()
    parents, children = zip(*pairs, strict=True)
    assert statuses(parents) == {ExecutionStatus.CANCELLED}
    assert statuses(children) <= {ExecutionStatus.SUCCEEDED, ExecutionStatus.CANCELLED}
    assert {fresh(child).get_result() for child in children} == {1}


@pytest.mark.parametrize("kind", ["root", "child", "started child", "child of a map"])
@pytest.mark.parametrize("isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"])
@pytest.mark.parametrize("act", [complete, fail], ids=["complete", "fail"])
def test_who_was_told_that_it_will_be_cancelled_is_not_told_of_another_end(
    race: Race, act: Callable[[Execution], None], isolation: IsolationLevel | None, kind: str
) -> None:
    """Of a cancel and an end the first one counts, and `cancel` says which that was."""
    ended = {complete: ExecutionStatus.SUCCEEDED, fail: ExecutionStatus.FAILED}[act]
    result = 1 if act is complete else None
    run = run_of(kind)
    cancelling = race.hold("operator", cancel, run, isolation=isolation)
    ending = race.start("worker", act, run, isolation=isolation).wait_blocked(by=cancelling)
    assert cancelling.go_on().result() is True
    ending.result()
    assert (fresh(run).status, fresh(run).get_result()) == (ExecutionStatus.CANCELLED, result)
    assert not FailedExecution.objects.filter(pk=run.pk).exists()

    run = run_of(kind)
    ending = race.hold("worker 2", act, run, isolation=isolation)
    cancelling = race.start("operator 2", api.cancel, run.pk, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert cancelling.result() is False
    assert (fresh(run).status, fresh(run).get_result()) == (ended, result)
    assert set(race.conflicts()) <= {"40001"}
    assert not violations()


def test_a_cancel_and_a_suspension_leave_no_child_behind(race: Race) -> None:
    run = running()
    cancelling = race.hold("operator", cancel, run)
    suspending = race.start("worker", lambda: end(run, lambda: invoke(run))).wait_blocked(by=cancelling)
    assert cancelling.go_on().result() is True
    suspending.result()
    assert fresh(run).status == ExecutionStatus.CANCELLED
    assert not run.children.exists()


def cancel(run: Execution) -> bool:
    """Ask for its end, in a transaction that an actor can stop at."""
    with transaction.atomic():
        return api.cancel(run.pk)


def run_of(kind: str) -> Execution:
    root = running()
    if kind == "root":
        return root
    if kind == "child":
        return claimed(invoke(root))
    if kind == "started child":
        return starting(1)[1][0]
    return claimed(mapping(2)[1][0])


def statuses(executions: Iterable[Execution]) -> set[str]:
    keys = [execution.pk for execution in executions]
    return set(Execution.objects.filter(pk__in=keys).values_list("status", flat=True))
