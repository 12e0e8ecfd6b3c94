"""Tags of one tree are written one writer after the other, so that there are never more than ten, and never orphans."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from conductor_app import api, transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import TooManyTags
from conductor_app.models import Execution, Tag
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import claimed, queued, running

pytestmark = pytest.mark.races

NINE = {f"k{number}": "v" for number in range(9)}

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def tag(execution: Execution, key: str, value: str = "v") -> None:
    api.tag(execution.pk, {key: value})


@isolations
@pytest.mark.parametrize("stop", ["before transitions.tagging.insert", BEFORE_COMMIT])
def test_of_two_writers_one_is_refused_the_eleventh_tag(race: Race, stop: str, isolation: Any) -> None:
    execution = queued(tags=NINE)
    first = race.hold("first", tag, execution, "first", stop=stop, isolation=isolation)
    second = race.start("second", tag, execution, "second", isolation=isolation).wait_blocked(by=first)

    first.go_on().result()

    assert second.outcome() is TooManyTags
    assert api.get_tags(execution) == {**NINE, "first": "v"}


@isolations
def test_of_two_writers_of_one_tag_the_last_one_counts(race: Race, isolation: Any) -> None:
    execution = queued()
    first = race.hold("first", tag, execution, "order", "7", isolation=isolation)
    second = race.start("second", tag, execution, "order", "8", isolation=isolation).wait_blocked(by=first)

    first.go_on().result()
    second.result()

    assert api.get_tags(execution) == {"order": "8"}


def test_a_claim_waits_for_a_tag_and_no_longer(race: Race) -> None:
    execution = queued()
    writer = race.hold("writer", tag, execution, "order")
    claim = race.start("claim", claimed, execution).wait_blocked(by=writer)

    writer.go_on().result()

    assert claim.result().pk == execution.pk
    assert api.get_tags(execution) == {"order": "v"}


def test_a_tree_that_is_being_tagged_is_pruned_later(race: Race) -> None:
    execution = running()
    transitions.succeed(execution, "1")
    writer = race.hold("writer", tag, execution, "order")

    assert race.start("pruner", pruner.prune, dt.timedelta(0)).result() == 0
    writer.go_on().result()
    assert pruner.prune(dt.timedelta(0)) == 1
    assert not Tag.objects.exists()


@isolations
def test_a_tree_that_is_being_pruned_is_not_tagged(race: Race, isolation: Any) -> None:
    execution = running()
    transitions.succeed(execution, "1")
    pruning = race.hold("pruner", pruner.prune, dt.timedelta(0))
    writer = race.start("writer", tag, execution, "order", isolation=isolation).wait_blocked(by=pruning)

    assert pruning.go_on().result() == 1

    assert writer.outcome() is Execution.DoesNotExist
    assert not Tag.objects.exists()
