"""Statuses as they are shown, a shape and a word each, and executions as plain data."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.telling.stops import document_of_hold, is_put_aside
from conductor_app.transitions import kinds

#: Shape before the word, so that a status never shows by colour alone.
MARKS = {
    ExecutionStatus.QUEUED: "○",
    ExecutionStatus.RUNNING: "▶",
    ExecutionStatus.WAITING: "◐",
    ExecutionStatus.SUCCEEDED: "✓",
    ExecutionStatus.FAILED: "✕",
    ExecutionStatus.CANCELLED: "⊘",
}
RETRYING_MARK = "↻"
#: Of what people keep from beginning.
STOPPED_MARK = "‖"
STEP_MARKS = {
    StepStatus.PENDING: "◐",
    StepStatus.SUCCEEDED: "✓",
    StepStatus.FAILED: "✕",
    StepStatus.TIMED_OUT: "✕",
    StepStatus.CANCELLED: "⊘",
}


@dataclass(frozen=True)
class Label:
    """A status as it is shown: a shape and a word."""

    mark: str
    word: str

    def __str__(self) -> str:
        return f"{self.mark} {self.word}"


def label(execution: Execution, now: dt.datetime, pending: Sequence[Step] = ()) -> Label:
    """Return the shape and the word for an execution's status.

    ``held`` is one that somebody holds, and ``paused`` one that is queued and put aside since its task is paused.
    ``retrying`` is a queued execution whose next attempt is due later, ``scheduled`` one whose first attempt is,
    ``parked`` one that waits for a place of a limit, and ``sleeping`` one that waits for nothing but a sleep; see
    ``Kind.status_word``.
    """
    status = ExecutionStatus(execution.status)
    word = status.value
    # A run goes on to its next call.
    if execution.is_held and status != ExecutionStatus.RUNNING:
        return Label(STOPPED_MARK, "held")
    if is_put_aside(execution) and not execution.is_parked:
        return Label(STOPPED_MARK, "paused")
    if status == ExecutionStatus.QUEUED and execution.due_at is None:
        word = "held back"
    elif execution.is_parked:
        word = "parked"
    elif status == ExecutionStatus.QUEUED and execution.due_at is not None and execution.due_at > now:
        if execution.attempt > 1:
            return Label(RETRYING_MARK, "retrying")
        word = "scheduled"
    if status == ExecutionStatus.WAITING and len(words := {kinds.of(step.kind).status_word for step in pending}) == 1:
        word = words.pop() or word
    return Label(MARKS[status], word)


def attempts(execution: Execution) -> str:
    """Return ``2/4``: the current attempt and how many are allowed; ``2`` if there is no limit."""
    return f"{execution.attempt}" if execution.max_attempts is None else f"{execution.attempt}/{execution.max_attempts}"


def document(execution: Execution, now: dt.datetime, pending: Sequence[Step] = ()) -> dict[str, Any]:
    """Return a row of a list of executions as plain data, for programs."""
    return {
        "id": execution.pk,
        "task": execution.task,
        "queue": execution.queue,
        "status": execution.status,
        "shown_as": label(execution, now, pending).word,
        "attempt": execution.attempt,
        "max_attempts": execution.max_attempts,
        "waiting_for": [step.name for step in pending],
        "parent": execution.parent_id,
        "root": execution.root_id,
        "step_in_parent": execution.step or None,
        "worker": execution.lease_owner or None,
        "held": document_of_hold(execution),
        "due_at": execution.told_due_at,
        "created_at": execution.created_at,
        "started_at": execution.started_at,
        "finished_at": execution.finished_at,
    }
