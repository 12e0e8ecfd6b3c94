"""Figures that are read at most once in ten seconds, however many people look at them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from django.core.cache import cache

logger = logging.getLogger(__name__)

SECONDS = 10


def cached(key: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was read under this key in the last seconds, or read it; a copy."""
    try:
        known = cache.get(key)
    except Exception:  # the cache is the project's, and these pages are for when things are broken
        logger.warning("The cache does not answer; figures are read from the database.", exc_info=True)
        return read()
    if known is None:
        known = read()
        cache.set(key, known, SECONDS)
    return dict(known)
