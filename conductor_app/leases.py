"""Keep the leases of the executions that this process runs.

A daemon thread in the process that runs the bodies renews them: it stops when the process is killed or frozen, and goes
on while the broker is away, while the worker shuts down warmly and while a body holds the pool. (A Celery timer does
none of these: it stops with the connection to the broker.) Runs shorter than ``CONDUCTOR["HEARTBEAT_SECONDS"]`` write
nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from django.db import connections
from django.db.models import Q

from conductor_app import clock
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus

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
        self.renewed_at = time.monotonic()


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
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="conductor-heartbeat", daemon=True)
                self._thread.start()
            # Between two heartbeats the thread waits for the next one, and a lease that is younger is renewed later.
            if self._is_idle:
                self._changed.notify()
        try:
            yield lease
        finally:
            with self._changed:
                self._held.discard(lease)

    def holds(self, execution_id: uuid.UUID, fence: int | None = None) -> bool:
        """Tell whether a run in this process has, or had when it last looked, the execution's lease (by this fence)."""
        with self._changed:
            return any(
                lease.execution.pk == execution_id and fence in (None, lease.execution.fence) for lease in self._held
            )

    def reset_after_fork(self) -> None:
        """Forget the parent process's leases: its thread does not exist in a forked child."""
        self.__init__()  # type: ignore[misc]

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._held:
                    self._is_idle = True
                    self._changed.wait()
                self._is_idle = False
                interval = conductor_settings().HEARTBEAT_SECONDS
                oldest = min(lease.renewed_at for lease in self._held)
                self._changed.wait(max(oldest + interval - time.monotonic(), 0.01))
                ripe = [lease for lease in self._held if time.monotonic() - lease.renewed_at >= interval]
            if not ripe:
                continue
            try:
                renew(ripe)
            except Exception as error:  # noqa: BLE001 - the thread must outlive any outage
                logger.warning("Heartbeat of %d executions failed: %s", len(ripe), error)
                for lease in ripe:  # do not spin: try again after half an interval
                    lease.renewed_at = time.monotonic() - interval / 2
            finally:
                with contextlib.suppress(Exception):
                    connections.close_all()


def renew(leases: list[Lease]) -> None:
    """Renew ``leases`` in the database and notice those that are lost or whose execution is to be cancelled."""
    using = database()
    mine = Q()
    for lease in leases:
        mine |= Q(pk=lease.execution.pk, fence=lease.execution.fence, lease_owner=lease.execution.lease_owner)
    held = Execution.objects.using(using).filter(mine, status=ExecutionStatus.RUNNING)
    held.update(lease_expires_at=clock.after(conductor_settings().LEASE_SECONDS))
    now = time.monotonic()
    flags = {(pk, fence): flag for pk, fence, flag in held.values_list("pk", "fence", "cancel_requested_at")}
    for lease in leases:
        key = (lease.execution.pk, lease.execution.fence)
        lease.renewed_at = now
        is_news = not lease.lost and key not in flags
        lease.lost = key not in flags
        lease.cancel_requested = flags.get(key) is not None
        if is_news:
            lease.on_loss()


#: This process's keeper.
keeper = LeaseKeeper()
os.register_at_fork(after_in_child=keeper.reset_after_fork)
