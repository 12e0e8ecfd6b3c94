"""The unique key of an execution: whether it has it, and who has it instead."""

from __future__ import annotations

import uuid
from typing import Any

from django.db.models import QuerySet

from conductor_app.models import Execution, database


def holder_of_key(execution: Execution, seen: QuerySet[Execution] | None = None) -> uuid.UUID | None:
    """Return the open execution that has the unique key which this one was given: itself, another one, or nobody.

    No query for one that has it, or was given none.

    Args:
        execution: Which one.
        seen: The executions that may be told of beside it; ``None`` are all.
    """
    if execution.unique_key is not None:
        return execution.pk
    try:
        key = execution.own_key
    except (ValueError, RecursionError):  # damaged options
        return None
    if key is None:
        return None
    rows: Any = Execution.objects.using(database()) if seen is None else seen
    holder: uuid.UUID | None = (
        rows.order_by().filter(unique_key=key, task=execution.task).values_list("pk", flat=True).first()
    )
    return holder


def shown_key(execution: Execution) -> str | None:
    """Return the unique key that an execution was given."""
    try:
        key: str | None = execution.own_key
    except (ValueError, RecursionError):
        key = execution.unique_key
    return key


def conceal_predecessor(execution: Execution, seen: QuerySet[Execution] | None) -> None:
    """Take from a row in memory the execution that it waits for, unless that may be told of."""
    predecessor = execution.predecessor
    if seen is not None and predecessor is not None and not seen.order_by().filter(pk=predecessor).exists():
        execution.predecessor = None
