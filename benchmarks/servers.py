"""The servers of a measurement: a PostgreSQL and a Redis of its own, and a queue on RabbitMQ."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from tests.chaos.stack import PrivateRedis, RabbitQueue
from tests.services import RABBITMQ, unreachable
from tests.support.postgres import PrivatePostgres

#: A commit waits for the disk, as in production. Statements are counted where clients send them: neither those inside
#: of functions nor BEGIN and COMMIT, which the number of commits tells. No checkpoint falls into a measurement.
POSTGRES_SETTINGS = {
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "top",
    "pg_stat_statements.track_utility": "off",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "max_connections": "300",
}


@dataclass
class Servers:
    """Where they are, and why one is missing."""

    postgres: PrivatePostgres
    #: By kind (``rabbitmq``, ``redis``): the broker, if it is there.
    brokers: dict[str, Any]
    queue: str
    missing: dict[str, str] = field(default_factory=dict)

    def admin(self) -> psycopg.Connection[Any]:
        """A session beside the databases that are measured."""
        return psycopg.connect(self.postgres.url, autocommit=True)

    def url(self, database: str) -> str:
        """The address of one database."""
        return f"{self.postgres.url.rpartition('/')[0]}/{database}"


@contextmanager
def servers(kinds: set[str], settings: dict[str, str] | None = None) -> Iterator[Servers]:
    """Start what is needed; it ends with the context.

    Args:
        kinds: Which brokers are wanted.
        settings: More settings of PostgreSQL.
    """
    queue = f"celery-benchmark-{os.getpid()}"
    with ExitStack() as stack:
        try:
            server = PrivatePostgres(fsync=True, settings={**POSTGRES_SETTINGS, **(settings or {})})
        except (pytest.skip.Exception, pytest.fail.Exception) as reason:  # to a test it says that it cannot be had
            raise SystemExit(str(reason)) from None
        postgres = stack.enter_context(server)
        started = Servers(postgres, {}, queue)
        with started.admin() as connection:
            connection.execute("CREATE EXTENSION pg_stat_statements")
        if "redis" in kinds:
            redis = PrivateRedis()
            stack.callback(redis.crash)
            try:
                redis.start()
                started.brokers["redis"] = redis
            except OSError as error:
                started.missing["redis"] = f"redis-server could not be started: {error}"
        if "rabbitmq" in kinds:
            if reason := unreachable(RABBITMQ):
                started.missing["rabbitmq"] = reason
            else:
                rabbitmq = RabbitQueue(queue)
                stack.callback(rabbitmq.remove)
                started.brokers["rabbitmq"] = rabbitmq
        yield started


@dataclass(frozen=True)
class Counters:
    """What a database has done so far."""

    statements: float
    commits: float
    wal_bytes: float
    syncs: float

    def since(self, before: Counters, units: float) -> dict[str, float]:
        """The difference, for each unit of work."""
        return {
            "statements": (self.statements - before.statements) / units,
            "commits": (self.commits - before.commits) / units,
            "wal_kb": (self.wal_bytes - before.wal_bytes) / units / 1_000,
            "syncs": (self.syncs - before.syncs) / units,
        }


def count(servers: Servers, database: str) -> Counters:
    """Read the counters. Sessions that are still open may hold back some of their commits, for up to ten seconds."""
    with servers.admin() as connection:

        def value(query: str, *parameters: str) -> float:
            row = connection.execute(query, parameters).fetchone()
            return float(row[0] or 0) if row else 0.0

        return Counters(
            statements=value(
                "SELECT sum(calls) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE datname = %s",
                database,
            ),
            commits=value("SELECT xact_commit FROM pg_stat_database WHERE datname = %s", database),
            wal_bytes=value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"),
            syncs=value(
                "SELECT wal_sync FROM pg_stat_wal"
                if connection.info.server_version < 180_000
                else "SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal'"
            ),
        )


def wait_until_alone(servers: Servers, database: str, *, timeout: float = 10.0) -> None:
    """Wait until no session uses a database: only then has it told all that it counted."""
    deadline = time.monotonic() + timeout
    with servers.admin() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        while (row := connection.execute(query, [database]).fetchone()) and row[0]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{row[0]} sessions still use {database} after {timeout:g} s")
            time.sleep(0.05)
