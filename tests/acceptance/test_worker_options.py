"""Options of ``celery worker`` and of ``apply_async``: queues, priorities, headers, events, limits of processes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery.app.routes import prepare
from celery.events.state import State

from conductor_app import api
from conductor_app.host.inline import run_until_idle
from conductor_app.models import Execution
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app import canvas, origin, scenarios
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import deliveries, results
from tests.support.broker import purge
from tests.support.polling import wait_until

PATIENCE = 60
OTHER = f"{app.conf.task_default_queue}-other"


def test_processes_that_end_after_one_task(worker: Any) -> None:
    """Each run forks a process, at any time, while the sweeper's thread works."""
    # Celery takes more than a second to replace a process that has ended, whatever it ran.
    conductor = {"SWEEP_SECONDS": 0.02, "REDISPATCH_SECONDS": 30}
    started = worker(concurrency=16, args=["--max-tasks-per-child=1"], conductor=conductor)
    numbers = range(8)
    parents = [canvas.pass_on.delay(number) for number in numbers]
    alone = [scenarios.echo.delay(number) for number in numbers]
    assert [api.get_result(one, timeout=100) for one in [*parents, *alone]] == [*numbers, *numbers]
    assert not Execution.objects.exclude(status="succeeded", attempt=1).exists()
    assert Ledger.objects.filter(key="body").values("pid").distinct().count() >= 4 * len(numbers) - 1
    assert started.stop() == 0


def test_autoscale_and_prefetching(worker: Any) -> None:
    started = worker(args=["--autoscale=4,1", "--prefetch-multiplier=4"])
    parents = [origin.process_order.delay(order_id=number) for number in range(15)]
    assert [api.get_result(one, timeout=PATIENCE) for one in parents] == [{"success": True}] * 15
    assert len(started.pool_pids()) <= 4


def test_children_run_on_the_workers_of_their_queue(worker: Any) -> None:
    here = worker(concurrency=1, queues=[app.conf.task_default_queue])
    there = worker(concurrency=1, queues=[OTHER])
    parents = [scenarios.waits_for_a_queue.delay(queue=OTHER, value=number) for number in range(5)]
    assert [api.get_result(one, timeout=PATIENCE) for one in parents] == list(range(5))
    children = Execution.objects.filter(parent__isnull=False)
    assert set(children.values_list("queue", flat=True)) == {OTHER}
    ran_by = dict(Ledger.objects.filter(key="body").values_list("execution_id", "pid"))
    assert {ran_by[pk] for pk in children.values_list("pk", flat=True)} <= set(there.pool_pids())
    assert {pid for pk, pid in ran_by.items() if not children.filter(pk=pk)} <= set(here.pool_pids())


def test_routes_queues_and_priorities_are_kept_for_each_message(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.amqp, "router", app.amqp.Router())
    monkeypatch.setattr(app.amqp.router, "routes", prepare({"tests.app.origin.*": {"queue": "routed"}}))
    routed = origin.double.apply_async((1,))
    asked = origin.double.apply_async((1,), queue="asked", priority=7)
    monkeypatch.undo()
    assert Execution.objects.get(pk=routed.id).queue == "routed"
    stored = Execution.objects.get(pk=asked.id)
    assert (stored.queue, stored.priority) == ("asked", 7)

    purge(["asked"])
    message = deliveries.doorbell(stored)
    assert message.properties["priority"] == 7
    assert message.delivery_info["routing_key"] == "asked"


def test_headers_stamps_and_limits_outlive_a_suspension(db: None) -> None:
    result = canvas.pass_on.apply_async(
        (1,),
        headers={"tenant": "a"},
        stamped_headers=["batch"],
        batch="b-1",
        time_limit=90,
        soft_time_limit=60,
        shadow="s",
    )
    stamped = canvas.pass_on.s(2)
    stamped.stamp(batch="b-2")
    stamped_id = stamped.apply_async().id
    run_until_idle(app)
    purge([])
    headers = deliveries.doorbell(Execution.objects.get(pk=result.id)).headers
    assert headers["tenant"] == "a"
    assert (headers["stamped_headers"], headers["stamps"]) == (["batch"], {"batch": "b-1"})
    assert (headers["timelimit"], headers["shadow"]) == ([90, 60], "s")
    assert headers[dispatch.HEADER] == dispatch.DOORBELL
    assert deliveries.doorbell(Execution.objects.get(pk=stamped_id)).headers["stamps"] == {"batch": "b-2"}


def test_the_log_says_suspended_instead_of_ignored(worker: Any) -> None:
    started = worker(concurrency=1)
    result = scenarios.pass_through.delay(value=1)
    assert api.get_result(result, timeout=PATIENCE) == 1
    child = Execution.objects.get(parent_id=result.id).pk
    line = rf"Task tests\.app\.scenarios\.pass_through\[{result.id}\] suspended: waiting for step 'echo' "
    wait_until(lambda: re.search(line + rf"\(tests\.app\.scenarios\.echo {child}\)", started.log))
    assert " ignored" not in started.log


@results.needs_broker
def test_events_show_a_suspended_task(worker: Any) -> None:
    """Flower and ``celery events`` would show STARTED for ever."""
    worker(concurrency=1, args=["--task-events"])
    seen = State()
    history: dict[str, list[str]] = {}

    def note(event: dict[str, Any]) -> None:
        seen.event(event)
        if "uuid" in event:
            history.setdefault(event["uuid"], []).append(event["type"])

    with app.connection_for_read() as connection:
        events = app.events.Receiver(connection, handlers={"*": note}).itercapture(timeout=PATIENCE)
        next(events)  # a heartbeat: from now on, no event is missed
        napping = scenarios.naps.delay(86_400)
        result = scenarios.pass_through.delay(value=1)
        while "task-succeeded" not in history.get(result.id, []) or "task-suspended" not in history.get(napping.id, []):
            next(events)
    assert history[result.id] == [
        "task-received",
        "task-started",
        "task-suspended",
        "task-received",
        "task-started",
        "task-succeeded",
    ]
    assert seen.tasks[napping.id].state == "SUSPENDED"
    assert seen.tasks[napping.id].step == "nap"
    assert seen.tasks[result.id].state == "SUCCESS"


@results.needs_broker
def test_rate_limits_hold_for_runs(worker: Any) -> None:
    worker(concurrency=2)
    assert api.get_result(canvas.limited.delay(1), timeout=PATIENCE) == 1
    assert api.get_result(canvas.limited.delay(2), timeout=PATIENCE) == 2
    assert count("body") == 6
