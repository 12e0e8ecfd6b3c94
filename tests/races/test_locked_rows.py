"""What sweepers and heartbeats do about a row that somebody has locked: nothing, and something else meanwhile."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.db import transaction

from conductor_app import transitions
from conductor_app.engine import sweeper
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock, locks
from conductor_app.transitions import leases, steps
from tests.races.harness import Actor, Race
from tests.support.executions import family, fresh, napping, running, step_of
from tests.support.polling import wait_until

pytestmark = pytest.mark.races


def lock(*executions: Execution) -> None:
    """As a view does that sends an event and then calls something slow."""
    with transaction.atomic():
        rows = Execution.objects.select_for_update(no_key=True)
        assert len(rows.filter(pk__in=[execution.pk for execution in executions])) == len(executions)


def locked(race: Race, *executions: Execution) -> Actor:
    return race.hold("view", lock, *executions)


def overdue() -> list[Step]:
    Step.objects.update(deadline_at=clock.after(-1))
    return steps.overdue(100)


def in_background(act: Any, *args: Any) -> Any:
    with locks.waiting_at_most(0.001, "default"):
        return act(*args)


@pytest.mark.parametrize("which", ["parent", "child"])
def test_of_many_deadlines_those_of_locked_executions_are_left(race: Race, which: str) -> None:
    parent, child = family(timeout=60)
    other, late = family(timeout=60)
    asleep = napping()
    found = overdue()
    viewing = locked(race, parent if which == "parent" else child)
    decided = race.start("sweeper", transitions.decide_overdue_together, found).result()
    assert decided == {step_of(other).pk, step_of(asleep, "nap").pk}
    assert (step_of(other).status, fresh(other).status) == (StepStatus.TIMED_OUT, ExecutionStatus.QUEUED)
    assert (step_of(asleep, "nap").status, fresh(asleep).status) == (StepStatus.SUCCEEDED, ExecutionStatus.QUEUED)
    assert fresh(late).cancel_requested_at is not None
    assert (step_of(parent).status, fresh(parent).status) == (StepStatus.PENDING, ExecutionStatus.WAITING)
    assert fresh(child).cancel_requested_at is None, "of what is left, nothing is written"
    viewing.go_on().result()
    assert transitions.decide_overdue_together(found) == {step_of(parent).pk}
    assert fresh(child).cancel_reason == "its parent's timeout of 60s ended"


def test_a_child_that_is_just_ending_settles_its_step_itself(race: Race) -> None:
    parent, child = family(timeout=60)
    found = overdue()
    ending = race.hold("child", transitions.succeed, child, "1")
    assert race.start("sweeper", transitions.decide_overdue_together, found).result() == set()
    ending.go_on().result()
    assert transitions.decide_overdue_together(found) == set()
    assert (step_of(parent).status, fresh(parent).status) == (StepStatus.SUCCEEDED, ExecutionStatus.QUEUED)


@pytest.mark.parametrize("which", ["parent", "child"])
def test_one_deadline_is_left_as_a_whole(race: Race, which: str) -> None:
    parent, child = family(timeout=60)
    (found,) = overdue()
    viewing = locked(race, parent if which == "parent" else child)
    sweeping = race.start("sweeper", in_background, transitions.decide_overdue, found)
    assert sweeping.outcome() is locks.RowsLocked
    assert fresh(child).cancel_requested_at is None
    assert step_of(parent).status == StepStatus.PENDING
    viewing.go_on().result()
    assert in_background(transitions.decide_overdue, found) is True


def test_a_cancel_is_left_as_a_whole(race: Race) -> None:
    parent, child = family()
    transitions.request_cancel(parent.pk, "enough")
    viewing = locked(race, child)
    assert race.start("sweeper", in_background, transitions.cancel_flagged, parent.pk).outcome() is locks.RowsLocked
    assert fresh(parent).status == ExecutionStatus.WAITING
    viewing.go_on().result()
    assert in_background(transitions.cancel_flagged, parent.pk) is True
    assert fresh(child).cancel_requested_at is not None


def test_a_sweep_leaves_what_is_locked_says_how_much_and_comes_back(race: Race) -> None:
    in_use = [napping() for _ in range(3)]
    free = napping()
    overdue()
    viewing = locked(race, *in_use)
    for done in (1, 0, 0):
        found = sweeper.sweep(publish=False)
        assert (found["overdue_steps"], found["locked"]) == (done, 3)
        assert not found.has_more, "the next sweep need not come at once"
    assert fresh(free).status == ExecutionStatus.QUEUED
    viewing.go_on().result()
    assert sweeper.sweep(publish=False) == {"overdue_steps": 3}
    assert {fresh(execution).status for execution in in_use} == {ExecutionStatus.QUEUED}
    assert sweeper.sweep(publish=False) == {}


def test_a_lease_is_not_taken_away_just_after_its_row_was_locked(race: Race) -> None:
    run = running()
    Execution.objects.update(lease_expires_at=clock.after(-1))
    viewing = locked(race, run)
    assert sweeper.sweep(publish=False) == {"locked": 1}
    viewing.go_on().result()
    assert sweeper.sweep(publish=False) == {"locked": 1}, "its worker is to get at the row first"
    lease = leases.Lease(run)
    assert leases.renew([lease]) == []
    assert sweeper.sweep(publish=False) == {}
    assert (lease.lost, fresh(run).status) == (False, ExecutionStatus.RUNNING)


def test_a_dead_workers_lease_is_taken_away_some_time_after_its_row_was_locked(race: Race) -> None:
    run = running()
    Execution.objects.update(lease_expires_at=clock.after(-1))
    viewing = locked(race, run)
    assert sweeper.sweep(publish=False) == {"locked": 1}
    viewing.go_on().result()
    wait_until(lambda: sweeper.sweep(publish=False) == {"lapsed_leases": 1}, interval=0.1)
    assert fresh(run).attempt == 2


def test_a_locked_row_delays_the_renewal_of_its_own_lease_alone(race: Race) -> None:
    held = [leases.Lease(running()) for _ in range(3)]
    Execution.objects.update(lease_expires_at=clock.after(-1))
    viewing = locked(race, held[1].execution)
    assert race.start("heartbeat", leases.renew, held).result() == [held[1]]
    assert Execution.objects.lapsed().get() == held[1].execution
    assert not any(lease.lost for lease in held)
    waiting = race.start("heartbeat", leases.renew_locked, held[1], 20).wait_blocked(by=viewing)
    # A sweeper that comes just then is not before it.
    assert race.start("sweeper", transitions.lose, held[1].execution.pk).result() is False
    viewing.go_on().result()
    waiting.result()
    assert not Execution.objects.lapsed().exists()


def test_a_renewal_gives_up_waiting(race: Race) -> None:
    lease = leases.Lease(running())
    viewing = locked(race, lease.execution)
    began = time.monotonic()
    race.start("heartbeat", leases.renew_locked, lease, 0.1).result()
    assert time.monotonic() - began < 10
    assert (lease.locked_since is not None, lease.lost) == (True, False)
    viewing.go_on().result()
