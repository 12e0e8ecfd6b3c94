"""The runs of an execution as its page shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conductor_app.admin import pieces
from conductor_app.admin.tracebacks import Frame, frames
from conductor_app.models import Attempt
from conductor_app.store import owners
from conductor_app.telling import words
from conductor_app.telling.attempts import has_failed, queue_seconds, run_seconds


def shown(row: Attempt, asked: Iterable[str], *, is_open: bool) -> dict[str, Any]:
    """Return what the template shows of a run that has ended.

    Args:
        row: The run.
        asked: What people had asked for before it, in words.
        is_open: Whether its traceback may be shown.
    """
    traced = frames(row.traceback) if is_open else []
    return {
        "run": row.run,
        "attempt": row.attempt,
        "worker": pieces.isolated(owners.shown(row.worker)),
        "queued": words.duration(queue_seconds(row)),
        "began": words.exact(row.started_at),
        "asked": [words.visible(text) for text in asked],
        "took": words.duration(run_seconds(row)),
        "outcome": row.get_outcome_display(),
        "has_failed": has_failed(row),
        "step": words.visible(row.step),
        "error_class": words.visible(row.error_class),
        "message": words.visible(words.first_line(row.message, pieces.PREVIEW)),
        "frames": [Frame(words.visible(frame.text), frame.is_own) for frame in traced],
    }
