"""``conductor ls``: list executions."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import Output, plain, status
from conductor_app.management.subcommands import filters
from conductor_app.management.subcommands.base import OK, Subcommand, accept_quiet, positive_seconds
from conductor_app.management.subcommands.watch import HELP, SECONDS, View, refuse_for_programs, watch
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.telling.labels import attempts, document, label
from conductor_app.telling.tags import tags_of_trees
from conductor_app.telling.words import duration, first_line, short_name

#: Most executions that are listed, unless the call says another number.
LIMIT = 20
#: Columns of a terminal; with less room than this, errors are left out.
MIN_ERROR_WIDTH = 16
#: What a row shows; payloads and results stay in the database.
FIELDS = (
    "id",
    "task",
    "queue",
    "status",
    "attempt",
    "max_attempts",
    "error",
    "parent_id",
    "root_id",
    "step",
    "lease_owner",
    "due_at",
    "dispatch_at",
    "held_at",
    "held_by",
    "hold_reason",
    "created_at",
    "started_at",
    "finished_at",
)


class Ls(Subcommand):
    """Lists executions, newest first, in a handful of queries however many rows are shown."""

    name = "ls"
    help = "List executions, newest first."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the filters."""
        filters.add_filters(parser, limit=LIMIT)
        accept_quiet(parser)
        parser.add_argument("--watch", nargs="?", const=SECONDS, type=positive_seconds, metavar="SECONDS", help=HELP)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """List them, once or again and again."""
        if options["watch"] is not None:
            refuse_for_programs(options)
            return watch(out, options["watch"], lambda: _view(_read(options), options, out.width))
        listing = _read(options, with_tags=out.as_json)
        out.document({"executions": [line.document for line in listing.lines], "more": listing.more})
        if not listing.lines:
            out.remark(_nothing(options))
            return OK
        out.print(_table(listing.lines, out.width))
        for line in listing.lines:
            out.quietly(line.cells[0])
        if listing.more:
            out.note(_older(options))
        return OK


@dataclass(frozen=True)
class Line:
    """One execution, for people and for programs."""

    cells: tuple[str | Text, ...]
    document: dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """What is listed."""

    lines: list[Line]
    #: Whether there are older ones.
    more: bool
    #: The database's clock.
    now: dt.datetime


def _read(options: dict[str, Any], *, with_tags: bool = False) -> Listing:
    now = clock.read(database())
    limit = options["limit"] or LIMIT
    rows = filters.chosen(options, now).order_by("-id").only(*FIELDS)
    found = list(rows[: limit + 1])
    shown = found[:limit]
    pending = _pending_steps(shown)
    failed_at = _failing_steps(shown)
    # For programs alone: a screen has no room for them.
    tags = tags_of_trees(row.root_id for row in shown) if with_tags else {}
    lines = [_line(row, now, pending[row.pk], failed_at.get(row.pk), tags.get(row.root_id, {})) for row in shown]
    return Listing(lines, len(found) > limit, now)


def _line(
    row: Execution, now: dt.datetime, awaited: list[Step], failed_at: str | None, tags: Mapping[str, str]
) -> Line:
    step = ", ".join(item.name for item in awaited[:3]) or failed_at or ""
    shape = label(row, now, awaited)
    age = (now - row.created_at).total_seconds()
    ran = None if row.started_at is None else ((row.finished_at or now) - row.started_at).total_seconds()
    error = row.error_message
    return Line(
        (
            str(row.pk),
            plain(short_name(row.task)),
            status(shape.mark, shape.word),
            attempts(row),
            plain(step),
            "" if ran is None else duration(ran),
            duration(age),
            plain(first_line(error)),
        ),
        {
            **document(row, now, awaited),
            "failed_at_step": failed_at,
            "ran_seconds": None if ran is None else round(max(ran, 0.0), 3),
            "age_seconds": round(age, 3),
            "error": error or None,
            "tags": tags,
        },
    )


def _view(listing: Listing, options: dict[str, Any], width: int) -> View:
    if not listing.lines:
        return View([plain(_nothing(options))], listing.now)
    older = [Text(_older(options), "dim")] if listing.more else []
    return View([_table(listing.lines, width), *older], listing.now)


def _nothing(options: dict[str, Any]) -> str:
    return f"No executions{filters.described(options)}."


def _older(options: dict[str, Any]) -> str:
    return f"… and older ones: --limit {(options['limit'] or LIMIT) * 5} shows more."


def _table(lines: list[Line], width: int) -> Table:
    """Lay out the rows; on a narrow screen errors are cut or left out, then how long each ran, before anything else."""
    names = ["id", "task", "status", "attempt", "step", "ran", "age", "error"]
    widths = [max(len(name), *(len(line.cells[number]) for line in lines)) + 2 for number, name in enumerate(names)]
    room = width - sum(widths[:-1])
    left_out = set() if room >= MIN_ERROR_WIDTH else {"error"} if room >= 0 else {"error", "ran"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown = [number for number, name in enumerate(names) if name not in left_out]
    for name in (names[number] for number in shown):
        table.add_column(name, no_wrap=name not in ("task", "step"), overflow="ellipsis" if name == "error" else "fold")
    for line in lines:
        error = line.cells[-1]
        if isinstance(error, Text):
            error.truncate(max(room, 1), overflow="ellipsis")
        table.add_row(*(line.cells[number] for number in shown))
    return table


def _pending_steps(rows: list[Execution]) -> dict[uuid.UUID, list[Step]]:
    found: dict[uuid.UUID, list[Step]] = defaultdict(list)
    waiting = [row.pk for row in rows if row.status == ExecutionStatus.WAITING]
    if waiting:
        steps = Step.objects.using(database()).filter(execution_id__in=waiting, status=StepStatus.PENDING)
        for step in steps.only("execution_id", "name", "kind", "status").order_by("id"):
            found[step.execution_id].append(step)
    return found


def _failing_steps(rows: list[Execution]) -> dict[uuid.UUID, str]:
    failed = [row.pk for row in rows if row.status == ExecutionStatus.FAILED]
    if not failed:
        return {}
    failures = FailedExecution.objects.using(database()).filter(pk__in=failed).exclude(step="")
    return dict(failures.values_list("pk", "step"))
