"""Workers delete the trees of their tasks that are kept no longer: a bounded number in each sweep."""

from __future__ import annotations

import datetime as dt
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator

from celery import current_app
from django.db import DatabaseError

from conductor_app.conf import conductor_settings
from conductor_app.engine import pruner
from conductor_app.states import ExecutionStatus
from conductor_app.store.locks import RowsLocked
from conductor_app.values.retention import Retention

logger = logging.getLogger("conductor_app.engine.sweeper")

#: How often a worker looks for what it may delete, in seconds, about.
LOOK_SECONDS = 3_600.0
#: How long a worker deletes before it does something else, in seconds.
TURN_SECONDS = 0.2
#: Trees that are deleted in one transaction.
BATCH = 100

#: Those that KEEP is about; KEEP_FAILED is about the others.
_ENDED_WELL = (ExecutionStatus.SUCCEEDED.value, ExecutionStatus.CANCELLED.value)
_FAILED = (ExecutionStatus.FAILED.value,)


def limits() -> dict[tuple[float, tuple[str, ...]], list[str]]:
    """Return the tasks of this process, by how long their trees are kept, in seconds, and after which ends.

    Those of tasks that it does not have are left alone, whatever the settings say: their code may keep them for longer.
    """
    settings = conductor_settings()
    found: dict[tuple[float, tuple[str, ...]], list[str]] = defaultdict(list)
    for name, task in list(current_app.tasks.items()):
        said = getattr(task, "retention", None)
        if not isinstance(said, Retention):
            continue
        for own, default, statuses in (
            (said.keep, settings.KEEP, _ENDED_WELL),
            (said.keep_failed, settings.KEEP_FAILED, _FAILED),
        ):
            seconds = default if own is None else own
            if seconds is not None and seconds != math.inf:
                found[seconds, statuses].append(name)
    return dict(found)


class Deleting:
    """What one worker deletes: it looks from time to time, and deletes for a moment in each sweep until all is gone.

    Several workers may do so at once: what one is about to delete, another one passes over.
    """

    def __init__(self) -> None:
        # Workers are started together.
        self._next_look = time.monotonic() + random.uniform(0, conductor_settings().AUDIT_SECONDS)
        self._batches: Iterator[int] | None = None
        self._deleted = 0

    def go_on(self) -> bool:
        """Delete for a moment, if it is time; tell whether there is more."""
        now = time.monotonic()
        if self._batches is None:
            if now < self._next_look:
                return False
            self._next_look = now + LOOK_SECONDS * random.uniform(0.8, 1.2)
            self._batches, self._deleted = _batches(), 0
        try:
            for number in self._batches:
                self._deleted += number
                if time.monotonic() - now > TURN_SECONDS:
                    return True
        except DatabaseError as error:
            logger.warning("Deleting old executions was broken off; it begins anew in an hour: %s", error)
        self._batches = None
        if self._deleted:
            logger.info("Deleted %d executions in trees that are kept no longer.", self._deleted)
        return False


def _batches() -> Iterator[int]:
    """Delete what is kept no longer, a batch at each step; yield how many executions went."""
    for (seconds, statuses), tasks in limits().items():
        roots = pruner.ended(dt.timedelta(seconds=seconds), statuses).filter(task__in=tasks)
        following = roots
        while found := list(following.values_list("pk", flat=True)[:BATCH]):
            try:
                number = pruner.delete(roots, found)
            except RowsLocked:
                number = 0  # they are there at the next look, too
            yield number
            following = roots.filter(pk__gt=found[-1])
