"""Live progress: a bar and counts on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar

from conductor_app.states import OPEN_STATUSES, ExecutionStatus
from project.demo.batch import Progress

#: Without a terminal: seconds between two lines.
LINE_SECONDS = 2.0


class Screen:
    """Lines of text with the time, and below them the progress, as long as the context lasts."""

    def __init__(self, console: Console, orders: int) -> None:
        self.console = console
        self._orders = orders
        self._begin = time.monotonic()
        self._shown_at = 0.0
        self._line_at = self._begin + LINE_SECONDS
        self._bar = ProgressBar(
            TextColumn("executions"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.description}[/]"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(f"{text} [dim]+{self.seconds:.1f} s[/]", soft_wrap=True)

    def is_due(self, interval: float) -> bool:
        """Whether the last look is at least ``interval`` seconds ago."""
        return time.monotonic() >= self._shown_at + interval

    def show(self, progress: Progress, expected: int) -> None:
        """Show how far the executions are, of ``expected`` ones."""
        self._shown_at = time.monotonic()
        moving = ", ".join(f"{progress.executions.get(s, 0)} {s}" for s in ExecutionStatus if s in OPEN_STATUSES)
        text = f"{moving}; {progress.orders_done} of {self._orders} orders done"
        self._bar.update(self._task, completed=progress.executions_done, total=expected, description=text)
        if not self.console.is_terminal and self._shown_at >= self._line_at:
            self._line_at = self._shown_at + LINE_SECONDS
            self.console.print(f"  {progress.executions_done} of {expected} executions, {text}", soft_wrap=True)
