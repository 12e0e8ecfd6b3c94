"""One order, drawn: its tree of executions, and their time line. Everything is read from the database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus, StepKind
from project.demo.crash import Crash
from project.shop.models import BankCall

WAITING, WORKING, KILLED = "░", "▓", "☠"
LEGEND = f"{WORKING} on a worker   {WAITING} queued or waiting, no worker held   {KILLED} killed"

#: What a parent of the shop waits for.
SUSPENDING = {StepKind.INVOKE, StepKind.MAP, StepKind.EVENT}

_MARKS = {ExecutionStatus.SUCCEEDED: "[green]✓[/]", ExecutionStatus.FAILED: "[red]✗[/]"}


class Span(NamedTuple):
    """A stretch of one execution's life."""

    begin: datetime
    end: datetime
    mark: str


def draw_tree(root_id: UUID, crash: Crash | None) -> Tree:
    """Draw an execution and its children, with what each remembers."""
    root = Execution.objects.get(pk=root_id)
    tree = Tree(_label(root))
    _add_children(tree, root, crash)
    return tree


def _add_children(tree: Tree, execution: Execution, crash: Crash | None) -> None:
    for step in execution.steps.order_by("id").select_related("child"):
        if step.kind == StepKind.INVOKE and step.child is not None:
            _add_child(tree, step.child, crash)
        elif step.kind == StepKind.MAP:
            items = tree.add(f"[dim]map {escape(step.name)}, at most {step.max_parallel} at once[/]")
            for child in execution.children.filter(step=step.name).order_by("position"):
                _add_child(items, child, crash)
        else:
            tree.add(f"[dim]{step.kind} {escape(step.name)}: {escape(repr(step.get_result()))}[/]")
    if crash is not None and crash.execution_id == execution.pk:
        tree.add(f"[yellow]{KILLED} attempt 1 was killed with process {crash.pid}[/]")


def _add_child(tree: Tree, child: Execution, crash: Crash | None) -> None:
    _add_children(tree.add(_label(child)), child, crash)


def _label(execution: Execution) -> str:
    mark = _MARKS.get(ExecutionStatus(execution.status), "…")
    runs = f"{execution.fence} run{'s' if execution.fence > 1 else ''}"
    attempts = f", {execution.attempt} attempts" if execution.attempt > 1 else ""
    outcome = execution.error_message or repr(execution.get_result())
    return f"{mark} {escape(short_name(execution.task))} [dim]({runs}{attempts})[/] {escape(outcome)}"


def draw_time_line(root_id: UUID, crash: Crash | None, width: int) -> Table:
    """Draw when each execution of a tree was on a worker, and when it held none; ``width`` is in characters."""
    root = Execution.objects.get(pk=root_id)
    begin, end = root.created_at, root.finished_at or root.created_at
    executions = [root, *root.tree.exclude(pk=root.pk).order_by("created_at", "position")]
    names = [f"{'  ' * execution.depth}{short_name(execution.task)}" for execution in executions]
    bar_width = max(width - max(map(len, names)) - 12, 20)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, execution in zip(names, executions, strict=True):
        seconds = ((execution.finished_at or end) - execution.created_at).total_seconds()
        bar = _draw_bar(_spans(execution, crash), begin, end, bar_width)
        table.add_row(name, bar, f"{seconds:6.2f} s")
    return table


def _spans(execution: Execution, crash: Crash | None) -> Iterator[Span]:
    """Cut an execution's life into spans. Where two share a cell of the bar, the later one in this order is drawn."""
    end = execution.finished_at or execution.created_at
    yield Span(execution.created_at, end, WAITING)
    if execution.started_at is None:
        return
    suspensions = [step.created_at for step in execution.steps.all() if step.kind in SUSPENDING]
    if suspensions:
        # A parent's runs are moments: it begins, it suspends for one child, map or event after the other, it ends.
        for moment in [execution.started_at, *suspensions, end]:
            yield Span(moment, moment, WORKING)
    elif crash is not None and crash.execution_id == execution.pk:
        yield Span(execution.started_at, crash.at, WORKING)
        yield Span(_first_trace_after(crash, execution), end, WORKING)
    else:
        yield Span(execution.started_at, end, WORKING)
    if crash is not None and crash.execution_id == execution.pk:
        yield Span(crash.at, crash.at, KILLED)


def _first_trace_after(crash: Crash, execution: Execution) -> datetime:
    """Return the first instant that the run after the crash has left in the database."""
    steps = execution.steps.filter(created_at__gt=crash.at).values_list("created_at", flat=True)
    calls = BankCall.objects.filter(order_number=crash.order.number, received_at__gt=crash.at)
    traces = [*steps, *calls.values_list("received_at", flat=True)]
    return min(traces, default=execution.finished_at or crash.at)


def _draw_bar(spans: Iterable[Span], begin: datetime, end: datetime, width: int) -> str:
    cells = [" "] * width
    scale = width / ((end - begin).total_seconds() or 1)
    for span in spans:
        first, last = (min(int((moment - begin).total_seconds() * scale), width - 1) for moment in span[:2])
        cells[first : last + 1] = span.mark * (last + 1 - first)
    return "".join(cells)


def short_name(task: str) -> str:
    """Return the last part of a task's name."""
    return task.rpartition(".")[2]
