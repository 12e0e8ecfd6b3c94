"""Texts for messages and rows: cut to a length, and made storable, whatever is in them."""

from __future__ import annotations

from typing import Any


def clean_text(text: str, limit: int) -> str:
    """Return ``text`` in a form that every database stores: without NUL and lone surrogates, cut to ``limit`` bytes."""
    text = text.replace("\x00", "\\x00")
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) > limit:
        raw = raw[: max(limit - 3, 0)] + b"..."
    return raw.decode("utf-8", "ignore")


def shorten(text: str, limit: int = 120) -> str:
    """Leave out the middle of a text that is longer than ``limit`` characters."""
    return text if len(text) <= limit else f"{text[: limit - 20]}…{text[-16:]}"


def shown(value: Any, limit: int = 120) -> str:
    """Return ``repr(value)`` for an error's text: short, and whatever the value's own ``__repr__`` does."""
    try:
        return shorten(repr(value), limit)
    except Exception:  # noqa: BLE001 - the message matters more than this part of it
        return "?"
