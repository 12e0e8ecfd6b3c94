"""Limits: who has a place, who waits for one, and since when; in a handful of queries."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from django.db.models import Count, Min, QuerySet

from conductor_app.models import Execution, LimitKey, Place, database
from conductor_app.states import LimitKind, PlaceState
from conductor_app.store import clock
from conductor_app.telling.situation import Parked, Situation
from conductor_app.transitions import limiting

#: Most keys that are shown, and most executions of one key.
MOST, MOST_OF_KEY = 200, 100
#: So many of those who have a place are named to one that waits.
MOST_HOLDERS = 3


@dataclass(frozen=True)
class SeenPlace:
    """An execution that has a place, or waits for one."""

    id: uuid.UUID
    task: str
    status: str
    since: dt.datetime


@dataclass
class SeenKey:
    """One key of a limit."""

    limit: str
    key: str
    kind: str
    #: How many places there are; of a rate, how many may start at once.
    number: int
    #: Of a rate: seconds from one start to the next.
    seconds: float | None
    taken: int = 0
    parked: int = 0
    oldest_parked_at: dt.datetime | None = None
    #: Some of those who have a place, and of those who wait, if the page is about this key.
    holders: list[SeenPlace] = field(default_factory=list)
    waiting: list[SeenPlace] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "limit": self.limit,
            "key": self.key,
            "counts": self.kind,
            "number": self.number,
            "seconds": self.seconds,
            "taken": self.taken,
            "parked": self.parked,
            "oldest_parked_at": self.oldest_parked_at,
            "holders": [vars(one) for one in self.holders],
            "waiting": [vars(one) for one in self.waiting],
        }


@dataclass
class Seen:
    """Keys of limits."""

    now: dt.datetime
    keys: list[SeenKey]
    #: How many are not shown.
    more: int

    def document(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {"read_at": self.now, "limits": [key.document() for key in self.keys], "more": self.more}


def read(seen: QuerySet[Execution] | None = None, *, limit: str | None = None, key: str | None = None) -> Seen:
    """Return the keys of limits, those first for which most wait.

    Args:
        seen: The executions that may be seen; all by default.
        limit: Only the keys of this one.
        key: Only this key, with those who have a place of it, and those who wait.
    """
    using = database()
    places = Place.objects.using(using)
    rows = LimitKey.objects.using(using)
    if seen is not None:
        places = places.filter(execution__in=seen.order_by())
    if limit is not None:
        places, rows = places.filter(limit=limit), rows.filter(limit=limit)
    if key is not None:
        places, rows = places.filter(key=key), rows.filter(key=key)
    waiting = _grouped(places.filter(state=PlaceState.PARKED))
    taken = {
        kind: _grouped(_held(places.filter(kind=kind), kind)) for kind in (LimitKind.RUN.value, LimitKind.OPEN.value)
    }
    busy = {name for counted in (waiting, *taken.values()) for name in counted}
    first = sorted(busy, key=lambda name: (-waiting.get(name, _NONE)[0], name))[:MOST]
    found = {(row.limit, row.key): row for row in _of_names(rows, first)}
    if seen is None and len(found) < MOST:
        # Beside them, those that were used last.
        found = {(row.limit, row.key): row for row in rows.order_by("-used_at")[: MOST - len(found)]} | found
    keys = [
        _seen(row, waiting.get(name, _NONE), taken.get(row.kind, {}).get(name, _NONE)) for name, row in found.items()
    ]
    keys.sort(key=lambda one: (-one.parked, -one.taken, one.limit, one.key))
    if key is not None:
        for one in keys:
            of_key = places.filter(limit=one.limit, key=one.key)
            one.holders = _shown(_held(of_key.exclude(kind=LimitKind.RATE), one.kind))
            one.waiting = _shown(of_key.filter(state=PlaceState.PARKED))
    return Seen(clock.read(using), keys, max(len(busy) - len(keys), 0))


_Counted = tuple[int, dt.datetime | None]
_NONE: _Counted = (0, None)


def _seen(row: LimitKey, parked: _Counted, taken: _Counted) -> SeenKey:
    return SeenKey(row.limit, row.key, row.kind, row.number, row.seconds, taken[0], parked[0], parked[1])


def _held(places: QuerySet[Place], kind: str) -> QuerySet[Place]:
    return places.exclude(state=PlaceState.PARKED).filter(limiting.holding(kind))


def _grouped(places: QuerySet[Place]) -> dict[tuple[str, str], _Counted]:
    rows = places.order_by().values_list("limit", "key").annotate(number=Count("pk"), oldest=Min("since"))
    return {(limit, key): (number, oldest) for limit, key, number, oldest in rows}


def _of_names(rows: QuerySet[LimitKey], names: list[tuple[str, str]]) -> Iterable[LimitKey]:
    wanted = set(names)
    some = rows.filter(limit__in={limit for limit, _ in wanted}, key__in={key for _, key in wanted})
    return [row for row in some if (row.limit, row.key) in wanted]


def _shown(places: QuerySet[Place]) -> list[SeenPlace]:
    rows = places.order_by("since", "pk").values_list("execution_id", "execution__task", "execution__status", "since")
    return [SeenPlace(*row) for row in rows[:MOST_OF_KEY]]


def with_limit(situation: Situation, seen: QuerySet[Execution] | None = None) -> Situation:
    """Return the situation with the place that its execution waits for; no query unless it is parked.

    Args:
        seen: The executions that may be seen; all by default.
    """
    if not situation.execution.is_parked:
        return situation
    places = Place.objects.using(database())
    mine = places.filter(execution_id=situation.execution.pk, state=PlaceState.PARKED).first()
    if mine is None:
        return situation
    row = LimitKey.objects.using(database()).filter(limit=mine.limit, key=mine.key).first()
    before = places.filter(limit=mine.limit, key=mine.key, state=PlaceState.PARKED, since__lt=mine.since).count()
    if row is None or row.kind == LimitKind.RATE:
        return replace(situation, parked=Parked(mine.limit, mine.key, None, 0, mine.since, before))
    held = limiting.holders(mine.limit, mine.key, row.kind).order_by("since", "pk")
    told = held if seen is None else held.filter(execution__in=seen.order_by())
    holders = tuple(told.values_list("execution_id", flat=True)[:MOST_HOLDERS])
    parked = Parked(mine.limit, mine.key, row.number, held.count(), mine.since, before, holders)
    return replace(situation, parked=parked)
