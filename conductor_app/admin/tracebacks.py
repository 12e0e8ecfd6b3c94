"""Tracebacks in frames, so that a page can show which ones are the project's own code."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FRAME = re.compile(r'^\s*[|+ ]*File "(?P<file>[^"\n]*)", line \d+')
#: Where code lives that is not the project's own.
_FOREIGN = re.compile(
    r"[/\\](site-packages|dist-packages|lib[/\\]python3[^/\\]*|conductor_app)[/\\]|^<frozen ", re.IGNORECASE
)


@dataclass(frozen=True)
class Frame:
    """Some lines of a traceback: one frame, or what stands between frames."""

    text: str
    is_own: bool


def frames(traceback: str) -> list[Frame]:
    """Return a traceback in pieces, each with whether it is a frame of the project's own code."""
    found: list[Frame] = []
    lines: list[str] = []
    is_own = False

    def close() -> None:
        if lines:
            found.append(Frame("".join(lines), is_own))
            lines.clear()

    for line in traceback.splitlines(keepends=True):
        frame = _FRAME.match(line)
        # A frame is its line and the source below it, which stands further to the right.
        if frame is not None or not line.startswith("    "):
            close()
            is_own = frame is not None and _FOREIGN.search(frame["file"]) is None
        lines.append(line)
    close()
    return found
