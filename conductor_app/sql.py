"""SQL that Django's ORM has no words for, and how to meet a database that is busy or away."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.models import Expression, Model, QuerySet
from django.db.models.sql import UpdateQuery

from conductor_app.exceptions import AbandonRun
from conductor_app.soft_limits import uninterrupted

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)
T = TypeVar("T")

#: SQLSTATEs and error numbers after which the same transaction may simply be run again: serialization failure,
#: deadlock, lock not available (PostgreSQL); deadlock, lock wait timeout, record changed since it was read (MySQL).
_CONFLICT_CODES = {"40001", "40P01", "55P03", 1213, 1205, 1020}
_CONFLICT_TRIES = 8
#: How long the sweeper, the admin and commands wait for a database that is away: long enough for a new connection.
_BRIEF_SECONDS = 1.0
#: Too many connections, server shutdown in progress, killed, read-only, and the client's own codes for a server that is
#: not there, gone, or lost during a query.
_MYSQL_OUTAGE_CODES = {
    0,
    1040,
    1053,
    1077,
    1078,
    1079,
    1080,
    1152,
    1158,
    1159,
    1160,
    1161,
    1184,
    1205,
    1290,
    1836,
    1927,
    2002,
    2003,
    2006,
    2013,
    2014,
    2055,
    3159,
    4031,
}


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
    if connection.execute_wrappers or connection.queries_logged or not is_transaction(using):
        with one_statement(using), connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())
    # As ``connection.cursor()`` does.
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    with connection.wrap_database_errors:
        cursor = _cursor_of(connection)
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


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


def is_conflict(error: BaseException) -> bool:
    """Tell whether ``error`` only means that another transaction was in the way."""
    cause = error.__cause__ or error
    code = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if code is None and cause.args:
        code = cause.args[0]
    if code in _CONFLICT_CODES:
        return True
    return "database is locked" in str(cause) or "database table is locked" in str(cause)


def is_outage(error: BaseException) -> bool:
    """Tell whether ``error`` means that the connection is gone or refused, so that a new one may help."""
    if isinstance(error, InterfaceError):
        return True
    if not isinstance(error, OperationalError) or is_conflict(error):
        return False
    if str(error).startswith("no such "):
        return False  # SQLite: a table or column that is not there
    # MySQL's drivers report much as OperationalError that has nothing to do with the connection.
    code = (error.__cause__ or error).args[:1]
    return not (code and isinstance(code[0], int)) or code[0] in _MYSQL_OUTAGE_CODES


def persist(using: str, work: Callable[[], T], *, patience: float) -> T:
    """Run ``work``, a transaction of guarded statements, until the database has taken it.

    ``work`` must be safe to repeat: each statement is a compare-and-set, and a repetition after a lost ``COMMIT``
    recognises its own writes.

    Args:
        using: Database alias.
        work: Opens and commits its own transaction.
        patience: Seconds to keep trying while the database is away.

    Raises:
        AbandonRun: The database was away for ``patience`` seconds.
    """
    conflicts = 0
    pause = 0.1
    give_up_at = time.monotonic() + patience
    while True:
        try:
            with uninterrupted():
                return work()
        except (DatabaseError, InterfaceError) as error:
            if connections[using].in_atomic_block:
                raise  # the caller's transaction is broken; only the caller can start it again
            if is_conflict(error) and conflicts < _CONFLICT_TRIES:
                conflicts += 1
                time.sleep(random.uniform(0, 0.02 * 2**conflicts))
                continue
            if not is_outage(error) and not is_conflict(error):
                raise
            if time.monotonic() + pause > give_up_at:
                raise AbandonRun(f"the database did not answer for {patience:g}s: {error}") from error
            logger.warning("The database is away (%s); trying again in %.1fs.", error, pause)
            with contextlib.suppress(Exception):
                connections[using].close()
            time.sleep(pause)
            pause = min(pause * 2, 5.0)


def persist_briefly(using: str, work: Callable[[], T]) -> T:
    """Run a transaction on which no lease depends, as ``persist`` does; an outage is the caller's to know.

    ``AbandonRun`` ends a run. The sweeper's thread, a command and a web process have none to end: they get the
    database's error.
    """
    try:
        return persist(using, work, patience=_BRIEF_SECONDS)
    except AbandonRun as given_up:
        error = given_up.__cause__ or given_up
    raise error


def locked(queryset: QuerySet[M], *, skip: bool = False) -> QuerySet[M]:
    """Lock the rows of ``queryset`` as weakly as the database can: inserts of children go on meanwhile.

    SQLite has no row locks; there the transaction itself is exclusive (``transaction_mode: IMMEDIATE``).
    """
    features = connections[queryset.db].features
    return queryset.select_for_update(
        no_key=features.has_select_for_no_key_update,
        skip_locked=skip and features.has_select_for_update_skip_locked,
    )
