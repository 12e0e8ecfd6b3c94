"""Real Celery workers, as processes that tests start, watch and kill."""

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from django.db import connection

from tests.support.polling import wait_until

#: For a test that has to hold on each pool; it takes the argument ``pool``. gevent is not installed everywhere.
pools = pytest.mark.parametrize(
    "pool",
    [
        pytest.param(pool, marks=pytest.mark.gevent) if pool == "gevent" else pool
        for pool in os.environ.get("CONDUCTOR_TEST_POOLS", "prefork threads solo").split()
    ],
)

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1

_numbers = itertools.count(1)


class Worker:
    """One ``celery worker`` on the test database, in a process group of its own.

    A context manager: entering starts the worker and waits until it is ready, leaving kills it at once. Start it from
    the main thread: on Linux it dies with the thread that started it, so that no worker outlives a killed test run.

    Args:
        log_path: The file that receives the worker's output.
        pool: ``prefork``, ``threads``, ``solo`` or ``gevent``.
        queues: Queues to consume; the default queue if empty.
        conductor: ``CONDUCTOR`` keys for this worker alone, over those of ``tests.settings``; JSON values.
        env: More environment variables.
        args: More arguments of ``celery worker``.
        app: What stands after ``celery -A``.
        prefix: A command that runs the worker, with its arguments.
    """

    def __init__(
        self,
        log_path: Path,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        queues: Sequence[str] = (),
        conductor: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        app: str = "project",
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = f"test-{os.getpid()}-{next(_numbers)}"
        self.pool = pool
        self.queues = tuple(queues)
        self.log_path = log_path
        self._command = [
            *prefix,
            *(sys.executable, "-m", "celery", "-A", app, "worker"),
            f"--pool={pool}",
            f"--concurrency={concurrency}",
            f"--hostname={self.name}@%h",
            "--loglevel=INFO",
            # Saves a second at each start; both are about other workers' logical clocks and revoked tasks.
            *("--without-mingle", "--without-gossip"),
            *([f"--queues={','.join(queues)}"] if queues else []),
            *args,
        ]
        self._env = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "CONDUCTOR_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
            "CONDUCTOR_TEST_OVERRIDES": json.dumps(dict(conductor or {})),
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    # Life

    def start(self) -> Self:
        """Start the process, without waiting for it."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )
        return self

    def wait_ready(self, timeout: float = 20) -> Self:
        """Wait until the worker says that it is ready; fail with its log if it does not, or ends before."""
        wait_until(
            lambda: " ready." in self.log or not self.is_alive,
            timeout,
            message=lambda: f"Worker {self.name} is not ready. Its log:\n{self.log_tail()}",
        )
        if not self.is_alive:
            raise AssertionError(f"Worker {self.name} ended with {self.returncode}. Its log:\n{self.log_tail()}")
        return self

    def stop(self, timeout: float = 20) -> int:
        """Ask for a warm shutdown, kill after ``timeout`` seconds, and return the exit code (-9 if killed)."""
        if self.is_alive:
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        """Kill the worker and its pool processes at once, as a power cut would, and return the exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Self:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()

    # Processes

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "The worker has not been started."
        return self._process

    @property
    def pid(self) -> int:
        """The main process."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def signal(self, signum: int) -> None:
        """Send a signal to the main process alone."""
        self.process.send_signal(signum)

    def pool_pids(self) -> list[int]:
        """The pool's processes, oldest first; none for the pools that run in the main process. Linux only."""
        try:
            children = [path.read_text() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
        except FileNotFoundError:  # A thread ended between the two reads, or the worker did.
            return self.pool_pids() if self.is_alive else []
        return sorted(int(pid) for pids in children for pid in pids.split())

    def kill_pool_process(self, pid: int | None = None) -> int:
        """Kill one process of the pool, the oldest unless ``pid`` tells which, and return its id."""
        pids = self.pool_pids()
        assert pids, f"Worker {self.name} has no pool processes (--pool={self.pool})."
        assert pid is None or pid in pids, f"{pid} is not one of the pool's processes, {pids}."
        victim = pids[0] if pid is None else pid
        os.kill(victim, signal.SIGKILL)
        return victim

    # Log

    @property
    def log(self) -> str:
        """All that the worker has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for_log(self, text: str, timeout: float = 20) -> None:
        """Wait until the worker has written ``text``: lines about an end come after its commit."""
        wait_until(lambda: text in self.log, timeout, message=lambda: f"No {text!r} in the log:\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.splitlines()[-lines:])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
