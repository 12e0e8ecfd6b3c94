"""Tell receivers of Celery's signals of ends that no run has brought about.

A deadline that passes, a cancel, a worker that dies for the last time: what follows is decided in the database, and
Celery's tracer, which sends ``task_failure``, has no part in it. Whoever counts tasks by Celery's signals would have
such an execution started, or pending, for ever.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import current_app
from celery import signals as celery_signals

from conductor_app.engine import announcements, outcomes
from conductor_app.engine.run import current_run
from conductor_app.host import plain_runs
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store.ids import of_task_id
from conductor_app.store.process import process
from conductor_app.transitions import EXPIRED

logger = logging.getLogger("conductor_app.worker")

#: Receivers that take longer are told of: the sweeper, or a run, waits for them.
SLOW_SECONDS = 1.0
#: For so many seconds it is remembered that Celery has sent a signal itself: the database hears of it soon after.
_REMEMBERED_SECONDS = 600.0
_is_telling: ContextVar[bool] = ContextVar("conductor_app_telling", default=False)


def tell(execution: Execution, status: str, **_kwargs: Any) -> None:
    """Send Celery's ``task_revoked`` or ``task_failure``; receiver of ``signals.execution_finished``.

    It comes in the process that made the change, as our own signals do, and not from one that died before it could.
    """
    name, send = _SENDERS.get(status, ("", None))
    if send is None or not _is_heard(getattr(celery_signals, name)) or _celery_tells(execution, status):
        return
    task = current_app.tasks.get(execution.task)
    row = Execution.objects.using(database()).filter(pk=execution.pk, status=status).first()
    if task is None or row is None:
        return
    token = _is_telling.set(True)
    started = time.monotonic()
    try:
        send(task, row)
    finally:
        _is_telling.reset(token)
    took = time.monotonic() - started
    if took >= SLOW_SECONDS:
        logger.warning("Receivers of Celery's %s took %.1f s; what ended the execution waits for them.", name, took)


def is_telling() -> bool:
    """Tell whether what a receiver of Celery's signals hears comes from here."""
    return _is_telling.get()


def celery_told(task_id: object) -> None:
    """Note that Celery itself has just sent a signal of an execution's end, for which the database waits."""
    now = time.monotonic()
    for known, noted_at in list(process.told_by_celery.items()):
        if now - noted_at > _REMEMBERED_SECONDS:
            process.told_by_celery.pop(known, None)
    process.told_by_celery[of_task_id(task_id)] = now


def _celery_tells(execution: Execution, status: str) -> bool:
    """Tell whether Celery has sent a signal of this end, or is about to."""
    if process.told_by_celery.pop(execution.pk, None) is not None or plain_runs.is_running(str(execution.pk)):
        return True
    run = current_run.get()
    is_its_own = run is not None and run.execution.pk == execution.pk
    # Of a body that its cancellation has ended, Celery's tracer says nothing.
    return is_its_own and status == ExecutionStatus.FAILED


def _is_heard(signal: Any) -> bool:
    """Tell whether anybody but the engine receives a signal of Celery's."""
    found = (
        receiver() if isinstance(receiver, weakref.ReferenceType) else receiver for _key, receiver in signal.receivers
    )
    return any(receiver is not None and not _is_ours(receiver) for receiver in found)


def _is_ours(receiver: Any) -> bool:
    return str(getattr(receiver, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _send_revoked(task: Any, execution: Execution) -> None:
    request: Any = announcements.request_of(execution)
    request.update(args=execution.args, kwargs=execution.kwargs)
    celery_signals.task_revoked.send(
        sender=task, request=request, terminated=False, signum=None, expired=execution.cancel_reason == EXPIRED
    )


def _send_failure(task: Any, execution: Execution) -> None:
    error: Any = outcomes.outcome_of(execution).error
    try:
        raise error  # Celery's details of an exception are those of one that was raised
    except type(error):
        info = ExceptionInfo()
    celery_signals.task_failure.send(
        sender=task,
        task_id=announcements.celery_id(execution),
        exception=error,
        args=execution.args,
        kwargs=execution.kwargs,
        traceback=error.__traceback__,
        einfo=info,
    )


#: By the status: the signal's name, and what sends it.
_SENDERS: dict[str, tuple[str, Callable[[Any, Execution], None]]] = {
    ExecutionStatus.CANCELLED: ("task_revoked", _send_revoked),
    ExecutionStatus.FAILED: ("task_failure", _send_failure),
}
