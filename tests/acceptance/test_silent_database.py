"""A database whose host falls silent, while another one answers: what hangs on the old connections goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.db import connection

from conductor_app import api
from tests.app import scenarios
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.postgres import PrivatePostgres
from tests.support.proxy import Proxy
from tests.support.watching import wait_for_body
from tests.support.worker import pools

LEASE_SECONDS = 3
#: A lease and some sweeps, and what a busy machine adds. The kernel alone would take a quarter of an hour.
GOES_ON_WITHIN = 40


@pytest.fixture(scope="module")
def server() -> Iterator[PrivatePostgres]:
    """A server that lets go of the locks of a client that is gone."""
    if connection.vendor != "postgresql":
        pytest.skip("this would only repeat the run on PostgreSQL, whose driver the others do not need")
    with PrivatePostgres(settings={"idle_in_transaction_session_timeout": "5s"}) as server:
        yield server


def goes_on_when(falls_silent: Any, started: Any) -> None:
    """Let the database fall silent in the middle of work, and check that all of it comes to its end.

    A body's own statement that hangs fails, as with any connection that is lost, and costs an attempt.
    """
    stepping = [scenarios.step_by_step.delay(steps=20, pause=0.1) for _ in range(2)]
    napping = scenarios.naps.delay(seconds=2)
    wait_for_body(scenarios.step_by_step)
    falls_silent()
    silent_since = time.monotonic()
    queued = [scenarios.pass_through.delay(value=value) for value in range(3)]
    assert [api.get_result(result, timeout=GOES_ON_WITHIN) for result in queued] == [0, 1, 2]
    assert [api.get_result(result, timeout=GOES_ON_WITHIN) for result in stepping] == [list(range(21))] * 2
    assert api.get_result(napping, timeout=GOES_ON_WITHIN) == "rested"
    assert time.monotonic() - silent_since < GOES_ON_WITHIN
    assert started.is_alive
    invariants.check()


@pools
def test_all_goes_on_when_the_address_is_anothers(worker: Any, postgres: PrivatePostgres, pool: str) -> None:
    with Proxy(postgres.url) as proxy:
        started = worker(pool=pool, concurrency=3, env={"DATABASE_URL": proxy.url})
        goes_on_when(proxy.abandon, started)
        wait_until(lambda: "The connection is shut down" in started.log, message="Nobody was stuck")


def test_all_goes_on_at_the_other_address(worker: Any, postgres: PrivatePostgres) -> None:
    with Proxy(postgres.url) as first, Proxy(postgres.url) as second:
        ports = f"{urlsplit(first.url).port},{urlsplit(second.url).port}"
        url = f"postgres://postgres@/postgres?host=127.0.0.1,127.0.0.1&port={ports}&connect_timeout=2"
        started = worker(pool="prefork", concurrency=3, env={"DATABASE_URL": url}, conductor={"LEASE_SECONDS": 9})
        goes_on_when(first.silence, started)
