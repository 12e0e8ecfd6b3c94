"""What a process remembers beside the database: all of it, in one object.

Each member says who sets it, who reads it, and what becomes of it in a forked child. This module stands below all
others, so it imports none of them. What a layer above has to say is a slot, and the shape of it is a small protocol
here.

Not here:

- what hangs on a context or a thread, such as the current run, the delivery at work, the tree that runs eagerly, and
  what a sweep has found locked (``ContextVar``, ``threading.local``);
- what modules plug in once, when they are imported, and what nobody changes later: receivers of signals, hooks of
  ``observing``, the places where tasks are defined;
- caches of what can be computed again, such as the settings.
"""

from __future__ import annotations

import datetime as dt
import os
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

#: How long a remote command is under way to a worker that listens, in seconds; more than it takes as a rule.
USUAL_SECONDS = 2.0


class Broker(Protocol):
    """The way of a message to the broker, as ``dispatch.publish`` needs it."""

    def send(self, execution: Any, *, waits: bool) -> None:
        """Send an execution's message, or raise what the broker's client does; ``waits`` as for ``publish``."""

    def is_about_message(self, error: Exception) -> bool:
        """Tell whether the broker is there, and takes other messages."""

    def tried(self, error: Exception) -> str:
        """Name the servers that an error is about."""


class Forgetful(Protocol):
    """Something that holds what belongs to one process."""

    def forget(self) -> None:
        """Forget all of it: this is a forked child, and it was the parent's."""


class Keeper(Forgetful, Protocol):
    """What renews the leases of the runs in this process."""

    def watch(self) -> None:
        """Watch the statements of the engine's from now on."""

    def hold(self, execution: Any, on_loss: Callable[[], None] = ...) -> AbstractContextManager[Any]:
        """Keep the lease of a claimed execution while its body runs."""

    def holds(self, execution_id: uuid.UUID, fence: int | None = None) -> bool:
        """Tell whether a run in this process has the execution's lease (by this fence)."""

    def note_cancel(self, execution_id: uuid.UUID) -> None:
        """Let the run of an execution in this process, if there is one, know that it is to be cancelled."""


class Gate:
    """Whether this worker hands off at all. This is the gate of a process without a worker: it is closed."""

    #: Whether bodies run in a process of their own, whose death the worker's main process notices.
    is_own_process = False

    def is_open(self) -> bool:
        """Tell whether a run may go on with another execution now."""
        return False

    def close(self) -> None:
        """Hand off nothing from now on."""

    def show(self, execution_id: uuid.UUID | None) -> None:
        """Tell the worker's main process what this one runs."""

    def running_in(self, pid: int) -> uuid.UUID | None:
        """Return what a pool process runs, or ran when it died."""
        return None

    def forget(self, pid: int) -> None:
        """Free the place of a dead process."""

    def process_of(self, execution_id: str) -> int | None:
        """Return the pool process that runs an execution."""
        return None


class Sweeping(Protocol):
    """The thread that sweeps, in the worker's main process."""

    def before_fork(self) -> bool:
        """Wait until the thread is idle, and close its connection; tell whether it is held up."""

    def after_fork_in_parent(self, held: bool) -> None:
        """Let the thread go on."""


@dataclass(eq=False)
class Worker:
    """What a worker has told this process; its pool processes are forked with it.

    Set by ``host.bootsteps``, before the pool forks. The defaults are those of a process that is no worker's. They come
    back when a worker ends and its process goes on, as in a test that starts one.
    """

    #: Whether it shuts down. Read by ``engine.draining``. Memory that the processes share.
    is_draining: Callable[[], bool] = lambda: False
    #: Whether it hands off, and what each process runs. Read by ``engine`` and ``host``. Memory that they share.
    gate: Gate = field(default_factory=Gate)
    #: What its broker was when it began: it stays that, and Celery takes long to look it up. Set and read by
    #: ``transitions.dispatch``.
    is_embedded: bool | None = None
    #: Whether its broker confirms messages: its runs do not wait for that. Set and read by ``transitions.dispatch``.
    runs_ahead: bool = False
    #: Closes what is too old before a claim. Celery's fixup does it when its tracer begins, and that would be after the
    #: claim. Set by ``host.reuse``, read by ``host.durable_runs``.
    renew_connections: Callable[[], None] = lambda: None
    #: Whether its event loop is slow to send acknowledgements. Read by ``host.request``.
    acknowledge_directly: bool = False
    #: Whether bodies run in greenlets. Celery then gives a greenlet's number for that of its process. Read by ``host``.
    runs_greenlets: bool = False
    #: Returns since when a remote command that it hears now may be under way, by ``time.monotonic()``. Set by
    #: ``host.bootsteps`` where bodies keep it from hearing, read by ``host.news``.
    heard_since: Callable[[], float] = lambda: time.monotonic() - USUAL_SECONDS
    #: What is called with the id of each pool process that has ended, whatever ended it. Read by ``host.pools``, in the
    #: main process.
    on_process_end: Callable[[int], None] | None = None
    #: The thread that sweeps, in the main process. Read by ``store.forks`` and ``host.plain_reports``. A forked child
    #: forgets it: it has none.
    sweeper: Sweeping | None = None


@dataclass(eq=False)
class Process:
    """The process that this is."""

    # --- Slots: the layer above fills them when the app is ready; a forked child keeps them.

    #: ``host.publishing``, set by ``host.receivers``. Read by ``transitions.dispatch``.
    broker: Broker | None = None
    #: Whether this process of a pool was sent the signal to end. Set by ``host.receivers``, read by ``engine.endings``
    #: and ``host.plain_runs``.
    is_told_to_end: Callable[[], bool] = lambda: False
    #: What forgets connections in a forked child, besides Django's. Each gets a descriptor of ``/dev/null``, to put in
    #: the place of sockets. Added to by ``host.receivers``, called by ``store.forks``.
    forgetting: list[Callable[[int], None]] = field(default_factory=list)

    # --- The worker that this is, or that has forked it.

    #: What the worker has told it. A new one is set by ``host.bootsteps`` when a worker ends before its process does.
    worker: Worker = field(default_factory=Worker)
    #: A ``host.news.News``: what the main process tells the sweeper's thread. Set by that module, read by way of
    #: ``news.news()``. A forked child has a copy that nobody reads.
    news: Any = None
    #: The token of the worker in the names of its processes. Set and read by ``store.owners``. A child keeps it.
    workers_token: str | None = None
    #: That of a process without a worker, with the process's id. Set and read by ``store.owners``. A child forgets it.
    own_token: tuple[int, str] | None = None

    # --- What this process runs.

    #: The leases of its runs, and the thread that renews them. Set by ``transitions.leases``, read by
    #: ``engine.claims``, ``transitions.cancelling`` and ``host``. A child has neither.
    keeper: Keeper = field(init=False)
    #: What each thread waits for, by the thread's number: a ``waits.at_work``. Set and read by ``store.waits``; the
    #: heartbeat's thread looks at it. A child has none of the threads.
    at_work: dict[int, Any] = field(default_factory=dict)
    #: The soft time limit of what the main thread does, a ``soft_limits.SoftLimit``. Set and read by that module. In a
    #: child nobody would let through what another thread's fork found held back.
    soft_limit: Any = field(init=False)
    #: Who waits for results in each event loop: an ``awaiting._Poller``. Set and read by ``engine.awaiting``. A child
    #: runs none of the loops.
    pollers: weakref.WeakKeyDictionary[Any, Any] = field(default_factory=weakref.WeakKeyDictionary)
    #: How many claims in a row have failed, though the database answers others. Set and read by ``engine.claims``.
    failed_claims: int = 0
    #: Bodies and what they call by ``.delay()``, of which the log has told. Set and read by ``body.misuse``.
    told_of_calls: set[tuple[str, str]] = field(default_factory=set)
    #: Executions of whose end Celery itself has sent a signal, and when, by ``time.monotonic()``. Set and read by
    #: ``host.ends``.
    told_by_celery: dict[uuid.UUID, float] = field(default_factory=dict)

    # --- Whom it leaves alone for a while, by ``time.monotonic()``. A child inherits that.

    #: The broker, which has just failed. Set and read by ``transitions.dispatch``.
    broker_rests_until: float = 0.0
    #: The result backend, which was slow to fail. Set and read by ``engine.announcements``.
    results_rest_until: float = 0.0
    #: How many blocks of ``dispatch.inline(everywhere=True)`` it is in: it publishes nothing.
    inline_everywhere: int = 0

    # --- Time. A child inherits it.

    #: What the test kit has added to the database's clock. Set and read by ``store.clock``.
    clock_offset: dt.timedelta = dt.timedelta()

    # --- Forks; see ``store.forks``, which sets and reads these.

    #: The id of this process, as of the last fork that Python knows of.
    pid: int = field(default_factory=os.getpid)
    #: Django's connections of all threads, by id. What belongs to other threads than the one that forks is freed in the
    #: child before a hook can run there, so it has to be known before, and to be kept.
    connections: dict[int, weakref.ref[Any]] = field(default_factory=dict)

    def forget_parents(self) -> None:
        """Forget what belongs to the process that this one was forked from; ``store.forks`` calls it in the child."""
        self.own_token = None
        self.at_work.clear()
        self.pollers.clear()
        for name in ("soft_limit", "keeper"):
            part: Forgetful | None = vars(self).get(name)
            if part is not None:  # else its module was never imported
                part.forget()
        self.worker.sweeper = None


#: This one.
process = Process()
