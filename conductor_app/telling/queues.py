"""Queues in which an execution has been due for too long, and what workers do in them."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

from django.db.models import QuerySet

from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus
from conductor_app.telling.situation import Situation
from conductor_app.telling.stops import is_put_aside, pause_of
from conductor_app.transitions import kinds

#: A due execution that no worker has taken for so many seconds is worth a hint.
UNANSWERED_SECONDS = 60.0
#: After so many messages without an answer, no worker seems to consume the queue.
UNDELIVERABLE_DISPATCHES = 8


def unanswered_queue(situation: Situation) -> str | None:
    """Return the queue in which the execution, or the child that it waits for, has been due for too long.

    Whether its workers are busy or there are none, ``Situation.at_work`` tells.
    """
    execution = situation.execution
    if execution.status == ExecutionStatus.QUEUED:
        return str(execution.queue) if is_unanswered(execution, situation.now) else None
    if execution.status != ExecutionStatus.WAITING:
        return None
    for step in situation.pending:
        child = situation.tree.get(step.child_id) if step.child_id is not None else None
        if child is not None and _is_awaited(step) and is_unanswered(child, situation.now):
            return str(child.queue)
    return None


def _is_awaited(step: Step) -> bool:
    kind = kinds.of(step.kind)
    return kind.has_child and kind.suspends


def with_queue(situation: Situation, seen: QuerySet[Execution] | None = None) -> Situation:
    """Return the situation with its task's pause, and with what workers do in the queue that has not answered.

    One query for one that is queued, and one if there is such a queue.
    """
    situation = replace(situation, paused=pause_of(situation.execution))
    if situation.paused is not None:
        return situation
    queue = unanswered_queue(situation)
    if queue is None:
        return situation
    rows: Any = Execution.objects.using(database()) if seen is None else seen
    return replace(situation, at_work=rows.order_by().at_work().filter(queue=queue).count())


def is_unanswered(execution: Execution, now: dt.datetime) -> bool:
    """Tell whether an execution has been due for so long that no worker seems to take it."""
    if execution.status != ExecutionStatus.QUEUED or execution.due_at is None or execution.due_at > now:
        return False
    if is_put_aside(execution) or execution.is_held:
        return False
    waited = (now - execution.due_at).total_seconds()
    return waited >= UNANSWERED_SECONDS or execution.dispatches >= UNDELIVERABLE_DISPATCHES
