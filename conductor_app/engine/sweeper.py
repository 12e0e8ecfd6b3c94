"""Repair and timekeeping: what has to happen although no worker runs the execution.

Each worker sweeps, and ``manage.py conductor sweep`` does the same without one. Any number of sweepers may run: each
finding is taken by a guarded statement, so it is acted on once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import Error, connections
from django.db.models import F

from conductor_app import signals, transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements
from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, observing
from conductor_app.store.errors import is_outage
from conductor_app.store.locks import RowsLocked, waiting_at_most
from conductor_app.store.waits import at_work
from conductor_app.transitions import dispatch, steps

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: How long a sweep waits for a locked row, in seconds: not at all; when it tries again what was locked; and later on.
AT_ONCE_SECONDS, FIRST_WAIT_SECONDS, LATER_WAIT_SECONDS = 0.001, 0.1, 0.01
#: How long it tries again what was locked, in seconds.
AGAIN_SECONDS = 0.5
#: How often something else gets its turn meanwhile, in seconds.
BETWEEN_SECONDS = 0.05
#: How long each kind of finding gets in a worker, in seconds, before the next one.
TURN_SECONDS = 0.5
#: How many are acted on in one go, in a worker.
DECIDED_TOGETHER, ANNOUNCED_TOGETHER, PUBLISHED_TOGETHER = 100, 20, 100
#: After so many sweeps the log tells of something that is locked.
TOLD_AFTER_SWEEPS = 2
#: So many locked ones are remembered at most.
MOST_LEFT = 2_000


class Found(Counter[str]):
    """How often each kind of finding was acted on."""

    #: Whether a sweep has left something for the next one, which is to come at once.
    has_more = False


@dataclass
class _Left:
    """Something to act on that somebody has locked."""

    kind: str
    item: Any
    act: Callable[[Any], object]
    #: By ``time.monotonic()``, as all of these.
    since: float
    tried_at: float
    tries: int = 0
    is_told: bool = False
    #: Since when it is not locked any more, for what waits a while then.
    free_since: float | None = None


class _Leavings(threading.local):
    """What each thread that sweeps has found locked: at the next sweep it is tried again, after all that is not."""

    def __init__(self) -> None:
        #: By kind and key.
        self.all: dict[tuple[str, object], _Left] = {}

    @contextlib.contextmanager
    def of(self, root_id: uuid.UUID | None) -> Iterator[None]:
        """Leave alone, while one tree is swept, what was found locked of others."""
        before = self.all
        if root_id is not None:
            self.all = {}
        try:
            yield
        finally:
            self.all = before


_leavings = _Leavings()


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
        between: Called between two findings, at most every ``BETWEEN_SECONDS``.

    Returns:
        How often each kind of finding was acted on; ``locked`` counts what was left.
    """
    started = time.perf_counter()
    with _leavings.of(root_id), _waiting_for_no_row(root_id):
        found = _sweep(
            _Sweep(turn, between),
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
    work: _Sweep,
    executions: ExecutionQuerySet,
    root_id: uuid.UUID | None,
    *,
    reclaim: bool,
    audit: bool,
    publish: bool,
) -> Found:
    if reclaim:
        work.each("lapsed_leases", lambda known: _ids(executions.lapsed(), known), _lose)
    work.decide_overdue(conductor_settings().SWEEP_BATCH, root_id)
    work.each("expired", lambda known: _ids(executions.expired(), known), transitions.expire)
    # Again and again: one that is cancelled flags its children.
    while work.each("cancelled", lambda known: _ids(executions.to_cancel(), known), transitions.cancel_flagged):
        pass
    if audit:
        work.each("stranded", lambda known: _stranded(executions, known, root_id), _wake_stranded)
    work.try_again()
    if not announcements.is_resting():
        work.in_parts("announced", functools.partial(_announce, root_id), ANNOUNCED_TOGETHER)
    if publish:
        work.in_parts("published", _publish, PUBLISHED_TOGETHER)
    return work.found


def _of(root_id: uuid.UUID | None) -> ExecutionQuerySet:
    executions = _executions()
    return executions if root_id is None else executions.filter(root_id=root_id)


def due_in(seconds: float, *, since: float = 0.0, publish: bool = True) -> float | None:
    """Return in how many seconds a sweep has something to do, if that is within so many; ``None`` otherwise.

    Args:
        since: How many seconds ago the last sweep began. What has become due meanwhile, it may have looked for a moment
            too early.
        publish: Whether executions count that become due; with ``memory://`` the feed looks for them all the time.
    """
    found = [steps.next_deadline_in(seconds, since)]
    if publish:
        # What was published before has a later instant than its due time, and a bound that counts in minutes.
        unpublished = _executions().with_status(ExecutionStatus.QUEUED).filter(dispatch_at=F("due_at"))
        soon = unpublished.filter(dispatch_at__gt=clock.after(-since), dispatch_at__lte=clock.after(seconds))
        found.append(clock.seconds_to_first(soon, "dispatch_at"))
    return min((left for left in found if left is not None), default=None)


class _Sweep:
    """One sweep: each kind of finding gets its turn, whatever there is of the others."""

    def __init__(self, turn: float | None, between: Callable[[], object]) -> None:
        self._turn = turn
        self._between = between
        self._between_at = time.monotonic() + BETWEEN_SECONDS
        self._kinds: set[str] = set()
        self._ends_at: dict[str, float] = {}
        self.found = Found()

    def each(self, kind: str, find: Callable[[list[Any]], Iterable[T]], act: Callable[[T], object]) -> int:
        """Act on each finding in a transaction of its own; one that fails, or is locked, does not stop the others.

        Args:
            find: Gets the keys of those that are known to be locked, and finds the others.

        Returns:
            How many were acted on.

        Raises:
            Exception: The database is away, which would fail them all.
        """
        known = self._begin(kind)
        if self._is_over(kind):
            return 0
        connection = connections[database()]
        with at_work(connection):
            items = list(find(known))
        return self._act_on_each(kind, items, act)

    def decide_overdue(self, limit: int, root_id: uuid.UUID | None) -> None:
        """Decide the steps whose deadline has passed: many together, and one by one what is not so simple."""
        kind = "overdue_steps"
        known = self._begin(kind)
        with at_work(connections[database()]):
            overdue = steps.overdue(limit, known, root_id)
        left: list[Step] = []
        for start in range(0, len(overdue), DECIDED_TOGETHER):
            if self._is_over(kind):
                break
            part = overdue[start : start + DECIDED_TOGETHER]
            decided = _decide_together(part)
            self._count(kind, len(decided))
            left += [step for step in part if step.pk not in decided]
        if left:
            # Another sweeper may have decided them meanwhile.
            with at_work(connections[database()]):
                still = set(steps.overdue_rows().filter(pk__in=[step.pk for step in left]).values_list("pk", flat=True))
            self._act_on_each(kind, [step for step in left if step.pk in still], transitions.decide_overdue)

    def in_parts(self, kind: str, act: Callable[[int], tuple[int, int]], size: int) -> None:
        """Let ``act`` take and act on so many of a kind at once, again and again until there is no more."""
        self._begin(kind)
        left = conductor_settings().SWEEP_BATCH
        while left and not self._is_over(kind):
            wanted = left if self._turn is None else min(left, size)
            taken, done = act(wanted)
            self._count(kind, done)
            if taken < wanted:
                return
            left -= taken

    def try_again(self) -> None:
        """Try what was locked: for a moment, since most locks last no longer; at each sweep, as long as they last."""
        ends_at = time.monotonic() + AGAIN_SECONDS
        for left in sorted(_leavings.all.values(), key=lambda left: left.tried_at):
            if left.kind not in self._kinds:
                continue
            if self._turn is not None and time.monotonic() > ends_at:
                break
            with waiting_at_most(FIRST_WAIT_SECONDS if left.tries == 1 else LATER_WAIT_SECONDS, database()):
                self._count(left.kind, self._act_on(left.kind, left.item, left.act))
        if locked := sum(left.kind in self._kinds for left in list(_leavings.all.values())):
            self.found["locked"] = locked

    def _begin(self, kind: str) -> list[Any]:
        """Begin a kind's turn, and return the keys of what is known to be locked."""
        self._kinds.add(kind)
        if self._turn is not None:
            self._ends_at.setdefault(kind, time.monotonic() + self._turn)
        return [key for known, key in list(_leavings.all) if known == kind]

    def _is_over(self, kind: str) -> bool:
        """Tell whether it is the next kind's turn; the sweeper's thread has to do other things, too."""
        now = time.monotonic()
        if now >= self._between_at:
            self._between()
            self._between_at = time.monotonic() + BETWEEN_SECONDS
        if now < self._ends_at.get(kind, now + 1):
            return False
        self.found.has_more = True
        return True

    def _count(self, kind: str, done: int) -> None:
        if done:
            self.found[kind] += done
            self.found.has_more |= self.found[kind] >= conductor_settings().SWEEP_BATCH

    def _act_on_each(self, kind: str, items: Iterable[T], act: Callable[[T], object]) -> int:
        done = 0
        for item in items:
            if self._is_over(kind):
                break
            done += self._act_on(kind, item, act)
        self._count(kind, done)
        return done

    def _act_on(self, kind: str, item: T, act: Callable[[T], object]) -> bool:
        key = (kind, item.pk if isinstance(item, Step) else item)
        try:
            done = bool(self._attempt(item, act))
        except RowsLocked as error:
            _leave(key, item, act, error)
            return False
        _leavings.all.pop(key, None)
        return done

    def _attempt(self, item: T, act: Callable[[T], R]) -> R | None:
        try:
            return act(item)
        except RowsLocked:
            raise
        except Exception as error:
            if not is_outage(error):
                logger.exception("Sweeping %s failed; it will be tried again.", _describe(item))
                return None
            if not _database_answers():
                raise
            # One session was ended.
            logger.warning("Sweeping %s failed (%s); it will be tried again.", _describe(item), error)
            return None


def _decide_together(overdue: list[Step]) -> set[int]:
    try:
        return transitions.decide_overdue_together(overdue)
    except Exception as error:
        if is_outage(error) and not _database_answers():
            raise
        # One of them is at fault; which one, they say when each is decided alone.
        logger.debug("%d steps are decided one by one: %s", len(overdue), error)
        return set()


def _leave(key: tuple[str, object], item: Any, act: Callable[[Any], object], error: RowsLocked) -> None:
    """Remember something that is locked, and say so if it has been for a while."""
    now = time.monotonic()
    left = _leavings.all.get(key)
    if left is None:
        if len(_leavings.all) >= MOST_LEFT:
            return  # found again by the next sweep
        left = _leavings.all[key] = _Left(key[0], item, act, now, now)
    left.tried_at = now
    left.tries += 1
    if not left.is_told and left.free_since is None and now - left.since >= TOLD_AFTER_SWEEPS * _sweep_seconds():
        left.is_told = True
        logger.warning(
            "Sweeping %s (%s) has to wait: for %.0f s, another session has locked a row that it needs (%s). Everything "
            "else goes on. It is tried again at each sweep.",
            _describe(item),
            key[0],
            now - left.since,
            error,
        )


def _sweep_seconds() -> float:
    return conductor_settings().SWEEP_SECONDS


def _lose(execution_id: uuid.UUID) -> bool:
    """Take an execution away from a worker that has not renewed its lease.

    Not at once after its row was locked: the worker could not renew it, and is to get at the row first.
    """
    left = _leavings.all.get(("lapsed_leases", execution_id))
    if left is not None:
        try:
            transitions.wait_for_row(execution_id)
        except RowsLocked:
            left.free_since = None
            raise
        if not _executions().lapsed().filter(pk=execution_id).exists():
            return False
        left.free_since = left.free_since or time.monotonic()
        if time.monotonic() - left.free_since < conductor_settings().HEARTBEAT_SECONDS:
            raise RowsLocked("its row was locked until just now")
    return transitions.lose(execution_id)


def _executions() -> ExecutionQuerySet:
    return Execution.objects.using(database())


def _ids(executions: ExecutionQuerySet, known: Sequence[Any]) -> list[uuid.UUID]:
    if known:
        executions = executions.exclude(pk__in=known)
    return list(executions.values_list("pk", flat=True)[: conductor_settings().SWEEP_BATCH])


def _stranded(executions: ExecutionQuerySet, known: Sequence[object], root_id: uuid.UUID | None) -> list[uuid.UUID]:
    """Return executions that wait for nothing, or for children that are not in flight."""
    ids = _ids(waiting_for_nothing(executions), known)
    ids += [step.execution_id for step in steps.in_vain(conductor_settings().SWEEP_BATCH, root_id=root_id)]
    return [key for key in dict.fromkeys(ids) if key not in known]


def publish_due(limit: int | None = None, queues: list[str] | None = None) -> int:
    """Publish queued executions that are due, whose message was lost, or that no worker answered.

    Args:
        limit: At most so many; ``CONDUCTOR["SWEEP_BATCH"]`` by default.
        queues: Only of these Celery queues.

    Returns:
        How many were published.
    """
    return _publish(limit or conductor_settings().SWEEP_BATCH, queues)[1]


def _publish(limit: int, queues: list[str] | None = None) -> tuple[int, int]:
    """Return how many were taken, and how many published."""
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


def _announce(root_id: uuid.UUID | None, limit: int) -> tuple[int, int]:
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
        except Exception as error:
            if is_outage(error) and not _database_answers():
                raise
            logger.exception("Telling Celery of execution %s failed; it will be tried again.", execution.pk)
    return len(taken), told


def _deliver(execution: Execution) -> bool:
    if announcements.is_resting():
        return False  # one of these was slow to fail; the others are taken again later
    with observing.acting_for(execution):
        announcements.deliver(execution)
    return True
