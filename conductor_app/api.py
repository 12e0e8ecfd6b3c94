"""What users, the admin and commands may do with executions from outside of a body."""

from __future__ import annotations

import datetime as dt
import functools
import time
import uuid
from collections.abc import Mapping
from typing import Any, Union

from celery import Task, current_app
from celery.result import AsyncResult

from conductor_app import transitions
from conductor_app.body.names import check_key, check_name, check_recorded_name
from conductor_app.body.run import current_context
from conductor_app.conf import conductor_settings
from conductor_app.engine import acting, awaiting, schedules
from conductor_app.engine.waiting import PAUSES, check_wait, late, missing, result_of
from conductor_app.exceptions import (
    BlockingCallInTask,
    InvalidArgument,
    InvalidArgumentType,
    UnknownTask,
)
from conductor_app.models import Execution, database
from conductor_app.states import OperationKind
from conductor_app.store import eager
from conductor_app.store.event_loops import check_none_runs, twin
from conductor_app.store.ids import new_root_id
from conductor_app.store.transactions import persist_briefly
from conductor_app.telling.state import read_state
from conductor_app.transitions import operating
from conductor_app.values.arguments import check_duration
from conductor_app.values.payloads import dumps
from conductor_app.values.state import ExecutionState as ExecutionState  # noqa: PLC0414 - for users to name
from conductor_app.values.tags import check_changes
from conductor_app.values.texts import shown

#: How an execution may be named: itself, its id, or the ``AsyncResult`` that ``.delay()`` returned.
ExecutionRef = Union[Execution, "AsyncResult[Any]", uuid.UUID, str]

#: How a task may be named: itself, or its name.
TaskRef = Union["Task[Any, Any]", str]

#: How many executions of a tree a call of ``cancel`` ends itself, which a web request waits for.
_CANCELLED_AT_ONCE = 100


@eager.outside()
def cancel(execution: ExecutionRef, reason: str = "", *, actor: str = "") -> bool:
    """Cancel an execution and its unfinished descendants.

    Queued and waiting ones are cancelled at once, the first 100 of a tree by this call and the others by a sweeper; a
    running body notices at its next ``ctx`` call. A child that is cancelled raises ``ChildCancelled`` in its parent.
    With more than 1,000 unfinished children none of them starts any more when the call returns, and a sweeper ends it
    and them: its status is ``cancelled`` some seconds later.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        reason: Stored and shown; at most 1,000 bytes are kept.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.

    Returns:
        Whether it was still open; ``False`` changes nothing.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    check_none_runs("api.cancel", "`await api.acancel(…)`")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    if not operating.noted(
        OperationKind.CANCEL, found.pk, by, lambda note: acting.cancel(found.pk, reason or by.reason, note)
    ):
        return False
    if transitions.flag_many_children(found.pk):
        return True
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
def retry(execution: ExecutionRef, *, actor: str = "", reason: str = "") -> None:
    """Run a failed or cancelled root execution again from what failed.

    Every finished step keeps its result. Failed children run again, from the deepest one on, and their results flow
    back up to the root. Attempts are counted anew.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Raises:
        Execution.DoesNotExist: There is none.
        RetryRefused: It is not failed or cancelled, or held, it is a child whose parent has seen the outcome, or its
            unique key belongs to another open execution by now (``holder_id``).
    """
    check_none_runs("api.retry", "`await api.aretry(…)`")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    operating.noted(OperationKind.RETRY, found.pk, by, lambda note: acting.retry(found.pk, note))


@eager.outside()
def rerun(
    execution: ExecutionRef, *, idempotency_key: str | None = None, actor: str = "", reason: str = ""
) -> Execution:
    """Start a new execution like a root that has ended: the same task, payload, queue, priority and tags.

    No step is kept, and idempotency keys are new ones, so side effects happen again. The new one has neither the old
    one's ``idempotency_key`` nor its callbacks (``link``, ``link_error``, chain, chord). It has its unique key. Inside
    ``transaction.atomic()`` it is created with that transaction.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        idempotency_key: The new one's, unique for its task: a second call with the same key for the same ``execution``
            starts none, and returns the first one's.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        The new execution.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It has not ended, it is a child, whose result nobody would wait for, or another open execution
            has its unique key.
        InvalidArgument: The key is empty, longer than 255 characters, or not printable.
        IdempotencyConflict: The key belongs to an execution that is no rerun of this one.
    """
    check_none_runs("api.rerun", "`await sync_to_async(api.rerun)(…)`")
    if idempotency_key is not None:
        idempotency_key = check_key(idempotency_key, "idempotency_key")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    new_id = new_root_id()
    return operating.noted(
        OperationKind.RERUN, found.pk, by, lambda note: acting.rerun(found, idempotency_key, note, new_id)
    )


@eager.outside()
def fork(
    execution: ExecutionRef,
    before: str,
    payload: object = None,
    *,
    idempotency_key: str | None = None,
    actor: str = "",
    reason: str = "",
) -> Execution:
    """Run a root that has ended again from a step: a new execution that remembers what was recorded before it.

    The outcomes of the steps that stand before ``before`` are copied, with the results and failures of their children,
    so that the fork needs nothing of its source; all others run again. Steps are in the order in which they were
    opened, those of ``ctx.start`` when they started their child. What a retry of the source would take up again is
    never copied: the failure that ended it, and what only its cancellation has decided.

    Idempotency keys are new ones, so side effects of what runs again happen again. Queue, priority and tags are kept,
    and neither the source's ``idempotency_key``, nor its callbacks, nor events that no step had taken. Inside
    ``transaction.atomic()`` it is created with that transaction.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        before: Name of the first step that runs again. The source has recorded it.
        payload: As ``ctx.invoke`` takes it: a mapping, the task's keyword arguments; anything else is its only
            argument. ``None`` keeps that of the source. What was copied stays as it was recorded.
        idempotency_key: The new one's, unique for its task: a second call with the same key for the same
            ``execution``, step and payload starts none, and returns the first one's.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the history of both.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        The new execution.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It has not ended, or it is a child; it has recorded no such step; a child that it had started
            before that step still runs; or the outcome of a step before it is gone.
        InvalidArgument, InvalidArgumentType: ``before`` is no text or empty, the key cannot be stored, or the payload
            does not fit the task.
        UnknownTask: There is a payload, and this process knows no such task.
        NotSerializable, PayloadTooLarge, TooManyTags: Nothing is stored.
        IdempotencyConflict: The key belongs to an execution that is no such fork.
    """
    before = check_recorded_name(before, "before")
    if idempotency_key is not None:
        idempotency_key = check_key(idempotency_key, "idempotency_key")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    forked = acting.Forked(new_root_id(), before, payload, idempotency_key)
    return operating.noted(OperationKind.FORK, found.pk, by, lambda note: acting.fork(found.pk, forked, note))


@eager.outside()
def wake(execution: ExecutionRef, *, actor: str = "", reason: str = "") -> None:
    """Let an execution go on now that waits for an instant: it sleeps, or is queued for a retry or a countdown.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It waits for no instant, or it is held.
    """
    check_none_runs("api.wake", "`await sync_to_async(api.wake)(…)`")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    operating.noted(OperationKind.WAKE, found.pk, by, lambda note: acting.wake(found.pk, note))


@eager.outside()
def hold(execution: ExecutionRef, reason: str, tree: bool = True, *, actor: str = "") -> bool:
    """Hold an execution: no run of it begins until ``release``.

    A queued one is not started. One that waits is told of its children's ends, events and timeouts as ever, and goes on
    after the release. A running body ends at its next ``ctx`` call, as when its worker shuts down: no attempt is used
    up, and no recorded step is run again. Timeouts, Celery's ``expires`` and cancels go on.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        reason: Why; shown wherever the execution is. At most 1,000 bytes are kept.
        tree: Whether to hold all below it, too, and what a running body would still start.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.

    Returns:
        Whether anything is held that was not; ``False`` changes nothing, the reason of the first hold included.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It is final.
        InvalidArgument, InvalidArgumentType: There is no reason, or it or the actor cannot be stored. Nothing is held.
    """
    by = operating.by_whom(actor, reason)
    reason = _must_have_reason(reason or by.reason)
    found = find(execution)
    return operating.noted(
        OperationKind.HOLD, found.pk, by, lambda note: acting.hold(found.pk, reason, by.actor, tree, note)
    )


@eager.outside()
def release(execution: ExecutionRef, *, actor: str = "", reason: str = "") -> bool:
    """Let an execution go on that is held, and all below it that was held with it.

    What is due meanwhile is started: the first messages are published by this call, and the others by the workers.
    What was held below it by another call stays held.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        Whether it was held; ``False`` changes nothing.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    by = operating.by_whom(actor, reason)
    found = find(execution)
    return operating.noted(OperationKind.RELEASE, found.pk, by, lambda note: acting.release(found.pk, note))


@eager.outside()
def pause(task: TaskRef, reason: str, *, actor: str = "") -> bool:
    """Pause a task: no run of it begins until ``unpause``, neither a first one nor a retry nor one that goes on.

    Runs that have begun go on to their end or their next wait. New executions are stored as ever, and stay queued.
    Timeouts, Celery's ``expires`` and cancels go on.

    Args:
        task: The task, or its name; a plain Celery task's, too.
        reason: Why; shown wherever its executions are. At most 1,000 bytes are kept.
        actor: Who asks for it, at most 150 characters.

    Returns:
        Whether it was not paused before; ``False`` changes nothing.

    Raises:
        UnknownTask: No task of this name is registered in this process, and none of its executions is stored.
        InvalidArgument, InvalidArgumentType: There is no reason, or it or the actor cannot be stored.
    """
    by = operating.by_whom(actor, reason)
    reason = _must_have_reason(reason or by.reason)
    name = _name_of(task)
    if name not in current_app.tasks and not Execution.objects.using(database()).filter(task=name).exists():
        raise UnknownTask(
            f"There is no task {shown(name)} to pause: it is not registered here, and no execution of it is stored. "
            "Check its full name, such as shop.tasks.charge."
        )
    return transitions.pause(name, reason, by.actor)


@eager.outside()
def unpause(task: TaskRef) -> bool:
    """Let runs of a paused task begin again; workers start what is queued, in its order.

    Args:
        task: The task, or its name.

    Returns:
        Whether it was paused.
    """
    return transitions.unpause(_name_of(task))


def _must_have_reason(reason: str) -> str:
    if not reason.strip():
        raise InvalidArgument("reason is empty. Say why, for whoever finds it: it is shown wherever the execution is.")
    return reason


def _name_of(task: TaskRef) -> str:
    name = task if isinstance(task, str) else getattr(task, "name", None)
    if not isinstance(name, str):
        raise InvalidArgumentType(f"task must be a task or its name, got {type(task).__name__}")
    return check_key(name, "task")


@eager.outside()
def publish_again(execution: ExecutionRef, *, actor: str = "", reason: str = "") -> bool:
    """Publish the message of a queued execution again, if it is due; workers do this by themselves after a while.

    A message too many changes nothing.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        actor: Who asks for it, at most 150 characters; kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        Whether the broker took it; ``True`` with ``memory://``, where workers look into the database.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It is not queued, not due, held, of a paused task, or to be cancelled.
    """
    check_none_runs("api.publish_again", "`await sync_to_async(api.publish_again)(…)`")
    by = operating.by_whom(actor, reason)
    found = find(execution)
    is_taken = transitions.publish_again(found.pk)
    if is_taken:
        operating.note_done(OperationKind.PUBLISH, found.pk, by)
    return is_taken


@eager.outside()
def send_event(
    execution: ExecutionRef,
    event: str,
    payload: Any = None,
    *,
    id: str | None = None,  # noqa: A002 - the sender's word for it
    actor: str = "",
    reason: str = "",
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
        actor: Who sends it, if a person does: that is kept with the reason, and shown in the execution's history.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        Whether the event is new; ``False`` if one with this ``id`` was sent before.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFinished: It is final and takes no more events.
        IdempotencyConflict: ``id`` was sent with another payload.
        NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
    """
    check_none_runs("api.send_event", "`await api.asend_event(…)`")
    event = check_name(event, "event name")
    key = None if id is None else check_key(id, "id")
    text = dumps(payload, "payload", conductor_settings().MAX_PAYLOAD_BYTES)
    by = operating.by_whom(actor, reason)
    found = find(execution)
    if not by.is_named:
        # Programs send events, thousands of them.
        return transitions.send(found.pk, event, text, key)

    def send(note: acting.Note) -> bool:
        is_new = transitions.send(found.pk, event, text, key)
        if is_new:
            note()
        return is_new

    return operating.noted(OperationKind.SEND, found.pk, by, send)


@eager.outside()
def tag(execution: ExecutionRef, tags: Mapping[str, str | None]) -> None:
    """Tag the tree of an execution, for people to find it by; the last value of a key counts.

    Inside ``transaction.atomic()`` it is tagged with that transaction.

    Args:
        execution: Any execution of the tree, its id, or its ``AsyncResult``.
        tags: Values by their keys; ``None`` removes a key. At most 10 in a tree, with at most 64 characters for a key,
            none of them ``:`` or ``=``, and 128 for a value. Nothing is converted to text.

    Raises:
        Execution.DoesNotExist: There is none.
        InvalidArgument, InvalidArgumentType: A key or a value cannot be stored. Nothing is stored.
        TooManyTags: The tree would have more than 10. Nothing is stored.
    """
    check_none_runs("api.tag", "`await sync_to_async(api.tag)(…)`")
    changes = check_changes(tags)
    transitions.tag(find(execution).root_id, changes)


def get_tags(execution: ExecutionRef) -> dict[str, str]:
    """Return the tags of the tree of an execution.

    Args:
        execution: Any execution of the tree, its id, or its ``AsyncResult``.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    check_none_runs("api.get_tags", "`await sync_to_async(api.get_tags)(…)`")
    root_id = find(execution).root_id
    return persist_briefly(database(), functools.partial(transitions.tags_of, root_id))


@eager.outside()
def pause_schedule(name: str, *, actor: str = "", reason: str = "") -> bool:
    """Let a schedule start nothing by itself until ``unpause_schedule``; what it has started goes on.

    Args:
        name: The schedule's: its task's name, unless the decorator says ``schedule="…"``.
        actor: Who asks for it, at most 150 characters; kept and shown with the reason.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        Whether it was not paused before; ``False`` changes nothing.

    Raises:
        Schedule.DoesNotExist: There is none; a worker that has it in its code stores it.
    """
    return schedules.pause(name, operating.by_whom(actor, reason))


@eager.outside()
def unpause_schedule(name: str) -> bool:
    """Let a paused schedule go on with the instants that come. What came meanwhile is not made up for.

    Args:
        name: The schedule's.

    Returns:
        Whether it was paused; ``False`` changes nothing.

    Raises:
        Schedule.DoesNotExist: There is none.
    """
    return schedules.unpause(name)


@eager.outside()
def run_schedule(name: str, *, actor: str = "", reason: str = "") -> Execution | None:
    """Start a schedule's task now, paused or not; its next instant stays as it is.

    Its overlap counts: with ``"skip"`` nothing is started beside an open execution, with ``"replace"`` that one is
    cancelled first. ``ctx.scheduled_at`` is now.

    Args:
        name: The schedule's.
        actor: Who asks for it, at most 150 characters; kept and shown with the reason.
        reason: Why; at most 1,000 bytes are kept.

    Returns:
        The execution; ``None`` if it starts when the open one has ended.

    Raises:
        Schedule.DoesNotExist: There is none.
        ActionRefused: An earlier execution is open, or this process does not have the task in its code.
    """
    return schedules.run_now(name, operating.by_whom(actor, reason))


def state(execution: ExecutionRef) -> ExecutionState:
    """Return how an execution stands, and what its body has told by ``ctx.progress`` and ``ctx.publish``; for a page.

    While it waits for the children of a ``ctx.map`` or a ``ctx.gather``, ``children`` says how many have ended; so do
    ``done`` and ``total``, if the body has told no progress of its own. Two short queries.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.

    Returns:
        ``as_dict()`` of it is JSON. Who may see it, is the caller's to decide: nothing is masked.

    Raises:
        Execution.DoesNotExist: There is none.
        InvalidArgument: It is no UUID.
    """
    check_none_runs("api.state", "`await api.astate(…)`")
    key = _key_of(execution)
    found = persist_briefly(database(), functools.partial(read_state, key))
    if found is None:
        raise missing(key)
    return found


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
    check_none_runs("api.get_result", "`await api.aget_result(…)`")
    seconds = _check_wait_from_outside("api.get_result", timeout)
    started = time.monotonic()
    pauses = iter(PAUSES)
    pause = PAUSES[0]
    while True:
        found = find(execution, patience=_patience(seconds, started))
        if found.is_final:
            return result_of(found)
        check_wait(found, seconds)
        pause = next(pauses, pause)
        if seconds is not None and time.monotonic() + pause - started > seconds:
            raise late(found, seconds)
        time.sleep(pause)


async def aget_result(execution: ExecutionRef, timeout: float | dt.timedelta | None = None) -> Any:
    """Do as ``get_result`` in an event loop, which goes on meanwhile; no thread is held.

    All who wait in one event loop share the queries. Whoever is cancelled leaves nothing behind.

    Args and errors: as for ``get_result``.
    """
    seconds = _check_wait_from_outside("api.aget_result", timeout)
    return await awaiting.result(_key_of(execution), seconds)


def _check_wait_from_outside(call: str, timeout: float | dt.timedelta | None) -> float | None:
    """Return the seconds of a timeout; refuse to wait in a durable body."""
    if current_context.get() is not None:
        raise BlockingCallInTask(
            f"{call} inside a durable body would hold the worker. Use ctx.invoke to wait for a child."
        )
    return None if timeout is None else check_duration(timeout, "timeout")


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
    check_none_runs("api.find", "`await api.afind(…)`")
    key = _key_of(execution)
    rows = Execution.objects.using(database()).filter(pk=key)
    found = persist_briefly(database(), rows.first, patience=patience)
    if found is None:
        raise missing(key)
    return found


def _key_of(execution: ExecutionRef) -> uuid.UUID:
    if isinstance(execution, Execution):
        key: Any = execution.pk
    elif isinstance(execution, AsyncResult):
        # Of several calls with one id, the result of a call knows its own execution.
        key = getattr(execution, "execution_id", None) or execution.id
    else:
        key = execution
    if not isinstance(key, uuid.UUID):
        try:
            return uuid.UUID(str(key))
        except ValueError:
            raise InvalidArgument(f"an execution is named by a UUID, got {shown(key)}") from None
    return key


acancel = twin(cancel)
aretry = twin(retry)
asend_event = twin(send_event)
afind = twin(find)
astate = twin(state)
