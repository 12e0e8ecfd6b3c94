"""The runs of an execution and of its children, as they are told of."""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import Any

from django.db.models import F, Q, Window
from django.db.models.functions import RowNumber, Substr

from conductor_app.models import Attempt, Execution, database
from conductor_app.states import FAILED_RUNS
from conductor_app.telling.words import seconds_between

#: Most runs that are read of the execution, and of each of its children: the latest.
MOST_ATTEMPTS = 100
MOST_OF_CHILD = 20
#: Characters of a message and of a traceback that are read, unless all is.
MESSAGE_LENGTH, TRACEBACK_LENGTH = 500, 20_000


def read_attempts(
    execution: Execution, children: list[uuid.UUID], *, whole: bool
) -> tuple[list[Attempt], dict[uuid.UUID, list[Attempt]]]:
    """Return the runs of an execution that have ended, and those of its children by execution, in their order."""
    rows = Attempt.objects.using(database())
    if whole:
        return list(rows.filter(execution_id=execution.pk).order_by("run", "id")), {}
    order: Any = F("run").desc()
    drawn = (
        rows.filter(execution_id__in=[execution.pk, *children])
        .annotate(
            place=Window(RowNumber(), partition_by=[F("execution_id")], order_by=[order]),
            message_head=Substr("message", 1, MESSAGE_LENGTH),
            traceback_head=Substr("traceback", 1, TRACEBACK_LENGTH),
        )
        .filter(Q(place__lte=MOST_OF_CHILD) | Q(execution_id=execution.pk, place__lte=MOST_ATTEMPTS))
        .defer("message", "traceback")
        .order_by("run", "id")
    )
    own: list[Attempt] = []
    others: dict[uuid.UUID, list[Attempt]] = defaultdict(list)
    for row in drawn:
        row.message, row.traceback = row.message_head, row.traceback_head
        (own if row.execution_id == execution.pk else others[row.execution_id]).append(row)
    return own, others


def queue_seconds(attempt: Attempt) -> float:
    """Return how long nobody claimed the execution although that was due."""
    return seconds_between(attempt.due_at, attempt.started_at)


def run_seconds(attempt: Attempt) -> float:
    """Return how long the run took."""
    return seconds_between(attempt.started_at, attempt.finished_at)


def has_failed(attempt: Attempt) -> bool:
    """Tell whether a run has an error that its execution had to answer for."""
    return attempt.outcome in FAILED_RUNS
