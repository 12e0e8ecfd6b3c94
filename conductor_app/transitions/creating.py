"""Executions that begin."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError

from conductor_app import signals
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, forks
from conductor_app.store.opened import note_created, one_statement
from conductor_app.transitions import dispatch, guards


@dataclass(frozen=True)
class NewExecution:
    """An execution that is about to be stored; all of it is checked already."""

    id: uuid.UUID
    task: str
    queue: str
    #: ``[args, kwargs]`` as stored text.
    payload: str
    max_attempts: int | None
    priority: int | None = None
    options: str = ""
    #: Seconds until it may be claimed.
    countdown: float = 0
    #: Instead of ``countdown``: the instant at which it may be claimed.
    eta: dt.datetime | None = None
    #: Seconds, or the instant, after which it must not start any more.
    expires: float | dt.datetime | None = None
    idempotency_key: str | None = None


def create(new: NewExecution) -> tuple[Execution, bool]:
    """Store a root execution as queued, in the current transaction if there is one.

    Returns:
        The execution, and whether it is new: the same id or idempotency key gives the existing one.
    """
    forks.own()
    using = database()
    row = queued_row(new)
    tries = 0

    def insert() -> Execution | None:
        """Return the execution that is there already."""
        nonlocal tries
        tries += 1
        try:
            with one_statement(using):
                row.save(force_insert=True, using=using)
        except IntegrityError:
            existing = _find_existing(new)
            if existing is None:
                raise
            # After a COMMIT that got no answer it is this one.
            return existing if tries == 1 or existing.pk != new.id else None
        return None

    existing = guards.persist_briefly(insert)
    if existing is not None:
        return existing, False
    note_created(using, row.pk)
    if row.dispatch_at is not None and is_due(new):
        dispatch.on_commit(row)
    guards.send_signal(signals.execution_created, row)
    return row, True


def _find_existing(new: NewExecution) -> Execution | None:
    rows = Execution.objects.using(database())
    found = rows.filter(pk=new.id).first()
    if found is None and new.idempotency_key is not None:
        found = rows.filter(task=new.task, idempotency_key=new.idempotency_key).first()
    return found


def is_due(new: NewExecution) -> bool:
    return new.eta is None and new.countdown <= 0


def queued_row(
    new: NewExecution,
    parent: Execution | None = None,
    step: str = "",
    *,
    position: int | None = None,
    is_held: bool = False,
) -> Execution:
    """Return the row of an execution that is queued; it is not saved.

    Args:
        new: What it is to run.
        parent: Its parent.
        step: The parent's step.
        position: Its place in the parent's map.
        is_held: Whether it is not due, and its message not to be published, before a sibling ends.
    """
    due: Any = clock.after(max(new.countdown, 0)) if new.eta is None else new.eta
    expires: Any = clock.after(new.expires) if isinstance(new.expires, (int, float)) else new.expires
    row = timeless_row(new, parent, step, position=position)
    row.deadline_at = expires
    if not is_held:
        row.due_at = due
        row.dispatch_at = dispatch.first_instant(
            due, is_due=is_due(new), root_id=None if parent is None else parent.root_id, ahead=position or 0
        )
    row.created_at = clock.now()
    return row


def timeless_row(
    new: NewExecution, parent: Execution | None = None, step: str = "", *, position: int | None = None
) -> Execution:
    """Return the row of an execution that is queued, without any instant; it is not saved."""
    return _row(
        id=new.id,
        task=new.task,
        queue=new.queue,
        priority=new.priority,
        payload=new.payload,
        status=ExecutionStatus.QUEUED,
        max_attempts=new.max_attempts,
        parent_id=None if parent is None else parent.pk,
        root_id=new.id if parent is None else parent.root_id,
        depth=0 if parent is None else parent.depth + 1,
        step=step,
        position=position,
        idempotency_key=new.idempotency_key,
        options=new.options,
    )


#: The fields in the order in which a model takes their values, which it does in half of the time that names take.
_FIELDS = {field.attname: field for field in Execution._meta.concrete_fields}


def _row(**values: Any) -> Execution:
    row: Any = [values[name] if name in values else field.get_default() for name, field in _FIELDS.items()]
    return Execution(*row)
