"""Two connections that meet at a schedule, a hold, a pause, a limit or an old tree, in an order of steps.

On each database; ``tests/races`` stops them inside of a move, on PostgreSQL.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection
from django.db.models import F

from conductor_app import DurableTask, api, transitions
from conductor_app.engine import limits, pruner, schedules, sweeper
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, PausedTask, Place, Schedule
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.owners import lease_owner
from conductor_app.store.process import process
from conductor_app.transitions import pausing
from tests.app import limited
from tests.support.executions import FAILURE, OWNER, TASK, committing, family, fresh, queued, running
from tests.support.process import NotingBroker
from tests.support.schedules import row
from tests.support.schedules import schedules as scheduling
from tests.support.sessions import OPTIONS, Actor, in_turn


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test."""
    process.broker = NotingBroker()
    with committing(django_db_blocker):
        yield
        PausedTask.objects.all().delete()


@pytest.fixture(params=range(2))
def options(request: pytest.FixtureRequest, transactional_db: None) -> dict[str, Any]:
    """The options of the connections of each actor."""
    each = OPTIONS[connection.vendor]
    if request.param >= len(each):
        pytest.skip("no other isolation level")
    return each[request.param]


def goes_on(execution: Execution) -> bool:
    """Tell whether an execution is to be published, and can be claimed then."""
    is_parked = Execution.objects.filter(pk=execution.pk, dispatch_at=clock.Never()).exists()
    return not is_parked and transitions.claim(execution.pk, OWNER) is not None


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.fixture
def scheduled(options: dict[str, Any]) -> Iterator[Callable[..., DurableTask[..., Any]]]:
    """Stores a schedule of which an instant has come a moment ago, and returns its task."""
    with scheduling() as decorate:

        def due(**given: Any) -> DurableTask[..., Any]:
            task = decorate(cron="0 0 1 1 *", **given)
            sweeper.sweep()
            Schedule.objects.filter(pk=row(task).pk).update(next_at=clock.after(-1), version=F("version") + 1)
            return task

        yield due
    Schedule.objects.all().delete()


def sees(task: DurableTask[..., Any]) -> Callable[[], int]:
    """What a sweeper does that has read the schedule just now."""
    watch, name = schedules.Watch(), row(task).name
    assert name in watch.to_do([])
    return lambda: watch.act(name)


def run_now(task: DurableTask[..., Any]) -> Callable[[], Execution | None]:
    return functools.partial(api.run_schedule, row(task).name)


def instants(task: DurableTask[..., Any]) -> list[Any]:
    return [one.get_options()["scheduled_at"] for one in Execution.objects.filter(task=task.name)]


def test_of_two_sweepers_at_one_tick_one_starts_it(options: Any, scheduled: Any) -> None:
    task = scheduled(overlap="allow")

    assert in_turn(options, sees(task), sees(task)) == [1, 0]
    assert len(instants(task)) == 1


def test_a_tick_that_waits_for_a_pause_starts_nothing(options: Any, scheduled: Any) -> None:
    task = scheduled()

    assert in_turn(options, lambda: api.pause_schedule(row(task).name), sees(task)) == [True, 0]
    assert sweeper.sweep()["schedules"] == 0
    assert instants(task) == []


def test_a_pause_that_waits_for_a_tick_lets_it_start(options: Any, scheduled: Any) -> None:
    task = scheduled(overlap="allow")
    name = row(task).name

    assert in_turn(options, sees(task), lambda: api.pause_schedule(name)) == [1, True]
    assert len(instants(task)) == 1
    assert row(task).paused_at is not None


@pytest.mark.parametrize(("overlap", "started"), [("skip", 1), ("allow", 2)])
def test_a_tick_that_waits_for_somebody_who_runs_it_now(
    options: Any, scheduled: Any, overlap: str, started: int
) -> None:
    task = scheduled(overlap=overlap)
    instant = row(task).next_at

    first, second = in_turn(options, run_now(task), sees(task))
    assert (isinstance(first, Execution), second) == (True, 0)
    assert instant not in instants(task)
    # Its instant is not forgotten: the next look decides about it, by what is open now.
    sweeper.sweep()
    assert len(instants(task)) == started
    assert row(task).last_tick_at == instant


@pytest.mark.parametrize("overlap", ["skip", "queue", "allow", "replace"])
def test_somebody_who_runs_it_now_waits_for_a_tick(options: Any, scheduled: Any, overlap: str) -> None:
    task = scheduled(overlap=overlap)
    instant = row(task).next_at

    first, second = in_turn(options, sees(task), run_now(task))
    assert first == 1
    assert instant in instants(task)
    if overlap == "skip":
        assert isinstance(second, ActionRefused)
    elif overlap == "allow":
        assert isinstance(second, Execution)
    else:
        assert second is None
        assert len(row(task).waiting_instants) == 1
    assert len(instants(task)) == (2 if overlap == "allow" else 1)


# ---------------------------------------------------------------------------------------------------- holds and pauses


def hold(execution: Execution) -> Callable[[], bool]:
    return lambda: transitions.hold(execution.pk, "bank incident", "ana", tree=False)


def release(execution: Execution) -> Callable[[], bool]:
    return lambda: transitions.release_held(execution.pk)


def claim(execution: Execution) -> Callable[[], Execution | None]:
    return lambda: transitions.claim(execution.pk, OWNER)


def test_a_claim_that_waits_for_a_hold_finds_it_held(options: Any) -> None:
    execution = queued()

    assert in_turn(options, hold(execution), claim(execution)) == [True, None]
    assert release(execution)()
    assert goes_on(execution)


def test_a_hold_that_waits_for_a_claim_does_not_take_it_back(options: Any) -> None:
    execution = queued()

    taken, is_held = in_turn(options, claim(execution), hold(execution))
    assert (taken.pk, is_held) == (execution.pk, True)
    assert (fresh(execution).status, fresh(execution).is_held) == (ExecutionStatus.RUNNING, True)


@pytest.mark.parametrize("order", ["the end first", "the release first"])
def test_a_parent_goes_on_that_is_released_while_its_child_ends(options: Any, order: str) -> None:
    parent, child = family()
    hold(parent)()
    acts: list[Callable[[], Any]] = [lambda: transitions.succeed(child, "1"), release(parent)]

    in_turn(options, *(acts if order == "the end first" else reversed(acts)))
    assert not fresh(parent).is_held
    assert goes_on(parent)


@pytest.mark.parametrize("order", ["the pause first", "the claim first"])
def test_a_claim_beside_a_pause_is_made_or_can_be_made_later(options: Any, order: str) -> None:
    execution = queued()
    acts: list[Callable[[], Any]] = [lambda: transitions.pause(TASK, "bank incident", "ana"), claim(execution)]
    first, second = acts if order == "the pause first" else reversed(acts)
    holding = Actor(options, first, holds=True).held()
    # Whether it waits, or does not see what is not committed, is the database's matter.
    other = Actor(options, second)
    outcomes = [holding.go_on(), other.outcome()]
    assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)]

    is_running = fresh(execution).status == ExecutionStatus.RUNNING
    assert is_running or order == "the pause first"
    assert claim(queued())() is None, "it is paused"
    assert transitions.unpause(TASK)
    assert is_running or goes_on(execution)


@pytest.mark.parametrize("order", ["parked first", "unpaused first"])
def test_what_is_parked_while_its_task_is_unpaused_goes_on(options: Any, order: str) -> None:
    execution = queued()
    transitions.pause(TASK, "bank incident", "ana")
    park = functools.partial(pausing.park, TASK, [execution.pk])
    unpause = functools.partial(transitions.unpause, TASK)
    if order == "parked first":
        assert in_turn(options, park, unpause) == [None, True]
    else:
        holding = Actor(options, unpause, holds=True).held()
        parking = Actor(options, park)
        if connection.vendor != "sqlite":  # it has one lock for all
            parking.outcome()  # it waits for nobody
        assert [holding.go_on(), parking.outcome()] == [True, None]
    assert goes_on(execution)


# ------------------------------------------------------------------------------------------------------------- limits


def limited_claim(execution: Execution) -> Callable[[], Execution | str]:
    """Claim as a worker does; why it is parked, if it is."""

    def call() -> Execution | str:
        try:
            taken = limits.claim(execution.pk, lease_owner("w@h"), limited.gives)
        except RunEnded as ended:
            return str(ended)
        assert taken is not None
        return taken

    return call


def limited_queued() -> Execution:
    return Execution.objects.get(pk=limited.gives.delay("a").id)


def places(execution: Execution) -> list[str]:
    return list(Place.objects.filter(execution=execution).values_list("state", flat=True))


def test_of_two_claims_one_gets_the_place(options: Any) -> None:
    one, other = limited_queued(), limited_queued()

    first, second = in_turn(options, limited_claim(one), limited_claim(other))
    assert isinstance(first, Execution)
    assert "waits for a place" in second
    assert (places(one), places(other)) == (["held"], ["parked"])


def test_an_end_that_waits_for_one_that_is_parked_hands_it_the_place(options: Any) -> None:
    taken, other = limited_claim(limited_queued())(), limited_queued()
    assert isinstance(taken, Execution)

    parked, end = in_turn(options, limited_claim(other), lambda: transitions.release(taken))
    assert "waits for a place" in parked
    assert not isinstance(end, BaseException), repr(end)
    assert places(other) == ["granted"]


def test_one_that_is_parked_while_the_holder_is_lost_is_not_let_go(options: Any) -> None:
    taken, other = limited_claim(limited_queued())(), limited_queued()
    assert isinstance(taken, Execution)

    parking = Actor(options, limited_claim(other), holds=True).held()
    losing = Actor(options, lambda: transitions.lose(taken.pk, owner=taken.lease_owner))
    assert "waits for a place" in parking.go_on()
    assert losing.outcome()
    sweeper.sweep(publish=False)
    assert places(other) == ["parked"]


@pytest.mark.parametrize("how", ["held", "paused"])
def test_a_place_that_was_granted_to_one_that_people_keep_from_beginning_is_anothers(options: Any, how: str) -> None:
    taken, first, second = limited_claim(limited_queued())(), limited_queued(), limited_queued()
    assert isinstance(taken, Execution)
    for one in (first, second):
        assert isinstance(limited_claim(one)(), str)
    transitions.release(taken)
    assert (places(first), places(second)) == (["granted"], ["parked"])

    if how == "held":
        hold(first)()
    else:
        transitions.pause(limited.gives.name, "bank incident", "ana")
        # Of another task that has the limit.
        Execution.objects.filter(pk=second.pk).update(task=limited.holds_until_told.name)
    sweeper.sweep(publish=False)
    assert places(second) == ["granted"]


# ---------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize("order", ["pruned first", "retried first"])
def test_an_old_tree_is_pruned_or_retried(options: Any, order: str) -> None:
    run = running()
    transitions.fail(run, FAILURE)
    Execution.objects.filter(pk=run.pk).update(finished_at=clock.after(-3_600))
    prune = functools.partial(pruner.prune, dt.timedelta(minutes=1))
    retry = functools.partial(transitions.reopen, run.pk)
    if order == "pruned first":
        pruned, retried = in_turn(options, prune, retry)
        assert (pruned, type(retried)) == (1, Execution.DoesNotExist)
        assert not Execution.objects.exists()
    else:
        retrying = Actor(options, retry, holds=True).held()
        pruning = Actor(options, prune)
        retrying.go_on()
        assert pruning.outcome() == 0
        assert fresh(run).status == ExecutionStatus.QUEUED
