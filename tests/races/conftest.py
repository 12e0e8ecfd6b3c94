"""The fixture ``race``."""

from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app.store.process import process
from tests.races.harness import FORMS, Race
from tests.support.executions import committing
from tests.support.process import NotingBroker


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test, and takes a second for that."""
    with committing(django_db_blocker):
        yield


@pytest.fixture(params=FORMS)
def race(request: pytest.FixtureRequest, transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Race]:
    """Several connections to the test database, and a broker that nobody listens to; once with each form of moves."""
    process.broker = NotingBroker()
    race = Race(monkeypatch, request.param)
    yield race
    race.end()
