"""A fresh database, an empty queue, and workers that can be killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import django
from django.conf import settings
from django.db import connection
from django.test.utils import get_runner
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
DATABASE = "CONDUCTOR_BENCHMARK_DATABASE"

console = Console(soft_wrap=True)


def setup() -> None:
    """Configure Django; call it before anything of ``conductor_app`` is imported."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    # A terminated program cleans up too: its workers must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    django.setup()


@contextmanager
def fresh_database() -> Iterator[None]:
    """Create and migrate a test database, drop it afterwards, and empty the queue before and after."""
    runner = get_runner(settings)(verbosity=0, interactive=False)
    _remove_journals()
    databases = runner.setup_databases()
    os.environ[DATABASE] = str(connection.settings_dict["NAME"])
    _purge()
    try:
        yield
    finally:
        _purge()
        runner.teardown_databases(databases)
        del os.environ[DATABASE]


def _remove_journals() -> None:
    """Remove what killed workers have left beside a SQLite file that is gone: a new one would be taken for broken."""
    if connection.vendor == "sqlite":
        for suffix in ("-wal", "-shm"):
            Path(f"{connection.settings_dict['TEST']['NAME']}{suffix}").unlink(missing_ok=True)


def _purge() -> None:
    from project.celery import app

    with app.connection_for_write() as broker:
        if broker.transport.driver_type != "memory":
            queue = app.amqp.queues[app.conf.task_default_queue](broker.default_channel)
            queue.declare()
            queue.purge()


class Workers:
    """Stock ``celery worker`` processes; a context manager that kills them when it is left."""

    def __init__(self, count: int = 2, *, concurrency: int = 1, pool: str = "prefork") -> None:
        self._commands = [
            [
                *(sys.executable, "-m", "celery", "-A", "project", "worker", f"--pool={pool}"),
                *(f"--concurrency={concurrency}", f"--hostname=benchmark-{number}@%h", "--loglevel=WARNING"),
                *("--without-mingle", "--without-gossip"),
            ]
            for number in range(count)
        ]
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.processes = [self._start(command) for command in self._commands]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            _kill(process)

    def kill_and_replace(self, number: int) -> None:
        """Kill one worker with its pool processes, as a power cut would, and start another in its place."""
        _kill(self.processes[number])
        self.processes[number] = self._start(self._commands[number])

    def kill_pool_process(self, number: int) -> bool:
        """Kill a pool process of one worker, any; tell whether there was one."""
        try:
            children = Path(f"/proc/{self.processes[number].pid}/task").glob("*/children")
            pids = [int(pid) for path in children for pid in path.read_text().split()]
            os.kill(random.choice(pids), signal.SIGKILL)
        except (FileNotFoundError, IndexError, ProcessLookupError):
            return False
        return True

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        log = ROOT / "var" / "benchmark-worker.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(condition: Callable[[], Any], *, timeout: float, interval: float = 0.02) -> Any:
    """Return what ``condition`` returns, as soon as that is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g}s")
        time.sleep(interval)
    return value
