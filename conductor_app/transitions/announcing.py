"""Who tells Celery of a final status, and when."""

from __future__ import annotations

import uuid

from django.db import transaction

from conductor_app import clock
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.sql import locked
from conductor_app.transitions import guards


def announced(execution_id: uuid.UUID) -> bool:
    """Note that Celery has been told of a final status; ``False`` if that is noted already, or it was reopened."""
    untold = Execution.objects.using(database()).filter(pk=execution_id, announce_at__isnull=False)
    return bool(guards.persist_briefly(lambda: untold.update(announce_at=None)))


def announce_now(execution_id: uuid.UUID) -> bool:
    """Let the sweeper tell Celery of a final status now: the process that was to do it is dead."""
    untold = Execution.objects.using(database()).filter(pk=execution_id, announce_at__isnull=False)
    return bool(guards.persist_briefly(lambda: untold.update(announce_at=clock.now())))


def take_for_announcement(limit: int) -> list[Execution]:
    """Take final executions of which Celery is to be told, so that no other sweeper tells it too."""

    def work() -> list[Execution]:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).to_announce()
            taken = list(locked(rows, skip=True)[:limit])
            Execution.objects.using(database()).filter(pk__in=[row.pk for row in taken]).update(
                announce_at=clock.after(conductor_settings().LEASE_SECONDS)
            )
        return taken

    return guards.persist_briefly(work)
