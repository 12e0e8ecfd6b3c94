"""Calls from outside of a body get over a database connection that has died since it was used last."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import DatabaseError, InterfaceError, OperationalError, connection, connections, transaction

from conductor_app import api, transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.store.ids import new_root_id
from conductor_app.store.moves import Move, as_scripts
from conductor_app.store.transactions import together
from tests.app import scenarios
from tests.support.executions import committing, new, queued, running
from tests.support.messages import deliver
from tests.support.process import note_published

has_sessions = pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no sessions that could end")


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's: each call commits."""
    with committing(django_db_blocker):
        yield


@pytest.fixture
def published() -> list[Any]:
    """The executions whose messages were published."""
    return note_published()


def cut() -> None:
    """End this thread's session behind its driver's back, as a server does that restarts."""
    connection.ensure_connection()
    driver: Any = connection.connection
    descriptor = getattr(driver, "_sock", driver).fileno()
    with socket.socket(fileno=os.dup(descriptor)) as shared:
        shared.shutdown(socket.SHUT_RDWR)


def ended(*steps: str) -> Execution:
    """A root that has failed after some steps; the session is cut again afterwards."""
    execution = running()
    for step in steps:
        transitions.record_step(execution, step, result="1")
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
    "fork": lambda _: api.fork(ended("first"), "first"),
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
    make = Move.make
    lost = [OperationalError("server closed the connection unexpectedly")]

    def make_and_lose(*args: Any, **given: Any) -> Any:
        rows = make(*args, **given)
        if lost:
            raise lost.pop()
        return rows

    monkeypatch.setattr(Move, "make", make_and_lose)
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

    make = Move.make
    refusals = [1, 2, 3]

    def refuse(*args: Any, **given: Any) -> Any:
        if refusals:
            refusals.pop()
            raise OperationalError("could not serialize access") from Refused()
        return make(*args, **given)

    monkeypatch.setattr(Move, "make", refuse)
    result = scenarios.echo.delay(value=1)
    assert [str(key) for key in published] == [result.id]
    assert not refusals


def test_a_database_that_stays_away_is_the_callers_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(*_args: Any, **_given: Any) -> None:
        tries.append(1)
        raise OperationalError("connection refused")

    monkeypatch.setattr(Move, "make", refuse)
    begun = time.monotonic()
    with pytest.raises(OperationalError, match="connection refused"):
        scenarios.echo.apply_async(kwargs={"value": 1}, task_id=str(new_root_id()))
    assert len(tries) > 1
    assert time.monotonic() - begun < 10


# ---------------------------------------------------------------------- between COMMIT and the return to autocommit


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Whether this thread's session ends after its next COMMIT, before Django has switched autocommit on again.

    With MySQL that is a statement of its own. Django keeps such a session, and takes it for one in a transaction.
    """
    session: Any = connections["default"]
    session.ensure_connection()
    plain, armed = session.set_autocommit, []

    def set_autocommit(autocommit: bool, **more: Any) -> None:
        if armed and autocommit and session.connection is not None and not session.autocommit:
            armed.pop()
            raise OperationalError("server closed the connection unexpectedly")
        plain(autocommit, **more)

    monkeypatch.setattr(session, "set_autocommit", set_autocommit)
    yield armed
    session.close()


def number_elsewhere() -> int:
    """How many executions another session sees."""
    found: list[int] = []

    def look() -> None:
        found.append(Execution.objects.count())
        connection.close()

    other = threading.Thread(target=look)
    other.start()
    other.join()
    return found[0]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("call", ["delay", "cancel", "send_event", "wake", "retry", "rerun", "fork"])
def test_a_session_that_ends_after_a_commit_is_not_kept(call: str, dying: list[str]) -> None:
    calls = {**CALLS, "wake": lambda _: api.wake(queued(countdown=60)), "retry": lambda _: api.retry(failed)}
    calls["rerun"] = lambda _: api.rerun(failed)
    calls["fork"] = lambda _: api.fork(failed, "first")
    execution, failed = queued(), running()
    transitions.record_step(failed, "first", result="1")
    transitions.fail(failed, Failure(type="builtins.ValueError", message="no"))
    number = Execution.objects.count() + (call in ("delay", "rerun", "fork"))
    with as_scripts():
        dying.append("now")
        calls[call](execution)
        dying.clear()
        assert Execution.objects.count() == number + (call == "wake"), "once"
        assert connection.get_autocommit()
        before = number_elsewhere()
        scenarios.echo.delay(value=1)
        assert number_elsewhere() == before + 1, "and it is committed"


def test_a_run_that_loses_its_session_after_a_commit_goes_on(dying: list[str]) -> None:
    run = running()
    with as_scripts():
        dying.append("now")
        transitions.record_step(run, "first", result="1")
        assert not dying
        dying.append("now")
        assert transitions.record_together(run, "second", lambda: ("2", 2)).value == 2
        assert not dying
        assert connection.get_autocommit()
        dying.append("now")
        transitions.succeed(run, "3")
    assert connection.get_autocommit()
    run.refresh_from_db()
    assert (run.status, run.steps.count(), run.attempts.count()) == ("succeeded", 2, 1)


def test_what_is_decided_together_keeps_no_such_session(dying: list[str]) -> None:
    dying.append("now")
    with pytest.raises(OperationalError):
        together("default", Execution.objects.count)
    assert connection.get_autocommit()
