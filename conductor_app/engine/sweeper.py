"""Repair and timekeeping: what has to happen although no worker runs the execution.

Each worker sweeps, and ``manage.py conductor sweep`` does the same without one. Any number of sweepers may run: each
finding is taken by a guarded statement, so it is acted on once.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager

from django.db.models import F

from conductor_app import signals, transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import acting, announcements, findings, schedules
from conductor_app.engine.leavings import leavings
from conductor_app.engine.turns import Found, Sweep
from conductor_app.models import Execution, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.locks import waiting_at_most
from conductor_app.transitions import cancelling, limiting, steps

#: How long a sweep waits for a locked row, in seconds, before it goes on to the next finding: not at all.
AT_ONCE_SECONDS = 0.001
#: How many are acted on in one go, in a worker.
ANNOUNCED_TOGETHER, PUBLISHED_TOGETHER = 20, 100
#: At so many keys of limits, for which executions wait, a sweep looks whether a place is free.
LOOKED_AT = 100


def sweep(
    *,
    reclaim: bool = True,
    audit: bool = False,
    publish: bool = True,
    root_id: uuid.UUID | None = None,
    turn: float | None = None,
    between: Callable[[], object] = lambda: None,
) -> Found:
    """Do what is due, once. What somebody has locked is left for the next sweep, and delays nothing else.

    Args:
        reclaim: Whether to take executions away from workers whose leases have lapsed.
        audit: Whether to look for executions that wait for nothing.
        publish: Whether to publish messages; a worker with the ``memory://`` broker has its feed for that.
        root_id: Only what is due of this tree, without its messages.
        turn: How long each kind of finding is acted on at most, in seconds, before it is the next one's turn; by
            default to the end.
        between: Called between two findings, at most every ``turns.BETWEEN_SECONDS``.

    Returns:
        How often each kind of finding was acted on; ``locked`` counts what was left.
    """
    started = time.perf_counter()
    with leavings.of(root_id), _waiting_for_no_row(root_id):
        found = _sweep(
            Sweep(turn, between),
            _of(root_id),
            root_id,
            reclaim=reclaim,
            audit=audit,
            publish=publish and root_id is None,
        )
    signals.sweep_finished.send_robust(sender=__name__, found=found, seconds=time.perf_counter() - started)
    return found


def _waiting_for_no_row(root_id: uuid.UUID | None) -> AbstractContextManager[None]:
    # Whoever sweeps one tree runs it, and has nothing else to do.
    return contextlib.nullcontext() if root_id is not None else waiting_at_most(AT_ONCE_SECONDS, database())


def _sweep(
    work: Sweep,
    executions: ExecutionQuerySet,
    root_id: uuid.UUID | None,
    *,
    reclaim: bool,
    audit: bool,
    publish: bool,
) -> Found:
    if reclaim:
        work.each("lapsed_leases", lambda known: findings.ids(executions.lapsed(), known), findings.lose)
    work.decide_overdue(conductor_settings().SWEEP_BATCH, root_id)
    work.each("expired", lambda known: findings.ids(executions.expired(), known), transitions.expire)
    # Those that have begun, and before what is to be cancelled, as they are.
    work.each("deadlines", lambda known: findings.ids(executions.past_deadline(), known), transitions.end_late)
    if root_id is None:
        # Before what is to be cancelled, which they ask for.
        while work.each("operations", acting.pending_items, acting.decide):
            pass
        watch = schedules.Watch()
        work.each("schedules", watch.to_do, watch.act)
    # Again and again: one that is cancelled flags its children.
    while work.each("cancelled", lambda known: findings.ids(executions.to_cancel(), known), transitions.cancel_flagged):
        pass
    if audit:
        work.in_parts("unparked", _unpark_lost, PUBLISHED_TOGETHER)
        work.each("stranded", lambda known: findings.stranded(executions, known, root_id), findings.wake_stranded)
    work.each("places", lambda _known: limiting.waited_for(LOOKED_AT, root_id), limiting.hand_on)
    work.try_again()
    if not announcements.is_resting():
        work.in_parts("announced", functools.partial(findings.announce, root_id), ANNOUNCED_TOGETHER)
    if publish:
        work.in_parts("published", findings.publish, PUBLISHED_TOGETHER)
    return work.found


def _unpark_lost(limit: int) -> tuple[int, int]:
    given_back = transitions.unpark_lost(limit)
    return given_back, given_back


def _of(root_id: uuid.UUID | None) -> ExecutionQuerySet:
    executions = _executions()
    return executions if root_id is None else executions.filter(root_id=root_id)


def _executions() -> ExecutionQuerySet:
    return Execution.objects.using(database())


def due_in(seconds: float, *, since: float = 0.0, publish: bool = True) -> float | None:
    """Return in how many seconds a sweep has something to do, if that is within so many; ``None`` otherwise.

    Args:
        since: How many seconds ago the last sweep began. What has become due meanwhile, it may have looked for a moment
            too early.
        publish: Whether executions count that become due; with ``memory://`` the feed looks for them all the time.
    """
    found = [
        steps.next_deadline_in(seconds, since),
        cancelling.next_deadline_in(seconds, since),
        schedules.due_in(seconds, since),
    ]
    if publish:
        # What was published before has a later instant than its due time, and a bound that counts in minutes.
        unpublished = _executions().with_status(ExecutionStatus.QUEUED).filter(dispatch_at=F("due_at"))
        soon = unpublished.filter(dispatch_at__gt=clock.after(-since), dispatch_at__lte=clock.after(seconds))
        found.append(clock.seconds_to_first(soon, "dispatch_at"))
    return min((left for left in found if left is not None), default=None)


def publish_due(limit: int | None = None, queues: list[str] | None = None) -> int:
    """Publish queued executions that are due, whose message was lost, or that no worker answered.

    Args:
        limit: At most so many; ``CONDUCTOR["SWEEP_BATCH"]`` by default.
        queues: Only of these Celery queues.

    Returns:
        How many were published.
    """
    return findings.publish(limit or conductor_settings().SWEEP_BATCH, queues)[1]
