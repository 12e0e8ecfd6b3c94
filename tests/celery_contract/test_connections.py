"""kombu's and py-amqp's connections: relied on by ``dispatch`` and ``forks``."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from amqp.transport import TCPTransport
from celery import current_app
from celery.backends.base import DisabledBackend
from celery.result import AsyncResult
from django.db import DEFAULT_DB_ALIAS, ProgrammingError, connections, transaction
from django.db.backends.sqlite3.base import DatabaseWrapper as SqliteWrapper
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


def test_a_connection_that_is_collected_closes_its_transport() -> None:
    closed: list[str] = []
    connection = amqp.Connection("localhost")
    connection.transport = SimpleNamespace(close=lambda: closed.append("transport"), connected=True)
    pyamqp.Transport(Connection("amqp://localhost"))._collect(connection)
    assert closed == ["transport"]
    assert connection._transport is None


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
    assert list(inspect.signature(AsyncResult.get).parameters)[1] == "timeout"
    read: list[str] = []
    metas = iter([{"status": "STARTED", "result": None}, {"status": "SUCCESS", "result": 7}])

    class Backend(DisabledBackend):
        def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
            read.append(task_id)
            return next(metas)

    result = AsyncResult("id", backend=Backend(app=current_app))
    assert result._cache is None
    assert [result.state, result.state, result.result, result.state] == ["STARTED", "SUCCESS", 7, "SUCCESS"]
    assert read == ["id", "id"]


def test_django_keeps_pools_of_connections_by_alias() -> None:
    pytest.importorskip("psycopg", reason="the driver is one of requirements-services.txt")
    from django.db.backends.postgresql.base import DatabaseWrapper as PostgresWrapper

    assert isinstance(PostgresWrapper._connection_pools, dict)


@pytest.mark.django_db
def test_a_connection_that_was_closed_in_a_transaction_opens_no_new_one(tmp_path: Path) -> None:
    ours: Any = connections[DEFAULT_DB_ALIAS]
    assert isinstance(ours.autocommit, bool)
    # A file of its own: the one in memory stays open until the end.
    connection = SqliteWrapper({**ours.settings_dict, "NAME": str(tmp_path / "closed"), "OPTIONS": {}}, "contract")
    connections["contract"] = connection
    try:
        with pytest.raises(ProgrammingError):
            _close_in_block(connection)
        assert (connection.in_atomic_block, connection.needs_rollback) == (False, False)
        with connection.cursor() as cursor:  # and is well after it
            cursor.execute("SELECT 1")
    finally:
        connection.close()
        del connections["contract"]


def _close_in_block(connection: Any) -> None:
    with transaction.atomic(using="contract"):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.close()
        assert (connection.closed_in_transaction, connection.needs_rollback) == (True, True)
        # Nor does it if somebody takes the closed one away.
        raw, connection.connection = connection.connection, None
        with pytest.raises(ProgrammingError, match="Cannot open a new connection in an atomic block"):
            connection.ensure_connection()
        connection.connection = raw
        connection.needs_rollback = False
        connection.cursor().execute("SELECT 1")
