"""The row of a worker: who writes it, and when it goes."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import celery
import django
import pytest
from django.db import DatabaseError, connection
from django.db.models import F
from django.test.utils import CaptureQueriesContext

import conductor_app
from conductor_app.host import sweeper_thread
from conductor_app.host.gate import Shutdown
from conductor_app.host.sweeper_thread import ATTEND_SECONDS, SweeperThread
from conductor_app.models import Worker
from conductor_app.store import clock, owners
from conductor_app.transitions import attending
from conductor_app.transitions.attending import FORGOTTEN_SECONDS
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db

NODE = "celery@web1"


class Consumes:
    """What a worker consumes from, in Celery's shape."""

    def __init__(self, *names: str) -> None:
        self.queues = [SimpleNamespace(name=name) for name in names]
        self.consume_from = dict.fromkeys(names)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A worker of a prefork pool, as its sweeper's thread sees it."""
    from celery.concurrency.prefork import TaskPool

    from conductor_app.store.process import process

    process.broker = NotingBroker()
    # The thread's own connection; that of the test is not to be closed.
    monkeypatch.setattr(SweeperThread, "_close", lambda thread: None)
    conf = SimpleNamespace(broker_write_url="amqp://nowhere", broker_url="amqp://nowhere")
    yield SimpleNamespace(
        app=SimpleNamespace(conf=conf, amqp=SimpleNamespace(queues=Consumes("payments", "celery"))),
        hostname=NODE,
        pool_cls=TaskPool,
        pool=SimpleNamespace(num_processes=4, limit=4),
        concurrency=4,
        consumer=None,
    )
    clock.reset()


@pytest.fixture
def thread(worker: SimpleNamespace) -> SweeperThread:
    return SweeperThread(worker, Shutdown())


def sweep(thread: SweeperThread, *, later: float = ATTEND_SECONDS) -> None:
    """Let the thread sweep as if so many seconds had passed since it last wrote its row."""
    thread._attended_at -= later
    thread._next_sweep = 0.0
    thread._tick()


def test_a_worker_says_what_it_is_with_its_first_sweep(thread: SweeperThread, settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "RELEASE": "2026.11.3"}
    thread._tick()
    row = Worker.objects.get()
    assert (row.pk, row.name) == (f"{NODE}/{owners.token()}", NODE)
    assert owners.lease_owner(NODE, 7) == f"{row.pk}/7"
    assert (row.host, row.pid) == (socket.gethostname(), os.getpid())
    assert (row.pool, row.slots, row.queue_names()) == ("prefork", 4, ["celery", "payments"])
    versions = (conductor_app.__version__, celery.__version__, django.get_version(), platform.python_version())
    assert (row.package, row.celery, row.django, row.python) == versions
    assert (row.release, row.is_stopping) == ("2026.11.3", False)
    assert abs((row.seen_at - row.started_at).total_seconds()) < 60


def test_it_says_so_again_with_a_sweep_after_a_while_and_not_with_each(
    thread: SweeperThread, worker: SimpleNamespace
) -> None:
    thread._tick()
    first = Worker.objects.get()
    clock.shift(dt.timedelta(seconds=30))
    sweep(thread, later=0)
    assert Worker.objects.get().seen_at == first.seen_at
    worker.consumer = SimpleNamespace(task_consumer=Consumes("payments", "mail"))  # after two remote commands
    worker.autoscaler = SimpleNamespace(max_concurrency=9)
    sweep(thread)
    again = Worker.objects.get()
    assert (again.queue_names(), again.slots) == (["mail", "payments"], 9)
    assert again.started_at == first.started_at
    assert (again.seen_at - first.seen_at).total_seconds() >= 30


def test_saying_so_again_is_one_update(thread: SweeperThread) -> None:
    thread._tick()
    with CaptureQueriesContext(connection) as captured:
        sweep(thread)
    about = [query["sql"] for query in captured if "conductor_app_worker" in query["sql"]]
    assert [text.split()[0] for text in about if not text.startswith("SELECT")] == ["UPDATE"]


def test_a_worker_that_shuts_down_says_so_with_the_next_sweep(thread: SweeperThread) -> None:
    thread._tick()
    thread._shutdown.request()
    sweep(thread, later=0)
    assert Worker.objects.get().is_stopping


def test_a_worker_that_ends_removes_its_row_alone(thread: SweeperThread) -> None:
    thread._tick()
    another = Worker.objects.get()
    another.pk = f"{NODE}/0123abcd"
    another.save(force_insert=True)
    thread._part()
    assert Worker.objects.get().pk == f"{NODE}/0123abcd"


def test_any_sweeper_removes_rows_of_workers_that_were_killed_long_ago(thread: SweeperThread) -> None:
    thread._tick()
    for name, seconds in (("old", FORGOTTEN_SECONDS + 60), ("late", FORGOTTEN_SECONDS - 60)):
        row = Worker.objects.get(name=NODE)
        row.pk = row.name = name
        row.save(force_insert=True)
        Worker.objects.filter(pk=name).update(seen_at=F("seen_at") - dt.timedelta(seconds=seconds))
    thread._next_audit = 0.0
    sweep(thread)
    assert set(Worker.objects.values_list("name", flat=True)) == {NODE, "late"}


def test_a_row_that_others_have_removed_comes_back_with_the_start_that_it_had(
    thread: SweeperThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine has slept for hours, and wakes up."""
    thread._tick()
    first = Worker.objects.get()
    Worker.objects.all().delete()
    clock.shift(dt.timedelta(hours=3))
    thread._started_at -= dt.timedelta(hours=3).total_seconds()
    sweep(thread)
    assert abs((Worker.objects.get().started_at - first.started_at).total_seconds()) < 60


def test_an_error_is_told_once_and_harms_no_sweep(
    thread: SweeperThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise DatabaseError('relation "conductor_app_worker" does not exist')

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "conductor_app.worker"):
        patch.setattr(attending, "attend", refuse)
        for _ in range(3):
            sweep(thread)
    told = [record.getMessage().partition("; ") for record in caplog.records]
    assert [(what, why) for what, _, why in told] == [
        (
            "That this worker is there could not be written",
            'sweeping goes on: relation "conductor_app_worker" does not exist',
        )
    ]
    assert (thread._ticks, thread._last_problem) == (3, "")
    sweep(thread)
    assert Worker.objects.exists()


def test_the_time_between_two_rows_is_not_that_between_two_sweeps() -> None:
    """Twenty workers that sweep each second do not write twenty rows a second."""
    assert sweeper_thread.ATTEND_SECONDS == 10


def test_names_of_queues_are_stored_whatever_they_are(thread: SweeperThread, worker: SimpleNamespace) -> None:
    names = ['"quoted"', "ünïcode", "a,b"]
    worker.app.amqp.queues = Consumes(*names)
    thread._tick()
    row = Worker.objects.get()
    assert row.queue_names() == sorted(names)
    assert json.loads(row.queues) == sorted(names)
