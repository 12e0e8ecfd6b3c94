"""From which step an execution is to run again: the steps to choose from, and what a fork keeps."""

from __future__ import annotations

from typing import Any

from conductor_app.admin import pieces
from conductor_app.engine.acting import fork_plan
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, Step, database
from conductor_app.telling import words

#: Most steps that the page names.
MOST_STEPS = 200


def choice(execution: Execution, before: str) -> dict[str, Any]:
    """Return what the page that asks shows of an execution's steps.

    Args:
        execution: Which one.
        before: The first step that is to run again; empty if none is chosen yet.
    """
    if not before:
        steps = Step.objects.using(database()).filter(execution_id=execution.pk).order_by("id")
        fields = ("name", "kind", "status", "task")
        found = list(steps.only(*fields)[: MOST_STEPS + 1])
        return {"choice": _shown(found), "is_choice": True}
    try:
        planned = fork_plan(execution, before)
    except ActionRefused as error:
        # In full it may name another execution, which a narrowed site may not show.
        return {"before": words.visible(before), "why_not": words.visible(error.reason)}
    return {"before": words.visible(before), "kept": _shown(planned.kept), "again": _shown(planned.again)}


def _shown(steps: list[Step]) -> dict[str, Any]:
    return {
        "steps": [
            {
                "key": step.name,
                "name": words.visible(step.name),
                "kind": step.get_kind_display(),
                "task": words.visible(words.short_name(step.task)) if step.task else "",
                "pill": pieces.step_pill(step),
            }
            for step in steps[:MOST_STEPS]
        ],
        "more": pieces.left_out(len(steps) - MOST_STEPS),
    }
