"""``conductor pause`` and ``conductor unpause``: let no run of a task begin for a while."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from rich.table import Table
from rich.text import Text

from conductor_app import api
from conductor_app.exceptions import ConductorError
from conductor_app.management.output import Output, plain
from conductor_app.management.subcommands.acting_as import accept_actor, by_whom, must_have_reason
from conductor_app.management.subcommands.base import OK, PROBLEM, USAGE, Subcommand, celery_app, counted
from conductor_app.models import PausedTask, database
from conductor_app.store import clock
from conductor_app.telling import stops
from conductor_app.telling.words import clean, duration, short_name
from conductor_app.transitions.operating import acting_for


class Pause(Subcommand):
    """Pauses a task, or lists those that are paused."""

    name = "pause"
    help = "Pause a task: no run of it begins until it is unpaused. --reason says why. Without a task: what is paused."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the task, by whom and why."""
        parser.add_argument("task", nargs="?", help="the task's full name, or the last part of it if no other has it")
        accept_actor(parser)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Pause it."""
        if options["task"] is None:
            return _list(out)
        must_have_reason(options)
        name = _full_name(options["task"])
        try:
            with acting_for(by_whom(options)):
                is_new = api.pause(name, options["reason"])
        except ConductorError as error:
            raise CommandError(str(error), returncode=PROBLEM) from None
        (paused,) = [one for one in stops.read_paused() if one.row.name == name]
        out.document({"ok": True, "changed": is_new, **paused.document()})
        queued = counted(paused.queued, "execution")
        text = (
            f"{clean(name)} is paused{'' if is_new else ' already'}, with {queued} queued. Runs that have begun go on."
        )
        out.print(plain(text))
        return OK


class Unpause(Subcommand):
    """Lets runs of a paused task begin again."""

    name = "unpause"
    help = "Let runs of a paused task begin again."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the task."""
        parser.add_argument("task", help="the task's full name, or the last part of it if no other has it")

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Unpause it."""
        name = _full_name(options["task"])
        try:
            was_paused = api.unpause(name)
        except ConductorError as error:
            raise CommandError(str(error), returncode=PROBLEM) from None
        out.document({"ok": was_paused, "task": name})
        if not was_paused:
            out.print(plain(f"{clean(name)} is not paused."))
            return PROBLEM
        out.print(plain(f"Runs of {clean(name)} begin again."))
        return OK


def _list(out: Output) -> int:
    found = stops.read_paused()
    out.document({"paused": [one.document() for one in found]})
    if not found:
        out.remark("No task is paused.")
        return OK
    now = clock.read(database())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("task", "queued", "for", "by", "reason"):
        table.add_column(name, overflow="fold")
    for one in found:
        row = one.row
        paused_for = Text(duration((now - row.paused_at).total_seconds()))
        table.add_row(plain(row.name), f"{one.queued:,}", paused_for, plain(row.paused_by), plain(row.reason))
    out.print(table)
    return OK


def _full_name(wanted: str) -> str:
    """Return the full name of the task that is meant."""
    app = celery_app()
    app.loader.import_default_modules()
    paused = PausedTask.objects.using(database()).values_list("name", flat=True)
    known = {*app.tasks, *paused}
    if wanted in known:
        return wanted
    alike = sorted(name for name in known if short_name(name) == wanted)
    if len(alike) > 1:
        names = ", ".join(alike[:5])
        raise CommandError(
            f"More than one task is called {clean(wanted)}: {names}. Give the full name.", returncode=USAGE
        )
    return alike[0] if alike else wanted
