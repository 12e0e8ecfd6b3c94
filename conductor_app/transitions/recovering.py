"""What the sweeper decides, when no run is there to do it."""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from collections.abc import Sequence
from typing import Any

from django.db import transaction
from django.db.models import Case, DateTimeField, F, Q, QuerySet, TextField, Value, When
from django.db.models.functions import Least

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    Failure,
    WorkerLost,
    class_path,
)
from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import IS_PAUSED, PARKED_AT
from conductor_app.states import ExecutionStatus, OnTimeout, RunOutcome
from conductor_app.store import clock, owners
from conductor_app.store.locks import locked
from conductor_app.store.moves import Lock, Move, Update
from conductor_app.store.slots import NOW, later
from conductor_app.transitions import cancelling, dispatch, failing, guards, kinds, parts, pausing, steps, waking
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
                values = guards.queue_now(execution)
                cause = worker_lost(execution, ended_by)
                guards.leave_running(execution, RunOutcome.LOST, cause, status=ExecutionStatus.QUEUED, **values)
                is_flagged.append(True)
                return True
            cause = failure or worker_lost(execution, ended_by)
            used_up = not execution.has_attempts_left
            if failure is not None or used_up or not execution.runs_again:
                outcome = RunOutcome.LOST if failure is None else RunOutcome.FAILED
                guards.leave_running(execution, outcome, cause, **failing.failed_values(execution, cause))
                failing.store_failure(execution, cause)
                return True
            delay = 0.0 if execution.attempt == 1 else float(min(2 ** min(execution.attempt - 2, 10), 60))
            guards.leave_running(
                execution,
                RunOutcome.LOST,
                cause,
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
            values = guards.queue_now(execution)
            guards.leave_running(execution, RunOutcome.RELEASED, status=ExecutionStatus.QUEUED, **values)
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
    """Decide a pending step whose deadline has passed: see ``Kind.when_overdue``.

    Returns:
        ``False`` if the step was decided meanwhile.
    """
    kind = kinds.of(step.kind)

    def work() -> bool:
        with transaction.atomic(using=database()):
            if step.timeout_seconds is not None and step.on_timeout == OnTimeout.CANCEL:
                # The children's rows first, as everywhere. If one is just ending, this waits for its commit.
                kind.cancel_late(step)
            if not waking.settle(step.execution_id, step.name, kind.when_overdue, only_overdue=True):
                transaction.set_rollback(True, using=database())
                return False
            kind.note_late(step)
        return True

    guards.leave_if_locked(step.execution_id, with_children=kind.has_children)
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
    simple = [step for step in overdue if kinds.of(step.kind).wakes_alone]

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
                    late.setdefault(steps.late_reason(step), []).append(step.child_id)
            for reason, keys in late.items():
                cancelling.flag_all(executions.filter(pk__in=keys), reason)
            steps.settle_overdue([step.pk for step in decided])
            waking.wake_all([step.execution_id for step in decided])
        return {step.pk for step in decided}

    return guards.persist_briefly(work, skips_locked=True) if simple else set()


def _lock_free(rows: QuerySet[Any]) -> set[Any]:
    return set(locked(rows, skip=True).values_list("pk", flat=True))


def _cancels_child(step: Step) -> bool:
    return kinds.of(step.kind).has_child and step.child_id is not None and step.on_timeout == OnTimeout.CANCEL


#: What a message says, and what tells a first publication from another one; as it was before this one. In the order of
#: the model's fields. A durable task's message needs no payload.
_DISPATCHED = tuple(
    field.attname
    for field in Execution._meta.concrete_fields
    if field.attname in (*dispatch.DOORBELL_FIELDS, "payload", "dispatches", "due_at", "dispatch_at")
)


@functools.lru_cache(maxsize=64)
def _taking(queues: tuple[str, ...] | None) -> Move:
    """Return the move that takes executions of these queues, or of all, for publication."""
    due = Q(status=ExecutionStatus.QUEUED.value, dispatch_at__lte=NOW)
    payload = Case(When(options__contains='"plain"', then=F("payload")), default=Value(""), output_field=TextField())
    is_paused = ("is_paused", parts.flag(Q(IS_PAUSED)))
    lock = Lock(
        "due",
        Execution,
        due if queues is None else due & Q(queue__in=queues),
        finds=[*((name, payload) if name == "payload" else name for name in _DISPATCHED), is_paused],
        order_by="dispatch_at",
        limit="limit",
        skips_locked=True,
    )
    # The pause first: MySQL assigns from left to right.
    exponent: Any = Least(F("dispatches"), Value(5))
    doubled = Value(1).bitleftshift(exponent)
    on_hold = When(held_at__isnull=False, then=PARKED_AT)
    values = {
        "dispatch_at": Case(on_hold, default=later("pause", doubled), output_field=DateTimeField()),
        "dispatches": F("dispatches") + 1,
    }
    return Move(lock, Update("taken", Execution, Q(), values, of="due"))


def take_for_dispatch(limit: int, queues: list[str] | None = None) -> list[Execution]:
    """queued → queued: take executions whose message is to be published, so that no other sweeper publishes it too.

    The next publish is due after ``REDISPATCH_SECONDS``, doubled with each one up to 32 times: a busy queue is not
    flooded with copies. What is held, or of a paused task, is parked instead.
    """
    taking = _taking(None if queues is None else tuple(sorted(queues)))
    pause = dt.timedelta(seconds=conductor_settings().REDISPATCH_SECONDS)
    rows = guards.persist_briefly(lambda: taking.make(database(), limit=limit, pause=pause), skips_locked=True)
    taken: list[Execution] = []
    parked: dict[str, list[uuid.UUID]] = {}
    for *columns, is_paused in rows:
        execution = Execution.from_db(database(), _DISPATCHED, columns)
        if execution.held_at is not None:
            continue
        if is_paused:
            parked.setdefault(execution.task, []).append(execution.pk)
        else:
            taken.append(execution)
    for task, execution_ids in parked.items():
        pausing.park(task, execution_ids)
    return taken


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
