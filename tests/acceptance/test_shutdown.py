"""Every way to end a worker is heard by the bodies that it runs, and costs them nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from conductor_app import api
from conductor_app.models import Execution
from project.celery import app
from tests.app import stops
from tests.app.ledger import count, note
from tests.app.models import Ledger
from tests.support import invariants, results
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body
from tests.support.worker import Worker, pools

pytestmark = pytest.mark.usefixtures("recorded")

#: Far longer than a test: nothing comes back by its lease.
LONG_LEASE = {"LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 100}
#: Celery sleeps so long in a soft shutdown, also when no body runs any more.
SOFT_SECONDS = 15


def soft(name: str) -> dict[str, Any]:
    return {"args": ["--", f"worker.soft_shutdown_timeout={SOFT_SECONDS}"], "env": {"REMAP_SIGTERM": name}}


def twice(started: Worker) -> None:
    started.signal(signal.SIGINT)
    wait_until(lambda: "Hitting Ctrl+C again" in started.log)
    started.signal(signal.SIGINT)


#: How a worker is started, and how it is asked to end.
WAYS: dict[str, tuple[dict[str, Any], Callable[[Worker], object]]] = {
    "SIGTERM": ({}, lambda started: started.signal(signal.SIGTERM)),
    "SIGINT": ({}, lambda started: started.signal(signal.SIGINT)),
    "SIGHUP": ({}, lambda started: started.signal(signal.SIGHUP)),
    "SIGQUIT, softly": (soft(""), lambda started: started.signal(signal.SIGQUIT)),
    "SIGTERM as SIGQUIT, softly": (soft("SIGQUIT"), lambda started: started.signal(signal.SIGTERM)),
    "SIGINT twice, softly": (soft(""), twice),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_body_gives_way_at_its_next_step(worker: Any, way: str) -> None:
    options, end = WAYS[way]
    gives_way_at_its_next_step(worker, end, **options)


@pytest.mark.parametrize("pool", ["threads", "solo"])
@pytest.mark.parametrize("way", ["SIGTERM", "SIGQUIT, softly"])
def test_a_body_gives_way_in_the_other_pools(worker: Any, way: str, pool: str) -> None:
    options, end = WAYS[way]
    if pool == "solo" and options:
        # The body stands still while Celery's handler, in its thread, waits for it.
        options = {**options, "args": ["--", "worker.soft_shutdown_timeout=2"]}
    gives_way_at_its_next_step(worker, end, pool=pool, **options)


@results.needs_broker
@pytest.mark.parametrize("to_one", [False, True], ids=["all", "one"])
def test_a_body_gives_way_when_the_worker_is_shut_down_from_afar(worker: Any, to_one: bool) -> None:
    def end(started: Worker) -> None:
        nodes = [name for name in app.control.inspect(timeout=5).ping() or () if started.name in name]
        assert len(nodes) == 1
        app.control.shutdown(destination=nodes if to_one else None)

    gives_way_at_its_next_step(worker, end)


def gives_way_at_its_next_step(worker: Any, end: Callable[[Worker], object], **options: Any) -> None:
    first = worker(concurrency=1, conductor=LONG_LEASE, **options)
    result = stops.walks.delay(steps=400)
    wait_until(lambda: count("step-3"), 40)
    end(first)
    # Before a soft shutdown is over, and a body that has not heard of it is killed.
    row = wait_until(
        lambda: Execution.objects.filter(pk=result.id).exclude(status="running").first(),
        SOFT_SECONDS - 3,
        message=lambda: f"The body goes on. The log:\n{first.log_tail()}",
    )
    assert (row.status, row.attempt) == ("queued", 1)
    steps = Ledger.objects.filter(key__startswith="step-").count()
    wait_until(lambda: not first.is_alive, 60, message=first.log_tail)
    assert Ledger.objects.filter(key__startswith="step-").count() == steps
    second = worker(concurrency=1)
    wait_for_body(stops.walks, 2)
    assert api.cancel(result)
    wait_until(lambda: Execution.objects.get(pk=result.id).is_final, 40)
    # None was taken twice.
    assert not [key for key in set(Ledger.objects.values_list("key", flat=True)) if key != "body" and count(key) > 1]
    assert Execution.objects.get(pk=result.id).attempt == 1
    invariants.check(second)


@pytest.mark.parametrize("call", stops.CALLS)
def test_each_call_that_is_not_recorded_is_a_release_point(worker: Any, call: str) -> None:
    first = worker(concurrency=1, conductor=LONG_LEASE)
    result = stops.pauses.delay(call)
    wait_for_body(stops.pauses)
    first.signal(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in first.log)
    note(None, "go")
    wait_until(lambda: not first.is_alive, 60, message=first.log_tail)
    row = Execution.objects.get(pk=result.id)
    assert row.status in ("queued", "waiting")
    assert (row.attempt, count("effect"), count("after")) == (1, 0, 0)
    if call == "start":
        assert not row.children.exists()
    second = worker(concurrency=1)
    if call == "wait_for":
        api.send_event(result.id, "approval", 1)
    assert api.get_result(result, timeout=40) == [1, 0]
    assert count("effect") == (call not in ("sleep", "wait_for", "checkpoint"))
    invariants.check(second)


@pytest.mark.parametrize("call", ["step", "start", "checkpoint"])
def test_a_body_that_swallows_its_release_gets_no_further(worker: Any, call: str) -> None:
    first = worker(concurrency=1, conductor=LONG_LEASE)
    result = stops.pauses.delay(call, swallows=True)
    wait_for_body(stops.pauses)
    first.signal(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in first.log)
    note(None, "go")
    wait_until(lambda: not first.is_alive, 60, message=first.log_tail)
    assert (count("swallowed"), count("after"), count("effect")) == (1, 0, 0)
    assert Execution.objects.get(pk=result.id).status == "queued"


@pools
def test_what_a_worker_takes_while_it_shuts_down_is_given_back_before_its_body_begins(worker: Any, pool: str) -> None:
    first = worker(pool=pool, concurrency=1, conductor=LONG_LEASE, args=["--prefetch-multiplier=4"])
    running = stops.returns_when_told.delay()
    wait_for_body(stops.returns_when_told)
    behind = [stops.walks.delay(steps=1) for _ in range(3)]
    time.sleep(0.5)  # for the worker to take them, which nothing tells; too short does not fail the test
    first.signal(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in first.log)
    note(None, "go")
    wait_until(lambda: not first.is_alive, 60, message=first.log_tail)
    assert api.get_result(running, timeout=0) == "done"
    assert not Ledger.objects.filter(execution_id__in=[result.id for result in behind]).exists()
    worker(concurrency=1, conductor={"REDISPATCH_SECONDS": 1, "SWEEP_SECONDS": 1})
    assert [api.get_result(result, timeout=40) for result in behind] == [1, 1, 1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT], ids=["SIGINT twice", "SIGQUIT"])
def test_a_body_without_ctx_calls_that_is_killed_by_a_cold_shutdown_is_queued_at_once(worker: Any, signum: int) -> None:
    first = worker(pool="prefork", concurrency=2, conductor=LONG_LEASE)
    results_ = [stops.returns_when_told.delay() for _ in range(2)]
    wait_for_body(stops.returns_when_told, 2)
    twice(first) if signum == signal.SIGINT else first.signal(signum)
    wait_until(lambda: not first.is_alive, 60, message=first.log_tail)
    rows = Execution.objects.filter(pk__in=[result.id for result in results_])
    assert [(row.status, row.attempt) for row in rows] == [("queued", 1)] * 2, first.log_tail()
    note(None, "go")
    second = worker(pool="prefork", concurrency=2)
    assert [api.get_result(result, timeout=40) for result in results_] == ["done"] * 2
    assert set(rows.values_list("attempt", flat=True)) == {1}
    invariants.check(second)
