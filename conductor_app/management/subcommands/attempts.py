"""The runs of an execution, for ``conductor show``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import plain
from conductor_app.models import Attempt
from conductor_app.store import owners
from conductor_app.telling.attempts import has_failed, queue_seconds, run_seconds
from conductor_app.telling.history import in_short
from conductor_app.telling.operations import Deed
from conductor_app.telling.story import Story
from conductor_app.telling.words import clean, duration, exact


def drawn(story: Story) -> Iterator[RenderableType]:
    """Draw the runs that have ended as a table, and the tracebacks of those that failed."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "attempt"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("began", no_wrap=True)
    for name in ("queued", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("worker", "outcome"):
        table.add_column(name, no_wrap=True)
    table.add_column("error, or what it waits for")
    asked = story.asked_for
    if asked:
        table.add_column("asked for")
    for row in story.attempts:
        deeds = [plain("; ".join(deed.text(story.execution) for deed in asked.get(row.run, ())))] if asked else []
        table.add_row(
            str(row.run),
            str(row.attempt),
            exact(row.started_at),
            duration(queue_seconds(row)),
            duration(run_seconds(row)),
            plain(owners.shown(row.worker)),
            str(row.get_outcome_display()),
            plain(in_short(row) if row.error_class else row.step),
            *deeds,
        )
    yield Text("Attempts", style="bold")
    yield Padding(table if story.attempts else Text("no run has ended", style="dim"), (0, 0, 1, 2))
    for row in story.attempts:
        traceback = row.traceback.strip()
        if has_failed(row) and traceback:
            yield Text(f"Traceback of attempt {row.attempt}, run {row.run}", style="bold")
            yield Padding(Text("\n".join(map(clean, traceback.splitlines())), style="dim"), (0, 0, 1, 2))


def document(row: Attempt, deeds: Iterable[Deed]) -> dict[str, Any]:
    """Return a run that has ended for programs, with what people had asked for before it."""
    return {
        "run": row.run,
        "attempt": row.attempt,
        "worker": row.worker,
        "due_at": row.due_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "queued_seconds": queue_seconds(row),
        "ran_seconds": run_seconds(row),
        "outcome": row.outcome,
        "step": row.step or None,
        "class": row.error_class or None,
        "message": row.message or None,
        "traceback": row.traceback or None,
        "asked_for": [deed.document() for deed in deeds],
    }
