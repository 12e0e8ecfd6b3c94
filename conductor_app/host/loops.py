"""Let other threads wake the event loop of a worker.

What a thread of a pool asks of the loop, an acknowledgement most often, kombu before 5.7 leaves until the loop wakes by
itself, which takes up to 2 seconds; with a prefetch multiplier of 1 the broker sends nothing more until then. kombu 5.7
has what is added here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any


class Waker:
    """Two sockets; the loop looks at one of them."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._loop_thread = threading.get_ident()
        self._pid = os.getpid()
        self._call_soon = hub.call_soon
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        hub.call_soon = self.call_soon

    def watch(self) -> None:
        """Let the loop look: it forgets what it looks at whenever its connection to the broker ends."""
        self._hub.add_reader(self._reader, self._drain)

    def call_soon(self, callback: Any, *args: Any) -> Any:
        """Do what the loop's own does, and wake it if another thread calls this."""
        promised = self._call_soon(callback, *args)
        if threading.get_ident() != self._loop_thread and os.getpid() == self._pid:
            with contextlib.suppress(OSError):  # so many are unread already that it will wake
                self._writer.send(b"\0")
        return promised

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            self._reader.recv(4_096)


def install(hub: Any) -> None:
    """Let other threads wake a loop that cannot be woken; call it in the loop's thread, each time that it begins."""
    if hub is None or hasattr(hub, "_waker"):
        return
    waker = vars(hub).get("_conductor_waker")
    if waker is None:
        waker = hub._conductor_waker = Waker(hub)
    waker.watch()
