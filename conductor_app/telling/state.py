"""What executions tell of themselves, and how far the children are that they wait for."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable
from typing import Any

from conductor_app.models import Execution, PublishedState, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.values.state import ChildrenProgress, ExecutionState, read_told

#: The columns of what an execution tells.
TOLD = ("done", "total", "note", "published", "updated_at")


def read_state(execution_id: uuid.UUID) -> ExecutionState | None:
    """Return how an execution stands, and what it tells; ``None`` if there is none."""
    rows = Execution.objects.using(database()).filter(pk=execution_id).select_related("published_state")
    row = rows.only("status", *(f"published_state__{name}" for name in TOLD)).first()
    if row is None:
        return None
    children = children_of(execution_id) if row.status == ExecutionStatus.WAITING else None
    return state_of(row, getattr(row, "published_state", None), children)


def state_of(row: Execution, stored: PublishedState | None, children: ChildrenProgress | None) -> ExecutionState:
    """Return the same of what has been read.

    Raises:
        NewerFormat: A newer version stored what it has published.
    """
    status = ExecutionStatus(row.status)
    if stored is None:
        return ExecutionState(
            row.pk,
            status,
            done=None if children is None else children.done,
            total=None if children is None else children.total,
            children=children,
        )
    told = read_told(stored.done, stored.total, stored.note, stored.published)
    is_own = told.done is not None or children is None
    return ExecutionState(
        row.pk,
        status,
        done=told.done if is_own or children is None else children.done,
        total=told.total if is_own or children is None else children.total,
        note=told.note,
        published=told.published,
        children=children,
        updated_at=stored.updated_at,
    )


def children_of(execution_id: uuid.UUID) -> ChildrenProgress | None:
    """Return how far the children are for which an execution waits together."""
    waits = Step.objects.using(database()).filter(execution_id=execution_id, status=StepStatus.PENDING)
    found = waits.filter(total__isnull=False).values_list("name", "total", "remaining").first()
    return None if found is None else children_progress(*found)


def children_progress(step: str, total: int | None, remaining: int | None) -> ChildrenProgress:
    """Return how far the children of a step are."""
    return ChildrenProgress(step, (total or 0) - (remaining or 0), total or 0)


def stored_state(execution_id: uuid.UUID) -> PublishedState | None:
    """Return what an execution tells, as it is stored."""
    return PublishedState.objects.using(database()).filter(pk=execution_id).first()


def progress_of(row: Execution, stored: PublishedState | None, steps: Iterable[Step]) -> ExecutionState | None:
    """Return how far an execution is; ``None`` if that is not known.

    What it publishes is left out: whoever shows that shows the stored text, which may be damaged.

    Args:
        row: The execution.
        stored: What it tells.
        steps: Its steps, as far as they were read.
    """
    waits = [step for step in steps if step.status == StepStatus.PENDING and step.total is not None]
    children = None
    if waits and row.status == ExecutionStatus.WAITING:
        children = children_progress(waits[-1].name, waits[-1].total, waits[-1].remaining)
    if stored is not None:
        stored = PublishedState(
            done=stored.done, total=stored.total, note=stored.note, published="", updated_at=stored.updated_at
        )
    state = state_of(row, stored, children)
    return None if state.done is None else state


def counted(state: ExecutionState) -> str:
    """Return how far something is in words: ``3 of 10 (30%), row 3``."""
    text = f"{state.done:,}" if state.total is None else f"{state.done:,} of {state.total:,}"
    if state.fraction is not None:
        text += f" ({math.floor(state.fraction * 100)}%)"
    return f"{text}, {state.note}" if state.note else text


def progress_document(state: ExecutionState | None, *, with_note: bool = True) -> dict[str, Any] | None:
    """Return how far something is as plain data; ``None`` if that is not known."""
    if state is None:
        return None
    note = {"note": state.note} if with_note else {}
    return {"done": state.done, "total": state.total, **note, "updated_at": state.updated_at}
