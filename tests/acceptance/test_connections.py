"""Each process has connections of its own to brokers and databases, and one that has died delays nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from conductor_app import api
from conductor_app.models import Execution
from conductor_app.telling.headlines import headline
from conductor_app.telling.story import read
from project.celery import app
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.broker import broker_at
from tests.support.databases import end_other_sessions
from tests.support.messages import needs_a_broker
from tests.support.polling import wait_until
from tests.support.proxy import Proxy
from tests.support.watching import only
from tests.support.worker import ROOT, Worker

pytestmark = pytest.mark.usefixtures("recorded")

#: Far longer than a test: what is published again cannot be what brought a message.
PUBLISHED_ONCE = {"REDISPATCH_SECONDS": 120, "LEASE_SECONDS": 120}
#: Less than the rest of a broker that has just failed, and more than a slow machine takes.
SOON = 4.0
NOT_TAKEN = "did not take the message"


def seconds_of(begin: Any) -> float:
    """How long an execution takes, from its creation to its result."""
    begun = time.monotonic()
    api.get_result(begin(), timeout=60)
    return time.monotonic() - begun


#: With confirmations of RabbitMQ, and without; they take different ways through the code.
confirming = pytest.mark.parametrize(
    "worker_app", ["project", "tests.support.unconfirmed_app"], ids=["confirmed", "unconfirmed"]
)


@needs_a_broker
@confirming
def test_processes_that_are_replaced_leave_the_connections_of_others_alone(worker: Any, worker_app: str) -> None:
    """A new process inherits the sockets of the main one, which publishes what is due."""
    started = worker(app=worker_app, conductor=PUBLISHED_ONCE, args=["--max-tasks-per-child=3"])
    taken = [seconds_of(lambda: scenarios.naps.delay(seconds=0.3)) for _ in range(8)]
    assert max(taken) < SOON, taken
    assert NOT_TAKEN not in started.log
    invariants.check(started)


@needs_a_broker
@confirming
def test_processes_that_are_killed_take_no_connection_with_them(worker: Any, worker_app: str) -> None:
    started = worker(app=worker_app, conductor=PUBLISHED_ONCE)
    taken = []
    for _ in range(5):
        started.kill_pool_process()
        taken.append(seconds_of(lambda: scenarios.naps.delay(seconds=0.3)))
    # What the killed process was about to run is missed when Celery looks after its pool.
    assert sorted(taken)[2] < SOON, taken
    assert max(taken) < 10, taken
    assert NOT_TAKEN not in started.log
    invariants.check(started)


@needs_a_broker
@pytest.mark.parametrize("confirms", [True, False], ids=["confirmed", "unconfirmed"])
def test_a_connection_that_was_cut_between_two_calls_delays_nothing(
    worker: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settings: Any, confirms: bool
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, **PUBLISHED_ONCE}
    options = {**app.conf.broker_transport_options, "confirm_publish": confirms}
    monkeypatch.setitem(app.conf, "broker_transport_options", options)
    started = worker(conductor=PUBLISHED_ONCE)
    taken = []
    with Proxy(app.conf.broker_url) as proxy, broker_at(proxy.url):
        taken.append(seconds_of(lambda: scenarios.echo.delay(value=0)))
        for value in range(1, 5):
            proxy.close()
            proxy.open()
            taken.append(seconds_of(lambda value=value: scenarios.echo.delay(value=value)))
    assert max(taken) < SOON, taken
    assert NOT_TAKEN not in caplog.text
    invariants.check(started)


@needs_a_broker
def test_forks_of_a_process_that_has_published_have_connections_of_their_own(
    worker: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As in ``gunicorn --preload``, which loads the project, and perhaps calls a task, before it forks."""
    settings.CONDUCTOR = {**settings.CONDUCTOR, **PUBLISHED_ONCE}
    started = worker(conductor=PUBLISHED_ONCE)
    assert api.get_result(scenarios.echo.delay(value="before"), timeout=30) == "before"
    children = [fork(publish_and_look) for _ in range(3)]
    for value in range(20):
        scenarios.echo.delay(value=value)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    scenarios.echo.delay(value="after")
    wait_until(lambda: Execution.objects.filter(status="succeeded").count() == 1 + 20 + 3 * 20 + 1, timeout=40)
    assert NOT_TAKEN not in caplog.text
    invariants.check(started)


def publish_and_look() -> bool:
    """What a forked process does."""
    ids = [scenarios.echo.delay(value=value).id for value in range(20)]
    return Execution.objects.filter(pk__in=ids).count() == 20


def fork(act: Any) -> int:
    """Start a process by ``os.fork`` alone; its exit code is 0 if ``act`` returns something true."""
    if pid := os.fork():
        return pid
    code = 1
    with suppress(BaseException):
        code = 0 if act() else 2
    # Not at once: what the end of a process frees must reach nobody, either.
    connection.close()
    os._exit(code)


@contextmanager
def beat(directory: Path) -> Iterator[Path]:
    """A Celery Beat with its default scheduler; gives its log."""
    log = directory / "beat.log"
    command = [sys.executable, "-m", "celery", "-A", "tests.support.beat_app", "beat", "--loglevel=INFO"]
    command += ["--schedule", str(directory / "schedule"), "--pidfile", str(directory / "pid"), "--max-interval=1"]
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "CONDUCTOR_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield log
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no sessions that could end")
def test_beat_goes_on_when_its_database_session_has_ended(transactional_db: None, tmp_path: Path) -> None:
    with beat(tmp_path) as log:
        for lost in range(10):
            known = Execution.objects.count()
            wait_until(
                lambda known=known: Execution.objects.count() > known + 1,
                timeout=30,
                message=lambda lost=lost: f"Beat schedules no more after {lost} lost sessions: {log.read_text()}",
            )
            end_other_sessions()
    assert "Message Error" not in log.read_text()


def in_namespace() -> list[str]:
    """A command that gives what it runs process ids of its own, as a container does."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no process namespaces here")
    return command


@pytest.mark.skipif(
    app.connection_for_write().transport.driver_type == "amqp",
    reason="RabbitMQ lets no second worker of a name listen to commands, so Celery ends it",
)
def test_workers_of_one_name_in_containers_of_their_own_leave_each_other_alone(worker: Any) -> None:
    same: Any = {
        "prefix": in_namespace(),
        "args": ["--hostname=same@%h", "--max-tasks-per-child=2"],
        "conductor": {"LEASE_SECONDS": 120},
        "concurrency": 2,
    }
    first: Worker = worker(**same, wait=False)
    second: Worker = worker(**same, wait=False)
    for started in (first, second):
        started.wait_ready(40)
    results = [scenarios.has_one_attempt.delay(seconds=0.1) for _ in range(40)]
    for result in results:
        assert api.get_result(result, timeout=90) == "done"
    assert {count("body", result.id) for result in results} == {1}
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert all("succeeded" in started.log for started in (first, second)), "one of them has done all the work"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_reads_no_json_says_so_and_so_does_the_row(worker: Any, pool: str) -> None:
    deaf = worker(pool=pool, app="tests.support.deaf_app", conductor={"REDISPATCH_SECONDS": 0.5})
    assert "ERROR conductor.E032: CELERY_ACCEPT_CONTENT has no json" in deaf.log
    result = scenarios.echo.delay(value=1)
    wait_until(lambda: only(scenarios.echo).error, timeout=30, message="The row does not tell")
    assert "it cannot be read" in deaf.log
    row = only(scenarios.echo)
    assert (row.status, row.attempt) == ("queued", 1)
    story = read(row.pk, preview=None)
    assert story is not None
    line = headline(story.situation)
    assert f"Worker {deaf.name}@" in line.text
    assert "could not read its message" in line.text
    deaf.kill()
    worker(pool=pool)
    assert api.get_result(result, timeout=30) == 1
    assert only(scenarios.echo).error is None
