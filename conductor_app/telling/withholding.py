"""What is taken out of rows that were read, for somebody who may not be told of it."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping

from django.db.models import QuerySet

from conductor_app.exceptions import Failure
from conductor_app.models import Attempt, Execution, FailedExecution, Step
from conductor_app.values.failures import dump_failure, load_failure


def withhold(
    executions: Iterable[Execution],
    steps: Iterable[Step] = (),
    failures: Iterable[FailedExecution] = (),
    attempts: Iterable[Attempt] = (),
) -> None:
    """Leave of the errors in rows that were read their classes alone."""
    rows: list[Execution | Step] = [*executions, *steps]
    for row in rows:
        if row.error:
            row.error = dump_failure(Failure(type=load_failure(row.error).type, message=""))
    told: list[FailedExecution | Attempt] = [*failures, *attempts]
    for failure in told:
        failure.message = failure.traceback = ""


def as_seen(
    seen: QuerySet[Execution],
    execution: Execution,
    own: FailedExecution | None,
    steps: Collection[Step],
    tree: Mapping[uuid.UUID, Execution],
) -> dict[uuid.UUID, Execution]:
    """Return the executions that may be told of, and take the ids of the others from the rows; one query."""
    cause = own.root_cause_id if own is not None else None
    named = (execution.parent_id, execution.root_id, cause, *(step.child_id for step in steps))
    keys = {*tree, *(key for key in named if key is not None)}
    found = set(seen.filter(pk__in=keys).values_list("pk", flat=True)) | {execution.pk}
    if own is not None and cause not in found:
        own.root_cause_id = None
    for step in steps:
        if step.child_id not in found:
            step.child_id = None
    if execution.parent_id not in found:
        execution.parent_id = None
    if execution.root_id not in found:
        execution.root_id = execution.pk
    return {key: row for key, row in tree.items() if key in found}
