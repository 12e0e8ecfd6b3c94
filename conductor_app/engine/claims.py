"""How an execution comes into this process's hands: its claim, its lease, and what the end of a run claims next."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from celery import Task
from django.db import DatabaseError, InterfaceError, connections

from conductor_app import logs, transitions
from conductor_app.body import left_open
from conductor_app.engine import hand_off, limits
from conductor_app.engine.run import Run, RunEnded, current_run
from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.models import Execution, database
from conductor_app.store import owners
from conductor_app.store.errors import is_outage, name_outage
from conductor_app.store.process import process
from conductor_app.store.soft_limits import SoftLimit
from conductor_app.values.limits import limits_of

logger = logging.getLogger("conductor_app.execution")

#: So many claims in a row may fail in a process whose database answers other connections; then the process ends.
MAX_FAILED_CLAIMS = 3


def take(task: Task[Any, Any], execution_id: uuid.UUID, hostname: str | None) -> Execution:
    """Claim the execution that a delivery is about.

    Raises:
        RunEnded: There is nothing to run, or it waits for a place of a limit.
    """
    delivery = hand_off.delivery_of(execution_id)
    try:
        execution = None if delivery is None else delivery.take(execution_id)
        if execution is None:
            by = functools.partial(limits.claim, task=task) if limits_of(task) else None
            execution = claim(execution_id, owners.lease_owner(hostname), task.name, by=by)
        if execution is not None and process.keeper.holds(execution_id, execution.fence):
            # The database has crashed and forgotten the claim of another thread's run, which is still at it and could
            # write what this one may. The next fence tells them apart.
            execution = transitions.claim_again(execution_id, execution.lease_owner, task.name)
        is_known = execution is not None or Execution.objects.using(database()).filter(pk=execution_id).exists()
    except (DatabaseError, InterfaceError) as error:
        raise not_claimed(execution_id, error) from None
    process.failed_claims = 0
    if not is_known:
        raise RunEnded(
            "dropped",
            "this database has no such execution: it was deleted, or what published the message uses another database",
        )
    if execution is None:
        raise RunEnded("dropped", "not queued, not due, held, of a paused task, or another run has it")
    return execution


def claim(
    execution_id: uuid.UUID,
    owner: str,
    task: str,
    attempt: int | None = None,
    *,
    by: Callable[[uuid.UUID, str], Execution | None] | None = None,
) -> Execution | None:
    """Claim an execution; see ``transitions.claim``.

    Args:
        by: What claims one whose task has limits.

    Raises:
        RunEnded: It waits for a place of a limit.
        DatabaseError: The database is away. If its COMMIT was made all the same, the lease ends unused.
    """
    process.keeper.watch()
    by = by or (lambda execution_id, owner: transitions.claim(execution_id, owner, task, attempt))
    with suppress(DatabaseError, InterfaceError):
        return by(execution_id, owner)
    # A kept connection may not have outlived the pause between two runs, or a body has left its session in a state in
    # which nothing can be claimed.
    left_open.discard(database())
    execution = by(execution_id, owner)
    if execution is None and not process.keeper.holds(execution_id):
        execution = transitions.claim_again(execution_id, owner, task)
    return execution


def not_claimed(execution_id: uuid.UUID, error: Exception) -> RunEnded:
    """Return how a delivery ends whose claim has failed on a new connection, too; the row is queued.

    Raises:
        SystemExit: The database answers others, and not this process of a pool: another one is to take its place.
    """
    if is_outage(error) or not _answers_others():
        # Nothing was claimed, the row is queued: the sweeper rings again.
        logger.warning("Execution %s was not claimed, %s: %s", execution_id, name_outage(error), error)
        return RunEnded("abandoned", name_outage(error))
    process.failed_claims += 1
    logger.error(
        "Execution %s was not claimed (%s), though the database answers other connections. This one is thrown away.",
        execution_id,
        error,
    )
    if not connections[database()].in_atomic_block:
        del connections[database()]
    if process.worker.gate.is_own_process and process.failed_claims >= MAX_FAILED_CLAIMS:
        logger.critical(
            "%d claims in a row have failed in this process. It ends, and is replaced.", process.failed_claims
        )
        raise SystemExit(1)
    return RunEnded("abandoned", "this process cannot use its connection to the database")


def _answers_others() -> bool:
    """Tell whether the database answers a connection that has nothing to do with this thread's."""
    try:
        fresh = connections.create_connection(database())
        try:
            with fresh.cursor() as cursor:
                cursor.execute("SELECT 1")
        finally:
            fresh.close()
    except Exception:  # noqa: BLE001 - whatever the driver raises
        return False
    return True


@contextmanager
def held(task: Task[Any, Any], execution: Execution, limit: SoftLimit, hostname: str | None) -> Iterator[Run]:
    """Hold a claimed execution's lease, and make its run the current one."""
    with process.keeper.hold(execution, _on_loss(execution)) as lease, logs.about(execution):
        started = Run(task, execution, lease, limit, hostname)
        token = current_run.set(started)
        try:
            yield started
        finally:
            current_run.reset(token)


def _on_loss(execution: Execution) -> Callable[[], None]:
    delivery = hand_off.delivery_of(execution.pk)
    return functools.partial(resume_unsuspended, () if delivery is None else tuple(delivery.suspended))


def resume_unsuspended(parents: Sequence[Execution]) -> None:
    """Queue what waits for an execution that is lost, if that does not wait, either: the database has crashed.

    A suspension that this process goes on with does not wait for the disk. Undone, the row says that this process still
    runs the parent, and at the end of the lease the sweeper would take that for a death and an attempt.

    Args:
        parents: Each waited for the next one, and the last one for what is lost. Of those that the database remembers,
            the innermost is the one that it takes to be running.
    """
    for parent in reversed(parents):
        with suppress(LeaseLost, AbandonRun, DatabaseError):
            transitions.release(parent)
            logger.warning("Execution %s runs again: the database has forgotten its suspension.", parent.pk)
            return


@contextmanager
def handing_off(execution: Execution) -> Iterator[transitions.HandOff | None]:
    """Let the last transition of a run, which gets what this yields, claim what this process runs next."""
    delivery = hand_off.delivery_of(execution.pk)
    if delivery is None:
        yield None
        return
    offer = delivery.offer(execution)
    try:
        yield offer
    finally:
        delivery.claimed = offer.claimed or _claimed_unheard(offer.wanted, execution.lease_owner)


def _claimed_unheard(wanted: Execution | None, owner: str) -> Execution | None:
    """Take up a claim whose COMMIT got no answer, if it was made."""
    if wanted is None or process.keeper.holds(wanted.pk):
        return None
    try:
        left_open.discard(database())
        return transitions.claim_again(wanted.pk, owner, wanted.task)
    except DatabaseError as error:
        logger.warning("Execution %s may be left to its lease, %s: %s", wanted.pk, name_outage(error), error)
        return None
