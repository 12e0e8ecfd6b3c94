"""What billiard's pool limits in each of its processes: relied on by ``gate``."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from billiard import common as billiard_common
from billiard import pool as billiard_pool
from billiard.compat import mem_rss

from conductor_app.host import ending


def test_these_are_the_limits_of_a_process() -> None:
    """A new one has to be looked at: a job may be many runs (``hand_off``)."""
    limits = {
        name for name in inspect.signature(billiard_pool.Pool).parameters if name.startswith(("max", "timeout", "soft"))
    }
    known = {"maxtasksperchild", "max_memory_per_child", "timeout", "soft_timeout", "max_restarts", "max_restart_freq"}
    assert limits - known == set()
    assert {"maxtasksperchild", "max_memory_per_child", "timeout", "soft_timeout"} <= limits


@pytest.fixture
def small_pool() -> Iterator[billiard_pool.Pool]:
    pool = billiard_pool.Pool(1, max_memory_per_child=1)
    yield pool
    pool.terminate()
    pool.join()


def test_memory_is_looked_at_when_a_job_ends(small_pool: billiard_pool.Pool) -> None:
    """So the process goes on for as long as the job does, whatever it takes."""
    assert mem_rss() > 1
    seen: list[int] = []
    for _ in range(2):
        done = threading.Event()

        def note(pid: int, done: threading.Event = done) -> None:
            seen.append(pid)
            done.set()

        small_pool.apply_async(os.getpid, callback=note)
        deadline = time.monotonic() + 20
        while not done.wait(0.05):
            assert time.monotonic() < deadline
    assert len(set(seen)) == 2


def test_a_process_knows_that_it_was_sent_the_signal_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its ``SystemExit`` is a revoke's or the hard time limit's, and no body's."""
    monkeypatch.setattr(billiard_common, "_should_have_exited", [False])
    monkeypatch.setattr(billiard_common, "maybe_setsignal", lambda *_args: None)
    assert not ending.is_told_to_end()
    with pytest.raises(SystemExit):
        billiard_common._shutdown_cleanup(signal.SIGTERM, None)
    assert ending.is_told_to_end()
