"""What runs inside a stock ``celery worker``: the sweeper's thread, the feed, and the requests of durable tasks.

Nothing has to be started beside the worker. ``install`` is called when a worker begins to start and adds a bootstep.

The thread lives in the worker's main process, which forks pool processes at any time. So it holds a lock while it works
(a fork waits for it, for a second at most), and its database connection is closed before a fork.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import mmap
import os
import queue
import random
import signal as os_signal
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from billiard.common import TERM_SIGNAME
from billiard.compat import mem_rss
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import bootsteps, signals
from celery.exceptions import Ignore, NotRegistered
from celery.platforms import signals as os_signals
from celery.utils.collections import LimitedSet
from celery.utils.functional import maybe_list
from celery.utils.saferepr import saferepr
from celery.worker import control
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.control import Panel
from celery.worker.request import Request
from celery.worker.strategy import default as default_strategy
from django.db import DatabaseError, connections
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport.memory import Transport as MemoryTransport

from conductor_app import api, transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, calls, draining, hand_off, sweeper
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import AbandonRun, CancelExecution, Failure, LeaseLost, class_path
from conductor_app.host import durable_runs, ends, loops, plain_runs, pools, reuse
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, owners, sessions
from conductor_app.store.ids import as_child_id, of_task_id
from conductor_app.store.sql import RowsLocked, persist_briefly, waiting_at_most
from conductor_app.transitions import dispatch, leases

logger = logging.getLogger("conductor_app.worker")

#: Set by the bootstep: whether this worker's event loop is slow to send acknowledgements.
_acknowledge_directly = False
#: Set by the bootstep: whether bodies run in greenlets. Celery then gives a greenlet's number for that of its process.
_runs_greenlets = False

#: How often kombu looks into the memory:// queue, in seconds; its own default is 1.
MEMORY_POLLING_SECONDS = 0.01
#: Celery's default of ``worker_lost_wait``, in seconds.
CELERY_LOST_WAIT_SECONDS = 10.0
#: How long to wait for the end of a process that Celery reports as dead, in seconds.
DEATH_SECONDS = 10.0
#: How often to look meanwhile, in seconds.
DEATH_POLL_SECONDS = 0.2
#: The first sweep that fails is repeated at once; so many seconds follow each other one, and at most so many.
RETRY_PAUSE_SECONDS = 0.2
MAX_RETRY_SECONDS = 1.0
#: How long a process that is to be killed may go on until its execution is flagged as cancelled, in seconds. Else a
#: body that unwinds might be taken for one that failed.
CANCEL_BEFORE_KILL_SECONDS = 2.0
#: What asks a worker to end.
ENDING_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")
#: A sweep for something that is due comes so many seconds after the one before it at the earliest.
LOOK_SECONDS = 0.05
#: Longest pause before a worker is asked again for a task that it did not know, in seconds.
UNKNOWN_SECONDS = 3_600.0
#: While runs are shorter than this, in seconds, the feed fetches more executions than there are free slots: at least
#: so many for each, as many as are worked off in so many seconds, and at most so many.
SHORT_RUN_SECONDS = 0.25
SHORT_RUN_ROOM = 3
FED_SECONDS = 0.04
MAX_ROOM = 20


class DurableRequest(Request):
    """A delivery of a durable task, as the worker's main process sees it.

    Celery would record a failure when a pool process dies. Here the execution's row decides what follows, so this class
    only tells the sweeper's thread, which looks at once.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hear of every end of a run.

        Celery derives a class from this one for each task (``create_request_cls``) and defines ``on_success`` in it.
        """
        super().__init_subclass__(**kwargs)
        original: Any = cls.on_success

        @functools.wraps(original)
        def on_success(self: Any, failed__retval__runtime: Any, **details: Any) -> Any:
            latest = worker_state.requests.get(self.id)
            try:
                if isinstance(failed__retval__runtime, ExceptionInfo):
                    # The threads and solo pools call back with this when a body ends its process (``sys.exit``).
                    # Celery takes it for an outcome: the worker's loop would die of it, or never free the slot.
                    return self.on_failure(failed__retval__runtime)
                ended = original(self, failed__retval__runtime, **details)
                self._report_followers(failed__retval__runtime[2])
                return ended
            finally:
                self._keep_listed(latest)
                self._report_end(self._callbacks_due_in)

        cls.on_success = on_success  # type: ignore[method-assign]

    def acknowledge(self) -> None:
        """Acknowledge the message, if that has not been done.

        Celery puts an acknowledgement on its event loop's list. Two loops look at that list too late, and the broker
        sends nothing more until then: the one of the solo pool, which runs the bodies itself, after up to 10 seconds
        (measured with RabbitMQ and plain tasks of 20 ms), and the synchronous one of ``memory://`` after up to 2.
        There the acknowledgement is sent at once; for ``memory://`` it only adds to a set in this process.
        """
        if _acknowledge_directly and not self.acknowledged:
            request: Any = self
            request.message.ack_log_error(logger, request.connection_errors)
            self.acknowledged = True
        else:
            super().acknowledge()

    def revoked(self) -> bool:
        """Tell whether this worker was told to revoke what did not exist then, and see to its cancellation.

        An execution that existed was cancelled in the database when it was revoked, and a retry can undo it there;
        Celery would drop its messages for as long as any worker remembers the id. But the ids of a chain's later tasks,
        of a chord's body and of callbacks are known before there is anything to cancel, and so are stamps.
        """
        if cast(Any, self)._already_revoked:
            return True
        _forget_settled()
        task_id = str(self.id)
        if task_id in worker_state.revoked:
            stamps = {}
        elif worker_state.revoked_stamps and task_id not in news.spared:
            stamps = cast(Any, self).stamps
            if not _share_a_stamp(stamps, worker_state.revoked_stamps):
                return False
        else:
            return False
        logger.info("%s[%s] was revoked before this message came.", self.name, task_id)
        if dispatch.HEADER not in self.request_dict:
            self._announce_revoked("revoked", False, None, False)
            news.revoked(task_id, instead=self._store_revoked)
        elif not stamps:
            self._announce_revoked("revoked", False, None, False)
            news.revoked(task_id)
        else:
            # Or it was revoked, and retried since: the database knows when it was created.
            self._ready()
            self.acknowledge()
            self._already_revoked = True
            news.revoked(task_id, stamps)
        return True

    def _store_revoked(self) -> None:
        """Tell Celery that a message of others becomes no execution: there is no row that would."""
        request: Any = self
        try:
            request.task.backend.mark_as_revoked(
                self.id, "revoked", request=request._context, store_result=request.store_errors
            )
        except DatabaseError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the result backend raises, there are others to cancel
            logger.warning("REVOKED of %s[%s] was not written to the result backend: %s", self.name, self.id, error)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Kill the process that runs this delivery, unless it has gone on with another.

        The command has had the execution cancelled before. Said once more, it would cancel what was retried since.
        """
        if self.worker_pid is None or self._is_running_in(int(self.worker_pid)):
            try:
                super().terminate(pool, signal)
            except NotImplementedError:
                logger.warning("%s[%s] cannot be killed in this pool; it ends at a ctx call.", self.name, self.id)

    def cancel(self, pool: Any, *args: Any, **kwargs: Any) -> None:
        """Kill the process that runs this delivery, at the end of a soft shutdown or in a cold one.

        Celery would raise in the other pools, in the middle of its shutdown; with ``solo`` even in the body. There the
        execution is released at its next ``ctx`` call.
        """
        with suppress(NotImplementedError):
            super().cancel(pool, *args, **kwargs)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Handle everything but a success."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, RunEnded):
            self._on_run_ended(error)
            return self.acknowledge()
        if isinstance(error, Ignore):
            return super().on_failure(exc_info, send_failed_event, return_ok)
        if isinstance(error, TimeLimitExceeded) and not return_ok:
            return None  # ``on_timeout`` follows
        if isinstance(error, (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt)):
            self._ready()
            self.acknowledge()
            logger.error("Process %s died while running %s[%s].", self.worker_pid, self.name, self.id)
            self._report_death()
            return None
        if not return_ok:
            # No run has begun: the message cannot be read. What it claims to be about is not Celery's to fail.
            self._ready()
            self.acknowledge()
            logger.error("A message for %s[%s] is dropped, it cannot be read: %.300r", self.name, self.id, error)
            news.refused(self.id, error)
            news.run_ended()
            return None
        if isinstance(error, MemoryError):
            # A body's own, numpy's for example, and stored. Celery would raise another one here: it ends a solo worker.
            self._ready()
            self.acknowledge()
            self.send_event("task-failed", exception=saferepr(error), traceback=exc_info.traceback)
            self._report_end(self._callbacks_due_in)
            return None
        try:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            self._report_end(self._callbacks_due_in)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Handle Celery's time limits: the hard one kills the process, and counts as a lost attempt."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        self._ready()
        self.acknowledge()
        error = TimeLimitExceeded(timeout)
        logger.error("Hard time limit (%ss) exceeded for %s[%s].", timeout, self.name, self.id)
        self.send_event("task-failed", exception=repr(error), traceback=None)
        self._report_death()

    @property
    def _callbacks_due_in(self) -> float | None:
        """When the sweeper is to send the execution's callbacks, if it is to."""
        has_none = self.request_dict.get(dispatch.HEADER) == dispatch.DOORBELL
        return None if has_none or not dispatch.is_embedded(self.app) else 0.0

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Handle ``revoke(terminate=True)``: the process is being killed, the result is the execution's business."""
        self._ready()
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        ends.celery_told(self.id)
        signals.task_revoked.send(
            self.task, request=cast(Any, self)._context, terminated=terminated, signum=signum, expired=expired
        )

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        """Handle the end of a soft shutdown: the process is being killed, the execution goes to another worker."""
        del emit_retry
        self._ready()
        self.send_event("task-cancelled")
        self._already_cancelled = True

    def _ready(self) -> None:
        latest = worker_state.requests.get(self.id)
        worker_state.task_ready(self)
        self._keep_listed(latest)

    def _keep_listed(self, latest: Request | None) -> None:
        """Keep a later delivery of the same execution where ``revoke(terminate=True)`` finds it.

        Celery lists deliveries by task id, and takes the id off the list when this one is over.
        """
        if latest is not None and latest is not self and latest in worker_state.reserved_requests:
            worker_state.requests[self.id] = latest

    def _on_run_ended(self, ended: RunEnded) -> None:
        self._ready()
        if told := ended.event():
            kind, fields = told
            self.send_event(kind, **fields)
        self._report_end(ended.due_in)

    def _report_end(self, due_in: float | None) -> None:
        news.run_ended(due_in, seconds=time.time() - self.time_start if self.time_start else None)

    def _report_followers(self, runtime: object) -> None:
        """Pass on what the process says of the runs that followed this one there."""
        if not isinstance(runtime, durable_runs.Runtime):
            return
        if runtime.due_at is not None:
            news.run_ended(max(runtime.due_at - time.time(), 0.0))
        request: Any = self
        if request._eventer and request._eventer.enabled and self.task.send_events:
            for kind, fields in runtime.events:
                request._eventer.send(kind, **fields)

    def _report_death(self) -> None:
        # The end of the process is reported for itself, with what it was running by then.
        pid = os.getpid() if _runs_greenlets else self.worker_pid
        if pid is not None and self._is_running_in(int(pid)):
            news.process_died(str(self.id), owners.lease_owner(self.hostname, int(pid)))
        news.run_ended()

    def _is_running_in(self, pid: int) -> bool:
        """Tell whether the process has not gone on with another execution."""
        return hand_off.gate.running_in(pid) in (None, of_task_id(self.id))


def strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Return Celery's own strategy for a task's deliveries, made to survive messages that cannot be read.

    Some of these (the body ``null``) would end the worker, and each of the others would cost its log a traceback.
    """
    handle = default_strategy(task, app, consumer, **options)

    def task_message_handler(message: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return handle(message, *args, **kwargs)
        except consumer.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a forged message makes Celery raise
            logger.error("A message for %s is dropped, it cannot be read: %.300r", task.name, error)
            news.refused((message.headers or {}).get("id"), error)
            message.reject_log_error(logger, consumer.connection_errors)
            return None

    return task_message_handler


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
        self._ends.put(ProcessEnd(pid, hand_off.gate.running_in(pid)))
        hand_off.gate.forget(pid)
        self._wake.set()

    def revoked(
        self,
        task_id: str = "",
        stamps: Mapping[str, Any] | None = None,
        *,
        instead: Callable[[], None] | None = None,
    ) -> threading.Event:
        """Somebody revoked a task id, or all tasks with a stamp; return what is set when the database knows.

        Args:
            task_id: The id, or with ``stamps`` that of an execution which bears a stamp that was revoked earlier.
            stamps: What is revoked, or what the execution bears.
            instead: What to do if no execution has the id.
        """
        revocation = Revocation(task_id, stamps or {}, instead)
        self._revoked.put(revocation)
        self._wake.set()
        return revocation.done

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


news = News()


class SweeperThread(threading.Thread):
    """Sweeps, and in embedded mode feeds the worker from the database."""

    def __init__(self, worker: Any, shutdown: Shutdown) -> None:
        super().__init__(name="conductor-sweeper", daemon=True)
        self._worker = worker
        self._shutdown = shutdown
        self._stop_requested = threading.Event()
        self._busy = threading.Lock()
        #: A busy thread would take its lock again before a fork that waits for it gets it.
        self._no_fork = threading.Event()
        self._no_fork.set()
        self._settings = conductor_settings()
        self._embedded = dispatch.is_embedded(worker.app)
        #: A channel of the ``memory://`` broker, by which this looks at its queues.
        self._memory: Any = None
        #: The queues that this worker serves. Celery adds to its own list what bodies in this process are routed to.
        self._served: list[str] | None = None
        self._connection: Any = None
        self._first_tick_at: float | None = None
        self._ticks = 0
        self._swept_at = 0.0
        self._last_problem = ""
        self._next_sweep = 0.0
        #: What was revoked, and the database does not know of.
        self._revocations: list[Revocation] = []
        #: Stamps that were revoked, and when, by the database's clock.
        self._revoked_stamps: list[tuple[Mapping[str, Any], dt.datetime]] = []
        #: Reports of processes that are not dead yet.
        self._doubtful: list[PlainReport] = []
        #: Processes that have ended, as long as Celery may tell of it; the first one first.
        self._ended: list[ProcessEnd] = []
        #: What was to be done with rows that others had locked; tried again with the next sweep.
        self._locked: list[Callable[[], object]] = []
        self._next_audit = time.monotonic() + self._settings.AUDIT_SECONDS
        self._began_at = self._sweep_began_at = time.monotonic()
        self._has_namesake = False

    def stop(self) -> None:
        """Ask the thread to end, and wait for the tick that it is in."""
        self._stop_requested.set()
        news.rouse()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5)

    def run(self) -> None:
        """Tick until stopped. A tick that fails is tried again; nothing ends the thread."""
        news.feeds = self._embedded
        # Bodies may hold all connections of a pool, or the database may fall silent: neither is to stop this thread.
        sessions.use_own(database())
        leases.keeper.watch()
        while not self._stop_requested.is_set():
            self._no_fork.wait(timeout=1)
            with self._busy:
                self._tick()
            if self._stop_requested.is_set():
                break
            pause = self._next_sweep - time.monotonic()
            if self._embedded:
                pause = min(pause, self._settings.FEED_SECONDS)
            news.wait(min(pause, DEATH_POLL_SECONDS) if self._doubtful else pause)
        with self._busy:
            self._part()

    def _tick(self) -> None:
        try:
            self._connection = connections[database()]
            ends = self._hear()
            for execution_id, error in news.take("refused"):
                self._unless_locked(functools.partial(self._note_refusal, execution_id, error))
            reports = [*self._doubtful, *news.take("reports")]
            self._doubtful = [report for report in reports if not self._settle_plain(report)]
            for unknown in news.take("unknown"):
                self._unless_locked(functools.partial(_put_off_unknown, unknown, self._worker.hostname))
            # Celery tells of plain tasks itself, and what ended them, but not if it had stored a result before.
            self._ended += ends
            while self._ended and time.monotonic() - self._ended[0].ended_at > DEATH_SECONDS:
                self._lose_all(self._ended.pop(0), plain=True)
            if news.take_due() or time.monotonic() >= self._next_sweep:
                self._try_locked_again()
                self._sweep()
                self._look_ahead()
            elif ends:
                self._look_ahead()
            self._feed_if_embedded()
        except Exception as error:  # noqa: BLE001 - the thread must outlive any outage
            is_first = not self._last_problem
            self._report(error)
            self._close()
            if is_first:
                # Most often the connection was at fault, and a new one will do: what waits for this sweep has waited.
                self._next_sweep = time.monotonic()
            else:
                pause = min(self._settings.SWEEP_SECONDS, MAX_RETRY_SECONDS)
                self._next_sweep = max(self._next_sweep, time.monotonic() + pause)
                self._stop_requested.wait(RETRY_PAUSE_SECONDS)
        else:
            self._last_problem = ""
            if not self._embedded:
                self._close()

    def _hear(self) -> list[ProcessEnd]:
        """Act on what was revoked, and on the ends of processes, which are returned."""
        deaths, ends = news.take("deaths"), news.take("ends")
        # A revoke may have killed the process: what is to be cancelled must not be queued again first. Each death's
        # revoke was announced before it, so it has been taken with it or earlier.
        self._revocations += news.take("revoked")
        while self._revocations:
            self._unless_locked(functools.partial(self._cancel_revoked, self._revocations[0]))
            self._revocations.pop(0)
        for execution_id, owner in deaths:
            self._lose(execution_id, owner)
        for end in ends:
            self._lose_all(end, plain=False)
        return ends

    def _cancel_revoked(self, revocation: Revocation) -> None:
        if not revocation.stamps:
            if not _cancel_named(revocation.task_id) and revocation.instead is not None:
                revocation.instead()
        elif revocation.task_id:
            self._cancel_late(revocation)
        else:
            self._cancel_stamped(revocation.stamps)
        revocation.done.set()

    def _cancel_stamped(self, stamps: Mapping[str, Any]) -> None:
        revoked_at = clock.read(database())
        found = _stamped(stamps)
        self._revoked_stamps.append((stamps, revoked_at))
        for execution_id in found:
            news.spared.add(str(execution_id))
            _cancel(execution_id)

    def _cancel_late(self, late: Revocation) -> None:
        """Cancel an execution that was created after its stamp was revoked. An older one has been retried since."""
        execution_id = of_task_id(late.task_id)
        execution = Execution.objects.using(database()).filter(pk=execution_id).first()
        if execution is None:
            return
        instants = [at for stamps, at in self._revoked_stamps if _share_a_stamp(late.stamps, stamps)]
        is_late = bool(instants) and execution.created_at > max(instants)
        if is_late:
            _cancel(execution_id)
        news.spared.add(late.task_id)
        if not is_late and execution.status == ExecutionStatus.QUEUED:
            dispatch.publish(execution)

    def _part(self) -> None:
        """Do what a worker that ends leaves undone otherwise: say what its killed processes were running."""
        try:
            self._hear()
        except DatabaseError as error:
            logger.warning("What killed processes were running is left to its leases: %s", error)
        self._close()

    def _sweep(self) -> None:
        interval = self._settings.SWEEP_SECONDS * random.uniform(0.8, 1.2)
        now = self._sweep_began_at = time.monotonic()
        # By the clock on the wall, which goes on while the machine sleeps; from begin to begin, for it may have fallen
        # asleep in the middle of a sweep.
        began = time.time()
        if began - self._swept_at > max(self._settings.LEASE_SECONDS / 2, 2 * self._settings.SWEEP_SECONDS):
            self._ticks, self._first_tick_at = 0, None
        audit = now >= self._next_audit
        found = sweeper.sweep(
            reclaim=self._may_reclaim(now),
            audit=audit,
            publish=not self._embedded,
            turn=sweeper.TURN_SECONDS,
            between=self._feed_if_embedded,
        )
        self._next_sweep = now + interval
        if audit:
            self._look_for_namesakes(now)
            self._next_audit = now + self._settings.AUDIT_SECONDS
        if found.has_more:
            self._next_sweep = now
        self._ticks += 1
        self._first_tick_at = self._first_tick_at or now
        self._swept_at = began
        if found.keys() - {"locked"}:
            logger.info("Swept: %s.", ", ".join(f"{count} {what}" for what, count in sorted(found.items())))

    def _look_ahead(self) -> None:
        """Find out what is due before the next sweep.

        A process says with the end of a run what it has suspended for how long, and one that is killed meanwhile does
        not. Nor does another worker, or a web process.
        """
        now = time.monotonic()
        due_in = sweeper.due_in(
            max(self._next_sweep - now, 0.0), since=now - self._sweep_began_at, publish=not self._embedded
        )
        if due_in is not None:
            news.is_due_in(max(due_in, LOOK_SECONDS))

    def _look_for_namesakes(self, now: float) -> None:
        """Say once that another worker has this one's node name: Celery's own commands and events mix them up."""
        name = getattr(self._worker, "hostname", None)
        if name is None or self._has_namesake or now - self._began_at < 2 * self._settings.LEASE_SECONDS:
            return  # a worker that this one replaces may have left leases
        running = Execution.objects.using(database()).with_status(ExecutionStatus.RUNNING)
        held = running.filter(lease_owner__startswith=f"{name}/", lease_expires_at__gt=clock.now())
        holders = held.values_list("lease_owner", flat=True)
        others = [holder for holder in holders if not owners.is_of_this_worker(holder, name)]
        if others:
            self._has_namesake = True
            logger.warning(
                "Another worker is called %s, too, and runs executions as %s. That harms no execution, but `celery "
                "inspect`, `celery control` and Flower cannot tell the two apart. Give each a name of its own: "
                "celery worker -n NAME@%%h",
                name,
                others[0],
            )

    def _may_reclaim(self, now: float) -> bool:
        """Tell whether lapsed leases may be taken yet.

        After an outage of the database, or a laptop's sleep, every lease has lapsed although the bodies still run. So a
        sweeper looks on for half a lease, in which live workers renew theirs.
        """
        if self._first_tick_at is None:
            return False
        return self._ticks >= 2 and now - self._first_tick_at >= self._settings.LEASE_SECONDS / 2

    def _feed_if_embedded(self) -> None:
        if self._embedded and not self._shutdown.is_requested():
            self._feed()

    def _feed(self) -> None:
        """Publish due executions into this process's own memory:// queue, as many as the pool has room for."""
        wanted = self._pool_size() * news.room
        stock = len(worker_state.reserved_requests) + self._unread()
        # A transaction for each run that ends would cost as much as the run.
        if 2 * stock <= wanted:
            stock += sweeper.publish_due(wanted - stock, self._queues())
        news.spare = stock - wanted // 2

    def _pool_size(self) -> int:
        # In Celery 5.6 gevent's pool has for its number of processes that of the greenlets that run.
        size = "limit" if _runs_greenlets else "num_processes"
        return int(getattr(self._worker.pool, size, None) or self._worker.concurrency or 1)

    def _queues(self) -> list[str]:
        if self._served is None:
            self._served = list(self._worker.app.amqp.queues.consume_from)
        return self._served

    def _unread(self) -> int:
        if self._memory is None:
            self._memory = self._worker.app.connection_for_read().channel()
        return sum(self._memory._size(name) for name in self._queues())

    def _unless_locked(self, act: Callable[[], object]) -> None:
        """Do something now, or with the next sweep if somebody has locked a row that it needs."""
        try:
            with waiting_at_most(sweeper.AT_ONCE_SECONDS, database()):
                act()
        except RowsLocked:
            self._locked.append(act)

    def _try_locked_again(self) -> None:
        again, self._locked = self._locked, []
        try:
            while again:
                self._unless_locked(again[0])
                again.pop(0)
        finally:
            self._locked += again

    def _lose(self, execution_id: str, owner: str) -> None:
        try:
            self._unless_locked(functools.partial(self._lose_now, uuid.UUID(execution_id), owner))
        except (DatabaseError, ValueError) as error:
            logger.warning("Execution %s of dead process %s is left to its lease: %s", execution_id, owner, error)

    def _lose_now(self, execution_id: uuid.UUID, owner: str) -> None:
        if self._shutdown.is_requested() and self._give_back(execution_id, owner):
            return
        if transitions.lose(execution_id, owner=owner):
            return
        # It died after its last commit, perhaps before it had told Celery; or before its claim, and the message is gone
        # with it.
        if transitions.announce_now(execution_id) or transitions.dispatch_now(execution_id):
            self._next_sweep = 0.0

    def _note_refusal(self, execution_id: str, error: Exception) -> None:
        message = f"Worker {self._worker.hostname} could not read its message: {str(error)[:300]}"
        failure = Failure(type=class_path(type(error)), message=message)
        transitions.note_refusal(of_task_id(execution_id), failure)

    def _give_back(self, execution_id: uuid.UUID, owner: str) -> bool:
        """Queue an execution whose process the shutdown has killed, at no cost; tell whether that was to be done.

        Not a plain task: Celery runs it once. Nor what is to be cancelled.
        """
        row = Execution.objects.using(database()).filter(pk=execution_id, cancel_requested_at__isnull=True).first()
        return row is not None and not row.is_plain and transitions.give_back(execution_id, owner)

    def _lose_all(self, end: ProcessEnd, *, plain: bool) -> None:
        """Lose what a process that has ended was still running; if the worker's shutdown killed it, that costs nothing.

        What it had claimed to run next, and had not begun, is queued again at no cost, too.
        """
        owner = owners.lease_owner(self._worker.hostname, end.pid)
        if _is_alive(end.pid):  # another process has the number by now
            return
        if end.running is not None and not plain:
            self._lose(str(end.running), owner)
        running = Execution.objects.using(database()).filter(status=ExecutionStatus.RUNNING, lease_owner=owner)
        for execution in running.only("options"):
            if execution.is_plain is not plain:
                continue
            if end.running is None or plain:
                self._lose(str(execution.pk), owner)
            else:
                self._unless_locked(functools.partial(transitions.give_back, execution.pk, owner))

    def _settle_plain(self, report: PlainReport) -> bool:
        """Decide what follows for a plain child, if its row bears the report out.

        Returns:
            Whether that is done; ``False`` asks for another look.
        """
        try:
            if report.unknown_attempt is not None:
                self._unless_locked(functools.partial(_retry_unknown, report, self._worker.hostname))
                return True
            running = Execution.objects.using(database()).filter(pk=report.execution_id, status=ExecutionStatus.RUNNING)
            owner = running.values_list("lease_owner", flat=True).first()
            if owner is None or not owners.is_of_this_worker(owner, self._worker.hostname):
                return True  # a copy's process: the one that holds the lease is another worker's
            if report.failure is None and _is_alive(owners.pid_of(owner)):
                # The kill takes a moment; or it was a copy's process, too.
                return time.monotonic() - report.reported_at > DEATH_SECONDS
            self._unless_locked(
                functools.partial(transitions.lose, report.execution_id, owner=owner, failure=report.failure)
            )
        except (DatabaseError, AbandonRun, LeaseLost) as error:
            logger.warning("Execution %s of a plain task is left to its lease: %s", report.execution_id, error)
        return True

    def _report(self, error: Exception) -> None:
        """Say each problem once: without its tables, or without its database, a worker must not flood its log."""
        problem = f"{type(error).__name__}: {error}".strip()
        if problem == self._last_problem:
            return
        self._last_problem = problem
        if isinstance(error, DatabaseError):
            logger.error("Sweeping failed, the database says: %s. Trying again until it succeeds.", problem)
        else:
            logger.error("Sweeping failed; trying again until it succeeds.", exc_info=error)

    def _close(self) -> None:
        try:
            connections.close_all()
        except DatabaseError:
            logger.debug("Closing the sweeper's connection failed.", exc_info=True)
        self._first_tick_at = self._first_tick_at if self._ticks else None

    # A fork copies this thread's locks and sockets, but not the thread.

    def before_fork(self) -> bool:
        """Wait until the thread is idle, and close its connection."""
        if threading.current_thread() is self or not self.is_alive():
            return False
        self._no_fork.clear()
        held = self._busy.acquire(timeout=1)
        if held and self._connection is not None:
            self._connection.inc_thread_sharing()
            try:
                self._connection.close()
            except DatabaseError:
                logger.debug("Closing the sweeper's connection before a fork failed.", exc_info=True)
            finally:
                self._connection.dec_thread_sharing()
        return held

    def after_fork_in_parent(self, held: bool) -> None:
        """Let the thread go on."""
        if held:
            self._busy.release()
        self._no_fork.set()


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


class SharedGate(hand_off.Gate):
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


class GuardStep(bootsteps.StartStopStep):
    """The bootstep that guards tasks in the pools whose bodies run in the worker's main process.

    A consumer's, since Celery builds all tracers anew on each connection to the broker.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    label = "Conductor guard"

    def start(self, consumer: Any) -> None:
        """Guard all tasks, and let threads wake the event loop."""
        loops.install(consumer.hub)
        plain_runs.guard_tasks(consumer.app)
        durable_runs.guard_tasks(consumer.app)
        # What others have told this worker, or it has told itself before its restart: see `_unrevoke`.
        _forget_settled()
        for task_id in list(worker_state.revoked):
            _unrevoke(task_id)


class ConductorStep(bootsteps.StartStopStep):
    """The bootstep that starts and stops the sweeper's thread with the worker."""

    requires = ("celery.worker.components:Pool",)
    label = "Conductor"

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        global _acknowledge_directly, _runs_greenlets  # noqa: PLW0603
        _acknowledge_directly = worker.pool_cls.__module__.endswith(".solo") or dispatch.is_embedded(worker.app)
        _runs_greenlets = worker.pool_cls.is_green
        pools.install(worker.pool_cls)
        pools.on_process_end = news.process_ended
        # Before the pool forks, so that its processes inherit the shared memory.
        self.shutdown = Shutdown()
        draining.is_draining = self.shutdown.is_requested
        hand_off.gate = SharedGate(worker, self.shutdown)
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)
        self.thread: SweeperThread | None = None
        #: Whether the worker is a part of another program, and ends before it.
        self._is_embedded = False
        self._celerys_on_stopped = worker.blueprint.on_stopped
        worker.blueprint.on_stopped = self._on_stopped
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """Begin to sweep; the first tick is immediate."""
        self._is_embedded = threading.current_thread() is not threading.main_thread()
        if not self._is_embedded:  # else the program around it alone may handle signals
            self._listen()
        self.thread = SweeperThread(worker, self.shutdown)
        _forks.thread = self.thread
        self.thread.start()

    def close(self, worker: Any) -> None:
        """Hear of a shutdown: Celery closes all steps first, whatever ends the worker, a remote command for example."""
        del worker
        self.shutdown.request()

    def stop(self, worker: Any) -> None:
        """Go on sweeping: the pool is stopped after this step, and what becomes of its processes is to be heard."""

    def terminate(self, worker: Any) -> None:
        """Go on sweeping, on a cold shutdown, too."""

    def _on_stopped(self) -> None:
        """Stop sweeping, when all steps have been stopped."""
        if self.thread is not None:
            self.thread.stop()
        _forget_settled()  # Celery saves what it remembers (``--statedb``) at the process's end
        if self._is_embedded:
            self._leave()
        self._celerys_on_stopped()

    def _leave(self) -> None:
        """Leave a process that goes on without this worker as it was: what it queues and runs now is no worker's."""
        signals.worker_shutting_down.disconnect(self._on_shutting_down)
        draining.is_draining = lambda: False
        hand_off.gate = hand_off.Gate()
        _forks.thread = None
        dispatch.forget_broker()

    def _on_shutting_down(self, **_kwargs: Any) -> None:
        self.shutdown.request()

    def _listen(self) -> None:
        """Hear of a shutdown before Celery does anything about it.

        Its handler for a cold one waits for ``worker_soft_shutdown_timeout`` seconds first, which are there for bodies
        to give way, and sends ``worker_shutting_down`` after them.
        """
        for name in ENDING_SIGNALS:
            signum = getattr(os_signal, name, None)
            handler = None if signum is None else os_signal.getsignal(signum)
            if signum is not None and callable(handler):
                os_signal.signal(signum, self._requesting(handler))

    def _requesting(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        main_pid = os.getpid()

        @functools.wraps(handler)
        def request(*args: Any) -> Any:
            if os.getpid() == main_pid:  # a pool process inherits some handlers
                self.shutdown.request()
            return handler(*args)

        return request


class _ForkHooks:
    """Hooks of this process, installed once; they follow the thread that is current."""

    def __init__(self) -> None:
        self.thread: SweeperThread | None = None
        #: Of the thread that forks; several may at the same time.
        self._local = threading.local()
        os.register_at_fork(
            before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    def _before(self) -> None:
        self._local.held = False
        if self.thread is not None:
            self._local.held = self.thread.before_fork()
            _close_own_connections()

    def _after_in_parent(self) -> None:
        if self.thread is not None:
            self.thread.after_fork_in_parent(self._local.held)

    def _after_in_child(self) -> None:
        self.thread = None


def _close_own_connections() -> None:
    """Close what this thread, usually Celery's main one, has open: a child process that inherits it would break it.

    A killed process's failure is stored by the main process. Then a new process is forked, and the first thing that
    Celery's fixup does there is to close the inherited connection. MariaDB's drivers say goodbye on the shared socket:
    the main process could store no second failure, and the plain child that it is about would never be reported.
    """
    for connection in connections.all(initialized_only=True):
        if connection.connection is not None and not connection.in_atomic_block:
            try:
                connection.close()
            except DatabaseError:
                logger.debug("Closing a connection before a fork failed.", exc_info=True)


_forks = _ForkHooks()


def install(instance: Any = None, **_kwargs: Any) -> None:
    """Prepare a worker that begins to start, once.

    Receiver of ``celery.signals.celeryd_init``, and of ``worker_init`` for a worker that another program starts.
    """
    if getattr(instance, "has_conductor", False):
        return
    instance.has_conductor = True
    app = instance.app
    owners.begin_worker()
    dispatch.settle_broker(app)
    reuse.install()
    app.steps["worker"].add(ConductorStep)
    app.steps["consumer"].add(GuardStep)
    if dispatch.is_embedded(app):
        # The class's default: an option of the project's own still wins.
        MemoryTransport.polling_interval = MEMORY_POLLING_SECONDS
        if app.conf.worker_lost_wait == CELERY_LOST_WAIT_SECONDS:
            # The synchronous pool that memory:// gets reports a dead process only after this wait.
            app.conf.worker_lost_wait = 1.0
    _watch_revokes()
    _watch_commands()
    _watch_plain_tasks()
    _watch_unknown_tasks()


def _watch_revokes() -> None:
    """Take Celery's ``revoke`` command for what it says: a cancel of the execution."""
    original = Panel.data["revoke"]
    if getattr(original, "is_conductor", False):
        return
    by_stamps = Panel.data["revoke_by_stamped_headers"]

    @functools.wraps(original)
    def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
        ids = [str(item) for item in maybe_list(task_id) or []]
        known = [news.revoked(item) for item in ids]
        if terminate:
            _wait_for(known)
            for item in ids:
                _terminate_follower(state, item, signal)
        try:
            return original(state, task_id, terminate=terminate, signal=signal, **kwargs)
        finally:
            _forget_settled()
            for item in ids:
                _unrevoke(item)

    @functools.wraps(by_stamps)
    def revoke_by_stamped_headers(state: Any, headers: Any, terminate: bool = False, **kwargs: Any) -> Any:
        known = news.revoked(stamps=_stamps_of(headers))
        if terminate:
            _wait_for([known])
        return by_stamps(state, headers, terminate=terminate, **kwargs)

    revoke.is_conductor = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke
    # The command `terminate` calls it there.
    vars(control)["revoke"] = revoke
    Panel.data["revoke_by_stamped_headers"] = revoke_by_stamped_headers
    Panel.data["hello"] = _forgetting(Panel.data["hello"])


def _forgetting(hello: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a worker that begins only of what is still to be revoked."""

    @functools.wraps(hello)
    def handler(*args: Any, **kwargs: Any) -> Any:
        _forget_settled()
        return hello(*args, **kwargs)

    return handler


def _wait_for(known: list[threading.Event]) -> None:
    """Wait until the database knows what is to be cancelled, before its processes are killed; not for long."""
    give_up_at = time.monotonic() + CANCEL_BEFORE_KILL_SECONDS
    for done in known:
        done.wait(max(give_up_at - time.monotonic(), 0.0))


def _stamps_of(headers: Any) -> dict[str, Any]:
    """Return the stamps that are revoked, as Celery reads them: the command line gives ``name=value``."""
    if isinstance(headers, Mapping):
        return dict(headers)
    return dict(item.split("=")[:2] for item in headers)


def _share_a_stamp(own: Mapping[str, Any] | None, revoked: Mapping[str, Any]) -> bool:
    """Tell whether a task with the stamps ``own`` is meant; either side may have one value or several."""
    return any(
        stamp in (maybe_list(value) or [])
        for name, value in (own or {}).items()
        for stamp in maybe_list(revoked.get(name)) or []
    )


def _terminate_follower(state: Any, task_id: str, signal: Any) -> None:
    """Kill the process that runs an execution which was handed to it: Celery does not find that by its id."""
    pid = hand_off.gate.process_of(task_id)
    delivered = worker_state.requests.get(task_id)
    if pid is not None and (delivered is None or delivered.worker_pid != pid):
        state.consumer.pool.terminate_job(pid, os_signals.signum(signal or TERM_SIGNAME))


def _watch_commands() -> None:
    """Hand off no more when a command changes what this worker may run: pool processes do not hear of it."""
    for name in ("cancel_consumer", "rate_limit", "time_limit"):
        original = Panel.data[name]
        if not getattr(original, "is_conductor", False):
            Panel.data[name] = _closing_the_gate(original)


def _closing_the_gate(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def handler(*args: Any, **kwargs: Any) -> Any:
        hand_off.gate.close()
        return command(*args, **kwargs)

    handler.is_conductor = True  # type: ignore[attr-defined]
    return handler


def _watch_plain_tasks() -> None:
    """Hear what Celery's main process says of plain children: no pool process is there to say it."""
    for signal, receiver in (
        (signals.task_failure, _on_main_failure),
        (signals.task_retry, _on_main_retry),
        (signals.task_revoked, _on_main_revoked),
        (signals.task_unknown, _on_unknown),
    ):
        signal.connect(receiver, dispatch_uid="conductor_app.worker", weak=False)


def _reported_child(task_id: object) -> uuid.UUID | None:
    """Return the child that a signal is about, if this is the main process and no run of it tells itself."""
    is_main = _forks.thread is not None and not ends.is_telling()
    return as_child_id(task_id) if is_main and not plain_runs.is_running(task_id) else None


def _on_main_failure(task_id: str, exception: Any = None, **_kwargs: Any) -> None:
    error = getattr(exception, "exc", exception)
    child = _reported_child(task_id) if isinstance(error, (WorkerLostError, TimeLimitExceeded)) else None
    if child is None:
        return
    ends.celery_told(task_id)
    failure = None
    if isinstance(error, TimeLimitExceeded):
        message = f"{error}: the hard time limit has ended its process."
        failure = Failure(type=class_path(type(error)), message=message)
    news.reported(PlainReport(child, failure=failure))


def _on_main_retry(request: Any = None, **_kwargs: Any) -> None:
    """``retry_on_worker_lost``, and the end of a soft shutdown: the process is dead, or is being killed."""
    child = _reported_child(getattr(request, "id", None))
    if child is not None:
        news.reported(PlainReport(child))


def _on_main_revoked(request: Any = None, terminated: bool = False, expired: bool = False, **_kwargs: Any) -> None:
    child = _reported_child(getattr(request, "id", None))
    if child is None:
        return
    # An id that this worker has learned from another one, or from its own past, is no news: whoever revoked it has
    # cancelled the execution, and if that is queued now, an operator's retry has undone it.
    is_old = str(child) in worker_state.revoked and not terminated and not expired
    if not is_old:
        ends.celery_told(child)
        news.revoked(str(child))
    _unrevoke(str(child))
    if terminated:
        news.reported(PlainReport(child))


def _watch_unknown_tasks() -> None:
    """Let Celery record no failure of an execution whose task this worker does not know.

    Its row is queued, and a worker that knows the task runs it: one that was deployed later, or serves other queues.
    """
    original = Consumer.on_unknown_task
    if getattr(original, "is_conductor", False):
        return

    @functools.wraps(original)
    def on_unknown_task(self: Any, body: Any, message: Any, exc: Any) -> Any:
        headers = message.headers or {}
        if dispatch.HEADER not in headers:
            return original(self, body, message, exc)
        name, task_id = headers.get("task"), headers.get("id")
        logger.warning("This worker knows no task %r; the message of execution %s is left to others.", name, task_id)
        message.reject_log_error(logger, self.connection_errors)
        if headers[dispatch.HEADER] != dispatch.PLAIN:
            news.got_unknown(UnknownMessage(of_task_id(task_id), str(name)))
        return signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    on_unknown_task.is_conductor = True  # type: ignore[attr-defined]
    cast(Any, Consumer).on_unknown_task = on_unknown_task


def _put_off_unknown(unknown: UnknownMessage, hostname: str) -> None:
    """Leave a queued execution whose task this worker does not know to others, a little later."""
    failure = Failure(
        type=class_path(NotRegistered),
        message=f'Worker {hostname} took its message and knows no task "{unknown.task}". Is its module imported there, '
        "and the worker as new as the code that stored it?",
    )
    try:
        delay = transitions.put_off_unknown(unknown.execution_id, unknown.task, failure)
    except DatabaseError as error:
        logger.warning("Execution %s is not put off, and published again before long: %s", unknown.execution_id, error)
        return
    if delay is not None:
        logger.warning("Execution %s is put off by %gs. %s", unknown.execution_id, delay, failure.message)
    news.run_ended(delay)


def _on_unknown(id: Any = None, message: Any = None, **_kwargs: Any) -> None:  # noqa: A002 - the signal's name for it
    child = _reported_child(id)
    headers = getattr(message, "headers", None) or {}
    if child is not None and headers.get(dispatch.HEADER) == dispatch.PLAIN:
        retries = headers.get("retries")
        news.reported(PlainReport(child, unknown_attempt=(retries if isinstance(retries, int) else 0) + 1))


def _retry_unknown(report: PlainReport, hostname: str) -> None:
    """Use up an attempt of a plain child whose task this worker does not know; a newer one may, later."""
    owner = owners.lease_owner(hostname)
    execution = persist_briefly(
        database(), lambda: transitions.claim(report.execution_id, owner, attempt=report.unknown_attempt)
    )
    if execution is None:
        return
    failure = Failure(
        type=class_path(NotRegistered),
        message=f'Worker {hostname} took its message from queue "{execution.queue}" and knows no task '
        f'"{execution.task}". Is its module imported there, and the worker as new as the parent\'s code?',
    )
    if not execution.has_attempts_left:
        transitions.fail(execution, failure)
        return
    delay = min(conductor_settings().REDISPATCH_SECONDS * 2 ** min(execution.attempt - 1, 10), UNKNOWN_SECONDS)
    try:
        transitions.retry_later(execution, failure, delay)
    except CancelExecution:
        transitions.cancel_running(execution)


def _is_alive(pid: int | None) -> bool:
    """Tell whether a process of this worker's is there."""
    try:
        os.kill(pid or os.getpid(), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unrevoke(task_id: object) -> None:
    """Let Celery forget that a child was revoked: its row knows, and an operator's retry can undo it there.

    Celery would drop the id for as long as any worker remembers it. On the main thread alone: the set has no lock.
    """
    if as_child_id(task_id) is not None:
        worker_state.revoked.discard(task_id)


def _forget_settled() -> None:
    """Let Celery forget the revoked ids of which the database knows. On the main thread alone: the set has no lock.

    What it goes on to remember, keeps for its next start, and tells other workers that begin, is what did not exist.
    """
    while news.settled:
        worker_state.revoked.discard(news.settled.popleft())


def _cancel_named(task_id: str) -> bool:
    """Cancel what a revoked id names; tell whether that is an execution, and not another task or one yet to come."""
    is_known = False
    for execution_id in calls.named(task_id):
        is_known |= _cancel(execution_id)
    if is_known:
        news.settled.append(task_id)
    return is_known


def _cancel(execution_id: uuid.UUID) -> bool:
    """Cancel an execution because it was revoked; tell whether there is one."""
    try:
        if not api.cancel(execution_id, reason="revoked through Celery"):
            _restore(execution_id)
    except Execution.DoesNotExist:
        return False
    return True


def _restore(execution_id: uuid.UUID) -> None:
    """Write the outcome of an execution that has ended once more: Celery 5.6 has stored "revoked" over it."""
    try:
        announcements.restore(api.find(execution_id))
    except DatabaseError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the result backend raises, there are others to cancel
        logger.warning("What Celery knows of execution %s may be wrong: %s", execution_id, error)


def _stamped(stamps: Mapping[str, Any]) -> list[uuid.UUID]:
    """Return the open executions that bear one of these stamps."""
    rows = Execution.objects.using(database()).open().filter(options__contains='"stamps"')
    return [row.pk for row in rows.only("options") if _share_a_stamp(row.get_options().get("stamps"), stamps)]
