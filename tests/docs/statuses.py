"""The diagram of statuses, made from the moves that the code names, and what the database demands of each status.

``python -m tests.docs.statuses`` writes it.
"""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/explanation/how-it-works.md"
BEGIN, END = "<!-- statuses: made by `python -m tests.docs.statuses` -->\n", "<!-- end of statuses -->\n"
#: What a constraint may demand of a status, by the columns of it.
DEMANDS = {"lease_expires_at": "a lease", "dispatch_at": "a next publication", "finished_at": "an end"}


def diagram() -> str:
    """Return the diagram."""
    from conductor_app.states import FINAL_STATUSES, MOVES, ExecutionStatus

    arrows = [f"    {before or '[*]'} --> {after}: {why}" for (before, after), why in MOVES.items()]
    ends = [f"    {status} --> [*]" for status in ExecutionStatus if status in FINAL_STATUSES]
    return "\n".join(["```mermaid", "stateDiagram-v2", *arrows, *ends, "```", ""])


def demands() -> str:
    """Return the table of what a row of each status has, as the CHECK constraint on it says."""
    from conductor_app.states import ExecutionStatus

    lines = [f"| status | {' | '.join(DEMANDS.values())} |", f"|---|{'---|' * len(DEMANDS)}"]
    for status in ExecutionStatus:
        allowed = [has for has in itertools.product((False, True), repeat=len(DEMANDS)) if is_allowed(status, has)]
        cells = ["yes" if all(each) else "may have" if any(each) else "no" for each in zip(*allowed, strict=True)]
        lines.append(f"| `{status}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "A child that its map holds back is queued, and has no next publication.", ""])


def is_allowed(status: str, has: tuple[bool, ...]) -> bool:
    """Tell whether the constraint lets a row have these instants."""
    from django.core.exceptions import ValidationError
    from django.utils import timezone

    from conductor_app.models import Execution

    (constraint,) = (each for each in Execution._meta.constraints if each.name == "conductor_ex_status")
    now = timezone.now()
    instants = {column: now if is_set else None for column, is_set in zip(DEMANDS, has, strict=True)}
    row = Execution(id=uuid.uuid4(), status=status, due_at=now, **instants)
    try:
        constraint.validate(Execution, row)
    except ValidationError:
        return False
    return True


def written() -> str:
    """Return what stands in the page."""
    return f"{diagram()}\nWhat the database demands of each status, in its row:\n\n{demands()}"


def write() -> None:
    """Put it into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{written()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    django.setup()
    write()
