"""Stored values as plain data, for programs."""

from __future__ import annotations

import json
from typing import Any

from conductor_app.values import redaction


def stored(text: str | None) -> Any:
    """Return a stored value as JSON has it, with Celery's envelopes for types; text that is no JSON as it is."""
    if not text:
        return None
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def masked(text: str | None) -> Any:
    """Return a stored payload or result as ``stored`` does, without what ``CONDUCTOR["REDACT"]`` names."""
    value = stored(text)
    return redaction.readable(value) if text and value == text else redaction.redact(value)
