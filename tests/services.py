"""Run the test suite on each combination of database and broker server.

    python -m tests.services [--only postgres-redis ...] [-- pytest arguments]

The servers' addresses come from ``CONDUCTOR_TEST_{POSTGRES,MARIADB,REDIS,RABBITMQ}_URL``; by default all are on the
loopback interface. A local server that is installed but does not answer is started. A combination whose server cannot
be reached is skipped, or, with ``CI=true``, fails.

Each server sees the whole suite once. PostgreSQL with Redis and without a broker runs the tests marked ``messaging``,
about what passes between a database and a broker; ``make chaos`` has the former, too.

Exit code: 0 if every combination passed, 1 if one failed, 3 if none failed but some were skipped.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from urllib.parse import unquote, urlsplit

import kombu
import psycopg
import pymysql
import redis

from tests.support.outcomes import (
    EXIT_FAILED,
    EXIT_SKIPPED,
    FAILED,
    SKIPPED,
    Outcome,
    console,
    run_chosen,
    run_pytest,
    unavailable,
)

ANSWER_SECONDS = 5
START_SECONDS = 60
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@dataclass(frozen=True)
class Server:
    """One server: where it is, how to tell that it answers, and how to start it on this machine."""

    name: str
    url: str
    ping: Callable[[str], object]
    start_command: Callable[[int], list[str] | None]
    default_port: int

    def start(self) -> bool:
        """Start the server if its address is this machine's and it is installed; tell whether it was tried."""
        address = urlsplit(self.url)
        command = self.start_command(address.port or self.default_port)
        if address.hostname not in LOOPBACK or command is None or not (program := _which(command[0])):
            return False
        console.print(f"{self.name} does not answer, starting {command[0]} ...")
        # In a session of its own: it goes on when the tests have ended.
        subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return True


@cache
def unreachable(server: Server) -> str | None:
    """Start the server if need be, and return why it cannot be used, or None if it answers."""
    if not (reason := _no_answer(server)) or not server.start():
        return reason
    deadline = time.monotonic() + START_SECONDS
    while reason and time.monotonic() < deadline:
        time.sleep(0.5)
        reason = _no_answer(server)
    return reason


def _no_answer(server: Server) -> str | None:
    try:
        server.ping(server.url)
    except Exception as error:  # noqa: BLE001 - each driver has its own errors, and any of them is the answer
        return f"{server.name} does not answer: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def _which(program: str) -> str | None:
    # Servers often live where an ordinary user's PATH does not look.
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"]))


# Servers


def ping_postgres(url: str) -> None:
    psycopg.connect(url, connect_timeout=ANSWER_SECONDS).close()


def start_postgres(port: int) -> list[str] | None:
    """Debian's cluster on that port."""
    if not (lister := _which("pg_lsclusters")):
        return None
    clusters = subprocess.run([lister, "--no-header"], capture_output=True, text=True, check=False).stdout
    for cluster in clusters.splitlines():
        version, name, cluster_port, *_ = cluster.split()
        if int(cluster_port) == port:
            return ["pg_ctlcluster", "--skip-systemctl-redirect", version, name, "start"]
    return None


def ping_mariadb(url: str) -> None:
    address = urlsplit(url)
    pymysql.connect(
        host=address.hostname,
        port=address.port or 3306,
        user=unquote(address.username or ""),
        password=unquote(address.password or ""),
        connect_timeout=ANSWER_SECONDS,
    ).close()


def ping_redis(url: str) -> None:
    with redis.from_url(url, socket_connect_timeout=ANSWER_SECONDS, socket_timeout=ANSWER_SECONDS) as client:
        client.ping()


def start_redis(port: int) -> list[str]:
    """A server that keeps nothing on disk."""
    address = ["--bind", "127.0.0.1", "-::1", "--port", str(port)]
    return ["redis-server", *address, "--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir()]


def ping_rabbitmq(url: str) -> None:
    with kombu.Connection(url, connect_timeout=ANSWER_SECONDS) as connection:
        connection.connect()


POSTGRES = Server(
    name="PostgreSQL",
    url=os.environ.get("CONDUCTOR_TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres"),
    ping=ping_postgres,
    start_command=start_postgres,
    default_port=5432,
)
MARIADB = Server(
    name="MariaDB",
    url=os.environ.get("CONDUCTOR_TEST_MARIADB_URL", "mysql://root@127.0.0.1:3306/test"),
    ping=ping_mariadb,
    start_command=lambda port: ["mariadbd"] if port == 3306 else None,
    default_port=3306,
)
REDIS = Server(
    name="Redis",
    url=os.environ.get("CONDUCTOR_TEST_REDIS_URL", "redis://127.0.0.1:6379/0"),
    ping=ping_redis,
    start_command=start_redis,
    default_port=6379,
)
RABBITMQ = Server(
    name="RabbitMQ",
    url=os.environ.get("CONDUCTOR_TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"),
    ping=ping_rabbitmq,
    start_command=lambda port: ["rabbitmq-server", "-detached"] if port == 5672 else None,
    default_port=5672,
)


# Combinations


@dataclass(frozen=True)
class Combination:
    """A database and a broker; without a broker server, workers feed themselves from the database."""

    name: str
    database: Server
    broker: Server | None
    #: The pytest arguments that choose the tests; none for the whole suite.
    selection: tuple[str, ...] = ()
    #: Whether PostgreSQL prepares the statements.
    prepares: bool = False
    #: Celery's result backend, unless the database is it.
    results: Server | None = None

    @property
    def servers(self) -> list[Server]:
        return [self.database, *([self.broker] if self.broker else [])]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.database.url,
            "CELERY_BROKER_URL": self.broker.url if self.broker else "memory://",
            "CONDUCTOR_TEST_PREPARED": "1" if self.prepares else "",
            # Celery itself reads this one, before any setting.
            **({"CELERY_RESULT_BACKEND": self.results.url} if self.results else {}),
        }


COMBINATIONS = [
    Combination("postgres-rabbitmq", POSTGRES, RABBITMQ),
    Combination("mariadb-redis", MARIADB, REDIS),
    Combination("postgres-redis", POSTGRES, REDIS, ("-m", "messaging"), prepares=True, results=REDIS),
    Combination("postgres-memory", POSTGRES, None, ("-m", "messaging"), prepares=True),
]


def run(combination: Combination, options: argparse.Namespace) -> Outcome:
    """Run the suite, or what depends on the combination."""
    console.rule(f"{combination.name}: what depends on the combination" if combination.selection else combination.name)
    reasons = [reason for server in combination.servers if (reason := unreachable(server))]
    if reasons:
        return unavailable(combination.name, "; ".join(reasons))
    arguments = [*combination.selection, *options.pytest_args]
    return run_pytest(
        combination.name, sys.executable, arguments, combination.environment, is_part=bool(combination.selection)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.services", description=__doc__.splitlines()[0])
    verdicts = run_chosen(parser, "Services", "combination", COMBINATIONS, run)
    return EXIT_FAILED if FAILED in verdicts else EXIT_SKIPPED if SKIPPED in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
