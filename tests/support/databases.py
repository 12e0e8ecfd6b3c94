"""The test database: freed from the sessions of killed workers, and emptied."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from django.db import DatabaseError, connection


def end_other_sessions() -> None:
    """End every session but this one on the test database.

    A server notices that a client was killed only when it next reads from it; until then the session may hold locks
    that a flush, or the removal of the database, waits for. SQLite's locks go with their process.
    """
    name = connection.settings_dict["NAME"]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                [name],
            )
    elif connection.vendor == "mysql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT id FROM information_schema.processlist WHERE db = %s AND id <> connection_id()", [name]
            )
            for (session,) in cursor.fetchall():
                with suppress(DatabaseError):  # It has ended by itself.
                    cursor.execute("KILL CONNECTION %s", [session])


def empty_by_deleting() -> None:
    """Let Django empty PostgreSQL's tables by ``DELETE`` after a test.

    Its ``TRUNCATE`` makes new files for two dozen tables, each time, and waits for the disk: a tenth of a second.
    """
    if connection.vendor == "postgresql":
        connection.ops.sql_flush = _deletions  # type: ignore[method-assign]


def _deletions(style: Any, tables: Sequence[str], **_options: Any) -> list[str]:
    names = [connection.ops.quote_name(table) for table in tables]
    # Whoever is just about to commit does so first, as before a TRUNCATE.
    lock = [f"LOCK TABLE {', '.join(names)} IN EXCLUSIVE MODE"] if names else []
    return [*lock, *(f"DELETE FROM {name}" for name in names)]
