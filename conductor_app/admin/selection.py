"""The executions that an operator's action is about, in bounded pieces, and who is concerned beside them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from django.db.models import QuerySet

from conductor_app.models import Execution, database
from conductor_app.states import OPEN_STATUSES

#: Most executions of one action from a list.
BULK_LIMIT = 1_000
#: As many rows are read at once; each is changed in a transaction of its own.
CHUNK = 100
#: Descendants are counted up to here.
COUNT_LIMIT = 10_000


def chunks(ids: list[uuid.UUID], size: int = CHUNK) -> Iterator[list[uuid.UUID]]:
    """Return the ids in pieces, so that no statement is too long."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def parse_ids(text: str) -> list[uuid.UUID]:
    """Return the ids of a form's field, each once and at most ``BULK_LIMIT``; what is none is left out."""
    found: dict[uuid.UUID, None] = {}
    for part in text.split(","):
        try:
            found[uuid.UUID(part.strip())] = None
        except ValueError:
            continue
    return list(found)[:BULK_LIMIT]


def executions(ids: list[uuid.UUID]) -> QuerySet[Execution]:
    """Return the executions with these ids."""
    return Execution.objects.using(database()).filter(pk__in=ids)


def family(ids: list[uuid.UUID], only: Execution | None) -> dict[str, Any]:
    """Return who else is concerned by a cancellation."""
    unfinished = executions(ids).filter(status__in=sorted(OPEN_STATUSES))
    parents = Execution.objects.using(database()).filter(
        pk__in=unfinished.filter(parent__isnull=False).values("parent_id"), status__in=sorted(OPEN_STATUSES)
    )
    count, is_more = _count_descendants(ids)
    return {
        "shows_family": True,
        "descendants": count,
        "more_descendants": is_more,
        "told_parents": parents.exclude(pk__in=ids).count(),
        "parent_is_open": only is not None and only.parent is not None and only.parent.status in OPEN_STATUSES,
    }


def _count_descendants(ids: list[uuid.UUID]) -> tuple[int, bool]:
    """Return how many unfinished descendants go with executions, and whether there are more than were counted.

    As ``api.cancel`` walks: through what is unfinished alone.
    """
    seen = set(ids)
    chosen = len(seen)
    level = [
        pk
        for chunk in chunks(ids)
        for pk in executions(chunk).filter(status__in=sorted(OPEN_STATUSES)).values_list("pk", flat=True)
    ]
    while level:
        below: list[uuid.UUID] = []
        for chunk in chunks(level):
            children = Execution.objects.using(database()).filter(parent_id__in=chunk, status__in=sorted(OPEN_STATUSES))
            below += children.values_list("pk", flat=True)[: COUNT_LIMIT + 1]
            if len(seen) + len(below) - chosen > COUNT_LIMIT:
                return COUNT_LIMIT, True
        level = [pk for pk in below if pk not in seen]
        seen.update(level)
    return len(seen) - chosen, False
