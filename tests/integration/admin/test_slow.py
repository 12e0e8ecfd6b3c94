"""The page that tells what takes long."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Attempt, Execution
from conductor_app.store import clock
from conductor_app.telling import slow
from tests.support.executions import claimed, napping, queued, running

pytestmark = pytest.mark.django_db

PAGE = "admin:conductor_app_execution_slow"
FAILURE = Failure(type="shop.NoStock", message="none left")


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    cache.clear()
    yield
    clock.reset()


@pytest.fixture
def staff(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def ended(task: str, *, queue: float, run: float, fails: bool = False) -> Execution:
    """Return an execution that was in the queue, and ran, for so many seconds."""
    execution = queued(task=task)
    clock.shift(dt.timedelta(seconds=queue))
    begun = claimed(execution)
    clock.shift(dt.timedelta(seconds=run))
    if fails:
        transitions.fail(begun, FAILURE)
    else:
        transitions.succeed(begun, "1")
    return execution


def test_shares_are_values_that_were_measured() -> None:
    assert slow.shares([]) is None
    assert slow.shares([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert slow.shares([float(number) for number in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_the_time_in_the_queue_stands_apart_from_the_run(staff: Client) -> None:
    ended("shop.quick", queue=300, run=1)
    ended("shop.heavy", queue=1, run=200)
    ended("shop.heavy", queue=1, run=100, fails=True)
    tasks = staff.get(reverse(f"{PAGE}_json")).json()["tasks"]
    assert [(one["task"], one["runs"], one["failures"]) for one in tasks] == [
        ("shop.heavy", 2, 1),
        ("shop.quick", 1, 0),
    ]
    heavy, quick = tasks
    assert (round(heavy["run_seconds"]["p50"]), round(heavy["run_seconds"]["p99"])) == (100, 200)
    assert (round(quick["run_seconds"]["p95"]), round(quick["queue_seconds"]["p95"])) == (1, 300)
    assert round(quick["whole_seconds"]["p50"]) == 301


def test_a_period_ends(staff: Client) -> None:
    ended("shop.old", queue=0, run=5)
    clock.shift(dt.timedelta(hours=2))
    ended("shop.new", queue=0, run=5)

    def tasks(period: str) -> set[str]:
        document = staff.get(reverse(f"{PAGE}_json"), {"period": period}).json()
        return {one["task"] for one in document["tasks"]}

    assert tasks("hour") == {"shop.new"}
    assert tasks("day") == {"shop.new", "shop.old"}
    assert tasks("nonsense") == tasks("hour")


def test_it_names_what_runs_and_what_waits_now(staff: Client) -> None:
    begun, waiting = running(task="shop.runs"), napping()
    page = staff.get(reverse(PAGE)).content.decode()
    for execution in (begun, waiting):
        assert reverse("admin:conductor_app_execution_change", args=[execution.pk]) in page


def test_the_page_takes_as_many_queries_for_many_as_for_few(staff: Client) -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            assert staff.get(reverse(PAGE)).status_code == 200
        return len(captured)

    ended("shop.a", queue=0, run=1)
    running()
    napping()
    before = queries()
    cache.clear()
    for number in range(30):
        ended(f"shop.task{number}", queue=0, run=1)
        running()
        napping()
    assert queries() == before <= 8


def test_only_the_latest_are_looked_through(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        ended("shop.a", queue=0, run=1)
    monkeypatch.setattr(slow, "LATEST", 2)
    document = staff.get(reverse(f"{PAGE}_json")).json()
    assert document["tasks"][0]["runs"] == 2
    assert document["is_complete"] is False


def test_a_run_whose_execution_is_gone_is_no_trouble(staff: Client) -> None:
    execution = ended("shop.a", queue=0, run=1)
    Execution.objects.filter(pk=execution.pk)._raw_delete("default")
    assert Attempt.objects.exists()
    assert staff.get(reverse(PAGE)).status_code == 200


def test_it_takes_the_permission_to_see_executions(client: Client) -> None:
    client.force_login(User.objects.create_user("ben", is_staff=True))
    assert client.get(reverse(PAGE)).status_code == 403
    assert client.get(reverse(f"{PAGE}_json")).status_code == 403
