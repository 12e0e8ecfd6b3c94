"""Every error that ``conductor_app`` raises, and the control flow that is not an error.

::

    ConductorError
    ├── ChildError                     what a child's outcome raises in its parent
    │   ├── ChildFailed
    │   ├── ChildTimedOut              also a builtin TimeoutError
    │   └── ChildCancelled
    ├── EventTimedOut                  an event did not come in time; also a builtin TimeoutError
    ├── StepFailed                     a remembered failure whose class is gone
    ├── ProgrammingError               the code has to change, so a retry would not help
    │   ├── InvalidArgument            also a builtin ValueError
    │   ├── InvalidArgumentType        also a builtin TypeError
    │   ├── StepNameReused, StepMismatch, NestedDurableCall, InvokeInsideTransaction
    │   ├── UnknownTask, NotSerializable, PayloadTooLarge, MaxDepthExceeded, TooManySteps,
    │   ├── TooManyChildren
    │   ├── ContextClosed, WrongThread, BlockingCallInTask
    │   └── IdempotencyConflict
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
    """A durable call was made inside ``transaction.atomic()``, which would undo the memory of it."""


class UnknownTask(ProgrammingError):
    """No task of that name is registered, or the object is not a task."""


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


class ContextClosed(ProgrammingError):
    """A context was used after its run had ended."""


class WrongThread(ProgrammingError):
    """A context was used in another thread than the one that runs the body."""


class BlockingCallInTask(ProgrammingError):
    """A durable body waited for a result, and so would hold its worker."""


class IdempotencyConflict(ProgrammingError):
    """An idempotency key belongs to an execution, or to an event, with another payload."""


# --------------------------------------------------------------------------------------------------- runtime errors


class LeaseLost(ConductorError):
    """Another run of this execution has taken over; this one can no longer write."""


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
    """An operator's retry is impossible for this execution; the message says which one to retry instead."""


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
    """The worker shuts down: ``ctx.checkpoint`` gives the execution back without using up an attempt."""


class AbandonRun(ControlFlow):
    """The database cannot be reached; the lease will lapse and another worker take over."""


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
