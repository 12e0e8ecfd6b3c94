"""The test database, freed from the sessions of killed workers."""

from contextlib import suppress

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
