"""A correlation id in the headers, as django-guid and its like add it: ``--include=tests.app.correlated``."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import Any

from celery import shared_task, signals

from conductor_app import ExecutionContext, durable_task
from conductor_app.store.ids import of_task_id
from tests.app.ledger import note

#: The id of the request or the run that is at work.
correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")


def add_header(headers: dict[str, Any], **_kwargs: Any) -> None:
    """Receiver of ``before_task_publish``."""
    headers["X-Correlation-ID"] = correlation_id.get() or f"none in {os.getpid()}"


def begin(task_id: str, task: Any, **_kwargs: Any) -> None:
    """Receiver of ``task_prerun``."""
    if task.name.startswith(f"{__name__}."):
        found = task.request.headers.get("X-Correlation-ID")
        correlation_id.set(found)
        note(of_task_id(task_id), f"prerun {task.name.rpartition('.')[2]}", found)


def end(**_kwargs: Any) -> None:
    """Receiver of ``task_postrun``."""
    correlation_id.set("")


def connect() -> None:
    signals.before_task_publish.connect(add_header)
    signals.task_prerun.connect(begin)
    signals.task_postrun.connect(end)


def disconnect() -> None:
    signals.before_task_publish.disconnect(add_header)
    signals.task_prerun.disconnect(begin)
    signals.task_postrun.disconnect(end)


@durable_task(max_retries=1, default_retry_delay=1, retry_backoff=False)
def fails_once(ctx: ExecutionContext) -> Any:
    note(ctx, "body fails_once", ctx.task.request.headers["X-Correlation-ID"])
    if ctx.attempt == 1:
        raise ValueError("again")
    return ctx.invoke("below", echo)


@durable_task
def echo(ctx: ExecutionContext) -> Any:
    return ctx.task.request.headers["X-Correlation-ID"]


@shared_task(bind=True, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=1)
def plain(self: Any) -> Any:
    if self.request.retries == 0:
        raise ValueError("again")
    return self.request.headers["X-Correlation-ID"]


@durable_task
def parent(ctx: ExecutionContext) -> Any:
    """Return the id as each child saw it."""
    seen = [ctx.invoke("retried", fails_once), *ctx.map("each", echo, [None, None])]
    seen.append(ctx.invoke("plain", plain))
    seen += ctx.gather(ctx.start("started", echo))
    ctx.sleep("nap", 1)
    return [*seen, ctx.task.request.headers["X-Correlation-ID"]]


if os.environ.get("CONDUCTOR_TEST_CORRELATED"):
    connect()
