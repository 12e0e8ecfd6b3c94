"""Publish the Celery message of a queued execution.

The message is a doorbell: the task's name and the execution's id. It carries no payload and no authority, so losing,
doubling or forging one changes nothing. The execution's own row is the outbox: ``dispatch_at`` says when the sweeper
rings again.

With the ``memory://`` broker nobody publishes here: a message in a web process's memory would reach no worker. Each
worker's feed takes due executions from the database instead (``maintenance.sweeper``).
"""

from __future__ import annotations

import logging
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from amqp.exceptions import ChannelError
from celery import Celery, current_app
from django.db import transaction
from django.db.models import DateTimeField
from django.db.models.expressions import Combinable, Value
from django.db.models.functions import Least
from kombu.exceptions import EncodeError

from conductor_app import clock
from conductor_app.conf import conductor_settings
from conductor_app.ids import created_at
from conductor_app.models import Execution, database

logger = logging.getLogger(__name__)

_is_inline: ContextVar[bool] = ContextVar("conductor_app_inline", default=False)

#: Header of our own messages. It only tells a doorbell from a message that somebody else published by task name.
HEADER = "conductor"
#: Its values: an ordinary doorbell, and one whose run may leave callbacks to the sweeper.
DOORBELL, DOORBELL_WITH_CALLBACKS = "doorbell", "doorbell, callbacks"

#: After a failed publish, leave the broker alone for this many seconds; the sweeper catches up.
BREAKER_SECONDS = 5.0
_broker_rests_until = 0.0
#: Errors about one message, its queue or its options. The broker is there, and takes others.
_MESSAGE_ERRORS = (ChannelError, EncodeError, TypeError, ValueError, struct.error)

#: Fields of a row that ``publish`` reads.
DOORBELL_FIELDS = ("id", "task", "queue", "priority", "options", "root_id", "parent_id")

#: Options that go into each message of an execution.
_MESSAGE_OPTIONS = ("time_limit", "soft_time_limit", "exchange", "routing_key", "shadow", "headers")


def is_embedded(app: Celery | None = None) -> bool:
    """Tell whether the broker is ``memory://``, so that workers are fed from the database."""
    conf = (app or current_app).conf
    url = conf.broker_write_url or conf.broker_url or ""
    if isinstance(url, (list, tuple)):
        url = url[0] if url else ""
    return str(url).split(":", 1)[0] == "memory"


def is_left_to_sweeper(options: Mapping[str, Any]) -> bool:
    """Tell whether the worker's main process has to send an execution's callbacks.

    With ``memory://``, a message that a pool process sends stays in that process's own memory.
    """
    return is_embedded() and any(options.get(name) for name in ("link", "link_error", "chain", "chord"))


@contextmanager
def inline() -> Iterator[None]:
    """Publish nothing: this process runs what it queues, and other workers are to leave it alone for a while."""
    token = _is_inline.set(True)
    try:
        yield
    finally:
        _is_inline.reset(token)


def first_instant(due: Combinable, *, is_due: bool, root_id: uuid.UUID | None = None) -> Combinable:
    """Return when the sweeper is to publish an execution that is being queued now.

    Args:
        due: When it may be claimed.
        is_due: Whether that is now, so that a message follows the commit.
        root_id: The root of its tree, if it continues one that has begun.
    """
    if not is_due:
        return due
    if not is_embedded() or _is_inline.get():
        return clock.after(conductor_settings().REDISPATCH_SECONDS)
    if root_id is None or root_id.version != 7:
        return due
    # The feed serves the smallest instant first. A tree that has begun goes on before younger ones begin, or a
    # thousand parents would all wait for their first child before any of them got its second.
    return Least(due, Value(created_at(root_id), output_field=DateTimeField()))


def on_commit(execution: Execution) -> None:
    """Publish ``execution`` when the current transaction is committed."""
    if not is_embedded() and not _is_inline.get():
        transaction.on_commit(lambda: publish(execution), using=database(), robust=True)


def publish(execution: Execution) -> bool:
    """Publish the message of a queued execution.

    Never raises: the row is stored, and the sweeper publishes it when the broker is back.

    Returns:
        Whether the broker took it.
    """
    global _broker_rests_until  # noqa: PLW0603
    if is_broker_resting():
        return False
    try:
        _send(execution)
    except Exception as error:  # noqa: BLE001 - whatever the broker's client raises, the row is safe
        if not isinstance(error, _MESSAGE_ERRORS):
            _broker_rests_until = time.monotonic() + BREAKER_SECONDS
        logger.warning(
            "Broker %s did not take the message (%s: %s). The execution %s is saved as queued and will be published "
            "when the broker is back.",
            _broker_uri(),
            type(error).__name__,
            error,
            execution.pk,
            extra={"execution_id": str(execution.pk), "task": execution.task},
        )
        return False
    return True


def _send(execution: Execution) -> None:
    stored = execution.get_options()
    options: dict[str, Any] = {name: stored[name] for name in _MESSAGE_OPTIONS if stored.get(name) is not None}
    kind = DOORBELL_WITH_CALLBACKS if is_left_to_sweeper(stored) else DOORBELL
    options["headers"] = {**options.get("headers", {}), HEADER: kind}
    if stored.get("stamps"):
        options.update(stored["stamps"], stamped_headers=list(stored["stamps"]))
    if "exchange" not in options and "routing_key" not in options:
        options["queue"] = execution.queue
    if execution.priority is not None:
        options["priority"] = execution.priority
    with current_app.producer_or_acquire() as producer:
        # Try each server once. Left to itself, kombu would go on for 6 seconds, and the caller would wait.
        servers = producer.connection.alt
        producer.connection.ensure_connection(max_retries=max(len(servers) - 1, 0))
        current_app.send_task(
            execution.task,
            args=(),
            kwargs={},
            task_id=str(execution.pk),
            root_id=stored.get("root_id") or str(execution.root_id),
            parent_id=str(execution.parent_id) if execution.parent_id else stored.get("parent_id"),
            ignore_result=True,
            serializer="json",
            add_to_parent=False,
            retry=False,
            producer=producer,
            **options,
        )


def _broker_uri() -> str:
    try:
        return str(current_app.connection_for_write().as_uri())
    except Exception:  # noqa: BLE001 - a transport that does not exist, for example
        return "(its URL is not usable)"


def is_broker_resting() -> bool:
    """Tell whether the broker has just failed, so that nothing is published for a while."""
    return time.monotonic() < _broker_rests_until


def reset_breaker() -> None:
    """Forget that the broker failed."""
    global _broker_rests_until  # noqa: PLW0603
    _broker_rests_until = 0.0
