"""Pause a task: no run of it begins; and park what is queued meanwhile.

Each claim looks whether its task is paused (``parts.IS_LET``), so nothing else is needed for the promise. What is
queued is parked besides, so that nobody publishes or looks at it again and again: ``take_for_dispatch`` finds it due
and of a paused task, and this moves it out of the way. Whoever parks, and whoever unpauses, locks the row of the paused
task first. So one of two things happens: it is parked before, and found by who unpauses; or it is not parked at all.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F, Q, QuerySet
from django.db.models.functions import Greatest

from conductor_app.models import Execution, PausedTask, database
from conductor_app.models.execution import IS_PAUSED, PARKED_AT
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import guards
from conductor_app.values.texts import clean_text

#: How many are moved in one transaction.
_TOGETHER = 1_000
#: Bytes of a reason that are kept.
REASON_BYTES = 1_000


def pause(task: str, reason: str, by: str) -> bool:
    """Let no run of a task begin from now on; tell whether it was not paused before."""

    def work() -> bool:
        row = PausedTask(name=task, paused_at=clock.now(), paused_by=by, reason=clean_text(reason, REASON_BYTES))
        try:
            with transaction.atomic(using=database()):
                row.save(using=database(), force_insert=True)
        except IntegrityError:
            return False
        return True

    return guards.persist_briefly(work)


def unpause(task: str) -> bool:
    """Let runs of a task begin again, and give back what was parked; tell whether it was paused.

    Two transactions: where claims lock what they have looked at (MariaDB), one would wait for them, and they for it.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            # Waits for whoever is just parking executions of it: those are found below.
            rows = PausedTask.objects.using(database()).filter(pk=task)
            return bool(list(locked(rows))) and bool(rows.delete()[0])

    was_paused = guards.persist_briefly(work)
    # Also what was published and refused meanwhile, and would be published again after a while.
    late = Q(task=task, dispatch_at__gt=Greatest("due_at", clock.now()))
    keys = guards.persist_briefly(
        lambda: list(_unheld().filter(late).order_by("dispatch_at").values_list("pk", flat=True))
    )
    for start in range(0, len(keys), _TOGETHER):
        _give_back(Execution.objects.using(database()).filter(pk__in=keys[start : start + _TOGETHER]))
    return was_paused


def is_paused(task: str) -> bool:
    """Tell whether a task is paused."""
    return guards.persist_briefly(PausedTask.objects.using(database()).filter(pk=task).exists)


def why_paused(paused: PausedTask) -> str:
    """Return since when a task is paused, and why, for a refusal."""
    return guards.why_stopped("paused", paused.paused_at, paused.paused_by, paused.reason)


def park(task: str, execution_ids: Sequence[uuid.UUID]) -> None:
    """queued → queued: nobody is to publish these, or look at them, while their task is paused."""
    using = database()

    def work() -> None:
        with transaction.atomic(using=using):
            # Gone, or somebody is just unpausing it, or parking others: the next look for what is due tells.
            paused = locked(PausedTask.objects.using(using).filter(pk=task), skip=True).first()
            rows = _unheld().filter(pk__in=execution_ids)
            free = list(locked(rows, skip=True).values_list("pk", flat=True))
            parked = Execution.objects.using(using).filter(pk__in=free)
            parked.update(dispatch_at=clock.now() if paused is None else PARKED_AT)

    guards.persist_briefly(work, skips_locked=True)


def unpark_lost(limit: int) -> int:
    """Give back what is parked for no reason; for the audit. A process has died while it unpaused a task.

    Returns:
        How many there were.
    """
    lost = _unheld().filter(~Q(IS_PAUSED), dispatch_at=PARKED_AT)
    keys = list(lost.values_list("pk", flat=True)[:limit])
    return _give_back(Execution.objects.using(database()).filter(pk__in=keys)) if keys else 0


def _unheld() -> QuerySet[Execution]:
    """Queued, with an instant to be published at, and not held."""
    queued = Execution.objects.using(database()).with_status(ExecutionStatus.QUEUED)
    # What waits for a place of a limit is due when it is handed one.
    return queued.filter(dispatch_at__isnull=False, due_at__lt=clock.Never(), held_at__isnull=True)


def _give_back(rows: QuerySet[Execution]) -> int:
    def work() -> int:
        with transaction.atomic(using=database()):
            free = list(
                locked(rows.filter(status=ExecutionStatus.QUEUED, held_at__isnull=True)).values_list("pk", flat=True)
            )
            return Execution.objects.using(database()).filter(pk__in=free).update(**due_again())

    return guards.persist_briefly(work)


def due_again() -> dict[str, Any]:
    """Return the values of what is queued and parked no more: the sweeper or the feed publishes it, in its old order.

    What was due before has been due since now: its time in the queue is not the time for which it was kept from it.
    """
    # In this order: MySQL assigns from left to right.
    return {"dispatch_at": F("due_at"), "due_at": Greatest("due_at", clock.now()), "dispatches": 0}
