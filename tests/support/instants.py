"""One instant that unsaved rows are about, and those around it."""

from __future__ import annotations

import datetime as dt

NOW = dt.datetime(2026, 11, 22, 14, 5, 0, tzinfo=dt.UTC)


def ago(seconds: float) -> dt.datetime:
    return NOW - dt.timedelta(seconds=seconds)


def ahead(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)
