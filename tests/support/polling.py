"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 20,
    interval: float = 0.02,
    message: str | Callable[[], str] = "",
) -> T:
    """Call ``predicate`` until it returns something true, and return that.

    Args:
        timeout: Seconds; after them, one last call decides.
        interval: Seconds between two calls.
        message: What was expected, or a function that tells it, called only on failure.

    Raises:
        AssertionError: ``predicate`` was still false when the time was up.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        last_call = time.monotonic() >= deadline
        if value := predicate():
            return value
        if last_call:
            expected = message() if callable(message) else message
            raise AssertionError(f"{expected or 'The condition was not met'} (waited {timeout:g} s; got {value!r})")
        time.sleep(interval)
