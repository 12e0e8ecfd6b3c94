"""Repair and timekeeping: what has to happen although no worker runs the execution.

Each worker sweeps, and ``manage.py conductor sweep`` does the same without one. Any number of sweepers may run: each
finding is taken by a guarded statement, so it is acted on once.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from django.db import Error, connections

from conductor_app import announcements, dispatch, observing, signals, steps, transitions
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, Step, database
from conductor_app.models.querysets import ExecutionQuerySet
from conductor_app.sql import is_outage

logger = logging.getLogger(__name__)

T = TypeVar("T")


def sweep(*, reclaim: bool = True, audit: bool = False, publish: bool = True) -> Counter[str]:
    """Do all that is due, once.

    Args:
        reclaim: Whether to take executions away from workers whose leases have lapsed.
        audit: Whether to look for executions that wait for nothing.
        publish: Whether to publish messages; a worker with the ``memory://`` broker has its feed for that.

    Returns:
        How often each kind of finding was acted on.
    """
    started = time.perf_counter()
    found: Counter[str] = Counter()
    if reclaim:
        found["lapsed_leases"] = _each(_ids(Execution.objects.using(database()).lapsed()), transitions.lose)
    found["overdue_steps"] = _each(steps.overdue(conductor_settings().SWEEP_BATCH), transitions.decide_overdue)
    found["expired"] = _each(_ids(Execution.objects.using(database()).expired()), transitions.expire)
    found["cancelled"] = cancel_flagged()
    if audit:
        found["stranded"] = _each(_stranded(), _wake_stranded)
    if not announcements.is_resting():
        found["announced"] = _each(transitions.take_for_announcement(conductor_settings().SWEEP_BATCH), _deliver)
    if publish:
        found["published"] = publish_due()
    found = +found
    signals.sweep_finished.send_robust(sender=__name__, found=found, seconds=time.perf_counter() - started)
    return found


def publish_due(limit: int | None = None, queues: list[str] | None = None) -> int:
    """Publish queued executions that are due, whose message was lost, or that no worker answered.

    Args:
        limit: At most so many; ``CONDUCTOR["SWEEP_BATCH"]`` by default.
        queues: Only of these Celery queues.
    """
    if dispatch.is_broker_resting() or dispatch.is_inline():
        return 0
    taken = transitions.take_for_dispatch(limit or conductor_settings().SWEEP_BATCH, queues)
    published = 0
    for number, execution in enumerate(taken):
        if dispatch.publish(execution):
            published += 1
            _tell_redispatched(execution)
        elif dispatch.is_broker_resting():
            # The broker is away. Nobody's pause before the next publish is to grow with that.
            transitions.put_back(taken[number:], dispatch.BREAKER_SECONDS)
            break
    return published


def _tell_redispatched(execution: Execution) -> None:
    # What became due later than it was stored, such as a retry, is published here for the first time, at that instant.
    is_again = execution.dispatches or execution.dispatch_at != execution.due_at
    if is_again and not dispatch.is_embedded() and signals.execution_redispatched.has_listeners(execution.task):
        signals.execution_redispatched.send_robust(sender=execution.task, execution=execution)


def cancel_flagged() -> int:
    """Cancel queued and waiting executions that were flagged, and their descendants."""
    done = 0
    while flagged := _ids(Execution.objects.using(database()).to_cancel()):
        cancelled = _each(flagged, transitions.cancel_flagged)
        done += cancelled
        if not cancelled:
            break  # each was taken by somebody else, or the database refused
    return done


def _ids(executions: ExecutionQuerySet) -> list[uuid.UUID]:
    return list(executions.values_list("pk", flat=True)[: conductor_settings().SWEEP_BATCH])


def _stranded() -> list[uuid.UUID]:
    """Return executions that wait for nothing, or for children that are not in flight."""
    ids = _ids(Execution.objects.using(database()).waiting_for_nothing())
    ids += [step.execution_id for step in steps.in_vain(conductor_settings().SWEEP_BATCH)]
    return list(dict.fromkeys(ids))


def _each(items: Iterable[T], act: Callable[[T], object]) -> int:
    """Act on each item in a transaction of its own; one that fails does not stop the others.

    Raises:
        Exception: The database is away, which would fail them all.
    """
    done = 0
    for item in items:
        try:
            done += bool(act(item))
        except Exception as error:
            if not is_outage(error):
                logger.exception("Sweeping %s failed; it will be tried again.", _describe(item))
                continue
            if not _database_answers():
                raise
            # One session was ended.
            logger.warning("Sweeping %s failed (%s); it will be tried again.", _describe(item), error)
    return done


def _describe(item: object) -> str:
    return f"step {item.name!r} of execution {item.execution_id}" if isinstance(item, Step) else str(item)


def _database_answers() -> bool:
    connection = connections[database()]
    try:
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()
        connection.ensure_connection()
    except Error:
        return False
    return True


def _wake_stranded(execution_id: uuid.UUID) -> bool:
    healed = transitions.wake_stranded(execution_id)
    if healed:
        logger.error("Execution %s was waiting for nothing: a lost wake-up is healed. Please report it.", execution_id)
    return healed


def _deliver(execution: Execution) -> bool:
    if announcements.is_resting():
        return False  # one of these was slow to fail; the others are taken again later
    with observing.acting_for(execution):
        announcements.deliver(execution)
    return True
