"""Two who want a place, and one who frees it: in whatever order they commit, nobody is over the limit or forgotten."""

from __future__ import annotations

import functools
import uuid
from typing import Any

import pytest

from conductor_app import api, transitions
from conductor_app.engine import limits, sweeper
from conductor_app.engine.run import RunEnded
from conductor_app.models import Execution, Place
from conductor_app.store.owners import lease_owner
from conductor_app.transitions import limiting
from tests.app import limited
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def queued(key: str = "a", task: Any = limited.gives) -> Execution:
    return Execution.objects.get(pk=task.delay(key).id)


def claim(execution: Execution, task: Any = limited.gives) -> Execution | str:
    """Claim as a worker does; return why it is parked."""
    try:
        taken = limits.claim(uuid.UUID(str(execution.pk)), lease_owner("w@h"), task)
    except RunEnded as ended:
        return str(ended)
    assert taken is not None
    return taken


def claimed(execution: Execution) -> Execution:
    taken = claim(execution)
    assert isinstance(taken, Execution)
    return taken


def places(execution: Execution) -> list[str]:
    return list(Place.objects.filter(execution=execution).values_list("state", flat=True))


def is_due(execution: Execution) -> bool:
    return bool(Execution.objects.filter(pk=execution.pk).claimable().exists())


@isolations
def test_of_two_claims_one_gets_the_place_and_the_other_waits(race: Race, isolation: Any) -> None:
    one, other = queued(), queued()
    first = race.hold("first", claim, one, stop=BEFORE_COMMIT, isolation=isolation)
    second = race.start("second", claim, other, isolation=isolation).wait_blocked(by=first)

    assert first.go_on().result().pk == one.pk
    assert "waits for a place" in second.result()
    assert (places(one), places(other)) == (["held"], ["parked"])


@isolations
def test_an_end_waits_for_one_that_is_just_parked_and_hands_it_the_place(race: Race, isolation: Any) -> None:
    running, other = claimed(queued()), queued()
    parker = race.hold("parker", claim, other, stop=BEFORE_COMMIT, isolation=isolation)
    ender = race.start("ender", transitions.release, running, isolation=isolation).wait_blocked(by=parker)

    assert "waits for a place" in parker.go_on().result()
    ender.result()

    assert places(other) == ["granted"]
    assert is_due(other)


@isolations
def test_one_that_is_parked_before_an_end_is_committed_gets_its_place(race: Race, isolation: Any) -> None:
    running, other = claimed(queued()), queued()
    ender = race.hold("ender", transitions.release, running, stop=BEFORE_COMMIT, isolation=isolation)

    assert "waits for a place" in race.start("parker", claim, other, isolation=isolation).result()
    ender.go_on().result()

    assert places(other) == ["granted"]
    assert is_due(other)


def test_one_that_is_being_cancelled_is_passed_over(race: Race) -> None:
    running, first, second = claimed(queued()), queued(), queued()
    assert isinstance(claim(first), str)
    assert isinstance(claim(second), str)
    canceller = race.hold("canceller", transitions.cancel_flagged, flagged(first), stop=BEFORE_COMMIT)

    race.start("ender", transitions.release, running).result()
    canceller.go_on().result()

    assert (places(first), places(second)) == ([], ["granted"])
    assert is_due(second)


def flagged(execution: Execution) -> uuid.UUID:
    transitions.request_cancel(execution.pk, "the shop is closed", lambda **_: None)
    return execution.pk


def test_two_that_hand_on_give_one_place_once(race: Race) -> None:
    running, first, second = claimed(queued()), queued(), queued()
    for one in (first, second):
        assert isinstance(claim(one), str)
    ender = race.hold("ender", transitions.release, running, stop="before transitions.limiting._hand_out")
    # It waits for nobody; the ender has the key.
    assert race.start("sweeper", functools.partial(sweeper.sweep, publish=False)).result()["places"] == 0
    ender.go_on().result()

    assert sorted(places(first) + places(second)) == ["granted", "parked"]


def test_one_that_comes_while_a_sweep_hands_the_place_on_waits(race: Race) -> None:
    running, parked, other = claimed(queued()), queued(), queued()
    assert isinstance(claim(parked), str)
    # Its worker has died after the end.
    Execution.objects.filter(pk=running.pk).update(
        status="cancelled", finished_at=running.created_at, lease_expires_at=None, lease_owner=""
    )
    handing = race.hold("sweeper", limiting.hand_on, (limited.one_run.name, "a"), stop=BEFORE_COMMIT)
    coming = race.start("other", claim, other).wait_blocked(by=handing)
    handing.go_on().result()

    assert isinstance(coming.result(), str)
    assert (places(parked), places(other)) == (["granted"], ["parked"])


def test_an_operators_retry_and_the_next_one_do_not_both_get_the_place(race: Race) -> None:
    holder, other = queued(task=limited.keeps), queued(task=limited.keeps)
    running = claim(holder, limited.keeps)
    assert isinstance(running, Execution)
    assert isinstance(claim(other, limited.keeps), str)
    flagged(holder)
    ender = race.hold("ender", transitions.cancel_running, running, stop="before transitions.limiting.leave")
    api.retry(holder.pk)
    ender.go_on().result()

    taken = [one for one in (holder, other) if is_due(one) and isinstance(claim(one, limited.keeps), Execution)]
    assert len(taken) == 1
