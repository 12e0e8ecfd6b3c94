"""What ``conductor doctor`` finds out about schedules."""

from __future__ import annotations

from collections.abc import Iterator

from conductor_app.engine.schedules import planned
from conductor_app.management.subcommands.base import counted
from conductor_app.management.subcommands.findings import Finding
from conductor_app.models import Schedule, database
from conductor_app.store import clock
from conductor_app.telling.schedules import ABSENT, OVERDUE, PAUSED, state
from conductor_app.telling.words import clean, since

#: So many are named.
_MOST_NAMES = 5


def schedule_findings() -> Iterator[Finding]:
    """Look at which are overdue, paused or out of the code; nothing where nobody has any."""
    now = clock.read(database())
    rows = list(Schedule.objects.using(database()).order_by("name"))
    in_code = planned()
    by_state: dict[str, list[Schedule]] = {}
    for row in rows:
        by_state.setdefault(state(row, now), []).append(row)
    late, paused, absent = (by_state.get(found, []) for found in (OVERDUE, PAUSED, ABSENT))
    known = {row.name for row in rows}
    if late:
        longest = since(min(row.next_at or now for row in late), now)
        text = f"{counted(len(late), 'schedule')} overdue, for {longest} by now: {_names(late)}."
        yield Finding("schedules", "FAIL", text, "Is a worker there that has their tasks in its code? Look at its log.")
    if absent:
        yield Finding(
            "schedules",
            "WARN",
            f"{counted(len(absent), 'schedule')} paused since no worker's code has had it: {_names(absent)}.",
            "They stay until their tasks are back. If that was meant, nothing is to be done.",
        )
    if paused:
        yield Finding("schedules", "WARN", f"{counted(len(paused), 'schedule')} paused: {_names(paused)}.", _HINT)
    if unknown := sorted(in_code.keys() - known):
        number, names = counted(len(unknown), "schedule"), ", ".join(map(clean, unknown[:_MOST_NAMES]))
        text = f"No worker has stored {number} so far: {names}."
        yield Finding("schedules", "WARN", text, "A worker that has them in its code does so with its first sweep.")
    if rows and not (late or paused or absent):
        yield Finding("schedules", "OK", f"{counted(len(rows), 'schedule')}, none overdue or paused.")


_HINT = "manage.py conductor schedules says by whom and why, and --unpause NAME lets one go on."


def _names(rows: list[Schedule]) -> str:
    names = ", ".join(clean(row.name) for row in rows[:_MOST_NAMES])
    return f"{names} and {len(rows) - _MOST_NAMES} more" if len(rows) > _MOST_NAMES else names
