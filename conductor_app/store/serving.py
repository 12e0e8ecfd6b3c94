"""Whether a server works on what a thread waits for, as the server itself says."""

from __future__ import annotations

import logging
from typing import Any

from django.db import connections

from conductor_app.store.waits import Wait

logger = logging.getLogger(__name__)


def is_served(wait: Wait, using: str) -> bool | None:
    """Ask the server, on this thread's connection, whether it works on what another thread waits for.

    Returns:
        ``None`` if it cannot tell: a pooler stands between, or it does not keep track.
    """
    session, asking = wait.connection.connection, connections[using]
    asking.ensure_connection()
    theirs, mine = _session_id(session), _session_id(asking.connection)
    if theirs is None or mine is None:
        return None
    statement = _IS_SERVED.get(asking.vendor)
    if statement is None:
        return None
    with asking.cursor() as cursor:
        cursor.execute(statement, [theirs])
        actual, known, state, is_served = cursor.fetchone()
    if actual != mine:
        return None
    if not known:
        return False
    return None if state is None or state == "disabled" else bool(is_served)


#: The asking session's own id, whether the other one is there, its state, and whether it is being served.
_IS_SERVED = {
    "postgresql": """
        SELECT
            pg_backend_pid(), COUNT(*) > 0, MAX(state),
            BOOL_OR(state = 'active' AND wait_event_type IS DISTINCT FROM 'Client')
        FROM pg_stat_activity WHERE pid = %s
    """,
    "mysql": """
        SELECT CONNECTION_ID(), COUNT(*) > 0, MAX(command), MAX(command <> 'Sleep')
        FROM information_schema.processlist WHERE id = %s
    """,
}


def _session_id(session: Any) -> int | None:
    """Return the id that a session's server has given it, as the driver remembers it; nothing is asked."""
    try:
        if hasattr(session, "info") and hasattr(session.info, "backend_pid"):
            return int(session.info.backend_pid)
        if hasattr(session, "get_backend_pid"):
            return int(session.get_backend_pid())
        if hasattr(session, "thread_id"):
            return int(session.thread_id())
    except Exception:  # a session that is just being closed
        logger.debug("A session does not tell its id.", exc_info=True)
    return None
