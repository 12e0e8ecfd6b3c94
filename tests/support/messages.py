"""Messages that nobody should have sent, and queues that lose theirs."""

import random
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.app.trace import build_tracer
from kombu import Connection, Producer

from conductor_app.transitions.dispatch import DOORBELL, HEADER, is_embedded
from project.celery import app

#: For a test about what may happen to messages on their way.
needs_a_broker = pytest.mark.skipif(
    is_embedded(app), reason="with memory:// no message leaves the worker, so none can be lost, doubled or forged"
)


def ring(
    execution_id: Any,
    task: Any,
    times: int = 1,
    queue: str = app.conf.task_default_queue,
    connection: Connection | None = None,
    headers: dict[str, Any] | None = None,
    **forged: Any,
) -> None:
    """Publish the message that says that an execution is due; on this process's usual connection by default."""
    for _ in range(times):
        app.send_task(
            task.name,
            task_id=str(execution_id),
            queue=queue,
            ignore_result=True,
            headers={HEADER: DOORBELL, **(headers or {})},
            connection=connection,
            **forged,
        )


def deliver(task: Any, task_id: str, args: Any = (), kwargs: Any = None, **request: Any) -> None:
    """Run one delivery in this process, as a worker's pool process does."""
    delivered = {
        "id": task_id,
        "task": task.name,
        "args": args,
        "kwargs": kwargs or {},
        "hostname": "here",
        "delivery_info": {"routing_key": app.conf.task_default_queue},
        "ignore_result": False,
        **request,
    }
    build_tracer(task.name, task, app=app, propagate=False)(task_id, args, kwargs or {}, delivered)


def doorbell() -> dict[str, Any]:
    """What makes a delivery claim to be one of our own messages."""
    return {HEADER: DOORBELL, "headers": {HEADER: DOORBELL}}


def publish_garbage(task: Any, count: int, ids: list[str], seed: int = 7) -> None:
    """Publish messages to a task's name whose bodies, content types and ids are chosen at random."""
    chosen = random.Random(seed)
    with app.connection_for_write() as connection, connection.channel() as channel:
        producer = Producer(channel)
        for _ in range(count):
            body, content_type, encoding = chosen.choice(list(_bodies(chosen)))
            headers = {
                "lang": "py",
                "task": task.name,
                "id": chosen.choice([*ids, str(uuid.UUID(int=chosen.getrandbits(128))), "7", "no-uuid", "' OR 1=1 --"]),
                "root_id": chosen.choice([None, "x", *ids]),
                "argsrepr": chosen.choice(["", "\n[CRITICAL] \x1b[31m", "()"]),
            }
            if chosen.random() < 0.7:
                headers[HEADER] = chosen.choice([DOORBELL, "", 7, {"x": 1}])
            producer.publish(
                body,
                headers=headers,
                content_type=content_type,
                content_encoding=encoding,
                exchange="",
                routing_key=app.conf.task_default_queue,
            )


def _bodies(chosen: random.Random) -> Iterator[tuple[Any, str, str]]:
    noise = chosen.randbytes(chosen.choice([0, 1, 30, 3_000]))
    yield noise, "application/json", "utf-8"
    yield noise, "application/x-python-serialize", "binary"
    yield noise, "application/octet-stream", "binary"
    yield noise, "no/such-type", "no-such-encoding"
    for text in (
        "null",
        "[]",
        "{}",
        '{"id": 1}',
        "[[], {}, {}]",
        "[[1, 2, 3, 4], {}, {}]",
        '[[], {"no_such_argument": 1}, {}]',
        '[[], {"value": {"__type__": "uuid", "__value__": {"hex": "zz"}}}, {}]',
        '[[], {}, {"callbacks": [{"task": "tests.app.tasks.record", "args": ["forged"]}]}]',
        "[" * 2_000,
        "DROP TABLE conductor_app_execution; --",
    ):
        yield text.encode(), "application/json", "utf-8"


def empty(*queues: str) -> None:
    """Delete every message that waits in ``queues``, while workers run."""
    with app.connection_for_write() as connection, connection.channel() as channel:
        for queue in queues or (app.conf.task_default_queue,):
            channel.queue_purge(queue)


@contextmanager
def queue_that_nobody_serves(name: str) -> Iterator[str]:
    """A queue, removed with its messages in the end."""
    yield name
    if not is_embedded(app):
        with app.connection_for_write() as connection, connection.channel() as channel:
            channel.queue_delete(name)
