"""Publish the Celery message of a queued execution.

A durable task's message is a doorbell: the task's name and the execution's id. It carries no payload and no authority,
so losing, doubling or forging one changes nothing. The execution's own row is the outbox: ``dispatch_at`` says when the
sweeper rings again. A plain task's message is the one that Celery itself would publish, with the execution's id;
``plain_runs`` makes a copy of it as harmless as a doorbell's.

With the ``memory://`` broker nobody publishes here: a message in a web process's memory would reach no worker. Each
worker's feed takes due executions from the database instead (``engine.sweeper``).
"""

from __future__ import annotations

import datetime as dt
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from celery import Celery, current_app
from django.db import transaction
from django.db.models import DateTimeField
from django.db.models.expressions import Combinable, Value
from django.db.models.functions import Least

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.store import clock, eager, forks, observing
from conductor_app.store.ids import created_at
from conductor_app.store.process import process
from conductor_app.values.arguments import MESSAGE_OPTIONS, PLAIN_OPTIONS
from conductor_app.values.payloads import loads

logger = logging.getLogger(__name__)

_is_inline: ContextVar[bool] = ContextVar("conductor_app_inline", default=False)

#: Header of our own messages. It only tells a doorbell from a message that somebody else published by task name.
HEADER = "conductor"
#: Its values: an ordinary doorbell, one whose run may leave callbacks to the sweeper, and a plain task's message.
DOORBELL, DOORBELL_WITH_CALLBACKS, PLAIN = "doorbell", "doorbell, callbacks", "plain"

#: After a failed publish, leave the broker alone for this many seconds; the sweeper catches up.
BREAKER_SECONDS = 5.0
#: Of executions that one commit queues, each thousand more is given another ``REDISPATCH_SECONDS`` to be started.
REDISPATCH_CROWD = 1_000

#: Fields of a row that ``publish`` reads.
DOORBELL_FIELDS = ("id", "task", "queue", "priority", "options", "root_id", "parent_id", "attempt", "held_at")


def settle_broker(app: Celery) -> None:
    """Note the broker of this worker, and of the processes that it forks."""
    process.worker.is_embedded = is_embedded(app)
    process.worker.runs_ahead = bool(app.conf.broker_transport_options.get("confirm_publish"))


def is_embedded(app: Celery | None = None) -> bool:
    """Tell whether the broker is ``memory://``, so that workers are fed from the database."""
    if app is None and process.worker.is_embedded is not None:
        return process.worker.is_embedded
    conf = (app or current_app).conf
    url = conf.broker_write_url or conf.broker_url or ""
    if isinstance(url, (list, tuple)):
        url = url[0] if url else ""
    return str(url).split(":", 1)[0] == "memory"


def is_left_to_sweeper(options: Mapping[str, Any]) -> bool:
    """Tell whether the worker's main process has to send an execution's callbacks.

    With ``memory://``, a message that a pool process sends stays in that process's own memory.
    """
    return any(options.get(name) for name in ("link", "link_error", "chain", "chord")) and is_embedded()


@contextmanager
def inline(*, everywhere: bool = False) -> Iterator[None]:
    """Publish nothing: this process runs what it queues, and other workers are to leave it alone for a while.

    Args:
        everywhere: In all threads of this process, such as that of a live test server; else in this one.
    """
    token = _is_inline.set(True)
    process.inline_everywhere += everywhere
    try:
        yield
    finally:
        process.inline_everywhere -= everywhere
        _is_inline.reset(token)


def is_inline(root_id: uuid.UUID | None = None) -> bool:
    """Tell whether nothing is to be published now of a tree, or at all.

    Args:
        root_id: The tree's root, if that is known.
    """
    return process.inline_everywhere > 0 or _is_inline.get() or eager.runs(root_id)


def first_instant(due: Combinable, *, is_due: bool, root_id: uuid.UUID | None = None, ahead: int = 0) -> Combinable:
    """Return when the sweeper is to publish an execution that is being queued now.

    Args:
        due: When it may be claimed.
        is_due: Whether that is now, so that a message follows the commit.
        root_id: The root of its tree, if it continues one that has begun.
        ahead: How many the same commit queues before it. Its message is behind theirs, and is not to be taken for lost
            while they are worked off: the copies took as long as the work (measured with 10,000 children of a map).
    """
    if not is_due:
        return due
    first = first_publication(root_id, ahead)
    if first.by is not None:
        return Least(due, Value(first.by, output_field=DateTimeField()))
    return clock.after(first.seconds) if first.seconds else due


@dataclass(frozen=True)
class FirstPublication:
    """When the sweeper is to publish an execution that is queued and due now: at the earlier of two instants."""

    #: So long after now.
    seconds: float
    #: That instant, if there is one.
    by: dt.datetime | None = None


def first_publication(root_id: uuid.UUID | None, ahead: int = 0) -> FirstPublication:
    """Return when the sweeper is to publish an execution that is queued and due now; see ``first_instant``."""
    if not is_embedded() or is_inline(root_id):
        return FirstPublication(conductor_settings().REDISPATCH_SECONDS * (1 + ahead / REDISPATCH_CROWD))
    # The feed serves the smallest instant first. A tree that has begun goes on before younger ones begin, or a
    # thousand parents would all wait for their first child before any of them got its second.
    if root_id is None or root_id.version != 7:
        return FirstPublication(0)
    return FirstPublication(0, by=created_at(root_id))


def on_commit(*executions: Execution, confirmed_together: int = 1) -> None:
    """Publish ``executions`` when the current transaction is committed, except for those that somebody holds.

    See ``publish_all``.
    """
    # Not of one that is being created: that has not read the column.
    on_hold = [vars(execution).get("held_at") is not None for execution in executions]
    told = [
        execution
        for execution, is_held in zip(executions, on_hold, strict=True)
        if not is_held and not is_inline(execution.root_id)
    ]
    if told and not is_embedded():
        transaction.on_commit(lambda: publish_all(told, confirmed_together), using=database(), robust=True)


def publish_all(executions: Sequence[Execution], confirmed_together: int = 1) -> None:
    """Publish the messages of queued executions on one connection, until the broker refuses; the sweeper does the rest.

    Never raises, as ``publish``.

    Args:
        confirmed_together: Whoever waits for confirmations does so once for so many messages, with the last of them.
    """
    for number, execution in enumerate(executions, 1):
        is_last = number % confirmed_together == 0 or number == len(executions)
        is_published = publish(execution, waits=is_last and not process.worker.runs_ahead)
        if not is_published and is_broker_resting():
            return


def publish(execution: Execution, *, waits: bool = True) -> bool:
    """Publish the message of a queued execution.

    Never raises: the row is stored, and the sweeper publishes it when the broker is back.

    Args:
        waits: Whether to wait for the confirmation of a RabbitMQ that sends some. Runs do not: it takes as long as a
            short run, and whether the message was taken or not, the row is the sweeper's until the execution begins.

    Returns:
        Whether the broker took it, as far as is known by then.
    """
    if is_broker_resting():
        return False
    forks.own()
    broker = process.broker
    assert broker is not None, "conductor_app is not ready: django.setup() makes it so"
    try:
        with observing.acting_for(execution):
            broker.send(execution, waits=waits)
    except Exception as error:  # noqa: BLE001 - whatever the broker's client raises, the row is safe
        if not broker.is_about_message(error):
            process.broker_rests_until = time.monotonic() + BREAKER_SECONDS
        logger.warning(
            "Broker %s did not take the message (%s: %s). The execution %s is saved as queued and will be published "
            "when the broker is back.",
            broker.tried(error),
            type(error).__name__,
            error,
            execution.pk,
            extra={"execution_id": str(execution.pk), "task": execution.task},
        )
        return False
    return True


def message_of(execution: Execution) -> dict[str, Any]:
    """Return the options of an execution's message, as ``Celery.send_task`` takes them, except for its routing."""
    stored = execution.get_options()
    is_plain = "plain" in stored
    args, kwargs = loads(execution.payload) if is_plain else ((), {})
    options: dict[str, Any] = {
        name: stored[name] for name in (*MESSAGE_OPTIONS, "headers") if stored.get(name) is not None
    }
    kind = DOORBELL_WITH_CALLBACKS if is_left_to_sweeper(stored) else DOORBELL
    options["headers"] = {**options.get("headers", {}), HEADER: PLAIN if is_plain else kind}
    if is_plain:
        options.update({name: stored[name] for name in PLAIN_OPTIONS if name in stored}, retries=execution.attempt - 1)
        # As a header alone: as an option it would make this process listen for the result, on some result backends.
        options["headers"]["ignore_result"] = stored["ignore_result"]
    if stored.get("stamps"):
        options.update(stored["stamps"], stamped_headers=list(stored["stamps"]))
    options.update(
        args=args,
        kwargs=kwargs,
        root_id=stored.get("root_id") or str(execution.root_id),
        parent_id=str(execution.parent_id) if execution.parent_id else stored.get("parent_id"),
        ignore_result=True,
    )
    return options


def options_of(execution: Execution) -> dict[str, Any]:
    """Return the options of an execution's message, as ``Celery.send_task`` takes them."""
    options = message_of(execution)
    if is_embedded():
        # This process's own queue, which nobody has bound to an exchange.
        for name in ("exchange", "routing_key"):
            options.pop(name, None)
    if not (options.get("exchange") and options.get("routing_key")):
        options["queue"] = execution.queue
    if execution.priority is not None:
        options["priority"] = execution.priority
    return options


def is_broker_resting() -> bool:
    """Tell whether the broker has just failed, so that nothing is published for a while."""
    return time.monotonic() < process.broker_rests_until


def reset_breaker() -> None:
    """Forget that the broker failed."""
    process.broker_rests_until = 0.0
