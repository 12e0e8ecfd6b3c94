"""Which workers there are. The only writer of the table ``Worker``."""

from __future__ import annotations

import functools

from conductor_app.models import Worker, database
from conductor_app.store import clock
from conductor_app.store.locks import leave_if_locked
from conductor_app.store.transactions import persist_briefly

#: Workers that were not seen for so many seconds are forgotten.
FORGOTTEN_SECONDS = 3_600.0

#: What a worker may say anew each time.
_SAID = tuple(field.name for field in Worker._meta.concrete_fields if field.name not in ("id", "started_at", "seen_at"))


def attend(worker: Worker, *, up: float) -> None:
    """Say that a worker is there, and what it is: one update, or an insert the first time.

    Args:
        worker: What to say; nothing of it is read from the database.
        up: How many seconds ago it started.

    Raises:
        RowsLocked: Somebody has locked its row.
    """
    row = Worker.objects.using(database()).filter(pk=worker.pk)
    leave_if_locked(row)
    persist_briefly(database(), functools.partial(_attend, worker, up))


def _attend(worker: Worker, up: float) -> None:
    rows = Worker.objects.using(database())
    said = {name: getattr(worker, name) for name in _SAID}
    # Only the worker itself writes its row, so nobody else can insert it in between.
    if not rows.filter(pk=worker.pk).update(**said, seen_at=clock.now()):
        rows.create(pk=worker.pk, **said, started_at=clock.after(-up), seen_at=clock.now())


def leave(worker_id: str) -> None:
    """Say that a worker has ended.

    Raises:
        RowsLocked: Somebody has locked its row.
    """
    row = Worker.objects.using(database()).filter(pk=worker_id)
    leave_if_locked(row)
    persist_briefly(database(), row.delete)


def forget_old() -> int:
    """Remove the rows of workers that were killed long ago, and return how many.

    Raises:
        RowsLocked: Another sweeper is just doing that.
    """
    old = Worker.objects.using(database()).filter(seen_at__lt=clock.after(-FORGOTTEN_SECONDS)).order_by()
    leave_if_locked(old)
    removed: int = persist_briefly(database(), old.delete)[0]
    return removed
