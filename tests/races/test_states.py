"""What a body tells is written by the run that holds its execution, and by no other, however late it comes."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.db import transaction

from conductor_app import transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import LeaseLost
from conductor_app.models import Execution, PublishedState
from conductor_app.transitions import stating
from conductor_app.values.state import Told
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import OWNER, claimed, running

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def tell(run: Execution, done: int, *, is_new: bool = True, waits: bool = True) -> bool:
    return stating.state(run, Told(done=done), is_new=is_new, waits=waits)


def done() -> list[float | None]:
    return list(PublishedState.objects.values_list("done", flat=True))


def lock(execution: Execution) -> None:
    """Lock a row for as long as this stands at its stop."""
    with transaction.atomic():
        Execution.objects.select_for_update().get(pk=execution.pk)


@isolations
@pytest.mark.parametrize("is_new", [True, False])
def test_a_run_that_is_just_being_lost_cannot_tell(race: Race, is_new: bool, isolation: Any) -> None:
    zombie = running()
    if not is_new:
        assert tell(zombie, 1)
    sweeper = race.hold("sweeper", lambda: transitions.lose(zombie.pk, owner=OWNER))
    late = race.start("late", lambda: tell(zombie, 2, is_new=is_new), isolation=isolation).wait_blocked(by=sweeper)

    sweeper.go_on().result()

    assert late.outcome() is LeaseLost
    assert done() == ([] if is_new else [1])


@isolations
def test_what_a_run_tells_just_before_it_is_lost_is_overwritten_by_the_next(race: Race, isolation: Any) -> None:
    zombie = running()
    late = race.hold("late", lambda: tell(zombie, 1), isolation=isolation)
    assert race.start("sweeper", lambda: transitions.lose(zombie.pk, owner=OWNER)).result() is False  # it passes over

    assert late.go_on().result()
    assert transitions.lose(zombie.pk, owner=OWNER)

    # It looked before that was committed.
    assert tell(claimed(zombie, "test@host/2"), 2)
    assert done() == [2]


def test_a_body_does_not_wait_for_a_lock_of_its_row_and_its_last_word_does(race: Race) -> None:
    run = running()
    somebody = race.hold("somebody", lock, run, stop=BEFORE_COMMIT)

    assert race.start("first", lambda: tell(run, 1, waits=False)).result() is False
    last = race.start("last", lambda: tell(run, 2)).wait_blocked(by=somebody)
    somebody.go_on().result()
    assert last.result() is True
    assert done() == [2]


def test_a_tree_that_is_told_of_is_not_pruned_under_it(race: Race) -> None:
    run = running()
    late = race.hold("late", lambda: tell(run, 1))
    end = race.start("end", lambda: transitions.succeed(run, "1")).wait_blocked(by=late)
    assert late.go_on().result()
    end.result()

    assert pruner.prune(dt.timedelta(0)) == 1
    assert done() == []


def test_no_state_outlives_its_execution(race: Race) -> None:
    run = running()
    transitions.succeed(run, "1")
    pruning = race.hold("pruner", pruner.prune, dt.timedelta(0))
    assert race.start("late", lambda: tell(run, 1)).outcome() is LeaseLost
    assert pruning.go_on().result() == 1
    assert done() == []
