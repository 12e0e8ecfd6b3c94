"""An operator's retry."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

from django.db import transaction
from django.db.models import QuerySet

from conductor_app import signals
from conductor_app.exceptions import (
    RetryRefused,
)
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import CHILD_KINDS, ExecutionStatus, StepKind, StepStatus
from conductor_app.transitions import dispatch, guards, sending, steps
from conductor_app.values.payloads import loads

#: How often an operator's retry looks again at a tree that changes while it is reopened.
_REOPEN_TRIES = 5
#: How many children of a map are reopened in one statement.
_BATCH = 500
#: How many of them are published by whoever asks for the retry, often a web request; a sweeper publishes the others.
_PUBLISHED_AT_ONCE = 100

#: What calls itself for each level of a tree: it yields the calls, and ``_walk`` sends it what they return.
_Walk = Generator["_Walk", bool, bool]


def reopen(execution_id: uuid.UUID, before_commit: Callable[[Execution], None] | None = None) -> None:
    """failed, cancelled → queued or waiting: run again from what failed, keeping every finished step.

    cancelled → succeeded if its body had returned a result all the same: it is adopted, and the body does not run.

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
                raise _refuse_child(execution)
            _walk(_reopen(execution))
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


def _refuse_child(execution: Execution) -> RetryRefused:
    root = Execution.objects.using(database()).filter(pk=execution.root_id).only("status").first()
    seen = f"Execution {execution.pk} is a child, and its parent has already seen its outcome. "
    if root is None or root.status in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return RetryRefused(
            f"{seen}Retry the root {execution.root_id} instead: it runs again from what failed.",
            reason="a child, whose parent has seen the outcome: retry the root",
        )
    how = "has succeeded" if root.status == ExecutionStatus.SUCCEEDED else f"is {root.status}, and goes on"
    return RetryRefused(
        f"{seen}The root {root.pk} {how} without it, so there is nothing to retry. "
        "What the child was to do takes a new execution: call its task.",
        reason="a child, whose root goes on without it",
    )


class _ChangedMeanwhile(Exception):  # a signal to look again, no error
    """What was read without a lock has changed before it could be written."""


def _walk(first: _Walk) -> bool:
    """Run what calls itself, however deep the tree is: Python's own stack ends after some hundred levels."""
    calls: list[_Walk] = [first]
    answer: Any = None
    while calls:
        try:
            call = calls[-1].send(answer)
        except StopIteration as ended:
            calls.pop()
            answer = ended.value
        else:
            calls.append(call)
            answer = None
    return bool(answer)


def _reopen(execution: Execution, *, is_held: bool = False) -> _Walk:
    """Reopen one execution and what it failed on, the children first, as everywhere; tell whether it is open then.

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
            waits = (yield _reopen_map(step)) or waits
        elif step.kind in CHILD_KINDS:
            is_pending = yield _reopen_child(execution, step)
            # Nothing waits for a started child alone: the body runs, and gathers again.
            must_run = must_run or (is_pending and step.kind == StepKind.START)
            waits = waits or is_pending
        elif step.kind == StepKind.GATHER:
            steps.forget(step)
            must_run = True
        elif step.kind == StepKind.EVENT:
            steps.reopen(step)
            waits = not sending.deliver(step) or waits
        elif step.kind == StepKind.SLEEP:
            steps.resume_sleep(step)
            waits = True
        else:
            waits = waits or step.status == StepStatus.PENDING
    waits = waits and not must_run
    if execution.has_kept_result:
        _adopt_result(execution)
        return False
    FailedExecution.objects.using(database()).filter(pk=execution.pk).delete()
    values: dict[str, Any] = guards.NOT_QUEUED if waits else guards.queue_now(execution)
    if is_held and not waits:
        values = {"due_at": None, **guards.NOT_QUEUED}
    status = ExecutionStatus.WAITING if waits else ExecutionStatus.QUEUED
    _change(execution, status=status, **_ANEW, **values)
    if not waits and not is_held:
        execution.attempt = 1
        dispatch.on_commit(execution)
    return True


#: An operator asks for it now, so the caller's deadline for its start has lost its meaning.
_ANEW: dict[str, Any] = {"attempt": 1, "finished_at": None, "announce_at": None, "deadline_at": None}
_NOT_CANCELLED: dict[str, Any] = {"error": None, "cancel_requested_at": None, "cancel_reason": ""}


def _adopt_result(execution: Execution) -> None:
    """cancelled → succeeded, with the result that its body returned after its cancellation had been asked for.

    It ended then, and is told of as any execution that ends without a run.
    """
    _change(execution, status=ExecutionStatus.SUCCEEDED, announce_at=guards.announcement_instant(execution))
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)


def _change(execution: Execution, **values: Any) -> None:
    rows = Execution.objects.using(database()).filter(pk=execution.pk, status=execution.status, fence=execution.fence)
    if not rows.update(**_NOT_CANCELLED, **values):
        raise _ChangedMeanwhile


def _reopen_child(execution: Execution, step: Step) -> _Walk:
    """Reopen the child behind a step; tell whether there is something to wait for."""
    child = Execution.objects.using(database()).filter(pk=step.child_id).first() if step.child_id else None
    if child is None:
        raise RetryRefused(
            f"The child of step {step.name!r} of execution {execution.pk} has been deleted, and its outcome with it. "
            "Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    if child.status == ExecutionStatus.SUCCEEDED or not (yield _let_go_on(child)):
        steps.adopt(step)
        return False
    steps.reopen(step)
    return True


def _reopen_map(step: Step) -> _Walk:
    """Reopen the children of a map that have no result; tell whether there is something to wait for.

    There may be thousands, so those with nothing below them take some statements in all, and not some each.
    """
    children = steps.children_of(step.execution_id, step.name)
    if children.count() != step.total:
        raise RetryRefused(
            f"A child of step {step.name!r} of execution {step.execution_id} has been deleted, and its outcome with "
            "it. Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    without_success = list(children.exclude(status=ExecutionStatus.SUCCEEDED).order_by("position"))
    for child in without_success:
        if child.has_kept_result:
            yield _reopen(child)
    undone = [child for child in without_success if not child.has_kept_result]
    in_flight = sum(not child.is_final and child.due_at is not None for child in undone)
    ended_on_steps = _ended_on_steps(children)
    queued: list[Execution] = []
    held: list[Execution] = []
    for child in undone:
        is_held = child.is_final and step.max_parallel is not None and in_flight >= step.max_parallel
        in_flight += child.is_final and not is_held
        if child.pk in ended_on_steps:
            yield _let_go_on(child, is_held=is_held)
        elif child.is_final:
            (held if is_held else queued).append(child)
    _withdraw_cancel(*[child.pk for child in undone if not child.is_final])
    _queue_anew(queued)
    _change_all(held, due_at=None, **guards.NOT_QUEUED)
    if undone:
        steps.reopen(step, remaining=len(undone))
    else:
        steps.adopt(step)
    return bool(undone)


def _ended_on_steps(children: QuerySet[Execution]) -> set[uuid.UUID]:
    """Return which of ``children`` have ended and may have steps behind their end; see ``_blocking_steps``."""
    using = database()
    ended = children.exclude(status=ExecutionStatus.SUCCEEDED).filter(finished_at__isnull=False).order_by()
    failed = FailedExecution.objects.using(using).filter(execution__in=ended.values("pk")).exclude(step="")
    remembered = Step.objects.using(using).filter(
        execution__in=ended.filter(status=ExecutionStatus.CANCELLED).values("pk")
    )
    cancelled = remembered.exclude(status=StepStatus.SUCCEEDED).order_by()
    return {*failed.order_by().values_list("pk", flat=True), *cancelled.values_list("execution_id", flat=True)}


def _queue_anew(executions: list[Execution]) -> None:
    """failed, cancelled → queued, for children without steps behind their end."""
    published, others = executions[:_PUBLISHED_AT_ONCE], executions[_PUBLISHED_AT_ONCE:]
    if published:
        _change_all(published, **guards.queue_now(published[0]))
    if others:
        _change_all(others, **guards.queue_for_sweeper(others[0]))
    for execution in published:
        execution.attempt = 1
    dispatch.on_commit(*published)


def _change_all(executions: list[Execution], **values: Any) -> None:
    """Queue failed and cancelled siblings, each only if it is as it was read; see ``_change``."""
    rows = Execution.objects.using(database())
    for start in range(0, len(executions), _BATCH):
        alike: dict[tuple[Any, int], list[uuid.UUID]] = defaultdict(list)
        for execution in executions[start : start + _BATCH]:
            alike[execution.status, execution.fence].append(execution.pk)
        for (status, fence), ids in alike.items():
            FailedExecution.objects.using(database()).filter(pk__in=ids).delete()
            as_read = rows.filter(pk__in=ids, status=status, fence=fence)
            if as_read.update(**_NOT_CANCELLED, **_ANEW, **values, status=ExecutionStatus.QUEUED) != len(ids):
                raise _ChangedMeanwhile


def _let_go_on(child: Execution, *, is_held: bool = False) -> _Walk:
    """Let a child without a success go on; tell whether there is something to wait for."""
    if child.is_final:
        return (yield _reopen(child, is_held=is_held))
    _withdraw_cancel(child.pk)
    return True


def _withdraw_cancel(*execution_ids: uuid.UUID) -> None:
    """Let open executions go on, and lock their rows, so that their ends find the step that is reopened for them.

    Raises:
        _ChangedMeanwhile: One of them has ended.
    """
    for start in range(0, len(execution_ids), _BATCH):
        ids = execution_ids[start : start + _BATCH]
        open_row = Execution.objects.using(database()).filter(pk__in=ids).open()
        if open_row.update(cancel_requested_at=None, cancel_reason="") != len(ids):
            raise _ChangedMeanwhile


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
        if step.finished_at is None
        or (execution.finished_at and step.finished_at >= execution.finished_at)
        # It was decided just before the execution, and by nothing but its end.
        or (step.status == StepStatus.CANCELLED and step.kind in (StepKind.SLEEP, StepKind.EVENT))
    ]


def _with_gather(step: Step) -> list[Step]:
    """Return a failing step, and if a gather raised its failure, that and the others that it would meet again."""
    # Not `step.group`, which a router may read from a replica.
    gather = Step.objects.using(database()).filter(pk=step.group_id).first() if step.group_id else None
    if gather is None or gather.status == StepStatus.PENDING:
        return [step]
    members = Step.objects.using(database()).filter(execution_id=step.execution_id, name__in=loads(gather.result))
    undone = members.exclude(status__in=[StepStatus.PENDING, StepStatus.SUCCEEDED])
    return [gather, *undone]
