"""An operator's retry."""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from conductor_app import signals
from conductor_app.exceptions import (
    RetryRefused,
)
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import FINAL_STATUSES, ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.opened import snapshot_level
from conductor_app.transitions import dispatch, guards, kinds, parts, uniqueness
from conductor_app.transitions.kinds import Next, Walk
from conductor_app.values.payloads import loads
from conductor_app.values.texts import shown

#: How often an operator's retry looks again at a tree that changes while it is reopened.
_REOPEN_TRIES = 5
#: How many children of a map are reopened in one statement.
_BATCH = 500
#: How many of them are published by whoever asks for the retry, often a web request; a sweeper publishes the others.
_PUBLISHED_AT_ONCE = 100


def reopen(execution_id: uuid.UUID, before_commit: Callable[[Execution], None] | None = None) -> None:
    """failed, cancelled → queued or waiting: run again from what failed, keeping every finished step.

    cancelled → succeeded if its body had returned a result all the same: it is adopted, and the body does not run.

    Walks down the failed invocations to the executions whose own failure is behind it, queues those, and lets their
    ancestors wait for them, so that results flow back up.

    Args:
        before_commit: Called while the row is locked, so that nobody can end the execution before it returns.

    Raises:
        RetryRefused: It is not failed or cancelled, its parent has already seen the outcome, or another open execution
            has the unique key of one that is to run again.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            execution = Execution.objects.using(database()).get(pk=execution_id)
            if execution.is_held:
                raise RetryRefused(
                    f"Execution {execution_id} is {guards.why_held(execution)}. Release it: it goes on, and need not "
                    "be retried.",
                    reason="held: release it",
                )
            if execution.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
                raise RetryRefused(
                    f"Execution {execution_id} is {execution.status}. Only a failed or cancelled one can be retried.",
                    reason="not failed or cancelled",
                    is_elsewhere=True,
                )
            if execution.parent_id is not None:
                raise _refuse_child(execution)
            _walk(reopen_one(execution))
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


def _walk(first: Walk) -> bool:
    """Run what calls itself, however deep the tree is: Python's own stack ends after some hundred levels."""
    calls: list[Walk] = [first]
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


def reopen_one(execution: Execution, *, is_held: bool = False) -> Walk:
    """Reopen one execution and what it failed on, the children first, as everywhere; tell whether it is open then.

    Rows are read without a lock and written by compare-and-set.

    Args:
        execution: A failed or cancelled execution.
        is_held: Whether it has to wait for a place in its map.

    Raises:
        _ChangedMeanwhile: One of them has changed in between.
    """
    says: set[Next] = set()
    for step in blocking_steps(execution):
        says.add((yield kinds.of(step.kind).reopen(execution, step)))
    waits = Next.WAIT in says and Next.RUN not in says
    if execution.has_kept_result:
        _adopt_result(execution)
        return False
    FailedExecution.objects.using(database()).filter(pk=execution.pk).delete()
    values: dict[str, Any] = parts.NOT_QUEUED if waits else guards.queue_now(execution)
    if is_held and not waits:
        values = {"due_at": None, **parts.NOT_QUEUED}
    status = ExecutionStatus.WAITING if waits else ExecutionStatus.QUEUED
    _change(execution, status=status, **_ANEW, **_time_anew(execution), **values)
    if not waits and not is_held:
        execution.attempt = 1
        dispatch.on_commit(execution)
    return True


#: An operator asks for it now, so the caller's deadline for its start has lost its meaning.
#: A hold that it was cancelled under is over, too.
_ANEW: dict[str, Any] = {
    "attempt": 1,
    "finished_at": None,
    "announce_at": None,
    "deadline_at": None,
    **parts.RELEASED,
}
_NOT_CANCELLED: dict[str, Any] = {"error": None, "cancel_requested_at": None, "cancel_reason": ""}


def _time_anew(execution: Execution) -> dict[str, Any]:
    """Return the deadline of a tree that is retried: as much time as its task gives. The caller's own is forgotten."""
    if execution.tree_deadline_at is None:
        return {}
    seconds = execution.max_duration
    return {"tree_deadline_at": None if seconds is None else clock.after(seconds)}


def _adopt_result(execution: Execution) -> None:
    """cancelled → succeeded, with the result that its body returned after its cancellation had been asked for.

    It ended then, and is told of as any execution that ends without a run.
    """
    _change(execution, status=ExecutionStatus.SUCCEEDED, announce_at=guards.announcement_instant(execution))
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)


def _change(execution: Execution, **values: Any) -> None:
    rows = Execution.objects.using(database()).filter(pk=execution.pk, status=execution.status, fence=execution.fence)
    with _taking(execution, execution.own_key if values["status"] not in FINAL_STATUSES else None) as key:
        if not rows.update(**_NOT_CANCELLED, **key, **values):
            raise _ChangedMeanwhile


@contextlib.contextmanager
def _taking(execution: Execution, key: str | None) -> Iterator[dict[str, Any]]:
    """Let an execution take its unique key again, with what is written of it.

    Raises:
        RetryRefused: Another open one has it.
    """
    if key is None:
        yield {}
        return
    try:
        with transaction.atomic(using=database()):
            yield {"unique_key": key}
    except IntegrityError:
        holder = uniqueness.holder_of(execution.task, key)
        if holder is None and not snapshot_level(database()):  # it has just ended
            raise _ChangedMeanwhile from None
        who = "another open execution" if holder is None else f"execution {holder.pk} by now, which is {holder.status}"
        raise RetryRefused(
            f"The unique key {shown(key)} of execution {execution.pk} belongs to {who}. Wait for its end or cancel it, "
            "and retry then.",
            reason="its unique key belongs to another execution",
            holder_id=None if holder is None else holder.pk,
        ) from None


def ended_on_steps(children: QuerySet[Execution]) -> set[uuid.UUID]:
    """Return which of ``children`` have ended and may have steps behind their end; see ``blocking_steps``."""
    using = database()
    ended = children.exclude(status=ExecutionStatus.SUCCEEDED).filter(finished_at__isnull=False).order_by()
    failed = FailedExecution.objects.using(using).filter(execution__in=ended.values("pk")).exclude(step="")
    remembered = Step.objects.using(using).filter(
        execution__in=ended.filter(status=ExecutionStatus.CANCELLED).values("pk")
    )
    cancelled = remembered.exclude(status=StepStatus.SUCCEEDED).order_by()
    return {*failed.order_by().values_list("pk", flat=True), *cancelled.values_list("execution_id", flat=True)}


def queue_anew(executions: list[Execution]) -> None:
    """failed, cancelled → queued, for children without steps behind their end."""
    published, others = executions[:_PUBLISHED_AT_ONCE], executions[_PUBLISHED_AT_ONCE:]
    if published:
        change_all(published, **guards.queue_now(published[0]))
    if others:
        change_all(others, **guards.queue_for_sweeper(others[0]))
    for execution in published:
        execution.attempt = 1
    dispatch.on_commit(*published)


def change_all(executions: list[Execution], **values: Any) -> None:
    """Queue failed and cancelled siblings, each only if it is as it was read; see ``_change``."""
    rows = Execution.objects.using(database())
    for start in range(0, len(executions), _BATCH):
        alike: dict[tuple[Any, int, str | None], list[Execution]] = defaultdict(list)
        for execution in executions[start : start + _BATCH]:
            alike[execution.status, execution.fence, execution.own_key].append(execution)
        for (status, fence, key), same in alike.items():
            ids = [execution.pk for execution in same]
            FailedExecution.objects.using(database()).filter(pk__in=ids).delete()
            as_read = rows.filter(pk__in=ids, status=status, fence=fence)
            with _taking(same[0], key) as own:
                changed = as_read.update(**_NOT_CANCELLED, **_ANEW, **own, **values, status=ExecutionStatus.QUEUED)
            if changed != len(ids):
                raise _ChangedMeanwhile


def let_go_on(child: Execution, *, is_held: bool = False) -> Walk:
    """Let a child without a success go on; tell whether there is something to wait for."""
    if child.is_final:
        return (yield reopen_one(child, is_held=is_held))
    withdraw_cancel(child.pk)
    return True


def withdraw_cancel(*execution_ids: uuid.UUID) -> None:
    """Let open executions go on, and lock their rows, so that their ends find the step that is reopened for them.

    Raises:
        _ChangedMeanwhile: One of them has ended.
    """
    for start in range(0, len(execution_ids), _BATCH):
        ids = execution_ids[start : start + _BATCH]
        open_row = Execution.objects.using(database()).filter(pk__in=ids).open()
        if open_row.update(cancel_requested_at=None, cancel_reason="") != len(ids):
            raise _ChangedMeanwhile


def blocking_steps(execution: Execution) -> list[Step]:
    """Return the steps on which an execution ended: a failed one's failing step, a cancelled one's open ones.

    A child's failure that the body caught is no reason for the end, and stays as it is remembered. So does what was
    copied from another execution: the child behind it is not this one's.
    """
    remembered = Step.objects.using(database()).filter(execution_id=execution.pk, fence__gt=0)
    if execution.status == ExecutionStatus.FAILED:
        failure = FailedExecution.objects.using(database()).filter(pk=execution.pk).first()
        failing = list(remembered.filter(name=failure.step)) if failure is not None and failure.step else []
        return [found for step in failing for found in _with_groups(step)]
    return [
        step
        for step in remembered.exclude(status=StepStatus.SUCCEEDED)
        if step.finished_at is None
        or (execution.finished_at and step.finished_at >= execution.finished_at)
        # It was decided just before the execution, and by nothing but its end.
        or (step.status == StepStatus.CANCELLED and kinds.of(step.kind).ends_with_execution)
    ]


def _with_groups(step: Step) -> list[Step]:
    """Return a failing step, and what has waited for it beside others and is not to be remembered any more.

    The latest of these has raised its failure; what else has failed of that, the next run would meet again.
    """
    remembered = Step.objects.using(database()).filter(execution_id=step.execution_id, fence__gt=0)
    decided = remembered.filter(kind__in=kinds.those(lambda kind: kind.has_members)).exclude(status=StepStatus.PENDING)
    groups = [group for group in decided.order_by("id") if group.pk == step.pk or _rests_on(group, step)]
    if not groups:
        return [step]
    undone = remembered.exclude(status__in=[StepStatus.PENDING, StepStatus.SUCCEEDED])
    return [*groups, *undone.filter(name__in=loads(groups[-1].result))]


def _rests_on(group: Step, step: Step) -> bool:
    """Tell whether a failure of ``step`` is a part of what has decided ``group``."""
    is_chosen = group.counted is not None and group.status == StepStatus.SUCCEEDED
    return step.name in (group.counted_names if is_chosen else loads(group.result))
