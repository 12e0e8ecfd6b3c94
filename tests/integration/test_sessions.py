"""Which threads hang on a connection, as others see it; `tests/acceptance/test_silent_database.py` has real ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection, connections
from django.db.backends.utils import CursorWrapper

from conductor_app.store import frames, own_connections, waits
from conductor_app.store.process import process
from conductor_app.transitions import leases
from tests.support.polling import wait_until

#: As if it stood in a driver; what it waits in has no frame of its own.
DRIVER: dict[str, Any] = {"__name__": "psycopg.waiting"}
exec("def answer(waiting):\n    waiting.acquire()\n", DRIVER)
exec("def answer_for(self, waiting):\n    waiting.acquire()\n", DRIVER)


class Statements:
    """A thread that waits for one answer after another, all of it noted as one piece of work."""

    def __init__(self, count: int) -> None:
        self._answers = [threading.Lock() for _ in range(count)]
        for answer in self._answers:
            answer.acquire()
        self._begun = [threading.Event() for _ in range(count)]
        self.wait: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait_for(0)

    def _run(self) -> None:
        with waits.at_work(connection) as self.wait:
            for begun, answer in zip(self._begun, self._answers, strict=True):
                begun.set()
                DRIVER["answer"](answer)

    def go_on(self, number: int) -> None:
        """Get the answer to a statement, and wait for the next one."""
        self._answers[number].release()
        if number + 1 < len(self._answers):
            self._wait_for(number + 1)
        else:
            self._thread.join(10)

    def _wait_for(self, number: int) -> None:
        assert self._begun[number].wait(10)
        wait_until(lambda: frames.in_driver(sys._current_frames()[self._thread.ident]), 10, message="It asks nothing")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that sets the time."""
    clock = SimpleNamespace(monotonic=lambda: 1_000.0)
    monkeypatch.setattr(waits, "time", clock)

    def change(seconds: float) -> None:
        clock.monotonic = lambda: 1_000.0 + seconds

    return change


def overdue() -> list[Any]:
    return waits.overdue(10)


def test_one_statement_that_lasts_is_overdue(at: Callable[[float], None]) -> None:
    statements = Statements(1)
    at(3)
    assert overdue() == []
    at(9)
    assert overdue() == [], "not for long enough"
    at(11)
    assert overdue() == [statements.wait]
    assert statements.wait.is_current()
    statements.go_on(0)
    assert overdue() == []
    assert not statements.wait.is_current()


def test_work_of_many_statements_is_not_however_long_it_takes(at: Callable[[float], None]) -> None:
    """A loaded machine may take its time between two of them, and then the server works on none."""
    statements = Statements(3)
    for number in range(3):
        at(20 * number + 19)
        assert overdue() == []
        statements.go_on(number)


def test_nothing_is_cut_that_has_gone_on_while_the_server_was_asked(at: Callable[[float], None]) -> None:
    statements = Statements(2)
    at(3)
    assert overdue() == []
    at(11)
    assert overdue() == [statements.wait]
    statements.go_on(0)
    assert not statements.wait.is_current()
    statements.go_on(1)


def test_one_look_is_not_enough(at: Callable[[float], None]) -> None:
    """Nor are two that follow each other at once, as when several leases are renewed one after the other."""
    statements = Statements(1)
    at(11)
    assert overdue() == []
    at(12)
    assert overdue() == []
    at(17)
    assert overdue() == [statements.wait]
    statements.go_on(0)


def test_a_look_at_a_cursor_that_is_just_being_made_does_no_harm() -> None:
    """It looked for its attributes in itself, until the heartbeat's thread ended by a RecursionError."""
    cursor, seen, begun, answer = CursorWrapper.__new__(CursorWrapper), [], threading.Event(), threading.Lock()
    answer.acquire()

    def ask() -> None:
        seen.append(waits.InBody(SimpleNamespace(vendor="postgresql")))
        begun.set()
        DRIVER["answer_for"](cursor, answer)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert begun.wait(10)
    wait_until(lambda: frames.in_driver(sys._current_frames()[thread.ident]), 10, message="It asks nothing")
    (body,) = seen
    assert body.look() == 0
    cursor.db = body.connection
    assert body.look() < 10
    assert body.is_current()
    answer.release()
    thread.join(10)


def test_the_heartbeat_outlives_whatever_a_look_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, looks = leases.LeaseKeeper(), []

    def wait() -> list[Any]:
        if len(looks) == 2:
            raise SystemExit  # ends this thread alone
        return []

    def fail(_seconds: float) -> list[Any]:
        looks.append(1)
        raise RecursionError

    monkeypatch.setattr(keeper, "_wait_for_ripe", wait)
    monkeypatch.setattr(waits, "overdue", fail)

    def run() -> None:
        with pytest.raises(SystemExit):
            keeper._run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert len(looks) == 2


@pytest.mark.django_db(transaction=True)
def test_each_statement_on_the_engines_own_connection_is_noted() -> None:
    """Whatever asks: a sweeper that looks ahead hung on a silent database until it was asked by somebody else."""
    noted: list[bool] = []

    def look(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
        noted.append(process.at_work[threading.get_ident()].connection is context["connection"])
        return execute(sql, params, many, context)

    def ask() -> None:
        own = own_connections.use_own("default")
        try:
            with own.execute_wrapper(look), own.cursor() as cursor:
                cursor.execute("SELECT 1")
            noted.append(threading.get_ident() not in process.at_work)
        finally:
            connections.close_all()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert noted  # MySQL is asked for more when it is connected
    assert all(noted)
    assert not connection.execute_wrappers
