"""How long trees are kept after their end."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.values.texts import shown

#: 100 years: more than this is a slip, and more than databases can subtract.
_LONGEST_SECONDS = 100 * 366 * 86_400


@dataclass(frozen=True)
class Retention:
    """What ``@durable_task`` says of it, in seconds; ``None`` leaves it to the settings."""

    keep: float | None = None
    keep_failed: float | None = None

    @classmethod
    def of(cls, keep: object, keep_failed: object) -> Retention:
        """Return what two options say.

        Raises:
            InvalidArgument, InvalidArgumentType: One of them is no duration.
        """
        return cls(check_kept(keep, "keep"), check_kept(keep_failed, "keep_failed"))


def check_kept(value: object, name: str) -> float | None:
    """Return for how many seconds something is kept.

    Raises:
        InvalidArgumentType: It is neither a number nor a ``timedelta``.
        InvalidArgument: It is 0 or less, NaN, or finite and more than a hundred years.
    """
    if value is None:
        return None
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentType(f"{name} must be a number of seconds or a timedelta, got {type(value).__name__}")
    if not value > 0:
        raise InvalidArgument(f"{name} must be > 0 seconds, got {shown(value)}. None keeps what the settings say.")
    if value != math.inf and value > _LONGEST_SECONDS:
        raise InvalidArgument(
            f'{name} must be at most {_LONGEST_SECONDS} seconds (100 years), got {shown(value)}. float("inf") keeps '
            "for good."
        )
    return float(value)
