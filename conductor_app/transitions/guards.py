"""What every transition needs: the compare-and-set, the retry after an outage, and the signal after the commit."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from django.db import transaction
from django.db.models import QuerySet
from django.db.models.expressions import Combinable
from django.dispatch import Signal

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    Failure,
    LeaseLost,
    ReleaseExecution,
)
from conductor_app.models import Execution, database
from conductor_app.states import RunOutcome
from conductor_app.store import clock, locks, observing, transactions
from conductor_app.transitions import attempts, dispatch, parts

T = TypeVar("T")


def announcement_delay(execution: Execution, *, running: bool = False) -> float | None:
    """Return in how many seconds the sweeper is to tell Celery of the end; ``None`` if there is nothing to tell.

    A run tells it itself, unless it dies before it can.
    """
    options = execution.get_options()
    if not options.get("announce"):
        return None
    if running and not dispatch.is_left_to_sweeper(options):
        return conductor_settings().LEASE_SECONDS
    return 0


def announcement_instant(execution: Execution, *, running: bool = False) -> Combinable | None:
    """Return when that is; see ``announcement_delay``."""
    delay = announcement_delay(execution, running=running)
    return None if delay is None else clock.after(delay)


def patiently(read: Callable[[], T]) -> T:
    """Run a read as often as it takes while the database is away.

    Raises:
        AbandonRun: The database was away for a whole lease.
    """
    return persist(read)


def persist(work: Callable[[], T], unless_already: Callable[[], bool] | None = None) -> T:
    """Run a transaction until the database has taken it.

    Args:
        unless_already: Tells, when the guard has refused, whether an earlier try has in fact been committed and only
            its answer was lost.
    """
    try:
        return transactions.persist(database(), work, patience=conductor_settings().LEASE_SECONDS)
    except LeaseLost:
        if unless_already is not None and patiently(unless_already):
            return None  # type: ignore[return-value]
        raise


def persist_briefly(work: Callable[[], T], *, skips_locked: bool = False) -> T:
    """Run a transaction on which no lease depends; while the database is away, that is the caller's to know."""
    return transactions.persist_briefly(database(), work, skips_locked=skips_locked)


def take(rows: QuerySet[Execution]) -> Execution | None:
    """Lock an execution until the end of the current transaction, and return it, unless somebody else has locked it.

    Raises:
        RowsLocked: Somebody has, and this is background work, which has to know that there is something left to do.
    """
    execution = locks.locked(rows, skip=True).first()
    if execution is None and locks.is_background() and rows.exists():
        raise locks.RowsLocked("its row is locked")
    return execution


def leave_if_locked(execution_id: uuid.UUID, *, with_children: bool = False) -> None:
    """Find out whether background work had to wait for an execution, its parent or its children.

    Raises:
        RowsLocked: It had to.
    """
    executions = Execution.objects.using(database())
    own = executions.filter(pk=execution_id)
    # A queryset, so that it is not even read where nothing has to be found out.
    needed = [executions.filter(pk__in=own.values("parent_id")), own]
    locks.leave_if_locked(*([executions.filter(parent_id=execution_id).open()] if with_children else []), *needed)


def is_mine(execution: Execution, **ended: Any) -> bool:
    """Tell whether a run has ended as ``ended`` says; its outcome is part of that, since a fence can come twice."""
    return Execution.objects.using(database()).filter(pk=execution.pk, fence=execution.fence, **ended).exists()


def leave_running(
    execution: Execution,
    outcome: RunOutcome,
    failure: Failure | None = None,
    *,
    step: str = "",
    cancel_requested: bool = True,
    **values: Any,
) -> None:
    """Take a running execution out of ``running``, if this run still holds it, and keep the run; in a transaction.

    Args:
        outcome: How the run ends.
        failure: What it has failed with.
        step: The step that it waits for.
        cancel_requested: Whether the move is allowed for an execution that is to be cancelled.
        values: What else changes of the execution.
    """
    held = Execution.objects.using(database()).held_by(execution)
    guarded = held if cancel_requested else held.filter(cancel_requested_at__isnull=True)
    if guarded.update(**{**parts.NO_LEASE, **values}):
        attempts.keep(execution, outcome, failure, step=step)
        send_signal(signals.run_ended, execution, outcome=outcome)
        return
    raise lease_lost(execution) if cancel_requested else refusal(execution)


def refusal(execution: Execution) -> CancelExecution | LeaseLost:
    """Return why a run that is not to be cancelled could not write."""
    held = Execution.objects.using(database()).held_by(execution)
    if held.exists():
        return CancelExecution()
    return lease_lost(execution)


def refusal_of_children(execution: Execution) -> CancelExecution | LeaseLost | ReleaseExecution:
    """Return why a run could not store children: it is to end, and nothing of it is lost."""
    held = Execution.objects.using(database()).held_by(execution)
    flags = list(held.values_list("cancel_requested_at", flat=True))
    if not flags:
        return lease_lost(execution)
    # If neither a cancel nor a hold is there any more, it begins again, too.
    return ReleaseExecution() if flags[0] is None else CancelExecution()


def why_held(execution: Execution) -> str:
    """Return since when somebody holds an execution, and why, for a refusal."""
    return why_stopped("held", execution.held_at, execution.held_by, execution.hold_reason)


def why_stopped(how: str, since: dt.datetime | None, by: str | None, reason: str | None) -> str:
    """Return what a refusal says of a hold or a pause."""
    who = f", by {by}" if by else ""
    return f"{how} since {since:%Y-%m-%d %H:%M:%S} UTC{who}: {reason}"


def must_hold(execution: Execution) -> None:
    """Raise ``LeaseLost`` unless this run holds the execution just now; no lock is taken."""
    if not Execution.objects.using(database()).held_by(execution).exists():
        raise lease_lost(execution)


def lease_lost(execution: Execution) -> LeaseLost:
    return LeaseLost(
        f"The lease of execution {execution.pk} (fence {execution.fence}) is lost: another run took over, or it was "
        "ended from outside. This run can write no more; side effects need ctx.idempotency_key() to be safe."
    )


def queue_now(execution: Execution) -> dict[str, Any]:
    return {
        "due_at": clock.now(),
        "dispatch_at": dispatch.first_instant(clock.now(), is_due=True, root_id=execution.root_id),
        "dispatches": 0,
    }


def queue_for_sweeper(execution: Execution) -> dict[str, Any]:
    """Return the same for one that is not published after the commit: a sweeper does that at once."""
    values = queue_now(execution)
    if not (dispatch.is_embedded() or dispatch.is_inline(execution.root_id)):
        values["dispatch_at"] = clock.now()
    return values


def next_attempt(execution: Execution, **changed: Any) -> Execution:
    """Return an execution as it is after an update that counted up its attempt, for the message that follows."""
    return execution.copied(attempt=execution.attempt + 1, **changed)


def send_signal(signal: Signal, execution: Execution, **details: Any) -> None:
    """Send ``signal`` after the commit, and write its line in the log."""
    if observing.is_noticed(signal, execution.task):
        transaction.on_commit(lambda: observing.tell(signal, execution, **details), using=database())
