"""Cancel executions: the flag, and the end."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django.db import transaction

from conductor_app import signals
from conductor_app.exceptions import (
    CancelExecution,
    Failure,
)
from conductor_app.models import Execution, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import ExecutionStatus, RunOutcome, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.process import process
from conductor_app.transitions import claiming, guards, parts, running, steps, succeeding, uniqueness, waking
from conductor_app.values.failures import dump_failure
from conductor_app.values.texts import clean_text

#: An execution with more open children than that is ended by a sweeper, and not by whoever asks for it.
MANY_CHILDREN = 1_000


def cancel_running(
    execution: Execution, hand_off: claiming.HandOff | None = None, *, result: str | None = None
) -> Failure | None:
    """running → cancelled: the body has noticed that it was asked to stop, or has ended.

    Args:
        hand_off: Gets the parent, if that was woken.
        result: What its body has returned all the same; an operator's retry adopts it.

    Returns:
        What is stored as its error; ``None`` if an operator's retry has withdrawn the cancellation meanwhile: then the
        execution is queued again, or has succeeded with its result.

    Raises:
        LeaseLost: Another run has taken over.
    """

    kept: dict[str, Any] = {} if result is None else {"result": result}

    def work() -> bool:
        with transaction.atomic(using=database()):
            flag_children(execution.pk)
            held = locked(Execution.objects.using(database()).held_by(execution))
            row = held.only("cancel_requested_at", "cancel_reason").first()
            if row is None:
                raise guards.lease_lost(execution)
            if row.cancel_requested_at is None:
                transaction.set_rollback(True, using=database())
                return False
            execution.cancel_reason = row.cancel_reason
            guards.leave_running(execution, RunOutcome.CANCELLED, **cancelled_values(execution, running=True), **kept)
            with claiming.handing_off(hand_off):
                after_cancel(execution)
        return True

    while not guards.persist(work):
        if result is None:
            running.release(execution)
            return None
        with suppress(CancelExecution):  # it is to be cancelled again
            succeeding.succeed(execution, result, hand_off)
            return None
    return cancel_failure(execution)


def request_cancel(execution_id: uuid.UUID, reason: str, note: Callable[[], object] = lambda: None) -> bool:
    """Flag an open execution; ``False`` if it is final. A running body notices at its next ``ctx`` call.

    Args:
        execution_id: Which one.
        reason: Stored and shown.
        note: Called if this call has flagged it, and nobody before.
    """

    def work() -> bool:
        if flag(execution_id, reason):
            note()
            return True
        return _is_flagged(execution_id)

    guards.leave_if_locked(execution_id)
    is_open = guards.persist_briefly(work)
    if is_open:
        # A body of this process need not ask the database.
        transaction.on_commit(lambda: process.keeper.note_cancel(execution_id), using=database(), robust=True)
    return is_open


def flag(execution_id: uuid.UUID, reason: str) -> bool:
    return bool(
        Execution.objects.using(database())
        .filter(pk=execution_id)
        .open()
        .unasked()
        .update(cancel_requested_at=clock.now(), cancel_reason=clean_text(reason, 1_000))
    )


def _is_flagged(execution_id: uuid.UUID) -> bool:
    rows = Execution.objects.using(database()).filter(pk=execution_id, cancel_requested_at__isnull=False)
    return rows.open().exists()


def flag_children(execution_id: uuid.UUID) -> None:
    """Flag the open children of an execution that is about to be cancelled, and that runs no body any more.

    Before its own row is locked: a child that is just ending holds its own row and then asks for its parent's. The
    children of a map that no run has started are cancelled here, since there may be thousands.
    """
    reason = "its parent was cancelled"
    for step in steps.pending_maps(execution_id):
        waking.cancel_unstarted(steps.children_of(execution_id, step.name), reason)
    flag_all(Execution.objects.using(database()).filter(parent_id=execution_id), reason)


def flag_many_children(execution_id: uuid.UUID) -> bool:
    """Flag the open children of a flagged execution that runs no body, if there are more than ``MANY_CHILDREN``.

    One statement, after which none of them starts. A sweeper ends the execution and them, as it does with all that is
    flagged: the execution first, whose flag is older.

    Returns:
        Whether there are so many.
    """
    using = database()
    children = Execution.objects.using(using).filter(parent_id=execution_id)

    def work() -> bool:
        if not Execution.objects.using(using).filter(pk=execution_id).to_cancel().exists():
            return False
        if children.open().order_by()[: MANY_CHILDREN + 1].count() <= MANY_CHILDREN:
            return False
        flag_all(children, "its parent was cancelled")
        return True

    return guards.persist_briefly(work)


def flag_all(executions: ExecutionQuerySet, reason: str) -> None:
    """Flag all of ``executions`` that are open."""
    executions.open().unasked().update(cancel_requested_at=clock.now(), cancel_reason=clean_text(reason, 1_000))


def cancel_flagged(execution_id: uuid.UUID) -> bool:
    """queued, waiting → cancelled, if it was flagged; flags its open children and wakes its parent.

    Returns:
        Whether this call cancelled it.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id).to_cancel()
            flagged = rows.only("cancel_reason").first()
            if flagged is None:
                return False
            flag_children(execution_id)
            # The step before the execution, as everywhere: somebody may just be sending the event.
            steps.end_waits(execution_id, _cancel_error(flagged))
            execution = locked(rows).first()
            if (
                execution is None
                or not uniqueness.lock_predecessor(execution)
                or not rows.update(**cancelled_values(execution))
            ):
                transaction.set_rollback(True, using=database())
                return False
            after_cancel(execution)
        return True

    guards.leave_if_locked(execution_id, with_children=True)
    return guards.persist_briefly(work)


#: Why an execution is cancelled that Celery's ``expires`` has ended.
EXPIRED = "it expired before it started"


def expire(execution_id: uuid.UUID) -> bool:
    """queued → cancelled: Celery's ``expires``, or the deadline of its tree, has passed and it was never started."""

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Execution.objects.using(database()).filter(pk=execution_id).expired()
            execution = guards.take(rows)
            if execution is None or not uniqueness.lock_predecessor(execution):
                return False
            execution.cancel_reason = _why_too_late(execution)
            if not rows.update(**cancelled_values(execution), cancel_reason=execution.cancel_reason):
                return False
            after_cancel(execution)
        return True

    guards.leave_if_locked(execution_id)
    return guards.persist_briefly(work)


def _why_too_late(execution: Execution) -> str:
    ends_at = execution.tree_deadline_at
    # The earlier one has passed, which is not the later one.
    return EXPIRED if ends_at is None or execution.deadline_at != ends_at else deadline_reason(ends_at)


def deadline_reason(ends_at: dt.datetime) -> str:
    """Return why a tree is cancelled whose deadline is over."""
    return f"its deadline of {clock.aware(ends_at).isoformat(sep=' ', timespec='seconds')} is over"


def end_late(execution_id: uuid.UUID) -> bool:
    """Flag a root whose deadline is over, as ``request_cancel`` does; its tree follows, as of any cancel.

    One guarded write: an end, an operator's retry, which has another deadline, and another sweeper come before or after
    it. What is flagged already keeps its reason.
    """

    def work() -> bool:
        late = Execution.objects.using(database()).filter(pk=execution_id).past_deadline()
        ends_at = late.values_list("tree_deadline_at", flat=True).first()
        if ends_at is None:
            return False
        reason = deadline_reason(ends_at)
        return bool(late.order_by().update(cancel_requested_at=clock.now(), cancel_reason=reason))

    guards.leave_if_locked(execution_id)
    is_flagged = guards.persist_briefly(work)
    if is_flagged:
        # As in ``request_cancel``.
        transaction.on_commit(lambda: process.keeper.note_cancel(execution_id), using=database(), robust=True)
    return is_flagged


def next_deadline_in(seconds: float, since: float) -> float | None:
    """Return in how many seconds the next tree's deadline passes; see ``steps.next_deadline_in``."""
    open_roots = Execution.objects.using(database()).filter(finished_at__isnull=True, cancel_requested_at__isnull=True)
    soon = open_roots.filter(tree_deadline_at__gt=clock.after(-since), tree_deadline_at__lte=clock.after(seconds))
    return clock.seconds_to_first(soon, "tree_deadline_at")


def cancelled_values(execution: Execution, *, running: bool = False) -> dict[str, Any]:
    return {
        "status": ExecutionStatus.CANCELLED,
        "error": _cancel_error(execution),
        "finished_at": clock.now(),
        "announce_at": guards.announcement_instant(execution, running=running),
        **parts.FINAL,
        **parts.NOT_QUEUED,
        **({} if uniqueness.waits_for(execution) is None else uniqueness.NO_PREDECESSOR),
    }


def cancel_failure(execution: Execution) -> Failure:
    message = f"Cancelled: {execution.cancel_reason}" if execution.cancel_reason else "Cancelled"
    return Failure(type="Cancelled", message=message)


def _cancel_error(execution: Execution) -> str:
    return dump_failure(cancel_failure(execution))


def after_cancel(execution: Execution) -> None:
    waking.settle_parent(execution, StepStatus.CANCELLED, error=_cancel_error(execution))
    uniqueness.give_back(execution)
    uniqueness.release_successor(execution)
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.CANCELLED)
