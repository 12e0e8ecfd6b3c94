"""What runs inside a stock ``celery worker``: the sweeper's thread, the feed, and the requests of durable tasks.

Nothing has to be started beside the worker. ``install`` is called when a worker begins to start and adds a bootstep.

The thread lives in the worker's main process, which forks pool processes at any time. So it holds a lock while it works
(a fork waits for it, for a second at most), and its database connection is closed before a fork.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import random
import threading
import time
import uuid
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import bootsteps, signals
from celery.exceptions import Ignore
from celery.worker import state as worker_state
from celery.worker.control import Panel
from celery.worker.request import Request
from django.db import DatabaseError, connections

from conductor_app import api, dispatch, executor, transitions
from conductor_app.conf import conductor_settings
from conductor_app.executor import RunEnded
from conductor_app.maintenance import sweeper
from conductor_app.models import Execution, database

logger = logging.getLogger("conductor_app.worker")

#: How often kombu looks into the memory:// queue, in seconds; its own default is 1.
MEMORY_POLLING_SECONDS = 0.01


class DurableRequest(Request):
    """A delivery of a durable task, as the worker's main process sees it.

    Celery would record a failure when a pool process dies. Here the execution's row decides what follows, so this class
    only tells the sweeper's thread, which looks at once.
    """

    def revoked(self) -> bool:
        """Let every delivery through: a revoked execution is cancelled in the database, where a retry can undo it.

        Celery would drop the id for as long as any worker remembers it, an operator's retry included.
        """
        return False

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Handle everything but a success."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, RunEnded):
            self._on_run_ended(error)
            return self._acknowledge_once()
        if isinstance(error, Ignore):
            return super().on_failure(exc_info, send_failed_event, return_ok)
        if isinstance(error, (WorkerLostError, Terminated, SystemExit, KeyboardInterrupt)):
            worker_state.task_ready(self)
            self._acknowledge_once()
            logger.error("Process %s died while running %s[%s].", self.worker_pid, self.name, self.id)
            self._report_death()
            return None
        try:
            return super().on_failure(exc_info, send_failed_event, return_ok)
        finally:
            news.run_ended()

    def on_success(self, failed__retval__runtime: Any, **kwargs: Any) -> Any:
        """Handle the end of a run, whatever it was."""
        try:
            return super().on_success(failed__retval__runtime, **kwargs)
        finally:
            news.run_ended()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Handle Celery's time limits: the hard one kills the process, and counts as a lost attempt."""
        if soft:
            super().on_timeout(soft, timeout)
            return
        worker_state.task_ready(self)
        self._acknowledge_once()
        error = TimeLimitExceeded(timeout)
        logger.error("Hard time limit (%ss) exceeded for %s[%s].", timeout, self.name, self.id)
        self.send_event("task-failed", exception=repr(error), traceback=None)
        self._report_death()

    def _on_run_ended(self, ended: RunEnded) -> None:
        worker_state.task_ready(self)
        if ended.what == "suspended":
            self.send_event("task-suspended", step=ended.step)
        news.run_ended(ended.due_in)

    def _acknowledge_once(self) -> None:
        if not self.acknowledged:
            self.acknowledge()

    def _report_death(self) -> None:
        if self.worker_pid is not None:
            news.process_died(str(self.id), f"{self.hostname}/{self.worker_pid}")
        news.run_ended()


class News:
    """What the worker's main process tells the sweeper's thread. No database work is done on the way."""

    def __init__(self) -> None:
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._deaths: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._revoked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._next_due = float("inf")

    def run_ended(self, due_in: float | None = None) -> None:
        """A pool slot is free; ``due_in`` seconds from now the sweeper has something to do."""
        if due_in is not None:
            with self._lock:
                self._next_due = min(self._next_due, time.monotonic() + due_in)
        self._wake.set()

    def process_died(self, execution_id: str, owner: str) -> None:
        """The process that ran an execution is dead."""
        self._deaths.put((execution_id, owner))
        self._wake.set()

    def revoked(self, execution_id: str) -> None:
        """Somebody revoked the task id."""
        self._revoked.put(execution_id)
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
        source = self._deaths if kind == "deaths" else self._revoked
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
        self._settings = conductor_settings()
        self._embedded = dispatch.is_embedded(worker.app)
        self._connection: Any = None
        self._first_tick_at: float | None = None
        self._ticks = 0
        self._last_problem = ""
        self._next_sweep = 0.0
        self._next_audit = time.monotonic() + self._settings.AUDIT_SECONDS

    def stop(self) -> None:
        """Ask the thread to end, and wait for the tick that it is in."""
        self._stop_requested.set()
        news.run_ended()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5)

    def run(self) -> None:
        """Tick until stopped. A tick that fails is tried again; nothing ends the thread."""
        while not self._stop_requested.is_set():
            with self._busy:
                self._tick()
            if self._stop_requested.is_set():
                break
            until_sweep = self._next_sweep - time.monotonic()
            news.wait(min(until_sweep, self._settings.FEED_SECONDS) if self._embedded else until_sweep)
        self._close()

    def _tick(self) -> None:
        try:
            self._connection = connections[database()]
            for execution_id, owner in news.take("deaths"):
                self._lose(execution_id, owner)
            for execution_id in news.take("revoked"):
                _cancel_revoked(execution_id)
            if news.take_due() or time.monotonic() >= self._next_sweep:
                self._sweep()
            if self._embedded and not self._shutdown.is_requested():
                self._feed()
        except Exception as error:  # noqa: BLE001 - the thread must outlive any outage
            self._report(error)
            self._next_sweep = max(self._next_sweep, time.monotonic() + min(self._settings.SWEEP_SECONDS, 1.0))
            self._stop_requested.wait(0.2)
            self._close()
        else:
            self._last_problem = ""
            if not self._embedded:
                self._close()

    def _sweep(self) -> None:
        interval = self._settings.SWEEP_SECONDS * random.uniform(0.8, 1.2)
        now = time.monotonic()
        audit = now >= self._next_audit
        found = sweeper.sweep(reclaim=self._may_reclaim(now), audit=audit, publish=not self._embedded)
        self._next_sweep = now + interval
        if audit:
            self._next_audit = now + self._settings.AUDIT_SECONDS
        self._ticks += 1
        self._first_tick_at = self._first_tick_at or now
        if found:
            logger.info("Swept: %s.", ", ".join(f"{count} {what}" for what, count in sorted(found.items())))

    def _may_reclaim(self, now: float) -> bool:
        """Tell whether lapsed leases may be taken yet.

        After an outage of the database, or a laptop's sleep, every lease has lapsed although the bodies still run. So a
        sweeper looks on for half a lease, in which live workers renew theirs.
        """
        if self._first_tick_at is None:
            return False
        return self._ticks >= 2 and now - self._first_tick_at >= self._settings.LEASE_SECONDS / 2

    def _feed(self) -> None:
        """Publish due executions into this process's own memory:// queue, as many as the pool has room for."""
        room = self._pool_size() - len(worker_state.reserved_requests) - self._unread()
        if room > 0:
            sweeper.publish_due(room, self._queues())

    def _pool_size(self) -> int:
        return int(getattr(self._worker.pool, "num_processes", None) or self._worker.concurrency or 1)

    def _queues(self) -> list[str]:
        return list(self._worker.app.amqp.queues.consume_from)

    def _unread(self) -> int:
        with self._worker.app.connection_for_read() as connection, connection.channel() as channel:
            return sum(channel._size(name) for name in self._queues())

    def _lose(self, execution_id: str, owner: str) -> None:
        try:
            transitions.lose(uuid.UUID(execution_id), owner=owner)
        except (DatabaseError, ValueError) as error:
            logger.warning("Execution %s of dead process %s is left to its lease: %s", execution_id, owner, error)

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


class Shutdown:
    """One byte of memory that pool processes share with the main process: whether the worker shuts down."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)

    def request(self) -> None:
        """Tell all running bodies, which give way at their next ``ctx.checkpoint()``."""
        self._shared[0] = 1

    def is_requested(self) -> bool:
        """Tell whether the worker shuts down."""
        return self._shared[0] == 1


class ConductorStep(bootsteps.StartStopStep):
    """The bootstep that starts and stops the sweeper's thread with the worker."""

    requires = ("celery.worker.components:Pool",)
    label = "Conductor"

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        # Before the pool forks, so that its processes inherit the shared memory.
        self.shutdown = Shutdown()
        executor.is_draining = self.shutdown.is_requested
        signals.worker_shutting_down.connect(self._on_shutting_down, weak=False)
        self.thread: SweeperThread | None = None
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """Begin to sweep; the first tick is immediate."""
        self.thread = SweeperThread(worker, self.shutdown)
        _forks.thread = self.thread
        self.thread.start()

    def stop(self, worker: Any) -> None:
        """Stop sweeping."""
        del worker
        if self.thread is not None:
            self.thread.stop()

    def terminate(self, worker: Any) -> None:
        """Stop sweeping, on a cold shutdown."""
        self.stop(worker)

    def _on_shutting_down(self, **_kwargs: Any) -> None:
        self.shutdown.request()


class _ForkHooks:
    """Hooks of this process, installed once; they follow the thread that is current."""

    def __init__(self) -> None:
        self.thread: SweeperThread | None = None
        self._held = False
        os.register_at_fork(
            before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    def _before(self) -> None:
        self._held = self.thread is not None and self.thread.before_fork()

    def _after_in_parent(self) -> None:
        if self.thread is not None:
            self.thread.after_fork_in_parent(self._held)
        self._held = False

    def _after_in_child(self) -> None:
        self.thread = None
        self._held = False


_forks = _ForkHooks()


def install(instance: Any = None, **_kwargs: Any) -> None:
    """Prepare a worker that begins to start; receiver of ``celery.signals.celeryd_init``."""
    app = instance.app
    app.steps["worker"].add(ConductorStep)
    if dispatch.is_embedded(app):
        options = dict(app.conf.broker_transport_options or {})
        options.setdefault("polling_interval", MEMORY_POLLING_SECONDS)
        app.conf.broker_transport_options = options
    _watch_revokes()


def _watch_revokes() -> None:
    """Take Celery's ``revoke`` command for what it says: a cancel of the execution."""
    original = Panel.data["revoke"]
    if getattr(original, "is_conductor", False):
        return

    def revoke(state: Any, task_id: Any, *args: Any, **kwargs: Any) -> Any:
        for item in task_id if isinstance(task_id, (list, tuple, set)) else [task_id]:
            news.revoked(str(item))
        return original(state, task_id, *args, **kwargs)

    revoke.is_conductor = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke


def _cancel_revoked(execution_id: str) -> None:
    try:
        api.cancel(uuid.UUID(execution_id), reason="revoked through Celery")
    except (ValueError, Execution.DoesNotExist):
        return  # another task's id
