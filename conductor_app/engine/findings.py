"""What a sweep looks for, and what it does about each: lapsed leases, lost wake-ups, ends untold, messages unsent."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from conductor_app import signals, transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, outage
from conductor_app.engine.leavings import leavings
from conductor_app.exceptions import DuplicateExecution
from conductor_app.models import Execution, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.store import observing
from conductor_app.store.errors import is_outage
from conductor_app.store.locks import RowsLocked
from conductor_app.transitions import auditing, dispatch, uniqueness

logger = logging.getLogger("conductor_app.engine.sweeper")


def ids(executions: ExecutionQuerySet, known: Sequence[Any]) -> list[uuid.UUID]:
    """Return the ids of one sweep's share of some executions, without those that are known to be locked."""
    if known:
        executions = executions.exclude(pk__in=known)
    return list(executions.values_list("pk", flat=True)[: conductor_settings().SWEEP_BATCH])


def stranded(executions: ExecutionQuerySet, known: Sequence[object], root_id: uuid.UUID | None) -> list[uuid.UUID]:
    """Return executions that wait for nothing, for children that are not in flight, or for an end that has been."""
    found = ids(waiting_for_nothing(executions), known)
    found += [step.execution_id for step in auditing.in_vain(conductor_settings().SWEEP_BATCH, root_id=root_id)]
    found += ids(uniqueness.orphans(executions), known)
    return [key for key in dict.fromkeys(found) if key not in known]


def lose(execution_id: uuid.UUID) -> bool:
    """Take an execution away from a worker that has not renewed its lease.

    Not at once after its row was locked: the worker could not renew it, and is to get at the row first.
    """
    left = leavings.all.get(("lapsed_leases", execution_id))
    if left is not None:
        try:
            transitions.wait_for_row(execution_id)
        except RowsLocked:
            left.free_since = None
            raise
        if not Execution.objects.using(database()).lapsed().filter(pk=execution_id).exists():
            return False
        left.free_since = left.free_since or time.monotonic()
        if time.monotonic() - left.free_since < conductor_settings().HEARTBEAT_SECONDS:
            raise RowsLocked("its row was locked until just now")
    return transitions.lose(execution_id)


def wake_stranded(execution_id: uuid.UUID) -> bool:
    """Wake an execution that waits for nothing, and report it: that must not happen."""
    healed = transitions.wake_stranded(execution_id)
    if healed:
        logger.error("Execution %s was waiting for nothing: a lost wake-up is healed. Please report it.", execution_id)
    return healed


def announce(root_id: uuid.UUID | None, limit: int) -> tuple[int, int]:
    """Tell Celery of so many ends; return how many were taken, and of how many it was told."""
    if announcements.is_resting():
        return 0, 0
    taken = transitions.take_for_announcement(limit, root_id)
    told = 0
    for execution in taken:
        try:
            told += _deliver(execution)
        except RowsLocked:
            pass  # taken again at the end of a lease
        except DuplicateExecution as error:
            logger.warning("What comes after execution %s is called again later: %s", execution.pk, error)
        except Exception as error:
            if is_outage(error) and not outage.database_answers():
                raise
            logger.exception("Telling Celery of execution %s failed; it will be tried again.", execution.pk)
    return len(taken), told


def _deliver(execution: Execution) -> bool:
    if announcements.is_resting():
        return False  # one of these was slow to fail; the others are taken again later
    with observing.acting_for(execution):
        announcements.deliver(execution)
    return True


def publish(limit: int, queues: list[str] | None = None) -> tuple[int, int]:
    """Publish so many messages that are due; return how many were taken, and how many published."""
    if dispatch.is_broker_resting() or dispatch.is_inline():
        return 0, 0
    taken = transitions.take_for_dispatch(limit, queues)
    published = 0
    for number, execution in enumerate(taken):
        if dispatch.publish(execution):
            published += 1
            _tell_redispatched(execution)
        elif dispatch.is_broker_resting():
            # The broker is away. Nobody's pause before the next publish is to grow with that.
            transitions.put_back(taken[number:], dispatch.BREAKER_SECONDS)
            return 0, published
    return len(taken), published


def _tell_redispatched(execution: Execution) -> None:
    # What became due later than it was stored, such as a retry, is published here for the first time, at that instant.
    is_again = execution.dispatches or execution.dispatch_at != execution.due_at
    if is_again and not dispatch.is_embedded() and signals.execution_redispatched.has_listeners(execution.task):
        signals.execution_redispatched.send_robust(sender=execution.task, execution=execution)
