"""``manage.py conductor`` as a probe: ``alive``, and ``doctor --strict``."""

from __future__ import annotations

import datetime as dt
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.db import OperationalError
from django.db.migrations.recorder import MigrationRecorder

from conductor_app.checks import schema
from conductor_app.management.subcommands import doctor
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from tests.support import executions
from tests.support.command import Told, told
from tests.support.process import NotingBroker
from tests.support.worker import ROOT

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _steady_clock() -> Iterator[None]:
    process.broker = NotingBroker()
    yield
    clock.reset()


# --------------------------------------------------------------------------------------------------------------- alive


def test_alive_tells_in_one_line_that_the_database_answers() -> None:
    answer = told("alive")
    assert (answer.code, answer.out.count("\n")) == (0, 1)
    assert answer.out.startswith('Alive: database "default" answered in ')
    document = told("alive", "--json").json
    assert (document["ok"], document["database"]) == (True, "default")
    assert 0 <= document["seconds"] < 60


def test_alive_reports_missing_tables_and_migrations(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    monkeypatch.setattr(schema, "missing_tables", lambda using: ["conductor_app_step"])
    answer = told("alive")
    assert (answer.code, answer.out) == (1, "")
    assert answer.error == (
        'conductor_app tables do not exist in database "default". Run: python manage.py migrate conductor_app'
    )
    monkeypatch.undo()
    monkeypatch.setattr(schema, "unapplied_migrations", lambda using: ["0004_fewer_constraints"])
    answer = told("alive", "--json")
    assert (answer.code, answer.json) == (1, {"error": answer.error})
    assert answer.error == (
        'Migrations of conductor_app are not applied to database "default": 0004_fewer_constraints. '
        "Run: python manage.py migrate conductor_app"
    )


def test_a_migration_that_the_database_has_not_seen_is_unapplied(settings: Any) -> None:
    assert schema.unapplied_migrations("default") == []
    MigrationRecorder.Migration.objects.filter(app="conductor_app", name="0003_permissions").delete()
    assert schema.unapplied_migrations("default") == ["0003_permissions"]
    settings.MIGRATION_MODULES = {"conductor_app": None}
    assert schema.unapplied_migrations("default") == []


def test_alive_waits_no_longer_than_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(schema, "missing_tables", lambda using: over.wait(60) and [])
    started = time.monotonic()
    answer = told("alive", "--timeout", "0.2")
    over.set()
    assert time.monotonic() - started < 30
    assert (answer.code, answer.error) == (1, 'Database "default" did not answer within 0.2 s.')


def test_alive_reports_a_database_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(using: str) -> list[str]:
        raise OperationalError("connection refused\nIs the server running?")

    monkeypatch.setattr(schema, "missing_tables", refused)
    answer = told("alive")
    assert (answer.code, answer.error) == (1, 'Database "default" does not answer: connection refused')


@pytest.mark.parametrize("timeout", ["0", "-1", "x", "inf", "nan", "1e9"])
def test_alive_refuses_a_timeout_that_means_nothing(timeout: str) -> None:
    answer = told("alive", f"--timeout={timeout}")
    assert answer.code != 0
    assert "must be a number of seconds greater than 0, at most a day" in answer.error


_ALIVE = """
import sys
from django.core.management import execute_from_command_line
try:
    execute_from_command_line(["manage.py", "conductor", "alive", *sys.argv[1:]])
finally:
    print(sorted({"project.shop.tasks"} & set(sys.modules)), file=sys.stderr)
"""


def alive(url: str, *words: str, broker: str = "memory://") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _ALIVE, *words],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "DATABASE_URL": url,
            "CELERY_BROKER_URL": broker,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_alive_imports_no_tasks_and_asks_no_broker(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(0.01)
        broker = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        ended = alive(f"sqlite:///{tmp_path}/empty.sqlite3", broker=broker)
        with pytest.raises(TimeoutError):
            silent.accept()
    assert ended.returncode == 1
    error, imported = ended.stderr.splitlines()
    assert error.startswith("CommandError: conductor_app tables do not exist")
    assert "project.shop.tasks" not in imported


def test_alive_ends_in_time_beside_a_silent_database() -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ended = alive(f"postgres://shop@127.0.0.1:{silent.getsockname()[1]}/shop", "--timeout", "0.3")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[0] == 'CommandError: Database "default" did not answer within 0.3 s.'


# ------------------------------------------------------------------------------------------------------ doctor --strict


def asked(monkeypatch: pytest.MonkeyPatch, queues: dict[str, list[str]] | None) -> Callable[..., Told]:
    """``doctor`` beside workers that answer with these queues; ``None``: a broker where nobody can be asked."""

    class Inspect:
        def active_queues(self) -> dict[str, list[dict[str, str]]]:
            return {name: [{"name": queue} for queue in found] for name, found in (queues or {}).items()}

    asked_app = Celery("shop", broker="memory://" if queues is None else "amqp://nowhere", set_as_current=False)
    monkeypatch.setattr(asked_app.control, "inspect", lambda timeout: Inspect())
    monkeypatch.setattr(doctor.dispatch, "is_embedded", lambda app=None: queues is None)
    monkeypatch.setattr(doctor, "celery_app", lambda: asked_app)
    monkeypatch.setattr(doctor, "_broker", lambda app: doctor.Finding("broker", "OK", "It answers."))
    monkeypatch.setattr(doctor, "_other_checks", lambda: iter(()))
    return told


def test_strict_wants_somebody_who_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    call = asked(monkeypatch, {})
    loose, strict = call("doctor"), call("doctor", "--strict")
    assert (loose.code, loose.notes) == (0, "")
    assert (strict.code, strict.notes) == (1, "--strict: a person is needed for workers.\n")
    assert [line.split()[:2] for line in strict.out.splitlines()] == [
        line.split()[:2] for line in loose.out.splitlines()
    ]
    assert call("doctor", "--json").json["ok"] is True
    document = call("doctor", "--strict", "--json").json
    assert document["ok"] is False
    assert [check["name"] for check in document["checks"] if check["needs_person"]] == ["workers"]
    # A solo worker that runs a task answers nobody.
    executions.running()
    assert call("doctor", "--strict").code == 0
    clock.shift(dt.timedelta(seconds=10))  # its lease has ended
    assert call("doctor", "--strict").code == 1


def test_strict_is_content_with_workers_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    call = asked(monkeypatch, {"celery@web1": ["celery"]})
    assert call("doctor", "--strict").code == 0
    # Nobody can be asked with memory://; that nobody is at work is no finding.
    assert asked(monkeypatch, None)("doctor", "--strict").code == 0


def test_strict_wants_somebody_known_to_serve_what_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    executions.queued(queue="payments")
    clock.shift(dt.timedelta(minutes=10))
    executions.claimed(executions.queued(queue="mail"))
    call = asked(monkeypatch, None)
    assert call("doctor").code == 0
    answer = call("doctor", "--strict")
    assert (answer.code, answer.notes) == (1, "--strict: a person is needed for queue.\n")
    assert asked(monkeypatch, {"celery@web1": ["payments"]})("doctor", "--strict").code == 0
    executions.running(queue="payments")
    assert asked(monkeypatch, None)("doctor", "--strict").code == 0


def test_what_is_broken_needs_a_person_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    executions.queued(queue="payments")
    clock.shift(dt.timedelta(minutes=10))
    call = asked(monkeypatch, {"celery@web1": ["celery"]})
    for words in ((), ("--strict",)):
        answer = call("doctor", *words, "--json")
        assert answer.code == 1
        assert [check["name"] for check in answer.json["checks"] if check["needs_person"]] == ["queue"]
    assert Execution.objects.count() == 1
