"""What a worker says of itself: where it is, what it runs bodies in, what it serves, of which versions it is made."""

from __future__ import annotations

import functools
import json
import os
import platform
import socket
import sys
from typing import Any

import celery
import django

from conductor_app.conf import conductor_settings
from conductor_app.models import Worker
from conductor_app.store import owners
from conductor_app.store.process import process

#: Celery's module of the pool, where people know it by another name.
_POOLS = {"thread": "threads"}


def worker_id(worker: Any) -> str:
    """Return the key of a worker's row."""
    return owners.worker_of(owners.lease_owner(worker.hostname))


def describe(worker: Any, *, is_stopping: bool) -> Worker:
    """Return a worker's row as it is to be now, without its instants."""
    return Worker(
        id=worker_id(worker),
        name=worker.hostname[: owners.MAX_LENGTH],
        host=_host(),
        pid=os.getpid(),
        pool=_pool(worker),
        slots=_most_slots(worker),
        queues=json.dumps(queues(worker)),
        package=_package_version()[:64],
        celery=celery.__version__[:64],
        django=django.get_version()[:64],
        python=platform.python_version()[:64],
        release=conductor_settings().RELEASE[:255],
        is_stopping=is_stopping,
    )


def slots(worker: Any) -> int:
    """Return how many bodies a worker runs at once now."""
    # In Celery 5.6 gevent's pool has for its number of processes that of the greenlets that run.
    size = "limit" if process.worker.runs_greenlets else "num_processes"
    return int(getattr(worker.pool, size, None) or worker.concurrency or 1)


def _most_slots(worker: Any) -> int:
    autoscaler = getattr(worker, "autoscaler", None)
    return slots(worker) if autoscaler is None else int(autoscaler.max_concurrency)


def queues(worker: Any) -> list[str]:
    """Return the queues that a worker consumes; those that a remote command has added or taken away count, too."""
    consumer = getattr(getattr(worker, "consumer", None), "task_consumer", None)
    if consumer is not None:
        return sorted({str(queue.name) for queue in consumer.queues})
    # It has not connected yet, or not again.
    return sorted(map(str, worker.app.amqp.queues.consume_from))


def _pool(worker: Any) -> str:
    name = worker.pool_cls.__module__.rpartition(".")[2]
    return str(_POOLS.get(name, name))[:64]


def _package_version() -> str:
    # Not by an import: what the package exports comes from layers above.
    return str(sys.modules["conductor_app"].__version__)


@functools.cache
def _host() -> str:
    return socket.gethostname()[:255]
