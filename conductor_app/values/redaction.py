"""Stored values as people may see them: readable, and without what ``CONDUCTOR["REDACT"]`` names.

Values are masked where they are shown, in the admin and by ``manage.py conductor show``; what is stored stays as it is.
"""

from __future__ import annotations

import json
import re
from typing import Any

from conductor_app.conf import conductor_settings
from conductor_app.values.payloads import loads

#: What stands in the place of a masked value.
MASK = "********"
#: What stands in the place of text that is not JSON, so that its keys cannot be told from its values.
WITHHELD = '(Not shown: it is not JSON, and a key of CONDUCTOR["REDACT"] occurs in it.)'

_PARTS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\],:]|\s+|[^\s"{}\[\],:]+', re.DOTALL)


def redact(value: Any) -> Any:
    """Return a copy of a decoded value, with what the keys of ``CONDUCTOR["REDACT"]`` hold masked at any depth."""
    hidden = _hidden_keys()
    return _masked(value, hidden) if hidden else value


def decode(text: str) -> Any:
    """Return a stored value masked, with dates and the like as such.

    Raises:
        ValueError: The text is not JSON.
    """
    try:
        return redact(loads(text))
    except Exception:  # noqa: BLE001 - kombu makes objects of typed values, and may raise anything for a damaged one
        try:
            return redact(json.loads(text))
        except RecursionError:
            raise ValueError("nested too deeply") from None


def readable(text: str, *, indent: int | None = None, is_cut: bool = False) -> str:
    """Return stored text as it is shown.

    Args:
        text: What is stored, or its beginning.
        indent: Spaces for each level; ``None`` puts all on one line.
        is_cut: Whether it is only the beginning.
    """
    try:
        return json.dumps(decode(text), indent=indent, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        if is_cut:
            return masked_beginning(text)
    # Damaged, so nothing tells a key from a value: better to show nothing than a password.
    lowered = _normal(text)
    return WITHHELD if any(key in lowered for key in _hidden_keys()) else text


def masked_beginning(text: str) -> str:
    """Return the beginning of stored JSON masked, although it cannot be decoded: it ends somewhere."""
    hidden = _hidden_keys()
    shown: list[str] = []
    string = ""
    #: How many brackets are open inside the value that is being left out; ``None``: none is.
    inside: int | None = None
    for part in _PARTS.findall(text):
        if inside is not None:
            if part in "{[":
                inside += 1
                continue
            if inside or part not in ",}]":
                inside -= part in "}]"
                continue
            inside = None
        shown.append(part)
        if part.startswith('"'):
            string = part
        elif part == ":" and _normal(_string(string)) in hidden:
            shown.append(f'"{MASK}"')
            inside = 0
    return "".join(shown)


def _masked(value: Any, hidden: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: MASK if isinstance(key, str) and _normal(key) in hidden else _masked(item, hidden)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_masked(item, hidden) for item in value]
    return value


def _hidden_keys() -> frozenset[str]:
    return frozenset(_normal(key) for key in conductor_settings().REDACT)


def _normal(key: str) -> str:
    return key.casefold().replace("-", "_")


def _string(part: str) -> str:
    try:
        return str(json.loads(part))
    except ValueError:
        return part.strip('"')
