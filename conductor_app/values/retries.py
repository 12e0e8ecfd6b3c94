"""When another attempt is due: Celery's own option names, read by us, because retries live in the database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery.utils.time import get_exponential_backoff_interval

from conductor_app.exceptions import ConductorError, InvalidArgument

#: More retries than this are a mistake in the unit; ``None`` is without limit.
MAX_RETRIES_LIMIT = 1_000_000
#: Longer delays than this are a mistake in the unit, too.
MAX_DELAY_SECONDS = 100 * 366 * 86_400


@dataclass(frozen=True)
class RetryPolicy:
    """Celery's retry options with our defaults. Delays are seconds."""

    #: Attempts after the first one; ``None`` is without limit.
    max_retries: int | None = 3
    autoretry_for: tuple[type[BaseException], ...] = (Exception,)
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    #: ``True`` waits 1, 2, 4 … seconds, a number that many times as long, ``False`` ``default_retry_delay``.
    retry_backoff: bool | float = True
    retry_backoff_max: float = 600
    #: Take a random delay between 0 and the computed one, so that failures do not return all at once.
    retry_jitter: bool = True
    default_retry_delay: float = 180

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InvalidArgument: An option has an impossible value.
        """
        limit = self.max_retries
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= MAX_RETRIES_LIMIT
        ):
            raise InvalidArgument(
                f"max_retries must be None or an int from 0 to {MAX_RETRIES_LIMIT}, got {limit!r:.100}."
            )
        for name in ("retry_backoff", "retry_backoff_max", "default_retry_delay"):
            _check_delay(name, getattr(self, name), allow_bool=name == "retry_backoff")
        if not isinstance(self.retry_jitter, bool):
            raise InvalidArgument(f"retry_jitter must be True or False, got {self.retry_jitter!r:.100}.")
        for name in ("autoretry_for", "dont_autoretry_for"):
            classes = getattr(self, name)
            if not isinstance(classes, (tuple, list)) or not all(
                isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes
            ):
                raise InvalidArgument(f"{name} must be a tuple of exception classes, got {classes!r:.100}.")
            object.__setattr__(self, name, tuple(classes))

    @property
    def max_attempts(self) -> int | None:
        """Attempts in all; ``None`` is without limit."""
        return None if self.max_retries is None else self.max_retries + 1

    def allows(self, exc: BaseException) -> bool:
        """Tell whether ``exc`` asks for another attempt, if there are any left."""
        if isinstance(exc, ConductorError) and not exc.retryable:
            return False
        return isinstance(exc, self.autoretry_for) and not isinstance(exc, self.dont_autoretry_for)

    def delay(self, attempt: int) -> float:
        """Return the seconds between the failure of ``attempt`` and the next one."""
        if not self.retry_backoff:
            return float(self.default_retry_delay)
        factor = 1.0 if self.retry_backoff is True else float(self.retry_backoff)
        # Celery's function works on whole numbers; hundredths of a second keep a factor below 1 meaningful.
        hundredths = get_exponential_backoff_interval(
            factor=round(factor * 100),
            retries=min(attempt - 1, 60),
            maximum=round(self.retry_backoff_max * 100),
            full_jitter=self.retry_jitter,
        )
        return float(hundredths) / 100


def _check_delay(name: str, value: Any, *, allow_bool: bool) -> None:
    if isinstance(value, bool):
        if allow_bool:
            return
    elif isinstance(value, (int, float)) and 0 <= value <= MAX_DELAY_SECONDS:
        return
    kind = "a bool or a number" if allow_bool else "a number"
    raise InvalidArgument(
        f"{name} must be {kind} of seconds from 0 to {MAX_DELAY_SECONDS} (100 years), got {value!r:.100}."
    )
