"""A row that somebody has locked delays its own execution, and no other one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from conductor_app import api, transitions
from conductor_app.models import Execution, Step
from conductor_app.store import clock
from project.celery import app
from tests.app import scenarios
from tests.support import invariants, results
from tests.support.locks import locked
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body, wait_for_status

pytestmark = pytest.mark.usefixtures("recorded")

LEASE_SECONDS = 3
MANY = 10


def test_what_is_due_meanwhile_is_not_late(worker: Any) -> None:
    started = worker(pool="threads", concurrency=4)
    in_use = [
        scenarios.naps.delay(seconds=1),
        scenarios.catches_a_late_event.delay(timeout=1),
        scenarios.naps.delay(seconds=600),
        scenarios.waits_for_a_queue.delay(queue=f"{app.conf.task_default_queue}-nobody", timeout=1),
    ]
    for execution in in_use:
        wait_for_status(execution, "waiting")
    with locked(*in_use[:3], Execution.objects.get(parent_id=in_use[3].id).pk):
        asleep = [scenarios.naps.delay(seconds=1) for _ in range(MANY)]
        late = [scenarios.waits_for_events.delay(number=1, timeout=1) for _ in range(MANY)]
        children = [scenarios.waits_for_the_nap.delay(seconds=1) for _ in range(MANY)]
        flagged = [scenarios.naps.delay(seconds=600) for _ in range(MANY)]
        asked = [scenarios.waits_for_events.delay(number=1) for _ in range(MANY)]
        for execution in flagged:
            wait_for_status(execution, "waiting")
            transitions.request_cancel(execution.id, "enough")
        for execution in asked:
            api.send_event(execution, "item", 7)
        assert [api.get_result(result, timeout=30) for result in asleep] == ["rested"] * MANY
        assert [api.get_result(result, timeout=30) for result in children] == ["rested"] * MANY
        assert [api.get_result(result, timeout=30) for result in asked] == [[7]] * MANY
        for execution in flagged:
            wait_for_status(execution, "cancelled")
        for execution in late:
            wait_for_status(execution, "failed")
        wait_until(lambda: "another session has locked a row" in started.log, message="Nobody says what is locked")
        assert {Execution.objects.get(pk=execution.id).status for execution in in_use[:3]} == {"waiting"}
    assert api.get_result(in_use[0], timeout=20) == "rested"
    wait_for_status(in_use[1], "waiting")
    wait_for_status(in_use[3], "failed")
    for execution in in_use[1:3]:
        api.cancel(execution)
    invariants.check()


def test_more_locked_rows_than_a_sweep_looks_at_hold_up_nothing(worker: Any) -> None:
    worker(pool="threads", concurrency=4, conductor={"SWEEP_BATCH": 5})
    in_use = [scenarios.naps.delay(seconds=2) for _ in range(12)]
    for execution in in_use:
        wait_for_status(execution, "waiting")
    with locked(*in_use):
        to_come = Step.objects.filter(execution__in=[one.id for one in in_use], deadline_at__gt=clock.now())
        wait_until(lambda: not to_come.exists())
        assert api.get_result(scenarios.naps.delay(seconds=0.1), timeout=20) == "rested"
        assert api.get_result(scenarios.waits_for_the_nap.delay(seconds=0.1), timeout=20) == "rested"
    assert [api.get_result(result, timeout=20) for result in in_use] == ["rested"] * 12


def test_the_leases_of_others_are_renewed_and_the_locked_one_is_not_taken_away(worker: Any) -> None:
    worker(pool="threads", concurrency=2)
    running = [scenarios.has_one_attempt.delay(seconds=3 * LEASE_SECONDS) for _ in range(2)]
    wait_for_body(scenarios.has_one_attempt, number=2)
    # Another worker, which would take what this one does not renew.
    worker(pool="solo", concurrency=1)
    with locked(running[0]):
        time.sleep(LEASE_SECONDS + 2)
    assert [api.get_result(result, timeout=30) for result in running] == ["done", "done"]
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    invariants.check()


@results.needs_broker
def test_a_revoke_of_an_execution_that_is_locked_is_not_forgotten(worker: Any) -> None:
    started = worker(pool="threads", concurrency=2)
    asleep = scenarios.naps.delay(seconds=600)
    wait_for_status(asleep, "waiting")
    with locked(asleep):
        asleep.revoke()
        assert api.get_result(scenarios.naps.delay(seconds=1), timeout=20) == "rested"
        assert Execution.objects.get(pk=asleep.id).status == "waiting"
    wait_for_status(asleep, "cancelled")
    assert started.is_alive
