"""``conductor schedules``: what starts by itself, and what somebody has to say to that."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from rich.table import Table

from conductor_app import api
from conductor_app.exceptions import ActionRefused
from conductor_app.management.output import Output, plain
from conductor_app.management.subcommands.acting_as import accept_actor, by_whom
from conductor_app.management.subcommands.base import OK, Subcommand
from conductor_app.models import Schedule, database
from conductor_app.store import clock
from conductor_app.telling.schedules import document, following, sentence
from conductor_app.telling.words import exact, short_name
from conductor_app.transitions.operating import acting_for


class Schedules(Subcommand):
    """Lists schedules, or pauses, unpauses or runs one."""

    name = "schedules"
    help = "List what starts by itself, and when; or pause, unpause or run one schedule."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare what is to be done."""
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--pause", metavar="NAME", help="let this one start nothing by itself")
        what.add_argument("--unpause", metavar="NAME", help="let it go on with the instants that come")
        what.add_argument("--run", metavar="NAME", dest="run_name", help="start its task now")
        accept_actor(parser)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """List, or act."""
        by = by_whom(options)
        for name, act in (
            (options["pause"], _pause),
            (options["unpause"], _unpause),
            (options["run_name"], _run),
        ):
            if name is not None:
                try:
                    with acting_for(by):
                        act(out, name)
                except (Schedule.DoesNotExist, ActionRefused) as error:
                    raise CommandError(str(error)) from None
                return OK
        return _list(out)


def _pause(out: Output, name: str) -> None:
    is_new = api.pause_schedule(name)
    _tell(out, name, {"paused_now": is_new}, "is paused" if is_new else "was paused already")


def _unpause(out: Output, name: str) -> None:
    was_paused = api.unpause_schedule(name)
    _tell(out, name, {"unpaused_now": was_paused}, "goes on" if was_paused else "was not paused")


def _run(out: Output, name: str) -> None:
    started = api.run_schedule(name)
    said = f"has started {started.pk}" if started else "starts its task when its last execution has ended"
    _tell(out, name, {"started": None if started is None else started.pk}, said)


def _tell(out: Output, name: str, done: dict[str, Any], said: str) -> None:
    row, now = Schedule.objects.using(database()).get(name=name), clock.read(database())
    out.document({**done, **document(row, now)})
    coming = following(row, now)
    out.print(plain(f"Schedule {name} {said}.{f' Next: {coming}.' if coming else ''}"))


def _list(out: Output) -> int:
    now = clock.read(database())
    rows = list(Schedule.objects.using(database()).order_by("name"))
    out.document({"schedules": [document(row, now) for row in rows]})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("name", "task", "line", "zone", "overlap", "catch up", "next", "last", "state", "note"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        last = exact(row.last_tick_at) if row.last_tick_at else "-"
        words = (row.name, short_name(row.task), row.line, row.zone, row.overlap, row.catch_up)
        table.add_row(*map(plain, (*words, following(row, now) or "-", last, sentence(row, now), row.note)))
    if rows:
        out.print(table)
    else:
        out.remark("No schedule.")
    return OK
