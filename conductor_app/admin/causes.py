"""Failures grouped by what caused them: the error's class and its message, numbers and names aside."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Case, F, QuerySet, Value, When
from django.db.models.functions import Substr

from conductor_app.admin.grouping import as_stored, grouped
from conductor_app.models import FailedExecution, database
from conductor_app.store import clock
from conductor_app.telling.words import first_line

#: Failures that are grouped: the latest so many of so many days.
LATEST = 10_000
DAYS = 7
#: Characters of a message that tell causes apart.
MESSAGE_LENGTH = 200
MOST_GROUPS = 20
#: Failures of one cause that a list shows.
MOST_FAILURES = 1_000

_VARYING = re.compile(
    r"""
      [0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}    # a UUID
    | 0x[0-9a-fA-F]+                                          # an address
    | '[^']*' | "[^"]*"                                       # a name or value in quotes
    | [0-9]+(?:[.,:][0-9]+)*                                  # a number, an amount, a time
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Failure:
    """One failure of a cause."""

    execution_id: uuid.UUID
    error_class: str
    #: The message, if it may be seen.
    sample: str


@dataclass
class Group:
    """The failures of one cause."""

    cause: str
    error_class: str
    #: The latest message, its first line; empty if it may not be seen.
    sample: str = ""
    count: int = 0
    first_at: dt.datetime | None = None
    last_at: dt.datetime | None = None
    tasks: set[str] = field(default_factory=set)

    def add(self, task: str, message: str, count: int, first_at: dt.datetime, last_at: dt.datetime) -> None:
        """Add failures of one task with one message."""
        self.tasks.add(task)
        self.count += count
        self.first_at = first_at if self.first_at is None else min(self.first_at, first_at)
        if self.last_at is None or last_at > self.last_at:
            self.last_at = last_at
            self.sample = first_line(message, MESSAGE_LENGTH)


def normalised(message: str) -> str:
    """Return the first line of a message without what differs from one failure to the next."""
    return _VARYING.sub("…", first_line(message, MESSAGE_LENGTH))


def cause_of(error_class: str, message: str) -> str:
    """Return a short name for the cause of a failure."""
    text = f"{error_class}\n{normalised(message)}"
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


def groups(seen: QuerySet[FailedExecution] | None = None, *, with_messages: bool = True) -> list[Group]:
    """Return the causes of the latest failures, the most frequent first; one query.

    Args:
        seen: The failures that may be seen; ``None`` are all.
        with_messages: Whether messages may be seen, too. If not, none is read, and the error's class alone is a cause.
    """
    # Own failures alone are causes; a condition on the root cause would lead a planner to its index, and so to all.
    columns = ["error_class", "task", "is_own", *(["beginning"] if with_messages else [])]
    rows = grouped(_latest(seen).values(*columns, "failed_at")[:LATEST], columns, "MIN(failed_at)", "MAX(failed_at)")
    found: dict[str, Group] = {}
    for error_class, task, is_own, *beginnings, count, first_at, last_at in rows:
        if not is_own:
            continue
        beginning = beginnings[0] if with_messages else ""
        cause = cause_of(error_class, beginning)
        group = found.setdefault(cause, Group(cause, error_class))
        group.add(task, beginning, count, as_stored(first_at), as_stored(last_at))
    return sorted(found.values(), key=lambda group: (-group.count, group.cause))[:MOST_GROUPS]


def failures_of(
    cause: str, seen: QuerySet[FailedExecution] | None = None, *, with_messages: bool = True
) -> list[Failure]:
    """Return the latest failures of one cause, ``MOST_FAILURES`` at most; one query. As for ``groups``."""
    columns = ["pk", "is_own", "error_class", *(["beginning"] if with_messages else [])]
    found: list[Failure] = []
    for key, is_own, error_class, *beginnings in _latest(seen).values_list(*columns)[:LATEST]:
        beginning = beginnings[0] if with_messages else ""
        if is_own and cause_of(error_class, beginning) == cause:
            found.append(Failure(key, error_class, beginning))
    return found[:MOST_FAILURES]


def _latest(seen: QuerySet[FailedExecution] | None) -> QuerySet[Any]:
    """Return the latest failures, as far back as they are looked at."""
    rows: QuerySet[Any] = FailedExecution.objects.using(database()) if seen is None else seen
    rows = rows.filter(failed_at__gte=clock.after(-dt.timedelta(days=DAYS)))
    own = Case(When(root_cause__isnull=True, then=Value(1)), default=Value(0))
    latest: QuerySet[Any] = rows.annotate(is_own=own, beginning=Substr(F("message"), 1, MESSAGE_LENGTH + 1))
    return latest.order_by("-failed_at")
