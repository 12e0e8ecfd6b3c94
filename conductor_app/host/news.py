"""What the worker's main process tells the sweeper's thread, and what it says it with."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery.utils.collections import LimitedSet
from celery.worker import state as worker_state
from kombu.exceptions import ContentDisallowed, DecodeError

from conductor_app.exceptions import Failure
from conductor_app.store.process import process

#: While runs are shorter than this, in seconds, the feed fetches more executions than there are free slots: at least
#: so many for each, as many as are worked off in so many seconds, and at most so many.
SHORT_RUN_SECONDS = 0.25

SHORT_RUN_ROOM = 3

FED_SECONDS = 0.04

MAX_ROOM = 20


@dataclass(frozen=True)
class ProcessEnd:
    """A pool process has ended."""

    pid: int
    #: The durable execution that it was running, if it could tell.
    running: uuid.UUID | None
    #: By ``time.monotonic()``.
    ended_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class PlainReport:
    """What Celery's main process says of a plain child, for the sweeper's thread.

    Without ``failure`` and ``unknown_attempt``: the process that ran it is dead, or is being killed.
    """

    execution_id: uuid.UUID
    #: What fails it for good.
    failure: Failure | None = None
    #: The attempt of a message whose task this worker does not know.
    unknown_attempt: int | None = None
    #: When it was reported, by ``time.monotonic()``.
    reported_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class UnknownMessage:
    """A message of ours whose task this worker does not know, for the sweeper's thread."""

    execution_id: uuid.UUID
    task: str


@dataclass(frozen=True)
class Revocation:
    """Somebody revoked a task id, or all tasks with a stamp.

    With both: a message is about an execution with these stamps, of which some were revoked earlier.
    """

    task_id: str = ""
    stamps: Mapping[str, Any] = field(default_factory=dict)
    #: What is to be done if no execution has the id.
    instead: Callable[[], None] | None = None
    #: Since when it may have been under way, by ``time.monotonic()``.
    since: float = field(default_factory=lambda: process.worker.heard_since())  # noqa: PLW0108 - today's worker
    #: Executions that were cancelled and retried while it was under way: what was retried is not meant any more.
    outdated: set[uuid.UUID] = field(default_factory=set)
    #: Set when the database knows.
    done: threading.Event = field(default_factory=threading.Event)


class News:
    """What the worker's main process tells the sweeper's thread. No database work is done on the way."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._deaths: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._ends: queue.SimpleQueue[ProcessEnd] = queue.SimpleQueue()
        self._revoked: queue.SimpleQueue[Revocation] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[PlainReport] = queue.SimpleQueue()
        self._unknown: queue.SimpleQueue[UnknownMessage] = queue.SimpleQueue()
        self._refused: queue.SimpleQueue[tuple[str, Exception]] = queue.SimpleQueue()
        #: Revoked ids of which the database knows, so that Celery is to forget them.
        self.settled: deque[str] = deque()
        #: Executions that a revoke of their stamps was about when it came, and those that it is not about. Written by
        #: the sweeper's thread alone.
        self.spared: LimitedSet = LimitedSet(maxlen=worker_state.REVOKES_MAX)
        self._next_due = float("inf")
        self._usual_run_seconds = float("inf")
        #: Whether a free pool slot is to be filled from the database.
        self.feeds = False
        #: How many runs may end before the feed has something to do. Threads count it down without a lock: a miscount
        #: costs ``FEED_SECONDS`` at most.
        self.spare = 0

    @property
    def room(self) -> int:
        """How many executions each pool slot is to have in this process, with the one that runs.

        More than one if lately runs have been so short that fetching the next one takes longer.
        """
        usual = self._usual_run_seconds
        if usual >= SHORT_RUN_SECONDS:
            return 1
        return max(SHORT_RUN_ROOM, MAX_ROOM if usual * MAX_ROOM < FED_SECONDS else int(FED_SECONDS / usual))

    def run_ended(self, due_in: float | None = None, seconds: float | None = None) -> None:
        """A pool slot is free; ``due_in`` seconds from now the sweeper has something to do.

        Args:
            seconds: How long the run took.
        """
        if seconds is not None:
            # A long run counts at once, short ones count little by little.
            usual = self._usual_run_seconds
            self._usual_run_seconds = seconds if seconds > usual or usual == float("inf") else (usual * 3 + seconds) / 4
        if due_in is not None:
            self.is_due_in(due_in)
        self.spare -= 1
        # With a broker server, or a stock of executions, thousands of runs a second would wake the thread for nothing.
        if due_in is not None or (self.feeds and self.spare <= 0):
            self._wake.set()

    def is_due_in(self, seconds: float) -> None:
        """The sweeper has something to do in so many seconds."""
        with self._lock:
            self._next_due = min(self._next_due, time.monotonic() + seconds)

    def rouse(self) -> None:
        """Let the thread look around."""
        self._wake.set()

    def process_died(self, execution_id: str, owner: str) -> None:
        """The process that ran an execution is dead."""
        self._deaths.put((execution_id, owner))
        self._wake.set()

    def process_ended(self, pid: int) -> None:
        """A pool process is gone, whatever it was doing."""
        self._ends.put(ProcessEnd(pid, process.worker.gate.running_in(pid)))
        process.worker.gate.forget(pid)
        self._wake.set()

    def revoked(
        self,
        task_id: str = "",
        stamps: Mapping[str, Any] | None = None,
        *,
        instead: Callable[[], None] | None = None,
    ) -> Revocation:
        """Somebody revoked a task id, or all tasks with a stamp; return what tells when the database knows.

        Args:
            task_id: The id, or with ``stamps`` that of an execution which bears a stamp that was revoked earlier.
            stamps: What is revoked, or what the execution bears.
            instead: What to do if no execution has the id.
        """
        revocation = Revocation(task_id, stamps or {}, instead)
        self._revoked.put(revocation)
        self._wake.set()
        return revocation

    def reported(self, report: PlainReport) -> None:
        """Celery's main process says something of a plain child."""
        self._reports.put(report)
        self._wake.set()

    def got_unknown(self, report: UnknownMessage) -> None:
        """A message is about a task that this worker does not know."""
        self._unknown.put(report)
        self._wake.set()

    def refused(self, execution_id: object, error: BaseException) -> None:
        """This worker cannot read a message, because of its own settings as a rule."""
        if isinstance(error, (ContentDisallowed, DecodeError)):
            self._refused.put((str(execution_id), error))
            self._wake.set()

    def wait(self, timeout: float) -> None:
        """Return when there is news, something is due, or ``timeout`` seconds have passed."""
        with self._lock:
            timeout = min(timeout, max(self._next_due - time.monotonic(), 0.0))
        self._wake.wait(timeout)
        self._wake.clear()

    def take_due(self) -> bool:
        """Tell whether something that a run announced is due now."""
        with self._lock:
            if self._next_due > time.monotonic():
                return False
            self._next_due = float("inf")
            return True

    def take(self, kind: str) -> list[Any]:
        """Return and forget the news of one kind."""
        source: Any = {
            "deaths": self._deaths,
            "ends": self._ends,
            "revoked": self._revoked,
            "reports": self._reports,
            "unknown": self._unknown,
            "refused": self._refused,
        }[kind]
        taken: list[Any] = []
        while True:
            try:
                taken.append(source.get_nowait())
            except queue.Empty:
                return taken


process.news = News()


def news() -> News:
    """Return what this process has to tell the sweeper's thread."""
    current: News = process.news
    return current
