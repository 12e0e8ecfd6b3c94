"""Celery's soft time limit (SIGUSR1), held back where it would do harm: raised inside a ``COMMIT`` it would leave the
outcome unknown, and raised after the body it would fail what is none of the body's. Raised while a body waits for its
database, it takes the connection with it.

Masking the signal would not do: the kernel hands it to another thread, such as the heartbeat's, and Python runs the
handler in the main thread all the same. So a handler of ours stands in front of Celery's, from the first run in a
process on, and passes on what comes; setting and restoring handlers around each transaction took a tenth of a short
run's time.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Any

from conductor_app.store import interrupted
from conductor_app.store.process import process

#: After how many seconds a limit that came in the middle of a finalizer comes again.
_AGAIN_SECONDS = 0.01


def _is_in_finalizer(frame: FrameType | None) -> bool:
    return frame is not None and any(inner.f_code.co_name == "__del__" for inner, _line in traceback.walk_stack(frame))


def _send_again(pid: int, number: int) -> None:
    time.sleep(_AGAIN_SECONDS)
    os.kill(pid, number)


class SoftLimit:
    """The soft time limit of what the main thread does; without effect where there is none."""

    def __init__(self) -> None:
        #: Whether a limit that comes now waits.
        self.is_held = False
        self._handler: Any = None
        self._held_back: list[tuple[int, FrameType | None]] = []

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_held:
            self._held_back.append((number, frame))
            return
        if _is_in_finalizer(frame):
            # Python drops what is raised there, and the body would go on without a limit.
            _thread.start_new_thread(_send_again, (os.getpid(), number))
            return
        try:
            self._handler(number, frame)
        except BaseException:
            # A body may catch it, and go on with a session that is out of step.
            if frame is not None:
                interrupted.close_interrupted(frame)
            raise

    def is_there(self) -> bool:
        """Tell whether something handles the limit; from now on it is asked by way of this."""
        handler = signal.getsignal(signal.SIGUSR1)
        if handler == self._on_signal:
            return True
        if not callable(handler):
            return False
        # The pool's, of a new process; or one that a body has set.
        self._handler = handler
        signal.signal(signal.SIGUSR1, self._on_signal)
        return True

    def hold_back(self) -> None:
        """Keep the limit that comes from now on."""
        self.is_held = True

    def let_through(self) -> None:
        """Leave the limit to Celery again, beginning with one that came meanwhile."""
        self.is_held = False
        if self._held_back:
            first = self._held_back[0]
            self._held_back.clear()
            self._handler(*first)

    def forget(self) -> None:
        """Drop a limit that came meanwhile, and leave others to Celery again."""
        self._held_back.clear()
        self.is_held = False


class _NoLimit(SoftLimit):
    def hold_back(self) -> None:
        """Nothing comes."""

    def let_through(self) -> None:
        """Nothing came."""

    def forget(self) -> None:
        """Nothing came."""


process.soft_limit = SoftLimit()
_no_limit = _NoLimit()


def soft_limit() -> SoftLimit:
    """Return the soft time limit of the run in this thread.

    If it is held back already, by a run around this one or by a transaction, it stays so: to this one there is none.
    """
    limit: SoftLimit = process.soft_limit
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR1") or limit.is_held:
        return _no_limit
    return limit if limit.is_there() else _no_limit


class uninterrupted:  # noqa: N801 - a context manager, as those of contextlib
    """Hold the soft time limit back, and let it through afterwards."""

    __slots__ = ("_limit",)

    def __enter__(self) -> None:
        self._limit = soft_limit()
        self._limit.hold_back()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._limit.let_through()
