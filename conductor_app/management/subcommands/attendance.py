"""What ``conductor doctor`` finds out about the workers that say themselves that they are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from django.core.exceptions import ImproperlyConfigured
from django.db import Error as AnyDatabaseError

from conductor_app.management.subcommands.base import counted
from conductor_app.management.subcommands.findings import Finding
from conductor_app.models import Worker
from conductor_app.telling import workers

#: Most kinds of workers that are told apart.
_MOST_KINDS = 4


def alive() -> list[Worker]:
    """Return the rows of workers that are there; none if the database does not tell, or the settings are wrong."""
    try:
        return workers.alive()
    except (AnyDatabaseError, ImproperlyConfigured):
        return []


def with_queues(served: frozenset[str] | None, rows: Sequence[Worker]) -> frozenset[str] | None:
    """Return the queues that workers consume, as they answered or have written."""
    if not rows:
        return served
    return (served or frozenset()).union(*(row.queue_names() for row in rows))


def seen(rows: Sequence[Worker]) -> Finding:
    """Tell whether workers are alike, and whether two have the same name."""
    if not rows:
        return Finding("seen", "OK", "No worker has written that it is there in the last minute.")
    kinds = Counter(_kind(row) for row in rows).most_common()
    text = f"{counted(len(rows), 'worker')} seen in the last minute"
    hint = ""
    if len(kinds) == 1:
        text += f": {kinds[0][0]}."
    else:
        shown = "; ".join(f"{number:,} of {kind}" for kind, number in kinds[:_MOST_KINDS])
        more = len(kinds) - _MOST_KINDS
        text += f", of {len(kinds)} kinds: {shown}{f'; and {more} more' if more > 0 else ''}."
        hint = "While a deployment is under way, that is as it should be. Else some have not been restarted."
    if names := _namesakes(rows):
        text += f" Two or more at once are called {', '.join(names[:5])}."
        hint = "Commands of Celery's mix them up. Give each a name of its own: celery worker -n NAME@%h"
        return Finding("seen", "WARN", text, hint)
    return Finding("seen", "OK", text, hint)


def _kind(row: Worker) -> str:
    release = f"release {row.release}, " if row.release else ""
    return f"{release}conductor_app {row.package}, Celery {row.celery}, Django {row.django}, Python {row.python}"


def _namesakes(rows: Sequence[Worker]) -> list[str]:
    """Return the names of workers of which one was seen after another had begun: it was not there to replace it."""
    latest: dict[str, Worker] = {}
    found = set()
    for row in sorted(rows, key=lambda row: row.started_at):
        before = latest.get(row.name)
        if before is not None and before.seen_at > row.started_at:
            found.add(row.name)
        if before is None or row.seen_at > before.seen_at:
            latest[row.name] = row
    return sorted(found)
