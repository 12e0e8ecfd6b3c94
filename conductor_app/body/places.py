"""Where calls stand in the user's code."""

from __future__ import annotations

import os
import sys

import celery

#: What the files of this package begin with, and those of Celery.
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
CELERY = os.path.dirname(celery.__file__) + os.sep


def caller() -> tuple[str, int]:
    """Return file and line of the call in the user's code."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def shown_place(place: tuple[str, int]) -> str:
    """Return a place as it stands in messages."""
    return f"{os.path.basename(place[0])}:{place[1]}"
