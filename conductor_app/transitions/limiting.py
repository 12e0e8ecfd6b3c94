"""Who may run: the places of limits. The only writer of ``Place`` and ``LimitKey``.

A place counts while the execution that has it runs (or is open), which its own row tells: whatever ends a run or an
execution frees its place by that, in the same write. What follows is to hand the place on. Whoever has ended a run does
that in a transaction after it, and a sweep does it when nobody has.

**Keys are locked before executions,** in the order of their names. An execution that may have no place is parked in the
transaction that has counted. One that ends meanwhile is either counted as ended, or hands its place on after that
transaction, and finds the one that was parked.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import random
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import DatabaseError, connections, transaction
from django.db.models import Case, DateTimeField, Exists, F, OuterRef, Q, QuerySet, Value, When

from conductor_app.conf import conductor_settings
from conductor_app.models import Attempt, Execution, LimitKey, PausedTask, Place, database
from conductor_app.models.execution import PARKED_UNTIL
from conductor_app.states import FINAL_STATUSES, OPEN_STATUSES, ExecutionStatus, LimitKind, PlaceState, RunOutcome
from conductor_app.store import clock, transactions
from conductor_app.store.errors import is_conflict
from conductor_app.store.locks import locked
from conductor_app.transitions import claiming, dispatch, guards, limiting_at_once
from conductor_app.values.limits import Limit

#: Most places that are handed on in one go.
_GRANTED_TOGETHER = 100
#: A key that nobody has used for so long is forgotten.
KEPT = dt.timedelta(days=1)
#: Of so many keys at most, those are chosen that a sweep looks at.
_CHOSEN_OF = 2_000

Wanted = Sequence[tuple[Limit, str]]


@dataclass(frozen=True)
class Parked:
    """Why an execution was not claimed."""

    limit: str
    key: str
    #: In how many seconds it may be tried again, or somebody is to look after its key, if that is known.
    due_in: float | None

    def __str__(self) -> str:
        key = f' (key "{self.key}")' if self.key else ""
        return f'waits for a place of limit "{self.limit}"{key}'


class _LostRace(Exception):
    """Somebody else has claimed it, or has cancelled it."""


class _HasChanged(Exception):
    """It has run since it was read, and is queued again."""


def claim(
    execution_id: uuid.UUID, owner: str, task: str, wanted_of: Callable[[Execution], Wanted]
) -> Execution | Parked | None:
    """queued → running, if all limits of the task have a place; else the execution is parked.

    Args:
        wanted_of: Returns the limits of an execution's task with its keys.

    Returns:
        The execution with its new fence; why it was parked; or ``None``, as ``claiming.claim``.
    """

    using, tries = database(), 0
    while True:
        # Before the transaction, which begins with the lock: at REPEATABLE READ it sees what is committed by then.
        row = Execution.objects.using(using).filter(pk=execution_id, task=task).claimable().first()
        if row is None:
            return None
        wanted = wanted_of(row)
        try:
            if wanted and tries == 0 and limiting_at_once.is_possible(using):
                found = limiting_at_once.claim(row, owner, wanted)
                if found.execution is not None:
                    return found.execution
                if found.lacking is not None:
                    return Parked(found.lacking, dict(_named(wanted))[found.lacking], None)
            return transactions.together(using, functools.partial(_claim, row, owner, wanted))
        except _LostRace:
            return None
        except _HasChanged:
            continue
        except DatabaseError as error:
            # As with any claim, what else goes wrong is the caller's to judge: a lost COMMIT may have been made.
            if not is_conflict(error) or tries >= transactions.CONFLICT_TRIES or connections[using].in_atomic_block:
                raise
            tries += 1
            transactions.pause_after_conflict(tries)


def _claim(row: Execution, owner: str, wanted: Wanted) -> Execution | Parked | None:
    using, execution_id = database(), row.pk
    keys = _lock(wanted)
    has_rate = any(limit.kind is LimitKind.RATE for limit, _ in wanted)
    # What it has had before matters to a rate, and to one that has begun.
    mine = _places_of(row) if has_rate or row.started_at is not None else {}
    # Behind the lock: whoever had it before has started earlier.
    now = clock.read(using) if has_rate else row.created_at
    lacking: Parked | None = None
    starts: list[LimitKey] = []
    for limit, key in wanted:
        place, known = mine.get(limit.name), keys[limit.name, key]
        if limit.kind is LimitKind.RATE:
            state = place.state if place is not None and place.attempt == row.attempt else None
            if state == PlaceState.HELD:
                continue  # a run after a suspension
            instant = _next_start(known, now)
            # An instant that was handed out may be met a little late, and the next ones are not put off for that.
            early = limit.slack if state == PlaceState.GRANTED else dt.timedelta(0)
            if instant - early > now or (state != PlaceState.GRANTED and _waits(limit.name, key, execution_id)):
                lacking = lacking or _refused(known, now, instant)
            starts.append(known)
        elif limit.kind is LimitKind.OPEN and _holds_open(place, row):
            continue
        elif _holders(limit.name, key, limit.kind, but=execution_id) >= known.number:
            lacking = lacking or Parked(limit.name, key, None)
    if lacking is not None:
        return _park(row, lacking, keys)
    if wanted:
        _admit(row, wanted)
    claimed = claiming.claim(execution_id, owner, row.task, savepoint=False)
    if claimed is None:
        raise _LostRace
    if claimed.fence != row.fence + 1:
        raise _HasChanged
    for known in starts:
        # By the instant that is recorded as its start, however long ago the clock was read above.
        paid = _paid(known, claimed.run_started_at)
        LimitKey.objects.using(using).filter(pk=known.pk).update(paid_until=paid)
    return claimed


def _named(wanted: Wanted) -> list[tuple[str, str]]:
    return [(limit.name, key) for limit, key in wanted]


def _places_of(row: Execution) -> dict[str, Place]:
    return {place.limit: place for place in Place.objects.using(database()).filter(execution_id=row.pk)}


def _holds_open(place: Place | None, row: Execution) -> bool:
    """Tell whether it was admitted before: then it goes on, whatever the number is by now."""
    return place is not None and place.state == PlaceState.HELD and row.started_at is not None


def _lock(wanted: Wanted) -> dict[tuple[str, str], LimitKey]:
    """Lock keys until the end of the transaction, and note what this process knows of their limits."""
    rows = [
        LimitKey(
            limit=limit.name,
            key=key,
            kind=limit.kind.value,
            number=limit.number,
            seconds=limit.seconds,
            used_at=clock.now(),
        )
        for limit, key in sorted(wanted, key=lambda each: (each[0].name, each[1]))
    ]
    if not rows:  # they cannot be told: the run fails by that
        return {}
    _upsert(rows, unique=["limit", "key"], update=["kind", "number", "seconds", "used_at"])
    found = {(row.limit, row.key): row for row in rows}
    rates = [(limit.name, key) for limit, key in wanted if limit.kind is LimitKind.RATE]
    if rates:
        found |= {(row.limit, row.key): row for row in _keys(rates)}
    return found


def _keys(names: Iterable[tuple[str, str]], *, skip: bool = False) -> list[LimitKey]:
    found: list[LimitKey] = []
    # One after the other, in the order of ``_lock``: a database sorts names in one of its own.
    for limit, key in sorted(names):
        # A locking read: whatever the isolation level, it sees what was committed before.
        found += locked(LimitKey.objects.using(database()).filter(limit=limit, key=key), skip=skip)
    if connections[database()].vendor == "postgresql":
        _write_again(found)
    return found


def _write_again(keys: list[LimitKey]) -> None:
    """Let a single statement that has begun before, and waits for one of these keys, notice (``limiting_at_once``)."""
    if keys:
        LimitKey.objects.using(database()).filter(pk__in=[key.pk for key in keys]).update(number=F("number"))


def holding(kind: str) -> Q:
    """Return the places of a kind that count; those of ended runs, and of final executions, do not.

    Nor does one that was handed to an execution which people keep from beginning: it asks again when they let it.
    """
    is_granted = Q(state=PlaceState.GRANTED)
    if kind == LimitKind.OPEN:
        return Q(~is_granted | _may_begin(), execution__status__in=sorted(OPEN_STATUSES))
    # A dead worker's body may be at work still, so its execution keeps its place until its next run.
    lost: Any = QuerySet(Attempt).filter(
        execution_id=OuterRef("execution_id"), run=OuterRef("execution__fence"), outcome=RunOutcome.LOST
    )
    is_kept = (is_granted & _may_begin()) | Q(Exists(lost))
    return Q(execution__status=ExecutionStatus.RUNNING) | Q(is_kept, execution__status=ExecutionStatus.QUEUED)


def _holders(limit: str, key: str, kind: str, but: uuid.UUID | None = None) -> int:
    """Return how many executions have a place."""
    places = holders(limit, key, kind)
    if but is not None:
        places = places.exclude(execution_id=but)
    return places.count()


def holders(limit: str, key: str, kind: str) -> QuerySet[Place]:
    """Return the places of a key that count."""
    taken = Place.objects.using(database()).filter(
        limit=limit, key=key, state__in=[PlaceState.GRANTED, PlaceState.HELD]
    )
    return taken.filter(holding(kind))


def parked(limit: str, key: str) -> QuerySet[Place]:
    """Return those who wait for a place of a key, the next one first."""
    places = Place.objects.using(database()).filter(limit=limit, key=key, state=PlaceState.PARKED)
    return places.order_by("since", "pk")


def _waits(limit: str, key: str, but: uuid.UUID) -> bool:
    """Tell whether others wait for a start of a rate, or for the instant of one."""
    places = Place.objects.using(database()).filter(
        limit=limit, key=key, state__in=[PlaceState.PARKED, PlaceState.GRANTED]
    )
    return places.exclude(execution_id=but).exists()


# ------------------------------------------------------------------------------------------------------------- rates


def _paid(known: LimitKey, start: dt.datetime | None) -> dt.datetime:
    """Return until when a start pays, which is what it writes (GCRA)."""
    assert start is not None
    return max(known.paid_until or start, start) + dt.timedelta(seconds=known.seconds or 0.0)


def _next_start(known: LimitKey, now: dt.datetime) -> dt.datetime:
    """Return when the next start is allowed, at the earliest."""
    ahead = dt.timedelta(seconds=known.seconds or 0.0) * (known.number - 1)
    return max((known.paid_until or now) - ahead, now)


def next_start(after: dt.datetime | None = None) -> dt.datetime | None:
    """Return when an execution that waits for a rate may start next; for whoever lets time pass.

    Args:
        after: Only later than this.
    """
    using = database()
    waits = Place.objects.using(using).filter(limit=OuterRef("limit"), key=OuterRef("key"), state=PlaceState.PARKED)
    keys = LimitKey.objects.using(using).filter(Exists(waits), kind=LimitKind.RATE, paid_until__isnull=False)
    instants = [
        known.paid_until - dt.timedelta(seconds=known.seconds or 0.0) * (known.number - 1)
        for known in keys
        if known.paid_until is not None
    ]
    return min((instant for instant in instants if after is None or instant > after), default=None)


def _horizon() -> dt.timedelta:
    """Return how far ahead starts are handed out: until after the next sweep."""
    return dt.timedelta(seconds=2 * conductor_settings().SWEEP_SECONDS)


def _refused(known: LimitKey, now: dt.datetime, instant: dt.datetime) -> Parked:
    # A sweep looks after the key a little before, so that the start is handed out in time.
    ahead = (instant - now - _horizon()).total_seconds()
    return Parked(known.limit, known.key, max(ahead, 0.0))


# ----------------------------------------------------------------------------------------------------- park, hand out


def _park(row: Execution, lacking: Parked, keys: dict[tuple[str, str], LimitKey]) -> Parked | None:
    """Let a queued execution wait for a place; return for which, or ``None`` if it is not queued any more."""
    using = database()
    rows = Execution.objects.using(using).filter(pk=row.pk, fence=row.fence).claimable()
    if not rows.update(due_at=_parked_until(), dispatch_at=_parked_until(), dispatches=0):
        return None
    known = keys[lacking.limit, lacking.key]
    # A grant of another limit is of no use now. What it holds as an open one, it keeps.
    mine = _places_of(row)
    given_up = [
        place
        for place in mine.values()
        if place.kind == LimitKind.RUN or (place.kind == LimitKind.OPEN and row.started_at is None)
    ]
    _delete(Place.objects.using(using).filter(pk__in=[place.pk for place in given_up]))
    before = mine.get(lacking.limit)
    is_again = before is not None and before.kind == LimitKind.RATE and before.attempt == row.attempt
    Place.objects.using(using).update_or_create(
        execution_id=row.pk,
        limit=lacking.limit,
        defaults={
            "key": lacking.key,
            "kind": known.kind,
            "state": PlaceState.PARKED,
            "attempt": row.attempt,
            # One that comes too late for its instant is not behind those that came after it.
            "since": before.since if before is not None and is_again else row.due_at or row.created_at,
        },
    )
    for place in given_up:
        if place.state == PlaceState.GRANTED and (place.limit, place.key) in keys:
            _hand_out(keys[place.limit, place.key])
    is_late = before is not None and is_again and before.state == PlaceState.GRANTED
    if known.kind == LimitKind.RATE and _hand_out(known, anew=is_late):
        due_at = Execution.objects.using(using).values_list("due_at", flat=True).get(pk=row.pk)
        if due_at is not None and due_at != _parked_until():
            return dataclasses.replace(lacking, due_in=max((due_at - clock.read(using)).total_seconds(), 0.0))
    return lacking


def _admit(row: Execution, wanted: Wanted) -> None:
    """Note that an execution has a place of each limit."""
    _upsert(
        [
            Place(
                execution_id=row.pk,
                limit=limit.name,
                key=key,
                kind=limit.kind.value,
                state=PlaceState.HELD,
                attempt=row.attempt,
                since=row.due_at or row.created_at,
            )
            for limit, key in wanted
        ],
        unique=["execution", "limit"],
        update=["key", "kind", "state", "attempt", "since"],
    )


def _upsert(rows: list[Any], *, unique: list[str], update: list[str]) -> None:
    """Insert rows, or write over those that are there, in one statement; either locks them."""
    using = database()
    type(rows[0])._base_manager.using(using).bulk_create(
        rows,
        update_conflicts=True,
        update_fields=update,
        # MySQL takes any unique key for the one.
        unique_fields=None if connections[using].vendor == "mysql" else unique,
    )


def _hand_out(known: LimitKey, *, anew: bool = False) -> int:
    """Give what is free of a locked key to those who wait for it; return to how many.

    Args:
        anew: Of a rate: whether those that have an instant and have not begun get another one, too.
    """
    first = parked(known.limit, known.key).filter(_may_begin())
    if known.kind == LimitKind.RATE:
        return _hand_out_starts(known, first, anew=anew)
    if not first.order_by().exists():
        return 0
    free = min(known.number - _holders(known.limit, known.key, known.kind), _GRANTED_TOGETHER)
    granted = 0
    tried: list[int] = []
    # Others may have locked the first ones.
    while granted < free and len(tried) <= free + 10:
        places = list(first.exclude(pk__in=tried)[: free - granted])
        if not places:
            break
        tried += [place.pk for place in places]
        granted += _grant([(place, row, place.since) for place, row in _locked(places)], is_due=True)
    return granted


def _may_begin() -> Q:
    """Return the places of those that people do not keep from beginning: a place would be of no use to the others."""
    is_paused: Any = QuerySet(PausedTask).filter(name=OuterRef("execution__task"))
    return Q(execution__held_at__isnull=True) & ~Q(Exists(is_paused))


def _hand_out_starts(known: LimitKey, waiting: QuerySet[Place], *, anew: bool) -> int:
    """Hand out the next instants at which starts are allowed; what is paid for is written by the starts themselves.

    So that they hold however late who has one begins, a claim asks again (``_claim``).
    """
    now, step = clock.read(database()), dt.timedelta(seconds=known.seconds or 0.0)
    ahead, horizon = step * (known.number - 1), now + _horizon()
    paid = max(known.paid_until or now, now)
    if anew:
        waiting = (waiting | _expected(known)).distinct()
    else:
        paid += step * _expected(known).count()
    if paid - ahead > horizon:
        return 0
    chosen = []
    for place, row in _locked(list(waiting[:_GRANTED_TOGETHER])):
        instant = max(paid - ahead, now)
        if instant > horizon:
            break
        chosen.append((place, row, instant))
        paid += step
    _grant([each for each in chosen if each[2] <= now], is_due=True)
    _grant([each for each in chosen if each[2] > now], is_due=False)
    return len(chosen)


def _expected(known: LimitKey) -> QuerySet[Place]:
    """Return those that have an instant of a rate, and have not begun."""
    places = Place.objects.using(database()).filter(limit=known.limit, key=known.key, state=PlaceState.GRANTED)
    queued = places.filter(
        _may_begin(), execution__status=ExecutionStatus.QUEUED, execution__due_at__lt=_parked_until()
    )
    return queued.order_by("since", "pk")


def _locked(places: list[Place]) -> list[tuple[Place, Execution]]:
    """Lock the executions of places; return those that can still use one, in this order. The others' are deleted."""
    using = database()
    all_rows = Execution.objects.using(using).filter(pk__in=[place.execution_id for place in places])
    # Not waited for: whoever has locked one may wait for the key.
    rows = {row.pk: row for row in locked(all_rows, skip=True)}
    missing = [place.execution_id for place in places if place.execution_id not in rows]
    there = set(all_rows.filter(pk__in=missing).values_list("pk", flat=True)) if missing else set()
    found, useless = [], []
    for place in places:
        row = rows.get(place.execution_id)
        if row is None:
            useless += [] if place.execution_id in there else [place.pk]
        elif (
            row.status != ExecutionStatus.QUEUED
            or row.cancel_requested_at is not None
            or (place.state == PlaceState.PARKED and row.due_at != _parked_until())
        ):
            # It has ended, or an operator has let it go on: it will ask for a place by itself.
            useless.append(place.pk)
        else:
            found.append((place, row))
    if useless:
        _delete(Place.objects.using(using).filter(pk__in=useless))
    return found


def _grant(chosen: list[tuple[Place, Execution, dt.datetime]], *, is_due: bool) -> int:
    """Give places to executions that are locked, which are due at these instants; return how many."""
    if not chosen:
        return 0
    using = database()

    def each(values: Iterable[Any]) -> Case:
        cases = [When(pk=row.pk, then=value) for (_, row, _), value in zip(chosen, values, strict=True)]
        return Case(*cases, output_field=DateTimeField())

    instants: list[Any] = [Value(instant, output_field=DateTimeField()) for _, _, instant in chosen]
    if is_due:
        published = [
            dispatch.first_instant(clock.now(), is_due=True, root_id=row.root_id, ahead=number)
            for number, (_, row, _) in enumerate(chosen)
        ]
    else:
        published = instants
    Execution.objects.using(using).filter(pk__in=[row.pk for _, row, _ in chosen]).update(
        due_at=each(instants), dispatch_at=each(published), dispatches=0
    )
    for attempt in {row.attempt for _, row, _ in chosen}:
        of_attempt = [place.pk for place, row, _ in chosen if row.attempt == attempt]
        Place.objects.using(using).filter(pk__in=of_attempt).update(state=PlaceState.GRANTED, attempt=attempt)
    if is_due:
        for _, row, instant in chosen:
            row.due_at = instant
        dispatch.on_commit(*(row for _, row, _ in chosen))
    return len(chosen)


def _parked_until() -> dt.datetime:
    return clock.aware(PARKED_UNTIL)


def deadlock(parent: Execution, wanted: Wanted) -> tuple[Limit, str, uuid.UUID] | None:
    """Return for which place a child would wait for ever, since its parents have all of them until it ends.

    Args:
        parent: The execution that is about to wait.
        wanted: The limits of the child's task, with its keys.

    Returns:
        The limit, the key, and the nearest execution that has a place.
    """
    parents: list[uuid.UUID] = []
    for limit, key in wanted:
        if limit.kind is not LimitKind.OPEN:
            continue
        of_tree = holders(limit.name, key, limit.kind).filter(execution__root_id=parent.root_id)
        found = set(of_tree.values_list("execution_id", flat=True))
        if len(found) < limit.number:
            continue
        parents = parents or _line_of(parent)
        in_line = [execution_id for execution_id in parents if execution_id in found]
        if len(in_line) >= limit.number:
            return limit, key, in_line[0]
    return None


def _line_of(execution: Execution) -> list[uuid.UUID]:
    """Return an execution and its parents, upwards."""
    line, above = [execution.pk], execution.parent_id
    while above is not None:
        line.append(above)
        above = Execution.objects.using(database()).values_list("parent_id", flat=True).get(pk=above)
    return line


# ------------------------------------------------------------------------------------------------- hand on what is free


def leave(execution_id: uuid.UUID, *, run_only: bool = False, names: Collection[tuple[str, str]] | None = None) -> None:
    """Hand on the places of a run, or of an execution, that has ended.

    Args:
        run_only: Whether the run alone has ended.
        names: Its limits with its keys, if the caller knows them.
    """

    using = database()
    places = Place.objects.using(using).filter(execution_id=execution_id)
    if run_only:
        places = places.filter(kind=LimitKind.RUN)

    def in_steps() -> None:
        # Before the transaction, which begins with the locks.
        known = names if names is not None else set(places.values_list("limit", "key"))
        if not known:
            return
        with transaction.atomic(using=using):
            keys = _keys(known)
            # By what the row says now: it may run again by this time. Read before: MariaDB's DELETE would lock what it
            # looks at, and wait for executions that somebody is just creating.
            _delete_read(places.exclude(_is_of_use()))
            for key in keys:
                _hand_out(key)

    def work() -> None:
        if not at_once():
            in_steps()

    def at_once() -> bool:
        if not names or not limiting_at_once.is_possible(using):
            return False
        left = limiting_at_once.leave(execution_id, run_only=run_only, names=names, horizon=_horizon())
        dispatch.on_commit(*left.granted)
        for name in left.more:
            hand_on(name)
        return left.is_done

    guards.persist_briefly(work)


def _is_of_use() -> Q:
    """Return the places that count, or that somebody waits with."""
    waits = Q(state=PlaceState.PARKED, execution__status=ExecutionStatus.QUEUED)
    of_run = Q(kind=LimitKind.RUN)
    # What a rate has allowed counts for one attempt, however many runs that takes.
    return waits | (of_run & holding(LimitKind.RUN)) | (~of_run & holding(LimitKind.OPEN))


def waited_for(limit: int, root_id: uuid.UUID | None = None) -> list[tuple[str, str]]:
    """Return keys for which executions wait, a random choice if there are many.

    Args:
        limit: At most so many.
        root_id: Those of one tree.
    """
    places = Place.objects.using(database()).filter(state=PlaceState.PARKED)
    if root_id is not None:
        places = places.filter(execution__root_id=root_id)
    found = list(places.order_by().values_list("limit", "key").distinct()[:_CHOSEN_OF])
    return random.sample(found, min(limit, len(found)))


def hand_on(name: tuple[str, str]) -> int:
    """Hand on what is free of a key, since whoever has freed it may have died; return to how many."""

    def work() -> int:
        with transaction.atomic(using=database()):
            # Whoever has locked it decides about it now, or the next sweep does.
            keys = _keys([name], skip=True)
            if not keys:
                return 0
            limit = Limit.known(name[0])
            if limit is not None:
                # It may have changed, and nobody who begins is there to say so.
                keys[0].kind, keys[0].number, keys[0].seconds = limit.kind.value, limit.number, limit.seconds
            return _hand_out(keys[0])

    return guards.persist_briefly(work)


def forget_old() -> None:
    """Delete places that count no more, of which nobody has said so, and keys that nobody has used for long."""
    using = database()
    final = Place.objects.using(using).filter(execution__status__in=sorted(FINAL_STATUSES))
    for name in list(final.order_by().values_list("limit", "key").distinct()[:_GRANTED_TOGETHER]):
        guards.persist_briefly(functools.partial(_clean, name))
    old = LimitKey.objects.using(using).filter(used_at__lt=clock.after(-KEPT))
    of_key = Place.objects.using(using).filter(limit=OuterRef("limit"), key=OuterRef("key"))
    unpaid = Q(paid_until__isnull=True) | Q(paid_until__lt=clock.now())
    guards.persist_briefly(lambda: _delete(old.filter(unpaid).exclude(Exists(of_key))))


def _clean(name: tuple[str, str]) -> None:
    using = database()
    with transaction.atomic(using=using):
        if _keys([name], skip=True):
            places = Place.objects.using(using).filter(limit=name[0], key=name[1])
            final = places.filter(execution__status__in=sorted(FINAL_STATUSES))
            _delete_read(final)


def _delete_read(places: QuerySet[Place]) -> None:
    if keys := list(places.values_list("pk", flat=True)):
        _delete(Place.objects.using(database()).filter(pk__in=keys))


def _delete(rows: QuerySet[Any]) -> int:
    return int(rows.order_by()._raw_delete(rows.db) or 0)  # of no rows, Django says nothing
