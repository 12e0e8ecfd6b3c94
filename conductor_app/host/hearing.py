"""How long a remote command may have been under way when a worker hears it."""

from __future__ import annotations

import time
from typing import Any

from celery import signals

from conductor_app.store.process import USUAL_SECONDS

#: For how long after a body's end commands come that were sent meanwhile, in seconds.
BACKLOG_SECONDS = 5.0


class DeafTimes:
    """When a worker hears of no command, because its main thread runs bodies: the one of the solo pool.

    Once it listens again, it hears what was sent minutes ago, and other workers have long obeyed.
    """

    def __init__(self) -> None:
        self._since = self._until = float("-inf")
        signals.task_prerun.connect(self._on_prerun)
        signals.task_postrun.connect(self._on_postrun)

    def heard_since(self) -> float:
        """Return since when a command that is heard now may be under way, by ``time.monotonic()``."""
        now = time.monotonic()
        is_backlog = now <= self._until + BACKLOG_SECONDS
        return (self._since if is_backlog else now) - USUAL_SECONDS

    def leave(self) -> None:
        """Watch no bodies any more: the process goes on without its worker."""
        signals.task_prerun.disconnect(self._on_prerun)
        signals.task_postrun.disconnect(self._on_postrun)

    def _on_prerun(self, **_kwargs: Any) -> None:
        now = time.monotonic()
        if now > self._until + BACKLOG_SECONDS:  # else what was sent during the last body may still be unheard
            self._since = now
        self._until = now

    def _on_postrun(self, **_kwargs: Any) -> None:
        self._until = time.monotonic()
