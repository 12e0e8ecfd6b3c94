"""The servers, the proxies before them, and the workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import kombu
import redis

from tests.services import RABBITMQ, ping_redis, start_redis, unreachable
from tests.support.polling import wait_until
from tests.support.postgres import PrivatePostgres
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from tests.support.worker import Worker

#: Pool and concurrency of each worker.
WORKERS = [("prefork", 2), ("prefork", 2), ("threads", 4), ("solo", 1)]
#: How long a worker that has ended stays away, as with systemd's ``RestartSec``.
RESTART_SECONDS = 1.0


class Broker(Protocol):
    """A broker whose messages nobody else needs."""

    url: str

    def empty(self) -> None:
        """Drop all messages."""

    def crash(self) -> None:
        """End it, with all messages."""

    def start(self) -> None:
        """Start it again."""


class PrivateRedis:
    """A Redis server on a free port that keeps nothing on disk."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            start_redis(self._port), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._answers, message="redis-server does not answer")

    def _answers(self) -> bool:
        with suppress(redis.RedisError):
            ping_redis(self.url)
            return True
        return False

    def crash(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def empty(self) -> None:
        with redis.from_url(self.url) as client:
            client.flushall()


class RabbitQueue:
    """One queue of a RabbitMQ server that others use too; it cannot crash, so the proxy before it does."""

    def __init__(self, name: str) -> None:
        if reason := unreachable(RABBITMQ):
            raise SystemExit(reason)
        self.url = RABBITMQ.url
        self._name = name

    def start(self) -> None:
        """Nothing to do: it runs."""

    def crash(self) -> None:
        self.empty()

    def empty(self) -> None:
        with kombu.Connection(self.url) as connection, suppress(connection.channel_errors):
            connection.default_channel.queue_purge(self._name)

    def remove(self) -> None:
        with kombu.Connection(self.url) as connection:
            connection.default_channel.queue_delete(self._name)


class Servers:
    """PostgreSQL and a broker, each behind a proxy."""

    def __init__(self, postgres: PrivatePostgres, broker: Broker) -> None:
        self.postgres, self.broker = postgres, broker
        # Workers notice long before their kernel does. The client, which has no heartbeat, is to notice at all.
        self.database_proxy = Proxy(postgres.url, gives_up_after=20)
        self.broker_proxy = Proxy(broker.url, gives_up_after=20)


@contextmanager
def servers(kind: str, *, fsync: bool) -> Iterator[Servers]:
    """Start the servers, and let this process and its workers find them in the environment.

    Args:
        kind: ``redis`` or ``rabbitmq``.
        fsync: As ``PrivatePostgres``'s.
    """
    queue = f"celery-chaos-{os.getpid()}"
    with ExitStack() as stack:
        # What does not wait for the disk is forgotten by most crashes. A client whose connection is abandoned keeps its
        # locks until the server finds out.
        settings = {"wal_writer_delay": "10s", "idle_in_transaction_session_timeout": "3s"}
        postgres = stack.enter_context(PrivatePostgres(fsync=fsync, settings=settings))
        broker: Any
        if kind == "redis":
            broker = PrivateRedis()
            stack.callback(broker.crash)
        else:
            broker = RabbitQueue(queue)
            stack.callback(broker.remove)
        broker.start()
        started = Servers(postgres, broker)
        stack.enter_context(started.database_proxy)
        stack.enter_context(started.broker_proxy)
        os.environ.update(
            DJANGO_SETTINGS_MODULE="tests.chaos.settings",
            DATABASE_URL=started.database_proxy.url,
            CELERY_BROKER_URL=started.broker_proxy.url,
            CONDUCTOR_CHAOS_QUEUE=queue,
        )
        yield started


class Workers:
    """The workers, kept alive; a context manager that kills them."""

    def __init__(self, directory: Path) -> None:
        from tests.support.worker import Worker

        env = {"DJANGO_SETTINGS_MODULE": "tests.chaos.settings"}
        self.all = [
            Worker(directory / f"worker-{number}-{pool}.log", pool=pool, concurrency=concurrency, env=env)
            for number, (pool, concurrency) in enumerate(WORKERS, 1)
        ]
        self._ended_at: dict[str, float] = {}
        self._frozen: dict[str, list[int]] = {}

    def __enter__(self) -> Workers:
        for worker in self.all:
            worker.start()
        for worker in self.all:
            worker.wait_ready(timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            worker.kill()

    def look_after(self) -> None:
        """Start again what has ended; call it often."""
        now = time.monotonic()
        for worker in self.all:
            if not worker.is_alive and now - self._ended_at.setdefault(worker.name, now) >= RESTART_SECONDS:
                worker.kill()  # what is left of its process group
                self._ended_at.pop(worker.name)
                self._frozen.pop(worker.name, None)
                worker.start()

    def awake(self, *pools: str) -> list[Worker]:
        """Those that run, of these pools, or of all."""
        return [
            worker
            for worker in self.all
            if worker.is_alive and worker.name not in self._frozen and (not pools or worker.pool in pools)
        ]

    def freeze(self, worker: Worker, pids: list[int]) -> None:
        """Stop some processes of a worker, as a paused machine would."""
        self._frozen[worker.name] = pids
        for pid in pids:
            _signal(pid, signal.SIGSTOP)

    def thaw(self, worker: Worker) -> None:
        """Let them go on."""
        for pid in self._frozen.pop(worker.name, []):
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def new_directory(seed: int) -> Path:
    """Return a directory for the logs of a round."""
    return Path(tempfile.mkdtemp(prefix=f"conductor-chaos-{seed}-"))
