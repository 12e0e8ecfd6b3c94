"""What people have stopped: executions that are held, and tasks that are paused; since when, by whom and why."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, PausedTask, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.telling.words import instant, sentence, since

#: Most paused tasks that are told of, and of whose executions so many are counted.
MOST_PAUSED, MOST_COUNTED = 100, 10_000


@dataclass(frozen=True)
class Paused:
    """A paused task, and how many of its executions are queued."""

    row: PausedTask
    queued: int

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**document_of_pause(self.row), "queued": self.queued}


def why_held(execution: Execution, now: dt.datetime) -> str:
    """Return a sentence: ``Held since 09:30:00 (2.1 h ago), by ana: bank incident.``"""
    assert execution.held_at is not None
    values = _values(execution.held_at, now, execution.held_by, execution.hold_reason)
    if execution.held_by:
        return sentence(_("Held since %(instant)s (%(time)s ago), by %(actor)s: %(reason)s") % values)
    return sentence(_("Held since %(instant)s (%(time)s ago): %(reason)s") % values)


def why_paused(paused: PausedTask, now: dt.datetime) -> str:
    """Return a sentence: ``Its task is paused since 09:30:00 (2.1 h ago), by ana: bank incident.``"""
    values = _values(paused.paused_at, now, paused.paused_by, paused.reason)
    if paused.paused_by:
        return sentence(_("Its task is paused since %(instant)s (%(time)s ago), by %(actor)s: %(reason)s") % values)
    return sentence(_("Its task is paused since %(instant)s (%(time)s ago): %(reason)s") % values)


def _values(when: dt.datetime, now: dt.datetime, by: str | None, reason: str | None) -> dict[str, str]:
    return {"instant": instant(when, now), "time": since(when, now), "actor": by or "", "reason": reason or ""}


def is_put_aside(execution: Execution) -> bool:
    """Tell by its row alone whether it is queued and out of everybody's way: parked, held, or of a paused task."""
    at = execution.dispatch_at
    return execution.status == ExecutionStatus.QUEUED and at is not None and at.year >= clock.NEVER.year


def pause_of(execution: Execution) -> PausedTask | None:
    """Return why an execution that is queued does not begin, if that is since its task is paused."""
    if execution.status != ExecutionStatus.QUEUED or execution.is_held or execution.due_at is None:
        return None
    return PausedTask.objects.using(database()).filter(pk=execution.task).first()


def document_of_hold(execution: Execution) -> dict[str, Any] | None:
    """Return a hold for programs; ``None`` if nobody holds it."""
    if not execution.is_held:
        return None
    return {"since": execution.held_at, "by": execution.held_by or None, "reason": execution.hold_reason}


def document_of_pause(paused: PausedTask) -> dict[str, Any]:
    """Return a pause for programs."""
    return {"task": paused.name, "since": paused.paused_at, "by": paused.paused_by or None, "reason": paused.reason}


def read_paused(
    seen: QuerySet[Execution] | None = None, *, most: int = MOST_PAUSED, counted: int = MOST_COUNTED
) -> list[Paused]:
    """Return the paused tasks, the latest first, and how many of each are queued, in two queries at most.

    Args:
        seen: The executions that may be told of; then only of tasks of which one is queued.
        most: At most so many tasks.
        counted: So many executions are counted.
    """
    rows = list(PausedTask.objects.using(database()).order_by("-paused_at", "name")[:most])
    if not rows:
        return []
    queued: Any = Execution.objects.using(database()) if seen is None else seen
    queued = queued.order_by().with_status(ExecutionStatus.QUEUED).filter(task__in=[row.name for row in rows])
    counts = Counter(queued.values_list("task", flat=True)[:counted])
    return [Paused(row, counts[row.name]) for row in rows if seen is None or row.name in counts]


def held(seen: QuerySet[Execution] | None = None) -> ExecutionQuerySet:
    """Return the executions that are held, those for longest first."""
    rows: Any = Execution.objects.using(database()) if seen is None else seen
    found: ExecutionQuerySet = rows.held().order_by("held_at", "pk")
    return found
