"""Every move of an execution from one status to the next. The only writer of ``Execution`` and ``FailedExecution``.

Each move is a guarded compare-and-set: it names the status (and, for a run, the fence) that it expects, and the loser
of a race changes nothing. What belongs together is one transaction: a final status and the parent's wake-up, a failure
and its ``FailedExecution``, a suspension and the child that is waited for. Messages and signals follow the commit.

Locks are taken child before parent, everywhere, so two moves cannot wait for each other.
"""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import IntegrityError, transaction
from django.db.models import Case, F, Value, When
from django.db.models.expressions import Combinable
from django.db.models.functions import Coalesce
from django.dispatch import Signal

from conductor_app import clock, dispatch, signals, steps
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    Failure,
    LeaseLost,
    RetryRefused,
    WorkerLost,
)
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.serialization import clean_text, dump_failure
from conductor_app.sql import locked, persist, persist_briefly, update_returning
from conductor_app.states import FINAL_STATUSES, ExecutionStatus, OnTimeout, StepKind, StepStatus

T = TypeVar("T")

#: What a run needs to know of the execution that it claims; steps are read separately, and only if there can be any.
CLAIM_FIELDS = (
    "id",
    "task",
    "queue",
    "priority",
    "payload",
    "status",
    "attempt",
    "max_attempts",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "fence",
    "lease_owner",
    "options",
    "created_at",
    "started_at",
)

#: How often an operator's retry looks again at a tree that changes while it is reopened.
_REOPEN_TRIES = 5

_NO_LEASE: dict[str, Any] = {"lease_owner": "", "lease_expires_at": None}
_NOT_QUEUED: dict[str, Any] = {"dispatch_at": None, "dispatches": 0}


@dataclass(frozen=True)
class NewExecution:
    """An execution that is about to be stored; all of it is checked already."""

    id: uuid.UUID
    task: str
    queue: str
    #: ``[args, kwargs]`` as stored text.
    payload: str
    max_attempts: int | None
    priority: int | None = None
    options: str = ""
    #: Seconds until it may be claimed.
    countdown: float = 0
    #: Instead of ``countdown``: the instant at which it may be claimed.
    eta: dt.datetime | None = None
    #: Seconds, or the instant, after which it must not start any more.
    expires: float | dt.datetime | None = None
    idempotency_key: str | None = None


# --------------------------------------------------------------------------------------------------------------- create


def create(new: NewExecution) -> tuple[Execution, bool]:
    """Store a root execution as queued, in the current transaction if there is one.

    Returns:
        The execution, and whether it is new: the same id or idempotency key gives the existing one.
    """
    using = database()
    row = _queued_row(new)
    try:
        # A savepoint only where a conflict is possible: it keeps the caller's transaction usable.
        with transaction.atomic(using=using):
            row.save(force_insert=True, using=using)
            if row.dispatch_at is not None and _is_due(new):
                dispatch.on_commit(row)
            _announce(signals.execution_created, row)
    except IntegrityError:
        existing = _find_existing(new)
        if existing is None:
            raise
        return existing, False
    return row, True


def _find_existing(new: NewExecution) -> Execution | None:
    rows = Execution.objects.using(database())
    found = rows.filter(pk=new.id).first()
    if found is None and new.idempotency_key is not None:
        found = rows.filter(task=new.task, idempotency_key=new.idempotency_key).first()
    return found


def _is_due(new: NewExecution) -> bool:
    return new.eta is None and new.countdown <= 0


def _queued_row(new: NewExecution, parent: Execution | None = None, step: str = "") -> Execution:
    due: Any = clock.after(max(new.countdown, 0)) if new.eta is None else new.eta
    expires: Any = clock.after(new.expires) if isinstance(new.expires, (int, float)) else new.expires
    return Execution(
        id=new.id,
        task=new.task,
        queue=new.queue,
        priority=new.priority,
        payload=new.payload,
        status=ExecutionStatus.QUEUED,
        max_attempts=new.max_attempts,
        parent_id=None if parent is None else parent.pk,
        root_id=new.id if parent is None else parent.root_id,
        depth=0 if parent is None else parent.depth + 1,
        step=step,
        due_at=due,
        deadline_at=expires,
        dispatch_at=dispatch.first_instant(
            due, is_due=_is_due(new), root_id=None if parent is None else parent.root_id
        ),
        idempotency_key=new.idempotency_key,
        options=new.options,
        created_at=clock.now(),
    )


# ---------------------------------------------------------------------------------------------------------------- claim


def claim(execution_id: uuid.UUID, owner: str, task: str | None = None) -> Execution | None:
    """queued → running: take the lease for one run.

    Args:
        task: The task that a message names; a forged one may name another than the execution's.

    Returns:
        The execution with its new fence, or ``None``: it is not there, not due, cancelled, or another run has it.
    """
    named = Execution.objects.using(database()).filter(pk=execution_id)
    if task is not None:
        named = named.filter(task=task)
    rows = update_returning(
        named.claimable(),
        CLAIM_FIELDS,
        status=ExecutionStatus.RUNNING,
        fence=F("fence") + 1,
        lease_owner=owner,
        lease_expires_at=clock.after(conductor_settings().LEASE_SECONDS),
        started_at=Coalesce("started_at", clock.now()),
        **_NOT_QUEUED,
    )
    if not rows:
        return None
    _announce(signals.execution_started, rows[0])
    return rows[0]


def release(execution: Execution) -> None:
    """running → queued: the worker shuts down and gives the execution back; no attempt is used up."""

    def work() -> None:
        _leave_running(execution, status=ExecutionStatus.QUEUED, **_queue_now())
        dispatch.on_commit(execution)

    _persist(work)


# ---------------------------------------------------------------------------------------------- while a body is running


def record_step(
    execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None
) -> steps.Memory:
    """Remember the outcome of a function, once, and return what is remembered.

    Raises:
        LeaseLost: Another run has taken over; nothing is recorded.
        CancelExecution: The execution is to be cancelled; the outcome is recorded all the same.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            cancelled = lock_held(execution)
            steps.record(execution, name, result=result, failure=failure)
        return cancelled

    try:
        cancelled = _persist(work)
    except IntegrityError:
        # Recorded already: by this run, whose COMMIT got no answer. What is stored counts.
        return patiently(lambda: steps.recall(execution.pk, name))[name]
    if cancelled:
        raise CancelExecution
    return steps.Memory(
        name=name,
        kind=StepKind.STEP,
        status=StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED,
        task="",
        payload_digest="",
        child_id=None,
        timeout_seconds=None,
        result=result,
        error=None if failure is None else dump_failure(failure),
        fence=execution.fence,
    )


def lock_held(execution: Execution) -> bool:
    """Lock the row of a running execution until the end of the current transaction.

    Returns:
        Whether it is to be cancelled.

    Raises:
        LeaseLost: Another run has taken over.
    """
    held = Execution.objects.using(database()).held_by(execution.pk, execution.fence)
    flags = list(locked(held).values_list("cancel_requested_at", flat=True))
    if not flags:
        raise _lost(execution)
    return flags[0] is not None


def check_held(execution: Execution) -> None:
    """Raise if the run has no right to go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
    """

    def work() -> list[Any]:
        held = Execution.objects.using(database()).held_by(execution.pk, execution.fence)
        return list(held.values_list("cancel_requested_at", flat=True))

    flags = _persist(work)
    if not flags:
        raise _lost(execution)
    if flags[0] is not None:
        raise CancelExecution


# -------------------------------------------------------------------------------------------------------------- suspend


@dataclass(frozen=True)
class Invocation:
    """A child that does not exist yet, and how long its parent waits for it."""

    step: str
    child: NewExecution
    payload_digest: str
    timeout: float | None
    on_timeout: OnTimeout


@dataclass(frozen=True)
class Sleep:
    """A sleep that has not begun yet."""

    step: str
    seconds: float | None = None
    until: dt.datetime | None = None


@dataclass(frozen=True)
class Pending:
    """A step that an earlier run opened and that was undecided when this one read it."""

    step: str


Wait = Invocation | Sleep | Pending


def suspend(execution: Execution, wait: Wait, before_commit: Callable[[], None] | None = None) -> bool:
    """running → waiting, after the body has unwound; stores the child that is waited for.

    Args:
        before_commit: Called while the row is locked, so that nobody can resume the execution before it returns.

    Returns:
        ``False`` if the step was decided meanwhile: the execution is still running, and its body can go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            _leave_running(execution, status=ExecutionStatus.WAITING, cancel_requested=False, **_NOT_QUEUED)
            if isinstance(wait, Pending):
                # A new statement, after this row was written: whoever settles the step writes this row too, so either
                # that commit is visible here, or it will find this execution waiting.
                if not steps.is_pending(execution.pk, wait.step):
                    transaction.set_rollback(True, using=database())
                    return False
            elif isinstance(wait, Sleep):
                until: Any = clock.after(wait.seconds) if wait.seconds is not None else wait.until
                steps.open_sleep(execution, wait.step, until)
            else:
                _open_child(execution, wait)
            if before_commit is not None:
                before_commit()
            _announce(signals.execution_suspended, execution, step=wait.step)
        return True

    return _persist(work)


def _open_child(execution: Execution, wait: Invocation) -> None:
    child = _queued_row(wait.child, execution, wait.step)
    child.save(force_insert=True, using=database())
    steps.open_invocation(
        execution,
        wait.step,
        child,
        payload_digest=wait.payload_digest,
        timeout=wait.timeout,
        on_timeout=wait.on_timeout,
    )
    if _is_due(wait.child):
        dispatch.on_commit(child)
    _announce(signals.execution_created, child)


def _settle_parent(child: Execution, status: StepStatus, *, error: str | None = None) -> None:
    """Hand a child's outcome to its parent, in the transaction that decides it."""
    if child.parent_id is not None and steps.settle(child.parent_id, child.step, status, error=error):
        _wake(child.parent_id, child.root_id)


def _wake(execution_id: uuid.UUID, root_id: uuid.UUID | None = None) -> None:
    """waiting → queued. Writes the row whatever its status.

    The unconditional write takes the row's lock. A parent that is just suspending either commits first, and is found
    waiting here, or blocks on this write, and then sees the settled step. With ``WHERE status = 'waiting'`` neither
    would wait for the other, and the wake-up would be lost.
    """
    waiting = When(status=ExecutionStatus.WAITING, then=Value(ExecutionStatus.QUEUED.value))
    rows = update_returning(
        Execution.objects.using(database()).filter(pk=execution_id),
        (*dispatch.DOORBELL_FIELDS, "status"),
        due_at=_if_waiting(clock.now(), "due_at"),
        dispatch_at=_if_waiting(dispatch.first_instant(clock.now(), is_due=True, root_id=root_id), "dispatch_at"),
        # Last: MySQL assigns from left to right, and the conditions above are about the old status.
        status=Case(waiting, default=F("status")),
    )
    for row in rows:
        # Queued by this write or already before it: a second ring of the bell is harmless.
        if row.status == ExecutionStatus.QUEUED:
            dispatch.on_commit(row)


def _if_waiting(value: Combinable, column: str) -> Case:
    return Case(When(status=ExecutionStatus.WAITING, then=value), default=F(column))


# --------------------------------------------------------------------------------------------------------- end of a run


def succeed(execution: Execution, result: str) -> None:
    """running → succeeded, with the stored result; wakes the parent.

    Raises:
        LeaseLost: Another run has taken over; the result is discarded.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            _leave_running(
                execution,
                status=ExecutionStatus.SUCCEEDED,
                result=result,
                error=None,
                finished_at=clock.now(),
                announce_at=_announcement(execution, running=True),
            )
            _settle_parent(execution, StepStatus.SUCCEEDED)
            _announce(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)

    _persist(work, unless_already=functools.partial(_is_mine, execution, ExecutionStatus.SUCCEEDED))


def retry_later(execution: Execution, failure: Failure, delay: float) -> None:
    """running → queued: the attempt failed, the next one is due in ``delay`` seconds.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled instead.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            _leave_running(
                execution,
                status=ExecutionStatus.QUEUED,
                cancel_requested=False,
                attempt=F("attempt") + 1,
                error=dump_failure(failure),
                due_at=clock.after(delay),
                dispatch_at=dispatch.first_instant(clock.after(delay), is_due=delay <= 0),
                dispatches=0,
            )
            if delay <= 0:
                dispatch.on_commit(execution)
            _announce(signals.execution_retrying, execution, failure=failure, delay=delay)

    _persist(work)


def fail(execution: Execution, failure: Failure, *, step: str = "", child_id: uuid.UUID | None = None) -> None:
    """running → failed, with its ``FailedExecution``; wakes the parent.

    Args:
        step: The step at which it failed, if the failure is a child's.
        child_id: That child.

    Raises:
        LeaseLost: Another run has taken over.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            _leave_running(execution, **_failed_values(execution, failure, running=True))
            _store_failure(execution, failure, step=step, child_id=child_id)

    _persist(work, unless_already=functools.partial(_is_mine, execution, ExecutionStatus.FAILED))


def cancel_running(execution: Execution) -> Failure | None:
    """running → cancelled: the body has noticed that it was asked to stop.

    Returns:
        What is stored as its error; ``None`` if an operator's retry has withdrawn the cancellation meanwhile: then the
        execution is queued again.

    Raises:
        LeaseLost: Another run has taken over.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            _flag_children(execution.pk)
            held = locked(Execution.objects.using(database()).held_by(execution.pk, execution.fence))
            row = held.only("cancel_requested_at", "cancel_reason").first()
            if row is None:
                raise _lost(execution)
            if row.cancel_requested_at is None:
                transaction.set_rollback(True, using=database())
                return False
            execution.cancel_reason = row.cancel_reason
            _leave_running(execution, **_cancelled_values(execution, running=True))
            _after_cancel(execution)
        return True

    if _persist(work):
        return _cancel_failure(execution)
    release(execution)
    return None


# ----------------------------------------------------------------------------------------------- decided by the sweeper


def lose(execution_id: uuid.UUID, *, owner: str | None = None) -> bool:
    """running → queued, failed or cancelled: the process that ran it is dead, or its lease has lapsed.

    Args:
        owner: The dead process; without one only a lapsed lease counts.

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
            if execution.cancel_requested_at is not None:
                # Queued for a moment, and not claimable: its children are to be locked before it.
                _leave_running(execution, status=ExecutionStatus.QUEUED, **_queue_now())
                is_flagged.append(True)
                return True
            failure = Failure(
                type=f"{WorkerLost.__module__}.{WorkerLost.__qualname__}",
                message=f"Worker died: {execution.lease_owner or 'unknown'} stopped while running attempt "
                f"{execution.attempt}{_of(execution.max_attempts)}.",
            )
            if execution.max_attempts is not None and execution.attempt >= execution.max_attempts:
                _leave_running(execution, **_failed_values(execution, failure))
                _store_failure(execution, failure)
                return True
            delay = 0.0 if execution.attempt == 1 else float(min(2 ** min(execution.attempt - 2, 10), 60))
            _leave_running(
                execution,
                status=ExecutionStatus.QUEUED,
                attempt=F("attempt") + 1,
                error=dump_failure(failure),
                due_at=clock.after(delay),
                dispatch_at=dispatch.first_instant(clock.after(delay), is_due=delay <= 0),
                dispatches=0,
            )
            if delay <= 0:
                dispatch.on_commit(execution)
            _announce(signals.execution_retrying, execution, failure=failure, delay=delay)
        return True

    lost = _persist_briefly(work)
    if is_flagged:
        cancel_flagged(execution_id)
    return lost


def _of(max_attempts: int | None) -> str:
    return "" if max_attempts is None else f" of {max_attempts}"


def decide_overdue(step: Step) -> bool:
    """Decide a pending step whose deadline has passed: a sleep ends well, an invocation times out.

    Returns:
        ``False`` if the step was decided meanwhile.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            if step.kind == StepKind.SLEEP:
                status, error = StepStatus.SUCCEEDED, None
            else:
                status = StepStatus.TIMED_OUT
                error = None
                if step.child_id is not None and step.on_timeout == OnTimeout.CANCEL:
                    # The child's row first, as everywhere. If the child is just ending, this waits for its commit.
                    _flag(step.child_id, f"its parent's timeout of {step.timeout_seconds:g}s ended")
            if not steps.settle(step.execution_id, step.name, status, error=error, only_overdue=True):
                transaction.set_rollback(True, using=database())
                return False
            _wake(step.execution_id)
        return True

    return _persist_briefly(work)


def take_for_dispatch(limit: int, queues: list[str] | None = None) -> list[Execution]:
    """queued → queued: take executions whose message is to be published, so that no other sweeper publishes it too.

    The next publish is due after ``REDISPATCH_SECONDS``, doubled with each one up to 32 times: a busy queue is not
    flooded with copies.
    """
    using = database()
    pause = conductor_settings().REDISPATCH_SECONDS

    def work() -> list[Execution]:
        with transaction.atomic(using=using):
            rows = Execution.objects.using(using).to_dispatch()
            if queues is not None:
                rows = rows.filter(queue__in=queues)
            taken = list(locked(rows, skip=True).only(*dispatch.DOORBELL_FIELDS, "dispatches")[:limit])
            for dispatches in {row.dispatches for row in taken}:
                Execution.objects.using(using).filter(
                    pk__in=[row.pk for row in taken if row.dispatches == dispatches], status=ExecutionStatus.QUEUED
                ).update(dispatch_at=clock.after(pause * 2 ** min(dispatches, 5)), dispatches=F("dispatches") + 1)
        return taken

    return _persist_briefly(work)


def put_back(executions: list[Execution], delay: float) -> None:
    """queued → queued: the broker has not taken their messages; publish them in ``delay`` seconds.

    It does not count as a publish: after an outage of the broker nobody waits longer for having waited long.
    """
    rows = Execution.objects.using(database()).filter(
        pk__in=[execution.pk for execution in executions], status=ExecutionStatus.QUEUED, dispatches__gt=0
    )
    _persist_briefly(lambda: rows.update(dispatch_at=clock.after(delay), dispatches=F("dispatches") - 1))


def wake_stranded(execution_id: uuid.UUID) -> bool:
    """waiting → queued for an execution that waits for nothing. It should never be needed; the caller reports it."""

    def work() -> bool:
        with transaction.atomic(using=database()):
            stranded = Execution.objects.using(database()).filter(pk=execution_id).waiting_for_nothing()
            if not stranded.exists():
                return False
            for name, error, outcome in steps.overlooked(execution_id):
                steps.settle(execution_id, name, outcome, error=error)
            _wake(execution_id)
        return True

    return _persist_briefly(work)


# --------------------------------------------------------------------------------------------------------------- cancel


def request_cancel(execution_id: uuid.UUID, reason: str) -> bool:
    """Flag an open execution; ``False`` if it is final. A running body notices at its next ``ctx`` call."""
    return _persist_briefly(lambda: _flag(execution_id, reason) or _is_flagged(execution_id))


def _flag(execution_id: uuid.UUID, reason: str) -> bool:
    return bool(
        Execution.objects.using(database())
        .filter(pk=execution_id, cancel_requested_at__isnull=True)
        .open()
        .update(cancel_requested_at=clock.now(), cancel_reason=clean_text(reason, 1_000))
    )


def _is_flagged(execution_id: uuid.UUID) -> bool:
    rows = Execution.objects.using(database()).filter(pk=execution_id, cancel_requested_at__isnull=False)
    return rows.open().exists()


def _flag_children(execution_id: uuid.UUID) -> None:
    """Flag the open children of an execution that is about to be cancelled, and that runs no body any more.

    Before its own row is locked: a child that is just ending holds its own row and then asks for its parent's.
    """
    children = Execution.objects.using(database()).filter(parent_id=execution_id, cancel_requested_at__isnull=True)
    children.open().update(cancel_requested_at=clock.now(), cancel_reason="its parent was cancelled")


def cancel_flagged(execution_id: uuid.UUID) -> bool:
    """queued, waiting → cancelled, if it was flagged; flags its open children and wakes its parent.

    Returns:
        Whether this call cancelled it.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id).to_cancel()
            if not rows.exists():
                return False
            _flag_children(execution_id)
            execution = locked(rows).first()
            if execution is None or not rows.update(**_cancelled_values(execution)):
                transaction.set_rollback(True, using=database())
                return False
            _after_cancel(execution)
        return True

    return _persist_briefly(work)


def expire(execution_id: uuid.UUID) -> bool:
    """queued → cancelled: Celery's ``expires`` has passed and it was never started."""

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id).expired()
            execution = locked(rows).first()
            if execution is None:
                return False
            execution.cancel_reason = "it expired before it started"
            if not rows.update(**_cancelled_values(execution), cancel_reason=execution.cancel_reason):
                return False
            _after_cancel(execution)
        return True

    return _persist_briefly(work)


def _cancelled_values(execution: Execution, *, running: bool = False) -> dict[str, Any]:
    return {
        "status": ExecutionStatus.CANCELLED,
        "error": _cancel_error(execution),
        "finished_at": clock.now(),
        "announce_at": _announcement(execution, running=running),
        **_NOT_QUEUED,
    }


def _cancel_failure(execution: Execution) -> Failure:
    message = f"Cancelled: {execution.cancel_reason}" if execution.cancel_reason else "Cancelled"
    return Failure(type="Cancelled", message=message)


def _cancel_error(execution: Execution) -> str:
    return dump_failure(_cancel_failure(execution))


def _after_cancel(execution: Execution) -> None:
    _settle_parent(execution, StepStatus.CANCELLED, error=_cancel_error(execution))
    _announce(signals.execution_finished, execution, status=ExecutionStatus.CANCELLED)


# -------------------------------------------------------------------------------------------------- an operator's retry


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
                    f"Execution {execution_id} is {execution.status}. Only a failed or cancelled one can be retried."
                )
            if execution.parent_id is not None:
                raise RetryRefused(
                    f"Execution {execution_id} is a child, and its parent has already seen its outcome. "
                    f"Retry the root {execution.root_id} instead: it runs again from what failed."
                )
            _reopen(execution)
            if before_commit is not None:
                before_commit(execution)

    for _ in range(_REOPEN_TRIES):
        try:
            return _persist_briefly(work)
        except _ChangedMeanwhile:
            continue
    raise RetryRefused(f"Execution {execution_id} is just being changed by somebody else. Look at it again.")


class _ChangedMeanwhile(Exception):  # a signal to look again, no error
    """What was read without a lock has changed before it could be written."""


def _reopen(execution: Execution) -> None:
    """Reopen one execution and what it failed on, the children first, as everywhere.

    Rows are read without a lock and written by compare-and-set.

    Raises:
        _ChangedMeanwhile: One of them has changed in between.
    """
    waits = False
    for step in _blocking_steps(execution):
        if step.kind != StepKind.INVOKE:
            waits = waits or step.status == StepStatus.PENDING
            continue
        child = Execution.objects.using(database()).filter(pk=step.child_id).first() if step.child_id else None
        if child is None:
            raise RetryRefused(
                f"The child of step {step.name!r} of execution {execution.pk} has been deleted, and its outcome with "
                "it. Start a new execution instead."
            )
        if child.status == ExecutionStatus.SUCCEEDED:
            steps.adopt(step)
            continue
        if child.status in FINAL_STATUSES:
            _reopen(child)
        elif not _withdraw_cancel(child.pk):
            raise _ChangedMeanwhile
        steps.reopen(step)
        waits = True
    FailedExecution.objects.using(database()).filter(pk=execution.pk).delete()
    values: dict[str, Any] = _NOT_QUEUED if waits else _queue_now()
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
    if not waits:
        dispatch.on_commit(execution)


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
        return list(remembered.filter(name=failure.step)) if failure is not None and failure.step else []
    return [
        step
        for step in remembered.exclude(status=StepStatus.SUCCEEDED)
        if step.finished_at is None or (execution.finished_at and step.finished_at >= execution.finished_at)
    ]


# -------------------------------------------------------------------------------------------------------- announcements


def announced(execution_id: uuid.UUID) -> bool:
    """Note that Celery has been told of a final status; ``False`` if that is noted already, or it was reopened."""
    untold = Execution.objects.using(database()).filter(pk=execution_id, announce_at__isnull=False)
    return bool(_persist_briefly(lambda: untold.update(announce_at=None)))


def announce_now(execution_id: uuid.UUID) -> bool:
    """Let the sweeper tell Celery of a final status now: the process that was to do it is dead."""
    untold = Execution.objects.using(database()).filter(pk=execution_id, announce_at__isnull=False)
    return bool(_persist_briefly(lambda: untold.update(announce_at=clock.now())))


def take_for_announcement(limit: int) -> list[Execution]:
    """Take final executions of which Celery is to be told, so that no other sweeper tells it too."""

    def work() -> list[Execution]:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).to_announce()
            taken = list(locked(rows, skip=True)[:limit])
            Execution.objects.using(database()).filter(pk__in=[row.pk for row in taken]).update(
                announce_at=clock.after(conductor_settings().LEASE_SECONDS)
            )
        return taken

    return _persist_briefly(work)


def _announcement(execution: Execution, *, running: bool = False) -> Combinable | None:
    """Return when the sweeper is to tell Celery of the end; a run does it itself, unless it dies before it can."""
    options = execution.get_options()
    if not options.get("announce"):
        return None
    if running and not dispatch.is_left_to_sweeper(options):
        return clock.after(conductor_settings().LEASE_SECONDS)
    return clock.now()


# -------------------------------------------------------------------------------------------------------------- helpers


def patiently(read: Callable[[], T]) -> T:
    """Run a read as often as it takes while the database is away.

    Raises:
        AbandonRun: The database was away for a whole lease.
    """
    return _persist(read)


def _persist(work: Callable[[], T], unless_already: Callable[[], bool] | None = None) -> T:
    """Run a transaction until the database has taken it.

    Args:
        unless_already: Tells, when the guard has refused, whether an earlier try has in fact been committed and only
            its answer was lost.
    """
    try:
        return persist(database(), work, patience=conductor_settings().LEASE_SECONDS)
    except LeaseLost:
        if unless_already is not None and patiently(unless_already):
            return None  # type: ignore[return-value]
        raise


def _persist_briefly(work: Callable[[], T]) -> T:
    """Run a transaction on which no lease depends; while the database is away, that is the caller's to know."""
    return persist_briefly(database(), work)


def _is_mine(execution: Execution, status: ExecutionStatus) -> bool:
    return Execution.objects.using(database()).filter(pk=execution.pk, fence=execution.fence, status=status).exists()


def _leave_running(execution: Execution, *, cancel_requested: bool = True, **values: Any) -> None:
    """Take a running execution out of ``running``, if this run still holds it.

    Args:
        cancel_requested: Whether the move is allowed for an execution that is to be cancelled.
    """
    held = Execution.objects.using(database()).held_by(execution.pk, execution.fence)
    guarded = held if cancel_requested else held.filter(cancel_requested_at__isnull=True)
    if guarded.update(**{**_NO_LEASE, **values}):
        return
    if not cancel_requested and held.exists():
        raise CancelExecution
    raise _lost(execution)


def _lost(execution: Execution) -> LeaseLost:
    return LeaseLost(
        f"The lease of execution {execution.pk} (fence {execution.fence}) is lost: another run took over, or it was "
        "ended from outside. This run can write no more; side effects need ctx.idempotency_key() to be safe."
    )


def _queue_now() -> dict[str, Any]:
    return {
        "due_at": clock.now(),
        "dispatch_at": dispatch.first_instant(clock.now(), is_due=True),
        "dispatches": 0,
    }


def _failed_values(execution: Execution, failure: Failure, *, running: bool = False) -> dict[str, Any]:
    return {
        "status": ExecutionStatus.FAILED,
        "error": dump_failure(failure),
        "finished_at": clock.now(),
        "announce_at": _announcement(execution, running=running),
    }


def _store_failure(
    execution: Execution, failure: Failure, *, step: str = "", child_id: uuid.UUID | None = None
) -> None:
    root_cause = None
    if child_id is not None:
        deeper = FailedExecution.objects.using(database()).filter(pk=child_id).values_list("root_cause_id", flat=True)
        root_cause = next(iter(deeper), None) or child_id
    FailedExecution.objects.using(database()).create(
        execution_id=execution.pk,
        task=execution.task,
        attempts=execution.attempt,
        error_class=clean_text(failure.type, 255),
        message=failure.message,
        traceback=failure.traceback,
        step=step,
        root_cause_id=root_cause,
        failed_at=clock.now(),
    )
    _settle_parent(execution, StepStatus.FAILED)
    _announce(signals.execution_finished, execution, status=ExecutionStatus.FAILED)


def _announce(signal: Signal, execution: Execution, **details: Any) -> None:
    """Send ``signal`` after the commit."""
    if signal.has_listeners(execution.task):
        transaction.on_commit(
            lambda: signal.send_robust(sender=execution.task, execution=execution, **details), using=database()
        )
