"""The executions that an operator's action is about, in bounded pieces, and who is concerned beside them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from django.db.models import Q, QuerySet
from django.http import QueryDict
from django.urls import NoReverseMatch, reverse
from django.utils.translation import gettext

from conductor_app.models import Execution, Operation, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import OPEN_STATUSES
from conductor_app.transitions import operating

#: Most executions of one action from a list.
BULK_LIMIT = 1_000
#: As many rows are read at once; each is changed in a transaction of its own.
CHUNK = 100
#: More than so many that match a list's filters are an operation, which sweepers work off, where they can.
AT_ONCE = 100
#: Most executions of one operation.
MOST = operating.MOST_ITEMS
#: Stands in a form for all that match.
ALL = "all"
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


def fitting(condition: Q, rows: QuerySet[Any]) -> ExecutionQuerySet:
    """Return the executions of a list's rows for which something is possible."""
    return Execution.objects.using(database()).filter(condition, pk__in=rows.order_by().values("pk"))


def in_words(found: Any, query: QueryDict) -> str:
    """Return the filters of a list as a person reads them: ``status: failed, created: last hour``."""
    parts: list[str] = []
    told = {"p", "o", "refresh", "q", "_changelist_filters"}
    for spec in found.filter_specs:
        given = [name for name in spec.expected_parameters() if name in query]
        if given:
            chosen = [str(choice["display"]) for choice in spec.choices(found) if choice.get("selected")]
            parts.append(f"{spec.title}: {' / '.join(chosen)}")
            told |= set(given)
    parts += [f"{name}: {query[name]}" for name in query if name not in told]
    parts += [gettext("search: %(text)s") % {"text": found.query}] if found.query else []
    return ", ".join(parts) or gettext("all of the list %(name)s") % {"name": found.opts.verbose_name_plural}


def page_of(operation: Operation, site: str) -> str | None:
    """Return the address of an operation's page, if a site has one."""
    try:
        return reverse("admin:conductor_app_operation_change", args=[operation.pk], current_app=site)
    except NoReverseMatch:
        return None


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
