"""The test broker, emptied between tests, and this process's own connection to it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kombu import Connection, pools

from conductor_app.host import publishing
from conductor_app.transitions import dispatch
from project.celery import app
from tests.support.polling import wait_until


def purge(queues: Iterable[str]) -> None:
    """Drop every message that earlier tests have left in the default queue and in ``queues``.

    Call it when no worker lives. With ``memory://``, each process has queues of its own, and this empties those here.
    """
    with app.connection_for_write() as broker:
        for queue in {app.conf.task_default_queue, *queues}:
            _purge(broker, queue)
        if broker.transport.driver_type == "redis":
            _forget_unacknowledged(broker)


def _purge(broker: Connection, queue: str) -> None:
    with broker.channel() as channel:
        try:
            if broker.transport.driver_type == "amqp":
                # RabbitMQ puts a killed worker's messages back into the queue when it notices that the worker is gone.
                wait_until(
                    lambda: channel.queue_declare(queue, passive=True).consumer_count == 0,
                    message=f"Queue {queue!r} still has a consumer",
                )
            channel.queue_purge(queue)
        except broker.channel_errors:  # Nobody has declared the queue yet.
            pass


def _forget_unacknowledged(broker: Connection) -> None:
    """Drop what killed workers had taken from Redis, which would come back after its visibility timeout."""
    options = app.conf.broker_transport_options
    with broker.channel() as channel:
        channel.client.delete(options["unacked_key"], options["unacked_index_key"], options["unacked_mutex_key"])


@contextmanager
def broker_at(url: str) -> Iterator[None]:
    """Let this process publish to the broker at ``url``."""
    before = app.conf.broker_write_url
    _reconnect(url)
    try:
        yield
    finally:
        _reconnect(before)


def _reconnect(url: str | None) -> None:
    app.conf.broker_write_url = url
    pools.reset()
    app._pool = app.amqp._producer_pool = None
    publishing._unconfirmed.cache_clear()
    dispatch.reset_breaker()
