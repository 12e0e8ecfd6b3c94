"""System checks ``conductor.E…`` and ``conductor.W…``."""

from __future__ import annotations


def report_to_worker() -> None:
    """Placeholder."""
