"""What users, the admin and commands may do with executions from outside of a body."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from typing import Any, Union

from celery import states
from celery.result import AsyncResult

from conductor_app import announcements, transitions
from conductor_app.context import check_duration, current_context
from conductor_app.exceptions import (
    BlockingCallInTask,
    ExecutionCancelled,
    ExecutionFailed,
    InvalidArgument,
    InvalidArgumentType,
)
from conductor_app.models import Execution, database
from conductor_app.serialization import shown
from conductor_app.states import ExecutionStatus

#: How an execution may be named: itself, its id, or the ``AsyncResult`` that ``.delay()`` returned.
ExecutionRef = Union[Execution, "AsyncResult[Any]", uuid.UUID, str]

#: ``get_result`` asks the database after these pauses, in seconds; the last one repeats.
_POLL_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def cancel(execution: ExecutionRef, reason: str = "") -> bool:
    """Cancel an execution and its unfinished descendants.

    Queued and waiting ones are cancelled at once; a running body notices at its next ``ctx`` call. A child that is
    cancelled raises ``ChildCancelled`` in its parent.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        reason: Stored and shown; at most 1,000 bytes are kept.

    Returns:
        Whether it was still open; ``False`` changes nothing.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    found = _find(execution)
    if not isinstance(reason, str):
        raise InvalidArgumentType(f"reason must be str, got {type(reason).__name__}")
    if not transitions.request_cancel(found.pk, reason):
        return False
    # Parents before children, so that no parent is woken for a child's sake. The sweeper finishes what this leaves.
    level = [found.pk]
    while level:
        for execution_id in level:
            transitions.cancel_flagged(execution_id)
        flagged = Execution.objects.using(database()).filter(parent_id__in=level).to_cancel()
        level = list(flagged.values_list("pk", flat=True))
    return True


def retry(execution: ExecutionRef) -> None:
    """Run a failed or cancelled root execution again from what failed.

    Every finished step keeps its result. Failed children run again, from the deepest one on, and their results flow
    back up to the root. Attempts are counted anew.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.

    Raises:
        Execution.DoesNotExist: There is none.
        RetryRefused: It is not failed or cancelled, or it is a child whose parent has seen the outcome.
    """
    transitions.reopen(_find(execution).pk, before_commit=lambda row: announcements.show(row, states.PENDING))


def get_result(execution: ExecutionRef, timeout: float | dt.timedelta | None = None) -> Any:
    """Wait for an execution and return its result; needs no result backend.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        timeout: Seconds, or a ``timedelta``, to wait; ``None`` waits without limit, 0 only looks.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFailed: It failed; ``str()`` is its error message.
        ExecutionCancelled: It was cancelled.
        TimeoutError: It is not final after ``timeout`` seconds.
        BlockingCallInTask: The call stands in a durable body.
    """
    if current_context.get() is not None:
        raise BlockingCallInTask(
            "api.get_result inside a durable body would hold the worker. Use ctx.invoke to wait for a child."
        )
    if timeout is not None:
        timeout = check_duration(timeout, "timeout")
    started = time.monotonic()
    pauses = iter(_POLL_PAUSES)
    pause = _POLL_PAUSES[0]
    while True:
        found = _find(execution)
        if found.status == ExecutionStatus.SUCCEEDED:
            return found.get_result()
        if found.status == ExecutionStatus.FAILED:
            raise ExecutionFailed(found.error_message)
        if found.status == ExecutionStatus.CANCELLED:
            raise ExecutionCancelled(found.error_message)
        pause = next(pauses, pause)
        if timeout is not None and time.monotonic() + pause - started > timeout:
            raise TimeoutError(
                f"Execution {found.pk} is still {found.status} after {timeout:g}s. It goes on; wait again."
            )
        time.sleep(pause)


def _find(execution: ExecutionRef) -> Execution:
    if isinstance(execution, Execution):
        key: Any = execution.pk
    elif isinstance(execution, AsyncResult):
        key = execution.id
    else:
        key = execution
    if not isinstance(key, uuid.UUID):
        try:
            key = uuid.UUID(str(key))
        except ValueError:
            raise InvalidArgument(f"an execution is named by a UUID, got {shown(key)}") from None
    found = Execution.objects.using(database()).filter(pk=key).first()
    if found is None:
        raise Execution.DoesNotExist(
            f"There is no execution {key}. Was its transaction rolled back, or has it been pruned?"
        )
    return found
