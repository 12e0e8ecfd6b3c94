"""``conductor operations``: who has asked for what, how far it is, and what became of each execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.core.management.base import CommandError, CommandParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import Output, plain
from conductor_app.management.subcommands.base import OK, USAGE, Subcommand, positive_int, positive_seconds
from conductor_app.management.subcommands.watch import HELP, SECONDS, View, refuse_for_programs, watch
from conductor_app.models import Operation, OperationItem, database
from conductor_app.store import clock
from conductor_app.telling.operations import (
    Progress,
    document,
    executions_of,
    in_short,
    item_documents,
    progress,
    status_now,
)
from conductor_app.telling.words import exact, short_name
from conductor_app.transitions import operating

#: Most operations that are listed, unless the call says another number.
LIMIT = 20
#: Executions of one that are drawn, and that its JSON document has.
MOST_DRAWN, MOST_ITEMS = 100, 10_000


class Operations(Subcommand):
    """Lists operations, or shows or stops one."""

    name = "operations"
    help = "List what people have asked for, newest first; or show one operation, follow it, or stop it."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare which one, and what is to be done."""
        parser.add_argument("id", nargs="?", type=positive_int, help="the number of one operation")
        parser.add_argument(
            "--stop", type=positive_int, metavar="ID", help="leave alone what this one has not done yet"
        )
        parser.add_argument("--going-on", action="store_true", help="only those that have not ended")
        parser.add_argument("--limit", type=positive_int, help=f"at most so many (default: {LIMIT})")
        help_text = HELP.replace("until Ctrl+C", "until all that it has acted on has ended, or Ctrl+C")
        parser.add_argument(
            "--watch", nargs="?", const=SECONDS, type=positive_seconds, metavar="SECONDS", help=help_text
        )

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """List, show or stop."""
        key, to_stop = options["id"], options["stop"]
        if to_stop is not None:
            if key is not None or options["watch"] is not None:
                raise CommandError("--stop ID stands alone.", returncode=USAGE)
            return _stop(out, to_stop)
        if options["watch"] is not None:
            refuse_for_programs(options)
            if key is None:
                raise CommandError("--watch follows one operation: give its number before it.", returncode=USAGE)
            return watch(out, options["watch"], lambda: _view(key))
        if key is None:
            return _list(out, options)
        operation = _find(key)
        if out.as_json:
            out.document(_in_full(operation))
        else:
            out.print(*_drawn(operation, progress(operation)))
        return OK


def _find(key: int) -> Operation:
    found = Operation.objects.using(database()).filter(pk=key).first()
    if found is None:
        raise CommandError(f"There is no operation {key}. It may have been pruned.")
    return found


def _stop(out: Output, key: int) -> int:
    operation = _find(key)
    was_going_on = operating.stop(key)
    operation = _find(key)
    found = progress(operation)
    out.document({"stopped_now": was_going_on, **document(operation, found)})
    what = "is stopped" if was_going_on else "had ended already"
    out.print(plain(f"Operation {key} {what}. {found.sentence}"))
    return OK


def _list(out: Output, options: dict[str, Any]) -> int:
    rows = Operation.objects.using(database()).order_by("-pk")
    if options["going_on"]:
        rows = rows.filter(finished_at__isnull=True)
    operations = list(rows[: options["limit"] or LIMIT])
    found = in_short(operations)
    out.document({"operations": [document(one, found[one.pk]) for one in operations]})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("id", "kind", "by", "created", "progress", "filters", "reason"):
        table.add_column(name, no_wrap=True)
    for one in operations:
        words = (found[one.pk].sentence, one.filters, one.reason)
        table.add_row(str(one.pk), one.kind, plain(_who(one)), exact(one.created_at), *map(plain, words))
    if operations:
        out.print(table)
    else:
        out.remark("No operation.")
    return OK


def _who(operation: Operation) -> str:
    return operation.actor or f"({operation.source})"


def _in_full(operation: Operation) -> dict[str, Any]:
    items = list(_items(operation)[: MOST_ITEMS + 1])
    return {
        **document(operation, progress(operation)),
        "items": item_documents(items[:MOST_ITEMS]),
        "items_are_complete": len(items) <= MOST_ITEMS,
    }


def _items(operation: Operation) -> Any:
    return OperationItem.objects.using(database()).filter(operation_id=operation.pk).order_by("pk")


def _view(key: int) -> View:
    operation = _find(key)
    found = progress(operation)
    return View(list(_drawn(operation, found)), clock.read(database()), found.is_settled)


def _drawn(operation: Operation, found: Progress) -> Iterator[RenderableType]:
    why = f": {operation.reason}" if operation.reason else ""
    yield plain(f"Operation {operation.pk}: {operation.kind} by {_who(operation)}{why}", style="bold")
    if operation.filters:
        yield plain(f"chosen by {operation.filters}")
    ends = "goes on" if operation.finished_at is None else f"ended {exact(operation.finished_at)}"
    if operation.stop_requested_at is not None:
        ends = f"stopped {exact(operation.stop_requested_at)}"
    yield plain(f"created {exact(operation.created_at)}, {ends}")
    yield plain(found.sentence)
    items = list(_items(operation)[: MOST_DRAWN + 1])
    executions = executions_of(items[:MOST_DRAWN])
    table = Table.grid(padding=(0, 2, 0, 0))
    for item in items[:MOST_DRAWN]:
        row = executions.get(item.execution_id)
        table.add_row(
            str(item.execution_id),
            plain(short_name(row.task) if row else ""),
            item.state,
            status_now(item, executions) or "-",
            plain(f"{item.message} {item.created_id or ''}".strip()),
        )
    if items:
        yield table
    if len(items) > MOST_DRAWN:
        yield Text("… more: --json has them", style="dim")
