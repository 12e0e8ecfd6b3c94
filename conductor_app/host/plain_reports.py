"""What Celery's main process says of plain children."""

from __future__ import annotations

import uuid
from typing import Any

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals
from celery.worker import state as worker_state

from conductor_app.exceptions import Failure, class_path
from conductor_app.host import ends, news, plain_runs, revocations
from conductor_app.host.news import PlainReport
from conductor_app.store.ids import as_child_id
from conductor_app.store.process import process
from conductor_app.transitions import dispatch


def watch_plain_tasks() -> None:
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
    is_main = process.worker.sweeper is not None and not ends.is_telling()
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
    news.news().reported(PlainReport(child, failure=failure))


def _on_main_retry(request: Any = None, **_kwargs: Any) -> None:
    """``retry_on_worker_lost``, and the end of a soft shutdown: the process is dead, or is being killed."""
    child = _reported_child(getattr(request, "id", None))
    if child is not None:
        news.news().reported(PlainReport(child))


def _on_main_revoked(request: Any = None, terminated: bool = False, expired: bool = False, **_kwargs: Any) -> None:
    child = _reported_child(getattr(request, "id", None))
    if child is None:
        return
    # An id that this worker has learned from another one, or from its own past, is no news: whoever revoked it has
    # cancelled the execution, and if that is queued now, an operator's retry has undone it.
    is_old = str(child) in worker_state.revoked and not terminated and not expired
    if not is_old:
        ends.celery_told(child)
        news.news().revoked(str(child))
    revocations.unrevoke(str(child))
    if terminated:
        news.news().reported(PlainReport(child))


def _on_unknown(id: Any = None, message: Any = None, **_kwargs: Any) -> None:  # noqa: A002 - the signal's name for it
    child = _reported_child(id)
    headers = getattr(message, "headers", None) or {}
    if child is not None and headers.get(dispatch.HEADER) == dispatch.PLAIN:
        retries = headers.get("retries")
        news.news().reported(PlainReport(child, unknown_attempt=(retries if isinstance(retries, int) else 0) + 1))
