"""From which execution one was forked, and which ones were forked from it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from django.db.models import QuerySet

from conductor_app.models import Execution, Fork, database

#: Most forks of one execution that are told of: the latest.
MOST_FORKS = 20


@dataclass(frozen=True)
class Forks:
    """How an execution is related to others by being forked."""

    #: Its source; ``None`` if it is no fork, or nothing may be told of the source.
    forked_from: uuid.UUID | None = None
    #: The step of the source before which it was forked.
    before: str = ""
    #: Those that were forked from it, the latest first, with the step before which each was.
    forks: dict[uuid.UUID, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "forked_from": self.forked_from,
            "forked_before": self.before or None,
            "forks": [{"execution": key, "before": before} for key, before in self.forks.items()],
        }


def read_forks(execution: Execution, seen: QuerySet[Execution] | None = None) -> Forks:
    """Return how an execution is related to others, in one query; only roots are.

    Args:
        execution: Which one.
        seen: The executions that may be told of; ``None`` are all.
    """
    if execution.parent_id is not None:
        return Forks()
    rows = Fork.objects.using(database()).order_by()
    mine, others = rows.filter(pk=execution.pk), rows.filter(forked_from=execution.pk)
    if seen is not None:
        mine, others = mine.filter(forked_from__in=seen), others.filter(execution__in=seen)
    # Each by its own index: for a condition with OR, a planner may walk through the whole table.
    found = list(mine.union(others, all=True).order_by("-execution_id")[: MOST_FORKS + 1])
    own = next((row for row in found if row.pk == execution.pk), None)
    forks = {row.pk: row.before for row in found if row is not own}
    return Forks(
        forked_from=None if own is None else own.forked_from_id,
        before="" if own is None else own.before,
        forks=dict(list(forks.items())[:MOST_FORKS]),
    )
