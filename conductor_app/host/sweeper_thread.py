"""The sweeper's thread, which also feeds the worker from the database in embedded mode.

The thread lives in the worker's main process, which forks pool processes at any time. So it holds a lock while it works
(a fork waits for it, for a second at most), and its database connection is closed before a fork.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from django.db import DatabaseError, connections

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import retention, schedules, sweeper, turns
from conductor_app.exceptions import AbandonRun, Failure, LeaseLost, class_path
from conductor_app.host import attendance, news, unknown_tasks
from conductor_app.host.feed import Feed
from conductor_app.host.gate import Shutdown
from conductor_app.host.news import PlainReport, ProcessEnd, Revocation
from conductor_app.host.revocations import Revoker
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, own_connections, owners
from conductor_app.store.ids import of_task_id
from conductor_app.store.locks import RowsLocked, waiting_at_most
from conductor_app.store.process import process
from conductor_app.transitions import attending, dispatch, limiting

logger = logging.getLogger("conductor_app.worker")

#: How long to wait for the end of a process that Celery reports as dead, in seconds.
DEATH_SECONDS = 10.0

#: How often to look meanwhile, in seconds.
DEATH_POLL_SECONDS = 0.2

#: The first sweep that fails is repeated at once; so many seconds follow each other one, and at most so many.
RETRY_PAUSE_SECONDS = 0.2

MAX_RETRY_SECONDS = 1.0

#: At most this often, in seconds, a worker writes that it is there: with a sweep.
ATTEND_SECONDS = 10.0

#: So many seconds a fork waits for a sweep on SQLite; more than Django's and anybody's ``timeout`` lets it be busy.
SQLITE_PATIENCE_SECONDS = 60.0

#: A sweep for something that is due comes so many seconds after the one before it at the earliest.
LOOK_SECONDS = 0.05


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
        self._feed = Feed(worker)
        self._connection: Any = None
        self._first_tick_at: float | None = None
        self._ticks = 0
        self._swept_at = 0.0
        self._last_problem = ""
        self._next_sweep = 0.0
        #: What was revoked, and the database does not know of.
        self._revocations: list[Revocation] = []
        self._revoker = Revoker()
        #: Reports of processes that are not dead yet.
        self._doubtful: list[PlainReport] = []
        #: Processes that have ended, as long as Celery may tell of it; the first one first.
        self._ended: list[ProcessEnd] = []
        #: What was to be done with rows that others had locked; tried again with the next sweep.
        self._locked: list[Callable[[], object]] = []
        self._next_audit = time.monotonic() + self._settings.AUDIT_SECONDS
        self._began_at = self._sweep_began_at = time.monotonic()
        self._has_namesake = self._has_looked_for_absent = False
        self._started_at = time.time()
        self._attended_at = -ATTEND_SECONDS
        self._told_to_stop = False
        self._deleting = retention.Deleting()
        self._attends_badly = False

    def stop(self) -> None:
        """Ask the thread to end, and wait for the tick that it is in."""
        self._stop_requested.set()
        news.news().rouse()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5)

    def run(self) -> None:
        """Tick until stopped. A tick that fails is tried again; nothing ends the thread."""
        news.news().feeds = self._embedded
        # Bodies may hold all connections of a pool, or the database may fall silent: neither is to stop this thread.
        own_connections.use_own(database())
        process.keeper.watch()
        while not self._stop_requested.is_set():
            self._no_fork.wait(timeout=1)
            with self._busy:
                self._tick()
            if self._stop_requested.is_set():
                break
            pause = self._next_sweep - time.monotonic()
            if self._embedded:
                pause = min(pause, self._settings.FEED_SECONDS)
            news.news().wait(min(pause, DEATH_POLL_SECONDS) if self._doubtful else pause)
        with self._busy:
            self._part()

    def _tick(self) -> None:
        try:
            self._connection = connections[database()]
            ends = self._hear()
            for execution_id, error in news.news().take("refused"):
                self._unless_locked(functools.partial(self._note_refusal, execution_id, error))
            reports = [*self._doubtful, *news.news().take("reports")]
            self._doubtful = [report for report in reports if not self._settle_plain(report)]
            for unknown in news.news().take("unknown"):
                self._unless_locked(functools.partial(unknown_tasks.put_off_unknown, unknown, self._worker.hostname))
            # Celery tells of plain tasks itself, and what ended them, but not if it had stored a result before.
            self._ended += ends
            while self._ended and time.monotonic() - self._ended[0].ended_at > DEATH_SECONDS:
                self._lose_all(self._ended.pop(0), plain=True)
            if news.news().take_due() or time.monotonic() >= self._next_sweep:
                self._try_locked_again()
                self._sweep()
                self._look_ahead()
                self._attend()
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
        deaths, ends = news.news().take("deaths"), news.news().take("ends")
        # A revoke may have killed the process: what is to be cancelled must not be queued again first. Each death's
        # revoke was announced before it, so it has been taken with it or earlier.
        self._revocations += news.news().take("revoked")
        while self._revocations:
            self._unless_locked(functools.partial(self._revoker.cancel, self._revocations[0]))
            self._revocations.pop(0)
        for execution_id, owner in deaths:
            self._lose(execution_id, owner)
        for end in ends:
            self._lose_all(end, plain=False)
        return ends

    def _part(self) -> None:
        """Do what a worker that ends leaves undone otherwise: say what its killed processes were running."""
        try:
            self._hear()
        except DatabaseError as error:
            logger.warning("What killed processes were running is left to its leases: %s", error)
        self._write_attendance(lambda: attending.leave(attendance.worker_id(self._worker)))
        self._close()

    def _attend(self) -> None:
        """Say from time to time that this worker is there, and at once that it is about to end."""
        now, stops = time.monotonic(), self._shutdown.is_requested()
        if now - self._attended_at < ATTEND_SECONDS and stops == self._told_to_stop:
            return
        self._attended_at, self._told_to_stop = now, stops
        # By the clock on the wall, as for sweeps.
        up = max(time.time() - self._started_at, 0.0)
        self._write_attendance(lambda: attending.attend(attendance.describe(self._worker, is_stopping=stops), up=up))

    def _write_attendance(self, write: Callable[[], object]) -> None:
        """Write what nothing depends on: an error is told once, and harms nothing else."""
        try:
            with waiting_at_most(sweeper.AT_ONCE_SECONDS, database()):
                write()
        except RowsLocked:
            return
        except Exception as error:  # noqa: BLE001 - insides of Celery are read here, too
            if not self._attends_badly:
                self._attends_badly = True
                logger.warning("That this worker is there could not be written; sweeping goes on: %s", error)
            self._close()
        else:
            self._attends_badly = False

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
            turn=turns.TURN_SECONDS,
            between=self._feed_if_embedded,
        )
        self._next_sweep = now + interval
        with waiting_at_most(sweeper.AT_ONCE_SECONDS, database()):
            found.has_more |= self._deleting.go_on()
        if audit:
            self._look_for_namesakes(now)
            self._write_attendance(attending.forget_old)
            self._write_attendance(limiting.forget_old)
            self._look_for_absent_schedules(now)
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
            news.news().is_due_in(max(due_in, LOOK_SECONDS))

    def _look_for_absent_schedules(self, now: float) -> None:
        """Pause schedules that have left the code; other workers have had the time to say what they have.

        A worker without any looks once: the last one that there was may have left the code.
        """
        if now - self._began_at < schedules.ABSENT_SECONDS or (self._has_looked_for_absent and not schedules.planned()):
            return
        self._has_looked_for_absent = True
        self._write_attendance(schedules.note_absence)

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
            self._feed.fill()

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
                self._unless_locked(functools.partial(unknown_tasks.retry_unknown, report, self._worker.hostname))
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
        # A child that is forked while this thread is inside SQLite finds that locked for ever. SQLite comes back,
        # however long others keep it busy; a server may be silent, and the child is only to let go of its socket.
        is_sqlite = self._connection is not None and self._connection.vendor == "sqlite"
        held = self._busy.acquire(timeout=SQLITE_PATIENCE_SECONDS if is_sqlite else 1)
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


def _is_alive(pid: int | None) -> bool:
    """Tell whether a process of this worker's is there."""
    try:
        os.kill(pid or os.getpid(), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
