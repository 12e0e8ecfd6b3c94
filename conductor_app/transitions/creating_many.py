"""Executions that begin together: as many roots as one call asks for, in few statements."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from django.db import IntegrityError, connections, transaction

from conductor_app import signals
from conductor_app.models import Execution, database
from conductor_app.store import clock, forks
from conductor_app.store.moves import Insert, Move
from conductor_app.store.opened import is_transaction, note_created
from conductor_app.store.slots import NOW, Each, column, each
from conductor_app.transitions import creating, dispatch, guards, tagging

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
        news: Each has an id of its own. Of several with one idempotency key, the first is stored.
        check: Gets the place of one that has an existing idempotency key, and the execution that has it; raises if it
            cannot stand for it. Of one that is not new because of an earlier one of ``news``, that is the earlier one.

    Returns:
        For each one the execution, and whether it is new.
    """
    forks.own()
    using = database()
    rows = {new.id: creating.timeless_row(new) for new in news}
    firsts = _firsts(news)
    given = {new.id: _given(place, new, rows[new.id]) for place, new in firsts}
    # In the order of their keys: two calls that share some wait for each other, one after the other, and not in a ring.
    ordered = [new for _, new in sorted(firsts, key=lambda first: first[1].idempotency_key or "")]
    tries = 0

    def insert() -> tuple[set[uuid.UUID], dict[str | None, Execution]]:
        """Return the ids of those that this call has stored, and the others by their keys."""
        nonlocal tries
        tries += 1
        with transaction.atomic(using=using):
            # After a COMMIT that got no answer, those that are there are this call's.
            stored = _stored(using, list(rows)) if tries > 1 else set()
            known = _existing(using, [new for new in ordered if new.id not in stored])
            if not stored:
                stored = _insert(using, ordered, given, known)
            known |= {new.idempotency_key: rows[new.id] for new in ordered if new.id in stored}
            for place, new in enumerate(news):
                if new.id not in stored:
                    check(place, known[new.idempotency_key])
            _note_instants(using, [rows[key] for key in stored])
        return stored, known

    is_own = is_transaction(using)
    try:
        stored, known = guards.persist_briefly(insert)
    except IntegrityError:
        if not is_own:
            raise
        # A snapshot (REPEATABLE READ) does not show what is in the way; another one does.
        stored, known = guards.persist_briefly(insert)
    created = [rows[new.id] for new in news if new.id in stored]
    for execution in created:
        note_created(using, execution.pk)
    told = [execution for execution in created if given[execution.pk]["is_due"]]
    dispatch.on_commit(*told, confirmed_together=CONFIRMED_TOGETHER)
    for execution in created:
        guards.send_signal(signals.execution_created, execution)
    return [(rows[new.id], True) if new.id in stored else (known[new.idempotency_key], False) for new in news]


def _firsts(news: Sequence[creating.NewExecution]) -> list[tuple[int, creating.NewExecution]]:
    """Return those that no earlier one has the key of, with their places."""
    first_of: dict[str, int] = {}
    return [
        (place, new)
        for place, new in enumerate(news)
        if new.idempotency_key is None or first_of.setdefault(new.idempotency_key, place) == place
    ]


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
    given: Mapping[uuid.UUID, Mapping[str, Any]],
    known: dict[str | None, Execution],
) -> set[uuid.UUID]:
    """Store those whose keys nobody has, and return their ids; add to ``known`` who has a key by now."""
    while left := [new for new in news if new.idempotency_key is None or new.idempotency_key not in known]:
        try:
            with transaction.atomic(using=using):
                for batch in _batches(left):
                    move = _CREATE_BOUNDED if creating.is_bounded(batch[0]) else _CREATE
                    move.make(using, savepoint=False, roots=[given[new.id] for new in batch], dispatch_by=None)
                tagging.insert_all({new.id: new.tags for new in left if new.tags})
            break
        except IntegrityError:
            # Somebody has stored some of them just before.
            found = _existing(using, left)
            if not found:
                raise
            known |= found
    return {new.id for new in left}


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


def _existing(using: str, news: Sequence[creating.NewExecution]) -> dict[str | None, Execution]:
    """Return the executions that have the keys of others, by these."""
    keys = [new.idempotency_key for new in news if new.idempotency_key is not None]
    rows = Execution.objects.using(using).defer("result", "error")
    return {
        row.idempotency_key: row
        for part in _parts(using, keys)
        for row in rows.filter(task=news[0].task, idempotency_key__in=part)
    }


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
