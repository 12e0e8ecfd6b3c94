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

from celery import current_app
from celery._state import get_current_task
from celery.fixups import django as fixups
from django.db import connections

from conductor_app.body import left_open
from conductor_app.body.plain import is_invocable
from conductor_app.engine import hand_off
from conductor_app.engine.run import current_run
from conductor_app.store.process import process


def install() -> None:
    """Teach Celery's fixup, in a worker that begins to start."""
    fixup: Any = cast(Any, fixups).DjangoWorkerFixup  # its stubs do not know it
    if not hasattr(fixup.close_database, "is_conductor"):
        fixup.close_database = _taught(fixup.close_database)
    process.worker.renew_connections = _renew


def _renew() -> None:
    # As Celery's own setting: the bare name in its configuration.
    if not current_app.conf.get("CELERY_DB_REUSE_MAX", None):
        left_open.close_old()


def _taught(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def close_database(fixup: Any, **kwargs: Any) -> None:
        # The task whose run begins or has just ended in this thread; none in a worker that starts.
        task = get_current_task()
        is_durable = is_invocable(task)
        if is_durable and _is_claimed_already(task):
            # The claim has used the connection, so its age has been looked at, and the run goes on with it.
            fixup._db_recycles += bool(fixup.db_reuse_max)
        elif not is_durable or fixup.db_reuse_max or _is_any_pooled():
            original(fixup, **kwargs)
        elif not hand_off.is_between_runs():
            left_open.close_old()

    close_database.is_conductor = True  # type: ignore[attr-defined]
    return close_database


def _is_claimed_already(task: Any) -> bool:
    """Tell whether a run of the task is about to begin in this thread, whose execution is claimed."""
    started = current_run.get()
    return started is not None and started.task.name == task.name and not (started.has_begun or started.is_over)


def _is_any_pooled() -> bool:
    # In a forked process the pool is the parent's, so Celery takes it down around each task.
    return any(settings.get("OPTIONS", {}).get("pool") for settings in connections.settings.values())
