"""Keep database connections from one run of a durable task to the next, as Django keeps them between requests.

Celery's Django fixup closes every connection before and after each task, whatever ``CONN_MAX_AGE`` says, and connecting
anew costs more than a run's own statements do. For the runs of durable tasks it does what Django does around a request
instead: connections that are older than ``CONN_MAX_AGE`` or unusable are closed, and ``CONN_HEALTH_CHECKS`` counts.
Runs that follow one delivery in one process count as one.
Plain tasks are left to Celery, and so is everything with ``CELERY_DB_REUSE_MAX`` or with a pool of connections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from celery._state import get_current_task
from celery.fixups import django as fixups
from django.db import close_old_connections, connections

from conductor_app import hand_off
from conductor_app.durable import DurableTask


def install() -> None:
    """Teach Celery's fixup, in a worker that begins to start."""
    fixup: Any = cast(Any, fixups).DjangoWorkerFixup  # its stubs do not know it
    if not hasattr(fixup.close_database, "is_conductor"):
        fixup.close_database = _taught(fixup.close_database)


def _taught(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def close_database(fixup: Any, **kwargs: Any) -> None:
        # The task whose run begins or has just ended in this thread; none in a worker that starts.
        is_durable = isinstance(get_current_task(), DurableTask)
        if not is_durable or fixup.db_reuse_max or _is_any_pooled():
            original(fixup, **kwargs)
        elif not hand_off.is_between_runs():
            close_old_connections()

    close_database.is_conductor = True  # type: ignore[attr-defined]
    return close_database


def _is_any_pooled() -> bool:
    # In a forked process the pool is the parent's, so Celery takes it down around each task.
    return any(settings.get("OPTIONS", {}).get("pool") for settings in connections.settings.values())
