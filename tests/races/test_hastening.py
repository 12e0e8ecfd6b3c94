"""An operator wakes a sleeper while the sweeper ends the sleep, somebody cancels it, or another operator wakes it."""

from __future__ import annotations

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import OWNER, fresh, napping, queued

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def nap_of(execution: Execution) -> Step:
    return Step.objects.get(execution=execution.pk)


@isolations
@pytest.mark.parametrize("stop", ["after transitions.steps.settle", BEFORE_COMMIT])
def test_a_sleep_is_ended_by_the_operator_or_by_the_sweeper(
    race: Race, stop: str, isolation: IsolationLevel | None
) -> None:
    asleep = napping()
    Step.objects.update(deadline_at=clock.after(-1))
    overdue = nap_of(asleep)
    sweeping = race.hold("sweeper", transitions.decide_overdue, overdue, stop=stop, isolation=isolation)
    waking = race.start("operator", transitions.hasten, asleep.pk, isolation=isolation).wait_blocked(by=sweeping)
    assert sweeping.go_on().result() is True
    assert waking.outcome() is ActionRefused
    assert (fresh(asleep).status, nap_of(asleep).status) == (ExecutionStatus.QUEUED, StepStatus.SUCCEEDED)


def test_the_sweeper_finds_a_sleep_that_the_operator_has_ended(race: Race) -> None:
    asleep = napping()
    Step.objects.update(deadline_at=clock.after(-1))
    overdue = nap_of(asleep)
    waking = race.hold("operator", transitions.hasten, asleep.pk)
    sweeping = race.start("sweeper", transitions.decide_overdue, overdue).wait_blocked(by=waking)
    waking.go_on().result()
    assert sweeping.result() is False
    assert fresh(asleep).status == ExecutionStatus.QUEUED


@isolations
@pytest.mark.parametrize("stop", ["before transitions.waking.wake", BEFORE_COMMIT])
def test_of_a_wake_and_a_cancellation_both_are_carried_out(
    race: Race, stop: str, isolation: IsolationLevel | None
) -> None:
    asleep = napping()
    waking = race.hold("operator", transitions.hasten, asleep.pk, stop=stop, isolation=isolation)
    cancelling = race.start("other", api.cancel, asleep.pk, isolation=isolation)
    cancelling.wait_blocked(by=waking)
    woken = waking.go_on().outcome()
    assert cancelling.result() is True
    # At REPEATABLE READ the wake may meet the flag, begin again, and come too late.
    ways = [(None, StepStatus.SUCCEEDED), (ActionRefused, StepStatus.CANCELLED)]
    assert (woken, nap_of(asleep).status) in ways
    assert fresh(asleep).status == ExecutionStatus.CANCELLED


def test_of_two_operators_one_wakes(race: Race) -> None:
    asleep = napping()
    first = race.hold("first", transitions.hasten, asleep.pk)
    second = race.start("second", transitions.hasten, asleep.pk).wait_blocked(by=first)
    first.go_on().result()
    with pytest.raises(ActionRefused, match="is queued and due already"):
        second.result()


def test_a_claim_meets_an_execution_that_is_just_woken(race: Race) -> None:
    later = queued(countdown=100)
    waking = race.hold("operator", transitions.hasten, later.pk)
    assert race.start("worker", transitions.claim, later.pk, OWNER).result() is None, "not due before the commit"
    waking.go_on().result()
    assert transitions.claim(later.pk, OWNER) is not None


@isolations
def test_a_message_is_published_again_or_the_execution_is_claimed(race: Race, isolation: IsolationLevel | None) -> None:
    due = queued()
    publishing = race.hold("operator", transitions.publish_again, due.pk, isolation=isolation)
    claiming = race.start("worker", transitions.claim, due.pk, OWNER, isolation=isolation).wait_blocked(by=publishing)
    assert publishing.go_on().result() is True
    assert claiming.result() is not None
    row = fresh(due)
    assert (row.status, row.dispatch_at) == (ExecutionStatus.RUNNING, None)


@isolations
def test_a_claim_that_is_just_committed_leaves_nothing_to_publish(race: Race, isolation: IsolationLevel | None) -> None:
    due = queued()
    claiming = race.hold("worker", claim_in_transaction, due, isolation=isolation)
    publishing = race.start("operator", transitions.publish_again, due.pk, isolation=isolation)
    publishing.wait_blocked(by=claiming)
    claiming.go_on().result()
    assert publishing.outcome() is ActionRefused
    assert fresh(due).dispatch_at is None


def claim_in_transaction(execution: Execution) -> None:
    with transaction.atomic():
        assert transitions.claim(execution.pk, OWNER) is not None
