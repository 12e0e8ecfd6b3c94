"""Which connections outlive a run in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery._state import _task_stack
from celery.fixups.django import DjangoWorkerFixup
from django.db import connection, transaction

from conductor_app.host import reuse
from conductor_app.store.process import process
from project.celery import app
from tests.app import plain, scenarios

Surround = Callable[[Any], None]

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def fixup(monkeypatch: pytest.MonkeyPatch) -> DjangoWorkerFixup:
    """Celery's fixup, as a worker has it."""
    monkeypatch.setattr(DjangoWorkerFixup, "close_database", DjangoWorkerFixup.close_database)
    reuse.install()
    reuse.install()  # once more, as a second worker in this process would
    return DjangoWorkerFixup(app)


@pytest.fixture
def max_age(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    def change(seconds: int) -> None:
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", seconds)
        connection.close()
        connection.ensure_connection()

    yield change
    monkeypatch.undo()
    connection.close()


def run(fixup: DjangoWorkerFixup, task: Any) -> bool:
    """Do what the fixup does around a run of a task; tell whether the connection is still the same afterwards."""
    before = connection.connection
    _task_stack.push(task)
    try:
        fixup.on_task_prerun(sender=task)
        fixup.on_task_postrun(sender=task)
    finally:
        _task_stack.pop()
    return before is not None and connection.connection is before


@pytest.mark.parametrize(("seconds", "kept"), [(60, True), (0, False)])
def test_a_durable_run_keeps_a_connection_as_long_as_the_setting_says(
    fixup: DjangoWorkerFixup, max_age: Callable[[int], None], seconds: int, kept: bool
) -> None:
    max_age(seconds)
    assert run(fixup, scenarios.echo._get_current_object()) is kept


def test_a_connection_that_an_error_has_broken_is_not_kept(
    fixup: DjangoWorkerFixup, max_age: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    max_age(60)
    connection.errors_occurred = True
    assert run(fixup, scenarios.echo._get_current_object())
    connection.errors_occurred = True
    monkeypatch.setattr(connection, "is_usable", lambda: False)
    assert not run(fixup, scenarios.echo._get_current_object())


def test_no_connection_is_closed_inside_of_a_block(fixup: DjangoWorkerFixup, max_age: Callable[[int], None]) -> None:
    """Its transaction is a test case's, when a worker of ``celery.contrib.testing`` shares the connection with it."""
    max_age(0)
    with transaction.atomic():
        assert run(fixup, scenarios.echo._get_current_object())
        process.worker.renew_connections()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")


def test_plain_tasks_are_left_to_celery(fixup: DjangoWorkerFixup, max_age: Callable[[int], None]) -> None:
    max_age(60)
    assert not run(fixup, plain.echo._get_current_object())
    connection.ensure_connection()
    fixup.close_database()  # as a worker that starts does
    assert connection.connection is None


def test_a_number_of_tasks_that_celery_counts_is_left_to_celery(
    fixup: DjangoWorkerFixup, max_age: Callable[[int], None]
) -> None:
    max_age(0)
    fixup.db_reuse_max = 100
    assert run(fixup, scenarios.echo._get_current_object())


def test_a_pool_of_connections_is_left_to_celery(fixup: DjangoWorkerFixup, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr(DjangoWorkerFixup, "close_database", lambda self, **_kwargs: left.append(self))
    reuse.install()
    run(fixup, scenarios.echo._get_current_object())
    assert left == []
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {**connection.settings_dict["OPTIONS"], "pool": True})
    run(fixup, scenarios.echo._get_current_object())
    assert left == [fixup, fixup]


def test_the_fixup_asks_for_its_method_at_each_task(fixup: DjangoWorkerFixup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``reuse`` relies on: the signals are connected to methods that look this one up."""
    asked = []
    monkeypatch.setattr(DjangoWorkerFixup, "close_database", lambda self, **_kwargs: asked.append(self))
    monkeypatch.setattr(fixup, "close_cache", lambda: None)
    run(fixup, scenarios.echo._get_current_object())
    assert asked == [fixup, fixup]
