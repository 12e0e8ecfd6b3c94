"""Remember the outcomes of functions."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db import DatabaseError, IntegrityError, InterfaceError, connections, transaction

from conductor_app.exceptions import (
    CancelExecution,
    EndAttempt,
    Failure,
    LeaseLost,
    ReleaseExecution,
)
from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import clock, errors, transactions
from conductor_app.store.moves import Insert, Lock, Move
from conductor_app.store.slots import NOW, after, given
from conductor_app.store.soft_limits import SoftLimit, soft_limit
from conductor_app.transitions import guards, parts, running, steps
from conductor_app.values.failures import dump_failure

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


#: The outcome of a function, also of an execution that is to be cancelled.
_RECORD_STEP = Move(
    Lock("held", Execution, parts.HELD, finds=["cancel_requested_at", "held_at"]),
    Insert(
        "step",
        Step,
        {
            **parts.STEP,
            "created_at": after("began_in"),
            "kind": StepKind.STEP,
            "status": given(Step, "status"),
            "result": given(Step, "result"),
            "error": given(Step, "error"),
            "finished_at": NOW,
        },
    ),
)


def record_step(
    execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None, seconds: float = 0
) -> steps.Memory:
    """Remember the outcome of a function, once, and return what is remembered.

    Args:
        result: What it has returned, as stored text.
        failure: What it has raised.
        seconds: How long ago it was called.

    Raises:
        LeaseLost: Another run has taken over; nothing is recorded.
        CancelExecution: The execution is to be cancelled; the outcome is recorded all the same.
        ReleaseExecution: Somebody holds it; the outcome is recorded all the same.
    """

    error = None if failure is None else dump_failure(failure)

    def work() -> tuple[bool, bool]:
        return _record(execution, name, result, error, seconds=seconds)

    try:
        is_to_cancel, is_held = guards.persist(work)
    except IntegrityError:
        # Recorded already: by this run, whose COMMIT got no answer. What is stored counts.
        recorded = _recorded(execution, name)
        if recorded is None:
            raise
        return recorded
    if is_to_cancel:
        raise CancelExecution
    if is_held:
        raise ReleaseExecution
    return _memory(execution, name, result=result, error=error)


def _record(
    execution: Execution,
    name: str,
    result: str | None,
    error: str | None = None,
    *,
    seconds: float = 0,
    savepoint: bool = True,
) -> tuple[bool, bool]:
    """Insert the outcome; tell whether the execution is to be cancelled, and whether somebody holds it."""
    status = StepStatus.SUCCEEDED if error is None else StepStatus.FAILED
    step: dict[str, Any] = {
        "step": name,
        "status": status,
        "result": result,
        "error": error,
        "attempt": execution.attempt,
        "began_in": clock.interval(-seconds),
    }
    rows = _RECORD_STEP.make(database(), savepoint=savepoint, **step, **parts.held(execution))
    if not rows:
        raise guards.lease_lost(execution)
    is_to_cancel, is_held = (flag is not None for flag in rows[0])
    return is_to_cancel, is_held


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
        running.check_held(execution)


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
            with transactions.not_left_half_open(connection), transaction.atomic(using=database()):
                has_begun = True
                connection.errors_occurred = False
                began = time.monotonic()
                try:
                    text, value = self._call()
                    self.has_acted = True
                    # The execution's row last: until here only rows of the user's are locked.
                    seconds = time.monotonic() - began
                    is_to_cancel, _ = _record(self._execution, self._name, text, seconds=seconds, savepoint=False)
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
