"""The test broker, emptied between tests."""

from collections.abc import Iterable

from kombu import Connection

from project.celery import app
from tests.support.polling import wait_until


def purge(queues: Iterable[str]) -> None:
    """Drop every message that earlier tests have left in the default queue and in ``queues``.

    Call it when no worker lives. ``memory://`` has nothing to purge: each process has a queue of its own.
    """
    with app.connection_for_write() as broker:
        if broker.transport.driver_type == "memory":
            return
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
