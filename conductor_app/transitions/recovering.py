"""What the sweeper decides, when no run is there to do it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from django.db import transaction
from django.db.models import F, QuerySet

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    Failure,
    WorkerLost,
    class_path,
)
from conductor_app.models import Execution, Step, database
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import LATE_REASON, ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store import clock, owners
from conductor_app.store.locks import locked
from conductor_app.transitions import cancelling, dispatch, failing, guards, statements, steps, waking
from conductor_app.values.failures import dump_failure


def lose(
    execution_id: uuid.UUID,
    *,
    owner: str | None = None,
    failure: Failure | None = None,
    ended_by: Failure | None = None,
) -> bool:
    """running → queued, failed or cancelled: the process that ran it is dead, or its lease has lapsed.

    A plain task that is not ``acks_late`` is never run twice by Celery, so it is failed here, too.

    Args:
        owner: The dead process; without one only a lapsed lease counts.
        failure: What fails it for good, such as a plain task's hard time limit, instead of the death alone.
        ended_by: What its body raised to end the process, if the process can still tell.

    Returns:
        Whether it was lost; ``False`` if the run is alive, has ended, or another one has begun.
    """

    is_flagged: list[bool] = []

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.RUNNING)
            rows = rows.filter(lease_owner=owner) if owner else rows.filter(lease_expires_at__lt=clock.now())
            execution = guards.take(rows)
            if execution is None:
                return False
            guards.send_signal(signals.execution_lost, execution)
            if execution.cancel_requested_at is not None:
                # Queued for a moment, and not claimable: its children are to be locked before it.
                guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
                is_flagged.append(True)
                return True
            cause = failure or worker_lost(execution, ended_by)
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

    guards.leave_if_locked(execution_id)
    lost = guards.persist_briefly(work)
    if is_flagged:
        cancelling.cancel_flagged(execution_id)
    return lost


def wait_for_row(execution_id: uuid.UUID) -> None:
    """Wait until nobody has locked an execution's row; in the background, as long as that waits for rows.

    Raises:
        RowsLocked: Somebody still has.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            locked(Execution.objects.using(database()).filter(pk=execution_id)).values_list("pk").first()

    guards.leave_if_locked(execution_id)
    guards.persist_briefly(work)


def give_back(execution_id: uuid.UUID, owner: str) -> bool:
    """running → queued, at no cost of an attempt: a process that is dead had claimed it, and not begun its body.

    Returns:
        Whether the process still held it.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.RUNNING)
            execution = guards.take(rows.filter(lease_owner=owner))
            if execution is None:
                return False
            guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
            dispatch.on_commit(execution)
        return True

    return guards.persist_briefly(work)


def worker_lost(execution: Execution, ended_by: Failure | None = None) -> Failure:
    """Return the failure of an attempt whose process has died; ``ended_by`` is what its body raised to that end."""
    of = "" if execution.max_attempts is None else f" of {execution.max_attempts}"
    why = "" if ended_by is None else f": its body raised {ended_by.type.rpartition('.')[2]} ({ended_by.message})"
    owner = owners.shown(execution.lease_owner) or "unknown"
    message = f"Worker died: {owner} stopped while running attempt {execution.attempt}{of}{why}."
    if not execution.runs_again:
        message += " It is not run again: it is a plain Celery task without acks_late, and may have done its work."
    return Failure(
        type=class_path(WorkerLost),
        message=message,
        traceback="" if ended_by is None else ended_by.traceback,
    )


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

    guards.leave_if_locked(step.execution_id, with_children=step.kind == StepKind.MAP)
    if step.child_id is not None and _cancels_child(step):
        guards.leave_if_locked(step.child_id)
    return guards.persist_briefly(work)


def decide_overdue_together(overdue: Sequence[Step]) -> set[int]:
    """Decide those of ``overdue`` that wake their execution and that nobody has locked, in one transaction.

    It waits for no row. So the order of its locks does not matter, and of a step whose execution or whose child is
    locked it writes nothing: ``decide_overdue`` decides the others.

    Returns:
        The keys of the steps that it has decided.
    """
    using = database()
    simple = [step for step in overdue if step.kind in _WAKES]

    def work() -> set[int]:
        executions = Execution.objects.using(using)
        with transaction.atomic(using=using):
            free = _lock_free(executions.filter(pk__in={step.execution_id for step in simple}))
            pending = _lock_free(steps.overdue_rows().filter(pk__in=[step.pk for step in simple]))
            found = [step for step in simple if step.execution_id in free and step.pk in pending]
            # A child that is just ending has locked its row, and settles the step itself.
            children = _lock_free(executions.filter(pk__in=[step.child_id for step in found if _cancels_child(step)]))
            decided = [step for step in found if not _cancels_child(step) or step.child_id in children]
            late: dict[str, list[Any]] = {}
            for step in decided:
                if _cancels_child(step):
                    late.setdefault(_late(step), []).append(step.child_id)
            for reason, keys in late.items():
                cancelling.flag_all(executions.filter(pk__in=keys), reason)
            steps.settle_overdue([step.pk for step in decided])
            waking.wake_all([step.execution_id for step in decided])
        return {step.pk for step in decided}

    return guards.persist_briefly(work, skips_locked=True) if simple else set()


#: Kinds of steps whose end always wakes their execution, and nobody else.
_WAKES = {StepKind.SLEEP, StepKind.EVENT, StepKind.INVOKE}


def _lock_free(rows: QuerySet[Any]) -> set[Any]:
    return set(locked(rows, skip=True).values_list("pk", flat=True))


def _cancels_child(step: Step) -> bool:
    return step.kind != StepKind.MAP and step.child_id is not None and step.on_timeout == OnTimeout.CANCEL


def _late(step: Step) -> str:
    return f"{LATE_REASON}{step.timeout_seconds:g}s ended"


def _cancel_late(step: Step) -> None:
    reason = _late(step)
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

    return guards.persist_briefly(work, skips_locked=True)


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
    using = database()
    rows = Execution.objects.using(using).filter(
        pk__in=[execution.pk for execution in executions], status=ExecutionStatus.QUEUED, dispatches__gt=0
    )

    def work() -> None:
        with transaction.atomic(using=using):
            # One that somebody has locked meanwhile keeps the instant that it was taken with.
            free = list(locked(rows, skip=True).values_list("pk", flat=True))
            Execution.objects.using(using).filter(pk__in=free).update(
                dispatch_at=clock.after(delay), dispatches=F("dispatches") - 1
            )

    guards.persist_briefly(work, skips_locked=True)


def dispatch_now(execution_id: uuid.UUID) -> bool:
    """queued → queued: a process died with the execution's message before it claimed it; the next sweep publishes it.

    Once: a message that kills each process that takes it is published again at the usual pace.

    Returns:
        Whether it is to be published.
    """
    rows = Execution.objects.using(database()).filter(pk=execution_id, dispatches__lte=int(dispatch.is_embedded()))
    return bool(guards.persist_briefly(lambda: rows.claimable().update(dispatch_at=clock.now())))


def note_refusal(execution_id: uuid.UUID, failure: Failure) -> bool:
    """queued → queued: note that a worker could not read the execution's message, unless it has failed before.

    Returns:
        Whether it was noted now.
    """
    rows = Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.QUEUED, error=None)
    return bool(guards.persist_briefly(lambda: rows.update(error=dump_failure(failure))))


def wake_stranded(execution_id: uuid.UUID) -> bool:
    """waiting → queued for an execution that waits for nothing. It should never be needed; the caller reports it.

    A map that waits for children that it holds back itself lets some of them go instead.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            waiting = Execution.objects.using(database()).filter(pk=execution_id)
            is_stranded = waiting_for_nothing(waiting).exists()
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

    guards.leave_if_locked(execution_id)
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
    if not remaining and step.total is not None and children.count() < step.total:
        waking.settle(step.execution_id, step.name, StepStatus.CANCELLED, error=steps.deleted_error())
        return
    if not remaining:
        # Which of them failed, the next run sees when it reads them.
        waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)
        return
    steps.set_remaining(step, remaining)
    waking.release_held(children, step.max_parallel)
