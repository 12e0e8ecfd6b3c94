"""Bodies that hold every connection of a pool do not keep the engine from its own."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from django.db import connection

from conductor_app import api
from conductor_app.models import Execution
from tests.app import scenarios
from tests.support.watching import wait_for_body

pytestmark = pytest.mark.usefixtures("recorded")

LEASE_SECONDS = 3


def test_leases_are_renewed_while_bodies_hold_all_of_the_pools_connections(worker: Any) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL has a pool")
    pytest.importorskip("psycopg_pool")
    pool = {"min_size": 1, "max_size": 2, "timeout": 2}
    started = worker(pool="threads", concurrency=2, env={"CONDUCTOR_TEST_POOL": json.dumps(pool)})
    # Another worker, which would take what the first one does not renew.
    worker(pool="solo", queues=[f"{connection.settings_dict['NAME']}-other"])
    began = time.monotonic()
    running = [scenarios.has_one_attempt.delay(seconds=2.5 * LEASE_SECONDS) for _ in range(2)]
    wait_for_body(scenarios.has_one_attempt, number=2)
    assert [api.get_result(result, timeout=40) for result in running] == ["done", "done"]
    assert time.monotonic() - began > LEASE_SECONDS
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert api.get_result(scenarios.naps.delay(seconds=0.2), timeout=20) == "rested"
    assert "Heartbeat" not in started.log
    assert "conductor.W031" in started.log
