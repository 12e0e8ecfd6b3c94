"""Sessions of the database: those that are the engine's alone, and who waits for an answer of one.

A network that drops packets leaves a thread in a read that never ends, for as long as the kernel waits: 15 minutes to
two hours. A heartbeat that goes on meanwhile, on a connection of its own, would keep what that thread runs from
everybody. So the engine notes when each of its statements began. When one has not come back, the heartbeat's thread
asks the server whether it works on that statement, and shuts the socket down if it does not: the thread gets an error,
and goes on with a new connection.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from inspect import getattr_static
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

from django.db import connections

logger = logging.getLogger(__name__)

#: Modules that speak with a server.
_SPEAKING = ("psycopg", "psycopg2", "MySQLdb", "pymysql")
#: Modules in which a thread is while it waits for a database; Django's own around them, or if they are written in C.
_DRIVERS = (*_SPEAKING, "django.db.backends")
#: What these use to wait.
_WAITING = ("selectors", "socket", "ssl", "gevent", "eventlet")
#: Longest time to connect the engine's own sessions, in seconds, unless the project's settings say another.
_CONNECT_SECONDS = 5
#: How often to look whether something has lasted too long, in seconds.
_LOOK_SECONDS = 0.2


class Wait(Protocol):
    """Somebody waits for an answer."""

    connection: Any
    is_cut: bool
    #: Whether the statement is a body's own.
    is_body: bool

    @property
    def seconds(self) -> float:
        """How long it has lasted."""

    def is_current(self) -> bool:
        """Tell whether it still lasts."""


class at_work:  # noqa: N801 - a context manager, as those of contextlib
    """Note that this thread waits for statements of the engine's on a connection."""

    is_body = False
    __slots__ = ("_before", "_greenlet", "call", "connection", "in_call_since", "is_cut", "since", "thread")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.thread = threading.get_ident()
        self._greenlet = _current_greenlet()
        self.since = time.monotonic()
        #: The call of the driver's in which the last look from another thread found it, and when the first one did.
        self.call: Any = None
        self.in_call_since = 0.0
        #: Whether its socket was shut down meanwhile.
        self.is_cut = False
        self._before: at_work | None = None

    def __enter__(self) -> at_work:
        self._before = _at_work.get(self.thread)
        _at_work[self.thread] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call = None
        if self._before is None:
            _at_work.pop(self.thread, None)
        else:
            # What is around this has heard of the database just now.
            self._before.since = time.monotonic()
            _at_work[self.thread] = self._before

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.since

    def look(self) -> bool:
        """Look from another thread, and tell whether it is in the same call of the driver's as at the last look.

        What is noted may be many statements, and between two of them the server works on none.
        """
        call = _in_driver(_innermost(self.thread, self._greenlet))
        if call is not None and call is self.call:
            return True
        # Kept, so that no later call gets the same one.
        self.call, self.in_call_since = call, time.monotonic()
        return False

    def is_current(self) -> bool:
        """Tell whether it still lasts; if looks have found it in a call, whether that does."""
        wait = _at_work.get(self.thread)
        while wait is not None and wait is not self:
            wait = wait._before
        return wait is self and (self.call is None or self.look())


#: What each thread waits for.
_at_work: dict[int, at_work] = {}
os.register_at_fork(after_in_child=_at_work.clear)


def hangs(thread: int) -> bool:
    """Tell whether a thread still waits for a statement of the engine's, although its connection is shut down."""
    wait = _at_work.get(thread)
    return wait is not None and wait.is_cut


class InBody:
    """What the thread that runs a body waits for on its connection, as far as looks from another thread can tell.

    Nobody notes when a body's own statements begin. One that is in the same call at two looks has been in it since.
    """

    is_body = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.thread = threading.get_ident()
        self._greenlet = _current_greenlet()
        self.is_cut = False
        self._frame: Any = None
        self._since = 0.0

    def look(self) -> float:
        """Look again, and return for how many seconds it has been in the call that it is in."""
        frame = self._call()
        if frame is None or frame is not self._frame:
            # Kept, so that no later call gets the same one.
            self._frame, self._since = frame, time.monotonic()
        return self.seconds if frame is not None else 0.0

    @property
    def seconds(self) -> float:
        """How long it has lasted at least."""
        return time.monotonic() - self._since

    def is_current(self) -> bool:
        """Tell whether it still lasts."""
        return self._frame is not None and self._call() is self._frame

    def _call(self) -> Any:
        if self.connection.vendor == "sqlite" or self.thread in _at_work:
            return None
        frame = _in_driver(_innermost(self.thread, self._greenlet))
        return frame if frame is not None and _is_about(frame, self.connection) else None


def _is_about(frame: Any, connection: Any) -> bool:
    """Tell whether a call in a driver, or in Django's backend, is about this connection."""
    while frame is not None and _is_in(frame, _DRIVERS):
        if _is_of(_of(frame), connection):
            return True
        frame = frame.f_back
    return False


def _of(frame: FrameType) -> Any:
    """Return the object of whose class a frame runs a method, if it does."""
    return frame.f_locals.get("self")


def _is_of(caller: Any, connection: Any) -> bool:
    """Tell whether an object is a connection of Django's, or a cursor of it."""
    # None of its own code is called: a cursor of Django's being made looks for its attributes for ever.
    return caller is not None and (caller is connection or getattr_static(caller, "db", None) is connection)


def overdue(seconds: float) -> list[at_work]:
    """Return what other threads have waited for longer than this, as far as it is the database that they wait for.

    A thread is seen in one call by two looks, half as long apart at least: by two calls of this.
    """
    own = threading.get_ident()
    # A signal's receiver or a result backend may be at work inside a transaction of the engine's, or a function of
    # ``ctx.atomic_step``: they take as long as they take.
    return [
        wait
        for wait in list(_at_work.values())
        if wait.thread != own
        and wait.look()
        and wait.seconds > seconds
        and time.monotonic() - wait.in_call_since >= seconds / 2
    ]


def _current_greenlet() -> Any:
    """Return the greenlet that runs, which is what gevent and eventlet have in the place of threads."""
    greenlet = sys.modules.get("greenlet")
    return None if greenlet is None else greenlet.getcurrent()


def _innermost(thread: int, greenlet: Any) -> FrameType | None:
    """Return where a thread is, or a greenlet."""
    # One that waits keeps its own frame: Python knows only where the one is that runs. To that one, and to the only one
    # of a real thread, greenlet gives no frame.
    return getattr(greenlet, "gr_frame", None) or sys._current_frames().get(thread)


def _in_driver(frame: Any) -> Any:
    """Return the innermost call of a thread, if that is one of a driver's."""
    while frame is not None and _is_in(frame, _WAITING):
        frame = frame.f_back
    return frame if frame is not None and _is_in(frame, _DRIVERS) else None


def _is_in(frame: Any, modules: tuple[str, ...]) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(tuple(f"{name}." for name in modules))


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


def cut(wait: Wait) -> bool:
    """Shut down the socket that a thread waits for, from another thread; ``False`` if there is none, or no wait."""
    try:
        session = wait.connection.connection
        descriptor = descriptor_of(session)
        if descriptor is None:
            return False
        # The thread may close it at any time, and the number be another socket's. As long as it still waits after the
        # copy was made, the copy is of the socket that it waits for.
        own = socket.socket(fileno=os.dup(descriptor))
    except (OSError, ValueError):
        return False
    with own:
        if not wait.is_current() or wait.connection.connection is not session:
            return False
        wait.is_cut = True
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)
    return True


def descriptor_of(session: Any) -> int | None:
    """Return the descriptor of a session's socket, as its driver tells it; ``None`` if it has none any more."""
    try:
        if hasattr(session, "fileno"):  # psycopg, psycopg2, mysqlclient
            return int(session.fileno())
        connected = getattr(session, "_sock", None)  # PyMySQL
        return None if connected is None else int(connected.fileno())
    except Exception:  # noqa: BLE001 - whatever a driver raises for a session that is closed
        return None


def close_interrupted(frame: FrameType) -> None:
    """Close those of this thread's connections that were interrupted while their driver spoke with the server.

    What a signal's handler raises there leaves an answer unread. psycopg and mysqlclient refuse the next statement.
    PyMySQL takes that answer for the next one's, and so on: a ``ROLLBACK`` would get the answer of a ``COMMIT``, and a
    write be told that it has changed no row. As after a lost connection, an ``atomic()`` block around it has failed,
    and outside of one the next statement opens a new connection.
    """
    stack = [inner for inner, _line in traceback.walk_stack(frame)]
    for connection in connections.all(initialized_only=True):
        if _speaks_on(connection, stack):
            close(connection)


def close_raised_in(error: BaseException, blocks: int = 0) -> None:
    """Do the same after an error that was raised while a driver was at work.

    It may also be one that the driver has met before it spoke with its server.

    Args:
        blocks: How many ``atomic()`` blocks a connection may be in to be closed. Further ones are those of a
            ``TestCase``, or of a view that runs something eagerly and goes on.
    """
    stacks = [[frame for frame, _line in traceback.walk_tb(link.__traceback__)][::-1] for link in _chain(error)]
    for connection in connections.all(initialized_only=True):
        if len(connection.atomic_blocks) <= blocks and any(_speaks_on(connection, stack) for stack in stacks):
            close(connection)


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and what it was raised after, but for what the database or its driver says."""
    found: list[BaseException] = []
    while error is not None and not any(error is other for other in found):
        found.append(error)
        error = error.__context__
    return [error for error in found if not type(error).__module__.startswith((*_SPEAKING, "django.db"))]


def _speaks_on(connection: Any, stack: list[FrameType]) -> bool:
    """Tell whether a driver's code is at work for an open connection, in a stack with its innermost frame first."""
    if connection.connection is None:
        return False
    is_at_work = False
    for frame in stack:
        is_at_work = is_at_work or _is_in(frame, _SPEAKING)
        if is_at_work and (_of(frame) is connection.connection or _is_of(_of(frame), connection)):
            return True
    return False


def close(connection: Any) -> None:
    """Close a connection whose session nobody may use again, whatever its driver says to that."""
    raw = connection.connection
    if hasattr(raw, "_pool"):
        # The pool would hand it to somebody else as it is.
        with contextlib.suppress(Exception):
            raw.close()
    try:
        connection.close()
    except Exception:  # noqa: BLE001 - a connection that cannot even be closed
        if not connection.in_atomic_block:
            connection.connection = None


@contextlib.contextmanager
def ended_after(seconds: float, using: str) -> Iterator[None]:
    """Cut this thread's connection if the block, which waits for no lock, lasts longer than this.

    Connecting has a limit of its own and does not count: it may have to try several hosts.
    """
    done = threading.Event()
    with at_work(connections[using]) as wait:
        threading.Thread(target=_cut_after, args=(seconds, wait, done), name="conductor-limit", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def _cut_after(seconds: float, wait: at_work, done: threading.Event) -> None:
    connected_at = None
    while not done.wait(_LOOK_SECONDS):
        if wait.connection.connection is None:
            continue
        connected_at = connected_at or time.monotonic() - _LOOK_SECONDS
        if time.monotonic() - connected_at >= seconds and cut(wait):
            return


def use_own(using: str) -> Any:
    """Give this thread a connection that is the engine's alone, and return it.

    Bodies may hold all the connections of a pool (``OPTIONS["pool"]``) for as long as they last, and what keeps their
    leases must not wait for one. It is like the project's in everything else, and gives up connecting after a while.
    """
    connection: Any = connections.create_connection(using)
    settings = copy.copy(connection.settings_dict)
    options = dict(settings.get("OPTIONS") or {})
    options.pop("pool", None)
    # A service's file may have its own.
    if connection.vendor in ("postgresql", "mysql") and "service" not in options:
        options.setdefault("connect_timeout", _CONNECT_SECONDS)
    connection.settings_dict = {**settings, "OPTIONS": options}
    # Whatever is asked on it is the engine's.
    connection.execute_wrappers.append(_noting)
    connections[using] = connection
    return connection


def _noting(execute: Callable[..., Any], sql: Any, params: Any, many: Any, context: dict[str, Any]) -> Any:
    with at_work(context["connection"]):
        return execute(sql, params, many, context)
