"""``conductor workers``: who is at work, and which queues they serve."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.core.management.base import CommandParser
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import STYLES, Output, plain, table_of
from conductor_app.management.subcommands.base import OK, Subcommand, counted, positive_seconds
from conductor_app.management.subcommands.watch import HELP, SECONDS, View, refuse_for_programs, watch
from conductor_app.telling import workers
from conductor_app.telling.words import short_name, since
from conductor_app.telling.workers import Attendance, SeenQueue, SeenWorker

_STYLES = {
    workers.ALIVE: STYLES["OK"],
    workers.STOPPING: STYLES["WARN"],
    workers.SILENT: STYLES["FAIL"],
    workers.SERVED: STYLES["OK"],
    workers.BUSY: STYLES["WARN"],
    workers.PAUSED: STYLES["WARN"],
    workers.UNSERVED: STYLES["FAIL"],
}
#: Columns of a terminal that has room for everything.
WIDE = 160
_WORDS = {workers.BUSY: "all busy", workers.UNSERVED: "by nobody", workers.PAUSED: "paused"}


class Workers(Subcommand):
    """Shows workers and queues, in seven queries however many there are."""

    name = "workers"
    help = "Show the workers that are there, what they run, and which queues they serve."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options."""
        parser.add_argument("--watch", nargs="?", const=SECONDS, type=positive_seconds, metavar="SECONDS", help=HELP)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Show them, once or again and again."""
        if options["watch"] is not None:
            refuse_for_programs(options)
            return watch(out, options["watch"], lambda: _view(out.width))
        seen = workers.read()
        out.document(seen.document())
        out.print(*_drawn(seen, out.width))
        return OK


def _view(width: int) -> View:
    seen = workers.read()
    return View(_drawn(seen, width), seen.now)


def _drawn(seen: Attendance, width: int) -> list[RenderableType]:
    drawn: list[RenderableType] = []
    if seen.workers:
        drawn.append(_workers(seen.workers, seen.now, is_wide=width >= WIDE))
    else:
        drawn.append(Text("No worker has been seen in the last minutes."))
    if seen.more_workers:
        drawn.append(Text(f"… and {counted(seen.more_workers, 'worker')} more.", "dim"))
    drawn.append(Text())
    if seen.queues:
        drawn.append(_queues(seen.queues, seen.now))
    else:
        drawn.append(Text("No queue is served, and nothing is queued."))
    if seen.more_queues:
        drawn.append(Text(f"… and {counted(seen.more_queues, 'queue')} more.", "dim"))
    return drawn


def _workers(found: list[SeenWorker], now: dt.datetime, *, is_wide: bool) -> Table:
    """Lay out the workers; on a narrow screen without their versions and the ids of what they run."""
    versions = ["versions"] if is_wide else []
    table = table_of("worker", "state", "pool", "busy", "lapsed", "queues", *versions, "release", "up", "seen", "runs")
    for worker in found:
        row = worker.row
        made_of = "" if row is None else f"{row.package}, Celery {row.celery}, Django {row.django}, Python {row.python}"
        table.add_row(
            plain(worker.name),
            Text(worker.state, _STYLES[worker.state]),
            "" if row is None else plain(row.pool),
            str(worker.busy) if worker.slots is None else f"{worker.busy}/{worker.slots}",
            str(worker.lapsed or ""),
            plain(",".join(worker.queues)),
            *([plain(made_of)] if is_wide else []),
            "" if row is None else plain(row.release),
            "" if row is None else since(row.started_at, now),
            "" if row is None else f"{since(row.seen_at, now)} ago",
            plain(_runs(worker, with_ids=is_wide)),
        )
    return table


def _runs(worker: SeenWorker, *, with_ids: bool) -> str:
    more = worker.running + worker.lapsed - len(worker.runs)
    shown = [f"{short_name(run.task)} {run.id}" if with_ids else short_name(run.task) for run in worker.runs]
    return ", ".join([*shown, f"{more} more"] if more > 0 else shown)


def _queues(found: list[SeenQueue], now: dt.datetime) -> Table:
    table = table_of("queue", "served", "queued", "due", "oldest due", "running", "a minute", "workers")
    for queue in found:
        first = ", ".join(queue.workers[:3])
        more = len(queue.workers) - 3
        table.add_row(
            plain(queue.name),
            Text(_WORDS.get(queue.state, "yes"), _STYLES[queue.state]),
            _bounded(queue.queued),
            _bounded(queue.due),
            "" if queue.oldest_due_at is None else since(queue.oldest_due_at, now),
            str(queue.running),
            f"{queue.per_minute:g}",
            plain(first if more <= 0 else f"{first} and {more} more"),
        )
    return table


def _bounded(count: int) -> str:
    return f"{workers.MOST_QUEUED}+" if count > workers.MOST_QUEUED else str(count)
