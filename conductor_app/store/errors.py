"""What a driver's error means: a conflict, an outage, a refused lock or write, or something that passes."""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from django.db import DatabaseError, InterfaceError, OperationalError

#: After these the same transaction may simply be run again, by PostgreSQL's SQLSTATE: serialization failure, deadlock,
#: lock not available.
_CONFLICT_STATES = frozenset({"40001", "40P01", "55P03"})
#: By MySQL's and MariaDB's numbers: record changed since it was read, lock wait timeout, deadlock, NOWAIT.
_CONFLICT_NUMBERS = frozenset({1020, 1205, 1213, 3572})
#: By the first byte of SQLite's codes: busy, locked, and a lock on the log that somebody else was just taking.
_CONFLICT_RESULTS = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
#: Those among them by which a lock is refused.
_REFUSED = frozenset({("55P03", None), ("", 1205), ("", 3572)})

#: The session is over or was refused, by PostgreSQL's SQLSTATE: everything about connections (class 08), the server's
#: or the session's end (57P01 to 57P03, 57P05), timeouts that end a session (25P03, 25P04), too many connections; and a
#: server that takes no writes (25006): after a failover, old sessions end up at a standby.
_OUTAGE_CLASS = "08"
_OUTAGE_STATES = frozenset({"25006", "25P03", "25P04", "53300", "57P01", "57P02", "57P03", "57P05"})
#: By MySQL's and MariaDB's numbers: too many connections (of a user), server shutdown in progress, killed, read-only,
#: and the client's own codes for a server that is not there, gone, or lost during a query.
_OUTAGE_NUMBERS = frozenset(
    {
        *(0, 1040, 1053, 1077, 1078, 1079, 1080, 1129, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1226, 1290, 1836),
        *(1927, 2002, 2003, 2006, 2013, 2014, 2055, 3159, 4031),
    }
)
#: An option that the server runs with forbids the statement: an outage if it is ``--read-only`` or alike.
_OPTION_PREVENTS = 1290
#: By the first byte of SQLite's codes: the file cannot be opened.
_OUTAGE_RESULTS = frozenset({sqlite3.SQLITE_CANTOPEN})

#: A statement was ended from outside, or something was used up that others may free: PostgreSQL's query cancelled (also
#: by ``statement_timeout``), disk full, out of memory, and others of class 53, and I/O error; MySQL's disk or table
#: full, out of memory, query interrupted, execution time; SQLite's interrupted, I/O error, full, no memory.
_PASSING_CLASS = "53"
_PASSING_STATES = frozenset({"57014", "58030"})
_PASSING_NUMBERS = frozenset({1021, 1037, 1038, 1041, 1114, 1206, 1317, 1969, 3024})
_PASSING_RESULTS = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM}
)


class _Code(NamedTuple):
    """What a driver says of an error beside its text; at most one of these."""

    #: PostgreSQL's five characters.
    state: str = ""
    #: MySQL's and MariaDB's number.
    number: int | None = None
    #: SQLite's result code without its extension.
    result: int | None = None

    @property
    def is_known(self) -> bool:
        return self != _NO_CODE


_NO_CODE = _Code()


def _code_of(error: BaseException) -> _Code:
    cause: Any = error.__cause__ or error
    result = getattr(cause, "sqlite_errorcode", None)
    if isinstance(result, int):
        return _Code(result=result & 0xFF)
    number = cause.args[0] if cause.args else None
    if isinstance(number, int):
        # Not its SQLSTATE, which some of MySQL's drivers know, too: a lock wait timeout has that of a general error.
        return _Code(number=number)
    return _Code(state=getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")


def is_conflict(error: BaseException) -> bool:
    """Tell whether ``error`` only means that another transaction was in the way."""
    code = _code_of(error)
    if code.is_known:
        return code.state in _CONFLICT_STATES or code.number in _CONFLICT_NUMBERS or code.result in _CONFLICT_RESULTS
    return isinstance(error, DatabaseError) and str(error.__cause__ or error).startswith(
        ("database is locked", "database table is locked")
    )


def is_undone(error: BaseException) -> bool:
    """Tell whether the database has undone a transaction so that another one could go on; one that waited too long or
    would not wait for a lock has only been refused it.
    """
    return is_conflict(error) and not is_lock_refused(error)


def is_lock_refused(error: BaseException) -> bool:
    """Tell whether a lock was refused: at once, or after as long as the transaction was to wait for it."""
    return _code_of(error)[:2] in _REFUSED


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def name_outage(error: BaseException) -> str:
    """Return in a few words what an outage is: a pool that has no connection left is not a database that is away."""
    return f"{NO_CONNECTION} in time" if is_pool_empty(error) else "the database is away"


#: What an empty pool is in words.
NO_CONNECTION = 'no connection of OPTIONS["pool"] was free'


def is_pool_empty(error: BaseException) -> bool:
    """Tell whether no connection of a pool was free in time."""
    return type(error.__cause__ or error).__name__ == "PoolTimeout"


def is_outage(error: BaseException) -> bool:
    """Tell whether ``error`` means that the session is gone or refused, so that a new one may help.

    By its code and not by its class: drivers raise ``OperationalError`` for much that is wrong with one statement, too,
    such as a timeout, a full disk or, with SQLite, a typing error.
    """
    if not isinstance(error, (DatabaseError, InterfaceError)):
        return False
    code = _code_of(error)
    text = str(error)
    if code.number == _OPTION_PREVENTS:
        return "read-only" in text or "read_only" in text
    if code.is_known:
        return (
            code.state.startswith(_OUTAGE_CLASS)
            or code.state in _OUTAGE_STATES
            or code.number in _OUTAGE_NUMBERS
            or code.result in _OUTAGE_RESULTS
        )
    # The driver's own words, for want of a server that could give a code.
    if isinstance(error.__cause__, sqlite3.Error) or is_conflict(error):
        return text.startswith("unable to open database")
    if isinstance(error, InterfaceError):
        return not text or "connection" in text or "already closed" in text
    if isinstance(error, OperationalError):
        return not text.startswith(_NOT_ABOUT_SESSIONS)
    return text.startswith(_ABOUT_SESSIONS)


#: SQLite's words for a table or column that is not there, from a driver that gives no codes.
_NOT_ABOUT_SESSIONS = ("no such ",)
#: What drivers say of a session that has broken down in the middle of an answer, as another class: psycopg2, PyMySQL.
_ABOUT_SESSIONS = ("server closed the connection", "SSL SYSCALL error", "Packet sequence number wrong")


def is_read_only(error: BaseException) -> bool:
    """Tell whether a statement was refused because it writes, and its session or its server only reads."""
    code = _code_of(error)
    return code.state == "25006" or code.number == 1792 or code.result == sqlite3.SQLITE_READONLY


def is_passing(error: BaseException) -> bool:
    """Tell whether the same statement may well succeed in a while, although nothing is wrong with the session."""
    code = _code_of(error)
    return isinstance(error, DatabaseError) and (
        (code.state.startswith(_PASSING_CLASS) and not is_outage(error))
        or code.state in _PASSING_STATES
        or code.number in _PASSING_NUMBERS
        or code.result in _PASSING_RESULTS
    )
