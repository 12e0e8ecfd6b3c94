"""Executions that begin."""

from __future__ import annotations

import contextlib
import datetime as dt
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import BooleanField, Case, DateTimeField, DurationField, Value, When
from django.db.models.functions import Coalesce, Least

from conductor_app import signals
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, forks
from conductor_app.store.moves import Insert, Move
from conductor_app.store.opened import note_created
from conductor_app.store.slots import NOW, AnyField, Earlier, Given, Slot, after, given
from conductor_app.transitions import dispatch, guards, parts, tagging, uniqueness
from conductor_app.values.limits import Limit
from conductor_app.values.uniqueness import Unique


@dataclass(frozen=True)
class NewExecution:
    """An execution that is about to be stored; all of it is checked already."""

    id: uuid.UUID
    task: str
    queue: str
    #: ``[args, kwargs]`` as stored text.
    payload: str
    max_attempts: int | None
    priority: int | None = None
    options: str = ""
    #: Seconds until it may be claimed.
    countdown: float = 0
    #: Instead of ``countdown``: the instant at which it may be claimed.
    eta: dt.datetime | None = None
    #: Seconds, or the instant, after which it must not start any more.
    expires: float | dt.datetime | None = None
    #: Of a root: seconds, or the instant, after which its whole tree is cancelled.
    deadline: float | dt.datetime | None = None
    #: Of a root: the same in seconds, as its task says; the earlier of both counts.
    max_duration: float | None = None
    idempotency_key: str | None = None
    #: Its unique key, and what is to be done if an open execution has that.
    unique: Unique | None = None
    #: Those of the tree that it is in.
    tags: Mapping[str, str] = field(default_factory=dict)
    #: The limits of its task, with its keys.
    limits: Sequence[tuple[Limit, str]] = ()


def create(new: NewExecution) -> tuple[Execution, bool]:
    """Store a root execution as queued, in the current transaction if there is one.

    Returns:
        The execution, and whether it is new: the same id or idempotency key gives the existing one, and a unique key
        that is taken may do so.

    Raises:
        DuplicateExecution: The unique key is taken. Nothing is stored.
    """
    forks.own()
    using = database()
    row = timeless_row(new)
    given = {name: getattr(row, name) for name in (*OWN, "idempotency_key")}
    given |= parts.published(dispatch.first_publication(None))
    tries = 0

    def store(predecessor: uuid.UUID | None = None) -> None:
        more = times(new, is_held=predecessor is not None) | (bounds(new) if is_bounded(new) else {})
        if new.unique is not None:
            more |= _then(new, predecessor)
            row.predecessor = predecessor
        # By Django's cursor: the caller's tools are to see it.
        with transaction.atomic(using=using) if new.tags else contextlib.nullcontext():
            (instants,) = _move(new).make(using, at_once=False, **given, **more)
            row.created_at, row.due_at, row.dispatch_at, row.deadline_at, *bound = instants
            row.tree_deadline_at = bound[0] if bound else None
            if new.tags:
                tagging.insert(new.id, new.tags)

    def insert() -> tuple[Execution, bool]:
        """Return the execution, and whether this call has stored it."""
        nonlocal tries
        tries += 1
        existing: Execution | None = None
        if new.unique is None:
            try:
                store()
            except IntegrityError:
                existing = find_existing(new)
                if existing is None:
                    raise
        else:
            existing = uniqueness.create(new.unique, row, store, lambda: find_existing(new), **_deadlines(new))
        if existing is None:
            return row, True
        # After a COMMIT that got no answer it is this one.
        return existing, tries > 1 and existing.pk == new.id

    execution, is_new = guards.persist_briefly(insert)
    if not is_new:
        return execution, False
    note_created(using, execution.pk)
    if is_due(new) and execution.predecessor is None:
        dispatch.on_commit(execution)
    guards.send_signal(signals.execution_created, execution)
    return execution, True


def find_existing(new: NewExecution) -> Execution | None:
    """Return the execution that has this id or this idempotency key; ``None`` if there is none."""
    rows = Execution.objects.using(database())
    found = rows.filter(pk=new.id).first()
    if found is None and new.idempotency_key is not None:
        found = rows.filter(task=new.task, idempotency_key=new.idempotency_key).first()
    return found


def is_due(new: NewExecution) -> bool:
    return new.eta is None and new.countdown <= 0


def timeless_row(
    new: NewExecution, parent: Execution | None = None, step: str = "", *, position: int | None = None
) -> Execution:
    """Return the row of an execution that is queued, without any instant; it is not saved."""
    return _row(
        id=new.id,
        task=new.task,
        queue=new.queue,
        priority=new.priority,
        payload=new.payload,
        status=ExecutionStatus.QUEUED,
        max_attempts=new.max_attempts,
        parent_id=None if parent is None else parent.pk,
        root_id=new.id if parent is None else parent.root_id,
        depth=0 if parent is None else parent.depth + 1,
        step=step,
        position=position,
        idempotency_key=new.idempotency_key,
        unique_key=None if new.unique is None else new.unique.key,
        options=new.options,
    )


#: What a child says that its siblings in a map may say otherwise.
OWN = ("id", "task", "queue", "priority", "payload", "max_attempts", "unique_key", "options")
#: Of every child of the run that makes a move.
CHILD: dict[str, Any] = {
    "parent_id": given(Execution, "parent_id", "id"),
    "root_id": given(Execution, "root_id"),
    "depth": given(Execution, "depth"),
    "step": given(Execution, "step"),
    "created_at": NOW,
}
#: Of one that this process goes on with.
CLAIMED: dict[str, Any] = {**parts.CLAIMED, "fence": 1, "due_at": NOW, "started_at": NOW}


def timed(slot: Callable[[str, AnyField], Slot]) -> dict[str, Any]:
    """Return the instants of a child as ``times`` gives them: when it is due, and after when it must not start."""
    instant, span = DateTimeField(), DurationField()
    due = Coalesce(slot("eta", instant), after(slot("due_in", span)))
    published = parts.dispatch_at(slot("dispatch_in", span))
    return {
        "status": ExecutionStatus.QUEUED,
        "due_at": due,
        "dispatch_at": Case(When(slot("is_due", BooleanField()), then=published), default=due),
        "deadline_at": Coalesce(slot("expires_at", instant), after(slot("expires_in", span))),
    }


def times(new: NewExecution, *, is_held: bool = False) -> dict[str, Any]:
    """Return when a child is due, and must not start any more, for ``timed``.

    Args:
        is_held: Whether it is not due before a sibling ends.
    """
    seconds = new.expires if isinstance(new.expires, (int, float)) else None
    return {
        "is_due": is_due(new) and not is_held,
        "eta": None if is_held else new.eta,
        "due_in": None if is_held else clock.interval(max(new.countdown, 0)),
        "expires_at": new.expires if seconds is None else None,
        "expires_in": None if seconds is None else clock.interval(seconds),
    }


def is_bounded(new: NewExecution) -> bool:
    """Tell whether a root has a deadline for its whole tree."""
    return new.deadline is not None or new.max_duration is not None


def bounded(slot: Callable[[str, AnyField], Slot]) -> dict[str, Any]:
    """Return the deadlines of a root as ``times`` and ``bounds`` give them: it starts before that of its tree."""
    instant, span = DateTimeField(), DurationField()
    longest = after(slot("ends_in", span))
    ends = Earlier(Coalesce(slot("ends_at", instant), longest), longest, output_field=instant)
    starts = Coalesce(slot("expires_at", instant), after(slot("expires_in", span)))
    return {"tree_deadline_at": ends, "deadline_at": Earlier(ends, starts, output_field=instant)}


def bounds(new: NewExecution) -> dict[str, Any]:
    """Return when the tree of a root with a deadline is cancelled, for ``bounded``."""
    instant, seconds = _bounds(new)
    return {"ends_at": instant, "ends_in": None if seconds is None else clock.interval(seconds)}


def _bounds(new: NewExecution) -> tuple[dt.datetime | None, float | None]:
    """Return the instant and the seconds of which the earlier one is a tree's deadline."""
    spans = [span for span in (new.deadline, new.max_duration) if isinstance(span, (int, float))]
    return (new.deadline if isinstance(new.deadline, dt.datetime) else None), min(spans, default=None)


def has_times(new: NewExecution) -> bool:
    """Tell whether anything else is to be known of when it may start than that it is due."""
    return not is_due(new) or new.expires is not None


def _then(new: NewExecution, predecessor: uuid.UUID | None) -> dict[str, Any]:
    """Return whose end an execution waits for, and when it is due then at the earliest."""
    is_later = predecessor is not None and not is_due(new)
    return {
        "predecessor": predecessor,
        "then_at": new.eta if is_later else None,
        "then_in": clock.interval(new.countdown) if is_later and new.countdown > 0 else None,
    }


def _deadlines(new: NewExecution) -> dict[str, Any]:
    """Return both deadlines of a root for a write that is no move: a debounced call begins them anew."""
    starts = clock.after(new.expires) if isinstance(new.expires, (int, float)) else new.expires
    if not is_bounded(new):
        return {"deadline_at": starts, "tree_deadline_at": None}
    instant, seconds = _bounds(new)
    ends = _earliest(instant, None if seconds is None else clock.after(seconds))
    return {"deadline_at": _earliest(ends, starts), "tree_deadline_at": ends}


def _earliest(*instants: Any) -> Any:
    """Return the earliest of some instants and expressions, without those that are ``None``."""
    known = [
        Value(found, output_field=DateTimeField()) if isinstance(found, dt.datetime) else found
        for found in instants
        if found is not None
    ]
    return Least(*known) if len(known) > 1 else known[0]


def _create(**more: Any) -> Move:
    """Return the move that stores a root."""
    values = {
        **{name: given(Execution, name) for name in (*OWN, "idempotency_key")},
        "root_id": given(Execution, "root_id", "id"),
        "created_at": NOW,
        **timed(Given),
        **more,
    }
    told = ["created_at", "due_at", "dispatch_at", "deadline_at"]
    if "tree_deadline_at" in more:
        told.append("tree_deadline_at")
    return Move(Insert("created", Execution, values, returning=told))


_UNIQUE: dict[str, Any] = {
    "predecessor": given(Execution, "predecessor"),
    "due_then": Coalesce(Given("then_at", DateTimeField()), after("then_in")),
}
_CREATE = _create()
_CREATE_UNIQUE = _create(**_UNIQUE)
#: Those with a deadline: the others know nothing of one.
_CREATE_BOUNDED = _create(**bounded(Given))
_CREATE_UNIQUE_BOUNDED = _create(**_UNIQUE, **bounded(Given))


def _move(new: NewExecution) -> Move:
    """Return the move that stores a root."""
    if is_bounded(new):
        return _CREATE_BOUNDED if new.unique is None else _CREATE_UNIQUE_BOUNDED
    return _CREATE if new.unique is None else _CREATE_UNIQUE


#: The fields in the order in which a model takes their values, which it does in half of the time that names take.
_FIELDS = {field.attname: field for field in Execution._meta.concrete_fields}


def _row(**values: Any) -> Execution:
    row: Any = [values[name] if name in values else field.get_default() for name, field in _FIELDS.items()]
    return Execution(*row)
