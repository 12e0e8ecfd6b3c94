"""What is raised while a statement is under way takes its connection along: no later statement gets its answer."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.db import Error, connection, transaction

from conductor_app.body import left_open
from conductor_app.store import frames, interrupted
from conductor_app.store.soft_limits import soft_limit
from tests.app.ledger import count, note
from tests.app.models import Ledger
from tests.support.polling import wait_until

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no server that could answer late"),
]

SLEEP = {"postgresql": "SELECT pg_sleep(20)", "mysql": "SELECT SLEEP(20)"}
DRIVERS = ("psycopg", "pymysql", "MySQLdb")


class Alarm(Exception):
    """What a handler of the user's own raises, in the middle of whatever is under way."""


@pytest.fixture
def limit() -> Iterator[int]:
    """The signal of Celery's soft time limit, with a handler like Celery's behind ours."""
    yield from handled(signal.SIGUSR1, SoftTimeLimitExceeded)


@pytest.fixture
def alarm() -> Iterator[int]:
    """A signal of which we know nothing."""
    yield from handled(signal.SIGUSR2, Alarm)


def handled(number: int, error: type[Exception]) -> Iterator[int]:
    def strike(*_: Any) -> None:
        raise error

    before = signal.signal(number, strike)
    soft_limit()
    yield number
    signal.signal(number, before)
    left_open.discard("default")


class Points:
    """The calls of a driver's functions, of which one is struck by a signal."""

    def __init__(self, number: int, struck: int) -> None:
        self._signal = number
        self._left = struck

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        # What is raised in a finalizer is dropped, so nothing may be closed for it.
        if (
            event == "call"
            and frame.f_code.co_name != "__del__"
            and frame.f_globals.get("__name__", "").startswith(DRIVERS)
        ):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)

    @property
    def is_struck(self) -> bool:
        return self._left <= 0


@contextmanager
def striking(points: Points) -> Iterator[None]:
    sys.setprofile(points)
    try:
        yield
    finally:
        sys.setprofile(None)


def write_twice(key: str) -> None:
    with transaction.atomic():
        note(None, key)
        note(None, key)


def check_answers(key: str) -> None:
    """Each statement gets its own answer, and the two writes are there, or neither is."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s", ["nonce"])
        assert cursor.fetchone() == ("nonce",)
    assert count(key) in (0, 2)
    note(None, "later")
    assert Ledger.objects.filter(key="later").update(value="changed") == 1
    assert Ledger.objects.filter(key="later").delete()[0] == 1


def test_a_soft_limit_at_any_point_of_a_transaction_spoils_no_answer_after_it(limit: int) -> None:
    for number in itertools.count(1):
        key, points = f"point {number}", Points(limit, number)
        connection.ensure_connection()
        with suppress(SoftTimeLimitExceeded, Error), striking(points):
            write_twice(key)
        if not points.is_struck:
            break
        check_answers(key)
    assert number > 20, "The points are not counted"


def test_a_block_whose_body_catches_the_limit_gets_no_wrong_answer(limit: int) -> None:
    for number in itertools.count(1):
        points = Points(limit, number)
        connection.ensure_connection()
        with suppress(Error), transaction.atomic():
            note(None, f"point {number}")
            with suppress(SoftTimeLimitExceeded), striking(points):
                Ledger.objects.filter(key=f"point {number}").update(value="changed")
            with connection.cursor() as cursor:
                cursor.execute("SELECT %s", ["nonce"])
                assert cursor.fetchone() == ("nonce",)
        check_answers(f"point {number}" if points.is_struck and not count(f"point {number}") else "nothing")
        if not points.is_struck:
            break
    assert number > 5, "The points are not counted"


def test_a_limit_that_strikes_a_long_statement_lets_the_next_one_connect_anew(limit: int) -> None:
    thread = threading.get_ident()
    striker = threading.Thread(target=lambda: strike_in_driver(thread, limit))
    with connection.cursor() as cursor:
        striker.start()
        with pytest.raises(SoftTimeLimitExceeded):
            cursor.execute(SLEEP[connection.vendor])
    striker.join(10)
    check_answers("nothing")


def strike_in_driver(thread: int, number: int) -> None:
    wait_until(lambda: frames.in_driver(sys._current_frames()[thread]), 10)
    os.kill(os.getpid(), number)


def test_what_any_handler_raises_in_a_statement_closes_its_connection(alarm: int) -> None:
    """As far as it comes out of the body or of the step. Django rolls its own blocks back before anybody can help."""
    for number in itertools.count(1):
        points = Points(alarm, number)
        try:
            with connection.cursor() as cursor, striking(points):
                cursor.execute("SELECT %s", ["another's"])
                cursor.fetchone()
        except (Alarm, Error) as error:
            interrupted.close_raised_in(error)
        if not points.is_struck:
            break
        check_answers("nothing")
    assert number > 5, "The points are not counted"


def test_errors_of_the_database_leave_its_connection_open() -> None:
    connection.ensure_connection()
    session = connection.connection
    with connection.cursor() as cursor:
        for wrong in (lambda: cursor.execute("SELECT nothing FROM nowhere"), lambda: cursor.execute("SELECT %s", [])):
            with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
                wrong()
            interrupted.close_raised_in(raised.value)
    assert connection.connection is session


class Unshown:
    def __str__(self) -> str:
        raise TypeError


#: What a driver refuses before it speaks with its server, with an error that is none of its own.
MISTAKES: dict[str, tuple[str, list[Any]]] = {"mysql": ("SELECT %s", [Unshown()])}
if connection.vendor == "postgresql":
    from django.db.backends.postgresql.psycopg_any import Jsonb

    MISTAKES["postgresql"] = ("SELECT %s", [Jsonb(object())])


def test_a_mistake_in_somebody_elses_block_leaves_that_its_connection() -> None:
    """A ``TestCase``, or a view with ``ATOMIC_REQUESTS``, goes on after a body that has failed in it."""
    with transaction.atomic():
        session = connection.connection
        with pytest.raises(TypeError) as raised, connection.cursor() as cursor:
            cursor.execute(*MISTAKES[connection.vendor])
        interrupted.close_raised_in(raised.value)
        assert connection.connection is session
        note(None, "kept")
    assert count("kept") == 1


def test_errors_of_the_body_leave_connections_open() -> None:
    connection.ensure_connection()
    session = connection.connection
    with pytest.raises(ValueError, match="its own") as raised:
        raise ValueError("its own")
    interrupted.close_raised_in(raised.value)
    assert connection.connection is session
