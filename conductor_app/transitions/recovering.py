"""What the sweeper decides, when no run is there to do it."""

from __future__ import annotations

import uuid

from django.db import transaction
from django.db.models import F

from conductor_app import clock, dispatch, signals, steps
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    Failure,
    WorkerLost,
)
from conductor_app.models import Execution, Step, database
from conductor_app.serialization import dump_failure
from conductor_app.sql import locked
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.transitions import cancelling, failing, guards, statements, waking


def lose(execution_id: uuid.UUID, *, owner: str | None = None, failure: Failure | None = None) -> bool:
    """running → queued, failed or cancelled: the process that ran it is dead, or its lease has lapsed.

    A plain task that is not ``acks_late`` is never run twice by Celery, so it is failed here, too.

    Args:
        owner: The dead process; without one only a lapsed lease counts.
        failure: What fails it for good, such as a plain task's hard time limit, instead of the death alone.

    Returns:
        Whether it was lost; ``False`` if the run is alive, has ended, or another one has begun.
    """

    is_flagged: list[bool] = []

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.RUNNING)
            rows = rows.filter(lease_owner=owner) if owner else rows.filter(lease_expires_at__lt=clock.now())
            execution = locked(rows, skip=True).first()
            if execution is None:
                return False
            guards.send_signal(signals.execution_lost, execution)
            if execution.cancel_requested_at is not None:
                # Queued for a moment, and not claimable: its children are to be locked before it.
                guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
                is_flagged.append(True)
                return True
            cause = failure or _worker_lost(execution)
            used_up = not execution.has_attempts_left
            if failure is not None or used_up or not execution.runs_again:
                guards.leave_running(execution, **failing.failed_values(execution, cause))
                failing.store_failure(execution, cause)
                return True
            delay = 0.0 if execution.attempt == 1 else float(min(2 ** min(execution.attempt - 2, 10), 60))
            guards.leave_running(
                execution,
                status=ExecutionStatus.QUEUED,
                attempt=F("attempt") + 1,
                error=dump_failure(cause),
                due_at=clock.after(delay),
                dispatch_at=dispatch.first_instant(clock.after(delay), is_due=delay <= 0, root_id=execution.root_id),
                dispatches=0,
            )
            if delay <= 0:
                dispatch.on_commit(guards.next_attempt(execution))
            guards.send_signal(signals.execution_retrying, execution, failure=cause, delay=delay)
        return True

    lost = guards.persist_briefly(work)
    if is_flagged:
        cancelling.cancel_flagged(execution_id)
    return lost


def give_back(execution_id: uuid.UUID, owner: str) -> bool:
    """running → queued, at no cost of an attempt: a process that is dead had claimed it, and not begun its body.

    Returns:
        Whether the process still held it.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.RUNNING)
            execution = locked(rows.filter(lease_owner=owner), skip=True).first()
            if execution is None:
                return False
            guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
            dispatch.on_commit(execution)
        return True

    return guards.persist_briefly(work)


def _worker_lost(execution: Execution) -> Failure:
    of = "" if execution.max_attempts is None else f" of {execution.max_attempts}"
    message = (
        f"Worker died: {execution.lease_owner or 'unknown'} stopped while running attempt {execution.attempt}{of}."
    )
    if not execution.runs_again:
        message += " It is not run again: it is a plain Celery task without acks_late, and may have done its work."
    return Failure(type=f"{WorkerLost.__module__}.{WorkerLost.__qualname__}", message=message)


def decide_overdue(step: Step) -> bool:
    """Decide a pending step whose deadline has passed: a sleep ends well, anything else times out.

    Returns:
        ``False`` if the step was decided meanwhile.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            status = StepStatus.SUCCEEDED if step.kind == StepKind.SLEEP else StepStatus.TIMED_OUT
            if step.timeout_seconds is not None and step.on_timeout == OnTimeout.CANCEL:
                # The children's rows first, as everywhere. If one is just ending, this waits for its commit.
                _cancel_late(step)
            if not waking.settle(step.execution_id, step.name, status, only_overdue=True):
                transaction.set_rollback(True, using=database())
                return False
            if step.kind == StepKind.MAP:
                steps.note_late(step)
        return True

    return guards.persist_briefly(work)


def _cancel_late(step: Step) -> None:
    reason = f"its parent's timeout of {step.timeout_seconds:g}s ended"
    if step.kind == StepKind.MAP:
        children = steps.children_of(step.execution_id, step.name)
        waking.cancel_unstarted(children, reason)
        cancelling.flag_all(children, reason)
    elif step.child_id is not None:
        cancelling.flag(step.child_id, reason)


def take_for_dispatch(limit: int, queues: list[str] | None = None) -> list[Execution]:
    """queued → queued: take executions whose message is to be published, so that no other sweeper publishes it too.

    The next publish is due after ``REDISPATCH_SECONDS``, doubled with each one up to 32 times: a busy queue is not
    flooded with copies.
    """
    using = database()
    pause = conductor_settings().REDISPATCH_SECONDS

    def work() -> list[Execution]:
        if statements.are_at_hand():
            return statements.take_for_dispatch(limit, queues, pause)
        with transaction.atomic(using=using):
            rows = Execution.objects.using(using).to_dispatch()
            if queues is not None:
                rows = rows.filter(queue__in=queues)
            taken = list(locked(rows, skip=True).only(*statements.DISPATCH_FIELDS)[:limit])
            _load_payloads([row for row in taken if row.is_plain])
            for dispatches in {row.dispatches for row in taken}:
                Execution.objects.using(using).filter(
                    pk__in=[row.pk for row in taken if row.dispatches == dispatches], status=ExecutionStatus.QUEUED
                ).update(dispatch_at=clock.after(pause * 2 ** min(dispatches, 5)), dispatches=F("dispatches") + 1)
        return taken

    return guards.persist_briefly(work)


def _load_payloads(executions: list[Execution]) -> None:
    """Load what a plain task's message holds beside a doorbell's."""
    if not executions:
        return
    keys = [execution.pk for execution in executions]
    payloads = dict(Execution.objects.using(database()).filter(pk__in=keys).values_list("pk", "payload"))
    for execution in executions:
        execution.payload = payloads[execution.pk]


def put_back(executions: list[Execution], delay: float) -> None:
    """queued → queued: the broker has not taken their messages; publish them in ``delay`` seconds.

    It does not count as a publish: after an outage of the broker nobody waits longer for having waited long.
    """
    rows = Execution.objects.using(database()).filter(
        pk__in=[execution.pk for execution in executions], status=ExecutionStatus.QUEUED, dispatches__gt=0
    )
    guards.persist_briefly(lambda: rows.update(dispatch_at=clock.after(delay), dispatches=F("dispatches") - 1))


def wake_stranded(execution_id: uuid.UUID) -> bool:
    """waiting → queued for an execution that waits for nothing. It should never be needed; the caller reports it.

    A map that waits for children that it holds back itself lets some of them go instead.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            waiting = Execution.objects.using(database()).filter(pk=execution_id)
            is_stranded = waiting.waiting_for_nothing().exists()
            counted = [] if is_stranded else steps.in_vain(execution_id=execution_id)
            if not is_stranded and not counted:
                return False
            for name, error, outcome in steps.overlooked(execution_id):
                waking.settle(execution_id, name, outcome, error=error)
            for step in counted:
                _recount(step)
            if is_stranded:
                waking.wake(execution_id)
        return True

    return guards.persist_briefly(work)


def _recount(step: Step) -> None:
    """Count again what an undecided map or gather waits for, and decide it if that is nothing."""
    # The row's lock first: whatever child has not counted it down by now is seen below as open.
    if not locked(steps.of(step.execution_id, step.name).filter(status=StepStatus.PENDING)):
        return
    if step.kind == StepKind.GATHER:
        # Those of its members that had ended have just been settled, and counted it down.
        waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)
        return
    children = steps.children_of(step.execution_id, step.name)
    remaining = children.open().count()
    if not remaining:
        # Which of them failed, or are not there any more, the next run sees when it reads them.
        waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)
        return
    steps.set_remaining(step, remaining)
    waking.release_held(children, step.max_parallel)
