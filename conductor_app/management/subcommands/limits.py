"""``conductor limits``: who has a place of a limit, and who waits for one."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.core.management.base import CommandParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import Output, plain, table_of
from conductor_app.management.subcommands.base import OK, Subcommand, counted, positive_seconds
from conductor_app.management.subcommands.watch import HELP, SECONDS, View, refuse_for_programs, watch
from conductor_app.states import LimitKind
from conductor_app.telling import limits
from conductor_app.telling.limits import Seen, SeenKey, SeenPlace
from conductor_app.telling.words import duration, short_name, since


class Limits(Subcommand):
    """Shows the keys of limits, in six queries however many there are."""

    name = "limits"
    help = "Show the limits, how many places are taken, and who waits for one."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument("limit", nargs="?", help="Only the keys of this limit.")
        parser.add_argument("key", nargs="?", help="Only this key, with the executions.")
        parser.add_argument("--watch", nargs="?", const=SECONDS, type=positive_seconds, metavar="SECONDS", help=HELP)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Show them, once or again and again."""

        def read() -> Seen:
            return limits.read(limit=options["limit"], key=options["key"])

        if options["watch"] is not None:
            refuse_for_programs(options)

            def view() -> View:
                seen = read()
                return View(_drawn(seen), seen.now)

            return watch(out, options["watch"], view)
        seen = read()
        out.document(seen.document())
        out.print(*_drawn(seen))
        return OK


def _drawn(seen: Seen) -> list[RenderableType]:
    if not seen.keys:
        return [Text("No execution has asked for a place of a limit in the last day.")]
    table = table_of("limit", "key", "places", "parked", "oldest parked")
    for key in seen.keys:
        oldest = "" if key.oldest_parked_at is None else since(key.oldest_parked_at, seen.now)
        table.add_row(plain(key.limit), plain(key.key), _places(key), str(key.parked or ""), oldest)
    drawn: list[RenderableType] = [table]
    if seen.more:
        drawn.append(Text(f"… and {counted(seen.more, 'key')} more.", "dim"))
    for key in seen.keys:
        for title, places in (("has a place", key.holders), ("waits", key.waiting)):
            if places:
                drawn += [Text(), _executions(title, places, seen.now)]
    return drawn


def _places(key: SeenKey) -> str:
    if key.kind == LimitKind.RATE:
        burst = f", {key.number} at once" if key.number > 1 else ""
        return f"one each {duration(key.seconds or 0.0)}{burst}"
    return f"{key.taken} of {key.number} {'run' if key.kind == LimitKind.RUN else 'open'}"


def _executions(title: str, places: list[SeenPlace], now: dt.datetime) -> Table:
    table = table_of(title, "task", "status", "since")
    for place in places:
        table.add_row(str(place.id), plain(short_name(place.task)), place.status, f"{since(place.since, now)} ago")
    return table
