"""What has been sent to executions and waits to be taken. The only writer of the table ``Event``."""

from __future__ import annotations

import uuid

from django.db import IntegrityError, transaction

from conductor_app.models import Event, Step, database
from conductor_app.store import clock
from conductor_app.store.locks import locked


def find(execution_id: uuid.UUID, name: str, key: str) -> Event | None:
    """Return the event that was sent with this key, taken or not."""
    return Event.objects.using(database()).filter(execution_id=execution_id, name=name, key=key).first()


def put(execution_id: uuid.UUID, name: str, payload: str, key: str, taken_by: Step | None = None) -> bool:
    """Store an event; ``False`` if one was sent with this key. Call it while the execution's row is locked.

    Args:
        payload: Stored text.
        taken_by: The step that has waited for it and takes it at once.
    """
    try:
        # A savepoint: a caller's transaction stays usable.
        with transaction.atomic(using=database()):
            Event.objects.using(database()).create(
                execution_id=execution_id,
                name=name,
                key=key,
                payload=payload,
                step=taken_by,
                taken_at=None if taken_by is None else clock.now(),
                created_at=clock.now(),
            )
    except IntegrityError:
        if find(execution_id, name, key) is None:
            raise
        return False
    return True


def take(step: Step) -> str | None:
    """Let a step of kind ``event`` take the oldest event for which it waits.

    Call it while the execution's row is locked, or while nobody can send to the execution because it is final.

    Returns:
        The payload as stored text; ``None`` if there is no such event.
    """
    untaken = Event.objects.using(database()).filter(
        execution_id=step.execution_id, name=step.task, taken_at__isnull=True
    )
    # A locking read: whatever the isolation level, it sees what was committed before the execution's row was locked.
    event = locked(untaken.order_by("id")).first()
    if event is None:
        return None
    Event.objects.using(database()).filter(pk=event.pk).update(step=step, taken_at=clock.now())
    return event.payload
