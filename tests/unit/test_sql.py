"""How a busy or absent database is met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, InterfaceError, OperationalError

from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.sql import Literal, is_conflict, is_outage, persist


class DriverError(Exception):
    """What a driver raises, below Django's own exception."""

    def __init__(self, *args: Any, sqlstate: str | None = None, pgcode: str | None = None) -> None:
        super().__init__(*args)
        if sqlstate:
            self.sqlstate = sqlstate
        if pgcode:
            self.pgcode = pgcode


def wrapped(cls: type[Exception], *args: Any, **codes: Any) -> Exception:
    error = cls(*args)
    error.__cause__ = DriverError(*args, **codes)
    return error


CONFLICTS = [
    wrapped(OperationalError, "could not serialize access", sqlstate="40001"),
    wrapped(OperationalError, "deadlock detected", sqlstate="40P01"),
    wrapped(OperationalError, "canceling statement due to lock timeout", pgcode="55P03"),
    wrapped(OperationalError, 1213, "Deadlock found when trying to get lock"),
    wrapped(OperationalError, 1205, "Lock wait timeout exceeded"),
    wrapped(OperationalError, "database is locked"),
    wrapped(OperationalError, "database table is locked: conductor_app_execution"),
    OperationalError("database is locked"),
]
OUTAGES = [
    wrapped(OperationalError, "connection to server failed: Connection refused"),
    wrapped(OperationalError, "terminating connection due to administrator command", sqlstate="57P01"),
    wrapped(OperationalError, 2006, "Server has gone away"),
    wrapped(OperationalError, 2013, "Lost connection to server during query"),
    wrapped(OperationalError, 2003, "Can't connect to server"),
    wrapped(InterfaceError, "connection already closed"),
    wrapped(InterfaceError, 0, ""),
    OperationalError(),
]
NEITHER = [
    wrapped(IntegrityError, "duplicate key", sqlstate="23505"),
    wrapped(IntegrityError, 1062, "Duplicate entry"),
    wrapped(DatabaseError, "syntax error", sqlstate="42601"),
    wrapped(OperationalError, "no such table: conductor_app_execution"),
    wrapped(OperationalError, 1054, "Unknown column"),
    ValueError("database"),
]


@pytest.mark.parametrize("error", CONFLICTS, ids=str)
def test_a_conflict_is_told_from_an_outage(error: Exception) -> None:
    assert (is_conflict(error), is_outage(error)) == (True, False)


@pytest.mark.parametrize("error", OUTAGES, ids=str)
def test_an_outage_is_told_from_a_conflict(error: Exception) -> None:
    assert (is_conflict(error), is_outage(error)) == (False, True)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_any_other_error_is_neither(error: Exception) -> None:
    assert (is_conflict(error), is_outage(error)) == (False, False)


@pytest.fixture
def pauses(monkeypatch: Any) -> list[float]:
    """What ``persist`` has slept; it is not slept."""
    slept: list[float] = []
    monkeypatch.setattr("conductor_app.sql.time.sleep", slept.append)
    return slept


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def work() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return work


def test_a_conflict_is_tried_again_after_a_growing_random_pause(pauses: list[float]) -> None:
    assert persist("default", failing(*[CONFLICTS[0]] * 8), patience=0) == "done"
    assert len(pauses) == 8
    assert all(0 <= pause <= 0.02 * 2**number for number, pause in enumerate(pauses, 1))


def test_an_outage_is_waited_for_with_growing_pauses(pauses: list[float]) -> None:
    assert persist("default", failing(*OUTAGES), patience=60) == "done"
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_an_outage_longer_than_the_patience_abandons_the_run(pauses: list[float]) -> None:
    with pytest.raises(AbandonRun) as abandoned:
        persist("default", failing(*[OUTAGES[0]] * 100), patience=0.05)
    assert str(abandoned.value) == (
        "the database did not answer for 0.05s: connection to server failed: Connection refused"
    )
    assert abandoned.value.__cause__ is OUTAGES[0]
    assert pauses == []


@pytest.mark.parametrize("error", [*NEITHER, LeaseLost("x")], ids=str)
def test_any_other_error_is_raised_at_once(error: Exception, pauses: list[float]) -> None:
    with pytest.raises(type(error)) as raised:
        persist("default", failing(error), patience=60)
    assert raised.value is error
    assert pauses == []


@pytest.mark.django_db
@pytest.mark.parametrize("error", [CONFLICTS[0], OUTAGES[0]], ids=str)
def test_inside_a_transaction_nothing_is_tried_again(error: Exception, pauses: list[float]) -> None:
    with pytest.raises(OperationalError) as raised:
        persist("default", failing(error), patience=60)
    assert raised.value is error
    assert pauses == []


@pytest.mark.parametrize("value", ["queued'; DROP TABLE", "a b", "", "1"])
def test_a_literal_is_a_plain_word(value: str) -> None:
    with pytest.raises(ValueError, match="not a plain word"):
        Literal(value)
