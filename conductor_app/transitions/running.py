"""What a run may do, and gives back."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import F

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    Failure,
    ReleaseExecution,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, RunOutcome
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import dispatch, guards
from conductor_app.values.failures import dump_failure
from conductor_app.values.payloads import dump_options


def release(execution: Execution, *, is_held: bool = False) -> None:
    """running → queued: its run gives the execution back, and no attempt is used up.

    Args:
        is_held: Whether that is because somebody holds it, and not because the worker shuts down. Then no message is
            published: the sweeper parks it, or publishes one if it was released meanwhile.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            values = guards.queue_now(execution)
            if is_held:
                values["dispatch_at"] = clock.now()
            guards.leave_running(execution, RunOutcome.RELEASED, status=ExecutionStatus.QUEUED, **values)
            if not is_held:
                dispatch.on_commit(execution)

    guards.persist(work)


def lock_held(execution: Execution) -> bool:
    """Lock the row of a running execution until the end of the current transaction.

    Returns:
        Whether it is to be cancelled.

    Raises:
        LeaseLost: Another run has taken over.
    """
    held = Execution.objects.using(database()).held_by(execution)
    flags = list(locked(held).values_list("cancel_requested_at", flat=True))
    if not flags:
        raise guards.lease_lost(execution)
    return flags[0] is not None


def check_held(execution: Execution) -> None:
    """Raise if the run has no right to go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
        ReleaseExecution: Somebody holds it.
    """

    def work() -> list[tuple[Any, Any]]:
        held = Execution.objects.using(database()).held_by(execution)
        return list(held.values_list("cancel_requested_at", "held_at"))

    flags = guards.persist(work)
    if not flags:
        raise guards.lease_lost(execution)
    is_to_cancel, is_held = (flag is not None for flag in flags[0])
    if is_to_cancel:
        raise CancelExecution
    if is_held:
        raise ReleaseExecution


def note_astray(execution: Execution, found: dict[str, Any]) -> None:
    """Keep with a running execution that its run has gone astray; see ``Execution.astray``."""
    options = dump_options({**execution.get_options(), "astray": found})
    held = Execution.objects.using(database()).held_by(execution)
    if guards.persist(lambda: held.update(options=options)):
        execution.options = options


def retry_later(
    execution: Execution, failure: Failure, delay: float, *, payload: str | None = None, is_published: bool = False
) -> None:
    """running → queued: the attempt failed, the next one is due in ``delay`` seconds.

    Args:
        payload: The arguments of the next attempt as stored text, if they are others.
        is_published: Whether Celery has published a message for it. With ``memory://`` that does not count: it may have
            stayed in the memory of a pool process.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled instead.
    """

    dispatch_at = dispatch.first_instant(clock.after(delay), is_due=delay <= 0)
    if is_published and not dispatch.is_embedded():
        dispatch_at = clock.after(max(delay, 0) + conductor_settings().REDISPATCH_SECONDS)
    changed: dict[str, Any] = {} if payload is None else {"payload": payload}

    def work() -> None:
        with transaction.atomic(using=database()):
            guards.leave_running(
                execution,
                RunOutcome.RETRIED,
                failure,
                status=ExecutionStatus.QUEUED,
                cancel_requested=False,
                attempt=F("attempt") + 1,
                error=dump_failure(failure),
                due_at=clock.after(delay),
                dispatch_at=dispatch_at,
                dispatches=0,
                **changed,
            )
            if delay <= 0:
                # Also if Celery has published one: a worker may have dropped it, for it came before this commit.
                dispatch.on_commit(guards.next_attempt(execution, **changed))
            guards.send_signal(signals.execution_retrying, execution, failure=failure, delay=delay)

    guards.persist(work)
