"""Calls of ``manage.py conductor``, and how they ended."""

from __future__ import annotations

import io
import json
from typing import Any

from django.core.management import call_command
from django.core.management.base import CommandError


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Told:
    """How a call ended: its exit code, what it wrote, and its one line of error."""

    def __init__(self, *words: object, stdout: io.StringIO | None = None) -> None:
        stream, notes = stdout or io.StringIO(), io.StringIO()
        self.code, self.error = 0, ""
        try:
            call_command("conductor", *map(str, words), stdout=stream, stderr=notes)
        except SystemExit as ended:
            self.code = int(ended.code or 0)
        except CommandError as error:
            self.code, self.error = error.returncode, str(error)
        self.out = stream.getvalue()
        self.notes = notes.getvalue()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def told(*words: object) -> Told:
    return Told(*words)
