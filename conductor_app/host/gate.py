"""Memory that pool processes share with the main process: whether the worker ends, and what each of them runs."""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from typing import Any

from billiard.compat import mem_rss

from conductor_app.conf import conductor_settings
from conductor_app.store.process import Gate


class Shutdown:
    """One byte of memory that pool processes share with the main process: whether the worker shuts down."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    def request(self) -> None:
        """Tell all running bodies, which give way at their next ``ctx`` call that is not recorded."""
        self._shared[0] = 1

    def is_requested(self) -> bool:
        """Tell whether the worker shuts down."""
        return self._shared[0] == 1


class SharedGate(Gate):
    """Memory that pool processes share with the main process: whether they may hand off, and what each of them runs.

    Pool processes that are started anew, not forked, do not have it, and hand off nothing.
    """

    #: Room for so many processes; each has one of a few places, by its id.
    SLOTS, PLACES = 4_096, 8
    _slot = struct.Struct("=Q16s")

    def __init__(self, worker: Any, shutdown: Shutdown) -> None:
        self._shutdown = shutdown
        self._main_pid = os.getpid()
        # A job that the pool counts or times is to be one run.
        self._is_wanted = conductor_settings().HAND_OFF and not (
            worker.time_limit or worker.soft_time_limit or worker.max_tasks_per_child
        )
        #: The pool looks at a process's memory when a job ends, in KiB, and replaces the process.
        self._max_memory = worker.max_memory_per_child or 0
        # The first byte: closed by a command.
        self._shared = mmap.mmap(-1, 1 + self.SLOTS * self._slot.size)

    @property
    def is_own_process(self) -> bool:  # type: ignore[override]
        """Whether this is a pool process."""
        return os.getpid() != self._main_pid

    def close(self) -> None:
        """Hand off nothing from now on."""
        self._shared[0] = 1

    def is_open(self) -> bool:
        """Tell whether a run may go on with another execution now."""
        return (
            self._is_wanted
            and self._shared[0] == 0
            and not self._shutdown.is_requested()
            and (not self.is_own_process or (self._offset() is not None and not self._is_over_memory()))
        )

    def _is_over_memory(self) -> bool:
        """Tell whether the pool is to replace this process as soon as its job ends."""
        return 0 < self._max_memory < mem_rss()

    def show(self, execution_id: uuid.UUID | None) -> None:
        """Tell the worker's main process what this one runs."""
        offset = self._offset() if self.is_own_process else None
        if offset is not None:
            running = b"" if execution_id is None else execution_id.bytes
            self._slot.pack_into(self._shared, offset, os.getpid(), running)

    def running_in(self, pid: int) -> uuid.UUID | None:
        """Return what a pool process runs, or ran when it died."""
        for offset in self._places(pid):
            known, running = self._slot.unpack_from(self._shared, offset)
            if known == pid and any(running):
                return uuid.UUID(bytes=running)
        return None

    def forget(self, pid: int) -> None:
        """Free the place of a dead process."""
        for offset in self._places(pid):
            if self._slot.unpack_from(self._shared, offset)[0] == pid:
                self._slot.pack_into(self._shared, offset, 0, b"")

    def process_of(self, execution_id: str) -> int | None:
        """Return the pool process that runs an execution."""
        slots = self._slot.iter_unpack(self._shared[1:])
        return next((pid for pid, run in slots if any(run) and str(uuid.UUID(bytes=run)) == execution_id), None)

    def _places(self, pid: int) -> list[int]:
        return [1 + (pid + number) % self.SLOTS * self._slot.size for number in range(self.PLACES)]

    def _offset(self) -> int | None:
        """Return this process's place; ``None`` if all are taken by processes that died in the middle of a run."""
        pid = os.getpid()
        for offset in self._places(pid):
            known, running = self._slot.unpack_from(self._shared, offset)
            if known == pid or not any(running):
                return offset
        return None
