"""Events reach executions that real workers run, whoever is killed in between."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connections

from conductor_app import EventTimedOut, api
from conductor_app.exceptions import ExecutionFailed, ExecutionFinished
from conductor_app.models import Event, Execution, FailedExecution, Step
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.watching import wait_for_status
from tests.support.worker import pools

pytestmark = pytest.mark.usefixtures("recorded")

#: Far longer than a test: only the report of a process's death can bring its executions back.
LONG_LEASE = {"LEASE_SECONDS": 600}


def awaits(result: Any, step: str) -> None:
    """Wait until an execution is suspended on this step."""
    pending = Step.objects.filter(execution_id=result.id, name=step, status="pending", execution__status="waiting")
    wait_until(pending.exists, message=f"Nobody waits at {step}")


@pools
def test_events_are_delivered_in_order_before_and_while_an_execution_waits(worker: Any, pool: str) -> None:
    early = scenarios.waits_for_events.delay(number=3)
    for value in (1, 2):
        assert api.send_event(early.id, "item", value)
    started = worker(pool=pool)
    awaits(early, "event-2")
    assert not Event.objects.filter(taken_at__isnull=True).exists()
    # No worker is held, although it waits: both slots are free for the others.
    assert [api.get_result(scenarios.echo.delay(value=n), timeout=20) for n in (1, 2)] == [1, 2]
    assert api.send_event(early, "item", 3, id="mail-3") is True
    assert api.send_event(early, "item", 3, id="mail-3") is False
    assert api.get_result(early, timeout=20) == [1, 2, 3]
    assert api.send_event(early, "item", 3, id="mail-3") is False
    with pytest.raises(ExecutionFinished):
        api.send_event(early, "item", 4)
    assert count("event", early.id) == 3
    assert Execution.objects.get(pk=early.id).attempt == 1
    invariants.check(started)


def test_an_event_that_does_not_come_in_time_fails_or_is_caught(worker: Any) -> None:
    started = worker(pool="threads")
    uncaught = scenarios.waits_for_events.delay(number=1, timeout=1)
    caught = scenarios.catches_a_late_event.delay(timeout=1)
    with pytest.raises(ExecutionFailed, match=r"^Event 'item' did not come within 1s \(step 'event-0'\)$"):
        api.get_result(uncaught, timeout=20)
    awaits(caught, "second")
    api.send_event(caught, "item", "late")
    message = "Event 'item' did not come within 1s (step 'first')"
    assert api.get_result(caught, timeout=20) == {"caught": message, "late": "late"}
    failure = FailedExecution.objects.get()
    assert (failure.step, failure.attempts) == ("event-0", 1)
    assert failure.error_class == f"{EventTimedOut.__module__}.{EventTimedOut.__name__}"
    api.retry(uncaught)
    wait_for_status(uncaught, "waiting")
    api.send_event(uncaught, "item", "at last")
    assert api.get_result(uncaught, timeout=20) == ["at last"]
    invariants.check(started, tracebacks=1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_that_dies_around_a_commit_takes_an_event_once(worker: Any, moment: str) -> None:
    """Before the commit that takes the event, nobody has it; after it, the step has."""
    sent_before = scenarios.dies_before_it_waits.delay(moment=moment)
    sent_later = scenarios.dies_before_it_waits.delay(moment=moment)
    api.send_event(sent_before, "item", "a")
    api.send_event(sent_before, "item", "b")
    started = worker(pool="prefork", conductor={**LONG_LEASE, "REDISPATCH_SECONDS": 0.5})
    awaits(sent_later, "event")
    api.send_event(sent_later, "item", "c")
    # Taking an event leaves the execution running, so that a death costs an attempt on either side of the commit.
    assert api.get_result(sent_before, timeout=40) == ["a", 2]
    assert api.get_result(sent_later, timeout=40) == ["c", 2 if moment == "before" else 1]
    assert [event.get_payload() for event in Event.objects.filter(taken_at__isnull=True)] == ["b"]
    invariants.check(started)


def test_a_worker_that_is_killed_while_events_are_sent_loses_none(worker: Any) -> None:
    first = worker(pool="prefork", concurrency=2)
    results = [scenarios.waits_for_events.delay(number=5) for _ in range(4)]
    awaits(results[0], "event-0")

    def send() -> None:
        for value in range(5):
            for result in results:
                api.send_event(result.id, "item", value, id=f"mail-{value}")
        connections.close_all()

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: count("event") >= 2, message="No event was taken")
    first.kill()
    sender.join(40)
    assert not sender.is_alive()
    second = worker(pool="prefork", concurrency=2)
    for result in results:
        assert api.get_result(result, timeout=60) == [0, 1, 2, 3, 4]
    assert Event.objects.filter(taken_at__isnull=False).count() == 20
    invariants.check(second)
