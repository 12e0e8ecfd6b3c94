"""A worker's process goes on with what its run makes runnable; others see no difference."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from conductor_app import ChildCancelled, api
from conductor_app.models import Execution
from project.celery import app
from tests.app import origin, scenarios
from tests.app.ledger import count
from tests.support import invariants, results
from tests.support.polling import wait_until
from tests.support.watching import only, wait_for_body
from tests.support.worker import Worker, pools

pytestmark = pytest.mark.usefixtures("recorded")

PATIENCE = 60


def received(worker: Worker) -> int:
    return sum(" received" in line for line in worker.log.splitlines())


@pools
@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_a_tree_takes_fewer_messages_than_runs(worker: Any, pool: str, is_on: bool) -> None:
    # Long pauses: nothing is published twice.
    started = worker(pool=pool, conductor={"HAND_OFF": is_on, "REDISPATCH_SECONDS": 60, "LEASE_SECONDS": 60})
    result = origin.process_order.delay(order_id=7)
    assert result.get(timeout=PATIENCE) == {"success": True}
    executions = list(Execution.objects.all())
    runs = sum(execution.fence for execution in executions)
    assert (len(executions), runs) == (4, 7)
    # On a busy machine the time for followers may be over before the last of them.
    assert received(started) < runs if is_on else received(started) == runs
    for execution in executions:
        started.wait_for_log(f"[{execution.pk}] succeeded in ")
    assert {execution.attempt for execution in executions} == {1}
    invariants.check(started)


def test_the_execution_that_ran_is_blamed_for_a_killed_process(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1, conductor={"LEASE_SECONDS": 600})
    result = scenarios.waits_for_lingerer.delay(seconds=300)
    line = wait_for_body(scenarios.lingers)
    assert count("body", result.id) == 1
    assert {line.pid} == set(started.pool_pids())
    os.kill(line.pid, signal.SIGKILL)
    assert api.get_result(result, timeout=PATIENCE) == {"attempt": 2}
    assert (only(scenarios.lingers).attempt, only(scenarios.waits_for_lingerer).attempt) == (2, 1)
    assert received(started) == 2
    invariants.check(started)


@results.needs_broker
def test_revoke_finds_the_execution_that_runs_and_leaves_its_parent_alone(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1)
    parent = scenarios.waits_for_lingerer.delay(seconds=300)
    line = wait_for_body(scenarios.lingers)
    child = only(scenarios.lingers)
    app.control.revoke(str(child.pk), terminate=True, signal="KILL")
    with pytest.raises(ChildCancelled, match="revoked through Celery"):
        parent.get(timeout=PATIENCE)
    wait_until(lambda: line.pid not in started.pool_pids())
    assert (only(scenarios.lingers).status, only(scenarios.lingers).attempt) == ("cancelled", 1)
    assert api.get_result(scenarios.echo.delay(value="alive"), timeout=PATIENCE) == "alive"


@results.needs_broker
def test_revoking_a_parent_does_not_kill_what_its_process_has_gone_on_with(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1)
    parent = scenarios.waits_for_lingerer.delay(seconds=3)
    line = wait_for_body(scenarios.lingers)
    app.control.revoke(parent.id, terminate=True, signal="KILL")
    with pytest.raises(TaskRevokedError):
        parent.get(timeout=PATIENCE)
    wait_until(lambda: only(scenarios.lingers).is_final, PATIENCE)
    assert line.pid in started.pool_pids()
