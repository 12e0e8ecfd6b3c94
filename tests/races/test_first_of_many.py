"""What not all of its members decide is decided once, by one of those that end at the same time."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import transitions
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.transitions import Gather
from tests.races.harness import IsolationLevel, Race
from tests.support.executions import FAILURE, claimed, fresh, mapping, starting, step_of

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


def gather(parent: Execution, count: int, need: int) -> bool:
    names = [f"child-{n}" for n in range(count)]
    return transitions.suspend(parent, Gather("gather", names, fails_fast=True, max_failures=count - need))


@isolations
def test_of_two_results_that_come_together_the_first_is_enough(race: Race, isolation: Any) -> None:
    parent, (first, second) = starting(2)
    assert gather(parent, 2, need=1)
    ending = race.hold("first", succeed, second, isolation=isolation)
    other = race.start("second", succeed, first, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    other.result()
    step = step_of(parent, "gather")
    assert (step.status, step.counted) == (StepStatus.SUCCEEDED, "child-1,")
    assert fresh(parent).status == ExecutionStatus.QUEUED


@isolations
def test_a_result_and_the_failure_that_made_it_impossible(race: Race, isolation: Any) -> None:
    parent, (good, bad) = starting(2)
    assert gather(parent, 2, need=2)
    failing = race.hold("bad", fail, bad, isolation=isolation)
    ending = race.start("good", succeed, good, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    ending.result()
    step = step_of(parent, "gather")
    assert (step.status, step.child_id, step.counted) == (StepStatus.FAILED, bad.pk, "")


@isolations
def test_failures_two_and_three_at_once_are_counted_one_after_the_other(race: Race, isolation: Any) -> None:
    parent, children = mapping(4, max_failures=2)
    one, two, three = (claimed(child) for child in children[:3])
    fail(one)
    failing = race.hold("two", fail, two, isolation=isolation)
    other = race.start("three", fail, three, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    other.result()
    step = step_of(parent)
    assert (step.status, step.child_id, step.failures, step.remaining) == (StepStatus.FAILED, three.pk, 2, 1)
    # It was not known to be too many before it had its turn, and cancels what has not started all the same.
    assert fresh(children[3]).status == ExecutionStatus.CANCELLED
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert race.conflicts() == [] or isolation is not None


def test_what_is_started_just_now_is_not_waited_for_by_the_failure_that_is_too_many(race: Race) -> None:
    """Children come before steps, so a failure that has a step's lock waits for no child."""
    parent, children = mapping(3, max_failures=1)
    one, two = (claimed(child) for child in children[:2])
    failing = race.hold("one", fail, one)
    other = race.start("two", fail, two).wait_blocked(by=failing)
    claiming = race.hold("claim", transitions.claim, children[2].pk, "test@host/2", stop="after claimed")
    failing.go_on().result()
    other.result()
    claiming.go_on().result()
    assert step_of(parent).status == StepStatus.FAILED
    assert fresh(children[2]).status == ExecutionStatus.RUNNING
