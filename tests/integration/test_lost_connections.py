"""Calls from outside of a body get over a database connection that has died since it was used last."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, InterfaceError, OperationalError, connection, transaction

from conductor_app import api, transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.store.ids import new_root_id
from conductor_app.transitions import dispatch
from tests.app import scenarios
from tests.support.executions import committing, new, queued, running
from tests.support.messages import deliver

has_sessions = pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no sessions that could end")


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's: each call commits."""
    with committing(django_db_blocker):
        yield


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The executions whose messages were published."""
    ids: list[Any] = []
    monkeypatch.setattr(dispatch, "is_embedded", lambda app=None: False)
    monkeypatch.setattr(dispatch, "publish", lambda execution, **_: ids.append(execution.pk) or True)
    return ids


def cut() -> None:
    """End this thread's session behind its driver's back, as a server does that restarts."""
    connection.ensure_connection()
    driver: Any = connection.connection
    descriptor = getattr(driver, "_sock", driver).fileno()
    with socket.socket(fileno=os.dup(descriptor)) as shared:
        shared.shutdown(socket.SHUT_RDWR)


def ended() -> Execution:
    """A root that has failed; the session is cut again afterwards."""
    execution = running()
    transitions.fail(execution, Failure(type="builtins.ValueError", message="no"))
    cut()
    return execution


def delayed() -> Execution:
    """One that is due later; likewise."""
    execution = queued(countdown=60)
    cut()
    return execution


CALLS: dict[str, Callable[[Any], Any]] = {
    "delay": lambda _: Execution.objects.get(pk=scenarios.echo.delay(value=1).id),
    "apply_async by key": lambda _: scenarios.echo.apply_async(kwargs={"value": 1}, idempotency_key="once"),
    "find": api.find,
    "cancel": api.cancel,
    "send_event": lambda execution: api.send_event(execution, "approved"),
    "wake": lambda _: api.wake(delayed()),
    "publish_again": api.publish_again,
    "retry": lambda _: api.retry(ended()),
    "rerun": lambda _: api.rerun(ended()),
    "state": lambda execution: scenarios.echo.AsyncResult(str(execution.pk)).state,
}


@has_sessions
@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("call", CALLS)
def test_a_call_outside_of_a_transaction_is_made_once_more(call: str) -> None:
    execution = queued()
    for _ in range(2):
        cut()
        CALLS[call](execution)


@has_sessions
@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("call", ["delay", "find", "cancel", "send_event"])
def test_a_call_inside_a_transaction_is_the_callers_to_repeat(call: str) -> None:
    execution = queued()
    number = Execution.objects.count()
    with pytest.raises((DatabaseError, InterfaceError)), transaction.atomic():
        queued()
        cut()
        CALLS[call](execution)
    connection.close()
    assert Execution.objects.count() == number


@has_sessions
@pytest.mark.usefixtures("published")
def test_without_autocommit_a_transaction_is_the_callers_as_well() -> None:
    execution = queued()
    transaction.set_autocommit(False)
    try:
        Execution.objects.count()
        cut()
        with pytest.raises((DatabaseError, InterfaceError)):
            api.find(execution)
    finally:
        connection.close()


@has_sessions
@pytest.mark.parametrize("wait", [api.get_result, lambda result, timeout: result.get(timeout=timeout, interval=0.05)])
def test_whoever_waits_for_a_result_waits_on(wait: Callable[..., Any]) -> None:
    result = scenarios.echo.delay(value=7)
    assert result.state == "PENDING"
    ends = threading.Timer(0.5, _succeed, [result.id])
    ends.start()
    cut()
    assert wait(result, timeout=20) == 7
    ends.join()


def _succeed(execution_id: str) -> None:
    try:
        deliver(scenarios.echo, execution_id, headers={"conductor": "doorbell"})
    finally:
        connection.close()


def test_an_execution_whose_commit_got_no_answer_is_new_and_is_published(
    monkeypatch: pytest.MonkeyPatch, published: list[Any]
) -> None:
    save = Execution.save
    lost = [OperationalError("server closed the connection unexpectedly")]

    def save_and_lose(row: Execution, **options: Any) -> None:
        save(row, **options)
        if lost:
            raise lost.pop()

    monkeypatch.setattr(Execution, "save", save_and_lose)
    wanted = new()
    execution, is_new = transitions.create(wanted)
    assert (execution.pk, is_new) == (wanted.id, True)
    assert published == [wanted.id]
    assert transitions.create(wanted)[1] is False
    assert published == [wanted.id]


def test_a_serialization_failure_is_no_concern_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, published: list[Any]
) -> None:
    """With SERIALIZABLE as the role's default."""

    class Refused(Exception):
        sqlstate = "40001"

    save = Execution.save
    refusals = [1, 2, 3]

    def refuse(row: Execution, **options: Any) -> None:
        if refusals:
            refusals.pop()
            raise OperationalError("could not serialize access") from Refused()
        save(row, **options)

    monkeypatch.setattr(Execution, "save", refuse)
    result = scenarios.echo.delay(value=1)
    assert [str(key) for key in published] == [result.id]
    assert not refusals


def test_a_database_that_stays_away_is_the_callers_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(row: Execution, **_options: Any) -> None:
        tries.append(1)
        raise OperationalError("connection refused")

    monkeypatch.setattr(Execution, "save", refuse)
    begun = time.monotonic()
    with pytest.raises(OperationalError, match="connection refused"):
        scenarios.echo.apply_async(kwargs={"value": 1}, task_id=str(new_root_id()))
    assert len(tries) > 1
    assert time.monotonic() - begun < 10
