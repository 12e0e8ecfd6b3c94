"""When roots begin and end, noted by the processes that run them. For every system, so with the standard library alone.

Each process writes a small file of its own, mapped into memory: a mark costs about a microsecond, takes no lock between
processes, and is read by the program that measures without asking the database. Times are of the system's monotonic
clock, which is one for all processes of a machine.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

#: Names the directory of the files.
DIRECTORY = "CONDUCTOR_BENCHMARK_MARKS"

_TIME = struct.Struct("=d")
_COUNT = struct.Struct("=Q")
_FIRST, _LAST, _ROOTS, _SIZE = 0, 8, 16, 24

_lock = threading.Lock()
_mine: tuple[int, mmap.mmap] | None = None


def begin() -> None:
    """Note that a body begins; only the first one of this process counts."""
    now = time.monotonic()
    with _lock:
        file = _file()
        if _TIME.unpack_from(file, _FIRST)[0] == 0:
            _TIME.pack_into(file, _FIRST, now)


def end() -> None:
    """Note that a root has come to its last line."""
    now = time.monotonic()
    with _lock:
        file = _file()
        _TIME.pack_into(file, _LAST, now)
        # The count last: who sees it sees the time that belongs to it.
        _COUNT.pack_into(file, _ROOTS, _COUNT.unpack_from(file, _ROOTS)[0] + 1)


def _file() -> mmap.mmap:
    global _mine  # noqa: PLW0603 - one file for each process, also after a fork
    if _mine is None or _mine[0] != os.getpid():
        path = Path(os.environ[DIRECTORY]) / str(os.getpid())
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            _mine = os.getpid(), mmap.mmap(file.fileno(), _SIZE)
    return _mine[1]


@dataclass(frozen=True)
class Marks:
    """What all processes together have noted."""

    #: When the first body began; 0 before.
    first: float
    #: When the last root that has ended came to its end; 0 before.
    last: float
    #: How many roots have ended.
    roots: int
    #: How many processes have run a body.
    processes: int

    @property
    def seconds(self) -> float:
        """From the first body's begin to the last root's end."""
        return self.last - self.first


def read(directory: Path) -> Marks:
    """Add up the files of a directory."""
    found = [content for path in directory.iterdir() if len(content := path.read_bytes()) == _SIZE]
    begun = [first for content in found if (first := _TIME.unpack_from(content, _FIRST)[0])]
    return Marks(
        first=min(begun, default=0.0),
        last=max((_TIME.unpack_from(content, _LAST)[0] for content in found), default=0.0),
        roots=sum(_COUNT.unpack_from(content, _ROOTS)[0] for content in found),
        processes=len(begun),
    )
