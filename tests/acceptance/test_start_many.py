"""Thousands of executions of one call, with real workers: none is lost and none is doubled, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction

from conductor_app import api
from conductor_app.models import Execution
from project.celery import app
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.broker import broker_at
from tests.support.messages import needs_a_broker
from tests.support.polling import wait_until
from tests.support.proxy import Proxy

pytestmark = pytest.mark.usefixtures("recorded")

ROOT = Path(__file__).parents[2]
#: Starts 700 executions, and dies when 250 messages are out: between two chunks, and in the middle of a third.
DIES = """
import os, signal
import django
django.setup()
from conductor_app.store.process import process
from tests.app.scenarios import echo

send, sent = process.broker.send, []

class Dying:
    def send(self, execution, *, waits):
        if len(sent) == 250:
            os.kill(os.getpid(), signal.SIGKILL)
        send(execution, waits=waits)
        sent.append(1)

process.broker = Dying()
echo.start_many(range(700), idempotency_keys=[f"k{n}" for n in range(700)], tags={"batch": "7"})
"""


def _all_have_ended(total: int) -> bool:
    return Execution.objects.filter(status="succeeded").count() == total


@needs_a_broker
def test_a_caller_that_is_killed_between_its_messages_loses_none(worker: Any) -> None:
    environment = {**os.environ, "CONDUCTOR_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"])}
    environment.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    died = subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, env=environment, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    assert Execution.objects.filter(status="queued").count() == 700
    started = worker(pool="threads", concurrency=4)
    wait_until(lambda: _all_have_ended(700), timeout=90, message="Messages that were never sent are lost")
    again = scenarios.echo.start_many(range(700), idempotency_keys=[f"k{n}" for n in range(700)])
    assert not any(result.is_new for result in again)
    assert count("body") == 700
    invariants.check(started)


@needs_a_broker
def test_executions_of_a_call_while_the_broker_is_away_run_when_it_is_back(worker: Any) -> None:
    started = worker(pool="threads", concurrency=4)
    with Proxy(app.conf.broker_url) as broker:
        broker.close()
        with broker_at(broker.url):
            results = scenarios.echo.start_many(range(300))
            assert Execution.objects.filter(status="queued").count() == 300
        assert [api.get_result(result, timeout=60) for result in results] == list(range(300))
    invariants.check(started)


def test_more_than_have_messages_of_the_callers_all_run_once(worker: Any) -> None:
    """The first thousand messages are the caller's, the others the sweeper's."""
    started = worker(pool="threads", concurrency=4)
    known = scenarios.echo.start_many(range(100), idempotency_keys=[f"k{n}" for n in range(100)])
    with transaction.atomic():
        # The last 100 are the first ones again.
        results = scenarios.echo.start_many(
            [n % 1_200 for n in range(1_300)], idempotency_keys=[f"k{n % 1_200}" for n in range(1_300)]
        )
    assert [result.is_new for result in results] == [False] * 100 + [True] * 1_100 + [False] * 100
    assert [result.id for result in results[:100]] == [result.id for result in known]
    wait_until(lambda: _all_have_ended(1_200), timeout=120, interval=0.5)
    assert count("body") == 1_200
    invariants.check(started)
