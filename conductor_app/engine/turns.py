"""One sweep's turns: each kind of finding gets its own, and what is locked is tried again."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from django.db import connections

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import outage
from conductor_app.engine.leavings import describe, leavings
from conductor_app.models import Step, database
from conductor_app.store.errors import is_outage
from conductor_app.store.locks import RowsLocked, waiting_at_most
from conductor_app.store.waits import at_work
from conductor_app.transitions import steps

logger = logging.getLogger("conductor_app.engine.sweeper")

T = TypeVar("T")
R = TypeVar("R")

#: How long a sweep waits for a locked row, in seconds: when it tries again what was locked; and later on.
FIRST_WAIT_SECONDS, LATER_WAIT_SECONDS = 0.1, 0.01
#: How long it tries again what was locked, in seconds.
AGAIN_SECONDS = 0.5
#: How often something else gets its turn meanwhile, in seconds.
BETWEEN_SECONDS = 0.05
#: How long each kind of finding gets in a worker, in seconds, before the next one.
TURN_SECONDS = 0.5
#: So many steps are decided in one go.
DECIDED_TOGETHER = 100


class Found(Counter[str]):
    """How often each kind of finding was acted on."""

    #: Whether a sweep has left something for the next one, which is to come at once.
    has_more = False


class Sweep:
    """One sweep: each kind of finding gets its turn, whatever there is of the others."""

    def __init__(self, turn: float | None, between: Callable[[], object]) -> None:
        self._turn = turn
        self._between = between
        self._between_at = time.monotonic() + BETWEEN_SECONDS
        self._kinds: set[str] = set()
        self._ends_at: dict[str, float] = {}
        self.found = Found()

    def each(self, kind: str, find: Callable[[list[Any]], Iterable[T]], act: Callable[[T], object]) -> int:
        """Act on each finding in a transaction of its own; one that fails, or is locked, does not stop the others.

        Args:
            find: Gets the keys of those that are known to be locked, and finds the others.

        Returns:
            How many were acted on.

        Raises:
            Exception: The database is away, which would fail them all.
        """
        known = self._begin(kind)
        if self._is_over(kind):
            return 0
        connection = connections[database()]
        with at_work(connection):
            items = list(find(known))
        return self._act_on_each(kind, items, act)

    def decide_overdue(self, limit: int, root_id: uuid.UUID | None) -> None:
        """Decide the steps whose deadline has passed: many together, and one by one what is not so simple."""
        kind = "overdue_steps"
        known = self._begin(kind)
        with at_work(connections[database()]):
            overdue = steps.overdue(limit, known, root_id)
        left: list[Step] = []
        for start in range(0, len(overdue), DECIDED_TOGETHER):
            if self._is_over(kind):
                break
            part = overdue[start : start + DECIDED_TOGETHER]
            decided = _decide_together(part)
            self._count(kind, len(decided))
            left += [step for step in part if step.pk not in decided]
        if left:
            # Another sweeper may have decided them meanwhile.
            with at_work(connections[database()]):
                still = set(steps.overdue_rows().filter(pk__in=[step.pk for step in left]).values_list("pk", flat=True))
            self._act_on_each(kind, [step for step in left if step.pk in still], transitions.decide_overdue)

    def in_parts(self, kind: str, act: Callable[[int], tuple[int, int]], size: int) -> None:
        """Let ``act`` take and act on so many of a kind at once, again and again until there is no more."""
        self._begin(kind)
        left = conductor_settings().SWEEP_BATCH
        while left and not self._is_over(kind):
            wanted = left if self._turn is None else min(left, size)
            taken, done = act(wanted)
            self._count(kind, done)
            if taken < wanted:
                return
            left -= taken

    def try_again(self) -> None:
        """Try what was locked: for a moment, since most locks last no longer; at each sweep, as long as they last."""
        ends_at = time.monotonic() + AGAIN_SECONDS
        for left in sorted(leavings.all.values(), key=lambda left: left.tried_at):
            if left.kind not in self._kinds:
                continue
            if self._turn is not None and time.monotonic() > ends_at:
                break
            with waiting_at_most(FIRST_WAIT_SECONDS if left.tries == 1 else LATER_WAIT_SECONDS, database()):
                self._count(left.kind, self._act_on(left.kind, left.item, left.act))
        if locked := sum(left.kind in self._kinds for left in list(leavings.all.values())):
            self.found["locked"] = locked

    def _begin(self, kind: str) -> list[Any]:
        """Begin a kind's turn, and return the keys of what is known to be locked."""
        self._kinds.add(kind)
        if self._turn is not None:
            self._ends_at.setdefault(kind, time.monotonic() + self._turn)
        return [key for known, key in list(leavings.all) if known == kind]

    def _is_over(self, kind: str) -> bool:
        """Tell whether it is the next kind's turn; the sweeper's thread has to do other things, too."""
        now = time.monotonic()
        if now >= self._between_at:
            self._between()
            self._between_at = time.monotonic() + BETWEEN_SECONDS
        if now < self._ends_at.get(kind, now + 1):
            return False
        self.found.has_more = True
        return True

    def _count(self, kind: str, done: int) -> None:
        if done:
            self.found[kind] += done
            self.found.has_more |= self.found[kind] >= conductor_settings().SWEEP_BATCH

    def _act_on_each(self, kind: str, items: Iterable[T], act: Callable[[T], object]) -> int:
        done = 0
        for item in items:
            if self._is_over(kind):
                break
            done += self._act_on(kind, item, act)
        self._count(kind, done)
        return done

    def _act_on(self, kind: str, item: T, act: Callable[[T], object]) -> bool:
        key = (kind, item.pk if isinstance(item, Step) else item)
        try:
            done = bool(self._attempt(item, act))
        except RowsLocked as error:
            leavings.leave(key, item, act, error)
            return False
        leavings.all.pop(key, None)
        return done

    def _attempt(self, item: T, act: Callable[[T], R]) -> R | None:
        try:
            return act(item)
        except RowsLocked:
            raise
        except Exception as error:
            if not is_outage(error):
                logger.exception("Sweeping %s failed; it will be tried again.", describe(item))
                return None
            if not outage.database_answers():
                raise
            # One session was ended.
            logger.warning("Sweeping %s failed (%s); it will be tried again.", describe(item), error)
            return None


def _decide_together(overdue: list[Step]) -> set[int]:
    try:
        return transitions.decide_overdue_together(overdue)
    except Exception as error:
        if is_outage(error) and not outage.database_answers():
            raise
        # One of them is at fault; which one, they say when each is decided alone.
        logger.debug("%d steps are decided one by one: %s", len(overdue), error)
        return set()
