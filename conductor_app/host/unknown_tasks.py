"""Messages about tasks that this worker does not know."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

from celery import signals
from celery.exceptions import NotRegistered
from celery.worker.consumer import Consumer
from django.db import DatabaseError

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import CancelExecution, Failure, class_path
from conductor_app.host import news
from conductor_app.host.news import PlainReport, UnknownMessage
from conductor_app.models import database
from conductor_app.store import owners
from conductor_app.store.ids import of_task_id
from conductor_app.store.transactions import persist_briefly
from conductor_app.transitions import dispatch

logger = logging.getLogger("conductor_app.worker")

#: Longest pause before a worker is asked again for a task that it did not know, in seconds.
UNKNOWN_SECONDS = 3_600.0


def watch_unknown_tasks() -> None:
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
            news.news().got_unknown(UnknownMessage(of_task_id(task_id), str(name)))
        return signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    on_unknown_task.is_conductor = True  # type: ignore[attr-defined]
    cast(Any, Consumer).on_unknown_task = on_unknown_task


def put_off_unknown(unknown: UnknownMessage, hostname: str) -> None:
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
    news.news().run_ended(delay)


def retry_unknown(report: PlainReport, hostname: str) -> None:
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
