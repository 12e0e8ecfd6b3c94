"""Celery's prefork pools: they tell of each process that has ended, and the one of ``memory://`` survives kills."""

from __future__ import annotations

import tempfile
import threading
import time
from types import TracebackType
from typing import Any, Self

from billiard.pool import Pool
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool

from conductor_app.store.process import process

try:
    import fcntl
except ImportError:  # Windows, which has no prefork pool
    fcntl = None  # type: ignore[assignment]


class ProcessLock:
    """A lock between processes that the kernel takes back from one that dies.

    POSIX record locks belong to a process. The file has no name; forked processes inherit it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the pool

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Give it back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


#: How long a worker's event loop may wait for a process that is ending, in seconds.
REAP_SECONDS = 0.1

_Pool: Any = Pool  # their stubs know little of their insides
_AsynPool: Any = AsynPool


class TellingPool:
    """Tells of each process that has ended, when it is reaped: nobody else can have its id before.

    Celery tells of lost jobs instead, and only of those whose result has not been stored. A process that dies between
    the two, or while it runs something other than what Celery gave it, would be noticed by its lease alone.
    """

    _pool: list[Any]

    def _join_exited_workers(self, shutdown: bool = False) -> Any:
        before = [each.pid for each in self._pool]
        try:
            return super()._join_exited_workers(shutdown)  # type: ignore[misc]
        finally:
            on_process_end = process.worker.on_process_end
            left = {each.pid for each in self._pool}
            for pid in before:
                if on_process_end is not None and pid is not None and pid not in left:
                    on_process_end(pid)


class LoopPool(TellingPool, _AsynPool):  # type: ignore[misc]
    """The pool of workers with an event loop: those with a broker server.

    A process whose end has been seen, and that cannot be reaped yet, is in the pool without the descriptor by which its
    end is seen. If the worker connects to the broker again at that instant, Celery (5.7) ends with "file descriptor is
    None"; here the process is left to be reaped.

    Without the wait, about every second killed process could not be reaped at that instant, and was missed when Celery
    looked after its pool the next time, up to 5 s later.
    """

    def _event_process_exit(self, hub: Any, process: Any) -> None:
        # The pipe by which the end is seen is closed a moment before the kernel lets the process be reaped.
        give_up_at = time.monotonic() + REAP_SECONDS
        while process.exitcode is None and time.monotonic() < give_up_at:
            time.sleep(0.001)
        super()._event_process_exit(hub, process)

    def _track_child_process(self, process: Any, hub: Any) -> None:
        if getattr(process, "_sentinel_poll", process) is not None:
            super()._track_child_process(process, hub)


class SturdyPool(TellingPool, _Pool):  # type: ignore[misc]
    """The pool of processes that share two pipes, one for what is to run and one for results.

    Billiard guards each pipe by a semaphore. A process that is killed while it holds one, and an idle process holds
    the first, takes it with it: no other process ever gets a message again, or none ends.

    Besides, without an event loop two threads replace processes: billiard's supervisor and Celery's ``--autoscale``.
    The one takes a process that the other is just forking for a dead one, and ends with an error; nothing is replaced
    from then on. Here it is one at a time.
    """

    def _setup_queues(self) -> None:
        self._turn = threading.RLock()
        super()._setup_queues()
        if fcntl is not None and self._ctx.get_start_method() == "fork":
            for pipe in (self._inqueue, self._outqueue):
                pipe._rlock, pipe._wlock = ProcessLock(), ProcessLock()

    def _maintain_pool(self) -> Any:
        with self._turn:
            return super()._maintain_pool()


def install(pool_class: type) -> None:
    """Let a worker's pool class make these pools, if it makes any; before it does."""
    if issubclass(pool_class, TaskPool):
        pool_class.Pool, pool_class.BlockingPool = LoopPool, SturdyPool
