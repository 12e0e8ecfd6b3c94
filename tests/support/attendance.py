"""Workers that say that they are there, without any process."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from typing import Any

from django.db.models import F

from conductor_app.models import Execution, Worker
from conductor_app.transitions import attending
from tests.support import executions


def attends(
    name: str = "celery@web1",
    *,
    token: str = "0123abcd",
    queues: Sequence[str] = ("celery",),
    up: float = 90,
    ago: float = 0,
    **fields: Any,
) -> Worker:
    """A worker that has said so many seconds ago that it is there."""
    said = {
        "host": "web1",
        "pid": 4711,
        "pool": "prefork",
        "slots": 2,
        "package": "0.1.0",
        "celery": "5.7.0",
        "django": "5.2.19",
        "python": "3.11.2",
        "release": "2026.11.3",
        **fields,
    }
    worker = Worker(id=f"{name}/{token}", name=name, queues=json.dumps(list(queues)), **said)
    attending.attend(worker, up=up)
    if ago:
        Worker.objects.filter(pk=worker.pk).update(seen_at=F("seen_at") - dt.timedelta(seconds=ago))
    return Worker.objects.get(pk=worker.pk)


def runs(worker: Worker | str, pid: int = 1, **fields: Any) -> Execution:
    """An execution that a process of a worker runs, with a lease that a stalled machine does not let lapse."""
    key = worker.pk if isinstance(worker, Worker) else worker
    claimed = executions.claimed(executions.queued(**fields), owner=f"{key}/{pid}")
    Execution.objects.filter(pk=claimed.pk).update(lease_expires_at=F("lease_expires_at") + dt.timedelta(hours=1))
    return claimed


def lapses(*found: Execution) -> None:
    """Nobody has renewed their leases for hours."""
    held = Execution.objects.filter(pk__in=[each.pk for each in found])
    held.update(lease_expires_at=F("lease_expires_at") - dt.timedelta(hours=2))


def since(execution: Execution, seconds: float) -> Execution:
    """A queued execution that is due since so many seconds."""
    Execution.objects.filter(pk=execution.pk).update(due_at=F("due_at") - dt.timedelta(seconds=seconds))
    return execution
