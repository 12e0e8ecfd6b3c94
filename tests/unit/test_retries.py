"""When another attempt is due."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor_app.exceptions import ChildFailed, InvalidArgument, LeaseLost, ProgrammingError
from conductor_app.values.retries import RetryPolicy


def delays(**options: Any) -> list[float]:
    policy = RetryPolicy(retry_jitter=False, **options)
    return [policy.delay(attempt) for attempt in range(1, 13)]


def test_the_defaults_are_the_documented_ones() -> None:
    policy = RetryPolicy()
    assert (policy.max_retries, policy.max_attempts) == (3, 4)
    assert (policy.autoretry_for, policy.dont_autoretry_for) == ((Exception,), ())
    assert (policy.retry_backoff, policy.retry_backoff_max, policy.retry_jitter) == (True, 600, True)
    assert policy.default_retry_delay == 180


def test_a_delay_doubles_up_to_its_maximum() -> None:
    assert delays() == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]
    assert delays(retry_backoff=60) == [60, 120, 240, 480, *[600] * 8]
    assert delays(retry_backoff=0.25, retry_backoff_max=1) == [0.25, 0.5, *[1] * 10]
    assert delays(retry_backoff=False) == [180] * 12
    assert delays(retry_backoff=0) == [180] * 12
    assert delays(retry_backoff=False, default_retry_delay=0) == [0] * 12
    assert delays(retry_backoff_max=0) == [0] * 12


@given(
    attempt=st.integers(1, 10**6),
    backoff=st.floats(0, 1e9) | st.integers(0, 10**9) | st.booleans(),
    maximum=st.floats(0, 1e9),
    jitter=st.booleans(),
)
def test_a_delay_is_never_negative_never_above_its_maximum_and_never_an_overflow(
    attempt: int, backoff: float, maximum: float, jitter: bool
) -> None:
    policy = RetryPolicy(
        max_retries=None, retry_backoff=backoff, retry_backoff_max=maximum, retry_jitter=jitter, default_retry_delay=5
    )
    delay = policy.delay(attempt)
    assert 0 <= delay <= max(maximum + 0.01, 0 if policy.retry_backoff else 5)
    dt.timedelta(seconds=delay)


def test_jitter_takes_anything_between_nothing_and_the_delay() -> None:
    policy = RetryPolicy(retry_backoff=100)
    drawn = [policy.delay(2) for _ in range(300)]
    assert 0 <= min(drawn) < 40
    assert 160 < max(drawn) <= 200


@pytest.mark.parametrize(
    ("options", "error", "allowed"),
    [
        ({}, ValueError(), True),
        ({}, KeyboardInterrupt(), False),
        ({}, LeaseLost("x"), True),
        ({}, ProgrammingError("x"), False),
        ({}, ChildFailed("x"), False),
        ({"autoretry_for": (ChildFailed,)}, ChildFailed("x"), False),
        ({"autoretry_for": (OSError,)}, ConnectionError(), True),
        ({"autoretry_for": (OSError,)}, ValueError(), False),
        ({"dont_autoretry_for": (OSError,)}, ConnectionError(), False),
        ({"autoretry_for": ()}, ValueError(), False),
    ],
)
def test_who_is_tried_again(options: Any, error: BaseException, allowed: bool) -> None:
    assert RetryPolicy(**options).allows(error) is allowed


def test_without_a_limit_there_is_no_last_attempt() -> None:
    assert RetryPolicy(max_retries=None).max_attempts is None
    assert RetryPolicy(max_retries=0).max_attempts == 1


@pytest.mark.parametrize("limit", [-1, "3", 1.0, True, 10**9, 10**400])
def test_an_impossible_number_of_retries_is_refused(limit: Any) -> None:
    with pytest.raises(InvalidArgument):
        RetryPolicy(max_retries=limit)


def test_lists_of_classes_are_taken_as_tuples() -> None:
    assert RetryPolicy(autoretry_for=[OSError]).autoretry_for == (OSError,)  # type: ignore[arg-type]
