"""Sessions that keep others waiting, since they hold locks that those want."""

from __future__ import annotations

from typing import Any, NamedTuple

from django.db import connections


class Holder(NamedTuple):
    """A session that others wait for, since it holds locks that they want."""

    session: int
    #: Where its client is; empty if the server does not tell.
    client: str
    #: What it does, in the server's words; empty if another user's is not for this one to see.
    state: str
    #: For how many seconds its transaction has been open.
    seconds: float
    #: How many sessions wait for it, and for how many seconds the first of them.
    waiting: int
    longest: float


def holders(seconds: float, using: str) -> list[Holder]:
    """Return who has kept others waiting for a lock for longer than this, the worst first, as far as the server tells.

    Raises:
        DatabaseError: The user may not ask.
    """
    connection: Any = connections[using]
    statement = _HOLDERS.get(connection.vendor)
    if statement is None or (connection.vendor == "mysql" and not connection.mysql_is_mariadb):
        return []
    with connection.cursor() as cursor:
        cursor.execute(statement, [seconds])
        return [
            Holder(int(session), str(client or ""), str(state or ""), float(age or 0), int(waiting), float(longest))
            for session, client, state, age, waiting, longest in cursor.fetchall()
        ]


_HOLDERS = {
    "postgresql": """
        SELECT
            holder.pid, host(holder.client_addr), holder.state,
            EXTRACT(EPOCH FROM clock_timestamp() - holder.xact_start),
            COUNT(*), MAX(EXTRACT(EPOCH FROM clock_timestamp() - waiter.query_start)) AS longest
        FROM pg_stat_activity waiter
        CROSS JOIN LATERAL unnest(pg_blocking_pids(waiter.pid)) AS blocking (pid)
        JOIN pg_stat_activity holder ON holder.pid = blocking.pid
        WHERE waiter.datname = current_database() AND waiter.wait_event_type = 'Lock'
            AND clock_timestamp() - waiter.query_start >= make_interval(secs => %s)
        GROUP BY 1, 2, 3, 4 ORDER BY longest DESC LIMIT 10
    """,
    "mysql": """
        SELECT
            holder.trx_mysql_thread_id, MAX(process.host), MAX(process.command),
            MAX(TIMESTAMPDIFF(SECOND, holder.trx_started, SYSDATE())),
            COUNT(*), MAX(TIMESTAMPDIFF(SECOND, waiter.trx_wait_started, SYSDATE())) AS longest
        FROM information_schema.innodb_lock_waits blocking
        JOIN information_schema.innodb_trx waiter ON waiter.trx_id = blocking.requesting_trx_id
        JOIN information_schema.processlist waiting ON waiting.id = waiter.trx_mysql_thread_id
        JOIN information_schema.innodb_trx holder ON holder.trx_id = blocking.blocking_trx_id
        LEFT JOIN information_schema.processlist process ON process.id = holder.trx_mysql_thread_id
        WHERE waiting.db = DATABASE() AND TIMESTAMPDIFF(SECOND, waiter.trx_wait_started, SYSDATE()) >= %s
        GROUP BY 1 ORDER BY longest DESC LIMIT 10
    """,
}
