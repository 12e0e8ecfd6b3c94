"""Who waits for an answer of the database: the engine's own statements, and those of bodies.

A network that drops packets leaves a thread in a read that never ends, for as long as the kernel waits: 15 minutes to
two hours. A heartbeat that goes on meanwhile, on a connection of its own, would keep what that thread runs from
everybody. So the engine notes when each of its statements began. When one has not come back, the heartbeat's thread
asks the server whether it works on that statement (``serving``), and shuts the socket down if it does not
(``sockets``): the thread gets an error, and goes on with a new connection.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Protocol

from conductor_app.store.frames import current_greenlet, in_driver, innermost, is_about
from conductor_app.store.process import process


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
        self._greenlet = current_greenlet()
        self.since = time.monotonic()
        #: The call of the driver's in which the last look from another thread found it, and when the first one did.
        self.call: Any = None
        self.in_call_since = 0.0
        #: Whether its socket was shut down meanwhile.
        self.is_cut = False
        self._before: at_work | None = None

    def __enter__(self) -> at_work:
        self._before = process.at_work.get(self.thread)
        process.at_work[self.thread] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call = None
        if self._before is None:
            process.at_work.pop(self.thread, None)
        else:
            # What is around this has heard of the database just now.
            self._before.since = time.monotonic()
            process.at_work[self.thread] = self._before

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.since

    def look(self) -> bool:
        """Look from another thread, and tell whether it is in the same call of the driver's as at the last look.

        What is noted may be many statements, and between two of them the server works on none.
        """
        call = in_driver(innermost(self.thread, self._greenlet))
        if call is not None and call is self.call:
            return True
        # Kept, so that no later call gets the same one.
        self.call, self.in_call_since = call, time.monotonic()
        return False

    def is_current(self) -> bool:
        """Tell whether it still lasts; if looks have found it in a call, whether that does."""
        wait: at_work | None = process.at_work.get(self.thread)
        while wait is not None and wait is not self:
            wait = wait._before
        return wait is self and (self.call is None or self.look())


def hangs(thread: int) -> bool:
    """Tell whether a thread still waits for a statement of the engine's, although its connection is shut down."""
    wait: at_work | None = process.at_work.get(thread)
    return wait is not None and wait.is_cut


class InBody:
    """What the thread that runs a body waits for on its connection, as far as looks from another thread can tell.

    Nobody notes when a body's own statements begin. One that is in the same call at two looks has been in it since.
    """

    is_body = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.thread = threading.get_ident()
        self._greenlet = current_greenlet()
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
        if self.connection.vendor == "sqlite" or self.thread in process.at_work:
            return None
        frame = in_driver(innermost(self.thread, self._greenlet))
        return frame if frame is not None and is_about(frame, self.connection) else None


def overdue(seconds: float) -> list[at_work]:
    """Return what other threads have waited for longer than this, as far as it is the database that they wait for.

    A thread is seen in one call by two looks, half as long apart at least: by two calls of this.
    """
    own = threading.get_ident()
    # A signal's receiver or a result backend may be at work inside a transaction of the engine's, or a function of
    # ``ctx.atomic_step``: they take as long as they take.
    return [
        wait
        for wait in list(process.at_work.values())
        if wait.thread != own
        and wait.look()
        and wait.seconds > seconds
        and time.monotonic() - wait.in_call_since >= seconds / 2
    ]
