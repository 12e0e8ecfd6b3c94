"""A run that tells something while its execution is taken from it, on each database; ``tests/races`` has more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from conductor_app import transitions
from conductor_app.exceptions import LeaseLost
from conductor_app.models import PublishedState
from conductor_app.store.process import process
from conductor_app.transitions import stating
from conductor_app.values.state import Told
from tests.support.executions import OWNER, claimed, committing, running
from tests.support.process import NotingBroker
from tests.support.sessions import OPTIONS, in_turn


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test."""
    process.broker = NotingBroker()
    with committing(django_db_blocker):
        yield


@pytest.fixture(params=range(2))
def options(request: pytest.FixtureRequest, transactional_db: None) -> dict[str, Any]:
    """The options of the connections of each actor."""
    each = OPTIONS[connection.vendor]
    if request.param >= len(each):
        pytest.skip("no other isolation level")
    return each[request.param]


def done() -> list[float | None]:
    return list(PublishedState.objects.values_list("done", flat=True))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_run_that_is_just_being_lost_cannot_tell(options: dict[str, Any], is_new: bool) -> None:
    zombie = running()
    if not is_new:
        assert stating.state(zombie, Told(done=1), is_new=True)

    lost, late = in_turn(
        options,
        lambda: transitions.lose(zombie.pk, owner=OWNER),
        lambda: stating.state(zombie, Told(done=2), is_new=is_new, waits=True),
    )

    assert lost
    assert isinstance(late, LeaseLost)
    assert done() == ([] if is_new else [1])


def test_a_run_that_was_lost_cannot_tell_beside_the_next_one(options: dict[str, Any]) -> None:
    zombie = running()
    transitions.lose(zombie.pk, owner=OWNER)
    run = claimed(zombie, "test@host/2")

    told, late = in_turn(
        options,
        lambda: stating.state(run, Told(done=2), is_new=True),
        lambda: stating.state(run, Told(done=3), is_new=True, waits=True),
    )

    assert (told, late) == (True, True)
    with pytest.raises(LeaseLost):
        stating.state(zombie, Told(done=4), is_new=False)
    assert done() == [3]
