"""One open execution of a task per key: who has the key, who takes it over, and who waits for whose end.

A key is the column ``unique_key`` of an open row, unique with the task. Nothing else holds one, so nothing leaks: the
write that makes the row final frees it (``parts.FINAL``).

Whoever takes a key over (``on_conflict="replace"``, a debounced call) names in ``predecessor`` the execution that has
to end first. It is queued and not due until that execution's end, in the same transaction, makes it due
(``release_successor``). The predecessor's row is written before the successor's, by whoever writes both: so an end
either comes before a successor is stored, which then sees it, or waits for it, and finds it.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Collection
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Case, DateTimeField, Exists, F, OuterRef, Q, Value, When
from django.db.models.functions import Coalesce, Greatest, Least

from conductor_app.exceptions import DuplicateExecution
from conductor_app.models import Execution, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import OPEN_STATUSES, ExecutionStatus, OnConflict
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.opened import snapshot_level
from conductor_app.transitions import dispatch, guards
from conductor_app.values.texts import shown
from conductor_app.values.uniqueness import Unique

#: So often a call looks again at a key that changes hands meanwhile. Each time somebody else has got on.
TRIES = 1_000

#: Of an execution that waits for no other one's end.
NO_PREDECESSOR: dict[str, Any] = {"predecessor": None, "due_then": None}


class _ChangedMeanwhile(Exception):  # a signal to look again, no error
    """The key has changed hands since it was looked at."""


# ------------------------------------------------------------------------------------------------------------ creating


def holder_of(task: str, key: str) -> Execution | None:
    """Return the open execution that has a key."""
    return Execution.objects.using(database()).filter(unique_key=key, task=task).first()


def first_holder(task: str, keys: Collection[str]) -> Execution | None:
    """Return an open execution that has one of the keys."""
    return Execution.objects.using(database()).filter(unique_key__in=keys, task=task).first()


def create(
    unique: Unique,
    row: Execution,
    store: Callable[[uuid.UUID | None], object],
    find_same: Callable[[], Execution | None],
    **debounced: Any,
) -> Execution | None:
    """Store an execution with a key, or do what ``unique`` says if an open one has it.

    Args:
        unique: The key, and what is to be done.
        row: What is to be stored.
        store: Stores it; gets the execution whose end it has to wait for, if there is one.
        find_same: Returns the execution that this call has stored already, by its id or its idempotency key.
        debounced: What a debounced call changes of one that has not begun, beside its payload.

    Returns:
        The execution that there is; ``None`` if it was stored.

    Raises:
        DuplicateExecution: An open one has the key. Nothing is stored, and the caller's transaction goes on.
    """
    found: Execution | None = None
    for _ in range(TRIES):
        # A look before the insert: a failed one leaves a lock behind on MySQL, and a dead row on PostgreSQL.
        found = holder_of(row.task, unique.key)
        try:
            if found is None:
                # Waits for the end of a transaction that has just stored one.
                store(None)
                return None
            if (same := find_same()) is not None:
                return same
            if unique.debounce is not None and _merge(unique, row, found, debounced):
                return found
            if unique.takes_over:
                _take_over(unique, row, found, store)
                return None
        except _ChangedMeanwhile:
            continue
        except IntegrityError:
            if (same := find_same()) is not None:
                return same
            if holder_of(row.task, unique.key) is None and snapshot_level(database()):
                raise duplicate(row.task, unique.key, None) from None
            continue
        if unique.on_conflict == OnConflict.RETURN and unique.may_be_another:
            return found
        raise duplicate(row.task, unique.key, found, unique)
    raise duplicate(row.task, unique.key, found)


def is_violated(error: IntegrityError) -> bool:
    """Tell whether a row could not be stored because of its unique key."""
    # PostgreSQL and MariaDB name the index, SQLite its columns.
    return any(name in str(error) for name in ("conductor_ex_unique", f"{Execution._meta.db_table}.unique_key"))


def duplicate(
    task: str, key: str | None, found: Execution | None, unique: Unique | None = None, *, place: int | None = None
) -> DuplicateExecution:
    """Return the error of a call whose key an open execution has.

    Args:
        key: ``None`` if it is one of many, and nobody knows which.
        found: ``None`` if it cannot be seen.
        place: Which of many payloads has the key.
    """
    if found is None:
        which = "one of the unique keys of this call" if key is None else f"the unique key {shown(key)}"
        return DuplicateExecution(
            f"An open execution of {task} has {which}, and this transaction reads a snapshot that "
            "is older. Call it in a transaction of its own."
        )
    advice = 'Wait for its end, cancel it, or call with on_conflict="return" or "replace".'
    if unique is not None and unique.on_conflict == OnConflict.RETURN:
        advice = (
            "Its result cannot stand for this call, which has callbacks or is a part of a canvas: these would never "
            "hear of an end. Wait for its end, or call without them."
        )
    of = ""
    if place is not None:
        of = f" of payloads[{place}]"
        advice = "Nothing is stored. Wait for its end, cancel it, or leave that payload out."
    return DuplicateExecution(
        f"Execution {found.pk} of {task} has the unique key {shown(key)}{of}, and is {found.status}. {advice}",
        execution_id=found.pk,
        status=found.status,
    )


def _merge(unique: Unique, row: Execution, found: Execution, debounced: dict[str, Any]) -> bool:
    """queued → queued: give one that has not begun another payload, and another due time; tell whether it has not.

    One guarded write: against a claim one of the two is first, and the other one finds what that has left.
    """
    assert unique.debounce is not None
    due: Any = clock.after(unique.debounce)
    if unique.debounce_max is not None:
        latest = found.created_at + dt.timedelta(seconds=unique.debounce_max)
        due = Least(due, Value(latest, output_field=DateTimeField()))
    is_held = Q(predecessor__isnull=False)
    nothing = Value(None, output_field=DateTimeField())
    when_free = Case(When(is_held, then=nothing), default=due, output_field=DateTimeField())
    not_late = Q(deadline_at__isnull=True) | Q(deadline_at__gt=clock.now())
    return bool(
        _rows()
        .filter(not_late, pk=found.pk, unique_key=unique.key, status=ExecutionStatus.QUEUED)
        .filter(started_at__isnull=True, cancel_requested_at__isnull=True)
        .update(
            payload=row.payload,
            due_at=when_free,
            dispatch_at=when_free,
            dispatches=0,
            due_then=Case(When(is_held, then=due), default=nothing, output_field=DateTimeField()),
            **debounced,
        )
    )


def _take_over(unique: Unique, row: Execution, found: Execution, store: Callable[[uuid.UUID | None], object]) -> None:
    """Take a key from the open execution that has it, and store the one that begins after that has ended.

    One that waits itself never begins: it is to be cancelled. So the new one waits for the same end as that.
    """
    with transaction.atomic(using=database()):
        first = found.predecessor
        # A write, although it changes nothing: at REPEATABLE READ its end, which does not see the new one, has to fail
        # and be run again.
        if first is not None and not _rows().filter(pk=first).open().update(fence=F("fence")):
            raise _ChangedMeanwhile
        had = _rows().filter(pk=found.pk, unique_key=unique.key, predecessor=first).open()
        if not had.update(unique_key=None, **NO_PREDECESSOR):
            raise _ChangedMeanwhile
        if unique.on_conflict == OnConflict.REPLACE:
            reason = f"replaced by {row.pk}"
            _rows().filter(pk=found.pk).unasked().update(cancel_requested_at=clock.now(), cancel_reason=reason)
            row.replaced = found.pk
        store(first or found.pk)


# -------------------------------------------------------------------------------------------------------------- ending


def release_successor(ended: Execution) -> None:
    """held → queued: what has the key of an execution waits for its end, which is now; in the transaction that ends it.

    After the write of the end, which holds the row's lock: whoever would name it as predecessor writes it before.
    """
    if ended.own_key is None:
        return
    # A locking read, which sees what was committed before that write.
    for successor in locked(_rows().filter(predecessor=ended.pk)):
        _release(successor)


def release_orphan(execution_id: uuid.UUID) -> bool:
    """held → queued, for one whose predecessor has ended or is gone; the audit's repair."""
    with transaction.atomic(using=database()):
        found = guards.take(orphans(_rows().filter(pk=execution_id)))
        return found is not None and _release(found)


def orphans(executions: ExecutionQuerySet) -> ExecutionQuerySet:
    """Return those that wait for an end that has been. No transition leaves one behind; a write by hand does."""
    is_open = Exists(_rows().filter(pk=OuterRef("predecessor"), status__in=sorted(OPEN_STATUSES)))
    return executions.filter(~is_open, predecessor__isnull=False, status=ExecutionStatus.QUEUED)


def _release(successor: Execution) -> bool:
    due = Greatest(clock.now(), Coalesce("due_then", clock.now()), output_field=DateTimeField())
    is_later = Q(due_then__gt=clock.now())
    at_once = dispatch.first_instant(clock.now(), is_due=True, root_id=successor.root_id)
    is_released = (
        _rows()
        .filter(pk=successor.pk, predecessor=successor.predecessor, status=ExecutionStatus.QUEUED)
        .update(
            due_at=due,
            dispatch_at=Case(When(is_later, then=F("due_then")), default=at_once, output_field=DateTimeField()),
            dispatches=0,
            # Last: MySQL assigns from left to right.
            **NO_PREDECESSOR,
        )
    )
    if is_released and successor.due_then is None:
        dispatch.on_commit(successor)
    return bool(is_released)


def waits_for(execution: Execution) -> uuid.UUID | None:
    """Return whose end a queued execution waits for. A run that has begun waits for none, and has not read that."""
    predecessor: uuid.UUID | None = vars(execution).get("predecessor")
    return predecessor


def lock_predecessor(execution: Execution) -> bool:
    """Lock the one that a locked execution waits for, so that it can be given the key back.

    Past its lock, if somebody has it (``False``: look again later): an end writes the predecessor first, and then this.
    """
    predecessor = waits_for(execution)
    if predecessor is None:
        return True
    rows = _rows().filter(pk=predecessor)
    return guards.take(rows) is not None or not rows.exists()


def give_back(ended: Execution) -> None:
    """Give the key of one that is cancelled while it waits to the one that it waits for, which may go on for long.

    Else whoever comes next would find the key free, and run beside that one.
    """
    predecessor = waits_for(ended)
    if predecessor is not None and ended.unique_key is not None:
        _rows().filter(pk=predecessor).open().update(unique_key=ended.unique_key)


def _rows() -> ExecutionQuerySet:
    return Execution.objects.using(database())
