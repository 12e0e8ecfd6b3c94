"""Whether the database has gone, or one session of it."""

from __future__ import annotations

from django.db import Error, connections

from conductor_app.models import database


def database_answers() -> bool:
    """Tell whether the database takes statements, on a new connection if it must be."""
    connection = connections[database()]
    try:
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()
        connection.ensure_connection()
    except Error:
        return False
    return True
