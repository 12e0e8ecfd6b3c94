"""An operator's retry."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from django.db import transaction

from conductor_app import dispatch, steps
from conductor_app.exceptions import (
    RetryRefused,
)
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.serialization import loads
from conductor_app.states import CHILD_KINDS, ExecutionStatus, StepKind, StepStatus
from conductor_app.transitions import guards, sending

#: How often an operator's retry looks again at a tree that changes while it is reopened.
_REOPEN_TRIES = 5


def reopen(execution_id: uuid.UUID, before_commit: Callable[[Execution], None] | None = None) -> None:
    """failed, cancelled → queued or waiting: run again from what failed, keeping every finished step.

    Walks down the failed invocations to the executions whose own failure is behind it, queues those, and lets their
    ancestors wait for them, so that results flow back up.

    Args:
        before_commit: Called while the row is locked, so that nobody can end the execution before it returns.

    Raises:
        RetryRefused: It is not failed or cancelled, or its parent has already seen the outcome.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            execution = Execution.objects.using(database()).get(pk=execution_id)
            if execution.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
                raise RetryRefused(
                    f"Execution {execution_id} is {execution.status}. Only a failed or cancelled one can be retried.",
                    reason="not failed or cancelled",
                    is_elsewhere=True,
                )
            if execution.parent_id is not None:
                raise RetryRefused(
                    f"Execution {execution_id} is a child, and its parent has already seen its outcome. "
                    f"Retry the root {execution.root_id} instead: it runs again from what failed.",
                    reason="a child, whose parent has seen the outcome: retry the root",
                )
            _reopen(execution)
            if before_commit is not None:
                before_commit(execution)

    for _ in range(_REOPEN_TRIES):
        try:
            return guards.persist_briefly(work)
        except _ChangedMeanwhile:
            continue
    raise RetryRefused(
        f"Execution {execution_id} is just being changed by somebody else. Look at it again.",
        reason="just being changed by somebody else",
    )


class _ChangedMeanwhile(Exception):  # a signal to look again, no error
    """What was read without a lock has changed before it could be written."""


def _reopen(execution: Execution, *, is_held: bool = False) -> None:
    """Reopen one execution and what it failed on, the children first, as everywhere.

    Rows are read without a lock and written by compare-and-set.

    Args:
        execution: A failed or cancelled execution.
        is_held: Whether it has to wait for a place in its map.

    Raises:
        _ChangedMeanwhile: One of them has changed in between.
    """
    waits = False
    must_run = False
    for step in _blocking_steps(execution):
        if step.kind == StepKind.MAP:
            waits = _reopen_map(step) or waits
        elif step.kind in CHILD_KINDS:
            is_pending = _reopen_child(execution, step)
            # Nothing waits for a started child alone: the body runs, and gathers again.
            must_run = must_run or (is_pending and step.kind == StepKind.START)
            waits = waits or is_pending
        elif step.kind == StepKind.GATHER:
            steps.forget(step)
            must_run = True
        elif step.kind == StepKind.EVENT:
            steps.reopen(step)
            waits = not sending.deliver(step) or waits
        else:
            waits = waits or step.status == StepStatus.PENDING
    waits = waits and not must_run
    FailedExecution.objects.using(database()).filter(pk=execution.pk).delete()
    values: dict[str, Any] = guards.NOT_QUEUED if waits else guards.queue_now(execution)
    if is_held and not waits:
        values = {"due_at": None, **guards.NOT_QUEUED}
    changed = (
        Execution.objects.using(database())
        .filter(pk=execution.pk, status=execution.status, fence=execution.fence)
        .update(
            status=ExecutionStatus.WAITING if waits else ExecutionStatus.QUEUED,
            attempt=1,
            error=None,
            finished_at=None,
            announce_at=None,
            # An operator asks for it now: the caller's deadline for its start has lost its meaning.
            deadline_at=None,
            cancel_requested_at=None,
            cancel_reason="",
            **values,
        )
    )
    if not changed:
        raise _ChangedMeanwhile
    if not waits and not is_held:
        execution.attempt = 1
        dispatch.on_commit(execution)


def _reopen_child(execution: Execution, step: Step) -> bool:
    """Reopen the child behind a step; tell whether there is something to wait for."""
    child = Execution.objects.using(database()).filter(pk=step.child_id).first() if step.child_id else None
    if child is None:
        raise RetryRefused(
            f"The child of step {step.name!r} of execution {execution.pk} has been deleted, and its outcome with it. "
            "Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    if child.status == ExecutionStatus.SUCCEEDED:
        steps.adopt(step)
        return False
    _let_go_on(child)
    steps.reopen(step)
    return True


def _reopen_map(step: Step) -> bool:
    """Reopen the children of a map that have no result; tell whether there is something to wait for."""
    children = steps.children_of(step.execution_id, step.name)
    if children.count() != step.total:
        raise RetryRefused(
            f"A child of step {step.name!r} of execution {step.execution_id} has been deleted, and its outcome with "
            "it. Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    undone = list(children.exclude(status=ExecutionStatus.SUCCEEDED).order_by("position"))
    in_flight = sum(not child.is_final and child.due_at is not None for child in undone)
    for child in undone:
        is_held = child.is_final and step.max_parallel is not None and in_flight >= step.max_parallel
        in_flight += child.is_final and not is_held
        _let_go_on(child, is_held=is_held)
    if undone:
        steps.reopen(step, remaining=len(undone))
    else:
        steps.adopt(step)
    return bool(undone)


def _let_go_on(child: Execution, *, is_held: bool = False) -> None:
    if child.is_final:
        _reopen(child, is_held=is_held)
    elif not _withdraw_cancel(child.pk):
        raise _ChangedMeanwhile


def _withdraw_cancel(execution_id: uuid.UUID) -> bool:
    """Let an open execution go on, and lock its row, so that its end finds the step that is reopened for it."""
    open_row = Execution.objects.using(database()).filter(pk=execution_id).open()
    return bool(open_row.update(cancel_requested_at=None, cancel_reason=""))


def _blocking_steps(execution: Execution) -> list[Step]:
    """Return the steps on which an execution ended: a failed one's failing step, a cancelled one's open ones.

    A child's failure that the body caught is no reason for the end, and stays as it is remembered.
    """
    remembered = Step.objects.using(database()).filter(execution_id=execution.pk)
    if execution.status == ExecutionStatus.FAILED:
        failure = FailedExecution.objects.using(database()).filter(pk=execution.pk).first()
        failing = list(remembered.filter(name=failure.step)) if failure is not None and failure.step else []
        return [found for step in failing for found in _with_gather(step)]
    return [
        step
        for step in remembered.exclude(status=StepStatus.SUCCEEDED)
        if step.finished_at is None or (execution.finished_at and step.finished_at >= execution.finished_at)
    ]


def _with_gather(step: Step) -> list[Step]:
    """Return a failing step, and if a gather raised its failure, that and the others that it would meet again."""
    gather = step.group
    if gather is None or gather.status == StepStatus.PENDING:
        return [step]
    members = Step.objects.using(database()).filter(execution_id=step.execution_id, name__in=loads(gather.result))
    undone = members.exclude(status__in=[StepStatus.PENDING, StepStatus.SUCCEEDED])
    return [gather, *undone]
