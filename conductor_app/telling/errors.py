"""Stored errors of which only the beginning was read."""

from __future__ import annotations

import json
import re

from conductor_app.exceptions import Failure
from conductor_app.values.failures import dump_failure

#: Characters of an error that are read of each execution and step, and of each failure's message.
ERROR_LENGTH = 1_000
_FAILURE = re.compile(r'\{"type":"((?:[^"\\]|\\.)*)","message":"((?:[^"\\]|\\.)*)', re.DOTALL)


def head_of_failure(text: str) -> Failure:
    """Return class and message of a stored failure, even if the text ends somewhere in the message."""
    found = _FAILURE.match(text)
    if found is None:
        return Failure(type="Unknown", message=text)
    return Failure(type=_string(found[1]), message=_string(found[2]))


def whole_failure(text: str | None) -> str | None:
    """Return a stored failure of which only the beginning was read as one that can be loaded."""
    return text if text is None or len(text) < ERROR_LENGTH else dump_failure(head_of_failure(text))


def _string(inside: str) -> str:
    # The last escape sequence may have been cut in the middle.
    for end in range(len(inside), max(len(inside) - 6, 0), -1):
        try:
            return str(json.loads(f'"{inside[:end]}"', strict=False))
        except ValueError:
            continue
    return ""
