"""SQL that Django's ORM has no words for, and how to meet a database that is busy or away."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import DatabaseError, Error, InterfaceError, OperationalError, connections, transaction
from django.db.models import Expression, Model, QuerySet
from django.db.models.sql import UpdateQuery

from conductor_app.exceptions import AbandonRun
from conductor_app.store import sessions
from conductor_app.store.soft_limits import uninterrupted

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)
T = TypeVar("T")

#: After these the same transaction may simply be run again, by PostgreSQL's SQLSTATE: serialization failure, deadlock,
#: lock not available.
_CONFLICT_STATES = frozenset({"40001", "40P01", "55P03"})
#: By MySQL's and MariaDB's numbers: record changed since it was read, lock wait timeout, deadlock, NOWAIT.
_CONFLICT_NUMBERS = frozenset({1020, 1205, 1213, 3572})
#: By the first byte of SQLite's codes: busy, locked, and a lock on the log that somebody else was just taking.
_CONFLICT_RESULTS = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
#: Those among them by which a lock is refused.
_REFUSED = frozenset({("55P03", None), ("", 1205), ("", 3572)})
#: So often a transaction is run again after conflicts, before it counts as an outage.
CONFLICT_TRIES = 8
#: Background work leaves what is in the way to its next round sooner.
_BACKGROUND_TRIES = 2

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

#: How long the sweeper, the admin and commands wait for a database that is away: long enough for a new connection.
_BRIEF_SECONDS = 1.0


class RowsLocked(Exception):
    """Somebody else has locked a row that background work was to change. Nothing was changed."""


#: How long transactions wait for a lock, in seconds; ``None``: as long as the database lets them.
_lock_seconds: ContextVar[float | None] = ContextVar("conductor_app_lock_seconds", default=None)


class Literal(Expression):
    """A constant written into the statement itself, so that the planner can match a partial index's condition."""

    def __init__(self, value: str) -> None:
        super().__init__()
        if not value.isidentifier():
            raise ValueError(f"not a plain word: {value!r}")
        self.value = value

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        del compiler, connection
        return f"'{self.value}'", []


def opened_connections() -> list[Any]:
    """Return the connections that this thread has used; what ``connections.all(initialized_only=True)`` does.

    That looks up each alias twice, in storage that asks each time for the event loop of its thread.
    """
    aliases = connections.settings
    if len(aliases) == 1:
        return [connections[next(iter(aliases))]]
    return list(connections.all(initialized_only=True))


def is_transaction(using: str) -> bool:
    """Tell whether a single statement is a transaction itself now."""
    connection = connections[using]
    return not connection.in_atomic_block and connection.get_autocommit()


def note_created(using: str, key: Any) -> None:
    """Note that the current transaction, if there is one, has created a row."""
    connection: Any = connections[using]
    if not connection.in_atomic_block or not connection.atomic_blocks:
        return
    # The outermost block is the transaction. What a savepoint's rollback has undone is not found any more.
    kept = vars(connection).get("_conductor_created")
    if kept is None or kept[0] is not connection.atomic_blocks[0]:
        kept = connection._conductor_created = (connection.atomic_blocks[0], set())
    kept[1].add(key)


def was_created_here(using: str, key: Any) -> bool:
    """Tell whether the current transaction has created a row, so that nobody else can see it."""
    connection: Any = connections[using]
    kept = vars(connection).get("_conductor_created")
    is_open = bool(kept and connection.in_atomic_block and connection.atomic_blocks)
    return is_open and kept[0] is connection.atomic_blocks[0] and key in kept[1]


def is_in_test_alone(using: str) -> bool:
    """Tell whether no transaction is open but that of a ``TestCase``, which stands for a database that is empty."""
    blocks: list[Any] = connections[using].atomic_blocks
    return bool(blocks) and all(block._from_testcase for block in blocks)


def snapshot_level(using: str) -> str:
    """Return the isolation of the current transaction if it does not see what others commit meanwhile; else nothing."""
    if is_transaction(using):
        return ""
    connection: Any = connections[using]
    if connection.vendor == "sqlite":
        return "SQLite"
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            level = str(cursor.fetchone()[0])
    else:
        level = str(connection.isolation_level or "repeatable read")  # MySQL's own default
    return level if level in ("repeatable read", "serializable") else ""


def one_statement(using: str) -> AbstractContextManager[object]:
    """Return what goes around a single statement that may fail.

    Nothing where the statement is a transaction itself; inside another one a savepoint, which keeps that usable.
    """
    return contextlib.nullcontext() if is_transaction(using) else transaction.atomic(using=using)


def fetch(using: str, statement: str, parameters: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Run a single statement and return its rows; where no transaction is open, it is one itself.

    There it goes to the driver past Django's cursors, which take longer than the driver does, unless somebody listens
    to them: an ``execute_wrapper``, or the log of queries.
    """
    connection: Any = connections[using]
    if connection.execute_wrappers not in _NOT_LISTENING or connection.queries_logged or not is_transaction(using):
        with one_statement(using), connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())
    with sessions.at_work(connection), connection.wrap_database_errors:
        # As ``connection.cursor()`` does.
        connection.close_if_health_check_failed()
        connection.ensure_connection()
        cursor = _cursor_of(connection)
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


#: Statements that change more than the transaction that they stand in, or may.
_SESSION_STATEMENT = re.compile(
    r"\s*(?:SET(?!\s+(?:LOCAL|CONSTRAINTS|TRANSACTION)\b)|RESET|DISCARD|USE|PRAGMA)\b", re.IGNORECASE
)


def _notice(execute: Any, sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
    # What is no text is an object of the driver's, made by hand.
    if not isinstance(sql, str) or _SESSION_STATEMENT.match(sql) or "set_config" in sql:
        context["connection"]._conductor_changed_session = True
    return execute(sql, params, many, context)


_NOT_LISTENING: tuple[list[Any], ...] = ([], [_notice])


def notice_session_statements(connection: Any) -> None:
    """Note from now on whether a statement changes the session of a connection."""
    if _notice not in connection.execute_wrappers:
        connection._conductor_changed_session = False
        connection.execute_wrappers.append(_notice)


def stop_noticing(connection: Any) -> None:
    """Note that no more."""
    with contextlib.suppress(ValueError):
        connection.execute_wrappers.remove(_notice)


def has_changed_session(connection: Any) -> bool:
    """Tell whether a statement that changes the session was noticed, and forget it."""
    return bool(vars(connection).pop("_conductor_changed_session", False))


def _cursor_of(connection: Any) -> Any:
    """Return a cursor that is kept as long as its session; a new one for each statement costs a third of its time."""
    kept = vars(connection).get("_conductor_cursor")
    # A cursor renders instants in the time zone in which it was made.
    if kept is None or kept[0] is not connection.connection or kept[1] != connection.timezone:
        kept = (connection.connection, connection.timezone, connection.create_cursor())
        connection._conductor_cursor = kept
    return kept[2]


def update_returning(queryset: QuerySet[M], returning: Iterable[str], **values: Any) -> list[M]:
    """Update the rows of ``queryset`` and return them as they are afterwards, in one statement where there is one.

    Without ``RETURNING`` (MySQL, MariaDB) the rows are locked and read first, so the guards in ``queryset`` still
    decide; call it inside a transaction there.
    """
    connection = connections[queryset.db]
    concrete = {field.attname: field for field in queryset.model._meta.concrete_fields}
    primary_key = next(field for field in concrete.values() if field.primary_key)
    fields = [primary_key, *(concrete[name] for name in dict.fromkeys(returning) if name != primary_key.attname)]
    if connection.vendor in ("postgresql", "sqlite"):
        query: UpdateQuery = queryset.query.chain(UpdateQuery)  # type: ignore[assignment]
        query.add_update_values(values)
        try:
            sql, params = query.get_compiler(queryset.db).as_sql()
        except EmptyResultSet:  # ``pk__in=[]``, for example
            return []
        quote = connection.ops.quote_name
        columns = ", ".join(quote(str(field.column)) for field in fields)
        return list(queryset.model._base_manager.using(queryset.db).raw(f"{sql} RETURNING {columns}", params))
    with transaction.atomic(using=queryset.db, savepoint=False):
        keys = list(queryset.select_for_update().values_list("pk", flat=True))
        if not keys:
            return []
        rows = queryset.model._base_manager.using(queryset.db).filter(pk__in=keys)
        rows.update(**values)
        return list(rows.only(*(field.attname for field in fields)))


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
    return is_conflict(error) and not _is_locked(error)


def _is_locked(error: BaseException) -> bool:
    return _code_of(error)[:2] in _REFUSED


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def name_outage(error: BaseException) -> str:
    """Return in a few words what an outage is: a pool that has no connection left is not a database that is away."""
    return f"{_NO_CONNECTION} in time" if _is_pool_empty(error) else "the database is away"


_NO_CONNECTION = 'no connection of OPTIONS["pool"] was free'


def _is_pool_empty(error: BaseException) -> bool:
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


def persist(using: str, work: Callable[[], T], *, patience: float, skips_locked: bool = False) -> T:
    """Run ``work``, a transaction of guarded statements, until the database has taken it.

    ``work`` must be safe to repeat: each statement is a compare-and-set, and a repetition after a lost ``COMMIT``
    recognises its own writes. All of its statements are ours, so one that was cancelled, or met a full disk, is
    repeated as after an outage.

    Args:
        using: Database alias.
        work: Opens and commits its own transaction.
        patience: Seconds to keep trying while the database is away.
        skips_locked: Whether it passes over locked rows anyway, so that ``waiting_at_most`` has nothing to limit.

    Raises:
        AbandonRun: The database was away for ``patience`` seconds.
        RowsLocked: A row was locked for as long as ``waiting_at_most`` says.
    """
    connection = connections[using]
    limit = None if skips_locked else _limit_of(connection)
    conflicts = 0
    pause = 0.1
    give_up_at = time.monotonic() + patience
    while True:
        wait = sessions.at_work(connection)
        try:
            with uninterrupted(), wait:
                return work() if limit is None else _limited(connection, work, limit)
        except (DatabaseError, InterfaceError) as error:
            if not _is_ours(using):
                raise  # the caller's transaction is broken; only the caller can start it again
            if _raises_read_only.get() and is_read_only(error):
                raise
            if limit is not None and (_is_locked(error) or (conflicts >= _BACKGROUND_TRIES and is_conflict(error))):
                raise RowsLocked(_first_line(error)) from error
            if wait.is_cut:
                # It has waited on a connection that was dead, while another one worked.
                give_up_at = time.monotonic() + patience
            if is_conflict(error) and conflicts < CONFLICT_TRIES:
                conflicts += 1
                pause_after_conflict(conflicts)
                continue
            is_away = is_outage(error)
            if not is_away and not is_conflict(error) and not is_passing(error):
                raise
            if time.monotonic() + pause > give_up_at:
                silence = _NO_CONNECTION if _is_pool_empty(error) else "the database did not answer"
                raise AbandonRun(f"{silence} for {patience:g}s: {error}") from error
            what = name_outage(error) if is_away else "the database does not take a transaction now"
            logger.warning("%s (%s); trying again in %.1fs.", _sentence(what), error, pause)
            with contextlib.suppress(Exception):
                connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5.0)


def _is_ours(using: str) -> bool:
    """Tell whether no transaction of the caller's goes on, which a new connection would end."""
    connection = connections[using]
    # ``autocommit`` is what the settings say from the moment of the connection on.
    return not connection.in_atomic_block and (connection.connection is None or connection.autocommit)


def pause_after_conflict(number: int) -> None:
    """Wait for a random time that grows with the number of conflicts, so that two of a kind part."""
    time.sleep(random.uniform(0, 0.02 * 2**number))


def pause_after_outage(number: int) -> None:
    """Wait for a time that doubles with the number of sessions that were lost one after another."""
    time.sleep(min(0.1 * 2 ** (number - 1), 5.0))


#: Whether a read-only session is somebody's fault, and not a server's that takes no writes any more.
_raises_read_only: ContextVar[bool] = ContextVar("conductor_app_raises_read_only", default=False)


@contextlib.contextmanager
def raising_read_only(is_wanted: bool) -> Iterator[None]:
    """Let ``persist`` raise at once what a read-only session makes of a write: a body may have left it so."""
    token = _raises_read_only.set(is_wanted)
    try:
        yield
    finally:
        _raises_read_only.reset(token)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


@contextlib.contextmanager
def waiting_at_most(seconds: float, using: str) -> Iterator[None]:
    """Let what ``persist`` runs in this block wait so long for a lock, and raise ``RowsLocked`` then.

    For background work, of which one locked row must not hold up the rest. Inside a caller's transaction and with
    SQLite, which has one lock for all, it has no effect. MySQL counts whole seconds, and waits for one at least:
    ``leave_if_locked`` asks there before.
    """
    token = _lock_seconds.set(seconds)
    try:
        yield
    finally:
        _lock_seconds.reset(token)
        if _lock_seconds.get() is None:
            _restore_limit(connections[using])


def is_background() -> bool:
    """Tell whether this is background work, which waits for no row."""
    return _lock_seconds.get() is not None


def leave_if_locked(*needed: QuerySet[Any]) -> None:
    """Find out, where a limit would be too long, whether background work had to wait for a row.

    Raises:
        RowsLocked: Somebody has locked one.
    """
    for rows in needed:
        connection = connections[rows.db]
        if connection.vendor != "mysql" or _limit_of(connection) is None:
            return
        with transaction.atomic(using=rows.db):
            free = set(locked(rows, skip=True).values_list("pk", flat=True))
        if not free.issuperset(rows.values_list("pk", flat=True)):
            raise RowsLocked("its row, or one beside it, is locked")


def _limit_of(connection: Any) -> float | None:
    limit = _lock_seconds.get()
    if limit is None or connection.in_atomic_block or connection.vendor not in ("postgresql", "mysql"):
        return None
    return limit


def _limited(connection: Any, work: Callable[[], T], seconds: float) -> T:
    if connection.vendor == "postgresql":
        with transaction.atomic(using=connection.alias):
            with connection.cursor() as cursor:
                # Of the transaction, not of the session: a pooler may give the session to others.
                cursor.execute(f"SET LOCAL lock_timeout = {max(round(seconds * 1_000), 1)}")
            return work()
    _limit_session(connection, seconds)
    return work()


def together(using: str, work: Callable[[], T]) -> T:
    """Run ``work`` once, in a transaction; ``waiting_at_most`` counts for it, too.

    Raises:
        RowsLocked: A row was locked for as long as that says.
    """
    connection = connections[using]
    limit = _limit_of(connection)

    def atomic() -> T:
        with transaction.atomic(using=using):
            return work()

    if limit is None:
        return atomic()
    try:
        return _limited(connection, atomic, limit)
    except (DatabaseError, InterfaceError) as error:
        if _is_locked(error) or is_conflict(error):
            raise RowsLocked(_first_line(error)) from error
        raise


def _limit_session(connection: Any, seconds: float) -> None:
    """Set MySQL's limit, which only a session has; at most once for each session and limit."""
    # Not 0, although MariaDB takes it: there a statement with SKIP LOCKED then fails (10.11, error 1180).
    whole = max(round(seconds), 1)
    connection.ensure_connection()
    session, limit, original = vars(connection).get("_conductor_lock_limit", (None, None, None))
    if session is connection.connection and limit == whole:
        return
    with connection.cursor() as cursor:
        if session is not connection.connection:
            cursor.execute("SELECT @@SESSION.innodb_lock_wait_timeout")
            original = cursor.fetchone()[0]
        cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {whole}")
    connection._conductor_lock_limit = (connection.connection, whole, original)


def _restore_limit(connection: Any) -> None:
    session, _, original = vars(connection).pop("_conductor_lock_limit", (None, None, None))
    if session is None or session is not connection.connection:
        return
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {int(original)}")
    except (DatabaseError, InterfaceError):
        with contextlib.suppress(Exception):
            connection.close()


def persist_briefly(using: str, work: Callable[[], T], *, patience: float = 0, skips_locked: bool = False) -> T:
    """Run a transaction on which no lease depends, as ``persist`` does; an outage is the caller's to know.

    ``AbandonRun`` ends a run. The sweeper's thread, a command and a web process have none to end: they get the
    database's error.

    So every call from outside of a body gets over a connection that has died since it was used last: nobody looks after
    it in a process that serves no requests, such as Celery Beat, a bot or a shell.

    Args:
        using: Database alias.
        work: As for ``persist``.
        patience: Seconds to keep trying, if that is longer than for others.
        skips_locked: As for ``persist``.
    """
    try:
        return persist(using, work, patience=max(patience, _BRIEF_SECONDS), skips_locked=skips_locked)
    except AbandonRun as given_up:
        error = given_up.__cause__ or given_up
    raise error


def once_more(work: Callable[[], T]) -> T:
    """Run what others do with Django's connections; once more on new ones, if a connection has turned out to be dead.

    What is in a transaction is left alone, as it is the caller's to start again.
    """
    try:
        return work()
    except Error:
        if not drop_dead_connections():
            raise
    return work()


def drop_dead_connections() -> bool:
    """Close this thread's connections on which nobody answers, so that new ones take their place; tell if any was."""
    dead = [
        connection
        for connection in opened_connections()
        if connection.connection is not None and _is_ours(connection.alias) and not connection.is_usable()
    ]
    for connection in dead:
        with contextlib.suppress(Exception):
            connection.close()
    return bool(dead)


def locked(queryset: QuerySet[M], *, skip: bool = False) -> QuerySet[M]:
    """Lock the rows of ``queryset`` as weakly as the database can: inserts of children go on meanwhile.

    SQLite has no row locks; there the transaction itself is exclusive (``transaction_mode: IMMEDIATE``).
    """
    features = connections[queryset.db].features
    return queryset.select_for_update(
        no_key=features.has_select_for_no_key_update,
        skip_locked=skip and features.has_select_for_update_skip_locked,
    )
