"""What a body leaves on its database connections: whatever is written after it on such a connection would be lost.

An ``atomic()`` block that was entered and never left, autocommit that is off, a ``BEGIN`` without its ``COMMIT``, a
transaction that has failed, a read-only session. It needs no mistake in the body: a soft time limit that is raised
between the two lines of ``with transaction.atomic():`` does it, too. Unnoticed, the outcome of that run would be rolled
back, and that of each later run in its process.

Django and the drivers know most of it without asking the database. What a statement such as ``SET`` has changed, they
do not; so whoever runs a body lets such statements be noticed (``session_changes.notice_session_statements``), and only
then the database is asked.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, NamedTuple

from django.db import connections

from conductor_app.store import interrupted
from conductor_app.store.opened import opened_connections
from conductor_app.store.session_changes import has_changed_session, notice_session_statements, stop_noticing

logger = logging.getLogger("conductor_app.execution")

#: libpq's transaction status: a statement of a transaction has failed; the connection is gone.
_IN_ERROR, _UNKNOWN = 3, 4
#: MySQL's flag in what the server says after each statement.
_MYSQL_IN_TRANSACTION = 1

AUTOCOMMIT_OFF = "autocommit off"
BEGUN = "a transaction that was begun by a statement of its own"
FAILED = "a transaction that has failed"
READ_ONLY = "a read-only session"


class State(NamedTuple):
    """How a connection differs from one on which every statement is committed at once."""

    alias: str
    #: How many ``atomic()`` blocks are open.
    blocks: int
    #: Anything else: ``AUTOCOMMIT_OFF``, ``BEGUN`` or ``FAILED``.
    flaw: str = ""


Mark = list[State]


def look(opened: list[Any] | None = None) -> Mark:
    """Return what is open on this thread's connections now. The database is not asked."""
    found = opened_connections() if opened is None else opened
    return [state for connection in found if (state := _state(connection)) is not None]


def _state(connection: Any) -> State | None:
    if connection.in_atomic_block:
        return State(connection.alias, len(connection.atomic_blocks))
    if connection.connection is None:
        return None
    if connection.autocommit != connection.settings_dict["AUTOCOMMIT"]:
        return State(connection.alias, 0, AUTOCOMMIT_OFF)
    flaw = _driver_flaw(connection) if connection.autocommit else ""
    return State(connection.alias, 0, flaw) if flaw else None


def _driver_flaw(connection: Any) -> str:
    """Return what the driver of a connection in autocommit says of a transaction behind Django's back."""
    raw = connection.connection
    try:
        if connection.vendor == "postgresql":
            # psycopg's ``info`` makes an object and an enumeration's member each time.
            pgconn = getattr(raw, "pgconn", None)
            status = int(raw.info.transaction_status if pgconn is None else pgconn.transaction_status)
            if status == _UNKNOWN:
                return ""
            if not raw.autocommit:
                return AUTOCOMMIT_OFF
            return "" if status == 0 else FAILED if status == _IN_ERROR else BEGUN
        if connection.vendor == "sqlite":
            return BEGUN if raw.in_transaction else ""
        if connection.vendor == "mysql":
            if getattr(raw, "server_status", 0) & _MYSQL_IN_TRANSACTION:
                return BEGUN
            return "" if raw.get_autocommit() else AUTOCOMMIT_OFF
    except Exception:  # noqa: BLE001 - a closed connection, or a driver that does not tell; its next statement will
        return ""
    return ""


def added(before: Mark, now: Mark) -> list[str]:
    """Return in words what is open now and was not before, each with its alias."""
    found = []
    for state in now:
        was = next((earlier for earlier in before if earlier.alias == state.alias), State(state.alias, 0))
        what = state.flaw if state.flaw != was.flaw else ""
        blocks = state.blocks - was.blocks
        if blocks == 1:
            what = "an open transaction.atomic() block"
        elif blocks > 1:
            what = f"{blocks} open transaction.atomic() blocks, one inside the other,"
        if what:
            found.append(f'{what} on the connection "{state.alias}"')
    return found


class Watch:
    """Looks at what one run of a body leaves behind."""

    def __init__(self) -> None:
        self._opened = opened_connections()
        self.before = look(self._opened)

    def begin(self) -> None:
        """Let statements be noticed that change their session."""
        for connection in self._opened:
            notice_session_statements(connection)

    def added(self) -> list[str]:
        """Return what is open now and was not at the beginning."""
        now = self._look()
        return [] if now == self.before else added(self.before, now)

    def _look(self) -> Mark:
        if len(self._opened) < len(connections.settings):
            self._opened = opened_connections()
        return look(self._opened)

    def end(self, raised: BaseException | None = None) -> list[str]:
        """Roll back what the body left open, close such connections, and return what it was.

        A connection whose session the body has changed is closed, too, and one that it has made unusable; that is no
        mistake.

        Args:
            raised: What the body has raised; a signal's handler may have done it in the middle of a statement.
        """
        if raised is not None:
            interrupted.close_raised_in(raised)
        for connection in self._opened:
            stop_noticing(connection)
        found = self.clean()
        for connection in self._opened:
            is_changed = has_changed_session(connection)
            if connection.in_atomic_block or connection.connection is None:
                continue
            if is_changed:
                if _is_read_only(connection):
                    found.append(f'{READ_ONLY} on the connection "{connection.alias}"')
                _discard(connection)
            elif _is_closed(connection) or (connection.errors_occurred and not connection.is_usable()):
                _discard(connection)
        return found

    def clean(self) -> list[str]:
        """Roll back what was left open, close such connections, and return what it was."""
        now = self._look()
        if now == self.before:
            return []
        depths = {state.alias: state.blocks for state in self.before}
        found = added(self.before, now)
        for connection in self._opened:
            state = _state(connection)
            if state is not None and added(self.before, [state]):
                _roll_back(connection, depths.get(connection.alias, 0))
        return found


def clear(what: str) -> None:
    """Roll back what a run before this one has left open in this thread, and say so.

    Args:
        what: What is about to begin, for the log.
    """
    now = look()
    if not now:
        return
    for connection in opened_connections():
        # A TestCase's own blocks stay: everything in a test is inside of them.
        depth = sum(block._from_testcase for block in connection.atomic_blocks)
        state = _state(connection)
        found = [] if state is None else added([State(connection.alias, depth)], [state])
        if found:
            logger.error(
                "What ran in this process before %s has left %s. It is rolled back, and the connection closed.",
                what,
                found[0],
            )
            _roll_back(connection, depth)


def close_old() -> None:
    """Close this thread's connections that are too old or broken, as ``close_old_connections`` does.

    But none that is inside of an ``atomic()`` block, which Django's would close with its transaction: whoever has
    opened the block goes on with it, a ``TestCase`` for one.
    """
    for connection in opened_connections():
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()


def discard(alias: str) -> bool:
    """Close this thread's connection, so that the next statement opens a new one; tell whether that was possible."""
    connection = connections[alias]
    if connection.in_atomic_block:
        return False
    _discard(connection)
    return True


def _roll_back(connection: Any, depth: int) -> None:
    """Leave the ``atomic()`` blocks from ``depth`` on, as an exception would, and with the last of them the session."""
    if depth:
        error = RuntimeError("left open")
        for block in reversed(connection.atomic_blocks[depth:]):
            with contextlib.suppress(Exception):
                block.__exit__(type(error), error, None)
        return
    if connection.connection is not None:
        # Before it is closed: the server would notice that a moment later, and keep the locks until then.
        with contextlib.suppress(Exception):
            connection.connection.rollback()
    # As ``connect()`` does. Django closes nothing inside of a block.
    connection.in_atomic_block = connection.needs_rollback = connection.closed_in_transaction = False
    connection.savepoint_ids, connection.atomic_blocks, connection.run_on_commit = [], [], []
    _discard(connection)


def _discard(connection: Any) -> None:
    interrupted.close(connection)
    if connection.connection is not None:  # SQLite in memory is never closed
        with contextlib.suppress(Exception):
            connection.set_autocommit(connection.settings_dict["AUTOCOMMIT"])


def _is_closed(connection: Any) -> bool:
    """Tell whether the driver knows that a connection is closed: a body may have done it past Django."""
    raw = connection.connection
    if connection.vendor == "postgresql":
        return bool(raw.closed)
    if connection.vendor == "mysql":
        return not getattr(raw, "open", True)
    if connection.vendor == "sqlite":
        try:
            raw.total_changes  # noqa: B018 - any question will do
        except Exception:  # noqa: BLE001 - sqlite3.ProgrammingError: it is closed
            return True
    return False


def is_server_read_only(alias: str) -> bool:
    """Ask whether a new connection could not write, either: after a failover, old addresses lead to a standby."""
    question = {
        "postgresql": "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on'",
        "mysql": "SELECT @@GLOBAL.read_only",
    }.get(connections[alias].vendor)
    return question is not None and _answers_yes(connections[alias], question)


def _is_read_only(connection: Any) -> bool:
    question = {
        "postgresql": "SELECT current_setting('default_transaction_read_only')",
        "mysql": "SHOW SESSION VARIABLES WHERE Variable_name IN ('tx_read_only', 'transaction_read_only')",
        "sqlite": "PRAGMA query_only",
    }.get(connection.vendor)
    return question is not None and _answers_yes(connection, question)


def _answers_yes(connection: Any, question: str) -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute(question)
            return any(str(row[-1]).lower() in ("on", "1", "true") for row in cursor.fetchall())
    except Exception:  # noqa: BLE001 - the connection is closed in any case
        return False
