"""Keep the leases of the executions that this process runs.

A daemon thread in the process that runs the bodies renews them: it stops when the process is killed or frozen, and goes
on while the broker is away, while the worker shuts down warmly and while a body holds the pool. (A Celery timer does
none of these: it stops with the connection to the broker.) Runs shorter than ``CONDUCTOR["HEARTBEAT_SECONDS"]`` write
nothing.

A row that somebody has locked delays its own lease alone, and nobody can take that away meanwhile: a sweeper does not
wait for the row, while the heartbeat does, so that it is usually the first to get at it.

The same thread watches the statements of the engine's in this process, and ends those that no server works on any more
(``store.waits``).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from django.db import connections, transaction
from django.db.models import Q

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, own_connections, serving, sockets, waits
from conductor_app.store.locks import RowsLocked, locked, waiting_at_most
from conductor_app.store.process import process
from conductor_app.store.transactions import persist_briefly

logger = logging.getLogger(__name__)


class Lease:
    """The right to run one execution, as this process knows it."""

    def __init__(self, execution: Execution, on_loss: Callable[[], None] = lambda: None) -> None:
        #: As it was claimed.
        self.execution = execution
        self.on_loss = on_loss
        #: Another run has taken over.
        self.lost = False
        #: Somebody asked for it to be cancelled.
        self.cancel_requested = False
        #: Somebody holds it: the run is to give it back.
        self.on_hold = False
        self.renewed_at = time.monotonic()
        #: What the thread that runs the body waits for, in a statement of the body's own.
        self.body = waits.InBody(connections[database()])
        #: Since when its row has been locked by somebody else, if it is.
        self.locked_since: float | None = None
        #: Whether the log has told of that.
        self.is_told = False


class LeaseKeeper:
    """Holds this process's leases and renews them while their bodies run."""

    def __init__(self) -> None:
        self._held: set[Lease] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_idle = False

    @contextlib.contextmanager
    def hold(self, execution: Execution, on_loss: Callable[[], None] = lambda: None) -> Iterator[Lease]:
        """Keep the lease of a claimed execution while the body runs.

        Args:
            on_loss: Called by the heartbeat's thread, once, when that finds the lease lost.
        """
        lease = Lease(execution, on_loss)
        if connections[database()].in_atomic_block:
            # Eager mode, or a test. The claim is not committed, so nobody can take it away; and a heartbeat, on its own
            # connection, would not find it and call it lost.
            yield lease
            return
        with self._changed:
            self._held.add(lease)
            self._start()
            # Between two heartbeats the thread waits for the next one, and a lease that is younger is renewed later.
            if self._is_idle:
                self._changed.notify()
        try:
            yield lease
        finally:
            with self._changed:
                self._held.discard(lease)

    def watch(self) -> None:
        """Watch the statements of the engine's in this process from now on, whether or not it holds a lease."""
        if self._thread is None and not connections[database()].in_atomic_block:
            with self._changed:
                self._start()

    def holds(self, execution_id: uuid.UUID, fence: int | None = None) -> bool:
        """Tell whether a run in this process has, or had when it last looked, the execution's lease (by this fence)."""
        with self._changed:
            return any(
                lease.execution.pk == execution_id and fence in (None, lease.execution.fence) for lease in self._held
            )

    def note_cancel(self, execution_id: uuid.UUID) -> None:
        """Let the run of an execution in this process, if there is one, know that it is to be cancelled."""
        with self._changed:
            for lease in self._held:
                if lease.execution.pk == execution_id:
                    lease.cancel_requested = True

    def forget(self) -> None:
        """Forget the parent process's leases: its thread does not exist in a forked child."""
        self.__init__()  # type: ignore[misc]

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="conductor-heartbeat", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            ripe = self._wait_for_ripe()
            try:
                overdue = self._overdue()
                if not ripe and not overdue:
                    continue
                # Anew each time, and the engine's own: the pool's connections may all be the bodies'.
                own_connections.use_own(database())
                self._renew(ripe)
                end_unserved(overdue)
            except Exception as error:  # noqa: BLE001 - the thread must outlive any outage
                logger.warning("Heartbeat of %d executions failed: %s", len(ripe), error)
                for lease in ripe:  # do not spin: try again after half an interval
                    lease.renewed_at = time.monotonic() - conductor_settings().HEARTBEAT_SECONDS / 2
            finally:
                with contextlib.suppress(Exception):
                    connections.close_all()

    def _wait_for_ripe(self) -> list[Lease]:
        """Wait until leases are to be renewed, or for one interval, and return them."""
        with self._changed:
            interval = conductor_settings().HEARTBEAT_SECONDS
            if not self._held:
                self._is_idle = True
                self._changed.wait(interval)
                self._is_idle = False
                return []
            oldest = min(lease.renewed_at for lease in self._held)
            self._changed.wait(max(oldest + interval - time.monotonic(), 0.01))
            return [lease for lease in self._held if time.monotonic() - lease.renewed_at >= interval]

    def _overdue(self) -> list[waits.Wait]:
        """Return what has been waited for since before the last heartbeat."""
        with self._changed:
            bodies = [lease.body for lease in self._held]
        interval = conductor_settings().HEARTBEAT_SECONDS
        return [*waits.overdue(interval), *(body for body in bodies if body.look() > interval)]

    def _renew(self, ripe: list[Lease]) -> None:
        interval = conductor_settings().HEARTBEAT_SECONDS
        # Nobody knows of a run that hangs on a dead connection, although that was shut down, whether it will go on.
        going = [lease for lease in ripe if not waits.hangs(lease.body.thread)]
        for lease in ripe:
            if lease not in going:
                lease.renewed_at = time.monotonic()
        if not going:
            return
        with sockets.ended_after(max(interval, 1.0), database()):
            passed_over = renew(going)
        if not passed_over:
            return
        # Those alone, and never for so long that the others' leases would suffer.
        seconds = min(LOCKED_SECONDS, interval / 2)
        for lease in passed_over:
            with sockets.ended_after(seconds + max(interval, 1.0), database()):
                renew_locked(lease, seconds / len(passed_over))
        with self._changed:
            self._changed.wait(LOCKED_PAUSE_SECONDS)


#: How long a heartbeat waits for locked rows, in seconds, and until it tries them again.
LOCKED_SECONDS, LOCKED_PAUSE_SECONDS = 1.0, 0.05


def end_unserved(overdue: Sequence[waits.Wait]) -> None:
    """Shut down the connections of those that wait for a statement that the server is not working on.

    Where it cannot tell, the engine's own end with their lease, and begin again. Those of bodies may take that long.
    """
    for wait in overdue:
        with sockets.ended_after(max(conductor_settings().HEARTBEAT_SECONDS, 1.0), database()):
            is_served = serving.is_served(wait, database())
        may_take_long = wait.is_body or wait.seconds <= conductor_settings().LEASE_SECONDS
        if is_served or (is_served is None and may_take_long):
            continue
        seconds = wait.seconds
        if sockets.cut(wait):
            logger.warning(
                "A statement has been waiting for %.0f s on a connection that the database does not know or does not "
                "answer on. The connection is shut down, and what waited for it goes on with a new one.",
                seconds,
            )


def renew(leases: list[Lease]) -> list[Lease]:
    """Renew ``leases`` in the database and notice those that are lost, or whose execution is to be cancelled or held.

    Returns:
        Those whose rows somebody else has locked; they are as they were.
    """
    using = database()
    mine = Q()
    for lease in leases:
        mine |= Q(pk=lease.execution.pk, fence=lease.execution.fence, lease_owner=lease.execution.lease_owner)
    held = Execution.objects.using(using).filter(mine, status=ExecutionStatus.RUNNING)
    columns = ("pk", "fence", "cancel_requested_at", "held_at")
    with transaction.atomic(using=using):
        flags = {(pk, fence): asked for pk, fence, *asked in locked(held, skip=True).values_list(*columns)}
        Execution.objects.using(using).filter(pk__in=[pk for pk, _ in flags]).update(
            lease_expires_at=clock.after(conductor_settings().LEASE_SECONDS)
        )
    now = time.monotonic()
    for lease in leases:
        if _key(lease) in flags:
            lease.renewed_at, lease.locked_since = now, None
    passed_over = [lease for lease in leases if _key(lease) not in flags]
    there = {(pk, fence): asked for pk, fence, *asked in held.values_list(*columns)} if passed_over else {}
    flags = {**there, **flags}
    for lease in leases:
        is_news = not lease.lost and _key(lease) not in flags
        lease.lost = _key(lease) not in flags
        lease.cancel_requested, lease.on_hold = (flag is not None for flag in flags.get(_key(lease), (None, None)))
        if lease.lost:
            lease.renewed_at = now
        if is_news:
            lease.on_loss()
    return [lease for lease in passed_over if not lease.lost]


def renew_locked(lease: Lease, seconds: float) -> None:
    """Renew a lease whose row somebody has locked, if that ends within so many seconds."""
    using, run = database(), lease.execution
    lease.locked_since = lease.locked_since or time.monotonic()
    held = Execution.objects.using(using).held_by(run)
    expires_at = clock.after(conductor_settings().LEASE_SECONDS)
    try:
        with waiting_at_most(seconds, using):
            persist_briefly(using, lambda: held.update(lease_expires_at=expires_at))
    except RowsLocked:
        locked_for = time.monotonic() - lease.locked_since
        if locked_for >= conductor_settings().LEASE_SECONDS and not lease.is_told:
            lease.is_told = True
            logger.warning(
                "Another session has locked the row of execution %s for %.0f s, so its lease cannot be renewed. It "
                "goes on, and nobody takes it away as long as the row is locked.",
                run.pk,
                locked_for,
                extra={"execution_id": str(run.pk)},
            )
    else:
        lease.renewed_at, lease.locked_since = time.monotonic(), None


def _key(lease: Lease) -> tuple[uuid.UUID, int]:
    return (lease.execution.pk, lease.execution.fence)


process.keeper = LeaseKeeper()
