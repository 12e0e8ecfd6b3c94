"""What a run does: remember steps, end."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db import DatabaseError, IntegrityError, InterfaceError, connections, transaction
from django.db.models import F

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    CancelExecution,
    EndAttempt,
    Failure,
    LeaseLost,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock, errors, transactions
from conductor_app.store.locks import locked
from conductor_app.store.soft_limits import SoftLimit, soft_limit
from conductor_app.transitions import claiming, dispatch, guards, statements, steps, waking
from conductor_app.values.failures import dump_failure
from conductor_app.values.payloads import dump_options

logger = logging.getLogger("conductor_app.execution")


#: A function whose transaction lost its session is called so many times more, in 3 seconds; a session that ends each
#: time is ended by what the function does.
_OUTAGE_TRIES = 5


@dataclass(frozen=True)
class Together:
    """What came of a function whose writes and result are one transaction."""

    #: What is recorded; ``None`` if nothing is.
    memory: steps.Memory | None = None
    #: What the function returned, after its round trip.
    value: Any = None
    #: Whether the execution is to be cancelled.
    is_to_cancel: bool = False
    #: What the function has raised, or the database when it took what the function wrote. Nothing is recorded.
    error: Exception | None = None


def release(execution: Execution) -> None:
    """running → queued: the worker shuts down and gives the execution back; no attempt is used up."""

    def work() -> None:
        guards.leave_running(execution, status=ExecutionStatus.QUEUED, **guards.queue_now(execution))
        dispatch.on_commit(execution)

    guards.persist(work)


def record_step(
    execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None
) -> steps.Memory:
    """Remember the outcome of a function, once, and return what is remembered.

    Raises:
        LeaseLost: Another run has taken over; nothing is recorded.
        CancelExecution: The execution is to be cancelled; the outcome is recorded all the same.
    """

    status = StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED
    error = None if failure is None else dump_failure(failure)

    def work() -> bool:
        if statements.are_at_hand():
            cancelled = statements.record_step(execution, name, status, result=result, error=error)
            if cancelled is None:
                raise guards.lease_lost(execution)
            return cancelled
        with transaction.atomic(using=database()):
            cancelled = lock_held(execution)
            steps.record(execution, name, result=result, failure=failure)
        return cancelled

    try:
        cancelled = guards.persist(work)
    except IntegrityError:
        # Recorded already: by this run, whose COMMIT got no answer. What is stored counts.
        recorded = _recorded(execution, name)
        if recorded is None:
            raise
        return recorded
    if cancelled:
        raise CancelExecution
    return _memory(execution, name, result=result, error=error)


def record_together(execution: Execution, name: str, act: Callable[[], tuple[str, Any]]) -> Together:
    """Run ``act`` and remember the text that it returns, in one transaction.

    As every transaction, it is run again after a deadlock, a serialization failure or an outage, which have undone what
    ``act`` wrote. Whatever else ``act`` raises, a lock timeout of its own for example, is what has come of it.

    Args:
        act: Returns the text to remember, and what that stands for. It is called with the soft time limit let through.

    Raises:
        LeaseLost: Another run has taken over. Nothing is recorded.
        CancelExecution: The execution is to be cancelled, and there was one more call to make. Nothing is recorded.
        AbandonRun: The database was away for a whole lease, and ``act`` could not be called, or its end not be learnt.
        EndAttempt: It is recorded, and one of the callbacks that ``act`` left for the commit has failed.
    """
    connection = connections[database()]
    limit = soft_limit()
    conflicts = outages = 0
    while True:
        attempt = _Attempt(execution, name, act, limit)
        guards.persist(attempt.run)
        done, error = attempt.done, attempt.done.error
        if error is None:
            return done
        if attempt.has_acted and (recorded := _recorded(execution, name)) is not None:
            if not isinstance(error, (DatabaseError, InterfaceError)):
                raise EndAttempt(error)
            logger.warning("Step %s of execution %s is committed; the database said: %s", name, execution.pk, error)
            return Together(recorded, recorded.get_result())
        if connection.in_atomic_block or not attempt.is_of_ours:
            return done  # an error of another database, though it look like one of ours, has undone nothing here
        if errors.is_outage(error):
            outages += 1
            with contextlib.suppress(Exception):
                connection.close()
        elif errors.is_undone(error) or (attempt.has_acted and errors.is_conflict(error)):
            conflicts += 1
        else:
            return done
        if outages > _OUTAGE_TRIES or conflicts > transactions.CONFLICT_TRIES:
            return done
        logger.warning("Step %s of execution %s was undone and is run again: %s", name, execution.pk, error)
        if errors.is_outage(error):
            transactions.pause_after_outage(outages)
        else:
            transactions.pause_after_conflict(conflicts)
        check_held(execution)


class _Attempt:
    """One call of a function together with what is remembered of it."""

    def __init__(self, execution: Execution, name: str, act: Callable[[], tuple[str, Any]], limit: SoftLimit) -> None:
        self._execution = execution
        self._name = name
        self._act = act
        self._limit = limit
        self.done = Together()
        #: Whether the function has returned: what comes after that may come after the commit.
        self.has_acted = False
        #: Whether the session of the transaction has met an error.
        self.is_of_ours = False

    def run(self) -> None:
        """Do it; what fails once the transaction has begun is kept, and not to be repeated without a look at it."""
        connection = connections[database()]
        has_begun = False
        try:
            with transaction.atomic(using=database()):
                has_begun = True
                connection.errors_occurred = False
                try:
                    text, value = self._call()
                    self.has_acted = True
                    # The execution's row last: until here only rows of the user's are locked.
                    is_to_cancel = lock_held(self._execution)
                    steps.record(self._execution, self._name, result=text)
                finally:
                    self.is_of_ours = connection.errors_occurred  # a rollback forgets it
                # From here on nothing but the COMMIT can fail, and Django has connected anew before that is known.
                self.is_of_ours = True
            self.done = Together(_memory(self._execution, self._name, result=text), value, is_to_cancel)
        except LeaseLost:
            raise
        except Exception as error:
            if not has_begun:
                raise
            self.is_of_ours = self.is_of_ours or connection.errors_occurred
            self.done = Together(error=error)

    def _call(self) -> tuple[str, Any]:
        try:
            self._limit.let_through()
            return self._act()
        finally:
            self._limit.hold_back()


def _recorded(execution: Execution, name: str) -> steps.Memory | None:
    return guards.patiently(lambda: steps.recall(execution.pk, name)).get(name)


def _memory(execution: Execution, name: str, *, result: str | None, error: str | None = None) -> steps.Memory:
    """Return what a run remembers of a function's outcome that it has just recorded."""
    return steps.Memory(
        name=name,
        kind=StepKind.STEP,
        status=StepStatus.SUCCEEDED if error is None else StepStatus.FAILED,
        task="",
        payload_digest="",
        child_id=None,
        timeout_seconds=None,
        result=result,
        error=error,
        fence=execution.fence,
    )


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
    """

    def work() -> list[Any]:
        held = Execution.objects.using(database()).held_by(execution)
        return list(held.values_list("cancel_requested_at", flat=True))

    flags = guards.persist(work)
    if not flags:
        raise guards.lease_lost(execution)
    if flags[0] is not None:
        raise CancelExecution


def note_astray(execution: Execution, found: dict[str, Any]) -> None:
    """Keep with a running execution that its run has gone astray; see ``Execution.astray``."""
    options = dump_options({**execution.get_options(), "astray": found})
    held = Execution.objects.using(database()).held_by(execution)
    if guards.persist(lambda: held.update(options=options)):
        execution.options = options


def succeed(execution: Execution, result: str, hand_off: claiming.HandOff | None = None) -> None:
    """running → succeeded, with the stored result; wakes the parent.

    Args:
        hand_off: Gets the parent, if that was woken.

    Raises:
        LeaseLost: Another run has taken over; the result is discarded.
        CancelExecution: The execution is to be cancelled instead; ``cancel_running`` keeps the result.
    """

    def work() -> None:
        if statements.are_at_hand() and _succeed_at_once(execution, result, hand_off):
            return
        with transaction.atomic(using=database()):
            guards.leave_running(
                execution,
                cancel_requested=False,
                # A late child keeps its result. (The one statement refuses it, and leaves it to this.)
                is_late=True,
                status=ExecutionStatus.SUCCEEDED,
                result=result,
                error=None,
                finished_at=clock.now(),
                announce_at=guards.announcement_instant(execution, running=True),
            )
            with claiming.handing_off(hand_off):
                waking.settle_parent(execution, StepStatus.SUCCEEDED)
            guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)

    is_recorded = functools.partial(guards.is_mine, execution, status=ExecutionStatus.SUCCEEDED, result=result)
    guards.persist(work, unless_already=is_recorded)


def _succeed_at_once(execution: Execution, result: str, hand_off: claiming.HandOff | None) -> bool:
    """Do it in one statement; ``False`` if that has refused, or is not enough."""
    if execution.position is not None and execution.get_options().get("throttled"):
        return False  # its end lets a sibling go
    # What is known of the parent here does not change while that waits; how it stands, the statement looks at.
    parent = None if hand_off is None or execution.parent_id is None else hand_off.recalls(execution.parent_id)
    offer = hand_off if parent is not None and hand_off is not None and hand_off.wants(parent) else None
    ended = statements.succeed(
        execution,
        result,
        None if offer is None else offer.owner,
        parent=parent,
        announce_in=guards.announcement_delay(execution, running=True),
    )
    if ended is None:
        return False
    if offer is not None and ended.claimed is not None:
        offer.confirm(ended.claimed)
    elif ended.queued is not None:
        # A claim of its own, just after the commit that woke it; as with a message, the sweeper makes up for a process
        # that dies between the two.
        claiming.pass_on(ended.queued, hand_off)
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)
    return True


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
