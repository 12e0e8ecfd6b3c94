"""The worker: a real ``celery worker``, started, watched and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

PROCESSES = 2


class Worker:
    """One ``celery worker`` with two pool processes, in a process group of its own. Leaving the context stops it."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        #: What Celery calls the worker, up to the host's name. Leases are held by ``<node name>/<process id>``.
        self.name = f"demo-{os.getpid()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [
            *(sys.executable, "-m", "celery", "-A", "project", "worker"),
            "--pool=prefork",
            f"--concurrency={PROCESSES}",
            f"--hostname={self.name}@%h",
            "--loglevel=INFO",
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # No warm shutdown: everything is in the database, or will be taken up by the next worker. That is the point.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def pid(self) -> int | None:
        """The main process, which is not to be killed."""
        return None if self._process is None else self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the worker is gone, which it should not be before it is stopped."""
        return self._process is not None and self._process.poll() is not None

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the worker's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
