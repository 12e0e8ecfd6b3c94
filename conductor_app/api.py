"""What users, the admin and commands may do with executions from outside of a body."""

from __future__ import annotations

import datetime as dt
import functools
import time
import uuid
from typing import Any, Union

from celery import states
from celery.result import AsyncResult

from conductor_app import transitions
from conductor_app.body.names import check_key, check_name
from conductor_app.body.run import current_context
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements
from conductor_app.engine.waiting import check_wait
from conductor_app.exceptions import (
    ActionRefused,
    BlockingCallInTask,
    ExecutionCancelled,
    ExecutionFailed,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import eager
from conductor_app.store.ids import new_root_id
from conductor_app.store.transactions import persist_briefly
from conductor_app.values.arguments import MESSAGE_OPTIONS, check_duration
from conductor_app.values.payloads import dump_options, dumps
from conductor_app.values.texts import shown

#: How an execution may be named: itself, its id, or the ``AsyncResult`` that ``.delay()`` returned.
ExecutionRef = Union[Execution, "AsyncResult[Any]", uuid.UUID, str]

#: What a rerun takes over of Celery's options. Callbacks, chains, chords and groups have had their turn.
_RERUN_OPTIONS = (*MESSAGE_OPTIONS, "headers", "ignore_result", "store_error")
#: Among the options of an execution that a rerun with a key has made: what it is a rerun of.
_RERUN_OF = "rerun_of"

#: How many executions of a tree a call of ``cancel`` ends itself, which a web request waits for.
_CANCELLED_AT_ONCE = 100

#: ``get_result`` asks the database after these pauses, in seconds; the last one repeats.
_POLL_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@eager.outside()
def cancel(execution: ExecutionRef, reason: str = "") -> bool:
    """Cancel an execution and its unfinished descendants.

    Queued and waiting ones are cancelled at once, the first 100 of a tree by this call and the others by a sweeper; a
    running body notices at its next ``ctx`` call. A child that is cancelled raises ``ChildCancelled`` in its parent.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        reason: Stored and shown; at most 1,000 bytes are kept.

    Returns:
        Whether it was still open; ``False`` changes nothing.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    found = find(execution)
    if not isinstance(reason, str):
        raise InvalidArgumentType(f"reason must be str, got {type(reason).__name__}")
    if not transitions.request_cancel(found.pk, reason):
        return False
    # Parents before children, so that no parent is woken for a child's sake. The sweeper finishes what this leaves.
    level, left = [found.pk], _CANCELLED_AT_ONCE
    while level:
        for execution_id in level[:left]:
            transitions.cancel_flagged(execution_id)
        left -= len(level)
        if left <= 0:
            break
        children = Execution.objects.using(database()).filter(parent_id__in=level)
        flagged = children.to_cancel().values_list("pk", flat=True)
        level = persist_briefly(database(), functools.partial(list, flagged))
    return True


@eager.outside()
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
    transitions.reopen(find(execution).pk, before_commit=lambda row: announcements.show(row, states.PENDING))


@eager.outside()
def rerun(execution: ExecutionRef, *, idempotency_key: str | None = None) -> Execution:
    """Start a new execution like a root that has ended: the same task, payload, queue and priority, and nothing done.

    No step is kept, and idempotency keys are new ones, so side effects happen again. The new one has neither the old
    one's ``idempotency_key`` nor its callbacks (``link``, ``link_error``, chain, chord). Inside
    ``transaction.atomic()`` it is created with that transaction.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        idempotency_key: The new one's, unique for its task: a second call with the same key for the same ``execution``
            starts none, and returns the first one's.

    Returns:
        The new execution.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It has not ended, or it is a child, whose result nobody would wait for.
        InvalidArgument: The key is empty, longer than 255 characters, or not printable.
        IdempotencyConflict: The key belongs to an execution that is no rerun of this one.
    """
    if idempotency_key is not None:
        idempotency_key = check_key(idempotency_key, "idempotency_key")
    found = find(execution)
    if found.parent_id is not None:
        raise ActionRefused(
            f"Execution {found.pk} is a child: run again alone, its result would reach nobody. "
            f"Rerun the root {found.root_id} instead.",
            reason="a child: rerun the root",
        )
    if not found.is_final:
        raise ActionRefused(
            f"Execution {found.pk} is {found.status}. Only one that has ended is run again as new; cancel it first.",
            reason="not ended",
            is_elsewhere=True,
        )
    stored = found.get_options()
    kept = {name: stored[name] for name in _RERUN_OPTIONS if name in stored}
    if kept.get("ignore_result") is False or kept.get("store_error"):
        kept["announce"] = True
    if idempotency_key is not None:
        kept[_RERUN_OF] = str(found.pk)
    new = transitions.NewExecution(
        id=new_root_id(),
        task=found.task,
        queue=found.queue,
        payload=found.payload,
        max_attempts=found.max_attempts,
        priority=found.priority,
        idempotency_key=idempotency_key,
        options=dump_options(kept),
    )
    created, is_new = transitions.create(new)
    if not is_new and created.get_options().get(_RERUN_OF) != str(found.pk):
        raise IdempotencyConflict(
            f"The idempotency key {idempotency_key!r} belongs to execution {created.pk} of {created.task}, which is no "
            f"rerun of {found.pk}. Use another key."
        )
    return created


@eager.outside()
def wake(execution: ExecutionRef) -> None:
    """Let an execution go on now that waits for an instant: it sleeps, or is queued for a retry or a countdown.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It waits for no instant.
    """
    transitions.hasten(find(execution).pk)


@eager.outside()
def publish_again(execution: ExecutionRef) -> bool:
    """Publish the message of a queued execution again, if it is due; workers do this by themselves after a while.

    A message too many changes nothing.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.

    Returns:
        Whether the broker took it; ``True`` with ``memory://``, where workers look into the database.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It is not queued, not due, or to be cancelled.
    """
    return transitions.publish_again(find(execution).pk)


@eager.outside()
def send_event(
    execution: ExecutionRef,
    event: str,
    payload: Any = None,
    *,
    id: str | None = None,  # noqa: A002 - the sender's word for it
) -> bool:
    """Send an event to an execution: ``ctx.wait_for`` returns its payload.

    The event is kept if nobody waits for it yet, and taken once; events of one name are taken in the order in which
    they were sent. Inside ``transaction.atomic()`` it is sent with that transaction: roll back, and it never was.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        event: Name of the event.
        payload: JSON, at most ``CONDUCTOR["MAX_PAYLOAD_BYTES"]`` bytes once encoded.
        id: The sender's own id of the event, unique per execution and name of the event: sent again, it changes
            nothing.

    Returns:
        Whether the event is new; ``False`` if one with this ``id`` was sent before.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFinished: It is final and takes no more events.
        IdempotencyConflict: ``id`` was sent with another payload.
        NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
    """
    event = check_name(event, "event name")
    key = None if id is None else check_key(id, "id")
    text = dumps(payload, "payload", conductor_settings().MAX_PAYLOAD_BYTES)
    return transitions.send(find(execution).pk, event, text, key)


def get_result(execution: ExecutionRef, timeout: float | dt.timedelta | None = None) -> Any:
    """Wait for an execution and return its result; needs no result backend.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        timeout: Seconds, or a ``timedelta``, to wait; ``None`` waits without limit, 0 only looks.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFailed: It failed; ``str()`` is its error message.
        ExecutionCancelled: It was cancelled.
        OutcomeLost: It succeeded, and somebody has deleted its result.
        TimeoutError: It is not final after ``timeout`` seconds.
        BlockingCallInTask: The call stands in a durable body.
        WaitInsideTransaction: The current transaction can never see the end: it has created the execution, or reads a
            snapshot.
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
        found = find(execution, patience=_patience(timeout, started))
        if found.status == ExecutionStatus.SUCCEEDED:
            return found.get_result()
        if found.status == ExecutionStatus.FAILED:
            raise ExecutionFailed(found.error_message)
        if found.status == ExecutionStatus.CANCELLED:
            raise ExecutionCancelled(found.error_message)
        check_wait(found, timeout)
        pause = next(pauses, pause)
        if timeout is not None and time.monotonic() + pause - started > timeout:
            raise TimeoutError(
                f"Execution {found.pk} is still {found.status} after {timeout:g}s. It goes on; wait again."
            )
        time.sleep(pause)


def _patience(timeout: float | None, started: float) -> float:
    """Return for how many seconds whoever waits for a result waits for the database, too."""
    longest = conductor_settings().LEASE_SECONDS
    return longest if timeout is None else min(started + timeout - time.monotonic(), longest)


def find(execution: ExecutionRef, *, patience: float = 0) -> Execution:
    """Return an execution as it is stored now.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        patience: Seconds to wait for a database that is away, if that is longer than a new connection takes.

    Raises:
        Execution.DoesNotExist: There is none.
        InvalidArgument: It is no UUID.
    """
    if isinstance(execution, Execution):
        key: Any = execution.pk
    elif isinstance(execution, AsyncResult):
        # Of several calls with one id, the result of a call knows its own execution.
        key = getattr(execution, "execution_id", execution.id)
    else:
        key = execution
    if not isinstance(key, uuid.UUID):
        try:
            key = uuid.UUID(str(key))
        except ValueError:
            raise InvalidArgument(f"an execution is named by a UUID, got {shown(key)}") from None
    rows = Execution.objects.using(database()).filter(pk=key)
    found = persist_briefly(database(), rows.first, patience=patience)
    if found is None:
        raise Execution.DoesNotExist(
            f"There is no execution {key}. Was its transaction rolled back, or has it been pruned?"
        )
    return found
