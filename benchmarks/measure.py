"""Measure one system: start its processes on a fresh database, let it work, and count."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import marks
from benchmarks.peers import ROOT, VAR, Peer
from benchmarks.servers import Counters, Servers, count, wait_until_alone
from benchmarks.systems.base import PARALLEL, SEQUENCE, STEPS, TRIVIAL

#: Where an idle system gets its next call: after its last commit.
IDLE_SECONDS = 0.02
#: Parents in flight in the replay workload.
IN_FLIGHT = 4
WARM_UPS = 40


@dataclass(frozen=True)
class Workload:
    """What is run, how much of it, and the figures that come out."""

    key: str
    #: ``rate``, ``latency``, ``wall`` or ``replay``.
    kind: str
    title: str
    unit: str
    body: str
    #: Children or steps of one root.
    size: int
    #: How many roots.
    roots: int
    #: What a rate counts: how many of it a root has.
    units: int = 1

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "rate"


def workloads(scale: float) -> list[Workload]:
    """All workloads; ``scale`` shrinks how much is run, and in W3 how wide it is."""

    def scaled(number: int, least: int) -> int:
        return max(least, round(number * scale))

    wide, wider = scaled(1_000, 50), scaled(5_000, 100)
    found = [
        Workload("W1", "rate", "W1", "workflows/s", SEQUENCE, 3, scaled(2_000, 40)),
        Workload("W1-latency", "latency", "W1", "p50 ms", SEQUENCE, 3, scaled(100, 10)),
        Workload("W2", "rate", "W2", "steps/s", STEPS, 10, scaled(1_000, 40), 10),
        Workload("W3-1", "wall", f"W3 {wide:,} children", "s", PARALLEL, wide, 1),
        Workload("W3-2", "wall", f"W3 {wider:,} children", "s", PARALLEL, wider, 1),
        Workload("W4", "rate", "W4", "executions/s", TRIVIAL, 0, scaled(5_000, 100)),
        Workload("W4-latency", "latency", "W4", "p50 ms", TRIVIAL, 0, scaled(100, 10)),
    ]
    for children in (10, 50, 200, 1_000):
        # Enough parents that four are in flight for some time, and enough children to be timed.
        roots = max(IN_FLIGHT, scaled(800 // children, IN_FLIGHT))
        found.append(
            Workload(f"replay-{children}", "replay", f"N = {children:,}", "ms/child", SEQUENCE, children, roots)
        )
    return found


@dataclass(frozen=True)
class Outcome:
    """What one measurement found."""

    value: float
    count: int
    costs: dict[str, float] = field(default_factory=dict)
    also: dict[str, float] = field(default_factory=dict)


class Failed(Exception):
    """A system did not do what it was to do; the text says where its output is."""


class Run:
    """One system on a database of its own, with a client and workers; a context manager."""

    def __init__(self, servers: Servers, peer: Peer, pool: str, *, timeout: float, prefix: Sequence[str] = ()) -> None:
        self.servers, self.peer, self.timeout = servers, peer, timeout
        self.database = f"run_{peer.module}"
        #: Put before the first worker's command: a profiler.
        self.prefix = prefix
        self.log = VAR / "logs" / f"{peer.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.marks = Path(tempfile.mkdtemp(prefix="conductor-benchmark-"))
        self.workers: list[subprocess.Popen[bytes]] = []
        self._client: subprocess.Popen[str] | None = None
        broker = servers.brokers[peer.broker].url if peer.broker else "memory://"
        self.environment = {
            **os.environ,
            "DATABASE_URL": servers.url(self.database),
            "CELERY_BROKER_URL": broker,
            "CONDUCTOR_BENCHMARK_POOL": pool,
            "CONDUCTOR_BENCHMARK_QUEUE": servers.queue,
            marks.DIRECTORY: str(self.marks),
            "PYTHONPATH": str(ROOT),
            **{name: value.format(broker=broker) for name, value in peer.variables.items()},
        }

    def __enter__(self) -> Run:
        self._prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_client()
        self.stop_workers()
        if self.peer.broker:
            self.servers.brokers[self.peer.broker].empty()
        shutil.rmtree(self.marks, ignore_errors=True)

    def _command(self, role: str) -> list[str]:
        return [str(self.peer.python), "-m", f"benchmarks.systems.{self.peer.module}", role]

    def _prepare(self) -> None:
        """Make the database: a copy of one with tables, which the first run makes."""
        template = f"tables_{self.peer.module}"
        with self.servers.admin() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self.database} WITH (FORCE)")
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [template]).fetchone():
                connection.execute(f"CREATE DATABASE {self.database}")
                with self.log.open("ab") as log:
                    subprocess.run(
                        self._command("prepare"), env=self.environment, cwd=ROOT, stdout=log, stderr=log, check=True
                    )
                wait_until_alone(self.servers, self.database)
                connection.execute(f"ALTER DATABASE {self.database} RENAME TO {template}")
            connection.execute(f"CREATE DATABASE {self.database} TEMPLATE {template}")
        if self.peer.broker:
            self.servers.brokers[self.peer.broker].empty()

    def start_workers(self, number: int = 2) -> None:
        """Start worker processes; they are not waited for."""
        for index in range(number):
            command = self._command("worker") if index else [*self.prefix, *self._command("worker")]
            with self.log.open("ab") as log:
                self.workers.append(
                    subprocess.Popen(
                        command,
                        env=self.environment,
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )

    def stop_workers(self) -> None:
        """Kill them: what they have done is done."""
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        self.workers = []

    def finish_profile(self) -> None:
        """Let the profiler before the first worker write what it has seen."""
        os.kill(self.workers[0].pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.workers[0].wait(timeout=30)

    def start(self, body: str, size: int, roots: int = 1) -> float:
        """Start roots, and return when that began."""
        if self._client is None:
            with self.log.open("a") as log:
                self._client = subprocess.Popen(
                    self._command("client"),
                    env=self.environment,
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        client = self._client
        assert client.stdin
        assert client.stdout
        try:
            client.stdin.write(json.dumps({"body": body, "size": size, "roots": roots}) + "\n")
            client.stdin.flush()
            return float(json.loads(client.stdout.readline())["began"])
        except (OSError, ValueError) as error:
            raise Failed(f"{self.peer.name}: the client ended, see {self.log}") from error

    def close_client(self) -> None:
        """Let the client go, and its session in the database with it."""
        if self._client is not None:
            self._client.kill()
            self._client.communicate()
            self._client = None

    def wait(self, roots: int) -> marks.Marks:
        """Wait until so many roots have ended."""
        deadline = time.monotonic() + self.timeout
        while (seen := marks.read(self.marks)).roots < roots:
            if time.monotonic() > deadline:
                raise Failed(
                    f"{self.peer.name}: {seen.roots} of {roots} roots have ended after {self.timeout:g} s,"
                    f" see {self.log}"
                )
            for worker in self.workers:
                if worker.poll() is not None:
                    raise Failed(f"{self.peer.name}: a worker ended with {worker.returncode}, see {self.log}")
            time.sleep(0.002)
        return seen

    def warm_up(self) -> None:
        """Run trivial roots until each worker has run one, has imported everything, and is connected."""
        for number in range(1, WARM_UPS + 1):
            self.start(TRIVIAL, 0)
            seen = self.wait(number)
            if seen.processes >= len(self.workers) and number > WARM_UPS // 4:
                break
            time.sleep(IDLE_SECONDS)

    def fresh_marks(self) -> marks.Marks:
        """What is noted so far; the difference to it is what comes next."""
        return marks.read(self.marks)

    def counters(self) -> Counters:
        return count(self.servers, self.database)


def measure(servers: Servers, peer: Peer, workload: Workload, pool: str, timeout: float) -> Outcome:
    """Measure one workload on one system.

    Raises:
        Failed: It did not end in time, or a process of it ended.
    """
    kinds: dict[str, Callable[[Run, Workload], Outcome]] = {
        "rate": _rate,
        "latency": _latency,
        "wall": _wall,
        "replay": _replay,
    }
    with Run(servers, peer, pool, timeout=timeout) as run:
        return kinds[workload.kind](run, workload)


def _rate(run: Run, workload: Workload) -> Outcome:
    """Enqueue all, then start the workers: from the first body's begin to the last one's end."""
    with _counted(run, workload.roots) as costs:
        run.start(workload.body, workload.size, workload.roots)
        run.start_workers()
        seen = run.wait(workload.roots)
    return Outcome(workload.roots * workload.units / seen.seconds, workload.roots, costs)


@contextmanager
def _counted(run: Run, units: int) -> Iterator[dict[str, float]]:
    """Count what the database does inside, from the first enqueue to the last commit, for each unit of work."""
    costs: dict[str, float] = {}
    before = run.counters()
    yield costs
    # The last body has ended, its commit is still to come.
    time.sleep(0.2)
    run.close_client()
    run.stop_workers()
    wait_until_alone(run.servers, run.database)
    costs.update(run.counters().since(before, units))


def _latency(run: Run, workload: Workload) -> Outcome:
    """One after another on an idle system: from the enqueue call to the last line of the root's body."""
    from benchmarks.results import percentile

    run.start_workers()
    run.warm_up()
    times = []
    for _ in range(workload.roots):
        time.sleep(IDLE_SECONDS)
        ended = run.fresh_marks().roots
        began = run.start(workload.body, workload.size)
        times.append((run.wait(ended + 1).last - began) * 1_000)
    return Outcome(percentile(times, 50), len(times), also={"p95": percentile(times, 95)})


def _wall(run: Run, workload: Workload) -> Outcome:
    """One root on idle workers: from the enqueue call to the last line of its body."""
    run.start_workers()
    run.warm_up()
    ended = run.fresh_marks().roots
    began = run.start(workload.body, workload.size)
    return Outcome(run.wait(ended + 1).last - began, workload.size)


def _replay(run: Run, workload: Workload) -> Outcome:
    """Long parents, always as many of them at once: what one child costs must not grow with their length."""
    run.start_workers()
    run.warm_up()
    time.sleep(0.5)
    ended, before = run.fresh_marks().roots, run.counters()
    began = run.start(workload.body, workload.size, IN_FLIGHT)
    started = IN_FLIGHT
    for done in range(1, workload.roots + 1):
        seen = run.wait(ended + done)
        if started < workload.roots:
            run.start(workload.body, workload.size)
            started += 1
    children = workload.roots * workload.size
    costs = run.counters().since(before, children)
    return Outcome((seen.last - began) / children * 1_000, workload.roots, {"statements": costs["statements"]})
