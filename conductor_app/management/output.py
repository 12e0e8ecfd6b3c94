"""What the command writes: tables, trees and sentences for people, one JSON document for programs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.core.serializers.json import DjangoJSONEncoder
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from conductor_app.telling.words import clean

if TYPE_CHECKING:
    from django.core.management.base import OutputWrapper

__all__ = ["STYLES", "Output", "clean", "plain", "status", "table_of"]

#: Without a terminal nothing is cut or wrapped, so that each row stays one line for ``grep``.
PIPE_WIDTH = 4_000

#: What a terminal obeys: go to the upper left corner; clear the screen before; clear the rest of a line, and below.
_HOME, _TO_LINE_END, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_CLEAR = f"\x1b[2J{_HOME}"

STYLES = {
    "queued": "cyan",
    "scheduled": "cyan",
    "retrying": "yellow",
    "running": "blue",
    "waiting": "magenta",
    "sleeping": "magenta",
    "pending": "magenta",
    "succeeded": "green",
    "failed": "bold red",
    "timed_out": "bold red",
    "cancelled": "yellow",
    "held": "yellow",
    "paused": "yellow",
    "OK": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
}


class Output:
    """Writes through a management command's ``stdout``, so that ``call_command`` can capture it.

    Args:
        stdout: The command's stream.
        stderr: Its stream for what is no part of the answer; without one, ``note`` writes nothing.
        as_json: Whether ``document`` is what is written, instead of what ``print`` gets.
        is_quiet: Whether ``quietly`` is.
        colour: ``True`` or ``False`` as the user asked; ``None`` means on a terminal, unless ``NO_COLOR`` is set.
    """

    def __init__(
        self,
        stdout: OutputWrapper,
        *,
        stderr: OutputWrapper | None = None,
        as_json: bool = False,
        is_quiet: bool = False,
        colour: bool | None = None,
    ) -> None:
        self.as_json = as_json
        self.is_quiet = is_quiet and not as_json
        self._stdout = stdout
        self._stderr = stderr
        self._is_terminal = stdout.isatty()
        self._drawn_before: str | None = None
        if colour is None:
            colour = self._is_terminal and not os.environ.get("NO_COLOR")
        self._colour = colour

    @property
    def width(self) -> int:
        """Columns that a line may have."""
        return shutil.get_terminal_size().columns if self._is_terminal else PIPE_WIDTH

    def print(self, *renderables: RenderableType) -> None:
        """Write each on lines of its own, unless JSON or ids alone were asked for."""
        if not (self.as_json or self.is_quiet):
            self._write(self.drawn(*renderables))

    def drawn(self, *renderables: RenderableType) -> str:
        """Return what ``print`` writes, without the end of the last line."""
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            force_terminal=self._colour,
            color_system="standard" if self._colour else None,
            width=self.width,
            highlight=False,
            markup=False,
            emoji=False,
        )
        for renderable in renderables:
            console.print(renderable)
        lines = buffer.getvalue().splitlines()
        return "\n".join(lines if self._colour else [line.rstrip() for line in lines])

    def draw_again(self, title: str, renderables: Sequence[RenderableType], *, is_final: bool = False) -> None:
        """Draw in the place of what was drawn before, as far as the screen is high enough.

        What is no terminal that can do so gets a block of lines, without any control characters, if there is news.

        Args:
            title: Stands above it; a new title alone is no news.
            renderables: What to draw.
            is_final: Whether it is the last time: all of it is drawn then, and stays.
        """
        text = self.drawn(*renderables)
        if not self._is_terminal or os.environ.get("TERM") == "dumb":
            if text != self._drawn_before:
                self._write(f"{title}\n{text}\n")
        else:
            lines = [title[: self.width], "", *text.split("\n")]
            room = shutil.get_terminal_size().lines - 1
            if not is_final and len(lines) > room:
                hidden = len(lines) - room + 1
                lines = [*lines[: max(room - 1, 1)], f"… {hidden:,} more lines: the window is not high enough."]
            begin = _CLEAR if self._drawn_before is None or is_final else _HOME
            # Each line is cleared first: behind one that is as wide as the screen, its last column would be.
            above, below = "".join(f"{_TO_LINE_END}{line}\n" for line in lines[:-1]), f"{_BELOW}{lines[-1]}"
            self._write(f"{begin}{above}{below}")
        self._drawn_before = text

    def quietly(self, word: object) -> None:
        """Write a word on a line of its own, if ids alone were asked for."""
        if self.is_quiet:
            self._write(str(word))

    def remark(self, text: str) -> None:
        """Write a line for people: it is the answer, unless whatever reads that wants ids alone."""
        self.note(text) if self.is_quiet else self.print(plain(text))

    def note(self, text: str) -> None:
        """Write a line about the answer, which whatever reads the answer's lines must not take for one of them."""
        if not self.as_json and self._stderr is not None:
            _write(self._stderr, text)

    def document(self, value: Any) -> None:
        """Write one JSON document, if JSON was asked for."""
        if self.as_json:
            self._write(json.dumps(value, indent=2, cls=DjangoJSONEncoder))

    def _write(self, text: str) -> None:
        _write(self._stdout, text)


def _write(stream: OutputWrapper, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # The line's end is ours: OutputWrapper adds none after a text that ends with an empty line.
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def plain(text: object, style: str = "") -> Text:
    """Return text that comes from the database, without anything that a terminal would obey."""
    return Text(clean(str(text)), style=style)


def status(mark: str, word: str) -> Text:
    """Return a status as a shape and a word, coloured."""
    return Text(f"{mark} {word}", style=STYLES.get(word, ""))


def table_of(*names: str) -> Table:
    """Return a table without lines, of which long texts are folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table
