"""What a forked process has inherited of kombu, and must not share: the sockets to brokers; see ``store.forks``."""

from __future__ import annotations

from contextlib import suppress
from queue import LifoQueue
from typing import Any

from kombu import pools

from conductor_app.store import forks


def forget_brokers(nowhere: int) -> None:
    """Make kombu's pools as they were before any connection was opened, whoever holds them."""
    for pool in list(pools.connections.values()):
        for connection in (*pool._dirty, *pool._resource.queue):
            # py-amqp's; redis-py leaves alone what another process has opened.
            with suppress(Exception):
                forks.replace(connection._connection._transport.sock.fileno(), nowhere)
        _renew(pool)
    for pool in list(pools.producers.values()):
        _renew(pool)


def _renew(pool: Any) -> None:
    # A new queue: another thread of the parent's may have held the lock of the old one.
    pool._resource, pool._dirty = LifoQueue(), set()
    pool.setup()
