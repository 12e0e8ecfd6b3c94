"""How a busy or absent database is met."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, OperationalError, ProgrammingError
from django.db.utils import InternalError

from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.store.errors import is_conflict, is_outage, is_passing, is_undone
from conductor_app.store.statements import Literal
from conductor_app.store.transactions import persist


class DriverError(Exception):
    """What a driver raises, below Django's own exception."""

    def __init__(
        self, *args: Any, sqlstate: str | None = None, pgcode: str | None = None, result: int | None = None
    ) -> None:
        super().__init__(*args)
        if result:
            self.sqlite_errorcode = result
        if sqlstate:
            self.sqlstate = sqlstate
        if pgcode:
            self.pgcode = pgcode


def caused_by(cls: type[Exception], cause: Exception) -> Exception:
    error = cls(*cause.args)
    error.__cause__ = cause
    return error


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
    # Newer PyMySQL knows a SQLSTATE, too, which says less.
    wrapped(OperationalError, 1205, "Lock wait timeout exceeded", sqlstate="HY000"),
    wrapped(OperationalError, 1020, "Record has changed since last read", sqlstate="HY000"),
    wrapped(OperationalError, 1213, "Deadlock found", sqlstate="40001"),
    wrapped(OperationalError, 3572, "Statement aborted because lock(s) could not be acquired", sqlstate="HY000"),
    wrapped(OperationalError, "cannot start a transaction", result=sqlite3.SQLITE_BUSY),
    wrapped(OperationalError, "snapshot", result=sqlite3.SQLITE_BUSY_SNAPSHOT),
    wrapped(OperationalError, "shared", result=sqlite3.SQLITE_LOCKED_SHAREDCACHE),
    wrapped(OperationalError, "locking protocol", result=sqlite3.SQLITE_PROTOCOL),
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
    *(
        wrapped(OperationalError, "over", sqlstate=state)
        for state in ("08000", "08001", "08003", "08004", "08006", "08007", "08P01", "53300")
    ),
    *(wrapped(OperationalError, "over", sqlstate=state) for state in ("57P01", "57P02", "57P03", "57P05")),
    wrapped(OperationalError, "over", pgcode="57P01"),
    *(wrapped(InternalError, "over", sqlstate=state) for state in ("25P03", "25P04", "25006")),
    wrapped(OperationalError, "the connection is closed"),
    wrapped(OperationalError, "consuming input failed: server closed the connection unexpectedly"),
    wrapped(OperationalError, "[Errno -2] Name or service not known"),
    wrapped(OperationalError, "couldn't get a connection after 30.00 sec"),
    wrapped(DatabaseError, "server closed the connection unexpectedly"),
    wrapped(InterfaceError, "cursor already closed"),
    wrapped(InternalError, "Packet sequence number wrong - got 1 expected 0"),
    *(
        wrapped(OperationalError, number, "", sqlstate="HY000")
        for number in (1040, 1053, 1152, 1203, 1226, 1836, 1927, 2002, 2003, 2006, 2013, 2055, 4031)
    ),
    wrapped(ProgrammingError, 2014, "Commands out of sync"),
    wrapped(OperationalError, 1290, "The MariaDB server is running with the --read-only option"),
    wrapped(OperationalError, "unable to open database file", result=sqlite3.SQLITE_CANTOPEN),
    wrapped(OperationalError, "unable to open database file", result=sqlite3.SQLITE_CANTOPEN_ISDIR),
]
NEITHER = [
    wrapped(IntegrityError, "duplicate key", sqlstate="23505"),
    wrapped(IntegrityError, 1062, "Duplicate entry"),
    wrapped(DatabaseError, "syntax error", sqlstate="42601"),
    wrapped(OperationalError, "no such table: conductor_app_execution"),
    wrapped(OperationalError, 1054, "Unknown column"),
    ValueError("database"),
    # PostgreSQL's other OperationalErrors: psycopg makes one of 70 codes.
    *(
        wrapped(OperationalError, "no", sqlstate=state)
        for state in (
            *("27000", "28000", "28P01", "2F002", "38000", "39000", "39P01", "3B001", "40002", "40003"),
            *("53000", "53100", "53200", "53400", "54000", "54001", "54011", "55000", "55006", "55P02", "55P04"),
            *("57000", "57014", "57P04", "58000", "58030", "58P01", "F0000", "HV000", "HV00N"),
        )
    ),
    *(wrapped(OperationalError, "no", pgcode=state) for state in ("53100", "57014")),
    wrapped(InternalError, "current transaction is aborted", sqlstate="25P02"),
    wrapped(ProgrammingError, "relation does not exist", sqlstate="42P01"),
    wrapped(DataError, "division by zero", sqlstate="22012"),
    wrapped(InternalError, "cache lookup failed", sqlstate="XX000"),
    wrapped(InterfaceError, "the cursor is closed"),
    # MySQL and MariaDB.
    *(
        wrapped(OperationalError, number, "no", sqlstate="HY000")
        for number in (1021, 1041, 1044, 1045, 1054, 1114, 1142, 1153, 1205 + 1, 1292, 1317, 1366, 1792, 1969, 3024)
    ),
    wrapped(OperationalError, 1290, "The MySQL server is running with the --secure-file-priv option"),
    wrapped(ProgrammingError, 1064, "You have an error in your SQL syntax", sqlstate="42000"),
    # SQLite.
    *(
        wrapped(OperationalError, "no", result=code)
        for code in (
            *(sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_IOERR_WRITE),
            *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_TOOBIG),
        )
    ),
    wrapped(DatabaseError, "database disk image is malformed", result=sqlite3.SQLITE_CORRUPT),
    caused_by(InterfaceError, sqlite3.InterfaceError("Error binding parameter 0 - probably unsupported type.")),
    caused_by(OperationalError, sqlite3.OperationalError('near "SELEKT": syntax error')),
]
#: Nothing is wrong with the session, and a statement of ours may succeed in a while.
PASSING = [
    *(wrapped(OperationalError, "no", sqlstate=state) for state in ("53000", "53100", "53200", "57014", "58030")),
    *(wrapped(OperationalError, number, "no", sqlstate="HY000") for number in (1021, 1041, 1114, 1317, 1969, 3024)),
    *(wrapped(OperationalError, "no", result=code) for code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)),
]
#: A lock was refused; the transaction as a whole was not undone.
REFUSED = [
    wrapped(OperationalError, "canceling statement due to lock timeout", sqlstate="55P03"),
    wrapped(OperationalError, 1205, "Lock wait timeout exceeded", sqlstate="HY000"),
    wrapped(OperationalError, 3572, "NOWAIT", sqlstate="HY000"),
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


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_pass_is_no_outage_and_a_statement_of_ours_is_tried_again(
    error: Exception, pauses: list[float]
) -> None:
    assert (is_conflict(error), is_outage(error), is_passing(error)) == (False, False, True)
    assert persist("default", failing(error), patience=60) == "done"
    assert pauses == [0.1]


@pytest.mark.parametrize("error", [error for error in NEITHER if error.args[-1] != "no"], ids=str)
def test_what_is_wrong_stays_wrong(error: Exception) -> None:
    assert not is_passing(error)


@pytest.mark.parametrize("error", CONFLICTS, ids=str)
def test_a_transaction_that_was_undone_is_told_from_a_lock_that_was_refused(error: Exception) -> None:
    is_refused = (type(error), error.args[0]) in [(type(other), other.args[0]) for other in REFUSED]
    assert is_undone(error) is not is_refused


@pytest.fixture
def pauses(monkeypatch: Any) -> list[float]:
    """What ``persist`` has slept; it is not slept."""
    slept: list[float] = []
    monkeypatch.setattr("conductor_app.store.transactions.time.sleep", slept.append)
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
    assert persist("default", failing(*OUTAGES[:8]), patience=60) == "done"
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_an_outage_longer_than_the_patience_abandons_the_run(pauses: list[float]) -> None:
    with pytest.raises(AbandonRun) as abandoned:
        persist("default", failing(*[OUTAGES[0]] * 100), patience=0.05)
    assert str(abandoned.value) == (
        "the database did not answer for 0.05s: connection to server failed: Connection refused"
    )
    assert abandoned.value.__cause__ is OUTAGES[0]
    assert pauses == []


@pytest.mark.parametrize("error", [*(error for error in NEITHER if not is_passing(error)), LeaseLost("x")], ids=str)
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
