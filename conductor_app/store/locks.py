"""Locks of rows: how to take them, and how long to wait for those that somebody else has taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError, connections, transaction
from django.db.models import Model, QuerySet

M = TypeVar("M", bound=Model)
T = TypeVar("T")


class RowsLocked(Exception):
    """Somebody else has locked a row that background work was to change. Nothing was changed."""


def locked(queryset: QuerySet[M], *, skip: bool = False) -> QuerySet[M]:
    """Lock the rows of ``queryset`` as weakly as the database can: inserts of children go on meanwhile.

    SQLite has no row locks; there the transaction itself is exclusive (``transaction_mode: IMMEDIATE``).
    """
    features = connections[queryset.db].features
    return queryset.select_for_update(
        no_key=features.has_select_for_no_key_update,
        skip_locked=skip and features.has_select_for_update_skip_locked,
    )


#: How long transactions wait for a lock, in seconds; ``None``: as long as the database lets them.
_lock_seconds: ContextVar[float | None] = ContextVar("conductor_app_lock_seconds", default=None)


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
        if connection.vendor != "mysql" or limit_of(connection) is None:
            return
        with transaction.atomic(using=rows.db):
            free = set(locked(rows, skip=True).values_list("pk", flat=True))
        if not free.issuperset(rows.values_list("pk", flat=True)):
            raise RowsLocked("its row, or one beside it, is locked")


def limit_of(connection: Any) -> float | None:
    """Return how long a transaction that begins now waits for a lock, in seconds; ``None`` if nothing limits it."""
    limit = _lock_seconds.get()
    if limit is None or connection.in_atomic_block or connection.vendor not in ("postgresql", "mysql"):
        return None
    return limit


def limited(connection: Any, work: Callable[[], T], seconds: float) -> T:
    """Run ``work``, of which no statement waits for a lock for longer than this."""
    if connection.vendor == "postgresql":
        with transaction.atomic(using=connection.alias):
            with connection.cursor() as cursor:
                # Of the transaction, not of the session: a pooler may give the session to others.
                cursor.execute(f"SET LOCAL lock_timeout = {max(round(seconds * 1_000), 1)}")
            return work()
    _limit_session(connection, seconds)
    return work()


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
