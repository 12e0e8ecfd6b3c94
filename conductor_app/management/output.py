"""What the command writes: tables, trees and sentences for people, one JSON document for programs."""

from __future__ import annotations

import io
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from django.core.serializers.json import DjangoJSONEncoder
from rich.console import Console, RenderableType
from rich.text import Text

from conductor_app.telling.words import clean

if TYPE_CHECKING:
    from django.core.management.base import OutputWrapper

__all__ = ["STYLES", "Output", "clean", "plain", "status"]

#: Without a terminal nothing is cut or wrapped, so that each row stays one line for ``grep``.
PIPE_WIDTH = 4_000

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
        colour: ``True`` or ``False`` as the user asked; ``None`` means on a terminal, unless ``NO_COLOR`` is set.
    """

    def __init__(
        self,
        stdout: OutputWrapper,
        *,
        stderr: OutputWrapper | None = None,
        as_json: bool = False,
        colour: bool | None = None,
    ) -> None:
        self.as_json = as_json
        self._stdout = stdout
        self._stderr = stderr
        self._is_terminal = stdout.isatty()
        if colour is None:
            colour = self._is_terminal and not os.environ.get("NO_COLOR")
        self._colour = colour

    @property
    def width(self) -> int:
        """Columns that a line may have."""
        return shutil.get_terminal_size().columns if self._is_terminal else PIPE_WIDTH

    def print(self, *renderables: RenderableType) -> None:
        """Write each on lines of its own, unless JSON was asked for."""
        if self.as_json:
            return
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
        self._write("\n".join(lines if self._colour else [line.rstrip() for line in lines]))

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
