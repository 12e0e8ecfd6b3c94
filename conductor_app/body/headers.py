"""The headers that an execution keeps: those of its caller, and those of receivers of Celery's ``before_task_publish``.

Such receivers add what belongs to the place of the call: correlation ids, a tenant. Most messages of an execution are
published elsewhere, by the sweeper or in another run, and many executions have none. So the receivers are asked once,
where the execution is created, and what they leave is stored with it; each run sees that, whatever a message brings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from typing import Any

from celery import current_app, signals
from celery.app.task import Context
from celery.utils.functional import maybe_list

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import PayloadTooLarge
from conductor_app.models import Execution
from conductor_app.store.soft_limits import uninterrupted
from conductor_app.transitions import NewExecution, dispatch
from conductor_app.values.payloads import dump_options, loads

logger = logging.getLogger(__name__)

#: What Celery and brokers add to a message's headers. RabbitMQ drops a message that comes back with its x-death.
_FOREIGN = frozenset({*vars(Context), "argsrepr", "compression", "kwargsrepr", "lang", "task", dispatch.HEADER})
_FOREIGN_PREFIXES = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")
#: Options of ``Celery.send_task`` that go on to ``send_task_message``.
_SENT_OPTIONS = (
    *("exchange", "exchange_type", "routing_key", "queue", "priority"),
    *("serializer", "compression", "delivery_mode", "headers"),
)


def added(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those of a message's headers that its publisher has added."""
    return {name: value for name, value in (headers or {}).items() if not _is_foreign(name)}


def kept_by(execution: Execution) -> dict[str, Any]:
    """Return the headers that an execution keeps, without those that speak of one message alone."""
    # Most keep none, and their options need not be read.
    return added(execution.get_options().get("headers")) if '"headers"' in execution.options else {}


def collect(new: NewExecution, parent: Execution | None = None) -> NewExecution:
    """Return an execution that is about to be stored, with all the headers that it is to keep.

    Those of its call win over what the receivers of ``before_task_publish`` leave, and that over its parent's.

    Args:
        new: It has the headers of its call.
        parent: Its parent.
    """
    signal: Any = signals.before_task_publish
    is_asked = bool(signal.receivers) and signal.has_listeners(new.task)
    found = {} if parent is None else kept_by(parent)
    if not found and not is_asked:
        return new
    options = loads(new.options) or {}
    given = options.get("headers") or {}
    if is_asked:
        seen = {**options, "headers": {**found, **given}}
        left = _ask_receivers(replace(new, options=dump_options(seen)), parent)
        found = found if left is None else _storable(new.task, left)
    headers = {**found, **given}
    return replace(new, options=dump_options({**options, "headers": headers})) if headers else new


def _is_foreign(name: Any) -> bool:
    return name in _FOREIGN or (isinstance(name, str) and name.startswith(_FOREIGN_PREFIXES))


def _ask_receivers(new: NewExecution, parent: Execution | None) -> dict[str, Any] | None:
    """Return the headers that the receivers leave; ``None`` if there is no message to show to them."""
    row = Execution(
        id=new.id,
        task=new.task,
        queue=new.queue,
        priority=new.priority,
        payload=new.payload,
        options=new.options,
        parent_id=None if parent is None else parent.pk,
        root_id=new.id if parent is None else parent.root_id,
    )
    with uninterrupted():  # Celery would swallow a soft time limit that is raised in a receiver
        try:
            # What they make current is for the time of a publish, and tracers end it in after_task_publish.
            return copy_context().run(_show_message, row)
        except Exception:
            logger.exception("Receivers of before_task_publish cannot be asked for the headers of %s.", new.task)
            return None


def _show_message(row: Execution) -> dict[str, Any]:
    """Call the receivers as Celery does when it publishes an execution's message; but its body has the arguments."""
    app: Any = current_app
    published = {"serializer": "json", **dispatch.options_of(row)}
    options = app.amqp.router.route(published, row.task, published["args"], published["kwargs"])
    callbacks = {"callbacks": maybe_list(options.get("link")), "errbacks": maybe_list(options.get("link_error"))}
    message = app.amqp.as_task_v2(str(row.pk), row.task, reply_to=app.thread_oid, **callbacks, **options)
    args, kwargs = loads(row.payload)
    message = message._replace(body=(args, kwargs, message.body[2]))
    sent = {name: options[name] for name in _SENT_OPTIONS if name in options}
    with suppress(_NotPublishedError):
        app.amqp.send_task_message(_NoProducer(row.task), row.task, message, **sent)
    return dict(message.headers)


class _NotPublishedError(Exception):
    """The receivers have been called, and that was all."""


class _NoProducer:
    """Stands where Celery has a producer. The receivers of ``before_task_publish`` are called before it is used."""

    def __init__(self, task: str) -> None:
        self._task = task

    def publish(self, body: Any, *, exchange: Any, routing_key: Any, headers: Any, **_options: Any) -> None:
        """Publish nothing.

        What has begun something in ``before_task_publish``, such as a tracer its span, ends it in
        ``after_task_publish``, or keeps it for ever. So receivers of that are called which stand in the same module;
        nobody else is told of a message that there is not.
        """
        before: Any = signals.before_task_publish
        after: Any = signals.after_task_publish
        modules = {getattr(receiver, "__module__", None) for receiver in before._live_receivers(self._task)} - {None}
        sent = {"body": body, "headers": headers, "exchange": exchange, "routing_key": routing_key}
        for receiver in after._live_receivers(self._task) if after.receivers else ():
            if getattr(receiver, "__module__", None) in modules:
                try:
                    receiver(signal=after, sender=self._task, **sent)
                except Exception:
                    logger.exception("Signal handler %r raised.", receiver)
        raise _NotPublishedError


def _storable(task: str, left: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those of the headers that receivers have left that can be stored, without Celery's own."""
    kept: dict[str, Any] = {}
    limit = conductor_settings().MAX_PAYLOAD_BYTES
    for name, value in left.items():
        if _is_foreign(name):
            continue
        try:
            if not isinstance(name, str):
                raise TypeError(f"its name is of type {type(name).__name__}, not str")
            text = dump_options({name: value})
            if len(text) > limit:
                raise PayloadTooLarge(f"it has {len(text)} bytes, and {limit} are the limit")
            kept.update(loads(text))
        except Exception as error:  # noqa: BLE001 - whatever a receiver has put there
            logger.warning(
                "Header %r of %s, left by a receiver of before_task_publish, cannot be stored and is left out: %s",
                name,
                task,
                error,
                extra={"task": task},
            )
    return kept
