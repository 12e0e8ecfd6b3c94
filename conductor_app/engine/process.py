"""What the engine has to know of the process that it is in, and only the host can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Process:
    """The process that this is.

    Attributes:
        is_told_to_end: Tells whether this process of a pool was sent the signal to end.
    """

    is_told_to_end: Callable[[], bool] = lambda: False


#: The host fills it in when the app is ready.
process = Process()
