"""``conductor show``: one execution, its tree, and what has happened to it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import uuid
from collections.abc import Iterator
from typing import Any

from django.core.management.base import CommandError, CommandParser
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from conductor_app.management.output import STYLES, Output, plain, status
from conductor_app.management.subcommands import attempts
from conductor_app.management.subcommands.base import (
    OK,
    USAGE,
    Subcommand,
    execution_ids,
    not_found,
    positive_seconds,
)
from conductor_app.management.subcommands.watch import HELP, SECONDS, View, refuse_for_programs, watch
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import owners
from conductor_app.telling import labels
from conductor_app.telling.headlines import headline
from conductor_app.telling.history import history, shortened
from conductor_app.telling.keys import shown_key
from conductor_app.telling.labels import STEP_MARKS, label
from conductor_app.telling.mailbox import unclaimed
from conductor_app.telling.state import counted, progress_document
from conductor_app.telling.steps import MOST_STEPS
from conductor_app.telling.stops import document_of_hold, document_of_pause
from conductor_app.telling.story import Story, read
from conductor_app.telling.words import clean, duration, exact, first_line, offset, short_name
from conductor_app.transitions import kinds
from conductor_app.values.failures import load_failure
from conductor_app.values.redaction import decode, readable, redact

#: Characters of a value in the steps' table.
PREVIEW = 60
#: Characters of a payload, a result, and lines of a traceback.
LONG_PREVIEW = 500


class Show(Subcommand):
    """Shows one execution, in a few queries however large its tree is."""

    name = "show"
    help = "Show one execution: what it is doing, its tree, its steps, its error."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the id, and how to follow it."""
        parser.add_argument("id", nargs="?", help="the execution's id, or its beginning")
        parser.add_argument(
            "--attempts", action="store_true", help="each run: on which worker, for how long, how it ended, tracebacks"
        )
        # As a text: in `show --watch ID`, argparse takes the id for the number of seconds.
        help_text = HELP.replace("until Ctrl+C", "until its whole tree is final, or Ctrl+C")
        parser.add_argument("--watch", nargs="?", const=SECONDS, metavar="SECONDS", help=help_text)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Show it, once or until it is final."""
        text, seconds = _id_and_seconds(options)
        (execution_id,) = execution_ids([text])
        with_attempts = bool(options["attempts"])
        if seconds is not None:
            refuse_for_programs(options)
            return watch(out, seconds, lambda: _view(execution_id, with_attempts=with_attempts))
        story = _story(execution_id, whole=out.as_json)
        if out.as_json:
            out.document(_document(story))
            return OK
        out.print(*_drawn(story, with_attempts=with_attempts))
        return OK


def _id_and_seconds(options: dict[str, Any]) -> tuple[str, float | None]:
    """Return the id, and how often to look; ``None`` is once."""
    text, seconds = options["id"], options["watch"]
    if text is None and isinstance(seconds, str):
        text, seconds = seconds, SECONDS
    if text is None:
        raise CommandError("Which execution? Give its id; `manage.py conductor ls` shows them.", returncode=USAGE)
    if isinstance(seconds, str):
        try:
            seconds = positive_seconds(seconds)
        except argparse.ArgumentTypeError as error:
            raise CommandError(f"argument --watch: {error}", returncode=USAGE) from None
    return text, seconds


def _story(execution_id: uuid.UUID, *, whole: bool = False) -> Story:
    story = read(execution_id, preview=None if whole else LONG_PREVIEW, whole=whole)
    if story is None:
        raise CommandError(not_found(execution_id))
    return story


def _view(execution_id: uuid.UUID, *, with_attempts: bool) -> View:
    story = _story(execution_id)
    tree = Execution.objects.using(database()).filter(root_id=story.execution.root_id)
    is_final = story.execution.is_final and not tree.open().exists()
    if is_final:
        # It is the last time, and the tree may have ended after it was read.
        story = _story(execution_id)
    return View(list(_drawn(story, with_attempts=with_attempts)), story.now, is_final)


def _drawn(story: Story, *, with_attempts: bool) -> Iterator[RenderableType]:
    yield from (_headline(story), Text())
    yield from (_facts(story), Text())
    yield from (Text("Tree", style="bold"), Padding(_tree(story), (0, 0, 1, 2)))
    yield Text(f"Timeline from {exact(story.execution.created_at)}", style="bold")
    yield Padding(_timeline(story), (0, 0, 1, 2))
    if story.steps:
        yield from (Text("Steps", style="bold"), Padding(_steps(story), (0, 0, 1, 2)))
    if with_attempts:
        yield from attempts.drawn(story)
    if mailbox := unclaimed(story.mailbox):
        yield from (Text("Events", style="bold"), Padding(plain(mailbox), (0, 0, 1, 2)))
    if story.execution.error and story.execution.status != ExecutionStatus.CANCELLED:
        yield from _error(story)


# ------------------------------------------------------------------------------------------------------------- drawing


def _headline(story: Story) -> Text:
    line = headline(story.situation)
    shape = label(story.execution, story.now, story.situation.pending)
    text = Text(f"{line.mark} ", style=f"bold {STYLES.get(shape.word, '')}").append_text(plain(line.text))
    for hint in line.hints:
        text.append("\n  → ", style="dim").append_text(plain(hint))
    return text


def _facts(story: Story) -> Table:
    execution, now = story.execution, story.now
    shape = label(execution, now, story.situation.pending)
    table = Table.grid(padding=(0, 2, 0, 0))
    rows: list[tuple[str, object]] = [
        ("id", execution.pk),
        ("task", execution.task),
        ("status", status(shape.mark, shape.word)),
        ("attempt", f"{labels.attempts(execution)}, {execution.fence} run{'' if execution.fence == 1 else 's'}"),
        ("queue", execution.queue),
        ("root", "itself" if execution.parent_id is None else execution.root_id),
    ]
    if execution.parent_id is not None:
        rows.append(("parent", f'{execution.parent_id}, step "{execution.step}"'))
    if execution.idempotency_key:
        rows.append(("idempotency key", execution.idempotency_key))
    if (key := shown_key(execution)) is not None:
        whose = "" if story.key_holder in (None, execution.pk) else f", by now of {story.key_holder}"
        rows.append(("unique key", f"{key}{whose}"))
    if execution.predecessor is not None:
        rows.append(("waits for the end of", execution.predecessor))
    if story.tags:
        rows.append(("tags", ", ".join(f"{key}={value}" for key, value in story.tags.items())))
    if (progress := story.progress_of(execution)) is not None:
        rows.append(("progress", counted(progress)))
    if story.published:
        rows.append(("published", _short(readable(story.published), LONG_PREVIEW)))
    if story.forks.forked_from is not None:
        rows.append(("forked from", f'{story.forks.forked_from}, before step "{story.forks.before}"'))
    for fork, before in story.forks.forks.items():
        rows.append(("fork", f'{fork}, before step "{before}"'))
    if execution.lease_owner:
        rows.append(("worker", owners.shown(execution.lease_owner)))
    for name, when in (
        ("created", execution.created_at),
        ("started", execution.started_at),
        ("finished", execution.finished_at),
        ("due", execution.told_due_at),
        ("start before", execution.deadline_at),
        ("deadline of its tree", story.situation.deadline),
        ("lease expires", execution.lease_expires_at),
        ("cancel requested", execution.cancel_requested_at),
        ("held since", execution.held_at if execution.is_held else None),
    ):
        if when is not None:
            rows.append((name, exact(when)))
    rows.append(("payload", _short(_call(execution.payload), LONG_PREVIEW)))
    if execution.result is not None:
        rows.append(("result", _short(readable(execution.result), LONG_PREVIEW)))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value if isinstance(value, Text) else plain(value))
    return table


def _tree(story: Story) -> Tree:
    """Draw the tree with the execution marked; of a large one its ancestors, itself, and what fits."""
    root = story.branches()
    top = Tree(_node(root.execution, story), guide_style="dim")
    below = [(root, top)]
    while below:
        branch, drawn = below.pop()
        below.extend((child, drawn.add(_node(child.execution, story))) for child in branch.children)
        if branch.hidden:
            drawn.add(Text(f"… {branch.hidden:,} more", style="dim"))
    return top


def _node(row: Execution, story: Story) -> Text:
    marked = row.pk == story.execution.pk
    shape = label(row, story.now, story.situation.pending if marked else ())
    text = Text()
    if row.step:
        place = "" if row.position is None else f"[{row.position}]"
        text.append_text(plain(f"{row.step}{place}: ", style="dim"))
    text.append_text(plain(short_name(row.task), style="bold" if marked else ""))
    text.append(" ").append_text(status(shape.mark, shape.word))
    if row.attempt > 1:
        text.append(f" attempt {labels.attempts(row)}")
    if not row.is_final and (progress := story.progress_of(row)) is not None:
        text.append_text(plain(f" {counted(progress)}"))
    if row.started_at is not None and row.finished_at is not None:
        text.append(f" {duration((row.finished_at - row.created_at).total_seconds())}", style="dim")
    text.append(f" {row.pk}", style="dim")
    if row.error and row.status != ExecutionStatus.SUCCEEDED:
        text.append_text(plain(f" {first_line(row.error_message, 100)}"))
    if marked:
        text.append("  ← this one", style="bold")
    return text


def _timeline(story: Story) -> Table:
    begin = story.execution.created_at
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for moment in shortened(history(story), MOST_STEPS):
        after = (moment.at - begin).total_seconds()
        style = "dim" if moment.at > story.now else ""
        table.add_row(Text(offset(after), style="dim"), plain(moment.text, style=style))
    return table


def _steps(story: Story) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in (("#", "right"), ("name", "left"), ("kind", "left"), ("status", "left"), ("took", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("attempt", no_wrap=True)
    table.add_column("result, error or child", no_wrap=True, overflow="ellipsis")
    hidden = story.step_count - len(story.steps)
    for number, step in enumerate(story.steps, start=hidden + 1):
        took = ""
        if step.finished_at is not None and step.finished_at > step.created_at:
            took = duration((step.finished_at - step.created_at).total_seconds())
        table.add_row(
            str(number),
            plain(step.name),
            str(step.kind),
            status(STEP_MARKS[StepStatus(step.status)], StepStatus(step.status).value),
            took,
            "copied" if step.is_copied else str(step.attempt),
            plain(_outcome(step, story)),
        )
    if hidden > 0:
        table.add_row("", Text(f"… {hidden:,} more, earlier ones: --json has them", style="dim"))
    return table


def _outcome(step: Step, story: Story) -> str:
    if step.status == StepStatus.SUCCEEDED:
        value: str | None = step.value  # type: ignore[attr-defined]  # annotated in _read_steps
        length: int = step.value_length  # type: ignore[attr-defined]
        return "" if value is None else _short(readable(value, is_cut=len(value) < length), PREVIEW, length)
    child = story.child_of(step)
    if step.status == StepStatus.PENDING:
        if child is None:
            return kinds.of(step.kind).named(step)
        return f"{short_name(child.task)} {child.pk}"
    error = step.error or (child.error if child is not None else None)
    message = first_line(load_failure(error).message, PREVIEW) if error else ""
    return f"{message} ({child.pk})" if child is not None else message


def _error(story: Story) -> Iterator[Any]:
    """Draw the last error; of a failed execution the chain down to the root cause, and that one's traceback."""
    if not story.causes:
        failure = load_failure(story.execution.error)
        yield Text("Last error", style="bold")
        yield Padding(plain(f"{failure.type}: {first_line(failure.message, LONG_PREVIEW)}"), (0, 0, 1, 2))
        return
    yield Text("Error", style="bold")
    chain = Text()
    for depth, cause in enumerate(story.causes):
        chain.append(f"\n{'  ' * depth}↳ caused by " if depth else "", style="dim")
        chain.append_text(plain(f"{short_name(cause.task)}", style="bold"))
        chain.append_text(plain(f' at step "{cause.step}"' if cause.step else ""))
        chain.append_text(plain(f": {cause.error_class}: {first_line(cause.message, LONG_PREVIEW)}"))
        chain.append(f" ({cause.execution_id})" if depth else "", style="dim")
    yield Padding(chain, (0, 0, 1, 2))
    traceback = story.causes[-1].traceback.strip()
    if traceback:
        lines = [clean(line) for line in traceback.splitlines()]
        yield Padding(Text("\n".join(lines), style="dim"), (0, 0, 1, 2))


def _call(payload: str) -> str:
    """Return stored arguments as they stand in a call: ``7, total="42.00"``."""
    try:
        args, kwargs = decode(payload)
        return ", ".join([*map(_json, args), *(f"{name}={_json(value)}" for name, value in kwargs.items())])
    except (ValueError, TypeError, AttributeError):  # damaged
        return readable(payload)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _short(text: str, limit: int, length: int | None = None) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({length or len(text):,} characters)"


# ---------------------------------------------------------------------------------------------------------------- JSON


def _document(story: Story) -> dict[str, Any]:
    execution, now, asked = story.execution, story.now, story.asked_for
    line = headline(story.situation)
    return {
        "headline": str(line),
        "hints": list(line.hints),
        "execution": {
            **_node_document(execution, now),
            "queue": execution.queue,
            "priority": execution.priority,
            "worker": execution.lease_owner or None,
            "lease_expires_at": execution.lease_expires_at,
            "due_at": None if execution.is_parked else execution.due_at,
            "start_deadline_at": execution.deadline_at,
            "tree_deadline_at": story.situation.deadline,
            "dispatches": execution.dispatches,
            "cancel_requested_at": execution.cancel_requested_at,
            "cancel_reason": execution.cancel_reason or None,
            "held": document_of_hold(execution),
            "paused": None if story.situation.paused is None else document_of_pause(story.situation.paused),
            "idempotency_key": execution.idempotency_key,
            "unique_key": shown_key(execution),
            "unique_key_holder": story.key_holder,
            "waits_for_end_of": execution.predecessor,
            "tags": dict(story.tags),
            "progress": progress_document(story.progress_of(execution)),
            "published": _value(story.published or None),
            **story.forks.document(),
            "payload": _value(execution.payload),
            "result": _value(execution.result),
        },
        "attempts": [attempts.document(row, asked.get(row.run, ())) for row in story.attempts],
        "operations": [deed.document() for deed in story.deeds],
        "steps": [_step_document(step) for step in story.steps],
        "events_not_taken": dict(story.mailbox),
        "errors": [
            {
                "execution": cause.execution_id,
                "task": cause.task,
                "step": cause.step or None,
                "class": cause.error_class,
                "message": cause.message,
                "attempts": cause.attempts,
                "failed_at": cause.failed_at,
                "traceback": cause.traceback or None,
            }
            for cause in story.causes
        ],
        "tree": [_node_document(row, now) for row in story.situation.tree.values()],
    }


def _node_document(row: Execution, now: dt.datetime) -> dict[str, Any]:
    return {
        "id": row.pk,
        "task": row.task,
        "status": row.status,
        "shown_as": label(row, now).word,
        "attempt": row.attempt,
        "max_attempts": row.max_attempts,
        "runs": row.fence,
        "parent": row.parent_id,
        "root": row.root_id,
        "depth": row.depth,
        "step_in_parent": row.step or None,
        "position": row.position,
        "error": row.error_message or None,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
    }


def _step_document(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "kind": step.kind,
        "status": step.status,
        "task": None,
        "event": None,
        kinds.of(step.kind).noun: step.task or None,
        "child": step.child_id,
        "copied": step.is_copied,
        "total": step.total,
        "remaining": step.remaining,
        "max_parallel": step.max_parallel,
        "max_failures": step.max_failures,
        "failures": step.failures,
        "counted": None if step.counted is None else step.counted_names,
        "timeout_seconds": step.timeout_seconds,
        "deadline_at": step.deadline_at,
        "attempt": step.attempt,
        "created_at": step.created_at,
        "finished_at": step.finished_at,
        "result": _value(step.value),  # type: ignore[attr-defined]  # annotated in _read_steps
        "error": load_failure(step.error).message if step.error else None,
    }


def _value(text: str | None) -> Any:
    """Return stored JSON as it is stored: typed values keep their ``__type__`` envelope, broken text stays text."""
    try:
        return None if text is None else redact(json.loads(text))
    except (ValueError, RecursionError):
        return readable(text or "")
