"""Sessions that were interrupted while their driver spoke with the server: nobody may use them again."""

from __future__ import annotations

import contextlib
import traceback
from types import FrameType
from typing import Any

from django.db import connections

from conductor_app.store.frames import SPEAKING, is_in, is_of, self_of


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
    return [error for error in found if not type(error).__module__.startswith((*SPEAKING, "django.db"))]


def _speaks_on(connection: Any, stack: list[FrameType]) -> bool:
    """Tell whether a driver's code is at work for an open connection, in a stack with its innermost frame first."""
    if connection.connection is None:
        return False
    is_at_work = False
    for frame in stack:
        is_at_work = is_at_work or is_in(frame, SPEAKING)
        if is_at_work and (self_of(frame) is connection.connection or is_of(self_of(frame), connection)):
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
