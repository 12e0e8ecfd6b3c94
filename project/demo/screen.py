"""Live progress: a bar and counts on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conductor_app.states import ExecutionStatus
from project.demo.batch import Progress as BatchProgress

#: Without a terminal: seconds between two lines.
LINE_SECONDS = 2.0


class Screen:
    """A context manager around the time in which things happen."""

    def __init__(self, console: Console, orders: int) -> None:
        self.console = console
        self._orders = orders
        self._bar = Progress(
            TextColumn("orders"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.description}[/]"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=orders)
        self._shown_at = 0.0
        self._line_at = time.monotonic() + LINE_SECONDS

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def is_due(self, interval: float) -> bool:
        """Whether the last look is at least ``interval`` seconds ago."""
        return time.monotonic() >= self._shown_at + interval

    def show(self, progress: BatchProgress) -> None:
        """Show how far the orders are."""
        self._shown_at = time.monotonic()
        counts = [f"{progress.executions[s]} {s}" for s in ExecutionStatus if progress.executions.get(s)]
        description = "executions: " + ", ".join(counts)
        self._bar.update(self._task, completed=progress.orders_done, description=description)
        if not self.console.is_terminal and self._shown_at >= self._line_at:
            self._line_at = self._shown_at + LINE_SECONDS
            self.console.print(f"  {progress.orders_done} of {self._orders} orders done; {description}")

    def say(self, *texts: str) -> None:
        """Print a line above the bar."""
        self.console.print(*texts)
