"""The failures from an execution down to its root cause."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from django.db.models import Case, F, TextField, Value, When
from django.db.models.functions import Substr

from conductor_app.models import Execution, FailedExecution, database
from conductor_app.states import ExecutionStatus
from conductor_app.telling.errors import ERROR_LENGTH, head_of_failure
from conductor_app.telling.tree import ancestry


@dataclass(frozen=True)
class Cause:
    """One failure of the chain from an execution down to its root cause."""

    execution_id: uuid.UUID
    task: str
    #: The step at which it failed, if another failure is behind it.
    step: str
    error_class: str
    message: str
    traceback: str
    attempts: int
    failed_at: dt.datetime | None


def read_failures(
    execution: Execution, own: FailedExecution | None, tree: Mapping[uuid.UUID, Execution], *, whole: bool
) -> dict[uuid.UUID, FailedExecution]:
    """Return the failures from an execution to its root cause by id; of those between them only what is shown."""
    if own is None or execution.status != ExecutionStatus.FAILED:
        return {}
    keys = _between(execution, own, tree)
    if not keys:
        return {own.pk: own}
    cause = own.root_cause_id
    below = FailedExecution.objects.using(database()).filter(pk__in=keys)
    if whole:
        return {own.pk: own, **below.in_bulk()}
    shown = below.defer("message", "traceback").annotate(
        message_head=Substr("message", 1, ERROR_LENGTH),
        trace=Case(When(pk=cause, then=F("traceback")), default=Value(""), output_field=TextField()),
    )
    found = {own.pk: own}
    for failure in shown:
        failure.message, failure.traceback = failure.message_head, failure.trace
        found[failure.pk] = failure
    return found


def causes(
    execution: Execution,
    own: FailedExecution | None,
    failures: Mapping[uuid.UUID, FailedExecution],
    tree: Mapping[uuid.UUID, Execution],
) -> Iterator[Cause]:
    """Yield the failures from an execution down to its root cause."""
    if own is None or own.pk not in failures:
        return
    for key in [execution.pk, *_between(execution, own, tree)]:
        failure, row = failures.get(key), tree.get(key)
        if failure is not None:
            yield Cause(
                execution_id=key,
                task=failure.task,
                step=failure.step,
                error_class=failure.error_class,
                message=failure.message,
                traceback=failure.traceback,
                attempts=failure.attempts,
                failed_at=failure.failed_at,
            )
        elif row is not None and row.error:
            # An operator's retry of the child, or a hand, has taken its failure away; or it has timed out.
            told = head_of_failure(row.error)
            yield Cause(key, row.task, "", told.type, told.message, "", row.attempt, row.finished_at)


def _between(execution: Execution, own: FailedExecution, tree: Mapping[uuid.UUID, Execution]) -> list[uuid.UUID]:
    """Return the ids below an execution on the way to its root cause, from the highest to the lowest."""
    if own.root_cause_id is None:
        return []
    cause = tree.get(own.root_cause_id)
    if cause is None:
        return [own.root_cause_id]
    path = [row.pk for row in ancestry(cause, tree)]
    return path[: path.index(execution.pk)][::-1] if execution.pk in path else [cause.pk]
