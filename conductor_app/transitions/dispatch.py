"""Publish the Celery message of a queued execution.

A durable task's message is a doorbell: the task's name and the execution's id. It carries no payload and no authority,
so losing, doubling or forging one changes nothing. The execution's own row is the outbox: ``dispatch_at`` says when the
sweeper rings again. A plain task's message is the one that Celery itself would publish, with the execution's id;
``plain_runs`` makes a copy of it as harmless as a doorbell's.

With the ``memory://`` broker nobody publishes here: a message in a web process's memory would reach no worker. Each
worker's feed takes due executions from the database instead (``maintenance.sweeper``).
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import ChannelError
from celery import Celery, current_app
from celery._state import _task_stack  # type: ignore[attr-defined]  # its stubs do not know it
from celery.app.task import Context
from django.db import transaction
from django.db.models import DateTimeField
from django.db.models.expressions import Combinable, Value
from django.db.models.functions import Least
from kombu.exceptions import EncodeError, SerializerNotInstalled
from kombu.pools import producers
from kombu.utils.url import maybe_sanitize_url

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import NewerFormat
from conductor_app.models import Execution, database
from conductor_app.store import clock, eager, forks, observing
from conductor_app.store.ids import created_at
from conductor_app.values.arguments import MESSAGE_OPTIONS, PLAIN_OPTIONS
from conductor_app.values.serialization import loads

logger = logging.getLogger(__name__)

_is_inline: ContextVar[bool] = ContextVar("conductor_app_inline", default=False)
#: How many blocks of ``inline(everywhere=True)`` this process is in.
_inline_everywhere = 0

#: Header of our own messages. It only tells a doorbell from a message that somebody else published by task name.
HEADER = "conductor"
#: Its values: an ordinary doorbell, one whose run may leave callbacks to the sweeper, and a plain task's message.
DOORBELL, DOORBELL_WITH_CALLBACKS, PLAIN = "doorbell", "doorbell, callbacks", "plain"

#: After a failed publish, leave the broker alone for this many seconds; the sweeper catches up.
BREAKER_SECONDS = 5.0
#: Of executions that one commit queues, each thousand more is given another ``REDISPATCH_SECONDS`` to be started.
REDISPATCH_CROWD = 1_000
#: How long RabbitMQ may take to confirm a message, in seconds; without a limit, the caller and the sweeper would wait
#: for a server that has silently gone as long as TCP does. Redis has ``socket_timeout`` for that.
PUBLISH_SECONDS = 5.0
#: A server that says nothing for so many seconds is not asked again: the caller has waited long enough.
SILENCE_SECONDS = 3.0
#: A connection to RabbitMQ that was not used for so many seconds is asked whether it lives, and has so many to answer.
IDLE_SECONDS, PROBE_SECONDS = 15.0, 1.0
_broker_rests_until = 0.0
#: Errors about one message, its queue or its options. The broker is there, and takes others.
_MESSAGE_ERRORS = (
    *(ChannelError, EncodeError, SerializerNotInstalled, NewerFormat),
    *(LookupError, TypeError, ValueError, struct.error),
)

#: Fields of a row that ``publish`` reads.
DOORBELL_FIELDS = ("id", "task", "queue", "priority", "options", "root_id", "parent_id", "attempt")


#: What a worker's broker was when it began: it stays that, and Celery takes long to look it up.
_is_embedded: bool | None = None
#: Whether this is a worker whose broker confirms messages: its runs do not wait for that.
_runs_ahead = False


def settle_broker(app: Celery) -> None:
    """Note the broker of this worker, and of the processes that it forks."""
    global _is_embedded, _runs_ahead  # noqa: PLW0603
    _is_embedded = is_embedded(app)
    _runs_ahead = bool(app.conf.broker_transport_options.get("confirm_publish"))


def forget_broker() -> None:
    """Look the broker up again from now on: the worker has ended, and its process has not."""
    global _is_embedded, _runs_ahead
    _is_embedded, _runs_ahead = None, False


def is_embedded(app: Celery | None = None) -> bool:
    """Tell whether the broker is ``memory://``, so that workers are fed from the database."""
    if app is None and _is_embedded is not None:
        return _is_embedded
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
    global _inline_everywhere  # noqa: PLW0603
    token = _is_inline.set(True)
    _inline_everywhere += everywhere
    try:
        yield
    finally:
        _inline_everywhere -= everywhere
        _is_inline.reset(token)


def is_inline(root_id: uuid.UUID | None = None) -> bool:
    """Tell whether nothing is to be published now of a tree, or at all.

    Args:
        root_id: The tree's root, if that is known.
    """
    return _inline_everywhere > 0 or _is_inline.get() or eager.runs(root_id)


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


def on_commit(*executions: Execution) -> None:
    """Publish ``executions`` when the current transaction is committed."""
    told = [execution for execution in executions if not is_inline(execution.root_id)]
    if told and not is_embedded():
        transaction.on_commit(lambda: publish_all(told), using=database(), robust=True)


def publish_all(executions: Iterable[Execution]) -> None:
    """Publish the messages of queued executions on one connection, until the broker refuses; the sweeper does the rest.

    Never raises, as ``publish``.
    """
    for execution in executions:
        is_published = publish(execution, waits=False) if _runs_ahead else publish(execution)
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
    global _broker_rests_until  # noqa: PLW0603
    if is_broker_resting():
        return False
    forks.own()
    try:
        with observing.acting_for(execution):
            if waits:
                _send(execution)
            else:
                _send_ahead(execution)
    except Exception as error:  # noqa: BLE001 - whatever the broker's client raises, the row is safe
        if not isinstance(error, _MESSAGE_ERRORS):
            _broker_rests_until = time.monotonic() + BREAKER_SECONDS
        logger.warning(
            "Broker %s did not take the message (%s: %s). The execution %s is saved as queued and will be published "
            "when the broker is back.",
            getattr(error, "conductor_tried", None) or _broker_uri(),
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


class _AsStored:
    """In the place of Celery's router: a message goes where the call's arguments and routes sent its execution.

    A route may look at arguments, which a doorbell does not carry.
    """

    @staticmethod
    def route(options: dict[str, Any], *_task: object) -> dict[str, Any]:
        """Return the options of a message with its queue as Celery declares it."""
        return current_app.amqp.router.expand_destination(options)


def _send(execution: Execution) -> None:
    _send_by(current_app.producer_or_acquire, execution)


def _send_ahead(execution: Execution) -> None:
    app: Any = current_app
    pool = _unconfirmed(app._get_current_object(), os.getpid())
    _send_by(functools.partial(pool.acquire, block=True), execution)


def _send_by(acquire: Callable[[], AbstractContextManager[Any]], execution: Execution) -> None:
    """Send a message; once more on a new connection, if the one that was kept from an earlier message has died.

    RabbitMQ, or something between, closes connections that are idle for long. A message that is sent twice is harmless.
    """
    options = options_of(execution)
    began = time.monotonic()
    for is_second in (False, True):
        with acquire() as producer:
            connection = producer.connection
            is_kept = not is_second and _is_alive(connection)
            if not is_kept:
                _connect(connection)
            try:
                _send_with(producer, execution, options)
            except _MESSAGE_ERRORS as error:
                _name_broker(error, connection.as_uri())
                raise
            except Exception as error:
                # Without saying goodbye: it would wait for an answer without limit. And not to be used again: a
                # confirmation that comes late would be taken for the next message's.
                connection.collect()
                _name_broker(error, connection.as_uri())
                if not is_kept or time.monotonic() - began >= SILENCE_SECONDS:
                    raise
                logger.debug("The connection to broker %s has died (%s). Trying a new one.", connection.as_uri(), error)
            else:
                connection._conductor_used_at = time.monotonic()
                return


@functools.lru_cache(maxsize=4)
def _unconfirmed(app: Celery, pid: int) -> Any:
    """Return a pool of producers, apart from the app's own, that wait for no confirmation."""
    del pid  # kombu forgets its pools in a forked process
    return producers[app.connection_for_write(transport_options={"confirm_publish": False})]


def _is_alive(connection: Any) -> bool:
    """Tell whether a connection is open, and after a pause, whether RabbitMQ still answers on it.

    A load balancer or a firewall that forgets an idle connection tells nobody, and what is written to it vanishes.
    Heartbeats are no help: nobody attends to them in a process that only publishes. redis-py has
    ``health_check_interval`` for that.
    """
    if not connection.connected:
        return False
    used_at = getattr(connection, "_conductor_used_at", None)
    if connection.transport.driver_type != "amqp" or used_at is None or time.monotonic() - used_at < IDLE_SECONDS:
        return True
    try:
        with connection.connection.transport.having_timeout(PROBE_SECONDS):
            connection.default_channel.basic_qos(0, 0, False)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, a new one will do
        return False
    return True


def _connect(connection: Any) -> None:
    """Connect anew, trying each server once. Left to itself, kombu would go on for 6 seconds, and the caller wait."""
    if connection._connection is not None:
        connection.collect()
    try:
        connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0))
    except Exception as error:
        _name_broker(error, *map(maybe_sanitize_url, connection.alt or ()))
        raise


def _name_broker(error: Any, *tried: str) -> None:
    """Note on an error which servers it is about; by default the only one."""
    with suppress(AttributeError):
        error.conductor_tried = " and ".join(tried)


def _send_with(producer: Any, execution: Execution, options: dict[str, Any]) -> None:
    if producer.connection.transport.driver_type == "amqp":
        options["timeout"] = PUBLISH_SECONDS
    with nullcontext() if options["parent_id"] else _unrelated():
        current_app.send_task(
            execution.task,
            task_id=str(execution.pk),
            add_to_parent=False,
            retry=False,
            producer=producer,
            **{"serializer": "json", "router": _AsStored, **options},
        )


class _Unrelated:
    """Stands for the task that is at work here while a message is sent that it is not the parent of."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.request = Context(called_directly=False, delivery_info={})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


@contextmanager
def _unrelated() -> Iterator[None]:
    """Keep ``Celery.send_task`` from taking a parent, and that one's priority, from the current task.

    A run publishes what it has made runnable: with the end of a child its parent, which may be a root.
    """
    task = current_app.current_worker_task
    if task is None:
        yield
        return
    _task_stack.push(_Unrelated(task))
    try:
        yield
    finally:
        _task_stack.pop()


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
