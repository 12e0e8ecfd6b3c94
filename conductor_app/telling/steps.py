"""What an execution remembers, and what its children wait for."""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import Any

from django.db.models import Case, Count, F, IntegerField, Q, QuerySet, TextField, Value, When, Window
from django.db.models.functions import Coalesce, Length, RowNumber, Substr

from conductor_app.models import Execution, Step, database
from conductor_app.states import StepStatus
from conductor_app.telling.errors import ERROR_LENGTH, whole_failure

#: Most steps that are read: those that are pending, and the latest.
MOST_STEPS = 200
MOST_WAITS = 20


def read_steps(
    execution: Execution, children: list[uuid.UUID], preview: int | None, *, whole: bool
) -> tuple[list[Step], dict[uuid.UUID, list[Step]]]:
    """Return the execution's own steps, and its children's waits by execution."""
    value = Coalesce("result", F("child__result"), output_field=TextField())
    shown: Any = value if preview is None else Substr(value, 1, preview + 1)
    rows: QuerySet[Step, Any] = Step.objects.using(database()).filter(execution_id=execution.pk)
    if whole:
        steps = list(rows.annotate(value=shown, value_length=Length(value)).defer("result").order_by("id"))
        for step in steps:
            step.step_count = len(steps)
        return steps, {}
    is_own = Q(execution_id=execution.pk)
    by_execution: dict[str, Any] = {"partition_by": [F("execution_id")]}
    is_decided = Case(When(status=StepStatus.PENDING, then=0), default=1, output_field=IntegerField())
    rows = Step.objects.using(database()).filter(execution_id__in=[execution.pk, *children])
    drawn = (
        rows.annotate(
            value=Case(When(is_own, then=shown), default=Value(None), output_field=TextField()),
            value_length=Case(When(is_own, then=Length(value)), default=Value(None), output_field=IntegerField()),
            error_head=Substr("error", 1, ERROR_LENGTH),
            place=Window(RowNumber(), order_by=[is_decided, F("id").desc()], **by_execution),
            step_count=Window(Count("id"), **by_execution),
        )
        .filter(Q(place__lte=MOST_WAITS) | Q(is_own, place__lte=MOST_STEPS))
        .defer("result", "error")
        .order_by("id")
    )
    own: list[Step] = []
    waits: dict[uuid.UUID, list[Step]] = defaultdict(list)
    for step in drawn:
        step.error = whole_failure(step.error_head)
        (own if step.execution_id == execution.pk else waits[step.execution_id]).append(step)
    return own, waits
