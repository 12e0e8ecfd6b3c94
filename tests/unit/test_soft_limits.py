"""When Celery's soft time limit is raised."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from conductor_app.store.soft_limits import soft_limit, uninterrupted
from tests.support.polling import wait_until


@pytest.fixture
def received() -> Iterator[list[str]]:
    """What has happened; the signal's handler writes here."""
    happened: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: happened.append("signal"))
    yield happened
    signal.signal(signal.SIGUSR1, before)


def send() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def test_it_does_not_interrupt_a_transaction(received: list[str]) -> None:
    with uninterrupted():
        send()
        received.append("committed")
    assert received == ["committed", "signal"]
    with uninterrupted(), uninterrupted():
        send()
        received.append("nested")
    assert received[2:] == ["nested", "signal"]
    send()
    assert received[4:] == ["signal"]


def test_a_transaction_in_a_body_lets_it_through_afterwards_and_one_after_the_body_does_not(
    received: list[str],
) -> None:
    limit = soft_limit()
    limit.hold_back()
    limit.let_through()
    with uninterrupted():
        send()
        received.append("step recorded")
    received.append("the body goes on")
    limit.hold_back()
    with uninterrupted():
        send()
    received.append("outcome written")
    limit.forget()
    assert received == ["step recorded", "signal", "the body goes on", "outcome written"]
    send()
    assert received[4:] == ["signal"]


def test_one_that_came_before_the_body_is_raised_in_it_once(received: list[str]) -> None:
    limit = soft_limit()
    limit.hold_back()
    send()
    limit.let_through()
    received.append("body")
    limit.hold_back()
    limit.let_through()
    assert received == ["signal", "body"]


def test_a_run_inside_of_what_holds_it_back_lets_nothing_through(received: list[str]) -> None:
    """As one in eager mode, of a receiver that is called while the outcome of another run is written."""
    limit = soft_limit()
    limit.hold_back()
    inner = soft_limit()
    inner.hold_back()
    inner.let_through()
    send()
    inner.hold_back()
    inner.forget()
    received.append("outcome written")
    limit.let_through()
    assert received == ["outcome written", "signal"]


def test_it_is_the_handler_of_now_that_is_asked(received: list[str]) -> None:
    with uninterrupted():
        pass
    signal.signal(signal.SIGUSR1, lambda *_: received.append("a new pool's"))
    with uninterrupted():
        send()
    assert received == ["a new pool's"]


def test_other_threads_have_none(received: list[str]) -> None:
    limit = soft_limit()
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        soft_limit().hold_back()
        with uninterrupted():
            inside.set()
            done.wait(10)
        soft_limit().forget()

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    send()
    assert received == ["signal"]
    limit.hold_back()
    done.set()
    thread.join()
    send()
    assert received == ["signal"]
    limit.let_through()
    assert received == ["signal", "signal"]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with uninterrupted():
        send()
    assert received == ["signal", "signal"]


class _Finalized:
    def __del__(self) -> None:
        send()
        # Python looks for signals at calls.
        len(str(self))


def test_one_that_comes_in_a_finalizer_is_raised_after_it() -> None:
    """Python drops what is raised in a finalizer: the body would go on without a limit."""

    def limit(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, limit)
    soft_limit()
    try:
        with pytest.raises(TimeoutError):
            _Finalized()
            wait_until(lambda: False, 10)
    finally:
        signal.signal(signal.SIGUSR1, before)
