"""``conductor ls``: list executions."""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table
from rich.text import Text

from conductor_app.management.output import Output, plain, status
from conductor_app.management.subcommands.base import OK, Subcommand, celery_app, load_durable_tasks, positive_int
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.telling.labels import attempts, document, label
from conductor_app.telling.words import clean, duration, first_line, short_name

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
        parser.add_argument(
            "--status",
            action="append",
            choices=[item.value for item in ExecutionStatus],
            help="only of this status; may be repeated",
        )
        parser.add_argument("--task", help="only of this task: its full name, or the last part of it")
        parser.add_argument("--queue", help="only in this Celery queue")
        parser.add_argument("--root-only", action="store_true", help="no children")
        parser.add_argument("--limit", type=positive_int, default=20, help="at most so many (default: 20)")

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """List them."""
        rows = Execution.objects.using(database()).order_by("-id").only(*FIELDS)
        if options["status"]:
            rows = rows.filter(status__in=options["status"])
        if options["task"]:
            rows = rows.filter(task__in=_task_names(options["task"]))
        if options["queue"]:
            rows = rows.filter(queue=options["queue"])
        if options["root_only"]:
            rows = rows.filter(parent__isnull=True)
        now = clock.read(database())
        shown = list(rows[: options["limit"] + 1])
        more = len(shown) > options["limit"]
        shown = shown[: options["limit"]]
        pending = _pending_steps(shown)
        failed_at = _failing_steps(shown)

        lines: list[tuple[str | Text, ...]] = []
        documents = []
        for row in shown:
            awaited = pending[row.pk]
            step = ", ".join(item.name for item in awaited[:3]) or failed_at.get(row.pk, "")
            shape = label(row, now, awaited)
            age = (now - row.created_at).total_seconds()
            error = row.error_message
            lines.append(
                (
                    str(row.pk),
                    plain(short_name(row.task)),
                    status(shape.mark, shape.word),
                    attempts(row),
                    plain(step),
                    duration(age),
                    plain(first_line(error)),
                )
            )
            documents.append(
                {
                    **document(row, now, awaited),
                    "failed_at_step": failed_at.get(row.pk),
                    "age_seconds": round(age, 3),
                    "error": error or None,
                }
            )
        out.document({"executions": documents, "more": more})
        if not shown:
            out.print(Text(f"No executions{_described(options)}."))
            return OK
        out.print(_table(lines, out.width))
        if more:
            out.note(f"… and older ones: --limit {options['limit'] * 5} shows more.")
        return OK


def _table(lines: list[tuple[str | Text, ...]], width: int) -> Table:
    """Lay out the rows; on a narrow screen the error is cut, or left out, before anything else gives way."""
    names = ("id", "task", "status", "attempt", "step", "age", "error")
    widths = [max(len(name), *(len(line[number]) for line in lines)) + 2 for number, name in enumerate(names[:-1])]
    room = width - sum(widths)
    shown = names if room >= MIN_ERROR_WIDTH else names[:-1]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in shown:
        table.add_column(name, no_wrap=name not in ("task", "step"), overflow="ellipsis" if name == "error" else "fold")
    for line in lines:
        error = line[-1]
        if isinstance(error, Text):
            error.truncate(max(room, 1), overflow="ellipsis")
        table.add_row(*line[: len(shown)])
    return table


def _task_names(wanted: str) -> list[str]:
    """Return the full names that the user may mean; the name itself if no such task is known (any more)."""
    names = load_durable_tasks(celery_app())
    return [wanted, *(name for name in names if name != wanted and short_name(name) == wanted)]


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


def _described(options: dict[str, Any]) -> str:
    filters = [f"{name} {clean(str(options[name]))}" for name in ("task", "queue") if options[name]]
    if options["status"]:
        filters.insert(0, f"status {' or '.join(options['status'])}")
    return f" of {', '.join(filters)}" if filters else ""
