"""What a sweep has found locked, and leaves for the next one."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conductor_app.conf import conductor_settings
from conductor_app.models import Step
from conductor_app.store.locks import RowsLocked

logger = logging.getLogger("conductor_app.engine.sweeper")

#: After so many sweeps the log tells of something that is locked.
TOLD_AFTER_SWEEPS = 2
#: So many locked ones are remembered at most.
MOST_LEFT = 2_000


@dataclass
class Left:
    """Something to act on that somebody has locked."""

    kind: str
    item: Any
    act: Callable[[Any], object]
    #: By ``time.monotonic()``, as all of these.
    since: float
    tried_at: float
    tries: int = 0
    is_told: bool = False
    #: Since when it is not locked any more, for what waits a while then.
    free_since: float | None = None


class Leavings(threading.local):
    """What each thread that sweeps has found locked: at the next sweep it is tried again, after all that is not."""

    def __init__(self) -> None:
        #: By kind and key.
        self.all: dict[tuple[str, object], Left] = {}

    @contextlib.contextmanager
    def of(self, root_id: uuid.UUID | None) -> Iterator[None]:
        """Leave alone, while one tree is swept, what was found locked of others."""
        before = self.all
        if root_id is not None:
            self.all = {}
        try:
            yield
        finally:
            self.all = before

    def leave(self, key: tuple[str, object], item: Any, act: Callable[[Any], object], error: RowsLocked) -> None:
        """Remember something that is locked, and say so if it has been for a while."""
        now = time.monotonic()
        left = self.all.get(key)
        if left is None:
            if len(self.all) >= MOST_LEFT:
                return  # found again by the next sweep
            left = self.all[key] = Left(key[0], item, act, now, now)
        left.tried_at = now
        left.tries += 1
        is_long = now - left.since >= TOLD_AFTER_SWEEPS * conductor_settings().SWEEP_SECONDS
        if not left.is_told and left.free_since is None and is_long:
            left.is_told = True
            logger.warning(
                "Sweeping %s (%s) has to wait: for %.0f s, another session has locked a row that it needs (%s). "
                "Everything else goes on. It is tried again at each sweep.",
                describe(item),
                key[0],
                now - left.since,
                error,
            )


leavings = Leavings()


def describe(item: object) -> str:
    """Return how the log names something that a sweep acts on."""
    return f"step {item.name!r} of execution {item.execution_id}" if isinstance(item, Step) else str(item)
