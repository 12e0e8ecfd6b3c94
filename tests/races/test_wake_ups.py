"""A parent that suspends on a child that is just ending is never left waiting."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import transitions
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import Pending, steps, waking
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race, in_several_statements
from tests.support.executions import FAILURE, claimed, family, fresh, invocation, step_of

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation",
    [None, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE],
    ids=["read committed", "repeatable read", "serializable"],
)
ENDS = {
    "succeed": lambda child: transitions.succeed(child, "1"),
    "fail": lambda child: transitions.fail(child, FAILURE),
}


def replaying() -> tuple[Execution, Execution]:
    """A parent that runs again while its child runs, as the first run of an operator's retry may find it."""
    parent, child = family()
    waking.wake(parent.pk)
    return claimed(parent), child


def suspend(parent: Execution) -> bool:
    return transitions.suspend(parent, Pending("child"))


def is_stuck(parent: Execution) -> bool:
    """Whether the parent waits for a step that is decided: nobody will ever wake it."""
    return fresh(parent).status == ExecutionStatus.WAITING and step_of(parent).status != StepStatus.PENDING


@isolations
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_parent_that_suspends_after_its_child_has_ended_goes_on(race: Race, end: Any, isolation: Any) -> None:
    parent, child = replaying()
    ending = race.hold("child", end, child, isolation=isolation)
    suspending = race.start("parent", suspend, parent, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert suspending.result() is False
    assert fresh(parent).status == ExecutionStatus.RUNNING
    # At the stricter levels the parent's snapshot is older than the child's end: its transaction is run again.
    assert suspending.conflicts == ([] if isolation is None else ["40001"])


@isolations
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_child_that_ends_after_its_parent_has_suspended_wakes_it(race: Race, end: Any, isolation: Any) -> None:
    parent, child = replaying()
    suspending = race.hold("parent", suspend, parent, isolation=isolation)
    ending = race.start("child", end, child, isolation=isolation).wait_blocked(by=suspending)
    assert suspending.go_on().result() is True
    ending.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert ending.conflicts == ([] if isolation is None else ["40001"])


@isolations
@pytest.mark.parametrize(
    "stop",
    [
        "before transitions.guards.leave_running",
        "after transitions.guards.leave_running",
        "after transitions.steps.settle",
        "after transitions.waking.wake",
        BEFORE_COMMIT,
    ],
)
def test_wherever_the_child_stands_the_parent_is_not_left_waiting(race: Race, stop: str, isolation: Any) -> None:
    parent, child = replaying()
    ending = race.hold("child", ENDS["succeed"], child, stop=stop, isolation=isolation)
    suspending = race.start("parent", suspend, parent, isolation=isolation)
    is_blocked = suspending.is_blocked(by=ending)
    ending.go_on().result()
    assert is_blocked == (stop in ("after transitions.waking.wake", BEFORE_COMMIT))
    assert fresh(parent).status == (ExecutionStatus.QUEUED if suspending.result() else ExecutionStatus.RUNNING)
    assert suspending.result() is not is_blocked


@isolations
@pytest.mark.parametrize(
    "stop", ["after transitions.guards.leave_running", "after transitions.steps.is_pending", BEFORE_COMMIT]
)
def test_wherever_the_parent_stands_the_child_wakes_it(race: Race, stop: str, isolation: Any) -> None:
    parent, child = replaying()
    suspending = race.hold("parent", suspend, parent, stop=stop, isolation=isolation)
    ending = race.start("child", ENDS["succeed"], child, isolation=isolation).wait_blocked(by=suspending)
    assert suspending.go_on().result() is True
    ending.result()
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_child_cannot_end_before_its_parent_waits(race: Race) -> None:
    """The child is inserted by the transaction that suspends the parent: nobody sees it before."""
    parent, child = family()
    transitions.succeed(child, "1")
    parent = claimed(parent)
    wait = invocation(parent, "second")
    suspending = race.hold("parent", transitions.suspend, parent, wait)
    assert transitions.claim(wait.child.id, "test@host/2") is None
    suspending.go_on().result()
    assert transitions.claim(wait.child.id, "test@host/2") is not None


# Canaries: with a weaker guard the same races lose the wake-up, and this harness sees it.


def wake_if_waiting(execution_id: Any, *_: Any) -> None:
    waiting = Execution.objects.filter(pk=execution_id, status=ExecutionStatus.WAITING)
    waiting.update(status=ExecutionStatus.QUEUED, due_at=clock.now(), dispatch_at=clock.now())


def lock_and_wake_if_waiting(execution_id: Any, *_: Any) -> None:
    list(locked(Execution.objects.filter(pk=execution_id)))
    wake_if_waiting(execution_id)


@in_several_statements
def test_canary_a_conditional_wake_up_is_lost(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = replaying()
    monkeypatch.setattr(waking, "wake", wake_if_waiting)
    ending = race.hold("child", ENDS["fail"], child)
    suspending = race.start("parent", suspend, parent)
    assert not suspending.is_blocked(by=ending)
    ending.go_on().result()
    assert is_stuck(parent)


@in_several_statements
def test_canary_a_suspension_that_does_not_look_again_is_lost(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = replaying()
    monkeypatch.setattr(steps, "is_pending", lambda *_: True)
    ending = race.hold("child", ENDS["fail"], child)
    suspending = race.start("parent", suspend, parent).wait_blocked(by=ending)
    ending.go_on().result()
    assert suspending.result() is True
    assert is_stuck(parent)


@in_several_statements
def test_canary_a_lock_without_a_write_is_lost_at_repeatable_read(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = replaying()
    monkeypatch.setattr(waking, "wake", lock_and_wake_if_waiting)
    ending = race.hold("child", ENDS["fail"], child, isolation=IsolationLevel.REPEATABLE_READ)
    suspending = race.start("parent", suspend, parent, isolation=IsolationLevel.REPEATABLE_READ)
    suspending.wait_blocked(by=ending)
    ending.go_on().result()
    assert suspending.result() is True
    assert is_stuck(parent)
