"""Publish the Celery message of a queued execution.

The message is a doorbell: the task's name and the execution's id. It carries no payload and no authority, so losing,
doubling or forging one changes nothing. The execution's own row is the outbox: ``dispatch_at`` says when the sweeper
rings again.

With the ``memory://`` broker nobody publishes here: a message in a web process's memory would reach no worker. Each
worker's feed takes due executions from the database instead (``maintenance.sweeper``).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery import Celery, current_app
from django.db import transaction
from django.db.models.expressions import Combinable

from conductor_app import clock
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database

logger = logging.getLogger(__name__)

#: Header of our own messages. It only tells a doorbell from a message that somebody else published by task name.
HEADER = "conductor"

#: After a failed publish, leave the broker alone for this many seconds; the sweeper catches up.
BREAKER_SECONDS = 5.0
_broker_rests_until = 0.0

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


def first_instant(due: Combinable, *, is_due: bool) -> Combinable:
    """Return when the sweeper is to publish an execution that is being queued now.

    Args:
        due: When it may be claimed.
        is_due: Whether that is now, so that a message follows the commit.
    """
    if is_due and not is_embedded():
        return clock.after(conductor_settings().REDISPATCH_SECONDS)
    return due


def on_commit(execution: Execution) -> None:
    """Publish ``execution`` when the current transaction is committed."""
    if not is_embedded():
        transaction.on_commit(lambda: publish(execution), using=database(), robust=True)


def publish(execution: Execution) -> bool:
    """Publish the message of a queued execution.

    Never raises: the row is stored, and the sweeper publishes it when the broker is back.

    Returns:
        Whether the broker took it.
    """
    global _broker_rests_until  # noqa: PLW0603
    if time.monotonic() < _broker_rests_until:
        return False
    stored = execution.get_options()
    options: dict[str, Any] = {name: stored[name] for name in _MESSAGE_OPTIONS if stored.get(name) is not None}
    options["headers"] = {**options.get("headers", {}), HEADER: "doorbell"}
    if "exchange" not in options and "routing_key" not in options:
        options["queue"] = execution.queue
    if execution.priority is not None:
        options["priority"] = execution.priority
    try:
        current_app.send_task(
            execution.task,
            args=(),
            kwargs={},
            task_id=str(execution.pk),
            root_id=str(execution.root_id),
            parent_id=str(execution.parent_id) if execution.parent_id else None,
            ignore_result=bool(stored.get("ignore_result", True)),
            serializer="json",
            add_to_parent=False,
            retry=False,
            **options,
        )
    except Exception as error:  # noqa: BLE001 - whatever the broker's client raises, the row is safe
        _broker_rests_until = time.monotonic() + BREAKER_SECONDS
        logger.warning(
            "Broker %s did not take the message (%s: %s). The execution %s is saved as queued and will be published "
            "when the broker is back.",
            current_app.connection_for_write().as_uri(),
            type(error).__name__,
            error,
            execution.pk,
            extra={"execution_id": str(execution.pk), "task": execution.task},
        )
        return False
    return True


def reset_breaker() -> None:
    """Forget that the broker failed."""
    global _broker_rests_until  # noqa: PLW0603
    _broker_rests_until = 0.0
