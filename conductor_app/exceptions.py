"""Every error that ``conductor_app`` raises, and the control flow that is not an error.

::

    ConductorError
    ├── ChildError                     what a child's outcome raises in its parent
    │   ├── ChildFailed
    │   ├── ChildTimedOut              also a builtin TimeoutError
    │   └── ChildCancelled
    ├── StepFailed                     a remembered failure whose class is gone
    ├── ProgrammingError               the code has to change, so a retry would not help
    │   ├── InvalidArgument            also a builtin ValueError
    │   ├── InvalidArgumentType        also a builtin TypeError
    │   ├── StepNameReused, StepMismatch, NestedDurableCall, InvokeInsideTransaction
    │   ├── UnknownTask, NotSerializable, PayloadTooLarge, MaxDepthExceeded, TooManySteps
    │   ├── ContextClosed, WrongThread, BlockingCallInTask
    │   └── IdempotencyConflict
    ├── LeaseLost                      another run took over
    ├── ExecutionFailed, ExecutionCancelled, RetryRefused          raised outside of a body
    └── WorkerLost                     recorded when the process that ran a body died

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


class ContextClosed(ProgrammingError):
    """A context was used after its run had ended."""


class WrongThread(ProgrammingError):
    """A context was used in another thread than the one that runs the body."""


class BlockingCallInTask(ProgrammingError):
    """A durable body waited for a result, and so would hold its worker."""


class IdempotencyConflict(ProgrammingError):
    """An idempotency key belongs to an execution with another payload."""


# --------------------------------------------------------------------------------------------------- runtime errors


class LeaseLost(ConductorError):
    """Another run of this execution has taken over; this one can no longer write."""


class WorkerLost(ConductorError):
    """The process that ran the body died, as often as the execution has attempts."""


class ExecutionFailed(ConductorError):
    """Raised by ``api.get_result`` for an execution that failed; ``str()`` is the stored error message."""

    retryable = False


class ExecutionCancelled(ConductorError):
    """Raised by ``api.get_result`` for an execution that was cancelled."""

    retryable = False


class RetryRefused(ConductorError):
    """An operator's retry is impossible for this execution; the message says which one to retry instead."""

    retryable = False


# ----------------------------------------------------------------------------------------------------- control flow


class ControlFlow(BaseException):
    """Ends a body without an outcome. Never caught by ``except Exception``."""


class SuspendExecution(ControlFlow):
    """The body waits: ``ctx.invoke``, ``ctx.sleep``. The run ends and the worker is free."""


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
