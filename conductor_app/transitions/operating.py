"""Who did what: the operations of people, of one execution or of many. The only writer of ``Operation`` and its items.

A move that somebody has asked for and its note are one transaction, so neither is there without the other: after a
crash an item is pending, and its execution as it was before.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import connections, transaction
from django.db.models import Count, F

from conductor_app.exceptions import ActionRefused, InvalidArgument, InvalidArgumentType
from conductor_app.models import Operation, OperationItem, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.states import ItemState, OperationKind, OperationSource
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import guards
from conductor_app.values.texts import clean_text, shown

T = TypeVar("T")

#: Most executions of one operation: so many are stored in one statement, for which a request waits.
MOST_ITEMS = 100_000
#: Bytes of a reason, of filters and of a refusal that are kept.
_TEXT_BYTES = 1_000
#: Most operations that one sweep works on.
_AT_ONCE = 100
#: Items that are deleted in one statement.
_PRUNED_TOGETHER = 5_000


# ------------------------------------------------------------------------------------------------------------- by whom


@dataclass
class By:
    """Who asks for something, and why."""

    actor: str = ""
    reason: str = ""
    source: OperationSource = OperationSource.API
    #: Whether all that is done belongs to one operation, and what is refused, too.
    is_together: bool = False
    #: The operation of what was done together.
    operation_id: int | None = None

    @property
    def is_named(self) -> bool:
        """Whether it is a person's doing, as far as anybody has said."""
        return bool(self.actor) or self.source is not OperationSource.API


#: For whom the admin or a command acts.
_by: ContextVar[By | None] = ContextVar("conductor_app_acting_for", default=None)


@contextmanager
def acting_for(by: By) -> Iterator[By]:
    """Note what is done in this block as asked for by somebody."""
    token = _by.set(by)
    try:
        yield by
    finally:
        _by.reset(token)


def by_whom(actor: str, reason: str) -> By:
    """Return for whom a call acts: as it says, or as the admin or the command around it has said.

    Raises:
        InvalidArgumentType, InvalidArgument: It says what cannot be stored.
    """
    check_actor(actor)
    if not isinstance(reason, str):
        raise InvalidArgumentType(f"reason must be str, got {type(reason).__name__}")
    around = _by.get()
    if around is not None:
        return around
    return By(actor, reason)


def check_actor(actor: Any) -> None:
    """Refuse what is no name.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is too long, or not printable.
    """
    if not isinstance(actor, str):
        raise InvalidArgumentType(f"actor must be str, got {type(actor).__name__}")
    if len(actor) > ACTOR_LENGTH:
        raise InvalidArgument(f"actor must have at most {ACTOR_LENGTH} characters, got {len(actor)}: {shown(actor)}")
    if not actor.isprintable():
        raise InvalidArgument(f"actor must be printable, got {shown(actor)}")


# ------------------------------------------------------------------------------------------------------ one execution


def noted(kind: OperationKind, execution_id: uuid.UUID, by: By, move: Callable[[Callable[..., None]], T]) -> T:
    """Make a move that somebody has asked for, in one transaction with its note.

    Args:
        kind: What was asked for.
        execution_id: Of which execution.
        by: By whom.
        move: Gets a function that it calls if it has changed something; ``created=`` is what it has started.
    """
    written: list[int] = []

    def note(created: uuid.UUID | None = None) -> None:
        written.append(_add(kind, execution_id, by, ItemState.DONE, created=created))

    made: list[tuple[int, T]] = []

    def work() -> T:
        written.clear()
        try:
            with transaction.atomic(using=database()):
                result = move(note)
                if written:
                    made.append((written[-1], result))
        except ActionRefused:
            # After a COMMIT that got no answer, it is refused because it has been done.
            for key, earlier in made:
                items = OperationItem.objects.using(database()).filter(operation_id=key, execution_id=execution_id)
                if items.exists():
                    written.append(key)
                    return earlier
            raise
        return result

    guards.leave_if_locked(execution_id)
    result = guards.persist_briefly(work)
    if written and by.is_together:
        by.operation_id = written[-1]
    return result


def note_done(kind: OperationKind, execution_id: uuid.UUID, by: By) -> None:
    """Keep what was done outside of any transaction."""

    def work() -> int:
        with transaction.atomic(using=database()):
            return _add(kind, execution_id, by, ItemState.DONE)

    key = guards.persist_briefly(work)
    if by.is_together:
        by.operation_id = key


def note_refusal(kind: OperationKind, execution_id: uuid.UUID, by: By, state: ItemState, message: str) -> None:
    """Keep that something was not done of what was asked for together."""
    if by.is_together:
        by.operation_id = guards.persist_briefly(lambda: _refused(kind, execution_id, by, state, message))


def _refused(kind: OperationKind, execution_id: uuid.UUID, by: By, state: ItemState, message: str) -> int:
    with transaction.atomic(using=database()):
        if by.operation_id is not None:
            items = OperationItem.objects.using(database()).filter(operation_id=by.operation_id)
            if items.filter(execution_id=execution_id).exists():
                return by.operation_id  # it was done before, and that is kept
        return _add(kind, execution_id, by, state, message=message)


def _add(
    kind: OperationKind,
    execution_id: uuid.UUID,
    by: By,
    state: ItemState,
    *,
    message: str = "",
    created: uuid.UUID | None = None,
) -> int:
    """Store what became of one execution, in an operation of its own or in that of what is done together."""
    operations = Operation.objects.using(database())
    key = by.operation_id
    counts: dict[str, Any] = {"total": F("total") + 1, state.value: F(state.value) + 1}
    # It may have been pruned between two executions, if its owner was stopped for long.
    if key is None or not operations.filter(pk=key).update(finished_at=clock.now(), **counts):
        now = clock.now()
        values: dict[str, Any] = {"created_at": now, "finished_at": now, "total": 1, state.value: 1}
        key = operations.create(kind=kind, **_of(by), **values).pk
    OperationItem.objects.using(database()).create(
        operation_id=key,
        execution_id=execution_id,
        state=state,
        message=clean_text(message, _TEXT_BYTES),
        created_id=created,
        decided_at=clock.now(),
    )
    return int(key)


def _of(by: By) -> dict[str, Any]:
    return {"actor": by.actor, "reason": clean_text(by.reason, _TEXT_BYTES), "source": by.source}


# ------------------------------------------------------------------------------------------------------ many executions


def start(
    kind: OperationKind, executions: ExecutionQuerySet, by: By, *, filters: str = "", limit: int | None = None
) -> Operation:
    """Store an operation on all of ``executions`` that match now, parents first; sweepers work it off.

    At most ``MOST_ITEMS`` of them: an operation with so many leaves others.

    Args:
        kind: What is done to each.
        executions: Which ones. One that changes before its turn may be refused.
        by: By whom it was asked for.
        filters: What has chosen them, in words.
        limit: At most so many.
    """

    def work() -> Operation:
        with transaction.atomic(using=database()):
            operation = Operation.objects.using(database()).create(
                kind=kind, **_of(by), filters=clean_text(filters, _TEXT_BYTES), created_at=clock.now()
            )
            total = _choose(operation, executions, min(limit or MOST_ITEMS, MOST_ITEMS))
            ended = {} if total else {"finished_at": clock.now()}
            Operation.objects.using(database()).filter(pk=operation.pk).update(total=total, **ended)
            operation.refresh_from_db(using=database())
        return operation

    return guards.persist_briefly(work)


def _choose(operation: Operation, executions: ExecutionQuerySet, most: int) -> int:
    """Store the items of an operation; their ids never leave the database."""
    using = database()
    connection = connections[using]
    rows = executions.using(using).order_by("depth", "pk").annotate(item_id=F("pk")).values_list("item_id", flat=True)
    try:
        chosen, values = rows[:most].query.get_compiler(using).as_sql()
    except EmptyResultSet:
        return 0
    quote = connection.ops.quote_name
    columns = ", ".join(map(quote, ("operation_id", "execution_id", "state", "message")))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {quote(OperationItem._meta.db_table)} ({columns}) "  # noqa: S608 - names of ours
            f"SELECT {int(operation.pk)}, {quote('item_id')}, '{ItemState.PENDING.value}', '' FROM ({chosen}) chosen",
            values,
        )
        return max(int(cursor.rowcount), 0)


def pending(limit: int, known: Iterable[OperationItem] = ()) -> list[OperationItem]:
    """Return items that are to be decided, with their operations: of each its share, the first one of each at first.

    Operations of which nothing is left to decide are ended.

    Args:
        limit: At most so many.
        known: Items that are known to be locked.
    """
    operations = Operation.objects.using(database()).filter(finished_at__isnull=True)
    going_on = list(operations.order_by("pk")[:_AT_ONCE])
    if not going_on:
        return []
    share = max(limit // len(going_on), 1)
    left_alone = [item.pk for item in known]
    found: list[tuple[int, OperationItem]] = []
    for operation in going_on:
        items = OperationItem.objects.using(database()).filter(operation_id=operation.pk, state=ItemState.PENDING)
        mine = list(items.exclude(pk__in=left_alone).order_by("pk")[:share])
        for place, item in enumerate(mine):
            item.operation = operation
            found.append((place, item))
        if not mine and not items.exists():
            _finish(operation.pk)
    return [item for _place, item in sorted(found, key=lambda one: (one[0], one[1].pk))][:limit]


def decide(item: OperationItem, act: Callable[[OperationItem], tuple[ItemState, str]]) -> bool:
    """Let ``act`` decide one item, once: what it does, and what became of it, are one transaction.

    Args:
        item: As ``pending`` returns it.
        act: Returns what became of it, and why; it sets ``created_id`` of the item.

    Returns:
        Whether this call has decided it. Another sweeper has it in its hands otherwise, or it was stopped.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            # Whoever has locked it decides it; if that sweeper dies, the next sweep finds it pending.
            rows = OperationItem.objects.using(database()).filter(pk=item.pk, state=ItemState.PENDING)
            if locked(rows, skip=True).first() is None:
                return False
            item.created_id = None
            state, message = act(item)
            rows.update(
                state=state,
                message=clean_text(message, _TEXT_BYTES),
                created_id=item.created_id,
                decided_at=clock.now(),
            )
        return True

    return guards.persist_briefly(work)


def stop(operation_id: int) -> bool:
    """Leave alone what an operation has not decided yet; what is just being decided is waited for.

    Returns:
        Whether it went on until now.
    """

    def work() -> bool:
        with transaction.atomic(using=database()):
            rows = Operation.objects.using(database()).filter(pk=operation_id, finished_at__isnull=True)
            if not rows.update(stop_requested_at=clock.now()):
                return False
            items = OperationItem.objects.using(database()).filter(operation_id=operation_id, state=ItemState.PENDING)
            items.update(state=ItemState.STOPPED, decided_at=clock.now())
            _finish(operation_id)
        return True

    return guards.persist_briefly(work)


def _finish(operation_id: int) -> None:
    """End an operation of which every item is decided, and keep the counts."""
    counts = count([operation_id])[operation_id]
    rows = Operation.objects.using(database()).filter(pk=operation_id, finished_at__isnull=True)
    values = {state.value: counts[state] for state in ItemState if state is not ItemState.PENDING}
    rows.update(finished_at=clock.now(), **values)


def count(operation_ids: Iterable[int]) -> dict[int, Counter[str]]:
    """Return how many items of each state operations have, in one query."""
    keys = list(operation_ids)
    found: dict[int, Counter[str]] = {key: Counter() for key in keys}
    if keys:
        items = OperationItem.objects.using(database()).filter(operation_id__in=keys).order_by()
        for key, state, number in items.values_list("operation_id", "state").annotate(number=Count("pk")):
            found[key][state] = number
    return found


def prune(before: Any, batch: int, *, dry_run: bool = False) -> int:
    """Delete operations that ended before an instant, with their items, a bounded number in each transaction.

    Returns:
        How many operations were deleted, or would be.
    """
    using = database()
    old = Operation.objects.using(using).filter(finished_at__lt=before)
    if dry_run:
        return old.count()
    deleted = 0
    while keys := list(old.order_by("finished_at").values_list("pk", flat=True)[:batch]):
        items = OperationItem.objects.using(using).filter(operation_id__in=keys).order_by()
        # A long one in pieces; its own row goes last, so that what was broken off goes on.
        while some := list(items.values_list("pk", flat=True)[:_PRUNED_TOGETHER]):
            _delete(OperationItem.objects.using(using).filter(pk__in=some))
        deleted += _delete(old.filter(pk__in=keys))
    return deleted


def _delete(rows: Any) -> int:
    return guards.persist_briefly(lambda: int(rows.order_by()._raw_delete(rows.db)))
