"""Executions that begin together: as many roots as one call asks for, in few statements."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from django.db import IntegrityError, connections, transaction

from conductor_app import signals
from conductor_app.exceptions import DuplicateExecution
from conductor_app.models import Execution, database
from conductor_app.states import OnConflict
from conductor_app.store import clock, forks
from conductor_app.store.moves import Insert, Move
from conductor_app.store.opened import is_transaction, note_created, snapshot_level
from conductor_app.store.slots import NOW, Each, column, each
from conductor_app.transitions import creating, dispatch, guards, tagging, uniqueness
from conductor_app.values.texts import shown

#: Payloads that one statement stores, in bytes. MariaDB takes 16 MiB by default, and a quotation mark counts twice.
_BATCH_BYTES = 4_194_304
#: So many messages follow the commit; the others are the sweepers', at once. Whoever starts 10,000 executions, often in
#: a web request, is not to publish as long as they take to be worked off.
FIRST_MESSAGES = 1_000
#: So many of them share one confirmation of RabbitMQ's.
CONFIRMED_TOGETHER = 100


def _create(**more: Any) -> Move:
    """Return the move that stores roots."""
    values = {
        **{name: each(Execution, name) for name in (*creating.OWN, "idempotency_key")},
        "root_id": Each("id", column(Execution, "root_id")),
        "created_at": NOW,
        **creating.timed(Each),
        **more,
    }
    return Move(Insert("created", Execution, values, rows="roots"))


_CREATE = _create()
#: Those with a deadline, which all have that are created together, or none.
_CREATE_BOUNDED = _create(**creating.bounded(Each))
#: What is the same of all that are created together, and only the database knows.
_INSTANTS = ("created_at", "due_at", "deadline_at", "tree_deadline_at")


def create_many(
    news: Sequence[creating.NewExecution], check: Callable[[int, Execution], None]
) -> list[tuple[Execution, bool]]:
    """Store root executions as queued, all or none, in the current transaction if there is one.

    Args:
        news: Each has an id of its own, and a unique key at most that returns or refuses. Of several with one
            idempotency key, or one unique key that returns, the first is stored.
        check: Gets the place of one that is not new, and the execution that stands for it, which may be an earlier one
            of ``news``; raises if it cannot.

    Returns:
        For each one the execution, and whether it is new.

    Raises:
        DuplicateExecution: A unique key that refuses is taken. Nothing is stored.
    """
    forks.own()
    using = database()
    rows = {new.id: creating.timeless_row(new) for new in news}
    given = {new.id: _given(place, new, rows[new.id]) for place, new in enumerate(news)}
    others: dict[uuid.UUID, Execution] = {}
    tries = 0
    is_own = is_transaction(using)

    def insert() -> set[uuid.UUID]:
        """Return the ids of those that this call has stored, and note who stands for the others."""
        nonlocal tries, others
        tries += 1
        with transaction.atomic(using=using):
            # After a COMMIT that got no answer, those that are there are this call's; the others are as they were.
            stored = _stored(using, list(rows)) if tries > 1 else set()
            if not stored:
                stored, others = _insert(using, news, rows, given, is_own=is_own)
            for place, new in enumerate(news):
                if new.id not in stored:
                    check(place, others[new.id])
            _note_instants(using, [rows[key] for key in stored])
        return stored

    stored = _persist(insert, is_own=is_own)
    created = [rows[new.id] for new in news if new.id in stored]
    for execution in created:
        note_created(using, execution.pk)
    told = [execution for execution in created if given[execution.pk]["is_due"]]
    dispatch.on_commit(*told, confirmed_together=CONFIRMED_TOGETHER)
    for execution in created:
        guards.send_signal(signals.execution_created, execution)
    return [(rows[new.id], True) if new.id in stored else (others[new.id], False) for new in news]


def _persist(insert: Callable[[], set[uuid.UUID]], *, is_own: bool) -> set[uuid.UUID]:
    """Store them; in a transaction of their own, again while it does not see what is in the way."""
    for number in range(uniqueness.TRIES):
        try:
            return guards.persist_briefly(insert)
        except IntegrityError as error:
            # A snapshot (REPEATABLE READ) does not show what is in the way; another one does. Whoever had a unique key
            # may have ended, and somebody else may have it by then.
            if not is_own or (number > 0 and not uniqueness.is_violated(error)):
                raise
    raise DuplicateExecution("The unique keys of these executions change hands all the time. Call it again.")


def _firsts(
    news: Sequence[creating.NewExecution], known: Mapping[uuid.UUID, Execution]
) -> tuple[list[creating.NewExecution], dict[uuid.UUID, uuid.UUID]]:
    """Return those to be stored, and of the others that are not ``known`` the ids of those that stand for them.

    Raises:
        DuplicateExecution: One has a unique key that refuses, and that is taken.
    """
    firsts: list[creating.NewExecution] = []
    doubles: dict[uuid.UUID, uuid.UUID] = {}
    by_idempotency_key: dict[str, uuid.UUID] = {}
    by_unique_key: dict[str, tuple[uuid.UUID, int]] = {}
    for place, new in enumerate(news):
        idempotency_key, unique = new.idempotency_key, new.unique
        if (found := known.get(new.id)) is not None:
            is_by_unique_key = idempotency_key is None or found.idempotency_key != idempotency_key
            if is_by_unique_key and unique is not None and unique.on_conflict == OnConflict.REFUSE:
                raise uniqueness.duplicate(new.task, unique.key, found, place=place)
        elif idempotency_key is not None and idempotency_key in by_idempotency_key:
            doubles[new.id] = by_idempotency_key[idempotency_key]
        elif unique is not None and unique.key in by_unique_key:
            first, place_of_first = by_unique_key[unique.key]
            if unique.on_conflict == OnConflict.REFUSE:
                raise DuplicateExecution(
                    f"payloads[{place_of_first}] and payloads[{place}] have one unique key, {shown(unique.key)}, and "
                    f"of {new.task} there is one open execution per key. Leave one of them out."
                )
            doubles[new.id] = first
        else:
            firsts.append(new)
            if idempotency_key is not None:
                by_idempotency_key[idempotency_key] = new.id
            if unique is not None:
                by_unique_key[unique.key] = new.id, place
    return firsts, doubles


def _in_order(new: creating.NewExecution) -> tuple[str, str]:
    return new.unique.key if new.unique is not None else "", new.idempotency_key or ""


def _given(place: int, new: creating.NewExecution, row: Execution) -> dict[str, Any]:
    """Return what is stored of one, and whether its message follows the commit."""
    times = creating.times(new)
    # The others are due, too, and look as if they had just become so: the next sweep publishes them.
    is_sweepers = place >= FIRST_MESSAGES and not dispatch.is_inline()
    return {
        **{name: getattr(row, name) for name in (*creating.OWN, "idempotency_key")},
        **times,
        **(creating.bounds(new) if creating.is_bounded(new) else {}),
        "is_due": times["is_due"] and not is_sweepers,
        "dispatch_in": clock.interval(dispatch.first_publication(None, place).seconds),
    }


def _insert(
    using: str,
    news: Sequence[creating.NewExecution],
    rows: Mapping[uuid.UUID, Execution],
    given: Mapping[uuid.UUID, Mapping[str, Any]],
    *,
    is_own: bool,
) -> tuple[set[uuid.UUID], dict[uuid.UUID, Execution]]:
    """Store those whose keys nobody has; return their ids, and the executions that stand for the others.

    Raises:
        DuplicateExecution: Somebody has a unique key that refuses.
        IntegrityError: What is in the way cannot be seen.
    """
    known = _existing(using, news)
    for _ in range(uniqueness.TRIES):
        left, doubles = _firsts(news, known)
        # In the order of their keys: two calls that share some wait for each other, one after the other, and not in a
        # ring.
        left.sort(key=_in_order)
        try:
            if left:
                with transaction.atomic(using=using):
                    for batch in _batches(left):
                        move = _CREATE_BOUNDED if creating.is_bounded(batch[0]) else _CREATE
                        move.make(using, savepoint=False, roots=[given[new.id] for new in batch], dispatch_by=None)
                    tagging.insert_all({new.id: new.tags for new in left if new.tags})
            return {new.id for new in left}, known | {key: rows[first] for key, first in doubles.items()}
        except IntegrityError as error:
            # Somebody has stored some of them just before.
            found = _existing(using, left)
            if not found:
                # Who had a unique key may have ended since: then it is free.
                if not uniqueness.is_violated(error):
                    raise
                if snapshot_level(using):
                    if is_own:
                        raise
                    raise uniqueness.duplicate(news[0].task, None, None) from None
            known |= found
    raise DuplicateExecution("The unique keys of these executions change hands all the time. Call it again.")


def _batches(news: Sequence[creating.NewExecution]) -> Iterator[list[creating.NewExecution]]:
    """Divide them by the length of their payloads; by their number, a script does."""
    batch: list[creating.NewExecution] = []
    size = 0
    for new in news:
        if batch and size + len(new.payload) > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(new)
        size += len(new.payload)
    yield batch


def _existing(using: str, news: Sequence[creating.NewExecution]) -> dict[uuid.UUID, Execution]:
    """Return who has the keys of others, by the ids of these; the idempotency key is looked at first."""
    by_id = {new.id: new.idempotency_key for new in news if new.idempotency_key is not None}
    found = _having(using, news[0].task, "idempotency_key", by_id)
    by_id = {new.id: new.unique.key for new in news if new.unique is not None and new.id not in found}
    return found | _having(using, news[0].task, "unique_key", by_id)


def _having(using: str, task: str, column: str, keys: Mapping[uuid.UUID, str]) -> dict[uuid.UUID, Execution]:
    rows = Execution.objects.using(using).filter(task=task).defer("result", "error")
    wanted = list(dict.fromkeys(keys.values()))
    found = {
        getattr(row, column): row for part in _parts(using, wanted) for row in rows.filter(**{f"{column}__in": part})
    }
    return {execution_id: found[key] for execution_id, key in keys.items() if key in found}


def _stored(using: str, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
    rows = Execution.objects.using(using)
    return {key for part in _parts(using, ids) for key in rows.filter(pk__in=part).values_list("pk", flat=True)}


def _parts(using: str, values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Divide values into as many as one query of the database may have."""
    size = min(connections[using].ops.bulk_batch_size(["pk"], values), 5_000) if values else 1
    return (values[first : first + size] for first in range(0, len(values), size))


def _note_instants(using: str, rows: Sequence[Execution]) -> None:
    """Note on new rows when they were created and are due, as the last one tells it."""
    if not rows:
        return
    instants = Execution.objects.using(using).values_list(*_INSTANTS).get(pk=rows[-1].pk)
    for row in rows:
        row.created_at, row.due_at, row.deadline_at, row.tree_deadline_at = instants
