"""``conductor show``: one execution, its tree, and what has happened to it."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import F, TextField
from django.db.models.functions import Coalesce, Length, Substr
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from conductor_app import clock
from conductor_app.explain import (
    Situation,
    attempts,
    duration,
    exact,
    first_line,
    headline,
    label,
    short_name,
)
from conductor_app.management.output import STYLES, Output, clean, plain, status
from conductor_app.management.subcommands.base import OK, Subcommand, celery_app, execution_ids, not_found
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.serialization import load_failure, loads
from conductor_app.states import ExecutionStatus, StepKind, StepStatus

#: What the tree shows of each execution; payloads and results stay in the database.
TREE_FIELDS = (
    "id",
    "task",
    "queue",
    "status",
    "attempt",
    "max_attempts",
    "error",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "fence",
    "lease_owner",
    "lease_expires_at",
    "due_at",
    "dispatches",
    "cancel_requested_at",
    "cancel_reason",
    "created_at",
    "started_at",
    "finished_at",
)
#: Most nodes of a tree, and most steps, that are drawn for people; ``--json`` has them all.
MOST_NODES = 200
MOST_STEPS = 200
#: Characters of a value in the steps' table.
PREVIEW = 60
#: Characters of a payload, a result, and lines of a traceback.
LONG_PREVIEW = 500

_STEP_MARKS = {
    StepStatus.PENDING: "⧗",
    StepStatus.SUCCEEDED: "✓",
    StepStatus.FAILED: "✕",
    StepStatus.TIMED_OUT: "✕",
    StepStatus.CANCELLED: "⊘",
}


@dataclass(frozen=True)
class Story:
    """All rows about one execution."""

    execution: Execution
    situation: Situation
    #: Steps of the execution, in the order in which they were recorded.
    steps: list[Step]
    #: The failures from the execution down to the root cause.
    causes: list[FailedExecution]

    @property
    def now(self) -> dt.datetime:
        """The database's clock when it was read."""
        return self.situation.now


class Show(Subcommand):
    """Shows one execution, in six queries however large its tree is."""

    name = "show"
    help = "Show one execution: what it is doing, its tree, its steps, its error."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the id."""
        parser.add_argument("id", help="the execution's id")

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Show it."""
        (execution_id,) = execution_ids([options["id"]])
        story = read(execution_id, preview=None if out.as_json else LONG_PREVIEW)
        if out.as_json:
            out.document(_document(story))
            return OK
        out.print(_headline(story), Text())
        out.print(_facts(story), Text())
        out.print(Text("Tree", style="bold"), Padding(_tree(story), (0, 0, 1, 2)))
        out.print(Text(f"Timeline from {exact(story.execution.created_at)}", style="bold"))
        out.print(Padding(_timeline(story), (0, 0, 1, 2)))
        if story.steps:
            out.print(Text("Steps", style="bold"), Padding(_steps(story), (0, 0, 1, 2)))
        if story.execution.error and story.execution.status != ExecutionStatus.CANCELLED:
            out.print(*_error(story))
        return OK


# ------------------------------------------------------------------------------------------------------------- reading


def read(execution_id: uuid.UUID, *, preview: int | None) -> Story:
    """Read everything about one execution.

    Args:
        execution_id: Which one.
        preview: Characters of each value to read; ``None`` reads all of it.

    Raises:
        CommandError: There is none.
    """
    using = database()
    execution = Execution.objects.using(using).filter(pk=execution_id).defer("options").first()
    if execution is None:
        raise CommandError(not_found(execution_id))
    now = clock.read(using)
    rows = Execution.objects.using(using).filter(root_id=execution.root_id).order_by("created_at", "id")
    tree = {row.pk: row for row in rows.only(*TREE_FIELDS)}
    tree[execution.pk] = execution
    steps = list(_read_steps(execution, preview))
    failures = _read_failures(execution, tree)
    situation = Situation(
        execution, now, steps, tree, {failure.pk: failure for failure in failures}, celery_app().main or "project"
    )
    return Story(execution, situation, steps, failures)


def _read_steps(execution: Execution, preview: int | None) -> Any:
    value = Coalesce("result", F("child__result"), output_field=TextField())
    shown = value if preview is None else Substr(value, 1, preview + 1)
    steps = Step.objects.using(database()).filter(execution_id=execution.pk).order_by("id").defer("result")
    return steps.annotate(value=shown, value_length=Length(value))


def _read_failures(execution: Execution, tree: dict[uuid.UUID, Execution]) -> list[FailedExecution]:
    """Return the failures from an execution down to its root cause, the execution's own first."""
    if execution.status != ExecutionStatus.FAILED:
        return []
    failures = FailedExecution.objects.using(database())
    own = failures.filter(pk=execution.pk).first()
    if own is None:
        return []
    between: list[uuid.UUID] = []
    below: Execution | None = tree.get(own.root_cause_id) if own.root_cause_id else None
    while below is not None and below.pk != execution.pk:
        between.append(below.pk)
        below = tree.get(below.parent_id) if below.parent_id else None
    if not between:
        return [own]
    found = failures.in_bulk(between)
    return [own, *(found[key] for key in reversed(between) if key in found)]


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
        ("attempt", f"{attempts(execution)}, {execution.fence} run{'' if execution.fence == 1 else 's'}"),
        ("queue", execution.queue),
        ("root", "itself" if execution.parent_id is None else execution.root_id),
    ]
    if execution.parent_id is not None:
        rows.append(("parent", f'{execution.parent_id}, step "{execution.step}"'))
    if execution.idempotency_key:
        rows.append(("idempotency key", execution.idempotency_key))
    if execution.lease_owner:
        rows.append(("worker", execution.lease_owner))
    for name, when in (
        ("created", execution.created_at),
        ("started", execution.started_at),
        ("finished", execution.finished_at),
        ("due", execution.due_at if execution.status == ExecutionStatus.QUEUED else None),
        ("start before", execution.deadline_at),
        ("lease expires", execution.lease_expires_at),
        ("cancel requested", execution.cancel_requested_at),
    ):
        if when is not None:
            rows.append((name, exact(when)))
    rows.append(("payload", _short(_call(execution.payload), LONG_PREVIEW)))
    if execution.result is not None:
        rows.append(("result", _short(_readable(execution.result), LONG_PREVIEW)))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value if isinstance(value, Text) else plain(value))
    return table


def _tree(story: Story) -> Tree:
    """Draw the whole tree with the execution marked; of a large one its ancestors, itself, and what fits."""
    tree = story.situation.tree
    children: dict[uuid.UUID | None, list[Execution]] = defaultdict(list)
    for row in tree.values():
        children[row.parent_id].append(row)
    drawn = _nodes_to_draw(story)
    root = tree.get(story.execution.root_id, story.execution)
    top = Tree(_node(root, story), guide_style="dim")
    branches = [(root, top)]
    while branches:
        parent, branch = branches.pop()
        hidden = 0
        for child in children[parent.pk]:
            if child.pk in drawn:
                branches.append((child, branch.add(_node(child, story))))
            else:
                hidden += 1
        if hidden:
            branch.add(Text(f"… {hidden:,} more", style="dim"))
    return top


def _nodes_to_draw(story: Story) -> set[uuid.UUID]:
    tree = story.situation.tree
    drawn: set[uuid.UUID] = set()
    above: Execution | None = story.execution
    while above is not None:
        drawn.add(above.pk)
        above = tree.get(above.parent_id) if above.parent_id else None
    # Level by level, so that no branch uses up what the others need.
    for row in sorted(tree.values(), key=lambda row: (row.parent_id != story.execution.pk, row.depth)):
        if len(drawn) >= MOST_NODES:
            break
        if row.parent_id is None or row.parent_id in drawn:
            drawn.add(row.pk)
    return drawn


def _node(row: Execution, story: Story) -> Text:
    marked = row.pk == story.execution.pk
    shape = label(row, story.now, story.situation.pending if marked else ())
    text = Text()
    if row.step:
        text.append_text(plain(f"{row.step}: ", style="dim"))
    text.append_text(plain(short_name(row.task), style="bold" if marked else ""))
    text.append(" ").append_text(status(shape.mark, shape.word))
    if row.attempt > 1:
        text.append(f" attempt {attempts(row)}")
    if row.started_at is not None and row.finished_at is not None:
        text.append(f" {duration((row.finished_at - row.created_at).total_seconds())}", style="dim")
    text.append(f" {row.pk}", style="dim")
    if row.error and row.status != ExecutionStatus.SUCCEEDED:
        text.append_text(plain(f" {first_line(row.error_message, 100)}"))
    if marked:
        text.append("  ← this one", style="bold")
    return text


@dataclass(frozen=True)
class Event:
    """Something that happened, or that will."""

    at: dt.datetime
    text: str


def _timeline(story: Story) -> Table:
    begin = story.execution.created_at
    events = sorted(_events(story), key=lambda event: event.at)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    if len(events) > MOST_STEPS:
        hidden = len(events) - MOST_STEPS
        half = MOST_STEPS // 2
        events = [*events[:half], Event(events[half].at, f"… {hidden:,} more"), *events[-half:]]
    for event in events:
        after = (event.at - begin).total_seconds()
        style = "dim" if event.at > story.now else ""
        table.add_row(Text(f"{after:+.3f} s", style="dim"), plain(event.text, style=style))
    return table


def _events(story: Story) -> Iterator[Event]:
    execution, now = story.execution, story.now
    origin = f'by its parent, for step "{execution.step}"' if execution.parent_id else f'in queue "{execution.queue}"'
    yield Event(execution.created_at, f"queued {origin}")
    if execution.started_at is not None:
        yield Event(execution.started_at, "first run started")
    for step in story.steps:
        yield from _step_events(step, story)
    if execution.status == ExecutionStatus.QUEUED and execution.due_at > execution.created_at:
        yield Event(execution.due_at, "queued again" if execution.due_at <= now else "due")
    if execution.cancel_requested_at is not None:
        yield Event(execution.cancel_requested_at, f"cancel requested: {execution.cancel_reason}".rstrip(": "))
    if execution.status == ExecutionStatus.RUNNING and execution.lease_expires_at is not None:
        yield Event(execution.lease_expires_at, "its lease expires, unless it is renewed")
    if execution.finished_at is not None:
        yield Event(execution.finished_at, str(execution.status))


def _step_events(step: Step, story: Story) -> Iterator[Event]:
    outcome = StepStatus(step.status).value.replace("_", " ")
    if step.kind == StepKind.STEP:
        yield Event(step.created_at, f'step "{step.name}" {outcome}')
        return
    child = story.situation.tree.get(step.child_id) if step.child_id is not None else None
    what = {
        StepKind.INVOKE: f"{short_name(step.task)} queued, waits for it",
        StepKind.SLEEP: "sleeps",
    }.get(StepKind(step.kind), "waits for the event")
    yield Event(step.created_at, f'step "{step.name}": {what}; no worker is held')
    if child is not None and child.started_at is not None:
        queued = duration((child.started_at - child.created_at).total_seconds())
        yield Event(
            child.started_at, f'step "{step.name}": {short_name(child.task)} started after {queued} in the queue'
        )
    if step.finished_at is not None:
        took = duration((step.finished_at - step.created_at).total_seconds())
        yield Event(step.finished_at, f'step "{step.name}" {outcome} after {took}')
    elif step.deadline_at is not None:
        yield Event(step.deadline_at, f'step "{step.name}" {"ends" if step.kind == StepKind.SLEEP else "times out"}')


def _steps(story: Story) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in (("#", "right"), ("name", "left"), ("kind", "left"), ("status", "left"), ("took", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("attempt", no_wrap=True)
    table.add_column("result, error or child", no_wrap=True, overflow="ellipsis")
    for number, step in enumerate(story.steps[:MOST_STEPS], start=1):
        took = ""
        if step.finished_at is not None and step.kind != StepKind.STEP:
            took = duration((step.finished_at - step.created_at).total_seconds())
        table.add_row(
            str(number),
            plain(step.name),
            str(step.kind),
            status(_STEP_MARKS[StepStatus(step.status)], StepStatus(step.status).value),
            took,
            str(step.attempt),
            plain(_outcome(step, story)),
        )
    if len(story.steps) > MOST_STEPS:
        table.add_row("", Text(f"… {len(story.steps) - MOST_STEPS:,} more: --json has them", style="dim"))
    return table


def _outcome(step: Step, story: Story) -> str:
    if step.status == StepStatus.SUCCEEDED:
        value: str | None = step.value  # type: ignore[attr-defined]  # annotated in _read_steps
        length: int = step.value_length  # type: ignore[attr-defined]
        return "" if value is None else _short(_readable(value), PREVIEW, length)
    child = story.situation.tree.get(step.child_id) if step.child_id is not None else None
    if step.status == StepStatus.PENDING:
        return "" if child is None else f"{short_name(child.task)} {child.pk}"
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
        chain.append(f" ({cause.pk})" if depth else "", style="dim")
    yield Padding(chain, (0, 0, 1, 2))
    traceback = story.causes[-1].traceback.strip()
    if traceback:
        lines = [clean(line) for line in traceback.splitlines()]
        yield Padding(Text("\n".join(lines), style="dim"), (0, 0, 1, 2))


def _call(payload: str) -> str:
    """Return stored arguments as they stand in a call: ``7, total="42.00"``."""
    try:
        args, kwargs = loads(payload)
        return ", ".join([*map(_json, args), *(f"{name}={_json(value)}" for name, value in kwargs.items())])
    except Exception:  # noqa: BLE001 - whatever is stored, it is shown
        return payload


def _readable(text: str) -> str:
    """Return a stored value without the envelopes of typed values; a text that was cut, or is broken, as it is."""
    try:
        return _json(loads(text))
    except Exception:  # noqa: BLE001 - whatever is stored, it is shown
        return text


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _short(text: str, limit: int, length: int | None = None) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({length or len(text):,} characters)"


# ---------------------------------------------------------------------------------------------------------------- JSON


def _document(story: Story) -> dict[str, Any]:
    execution, now = story.execution, story.now
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
            "due_at": execution.due_at,
            "start_deadline_at": execution.deadline_at,
            "dispatches": execution.dispatches,
            "cancel_requested_at": execution.cancel_requested_at,
            "cancel_reason": execution.cancel_reason or None,
            "idempotency_key": execution.idempotency_key,
            "payload": _value(execution.payload),
            "result": _value(execution.result),
        },
        "steps": [_step_document(step) for step in story.steps],
        "errors": [
            {
                "execution": cause.pk,
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
        "task": step.task or None,
        "child": step.child_id,
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
        return None if text is None else json.loads(text)
    except ValueError:
        return text
