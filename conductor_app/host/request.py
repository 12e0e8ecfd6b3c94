"""The request of a durable task: a delivery, as the worker's main process sees it."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import signals
from celery.exceptions import Ignore
from celery.utils.saferepr import saferepr
from celery.worker import state as worker_state
from celery.worker.request import Request
from celery.worker.strategy import default as default_strategy
from django.db import DatabaseError

from conductor_app.engine.run import RunEnded
from conductor_app.host import durable_runs, ends, news, revocations
from conductor_app.store import owners
from conductor_app.store.ids import of_task_id
from conductor_app.store.process import process
from conductor_app.transitions import dispatch

logger = logging.getLogger("conductor_app.worker")


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
        if process.worker.acknowledge_directly and not self.acknowledged:
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
        revocations.forget_settled()
        task_id = str(self.id)
        if task_id in worker_state.revoked:
            stamps = {}
        elif worker_state.revoked_stamps and task_id not in news.news().spared:
            stamps = cast(Any, self).stamps
            if not revocations.share_a_stamp(stamps, worker_state.revoked_stamps):
                return False
        else:
            return False
        logger.info("%s[%s] was revoked before this message came.", self.name, task_id)
        if dispatch.HEADER not in self.request_dict:
            self._announce_revoked("revoked", False, None, False)
            news.news().revoked(task_id, instead=self._store_revoked)
        elif not stamps:
            self._announce_revoked("revoked", False, None, False)
            news.news().revoked(task_id)
        else:
            # Or it was revoked, and retried since: the database knows when it was created.
            self._ready()
            self.acknowledge()
            self._already_revoked = True
            news.news().revoked(task_id, stamps)
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
            news.news().refused(self.id, error)
            news.news().run_ended()
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
        news.news().run_ended(due_in, seconds=time.time() - self.time_start if self.time_start else None)

    def _report_followers(self, runtime: object) -> None:
        """Pass on what the process says of the runs that followed this one there."""
        if not isinstance(runtime, durable_runs.Runtime):
            return
        if runtime.due_at is not None:
            news.news().run_ended(max(runtime.due_at - time.time(), 0.0))
        request: Any = self
        if request._eventer and request._eventer.enabled and self.task.send_events:
            for kind, fields in runtime.events:
                request._eventer.send(kind, **fields)

    def _report_death(self) -> None:
        # The end of the process is reported for itself, with what it was running by then.
        pid = os.getpid() if process.worker.runs_greenlets else self.worker_pid
        if pid is not None and self._is_running_in(int(pid)):
            news.news().process_died(str(self.id), owners.lease_owner(self.hostname, int(pid)))
        news.news().run_ended()

    def _is_running_in(self, pid: int) -> bool:
        """Tell whether the process has not gone on with another execution."""
        return process.worker.gate.running_in(pid) in (None, of_task_id(self.id))


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
            news.news().refused((message.headers or {}).get("id"), error)
            message.reject_log_error(logger, consumer.connection_errors)
            return None

    return task_message_handler
