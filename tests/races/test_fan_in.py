"""Of many children that end at the same time, exactly one wakes their parent, and none is counted twice or missed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from conductor_app import transitions
from conductor_app.exceptions import LeaseLost
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import Gather, cancelling, steps
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race, in_several_statements
from tests.support.executions import FAILURE, OWNER, claimed, fresh, invocation, mapping, starting, step_of

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation",
    [None, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE],
    ids=["read committed", "repeatable read", "serializable"],
)


def succeed(child: Execution) -> None:
    transitions.succeed(child, "1")


def fail(child: Execution) -> None:
    transitions.fail(child, FAILURE)


def gather(parent: Execution, count: int, *, fails_fast: bool = True) -> bool:
    return transitions.suspend(parent, Gather("gather(…)", [f"child-{n}" for n in range(count)], fails_fast))


def statuses(parent: Execution) -> list[str]:
    return list(Execution.objects.filter(parent=parent).order_by("position", "step").values_list("status", flat=True))


# ---------------------------------------------------------------------------------------------------------------- map


@isolations
def test_of_two_last_children_the_second_wakes_the_parent(race: Race, isolation: Any) -> None:
    parent, children = mapping(2)
    first, second = (claimed(child) for child in children)
    ending = race.hold("first", succeed, first, isolation=isolation)
    other = race.start("second", succeed, second, isolation=isolation).wait_blocked(by=ending)
    assert fresh(parent).status == ExecutionStatus.WAITING
    ending.go_on().result()
    other.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert (step_of(parent).status, step_of(parent).remaining) == (StepStatus.SUCCEEDED, 0)


@pytest.mark.parametrize(
    "stop",
    [
        "after transitions.guards.leave_running",
        "before transitions.steps.count_down",
        "after transitions.steps.count_down",
        BEFORE_COMMIT,
    ],
)
def test_wherever_the_first_stands_the_other_is_counted_too(race: Race, stop: str) -> None:
    parent, children = mapping(2)
    first, second = (claimed(child) for child in children)
    ending = race.hold("first", succeed, first, stop=stop)
    other = race.start("second", succeed, second)
    assert other.is_blocked(by=ending) == (stop in ("after transitions.steps.count_down", BEFORE_COMMIT))
    ending.go_on().result()
    other.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert step_of(parent).remaining == 0


@in_several_statements
def test_canary_a_count_that_is_read_and_written_is_lost(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_write(counted: Any, status: StepStatus, **_: Any) -> Step:
        step = counted.get()
        step.remaining -= 1
        if not step.remaining:
            step.status, step.finished_at = StepStatus.SUCCEEDED, clock.now()
        step.save()
        return step

    monkeypatch.setattr(steps, "count_down", read_and_write)
    parent, children = mapping(2, fails_fast=False)
    first, second = (claimed(child) for child in children)
    ending = race.hold("first", fail, first)
    other = race.start("second", fail, second).wait_blocked(by=ending)
    ending.go_on().result()
    other.result()
    assert fresh(parent).status == ExecutionStatus.WAITING
    assert set(statuses(parent)) == {"failed"}


def test_four_players_end_a_hundred_children(race: Race) -> None:
    parent, children = mapping(100)
    runs = iter([claimed(child) for child in children])

    def end_some(mine: list[Execution]) -> None:
        for child in mine:
            succeed(child)

    shares = [list(itertools.islice(runs, 25)) for _ in range(4)]
    actors = [race.start(f"player {number}", end_some, share) for number, share in enumerate(shares)]
    for actor in actors:
        actor.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert (step_of(parent).status, step_of(parent).remaining) == (StepStatus.SUCCEEDED, 0)
    assert race.conflicts() == []


@isolations
def test_a_failure_beside_the_last_success_decides_the_map(race: Race, isolation: Any) -> None:
    parent, children = mapping(2)
    bad, good = (claimed(child) for child in children)
    failing = race.hold("bad", fail, bad, isolation=isolation)
    ending = race.start("good", succeed, good, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    ending.result()
    step = step_of(parent)
    assert (step.status, step.child_id, fresh(parent).status) == ("failed", bad.pk, "queued")
    assert statuses(parent) == ["failed", "succeeded"]


@isolations
def test_of_two_failures_one_decides_and_both_are_failed(race: Race, isolation: Any) -> None:
    parent, children = mapping(3)
    one, two = (claimed(child) for child in children[:2])
    failing = race.hold("one", fail, one, isolation=isolation)
    other = race.start("two", fail, two, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    other.result()
    assert (step_of(parent).status, step_of(parent).child_id) == ("failed", one.pk)
    assert statuses(parent) == ["failed", "failed", "cancelled"]


def test_a_sibling_that_is_claimed_before_the_failure_commits_is_not_cancelled(race: Race) -> None:
    parent, children = mapping(2)
    bad = claimed(children[0])
    failing = race.hold("bad", fail, bad, stop="before transitions.waking.cancel_unstarted")
    assert transitions.claim(children[1].pk, "test@host/2") is not None
    failing.go_on().result()
    assert statuses(parent) == ["failed", "running"]


def test_a_sibling_cannot_be_claimed_once_the_failure_has_cancelled_it(race: Race) -> None:
    parent, children = mapping(2)
    failing = race.hold("bad", fail, claimed(children[0]))
    claiming = race.start("claim", transitions.claim, children[1].pk, "test@host/2").wait_blocked(by=failing)
    failing.go_on().result()
    assert claiming.result() is None
    assert statuses(parent) == ["failed", "cancelled"]


@isolations
def test_a_timeout_that_loses_to_the_last_child(race: Race, isolation: Any) -> None:
    parent, children = mapping(1, timeout=5)
    child = claimed(children[0])
    Step.objects.update(deadline_at=clock.after(-1))
    ending = race.hold("child", succeed, child, isolation=isolation)
    deciding = race.start("sweeper", transitions.decide_overdue, step_of(parent), isolation=isolation)
    deciding.wait_blocked(by=ending)
    ending.go_on().result()
    assert deciding.result() is False
    assert (step_of(parent).status, statuses(parent)) == ("succeeded", ["succeeded"])


@isolations
@pytest.mark.parametrize("on_timeout", ["cancel", "abandon"])
def test_a_child_that_ends_after_the_timeout_is_late_for_ever(race: Race, isolation: Any, on_timeout: str) -> None:
    parent, children = mapping(2, timeout=5, on_timeout=on_timeout)
    succeed(claimed(children[0]))
    child = claimed(children[1])
    Step.objects.update(deadline_at=clock.after(-1))
    deciding = race.hold("sweeper", transitions.decide_overdue, step_of(parent), isolation=isolation)
    ending = race.start("child", succeed, child, isolation=isolation).wait_blocked(by=deciding)
    assert deciding.go_on().result() is True
    ending.result()
    step = step_of(parent)
    assert (step.status, step.result, step.remaining) == ("timed_out", "[1]", 1)
    assert statuses(parent) == ["succeeded", "succeeded"]
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_child_whose_end_is_not_committed_when_the_map_times_out_is_late(race: Race) -> None:
    """It has written its own row and has still to count the map down: the timeout does not wait for it."""
    parent, children = mapping(1, timeout=5, on_timeout="abandon")
    child = claimed(children[0])
    Step.objects.update(deadline_at=clock.after(-1))
    ending = race.hold("child", succeed, child, stop="before transitions.steps.count_down")
    assert transitions.decide_overdue(step_of(parent)) is True
    ending.go_on().result()
    assert (step_of(parent).status, step_of(parent).result) == ("timed_out", "[0]")
    assert statuses(parent) == ["succeeded"]


def test_a_failure_that_loses_to_the_timeout_cancels_nobody(race: Race) -> None:
    """It has cancelled what had not started, and then finds the map decided: its parent has asked to let them go on."""
    parent, children = mapping(3, timeout=5, on_timeout="abandon")
    child = claimed(children[0])
    Step.objects.update(deadline_at=clock.after(-1))
    failing = race.hold("child", fail, child, stop="before transitions.steps.count_down")
    assert transitions.decide_overdue(step_of(parent)) is True
    failing.go_on().result()
    assert step_of(parent).status == StepStatus.TIMED_OUT
    assert statuses(parent) == ["failed", "queued", "queued"]


# ------------------------------------------------------------------------------------------------------- max_parallel


def test_two_ending_children_let_two_others_go(race: Race) -> None:
    parent, children = mapping(5, max_parallel=2)
    first, second = (claimed(child) for child in children[:2])
    ending = race.hold("first", succeed, first, stop="before transitions.steps.count_down")
    race.start("second", succeed, second).result()
    ending.go_on().result()
    assert [fresh(child).due_at is None for child in children] == [False, False, False, False, True]
    assert step_of(parent).remaining == 3


def test_an_ending_child_waits_for_a_sibling_that_is_being_let_go_or_cancelled(race: Race) -> None:
    """The only held one is in somebody's hands: if that is given up, the place must not be lost."""
    parent, children = mapping(3, max_parallel=2)
    first, second = (claimed(child) for child in children[:2])
    ending = race.hold("first", succeed, first, stop="before transitions.steps.count_down")
    other = race.start("second", succeed, second).wait_blocked(by=ending)
    ending.go_on().result()
    other.result()
    assert fresh(children[2]).due_at is not None
    assert step_of(parent).remaining == 1


@isolations
def test_a_held_child_that_is_cancelled_while_another_wants_to_let_it_go(race: Race, isolation: Any) -> None:
    parent, children = mapping(3, max_parallel=1, fails_fast=False)
    transitions.request_cancel(children[1].pk, "")
    cancelling_it = race.hold("cancel", transitions.cancel_flagged, children[1].pk, isolation=isolation)
    ending = race.start("child", succeed, claimed(children[0]), isolation=isolation).wait_blocked(by=cancelling_it)
    assert cancelling_it.go_on().result() is True
    ending.result()
    assert statuses(parent) == ["succeeded", "cancelled", "queued"]
    assert fresh(children[2]).due_at is not None
    succeed(claimed(children[2]))
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_cancelling_a_parent_while_its_child_lets_a_sibling_go(race: Race) -> None:
    parent, children = mapping(3, max_parallel=1)
    transitions.request_cancel(parent.pk, "")
    ending = race.hold("child", succeed, claimed(children[0]), stop="before transitions.steps.count_down")
    cancel = race.start("cancel", transitions.cancel_flagged, parent.pk).wait_blocked(by=ending)
    ending.go_on().result()
    assert cancel.result() is True
    for child in children:
        transitions.cancel_flagged(child.pk)
    assert statuses(parent) == ["succeeded", "cancelled", "cancelled"]
    assert fresh(parent).status == ExecutionStatus.CANCELLED


# -------------------------------------------------------------------------------------------------- start and gather


@isolations
def test_a_parent_that_gathers_while_its_last_child_ends_goes_on(race: Race, isolation: Any) -> None:
    parent, (child,) = starting(1)
    ending = race.hold("child", succeed, child, isolation=isolation)
    gathering = race.start("parent", gather, parent, 1, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert gathering.result() is False
    assert fresh(parent).status == ExecutionStatus.RUNNING
    assert step_of(parent, "gather(…)").status == StepStatus.SUCCEEDED


@isolations
def test_a_child_that_ends_while_its_parent_gathers_wakes_it(race: Race, isolation: Any) -> None:
    parent, (child,) = starting(1)
    gathering = race.hold("parent", gather, parent, 1, isolation=isolation)
    ending = race.start("child", succeed, child, isolation=isolation).wait_blocked(by=gathering)
    assert gathering.go_on().result() is True
    ending.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert step_of(parent, "gather(…)").status == StepStatus.SUCCEEDED


@isolations
@pytest.mark.parametrize("end", [succeed, fail], ids=["succeed", "fail"])
@pytest.mark.parametrize(
    "stop",
    [
        "before transitions.steps.settle",
        "after transitions.steps.settle",
        "after transitions.guards.leave_running",
        BEFORE_COMMIT,
    ],
)
def test_wherever_the_child_stands_the_gather_counts_it(race: Race, end: Any, stop: str, isolation: Any) -> None:
    parent, (child, other) = starting(2)
    ending = race.hold("child", end, child, stop=stop, isolation=isolation)
    gathering = race.start("parent", gather, parent, 2, isolation=isolation)
    gathering.is_blocked(by=ending)
    ending.go_on().result()
    gathering.outcome()
    if fresh(parent).status == ExecutionStatus.WAITING:
        assert end is succeed
        assert step_of(parent, "gather(…)").remaining == 1
        succeed(other)
        assert fresh(parent).status == ExecutionStatus.QUEUED
    assert step_of(parent, "gather(…)").status == ("succeeded" if end is succeed else "failed")


@isolations
def test_of_two_last_members_the_second_wakes_the_parent(race: Race, isolation: Any) -> None:
    parent, (one, two) = starting(2)
    assert gather(parent, 2)
    ending = race.hold("one", succeed, one, isolation=isolation)
    other = race.start("two", succeed, two, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    other.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED


@isolations
def test_of_two_failing_members_one_is_raised(race: Race, isolation: Any) -> None:
    parent, (one, two) = starting(2)
    assert gather(parent, 2)
    failing = race.hold("one", fail, one, isolation=isolation)
    other = race.start("two", fail, two, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    other.result()
    assert step_of(parent, "gather(…)").child_id == one.pk
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_cancelled_member_and_a_failing_one_do_not_wait_for_each_other(race: Race) -> None:
    parent = starting(0)[0]
    started = [
        transitions.start_child(parent, wait) for wait in (invocation(parent, "child-0"), invocation(parent, "child-1"))
    ]
    assert gather(parent, 2)
    bad = claimed(Execution.objects.get(pk=started[0].child_id))
    unstarted = Execution.objects.get(pk=started[1].child_id)
    cancelling.request_cancel(unstarted.pk, "")
    cancel = race.hold("cancel", transitions.cancel_flagged, unstarted.pk)
    failing = race.start("bad", fail, bad).wait_blocked(by=cancel)
    assert cancel.go_on().result() is True
    failing.result()
    assert statuses(parent) == ["failed", "cancelled"]
    assert step_of(parent, "gather(…)").child_id == unstarted.pk
    assert race.conflicts() == []


def test_a_zombie_that_gathers_while_its_execution_is_reclaimed_records_nothing(race: Race) -> None:
    parent, children = starting(2)
    for child in children:
        succeed(child)
    zombie = race.hold("zombie", gather, parent, 2, stop="before transitions.running.lock_held")
    assert transitions.lose(parent.pk, owner=OWNER)
    assert zombie.go_on().outcome() is LeaseLost
    assert not Step.objects.filter(execution=parent.pk, kind=StepKind.GATHER).exists()
