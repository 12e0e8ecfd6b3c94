"""The pages of the documentation, as the tests read them.

The conventions for examples (``docs/contributing/architecture.md`` tells writers about them):

================================================ =====================================================================
In a page                                        What the tests do
================================================ =====================================================================
a ``python`` block                               run, statement by statement, in one session per page
… whose first line is ``# shop/tasks.py``        run as that module: its tasks are called ``shop.tasks.…``
… whose first line is ``# …settings.py``         run as settings, and every name and key checked
a ``pycon`` block                                run in the same session, the output compared (``...`` matches anything)
a ``console`` block                              each line after ``$`` is checked: make targets, options, subcommands
``<!-- not run: reason -->`` before a block      only parsed
``<!-- setup`` … ``-->`` with Python in it       run like a ``python`` block, invisible on the page
================================================ =====================================================================

After each statement, whatever is due runs, as if a worker were there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Languages that a block may have; anything else would slip past the tests.
LANGUAGES = {"python", "pycon", "console", "text", "mermaid", "ini", "toml", "cron", "diff", "yaml"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^`\s]*)\s*$")
_FILE = re.compile(r"# (?P<path>[\w./-]+\.py)(?:\s.*)?$")
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>.+?)\s*-->")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    #: The file that the block shows, from its first line.
    path: str = ""
    #: Why it is not run; empty if it is.
    not_run: str = ""
    section: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def module(self) -> str:
        """The dotted name of the module that the block is a part of."""
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def is_settings(self) -> bool:
        return self.path.endswith("settings.py")


def pages() -> list[str]:
    """Every page of the documentation, relative to the project."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, and every ``<!-- setup`` comment, in their order."""
    found: list[Block] = []
    lines = read(page).splitlines()
    number, section, before = 0, "", ""
    while number < len(lines):
        line = lines[number]
        if line.strip().startswith("<!-- setup"):
            start, body = number, []
            while lines[(number := number + 1)].strip() != "-->":
                body.append(lines[number])
            found.append(_block(page, start + 2, "python", body, section=section, before=""))
        elif fence := _FENCE.match(line):
            start, body = number, []
            while lines[(number := number + 1)].strip() != fence["fence"]:
                body.append(lines[number].removeprefix(fence["indent"]))
            found.append(_block(page, start + 2, fence["language"], body, section=section, before=before))
        elif line.startswith("#"):
            section = line.lstrip("#").strip()
        if line.strip():
            before = line.strip()
        number += 1
    return found


def _block(page: str, line: int, language: str, body: list[str], *, section: str, before: str) -> Block:
    file = _FILE.match(body[0]) if language == "python" and body else None
    skipped = _NOT_RUN.fullmatch(before)
    return Block(
        page=page,
        line=line,
        language=language,
        text="\n".join(body) + "\n",
        path=file["path"] if file else "",
        not_run=skipped["reason"] if skipped else "",
        section=section,
    )


def prose(page: str) -> str:
    """A page without its blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", read(page), flags=re.DOTALL)
    kept, fence = [], ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif found:
            fence = found["fence"]
        else:
            kept.append(line)
    return "\n".join(kept)


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a ``console`` block, each with the output below it; a ``\\`` continues a line."""
    found: list[tuple[str, str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        else:
            raise AssertionError(f"{block}: a console block begins with `$ `, not with {line!r}")
    return found
