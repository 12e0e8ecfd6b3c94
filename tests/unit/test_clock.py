"""The database's clock, and nobody else's."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection

from conductor_app.models import Execution
from conductor_app.store import clock
from tests.app import scenarios
from tests.app.models import Ledger
from tests.support.bodies import go_on, reload

pytestmark = pytest.mark.django_db

#: The clocks of the database and of this process may differ; here, both are on one machine or in one rack.
TOLERANCE = dt.timedelta(minutes=5)


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@pytest.fixture
def far_session() -> Iterator[None]:
    """A session whose time zone is not UTC, as on a server where somebody has set it."""
    statements = {"mysql": ("SET time_zone = '+05:00'", "SET time_zone = 'SYSTEM'")}
    if connection.vendor not in statements:
        pytest.skip("only MySQL's functions depend on the session's time zone")
    there, back = statements[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(there)
    yield
    with connection.cursor() as cursor:
        cursor.execute(back)


def stored_now() -> dt.datetime:
    """What a statement stores as now, read back through the ORM."""
    return reload(scenarios.echo.delay()).created_at


def test_now_is_now_in_utc() -> None:
    assert abs(stored_now() - dt.datetime.now(dt.UTC)) < TOLERANCE
    assert abs(clock.read("default") - dt.datetime.now(dt.UTC)) < TOLERANCE
    assert clock.read("default").tzinfo is not None


@pytest.mark.usefixtures("far_session")
def test_the_time_zone_of_the_session_does_not_matter() -> None:
    assert abs(stored_now() - dt.datetime.now(dt.UTC)) < TOLERANCE
    assert abs(clock.read("default") - dt.datetime.now(dt.UTC)) < TOLERANCE
    result = scenarios.naps.apply_async(kwargs={"seconds": 60}, countdown=1)
    assert go_on() == 1
    clock.shift(dt.timedelta(seconds=2))
    go_on()
    assert reload(result).status == "waiting"
    clock.shift(dt.timedelta(seconds=58))
    assert go_on() == 0
    clock.shift(dt.timedelta(seconds=3))
    go_on()
    assert reload(result).get_result() == "rested"


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_without_use_tz_instants_are_local_and_naive(settings: Any, zone: str) -> None:
    settings.USE_TZ = False
    settings.TIME_ZONE = zone
    local = dt.datetime.now()  # noqa: DTZ005 - what Django stores without USE_TZ
    now = clock.read("default")
    assert now.tzinfo is None
    if connection.vendor != "mysql":  # there, it is the time zone of the server, as with any other naive instant
        assert abs(now - local) < TOLERANCE
    result = scenarios.naps.delay(seconds=60)
    go_on()
    clock.shift(dt.timedelta(seconds=50))
    assert go_on() == 0
    clock.shift(dt.timedelta(seconds=11))
    go_on()
    execution = reload(result)
    assert execution.get_result() == "rested"
    assert execution.created_at.tzinfo is None
    assert execution.created_at <= execution.started_at <= execution.finished_at
    aware = dt.datetime(2026, 7, 1, 12, tzinfo=dt.UTC)
    assert clock.aware(aware).tzinfo is None


def test_an_instant_is_the_start_of_its_statement_and_not_of_its_transaction() -> None:
    first = clock.read("default")
    deadline = time.monotonic() + 5
    while clock.read("default") == first and time.monotonic() < deadline:
        time.sleep(0.002)
    assert clock.read("default") > first


def test_fractions_of_a_second_count() -> None:
    scenarios.echo.apply_async(countdown=0.25)
    execution = Execution.objects.get()
    assert dt.timedelta(seconds=0.24) < execution.due_at - execution.created_at < dt.timedelta(seconds=0.5)


def test_the_clock_can_be_shifted_and_reset() -> None:
    before = stored_now()
    clock.shift(dt.timedelta(days=3))
    clock.shift(dt.timedelta(days=-1))
    assert dt.timedelta(days=2) <= stored_now() - before < dt.timedelta(days=2) + TOLERANCE
    assert dt.timedelta(days=2) <= clock.read("default") - before < dt.timedelta(days=2) + TOLERANCE
    clock.reset()
    assert abs(stored_now() - before) < TOLERANCE


def test_instants_can_be_compared_in_sql() -> None:
    Ledger.objects.create(key="now", pid=1)
    rows = Ledger.objects.filter(key="now")
    assert rows.filter(created_at__lte=clock.after(600), created_at__gt=clock.after(-600)).exists()
    assert not rows.filter(created_at__gt=clock.after(dt.timedelta(days=1))).exists()
