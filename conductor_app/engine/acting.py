"""What somebody may have done to an execution: asked for of one alone, or of many, of which the sweeper does each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from celery import states

from conductor_app import transitions
from conductor_app.body.children import resolve_child
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements
from conductor_app.exceptions import ActionRefused, DuplicateExecution, IdempotencyConflict
from conductor_app.models import Execution, Fork, OperationItem, database
from conductor_app.states import ItemState, OnConflict, OperationKind
from conductor_app.store.errors import is_conflict, is_lock_refused, is_outage, is_passing
from conductor_app.store.ids import new_root_id
from conductor_app.store.locks import RowsLocked
from conductor_app.transitions import forking, guards, operating
from conductor_app.values.arguments import MESSAGE_OPTIONS
from conductor_app.values.payloads import dump_options, loads
from conductor_app.values.tags import check_number
from conductor_app.values.uniqueness import Unique

logger = logging.getLogger("conductor_app.engine.sweeper")

#: What a rerun and a fork take over of Celery's options. Callbacks, chains, chords and groups have had their turn.
_RERUN_OPTIONS = (*MESSAGE_OPTIONS, "headers", "ignore_result", "store_error", "scheduled_at")
#: Among the options of an execution that a rerun with a key has made: what it is a rerun of.
_RERUN_OF = "rerun_of"

#: Tells that something was changed, and what was started.
Note = Callable[..., None]


def retry(execution_id: uuid.UUID, note: Note) -> None:
    """Reopen an execution, and let Celery's result backend forget its end.

    Raises:
        RetryRefused: It is not failed or cancelled, or it is a child whose parent has seen the outcome.
    """
    transitions.reopen(execution_id, before_commit=lambda row: announcements.show(row, states.PENDING))
    note()


def wake(execution_id: uuid.UUID, note: Note) -> None:
    """Let an execution go on that waits for an instant.

    Raises:
        ActionRefused: It waits for none.
    """
    transitions.hasten(execution_id)
    note()


def cancel(execution_id: uuid.UUID, reason: str, note: Note) -> bool:
    """Ask for the end of an execution; tell whether it is open."""
    return transitions.request_cancel(execution_id, reason, note)


def hold(execution_id: uuid.UUID, reason: str, by: str, tree: bool, note: Note) -> bool:
    """Let no run of an execution begin; tell whether that is new.

    Raises:
        ActionRefused: It is final.
    """
    return transitions.hold(execution_id, reason, by, tree=tree, note=note)


def release(execution_id: uuid.UUID, note: Note) -> bool:
    """Let an execution go on that is held; tell whether it was."""
    return transitions.release_held(execution_id, note=note)


def rerun(found: Execution, idempotency_key: str | None, note: Note, new_id: uuid.UUID) -> Execution:
    """Start a new execution like one that has ended.

    Args:
        new_id: Its id; one for all tries, so that a repetition after a lost COMMIT finds what it has stored.

    Raises:
        ActionRefused: It has not ended, it is a child, whose result nobody would wait for, or another open execution
            has its unique key.
        IdempotencyConflict: The key belongs to an execution that is no rerun of this one.
    """
    _must_have_ended(found, "Rerun")
    new = _like(found, new_id, idempotency_key, **({} if idempotency_key is None else {_RERUN_OF: str(found.pk)}))
    with _key_must_be_free(found.pk):
        created, is_new = transitions.create(new)
    if created.pk != new_id and created.get_options().get(_RERUN_OF) != str(found.pk):
        raise IdempotencyConflict(
            f"The idempotency key {idempotency_key!r} belongs to execution {created.pk} of {created.task}, which is no "
            f"rerun of {found.pk}. Use another key."
        )
    if is_new:
        note(created=created.pk)
    return created


@contextlib.contextmanager
def _key_must_be_free(execution_id: uuid.UUID) -> Iterator[None]:
    """Refuse to run an execution again while another one has its unique key.

    Raises:
        ActionRefused: One has.
    """
    try:
        yield
    except DuplicateExecution as error:
        raise ActionRefused(
            f"Execution {execution_id} is not run again as new. {error} Wait for its end or cancel it, and do it then.",
            reason="its unique key belongs to another execution",
        ) from error


def _must_have_ended(found: Execution, verb: str) -> None:
    """Refuse what is no root that has ended.

    Raises:
        ActionRefused: It is not.
    """
    if found.parent_id is not None:
        raise ActionRefused(
            f"Execution {found.pk} is a child: run again alone, its result would reach nobody. "
            f"{verb} the root {found.root_id} instead.",
            reason=f"a child: {verb.lower()} the root",
        )
    if not found.is_final:
        raise ActionRefused(
            f"Execution {found.pk} is {found.status}. Only one that has ended is run again as new; cancel it first.",
            reason="not ended",
            is_elsewhere=True,
        )


def _like(found: Execution, new_id: uuid.UUID, idempotency_key: str | None, **marks: Any) -> transitions.NewExecution:
    """Return a new execution like one that has ended, with more options that say what it is."""
    stored = found.get_options()
    kept = {name: stored[name] for name in _RERUN_OPTIONS if name in stored}
    if kept.get("ignore_result") is False or kept.get("store_error"):
        kept["announce"] = True
    if found.own_key is not None:
        kept["unique"] = found.own_key
    # As much time as the old one had by its task. A deadline of the call's own was that call's.
    if found.max_duration is not None:
        kept["max_duration"] = found.max_duration
    return transitions.NewExecution(
        id=new_id,
        task=found.task,
        queue=found.queue,
        payload=found.payload,
        max_attempts=found.max_attempts,
        priority=found.priority,
        max_duration=found.max_duration,
        idempotency_key=idempotency_key,
        unique=None if found.own_key is None else Unique(found.own_key, OnConflict.REFUSE),
        options=dump_options({**kept, **marks}),
        tags=guards.persist_briefly(functools.partial(transitions.tags_of, found.pk)),
    )


@dataclass(frozen=True)
class Forked:
    """What a fork is to be, as the caller says."""

    #: Its id; one for all tries, so that a repetition after a lost COMMIT finds what it has stored.
    id: uuid.UUID
    before: str
    #: ``None`` keeps that of its source.
    payload: object
    idempotency_key: str | None


def fork_plan(found: Execution, before: str, payload: object = None) -> forking.Plan:
    """Return what a fork would keep of an execution; nothing is stored.

    Raises:
        ActionRefused, UnknownTask, InvalidArgumentType, NotSerializable, PayloadTooLarge, TooManyTags: As ``fork``.
    """
    _must_have_ended(found, "Fork")
    if payload is not None:
        _with_payload(_like(found, found.pk, None), payload)
    return guards.persist_briefly(lambda: forking.plan(found, before))


def fork(source_id: uuid.UUID, forked: Forked, note: Note) -> Execution:
    """Start a new execution like one that has ended, with copies of the steps that it recorded before another one.

    Raises:
        Execution.DoesNotExist: There is no source.
        ActionRefused: It has not ended, it is a child, it cannot be forked before that step, or another open execution
            has its unique key.
        UnknownTask, InvalidArgumentType, NotSerializable, PayloadTooLarge, TooManyTags: The payload is none of its
            task.
        IdempotencyConflict: The key belongs to an execution that is no such fork.
    """
    wanted: list[transitions.NewExecution] = []

    def new(source: Execution) -> transitions.NewExecution:
        _must_have_ended(source, "Fork")
        about = _like(source, forked.id, forked.idempotency_key, forked=True)
        if forked.payload is not None:
            about = _with_payload(about, forked.payload)
        wanted[:] = [about]
        return about

    with _key_must_be_free(source_id):
        created, is_new = forking.fork(source_id, forked.before, new)
    if is_new:
        note(created=created.pk)
    elif not _is_same_fork(created, source_id, forked.before, wanted[0].payload):
        raise IdempotencyConflict(
            f"The idempotency key {forked.idempotency_key!r} belongs to execution {created.pk} of {created.task}, "
            f"which is no fork of {source_id} before {forked.before!r} with this payload. Use another key."
        )
    return created


def _with_payload(about: transitions.NewExecution, payload: object) -> transitions.NewExecution:
    """Return a new execution with another payload, checked as ``apply_async`` does; what tags come from it, too."""
    what = f"payload of {about.task}"
    invocable, args, kwargs, _ = resolve_child(about.task, payload, "api.fork()")
    checked = invocable.new_execution(args, kwargs, {"queue": about.queue}, what=what)
    tags = {**about.tags, **checked.tags}
    check_number(tags, "the tags of its source and of its payload together")
    about = dataclasses.replace(about, payload=checked.payload, tags=tags)
    if checked.unique is None:
        return about
    # Its key is the payload's.
    options = dump_options({**Execution(options=about.options).get_options(), "unique": checked.unique.key})
    return dataclasses.replace(about, unique=Unique(checked.unique.key, OnConflict.REFUSE), options=options)


def _is_same_fork(created: Execution, source_id: uuid.UUID, before: str, payload: str) -> bool:
    forks = Fork.objects.using(database()).filter(execution_id=created.pk, forked_from_id=source_id, before=before)
    return forks.exists() and loads(created.payload) == loads(payload)


# ------------------------------------------------------------------------------------------------------ the sweeper's


def pending_items(known: list[OperationItem]) -> list[OperationItem]:
    """Return a sweep's share of what operations have not decided yet."""
    return operating.pending(conductor_settings().SWEEP_BATCH, known)


def decide(item: OperationItem) -> bool:
    """Decide one item of an operation.

    Raises:
        RowsLocked: Somebody has locked its execution, or one beside it.
    """
    guards.leave_if_locked(item.execution_id)
    try:
        return operating.decide(item, _act)
    except RowsLocked:
        raise
    except Exception as error:
        if is_outage(error) or is_conflict(error) or is_passing(error) or is_lock_refused(error):
            raise
        logger.exception("Operation %s cannot decide about execution %s.", item.operation_id, item.execution_id)
        # Its text may tell what a task was given.
        failed = (ItemState.FAILED, type(error).__name__)
        return operating.decide(item, lambda _item: failed)


def _act(item: OperationItem) -> tuple[ItemState, str]:
    """Do what an operation asks for to one execution; say what became of it."""
    kind = OperationKind(item.operation.kind)
    try:
        if kind is OperationKind.CANCEL:
            return _cancel(item)
        if kind is OperationKind.RETRY:
            retry(item.execution_id, _nothing)
        elif kind is OperationKind.WAKE:
            wake(item.execution_id, _nothing)
        elif kind is OperationKind.HOLD:
            operation = item.operation
            if not hold(item.execution_id, operation.reason, operation.actor, True, _nothing):
                return ItemState.REFUSED, "held already"
        elif kind is OperationKind.RELEASE:
            if not release(item.execution_id, _nothing):
                return ItemState.REFUSED, "not held"
        else:
            found = Execution.objects.using(database()).get(pk=item.execution_id)
            item.created_id = rerun(found, None, _nothing, new_root_id()).pk
    except Execution.DoesNotExist:
        return ItemState.GONE, ""
    except ActionRefused as error:
        return ItemState.REFUSED, error.reason
    return ItemState.DONE, ""


def _cancel(item: OperationItem) -> tuple[ItemState, str]:
    # The flag alone: the same sweep ends what is flagged, a tree after the other.
    flagged: list[bool] = []
    if transitions.request_cancel(item.execution_id, item.operation.reason, lambda: flagged.append(True)):
        return (ItemState.DONE, "") if flagged else (ItemState.REFUSED, "to be cancelled already")
    if not Execution.objects.using(database()).filter(pk=item.execution_id).exists():
        return ItemState.GONE, ""
    return ItemState.REFUSED, "ended already"


def _nothing(**_created: uuid.UUID) -> None:
    """Note nothing: the item tells."""
