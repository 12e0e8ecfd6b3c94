"""Workers delete the trees of their tasks that are kept no longer, and no others."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import current_app
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection
from django.test.utils import CaptureQueriesContext

from conductor_app import DurableTask, transitions
from conductor_app.conf import ConductorSettings
from conductor_app.engine import pruner, retention
from conductor_app.exceptions import InvalidArgument
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.locks import RowsLocked
from tests.support.bodies import durable, start
from tests.support.executions import FAILURE, queued, running
from tests.support.schedules import schedules

pytestmark = pytest.mark.django_db

DAY = dt.timedelta(days=1)


@pytest.fixture(autouse=True)
def _no_task_stays() -> Iterator[None]:
    with schedules():
        yield


def ended(task: DurableTask[..., Any] | None, how: str = "succeeded", days: float = 2) -> Execution:
    """A root that ended so many days ago."""
    name = "tests.bodies.unknown" if task is None else task.name
    if how == "cancelled":
        run = queued(task=name)
        transitions.request_cancel(run.pk, "")
        transitions.cancel_flagged(run.pk)
    else:
        run = running(task=name)
        if how == "succeeded":
            transitions.succeed(run, "1")
        else:
            transitions.fail(run, FAILURE)
    Execution.objects.filter(pk=run.pk).update(finished_at=clock.after(-days * 86_400))
    return run


def delete() -> None:
    """Do what a worker does about once an hour."""
    deleting = due()
    while deleting.go_on():
        pass


def due() -> retention.Deleting:
    deleting = retention.Deleting()
    deleting._next_look = 0.0
    return deleting


def left() -> set[Any]:
    return set(Execution.objects.values_list("pk", flat=True))


@pytest.fixture
def conf(settings: Any) -> Callable[..., None]:
    """Sets keys of ``CONDUCTOR``."""

    def set_keys(**keys: Any) -> None:
        settings.CONDUCTOR = {**settings.CONDUCTOR, **keys}

    return set_keys


def test_a_task_says_how_long_its_trees_are_kept() -> None:
    short = durable(lambda ctx: None, keep=DAY, keep_failed=3 * DAY)
    long, silent = durable(lambda ctx: None, keep=30 * DAY), durable(lambda ctx: None)
    for how in ("succeeded", "cancelled", "failed"):
        ended(short, how, days=4)
    kept = {
        ended(short, "succeeded", 0.5).pk,
        ended(short, "failed", 2).pk,
        ended(long, "succeeded").pk,
        ended(long, "failed", 300).pk,
        ended(silent, "succeeded", 300).pk,
        queued(task=short.name).pk,
    }
    delete()
    assert left() == kept


def test_the_settings_say_it_for_tasks_that_say_nothing(conf: Any) -> None:
    silent, own = durable(lambda ctx: None), durable(lambda ctx: None, keep=10 * DAY)
    for_good = durable(lambda ctx: None, keep=float("inf"), keep_failed=float("inf"))
    conf(KEEP=DAY, KEEP_FAILED=2 * 86_400)
    ended(silent), ended(silent, "failed", 3), ended(own, "failed", 3)
    kept = {ended(own).pk, ended(silent, "failed", 1.5).pk, ended(for_good, days=900).pk}
    kept |= {ended(for_good, "failed", 900).pk, ended(None, days=900).pk}
    delete()
    assert left() == kept


def test_trees_go_whole_by_the_task_of_their_root() -> None:
    child = durable(lambda ctx: 1, keep=1)
    root = durable(lambda ctx: ctx.invoke("child", child), keep=10 * DAY)
    tree = start(root)
    Execution.objects.update(finished_at=clock.after(-5 * DAY))
    delete()
    assert left() == {tree.pk, *Execution.objects.filter(parent=tree).values_list("pk", flat=True)}
    Execution.objects.update(finished_at=clock.after(-11 * DAY))
    delete()
    assert left() == set()


def test_where_nothing_is_said_nothing_is_asked() -> None:
    with CaptureQueriesContext(connection) as found:
        assert not due().go_on()
    assert len(found) == 0


def test_a_worker_looks_once_an_hour_and_deletes_for_a_moment_in_each_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    task = durable(lambda ctx: None, keep=1)
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(retention, "TURN_SECONDS", 0.0)
    for _ in range(5):
        ended(task)
    deleting = due()
    numbers = []
    while deleting.go_on():
        numbers.append(len(left()))
    assert numbers == [3, 1, 0]
    ended(task)
    assert not deleting.go_on()
    assert len(left()) == 1


def test_what_is_locked_or_cannot_be_read_stays_for_the_next_look(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    task = durable(lambda ctx: None, keep=1)
    ended(task)

    def locked(*_args: Any) -> int:
        raise RowsLocked("somebody")

    def away(*_args: Any) -> int:
        raise DatabaseError("away")

    for act in (locked, away):
        monkeypatch.setattr(pruner, "delete", act)
        assert not due().go_on()
    assert "Deleting old executions was broken off; it begins anew in an hour: away" in caplog.text
    monkeypatch.undo()
    delete()
    assert left() == set()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (0, "keep must be > 0 seconds, got 0"),
        (-DAY, "keep must be > 0 seconds"),
        (float("nan"), "keep must be > 0 seconds"),
        (1e12, "keep must be at most"),
        ("7d", "keep must be a number of seconds or a timedelta, got str"),
        (True, "keep must be a number of seconds or a timedelta, got bool"),
    ],
)
def test_what_is_no_duration_is_refused_where_it_is_written(value: Any, what: str) -> None:
    with pytest.raises((InvalidArgument, TypeError)) as refused:
        durable(lambda ctx: None, keep=value)
    assert what in str(refused.value)
    with pytest.raises((InvalidArgument, TypeError)):
        durable(lambda ctx: None, keep_failed=value)


@pytest.mark.parametrize("key", ["KEEP", "KEEP_FAILED"])
def test_the_settings_are_checked(key: str) -> None:
    for value, what in (
        (0, "must be greater than 0 and at most 100 years"),
        (float("inf"), "must be greater than 0 and at most 100 years"),
        (float("nan"), "must be greater than 0 and at most 100 years"),
        ("7d", "must be a number of seconds, a timedelta or None"),
        (True, "must be a number of seconds, a timedelta or None"),
    ):
        with pytest.raises(ImproperlyConfigured, match=f'CONDUCTOR\\["{key}"\\] {what}'):
            ConductorSettings.from_dict({key: value})
    assert getattr(ConductorSettings.from_dict({key: 7 * DAY}), key) == 7 * 86_400
    assert getattr(ConductorSettings.from_dict({key: None}), key) is None


def test_only_tasks_that_a_process_has_are_asked_for(conf: Any) -> None:
    conf(KEEP=DAY)
    task = durable(lambda ctx: None)
    assert task.name in retention.limits()[86_400.0, ("succeeded", "cancelled")]
    name = task.name
    del current_app.tasks[name]
    assert not any(name in names for names in retention.limits().values())
