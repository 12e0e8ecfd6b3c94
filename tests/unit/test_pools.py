"""The lock that outlives its holders, and the pool that a worker connects to its event loop again."""

from __future__ import annotations

import os
import signal

import pytest
from kombu.asynchronous import Hub

from conductor_app.host.pools import LoopPool, ProcessLock
from conductor_app.store.process import process
from tests.support.polling import wait_until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(lock: ProcessLock, ready: int) -> int:
    """Fork a process that takes the lock, says so, and waits for its end."""
    pid = os.fork()
    if not pid:
        with lock:
            os.write(ready, b"!")
            signal.pause()
        os._exit(0)
    return pid


def test_a_process_that_is_killed_gives_the_lock_back() -> None:
    lock = ProcessLock()
    reader, writer = os.pipe()
    first = in_child(lock, writer)
    assert os.read(reader, 1) == b"!"
    second = in_child(lock, writer)
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.set_blocking(reader, True)
    os.kill(first, signal.SIGKILL)
    assert os.read(reader, 1) == b"!"
    os.kill(second, signal.SIGKILL)
    for pid in (first, second):
        os.waitpid(pid, 0)
    with lock:
        pass


def test_a_worker_connects_again_while_a_dead_process_is_not_reaped_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    pool = LoopPool(processes=2, threads=False)
    try:
        pool.register_with_event_loop(hub)
        dead, alive = pool._pool
        with monkeypatch.context() as patch:
            patch.setattr(pool, "_join_exited_workers", lambda shutdown=False: [])
            os.kill(dead.pid, signal.SIGKILL)
            wait_until(lambda: hub.run_once() or dead._sentinel_poll is None)
        pool.register_with_event_loop(hub)
        assert alive._sentinel_poll in hub.readers
        wait_until(lambda: pool.maintain_pool() or dead not in pool._pool)
        assert [process._sentinel_poll in hub.readers for process in pool._pool] == [True, True]
    finally:
        pool.terminate()
        pool.join()
        hub.close()


def test_a_killed_process_is_told_of_as_soon_as_its_end_is_seen() -> None:
    ended: list[int] = []
    process.worker.on_process_end = ended.append
    hub = Hub()
    pool = LoopPool(processes=2, threads=False)
    try:
        pool.register_with_event_loop(hub)
        killed = []
        for _ in range(12):
            victim = pool._pool[0]
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda victim=victim: hub.run_once() or victim._sentinel_poll is None)
            assert ended == killed
    finally:
        pool.terminate()
        pool.join()
        hub.close()
