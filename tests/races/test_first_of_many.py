"""What not all of its members decide is decided once, by one of those that end at the same time."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import transitions
from conductor_app.exceptions import CancelExecution
from conductor_app.models import Event, Execution, Step
from conductor_app.states import ExecutionStatus, OnTimeout, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import First, Gather
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


# -------------------------------------------------------------------------------------------------------------- first


def racing(count: int = 1, *, losers: str = "abandon", passes: bool = False, **events: str) -> tuple[Any, list[Any]]:
    """A parent that waits for the first of some children, a timer that is over unnoticed, and events."""
    parent, children = starting(count)
    transitions.start_timer(parent, "timer", 600)
    names = [*(child.step for child in children), "timer", *events]
    wait = First(
        "first",
        names,
        fails_fast=passes,
        max_failures=len(names) - 1 if passes else None,
        events=events,
        has_timers=True,
        losers=OnTimeout(losers),
    )
    assert transitions.suspend(parent, wait)
    Step.objects.filter(name="timer").update(deadline_at=clock.after(-1))
    return parent, children


def first(parent: Execution) -> tuple[str, str | None]:
    step = step_of(parent, "first")
    return step.status, step.counted


def send(parent: Execution, payload: str = "1") -> bool:
    return transitions.send(parent.pk, "yes", payload)


def untaken() -> list[str]:
    return list(Event.objects.filter(taken_at=None).order_by("id").values_list("payload", flat=True))


@isolations
@pytest.mark.parametrize("is_child_first", [True, False])
def test_a_childs_end_and_a_timer_at_the_same_instant(race: Race, isolation: Any, is_child_first: bool) -> None:
    parent, (child,) = racing()
    acts: list[Any] = [(succeed, child), (transitions.decide_overdue, step_of(parent, "timer"))]
    acts = acts if is_child_first else acts[::-1]
    one = race.hold("one", *acts[0], isolation=isolation)
    other = race.start("other", *acts[1], isolation=isolation).wait_blocked(by=one)
    one.go_on().result()
    other.result()
    assert first(parent) == ("succeeded", "child-0," if is_child_first else "timer,")
    assert {step_of(parent, name).status for name in ("child-0", "timer")} == {StepStatus.SUCCEEDED}
    assert fresh(parent).status == ExecutionStatus.QUEUED


@isolations
def test_an_event_that_is_sent_while_a_child_settles_stays_in_the_mailbox(race: Race, isolation: Any) -> None:
    parent, (child,) = racing(answer="yes")
    ending = race.hold("child", succeed, child, isolation=isolation)
    sending = race.start("sender", send, parent, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert sending.result() is True
    assert (first(parent), untaken()) == (("succeeded", "child-0,"), ["1"])
    assert not Step.objects.filter(execution=parent, name="answer").exists()


@isolations
def test_a_child_that_settles_while_an_event_is_sent_loses_and_keeps_its_result(race: Race, isolation: Any) -> None:
    parent, (child,) = racing(answer="yes")
    sending = race.hold("sender", send, parent, isolation=isolation)
    ending = race.start("child", succeed, child, isolation=isolation).wait_blocked(by=sending)
    assert sending.go_on().result() is True
    ending.result()
    assert (first(parent), untaken()) == (("succeeded", "answer,"), [])
    assert (step_of(parent, "answer").result, step_of(parent, "child-0").status) == ("1", StepStatus.SUCCEEDED)


def test_a_sender_and_a_child_lock_what_waits_for_both_before_the_events_step(race: Race) -> None:
    parent, (child,) = racing(answer="yes")
    sending = race.hold("sender", send, parent, stop="after transitions.steps.settle")
    ending = race.start("child", succeed, child).wait_blocked(by=sending)
    assert sending.go_on().result() is True
    ending.result()
    assert first(parent) == ("succeeded", "answer,")
    assert race.conflicts() == []


@isolations
def test_of_two_events_at_once_one_is_taken(race: Race, isolation: Any) -> None:
    parent, _ = racing(answer="yes", other="yes")
    one = race.hold("one", send, parent, isolation=isolation)
    two = race.start("two", send, parent, "2", isolation=isolation).wait_blocked(by=one)
    one.go_on().result()
    two.result()
    assert (first(parent), untaken()) == (("succeeded", "answer,"), ["2"])


@isolations
def test_of_two_children_at_once_one_wins(race: Race, isolation: Any) -> None:
    parent, (one, two) = racing(2)
    ending = race.hold("one", succeed, one, isolation=isolation)
    other = race.start("two", fail, two, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    other.result()
    assert first(parent) == ("succeeded", "child-0,")
    assert (fresh(two).status, step_of(parent, "child-1").status) == (ExecutionStatus.FAILED, StepStatus.FAILED)


@isolations
def test_a_winner_waits_for_no_loser_that_is_ending(race: Race, isolation: Any) -> None:
    """Children come before steps: two that asked each other to stop would wait for each other."""
    parent, (one, two, three) = racing(3, losers="cancel")
    ending = race.hold("one", succeed, one, isolation=isolation, stop="before transitions.steps.count_down")
    race.start("two", succeed, two, isolation=isolation).result()
    ending.go_on().result()
    assert first(parent) == ("succeeded", "child-1,")
    assert fresh(one).status == ExecutionStatus.SUCCEEDED
    assert fresh(three).cancel_requested_at is not None
    assert isolation is not None or race.conflicts() == []


def test_a_loser_that_ends_after_it_was_asked_to_stop_does_not_wait_long(race: Race) -> None:
    parent, (one, two) = racing(2, losers="cancel")
    winning = race.hold("one", succeed, one)
    other = race.start("two", succeed, two).wait_blocked(by=winning)
    winning.go_on().result()
    assert other.outcome() is CancelExecution
    assert first(parent) == ("succeeded", "child-0,")


@isolations
def test_the_last_two_failures_at_once_decide_that_none_has_succeeded(race: Race, isolation: Any) -> None:
    parent, (one, two) = starting(2)
    wait = First("first", ["child-0", "child-1"], fails_fast=True, max_failures=1)
    assert transitions.suspend(parent, wait)
    failing = race.hold("one", fail, one, isolation=isolation)
    other = race.start("two", fail, two, isolation=isolation).wait_blocked(by=failing)
    failing.go_on().result()
    other.result()
    assert (first(parent), fresh(parent).status) == (("failed", ""), ExecutionStatus.QUEUED)


@isolations
def test_an_event_that_is_sent_while_the_parent_begins_to_wait(race: Race, isolation: Any) -> None:
    parent, _ = starting(1)
    wait = First("first", ["child-0", "answer"], fails_fast=False, events={"answer": "yes"})
    waiting = race.hold("parent", transitions.suspend, parent, wait, isolation=isolation)
    sending = race.start("sender", send, parent, isolation=isolation).wait_blocked(by=waiting)
    assert waiting.go_on().result() is True
    sending.result()
    assert (first(parent), fresh(parent).status, untaken()) == (("succeeded", "answer,"), "queued", [])


@isolations
def test_a_parent_that_begins_to_wait_while_an_event_is_sent(race: Race, isolation: Any) -> None:
    parent, _ = starting(1)
    wait = First("first", ["child-0", "answer"], fails_fast=False, events={"answer": "yes"})
    sending = race.hold("sender", send, parent, isolation=isolation)
    waiting = race.start("parent", transitions.suspend, parent, wait, isolation=isolation).wait_blocked(by=sending)
    sending.go_on().result()
    assert waiting.result() is False
    assert (first(parent), untaken()) == (("succeeded", "answer,"), [])


@isolations
def test_a_cancel_of_the_parent_while_an_event_is_sent(race: Race, isolation: Any) -> None:
    parent, _ = racing(answer="yes", other="yes")
    transitions.request_cancel(parent.pk, "")
    sending = race.hold("sender", send, parent, isolation=isolation)
    ending = race.start("cancel", transitions.cancel_flagged, parent.pk, isolation=isolation)
    ending.wait_blocked(by=sending)
    sending.go_on().result()
    ending.result()
    assert first(parent) == ("succeeded", "answer,")
    assert isolation is not None or race.conflicts() == []


def test_many_rounds_of_a_child_a_timer_and_an_event_have_one_outcome_each(race: Race) -> None:
    players = (
        lambda on: succeed(on[1]),
        lambda on: transitions.decide_overdue(step_of(on[0], "timer")),
        lambda on: send(on[0]),
    )
    with race.rounds(*players) as play:
        for _ in range(25):
            parent, (child,) = racing(answer="yes")
            play((parent, child))
            status, counted = first(parent)
            assert (status, counted in ("child-0,", "timer,", "answer,")) == ("succeeded", True)
            taken = Event.objects.filter(execution=parent, taken_at__isnull=False).count()
            assert taken == (counted == "answer,")
            assert Step.objects.filter(execution=parent, name="answer").count() == taken
            assert fresh(parent).status == ExecutionStatus.QUEUED
    assert race.conflicts() == []
