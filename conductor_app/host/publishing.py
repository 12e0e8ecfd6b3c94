"""How the message of a queued execution gets to the broker: on which connection, and what is done when that has died.

What the message says, and when one is published, ``transitions.dispatch`` knows.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from amqp.exceptions import ChannelError
from celery import Celery, current_app
from celery._state import _task_stack  # type: ignore[attr-defined]  # its stubs do not know it
from celery.app.task import Context
from kombu.exceptions import EncodeError, SerializerNotInstalled
from kombu.pools import producers
from kombu.utils.url import maybe_sanitize_url

from conductor_app.exceptions import NewerFormat
from conductor_app.models import Execution
from conductor_app.transitions import dispatch

logger = logging.getLogger(__name__)

#: How long RabbitMQ may take to confirm a message, in seconds; without a limit, the caller and the sweeper would wait
#: for a server that has silently gone as long as TCP does. Redis has ``socket_timeout`` for that.
PUBLISH_SECONDS = 5.0
#: A server that says nothing for so many seconds is not asked again: the caller has waited long enough.
SILENCE_SECONDS = 3.0
#: A connection to RabbitMQ that was not used for so many seconds is asked whether it lives, and has so many to answer.
IDLE_SECONDS, PROBE_SECONDS = 15.0, 1.0
#: Errors about one message, its queue or its options. The broker is there, and takes others.
_MESSAGE_ERRORS = (
    *(ChannelError, EncodeError, SerializerNotInstalled, NewerFormat),
    *(LookupError, TypeError, ValueError, struct.error),
)


def send(execution: Execution, *, waits: bool) -> None:
    """Send the message of a queued execution.

    Args:
        waits: Whether to wait for the confirmation of a RabbitMQ that sends some.

    Raises:
        Exception: Whatever the broker's client raises.
    """
    acquire = current_app.producer_or_acquire
    if not waits:
        app: Any = current_app
        acquire = functools.partial(_unconfirmed(app._get_current_object(), os.getpid()).acquire, block=True)
    _send_by(acquire, execution)


class _AsStored:
    """In the place of Celery's router: a message goes where the call's arguments and routes sent its execution.

    A route may look at arguments, which a doorbell does not carry.
    """

    @staticmethod
    def route(options: dict[str, Any], *_task: object) -> dict[str, Any]:
        """Return the options of a message with its queue as Celery declares it."""
        return current_app.amqp.router.expand_destination(options)


def _send_by(acquire: Callable[[], AbstractContextManager[Any]], execution: Execution) -> None:
    """Send a message; once more on a new connection, if the one that was kept from an earlier message has died.

    RabbitMQ, or something between, closes connections that are idle for long. A message that is sent twice is harmless.
    """
    options = dispatch.options_of(execution)
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


def is_about_message(error: Exception) -> bool:
    """Tell whether an error is about one message, its queue or its options: the broker takes others."""
    return isinstance(error, _MESSAGE_ERRORS)


def tried(error: Exception) -> str:
    """Return the addresses, without passwords, of the servers that an error is about."""
    named = getattr(error, "conductor_tried", None)
    if named:
        return str(named)
    try:
        return str(current_app.connection_for_write().as_uri())
    except Exception:  # noqa: BLE001 - a transport that does not exist, for example
        return "(its URL is not usable)"
