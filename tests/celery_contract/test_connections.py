"""kombu's and py-amqp's connections: relied on by ``dispatch`` and ``forks``."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import amqp
import pytest
from amqp.transport import TCPTransport
from celery import current_app
from celery.backends.base import DisabledBackend
from celery.result import AsyncResult
from django.db import DEFAULT_DB_ALIAS, connections
from django.db.backends.base import base
from django.db.backends.base.base import BaseDatabaseWrapper
from kombu import Connection, pools
from kombu.resource import Resource
from kombu.serialization import registry
from kombu.transport import pyamqp
from kombu.utils.functional import lazy


def test_pyamqp_shuts_a_socket_down_when_it_closes_it() -> None:
    """Which ends the connection for each process that has it."""
    ours, theirs = socket.socketpair()
    inherited = ours.dup()
    transport = TCPTransport("localhost")
    transport.sock = ours
    transport.close()
    assert theirs.recv(1) == b"", "it was closed in one process only"
    inherited.close()
    theirs.close()
    assert "self._transport.close()" in inspect.getsource(amqp.Connection.collect)


def test_a_transport_survives_a_socket_that_is_none() -> None:
    """As ``/dev/null`` in its place is."""
    transport = TCPTransport("localhost")
    transport.sock = broken = socket.socket()
    broken.close()
    transport.close()
    assert transport.sock is None


def test_a_pool_has_its_idle_and_its_used_connections_where_they_can_be_found() -> None:
    broker = Connection("memory://contract-pool")
    pool: Any = broker.Pool(limit=3)
    assert isinstance(pool, Resource)
    assert all(isinstance(found, lazy) for found in pool._resource.queue)
    used = pool.acquire()
    assert used in pool._dirty
    assert used._connection is None
    used.connect()
    assert used.connected
    assert used._connection is not None
    used.release()
    assert used in pool._resource.queue
    used.collect()
    assert not used.connected
    # What ``forks`` does.
    pool._resource, pool._dirty = type(pool._resource)(), set()
    pool.setup()
    with pool.acquire(block=True) as found:
        assert found is not used


def test_the_pools_of_all_apps_are_listed() -> None:
    broker = Connection("memory://contract-listed")
    producers: Any = pools.producers[broker]
    assert producers in list(pools.producers.values())
    assert producers.connections in list(pools.connections.values())
    del pools.producers[broker], pools.connections[broker]


def test_an_amqp_connection_has_its_socket_where_it_can_be_found() -> None:
    connection = amqp.Connection("localhost")
    assert connection._transport is None
    connection.transport = transport = TCPTransport("localhost")
    transport.sock = "the socket"
    assert connection._transport.sock == "the socket"
    transport.sock = None
    assert "connection.collect()" in inspect.getsource(pyamqp.Transport._collect)


def test_a_socket_keeps_the_timeout_that_is_set_around_a_call_without_one() -> None:
    """So that ``having_timeout`` limits what a channel waits for."""
    transport = TCPTransport("localhost")
    transport.sock = socket.socket()
    with transport.having_timeout(1.5), transport.having_timeout(None) as inner:
        assert inner.gettimeout() == 1.5
    transport.sock.close()
    assert {"prefetch_size", "prefetch_count", "a_global"} <= set(inspect.signature(amqp.Channel.basic_qos).parameters)


def test_a_connection_knows_the_other_servers_of_its_url() -> None:
    broker: Any = Connection("memory://one;memory://two")
    assert broker.alt == ["memory://one", "memory://two"]
    assert "**" in Connection("amqp://u:secret@one//").as_uri()


def test_the_registry_tells_the_content_type_of_json() -> None:
    assert registry.name_to_type["json"] == "application/json"


def test_a_result_reads_at_one_place_and_remembers_what_is_final() -> None:
    assert "self.backend.get_task_meta(self.id)" in inspect.getsource(AsyncResult._get_task_meta)
    assert list(inspect.signature(AsyncResult.get).parameters)[1] == "timeout"
    result = AsyncResult("id", backend=DisabledBackend(app=current_app))
    assert result._cache is None


def test_django_keeps_pools_of_connections_by_alias() -> None:
    pytest.importorskip("psycopg", reason="the driver is one of requirements-services.txt")
    from django.db.backends.postgresql.base import DatabaseWrapper as PostgresWrapper

    assert isinstance(PostgresWrapper._connection_pools, dict)


def test_a_connection_that_was_closed_in_a_transaction_opens_no_new_one() -> None:
    source = inspect.getsource(BaseDatabaseWrapper.close)
    assert "self.closed_in_transaction = True" in source
    assert "self.needs_rollback = True" in source
    assert "self.in_atomic_block and self.closed_in_transaction" in inspect.getsource(base)
    assert isinstance(connections[DEFAULT_DB_ALIAS].autocommit, bool)
