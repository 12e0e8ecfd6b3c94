"""People hold, release, pause and unpause while runs begin, suspend and end."""

from __future__ import annotations

import pytest
from django.db import transaction

from conductor_app import transitions
from conductor_app.exceptions import ReleaseExecution
from conductor_app.models import Execution, PausedTask
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.transitions import pausing
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import OWNER, TASK, family, fresh, invocation, map_of, queued, running

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def hold(execution: Execution, *, tree: bool = True) -> bool:
    return transitions.hold(execution.pk, "bank incident", "ana", tree=tree)


def release(execution: Execution) -> bool:
    return transitions.release_held(execution.pk)


def unpause() -> bool:
    return transitions.unpause(TASK)


def claim_in_transaction(execution: Execution) -> bool:
    with transaction.atomic():
        return transitions.claim(execution.pk, OWNER) is not None


def succeed(child: Execution) -> None:
    transitions.succeed(child, "1")


def suspend(run: Execution, how: str) -> None:
    transitions.suspend(run, invocation(run) if how == "invoke" else map_of(run, 2))


def is_parked(execution: Execution) -> bool:
    return Execution.objects.filter(pk=execution.pk, dispatch_at=clock.Never()).exists()


def goes_on(execution: Execution) -> bool:
    """Tell whether an execution is to be published, and can be claimed then."""
    return not is_parked(execution) and transitions.claim(execution.pk, OWNER) is not None


# --------------------------------------------------------------------------------------- a release, and a child's end


@isolations
def test_a_child_ends_just_before_its_parent_is_released(race: Race, isolation: IsolationLevel | None) -> None:
    parent, child = family()
    hold(parent, tree=False)
    ending = race.hold("worker", succeed, child, isolation=isolation)
    releasing = race.start("operator", release, parent, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert releasing.result() is True
    assert goes_on(parent)


@isolations
def test_a_parent_is_released_just_before_its_child_ends(race: Race, isolation: IsolationLevel | None) -> None:
    parent, child = family()
    hold(parent, tree=False)
    releasing = race.hold("operator", release, parent, isolation=isolation)
    ending = race.start("worker", succeed, child, isolation=isolation).wait_blocked(by=releasing)
    assert releasing.go_on().result() is True
    ending.result()
    assert goes_on(parent)


def test_a_child_ends_just_before_its_parent_is_held(race: Race) -> None:
    parent, child = family()
    ending = race.hold("worker", succeed, child)
    holding = race.start("operator", hold, parent).wait_blocked(by=ending)
    ending.go_on().result()
    assert holding.result() is True
    assert (fresh(parent).status, is_parked(parent)) == (ExecutionStatus.QUEUED, True)
    assert release(parent)
    assert goes_on(parent)


# ------------------------------------------------------------------------------------------ a hold, and what a run does


@isolations
@pytest.mark.parametrize("how", ["invoke", "map"])
def test_children_that_are_stored_just_before_a_hold_are_held(
    race: Race, how: str, isolation: IsolationLevel | None
) -> None:
    run = running()
    suspending = race.hold("worker", suspend, run, how, isolation=isolation)
    holding = race.start("operator", hold, run, isolation=isolation).wait_blocked(by=suspending)
    suspending.go_on().result()
    assert holding.result() is True
    children = list(Execution.objects.filter(parent=run))
    assert children
    assert all(child.is_held for child in children)
    assert fresh(run).is_held


@isolations
@pytest.mark.parametrize("how", ["invoke", "map"])
def test_no_children_are_stored_just_after_a_hold(race: Race, how: str, isolation: IsolationLevel | None) -> None:
    run = running()
    holding = race.hold("operator", hold, run, isolation=isolation)
    suspending = race.start("worker", suspend, run, how, isolation=isolation).wait_blocked(by=holding)
    assert holding.go_on().result() is True
    assert suspending.outcome() is ReleaseExecution
    assert Execution.objects.count() == 1


@isolations
def test_a_claim_that_comes_first_is_not_taken_back(race: Race, isolation: IsolationLevel | None) -> None:
    execution = queued()
    claiming = race.hold("worker", claim_in_transaction, execution, isolation=isolation)
    holding = race.start("operator", hold, execution, isolation=isolation).wait_blocked(by=claiming)
    assert claiming.go_on().result() is True
    assert holding.result() is True
    row = fresh(execution)
    assert (row.status, row.is_held, row.dispatch_at) == (ExecutionStatus.RUNNING, True, None)


def test_a_claim_that_comes_second_finds_it_held(race: Race) -> None:
    execution = queued()
    holding = race.hold("operator", hold, execution)
    claiming = race.start("worker", claim_in_transaction, execution).wait_blocked(by=holding)
    assert holding.go_on().result() is True
    assert claiming.result() is False
    assert fresh(execution).status == ExecutionStatus.QUEUED


def test_a_tree_is_held_while_it_is_cancelled(race: Race) -> None:
    parent, child = family()
    transitions.release(child)
    holding = race.hold("operator", hold, parent)
    cancelling = race.start("other", transitions.request_cancel, parent.pk, "enough").wait_blocked(by=holding)
    holding.go_on().result()
    assert cancelling.result()
    transitions.cancel_flagged(parent.pk)
    transitions.cancel_flagged(child.pk)
    assert {fresh(parent).status, fresh(child).status} == {ExecutionStatus.CANCELLED}


# -------------------------------------------------------------------------------------- unpausing, and who was refused


def test_a_claim_that_is_refused_while_somebody_unpauses_is_not_stranded(race: Race) -> None:
    execution = queued()
    transitions.pause(TASK, "bank incident", "ana")
    unpausing = race.hold("operator", unpause)
    assert race.start("worker", claim_in_transaction, execution).result() is False, "it is paused until the commit"
    assert unpausing.go_on().result() is True
    # Its message is gone; the next sweep publishes another, and not one REDISPATCH_SECONDS later.
    assert [one.pk for one in transitions.take_for_dispatch(10)] == [execution.pk]
    assert goes_on(execution)


def test_what_is_parked_just_before_its_task_is_unpaused_is_given_back(race: Race) -> None:
    execution = queued()
    transitions.pause(TASK, "bank incident", "ana")
    parking = race.hold("sweeper", pausing.park, TASK, [execution.pk])
    unpausing = race.start("operator", unpause).wait_blocked(by=parking)
    parking.go_on().result()
    assert unpausing.result() is True
    assert goes_on(execution)


def test_what_is_to_be_parked_while_its_task_is_unpaused_is_not(race: Race) -> None:
    execution = queued()
    transitions.pause(TASK, "bank incident", "ana")
    unpausing = race.hold("operator", unpause, stop=BEFORE_COMMIT)
    race.start("sweeper", pausing.park, TASK, [execution.pk]).result()
    assert unpausing.go_on().result() is True
    assert not PausedTask.objects.exists()
    assert goes_on(execution)


@isolations
def test_a_sweeper_that_has_seen_the_pause_parks_nothing_after_it(race: Race, isolation: IsolationLevel | None) -> None:
    execution = queued()
    Execution.objects.update(dispatch_at=clock.after(-1))
    transitions.pause(TASK, "bank incident", "ana")
    sweeping = race.hold(
        "sweeper", transitions.take_for_dispatch, 10, stop="before transitions.pausing.park", isolation=isolation
    )
    assert unpause()
    assert sweeping.go_on().result() == []
    assert goes_on(execution)
