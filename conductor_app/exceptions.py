"""Every error that ``conductor_app`` raises, and the control flow that is not an error.

::

    ConductorError
    ├── ChildError                     what a child's outcome raises in its parent
    │   ├── ChildFailed
    │   ├── ChildTimedOut              also a builtin TimeoutError
    │   └── ChildCancelled
    ├── DuplicateExecution             an open execution has the unique key
    ├── NoneSucceeded                  all members of a ctx.first have failed
    ├── EventTimedOut                  an event did not come in time; also a builtin TimeoutError
    ├── StepFailed                     a remembered failure whose class is gone
    ├── OutcomeLost                    a recorded outcome that is not there any more
    ├── NewerFormat                    a stored value that a newer version wrote
    ├── ProgrammingError               the code has to change, so a retry would not help
    │   ├── InvalidArgument            also a builtin ValueError
    │   ├── InvalidArgumentType        also a builtin TypeError
    │   ├── StepNameReused, StepMismatch, NestedDurableCall, InvokeInsideTransaction
    │   ├── UnknownTask, NotSerializable, PayloadTooLarge, MaxDepthExceeded, TooManySteps,
    │   ├── TooManyChildren, TooManyTags, LimitDeadlock
    │   ├── PayloadMismatch
    │   ├── ContextClosed, WrongThread, BlockingCallInTask, WaitInsideTransaction
    │   ├── BlockingCallInEventLoop    also Django's SynchronousOnlyOperation
    │   ├── NotATestDatabase
    │   └── IdempotencyConflict
    ├── UncleanConnection              a body left a transaction open, or a session that cannot write
    ├── LeaseLost                      another run took over
    ├── ExecutionFailed, ExecutionCancelled, ExecutionFinished          raised outside of a body
    ├── ActionRefused                  an operator asked for what is impossible for this execution
    │   └── RetryRefused
    ├── RenameRefused                  raised by a migration
    ├── WorkerLost                     recorded when the process that ran a body died
    └── TaskEndedWithoutOutcome        recorded when a plain task ends with neither a result nor an error

Control flow (``SuspendExecution`` and its siblings) derives from ``BaseException``, out of reach of a user's
``except Exception``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.core import exceptions as django_exceptions


class ConductorError(Exception):
    """Base class of all errors of ``conductor_app``."""

    #: Whether another attempt of the same execution may end differently.
    retryable = True


# ---------------------------------------------------------------------------------------------- a child's outcome


class ChildError(ConductorError):
    """A child ended without a result.

    The outcome is remembered, so another attempt of the parent meets the same error: uncaught, it fails the parent at
    once, whatever retries the parent has left.
    """

    retryable = False

    def __init__(self, message: str, *, step: str = "", child_id: UUID | None = None, error_class: str = "") -> None:
        super().__init__(message)
        #: Name of the step in the parent.
        self.step = step
        #: Id of the child execution.
        self.child_id = child_id
        #: Dotted name of the class of the child's own error, as text.
        self.error_class = error_class

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_child_error, (type(self), str(self), self.step, self.child_id, self.error_class))


def _rebuild_child_error(
    cls: type[ChildError], message: str, step: str, child_id: UUID | None, error_class: str
) -> ChildError:
    return cls(message, step=step, child_id=child_id, error_class=error_class)


class ChildFailed(ChildError):
    """The child used up its attempts. ``str()`` is ``Child execution failed: <child error message>``."""


class ChildTimedOut(ChildError, TimeoutError):
    """The child was not done within ``timeout``."""


class ChildCancelled(ChildError):
    """The child was cancelled by someone other than its parent."""


class NoneSucceeded(ConductorError):
    """Of all that ``ctx.first(…, until="succeeded")`` waited for, none has succeeded.

    Remembered as a child's outcome is: uncaught, it fails the execution at once.
    """

    retryable = False

    def __init__(self, message: str, *, step: str = "", errors: tuple[ChildError, ...] = ()) -> None:
        super().__init__(message)
        #: Name of the step that waited.
        self.step = step
        #: What became of each, in the order of the arguments.
        self.errors = errors

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_none_succeeded, (type(self), str(self), self.step, self.errors))


def _rebuild_none_succeeded(
    cls: type[NoneSucceeded], message: str, step: str, errors: tuple[ChildError, ...]
) -> NoneSucceeded:
    return cls(message, step=step, errors=errors)


class EventTimedOut(ConductorError, TimeoutError):
    """An event did not come within ``timeout``.

    Remembered as a child's outcome is: uncaught, it fails the execution at once.
    """

    retryable = False

    def __init__(self, message: str, *, step: str = "", event: str = "") -> None:
        super().__init__(message)
        #: Name of the step that waited.
        self.step = step
        #: Name of the event.
        self.event = event

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_event_timed_out, (type(self), str(self), self.step, self.event))


def _rebuild_event_timed_out(cls: type[EventTimedOut], message: str, step: str, event: str) -> EventTimedOut:
    return cls(message, step=step, event=event)


class StepFailed(ConductorError):
    """A remembered failure of a step, on a replay where the original exception class cannot be found any more."""


class OutcomeLost(ConductorError):
    """What was recorded of a step, or as the result of an execution, is not there any more.

    Somebody deleted or changed rows by hand, or restored a part of a backup. A replay that went on would take another
    way than the run before, so a body cannot catch it: the execution fails at once.
    """

    retryable = False

    def __init__(self, message: str, *, step: str = "") -> None:
        super().__init__(message)
        #: Name of the step; empty for an execution's result.
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_outcome_lost, (type(self), str(self), self.step))


def _rebuild_outcome_lost(cls: type[OutcomeLost], message: str, step: str) -> OutcomeLost:
    return cls(message, step=step)


class NewerFormat(ConductorError):
    """A stored value is of a storage format, or has a type, that only a newer ``conductor_app`` or kombu reads.

    A body cannot catch it: the execution is left to newer workers, and no attempt is used up.
    """

    retryable = False


# ------------------------------------------------------------------------------------------------ programming errors


class ProgrammingError(ConductorError):
    """The code or its input has to change: the execution fails at once, its retries are not used."""

    retryable = False


class InvalidArgument(ProgrammingError, ValueError):
    """An argument has the right type and an impossible value."""


class InvalidArgumentType(ProgrammingError, TypeError):
    """An argument has the wrong type."""


class StepNameReused(ProgrammingError):
    """One step name was used for two calls of the same run."""


class StepMismatch(ProgrammingError):
    """A step was recorded for another task, kind or payload than the code now calls."""


class NestedDurableCall(ProgrammingError):
    """A ``ctx`` call was made inside the function of ``ctx.step``."""


class InvokeInsideTransaction(ProgrammingError):
    """A durable call was made inside ``transaction.atomic()``, or another open transaction.

    That would undo the memory of it.
    """


class UnknownTask(ProgrammingError):
    """No task of that name is registered, or the object is not a task."""


class PayloadMismatch(ProgrammingError, TypeError):
    """The stored arguments do not fit the task as this worker knows it: one of the two is older."""


class NotSerializable(ProgrammingError, TypeError):
    """A value would not come back from JSON as it went in."""


class PayloadTooLarge(ProgrammingError, ValueError):
    """An encoded payload or result exceeds its limit in bytes."""


class MaxDepthExceeded(ProgrammingError, RecursionError):
    """A tree of executions is deeper than ``CONDUCTOR["MAX_DEPTH"]``."""


class TooManySteps(ProgrammingError):
    """An execution remembers more than ``CONDUCTOR["MAX_STEPS"]`` steps."""


class TooManyChildren(ProgrammingError, ValueError):
    """``ctx.map`` got more than ``CONDUCTOR["MAX_CHILDREN"]`` payloads."""


class TooManyTags(ProgrammingError, ValueError):
    """A tree of executions would have more than 10 tags."""


class LimitDeadlock(ProgrammingError):
    """A child would wait for a place of a limit that its parent, or one above it, has until it ends."""


class ContextClosed(ProgrammingError):
    """A context was used after its run had ended."""


class WrongThread(ProgrammingError):
    """A context was used in another thread, or in another process, than the one that runs the body."""


class BlockingCallInTask(ProgrammingError):
    """A durable body waited for a result, and so would hold its worker."""


class BlockingCallInEventLoop(ProgrammingError, django_exceptions.SynchronousOnlyOperation):
    """A call that waits for the database was made in a thread in which an event loop runs; nothing was done."""


class WaitInsideTransaction(ProgrammingError):
    """A transaction waited for an execution whose end it can never see: it has created it, or reads a snapshot."""


class NotATestDatabase(ProgrammingError):
    """``testing.drain`` or ``advance`` was called on a database that no test runner has made; nothing was done."""


class IdempotencyConflict(ProgrammingError):
    """An idempotency key belongs to an execution or event with another payload, or to no rerun of this execution."""


# --------------------------------------------------------------------------------------------------- runtime errors


class DuplicateExecution(ConductorError):
    """An open execution of the same task has the unique key; nothing was stored.

    Args:
        message: What happened, and what to do.
        execution_id: Which one.
        status: Where that stands.
    """

    def __init__(self, message: str, *, execution_id: UUID | None = None, status: str = "") -> None:
        super().__init__(message)
        self.execution_id = execution_id
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_duplicate, (type(self), str(self), self.execution_id, self.status))


def _rebuild_duplicate(
    cls: type[DuplicateExecution], message: str, execution_id: UUID | None, status: str
) -> DuplicateExecution:
    return cls(message, execution_id=execution_id, status=status)


class LeaseLost(ConductorError):
    """Another run of this execution has taken over; this one can no longer write."""


class UncleanConnection(ConductorError):
    """A body left a connection in a state in which what is written after it would be lost.

    An ``atomic()`` block that it entered and never left, autocommit that is off, a ``BEGIN`` without its ``COMMIT``, a
    failed transaction, a read-only session. It is rolled back, and the attempt has failed.
    """


class WorkerLost(ConductorError):
    """The process that ran the body died, as often as the execution has attempts."""


class TaskEndedWithoutOutcome(ConductorError):
    """A plain task ended with neither a result nor an error, by raising ``celery.exceptions.Ignore`` for example."""


class ExecutionFailed(ConductorError):
    """Raised by ``api.get_result`` for an execution that failed; ``str()`` is the stored error message."""

    retryable = False


class ExecutionCancelled(ConductorError):
    """Raised by ``api.get_result`` for an execution that was cancelled."""

    retryable = False


class ExecutionFinished(ConductorError):
    """An event was sent to an execution that is final; it is not stored."""

    retryable = False


class ActionRefused(ConductorError):
    """What an operator asked for is impossible for this execution, and nothing was changed; the message says why.

    Args:
        message: What happened, why, and what to do.
        reason: The same in a few words, to count those that were refused for one reason.
        is_elsewhere: Whether the execution is just not where the action takes it from, such as a retry of one that has
            succeeded.
    """

    retryable = False

    def __init__(self, message: str, *, reason: str = "", is_elsewhere: bool = False) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.is_elsewhere = is_elsewhere


class RetryRefused(ActionRefused):
    """An operator's retry is impossible for this execution; the message says which one to retry instead.

    Args:
        message: As for ``ActionRefused``.
        holder_id: The execution that has the unique key by now, if that is why.
        more: As for ``ActionRefused``.
    """

    def __init__(self, message: str, *, holder_id: UUID | None = None, **more: Any) -> None:
        super().__init__(message, **more)
        self.holder_id = holder_id


class RenameRefused(ConductorError):
    """A step cannot be renamed in the executions that are stored; the message says why, and nothing was changed."""

    retryable = False


# ----------------------------------------------------------------------------------------------------- control flow


class ControlFlow(BaseException):
    """Ends a body without an outcome. Never caught by ``except Exception``."""


class SuspendExecution(ControlFlow):
    """The body waits: ``ctx.invoke``, ``ctx.sleep``, ``ctx.wait_for``. The run ends and the worker is free."""


class CancelExecution(ControlFlow):
    """The execution was cancelled; raised in a running body at its next ``ctx`` call."""


class ReleaseExecution(ControlFlow):
    """The worker shuts down, or somebody holds the execution: its run gives it back without using up an attempt."""


class AbandonRun(ControlFlow):
    """The database cannot be reached; the lease will lapse and another worker take over."""


class EndAttempt(ControlFlow):
    """A ``ctx`` call cannot be carried out, and what the body might do about it would not be what a replay does.

    Args:
        error: With what the attempt ends.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class RetryExecution(Exception):
    """What ``ctx.retry`` returns for the body to raise.

    Args:
        exc: The reason, stored as the attempt's error.
        countdown: Seconds until the next attempt; ``None`` takes the task's own delay.
    """

    def __init__(self, exc: BaseException | None = None, countdown: float | None = None) -> None:
        super().__init__(str(exc) if exc is not None else "retry requested")
        self.exc = exc
        self.countdown = countdown


def class_path(cls: type[BaseException]) -> str:
    """Return the name under which an exception's class is stored: its module and its qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class Failure:
    """An exception as it is stored: text only, never a class to import."""

    type: str
    message: str
    traceback: str = ""
    args: tuple[Any, ...] | None = None
    attributes: dict[str, Any] | None = None
    #: Whether ``attributes`` lacks something that JSON cannot hold.
    is_partial: bool = False
    #: What it lacks, as far as it can be told: see ``values.failures``.
    rest: dict[str, Any] | None = None
