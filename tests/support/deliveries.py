"""Messages that this process publishes, takes from the broker itself, and delivers to a task as a worker would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker.request import Request

from conductor_app.host.request import DurableRequest
from conductor_app.models import Execution
from conductor_app.transitions import dispatch
from project.celery import app
from tests.support.polling import wait_until


def stranger() -> Celery:
    """A Celery app of somebody else's on the same broker, which knows none of our tasks."""
    other = Celery("stranger", broker=app.conf.broker_url, set_as_current=False)
    other.conf.update(
        task_default_queue=app.conf.task_default_queue,
        broker_transport_options=app.conf.broker_transport_options,
        task_ignore_result=False,
    )
    return other


def take(queue: str | None = None, *, is_wanted: Callable[[Any], bool] = lambda _message: True) -> Any:
    """Take one message from a queue, past those that other tests have left."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        bound = app.amqp.queues[queue or app.conf.task_default_queue](channel)

        def look() -> Any:
            while (message := bound.get(no_ack=True)) is not None:
                if is_wanted(message):
                    return message
            return None

        return wait_until(look, message="There is no message")


def doorbell(execution: Execution) -> Any:
    """Publish an execution's own message, and take it."""
    assert dispatch.publish(execution)
    return take(execution.queue, is_wanted=lambda message: message.headers["id"] == str(execution.pk))


def deliver(message: Any) -> Request:
    """Let the task run that a message names, and return the request."""
    request = DurableRequest(
        message, app=app, task=app.tasks[message.headers["task"]], hostname="delivery@test", on_ack=lambda *_: None
    )
    request.execute()
    return request
