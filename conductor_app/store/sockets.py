"""The sockets of sessions, and how to end a wait by shutting one down."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from django.db import connections

from conductor_app.store.waits import Wait, at_work

#: How often to look whether something has lasted too long, in seconds.
_LOOK_SECONDS = 0.2


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
