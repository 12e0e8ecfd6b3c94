"""The steps that a stock ``celery worker`` takes for the engine when it starts and ends.

Nothing has to be started beside the worker. ``install`` is called when a worker begins to start and adds them.
"""

from __future__ import annotations

import functools
import os
import signal as os_signal
import threading
from collections.abc import Callable
from typing import Any

from celery import bootsteps, signals
from celery.worker import state as worker_state
from kombu.transport.memory import Transport as MemoryTransport

from conductor_app.host import (
    commands,
    durable_runs,
    loops,
    news,
    plain_reports,
    plain_runs,
    pools,
    reuse,
    revocations,
    unknown_tasks,
)
from conductor_app.host.gate import SharedGate, Shutdown
from conductor_app.host.hearing import DeafTimes
from conductor_app.host.sweeper_thread import SweeperThread
from conductor_app.models import database
from conductor_app.store import moves, owners
from conductor_app.store.process import Worker, process
from conductor_app.transitions import dispatch

#: How often kombu looks into the memory:// queue, in seconds; its own default is 1.
MEMORY_POLLING_SECONDS = 0.01

#: Celery's default of ``worker_lost_wait``, in seconds.
CELERY_LOST_WAIT_SECONDS = 10.0

#: What asks a worker to end.
ENDING_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")


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
        # What others have told this worker, or it has told itself before its restart: see `unrevoke`.
        revocations.forget_settled()
        for task_id in list(worker_state.revoked):
            revocations.unrevoke(task_id)


class ConductorStep(bootsteps.StartStopStep):
    """The bootstep that starts and stops the sweeper's thread with the worker."""

    requires = ("celery.worker.components:Pool",)
    label = "Conductor"

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        is_solo = worker.pool_cls.__module__.endswith(".solo")
        process.worker.acknowledge_directly = is_solo or dispatch.is_embedded(worker.app)
        self._deaf_times = DeafTimes() if is_solo else None
        if self._deaf_times is not None:
            process.worker.heard_since = self._deaf_times.heard_since
        process.worker.runs_greenlets = worker.pool_cls.is_green
        pools.install(worker.pool_cls)
        process.worker.on_process_end = news.news().process_ended
        # Before the pool forks, so that its processes inherit the texts, and the shared memory.
        moves.prepare(database())
        self.shutdown = Shutdown()
        process.worker.is_draining = self.shutdown.is_requested
        process.worker.gate = SharedGate(worker, self.shutdown)
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
        process.worker.sweeper = self.thread
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
        revocations.forget_settled()  # Celery saves what it remembers (``--statedb``) at the process's end
        if self._is_embedded:
            self._leave()
        self._celerys_on_stopped()

    def _leave(self) -> None:
        """Leave a process that goes on without this worker as it was: what it queues and runs now is no worker's."""
        signals.worker_shutting_down.disconnect(self._on_shutting_down)
        if self._deaf_times is not None:
            self._deaf_times.leave()
        process.worker = Worker()

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
    commands.watch_revokes()
    commands.watch_commands()
    plain_reports.watch_plain_tasks()
    unknown_tasks.watch_unknown_tasks()
