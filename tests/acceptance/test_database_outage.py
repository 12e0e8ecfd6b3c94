"""A database that restarts, stays away or ends its sessions delays executions and loses none."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.db import connection, connections, transaction

from conductor_app import api
from conductor_app.models import Execution
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.databases import end_other_sessions
from tests.support.polling import wait_until
from tests.support.postgres import PrivatePostgres
from tests.support.watching import wait_for_body, wait_for_status

LEASE_SECONDS = 3


def test_a_database_that_crashes_twice_under_a_running_worker_loses_nothing(
    worker: Any, postgres: PrivatePostgres
) -> None:
    started = worker(pool="prefork", concurrency=3, env={"DATABASE_URL": postgres.url})
    napping = scenarios.naps.delay(seconds=1)
    stepping = [scenarios.step_by_step.delay(steps=8, pause=0.1) for _ in range(3)]
    wait_for_body(scenarios.step_by_step)
    for _ in range(2):
        postgres.crash()
        postgres.start()
        connections["default"].close()
        queued = scenarios.pass_through.delay(value="queued")
        assert api.get_result(queued, timeout=40) == "queued"
    assert [api.get_result(result, timeout=40) for result in stepping] == [list(range(9))] * 3
    assert api.get_result(napping, timeout=20) == "rested"
    assert started.is_alive
    invariants.check()


def test_an_outage_longer_than_a_lease_costs_running_bodies_no_attempt(worker: Any, postgres: PrivatePostgres) -> None:
    started = worker(concurrency=2, env={"DATABASE_URL": postgres.url})
    # Due during the outage: a run that were just claimed when it begins would give up, and count as lost.
    waiting = scenarios.waits_for_the_nap.delay(seconds=LEASE_SECONDS + 0.5)
    wait_for_status(waiting, "waiting")
    running = scenarios.has_one_attempt.delay(seconds=LEASE_SECONDS + 4)
    wait_for_body(scenarios.has_one_attempt)
    postgres.crash()
    time.sleep(LEASE_SECONDS + 1.5)
    postgres.start()
    connections["default"].close()
    assert api.get_result(scenarios.pass_through.delay(value="back"), timeout=40) == "back"
    assert api.get_result(waiting, timeout=40) == "rested"
    assert api.get_result(running, timeout=40) == "done"
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert started.is_alive
    invariants.check()


def test_a_worker_that_starts_before_its_database_works_when_it_is_there(
    worker: Any, postgres: PrivatePostgres
) -> None:
    result = scenarios.pass_through.delay(value="patience")
    postgres.crash()
    started = worker(env={"DATABASE_URL": postgres.url})
    wait_until(lambda: "Sweeping failed, the database says" in started.log, message="The worker does not say why")
    postgres.start()
    connections["default"].close()
    assert api.get_result(result, timeout=40) == "patience"
    assert "Traceback" not in started.log
    invariants.check()


@pytest.mark.usefixtures("recorded")
def test_sessions_that_the_server_ends_lose_nothing(worker: Any) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no server and no sessions")
    started = worker(pool="threads", concurrency=3)
    stepping = [scenarios.step_by_step.delay(steps=10, pause=0.05) for _ in range(3)]
    parents = [scenarios.pass_through.delay(value=value) for value in range(10)]
    wait_for_body(scenarios.step_by_step)
    for _ in range(20):
        end_other_sessions()
        time.sleep(0.1)
    assert [api.get_result(result, timeout=60) for result in stepping] == [list(range(11))] * 3
    assert [api.get_result(result, timeout=60) for result in parents] == list(range(10))
    assert started.is_alive
    invariants.check()


@pytest.mark.usefixtures("recorded")
def test_a_database_that_somebody_else_locks_for_longer_than_a_lease_costs_no_attempt(worker: Any) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("only SQLite has one lock for all")
    started = worker(concurrency=2)
    running = scenarios.waits_for_lingerer.delay(seconds=1)
    wait_for_body(scenarios.lingers)
    queued = scenarios.pass_through.delay(value="queued")
    with transaction.atomic():
        time.sleep(LEASE_SECONDS + 1)
    assert api.get_result(running, timeout=30) == {"attempt": 1}
    assert api.get_result(queued, timeout=30) == "queued"
    assert count("late") == 1
    invariants.check(started)
