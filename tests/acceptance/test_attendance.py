"""A real worker says that it is there, what it serves and what it runs, until it ends."""

from __future__ import annotations

from typing import Any

import celery

from conductor_app.models import Worker
from conductor_app.telling import workers
from project.celery import app
from tests.app import scenarios
from tests.app.ledger import note
from tests.support.databases import end_other_sessions
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body
from tests.support.worker import pools

QUEUE = app.conf.task_default_queue
OTHER = f"{QUEUE}-other"


@pools
def test_a_worker_is_seen_with_its_slots_its_queues_and_what_it_runs(worker: Any, pool: str) -> None:
    slots = 1 if pool == "solo" else 3
    started = worker(pool=pool, concurrency=slots, queues=[QUEUE, OTHER], conductor={"RELEASE": "2026.11.3"})
    result = scenarios.waits_for_the_go.delay()
    wait_for_body(scenarios.waits_for_the_go)
    wait_until(Worker.objects.exists)
    seen = workers.read()
    (found,) = seen.workers
    row = found.row
    assert row is not None
    assert found.name.startswith(f"{started.name}@")
    assert (found.state, found.slots, found.busy, found.running, found.lapsed) == ("alive", slots, 1, 1, 0)
    assert (row.pool, row.pid, row.host) == (pool, started.pid, found.name.partition("@")[2])
    assert (row.celery, row.release) == (celery.__version__, "2026.11.3")
    assert found.queues == sorted([QUEUE, OTHER])
    assert [(str(run.id), run.task) for run in found.runs] == [(result.id, scenarios.waits_for_the_go.name)]
    assert {queue.name: (queue.state, queue.running) for queue in seen.queues} == {
        QUEUE: ("served", 1),
        OTHER: ("served", 0),
    }
    # Neither the pool's processes nor this one, which has called the task, say anything.
    assert Worker.objects.count() == 1
    note(None, "go")
    assert started.stop() == 0
    assert not Worker.objects.exists()


def test_a_worker_says_good_bye_after_it_has_lost_its_sessions(worker: Any) -> None:
    started = worker(concurrency=1)
    wait_until(Worker.objects.exists)
    end_other_sessions()
    assert started.stop() == 0
    assert not Worker.objects.exists()


def test_a_worker_that_is_killed_is_missed(worker: Any) -> None:
    started = worker(concurrency=1, queues=[OTHER])
    wait_until(Worker.objects.exists)
    scenarios.echo.apply_async(kwargs={"value": 1}, queue=QUEUE)
    started.kill()
    second = worker(concurrency=1, queues=[OTHER])
    wait_until(lambda: Worker.objects.count() == 2)
    assert second.stop() == 0
    seen = workers.read()
    assert [(found.name.partition("@")[0], found.state) for found in seen.workers] == [(started.name, "alive")]
    assert {queue.name: (queue.state, queue.due) for queue in seen.queues} == {
        QUEUE: ("unserved", 1),
        OTHER: ("served", 0),
    }


def test_autoscaling_counts_the_most_slots(worker: Any) -> None:
    worker(args=["--autoscale=4,1"])
    wait_until(Worker.objects.exists)
    assert Worker.objects.get().slots == 4
