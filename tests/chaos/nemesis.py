"""Everything that happens to the stack. One seed, one schedule; every act is logged, and healed in the end."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from kombu.exceptions import OperationalError

from conductor_app.tasks.task import DurableTask
from project.celery import app
from tests.chaos.stack import Servers, Workers
from tests.support.messages import ring
from tests.support.worker import Worker

#: How long a zombie sleeps, in seconds: two leases.
FROZEN_SECONDS = 6.0
#: How soon an act that found nothing to disturb is tried again.
RETRY_SECONDS = 0.3
#: How many commits lose their answer, of 1.
CUT_COMMITS = 0.02
KILLS = ("kill_process", "kill_worker")

#: Seconds between two acts of a kind, from and to. A worker needs some 5 s to be replaced on two cores, and an outage
#: costs everybody 10 s: with more of them, nothing is left to be disturbed.
SCHEDULE = {
    "kill_process": (1.3, 2.3),
    "kill_worker": (9, 14),
    "freeze": (12, 18),
    "end_session": (2, 3),
    "ring_again": (3, 5),
    "shift_lease": (3, 5),
    "restart_warmly": (25, 35),
    "empty_broker": (20, 30),
    "crash_broker": (60, 150),
    "refuse_broker": (60, 150),
    "silence_broker": (60, 150),
    "crash_database": (60, 150),
    "refuse_database": (60, 150),
    "silence_database": (60, 150),
    "abandon_database": (60, 150),
}


@dataclass
class Act:
    """One thing that was done."""

    name: str
    #: Seconds since 1970, as the database's clock, which is the same machine's.
    at: float
    target: str = ""
    #: When it was healed, if it lasts.
    until: float | None = None
    #: Runs whose process it killed or froze, or whose lease it moved: execution and fence.
    victims: list[tuple[uuid.UUID, int]] = field(default_factory=list)


class Nemesis:
    """Chooses and does what is due, and undoes it when it is time; call ``tick`` often, from the main thread."""

    def __init__(self, servers: Servers, workers: Workers, seed: int) -> None:
        self._servers, self._workers = servers, workers
        self._dice = random.Random(seed)
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._heals: list[tuple[float, int, Act, Callable[[], None]]] = []
        #: What is being done to a server now, so that nothing else is.
        self._busy: set[str] = set()
        self.log: list[Act] = []

    def begin(self) -> None:
        """Let it come."""
        self._servers.database_proxy.cut_commits = CUT_COMMITS
        for name in SCHEDULE:
            self._plan(name)

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._workers.look_after()
        while self._heals and self._heals[0][0] <= now:
            self._heal(heapq.heappop(self._heals))
        while self._agenda and self._agenda[0][0] <= now:
            heapq.heappop(self._agenda)[2]()

    def end(self) -> None:
        """Do nothing more, and undo all that lasts."""
        self._agenda.clear()
        self._servers.database_proxy.cut_commits = 0.0
        while self._heals:
            self._heal(heapq.heappop(self._heals))

    @property
    def counts(self) -> Counter[str]:
        """How often each act was done."""
        return Counter(act.name for act in self.log)

    @property
    def kills(self) -> int:
        return sum(self.counts[name] for name in KILLS)

    def outages(self) -> Iterator[tuple[float, float]]:
        """When the database was away."""
        for act in self.log:
            if act.name.endswith("_database"):
                yield act.at, act.until or time.time()

    def save(self, path: Path) -> None:
        """Write the log, one act a line."""
        path.write_text("".join(json.dumps(asdict(act), default=str) + "\n" for act in self.log))

    # When

    def _plan(self, name: str, seconds: float | None = None) -> None:
        act: Callable[[], None] = getattr(self, f"_{name}")

        def act_and_plan() -> None:
            before = len(self.log)
            act()
            # Nothing was there to be disturbed, so soon again.
            self._plan(name, None if len(self.log) > before else RETRY_SECONDS)

        at = time.monotonic() + (self._dice.uniform(*SCHEDULE[name]) if seconds is None else seconds)
        heapq.heappush(self._agenda, (at, next(self._numbers), act_and_plan))

    def _done(self, name: str, target: str = "") -> Act:
        self.log.append(Act(name, time.time(), target))
        return self.log[-1]

    def _last(self, act: Act, seconds: float, heal: Callable[[], None]) -> None:
        heapq.heappush(self._heals, (time.monotonic() + seconds, next(self._numbers), act, heal))

    @staticmethod
    def _heal(due: tuple[float, int, Act, Callable[[], None]]) -> None:
        _at, _number, act, heal = due
        heal()
        act.until = time.time()

    # Workers

    def _kill_process(self) -> None:
        if (worker := self._any("prefork")) and (pids := worker.pool_pids()):
            pid = self._dice.choice(pids)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            act = self._done("kill_process", f"{worker.name}/{pid}")
            act.victims = self._runs(f"%/{pid}")

    def _kill_worker(self) -> None:
        # Also one that is frozen: a machine that hangs is switched off.
        worker = self._dice.choice([worker for worker in self._workers.all if worker.is_alive] or [None])
        if worker:
            worker.kill()
            act = self._done("kill_worker", worker.name)
            act.victims = self._runs(f"{worker.name}@%")

    def _freeze(self) -> None:
        if worker := self._any():
            pids = worker.pool_pids() if worker.pool == "prefork" else []
            if not pids or self._dice.random() < 0.5:
                pids.append(worker.pid)
            self._workers.freeze(worker, pids)
            act = self._done("freeze", f"{worker.name}/{pids}")
            act.victims = [run for pid in pids for run in self._runs(f"%/{pid}")]
            self._last(act, FROZEN_SECONDS, lambda: self._workers.thaw(worker))

    def _restart_warmly(self) -> None:
        if worker := self._any():
            worker.signal(signal.SIGTERM)
            self._done("restart_warmly", worker.name)

    def _any(self, *pools: str) -> Worker | None:
        awake = self._workers.awake(*pools)
        return self._dice.choice(awake) if awake else None

    # Rows

    def _runs(self, owner: str) -> list[tuple[uuid.UUID, int]]:
        statement = "SELECT id, fence FROM conductor_app_execution WHERE status = 'running' AND lease_owner LIKE %s"
        with suppress(psycopg.Error), self._database() as database:
            return list(database.execute(statement, [owner]).fetchall())
        return []

    def _shift_lease(self) -> None:
        """As if the database's clock had been put an hour forward or back, and right again after a while."""
        hours = self._dice.choice([-1, 1])
        statement = (
            "UPDATE conductor_app_execution SET lease_expires_at = lease_expires_at + %s * interval '1 hour' "
            "WHERE id = (SELECT id FROM conductor_app_execution WHERE status = 'running' "
            "ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED) AND status = 'running' RETURNING id, fence"
        )
        with suppress(psycopg.Error), self._database() as database:
            for run in database.execute(statement, [hours]).fetchall():
                act = self._done("shift_lease", f"{run[0]} {hours:+}h")
                act.victims = [run]
                self._last(act, FROZEN_SECONDS, self._put_leases_right)

    def _put_leases_right(self) -> None:
        statement = (
            "UPDATE conductor_app_execution SET lease_expires_at = lease_expires_at - interval '1 hour' "
            "WHERE status = 'running' AND lease_expires_at > clock_timestamp() + interval '30 minutes'"
        )
        try:
            with self._database() as database:
                database.execute(statement)
        except psycopg.Error:  # it is just being restarted
            self._last(Act("put_leases_right", time.time()), 1, self._put_leases_right)

    def _end_session(self) -> None:
        statement = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = (SELECT pid FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1)"
        )
        with suppress(psycopg.Error), self._database() as database:
            if database.execute(statement).fetchall():
                self._done("end_session")

    def _crash_database(self) -> None:
        with self._disturbed("database") as is_mine:
            if is_mine:
                act = self._done("crash_database")
                self._servers.postgres.crash()
                self._servers.postgres.start()
                act.until = time.time()

    def _database(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._servers.postgres.url, autocommit=True, connect_timeout=2)

    # Messages

    def _ring_again(self) -> None:
        """Ring for executions of any status, and for one that is not there; each twice."""
        statement = "SELECT id, task FROM conductor_app_execution ORDER BY random() LIMIT 3"
        with suppress(psycopg.Error, OperationalError), self._database() as database:
            known = database.execute(statement).fetchall()
            # A plain task that nobody's child is would just run, without its arguments.
            durable = [task for _, task in known if isinstance(app.tasks[task], DurableTask)]
            forged = [(uuid.UUID(int=self._dice.getrandbits(128)), task) for task in durable[:1]]
            with app.connection_for_write(self._servers.broker.url) as broker:
                for key, task in [*known, *forged]:
                    ring(key, app.tasks[task], 2, app.conf.task_default_queue, broker)
            self._done("ring_again", f"{len(known)} known, {len(forged)} not")

    def _empty_broker(self) -> None:
        if "broker" not in self._busy:
            self._servers.broker.empty()
            self._done("empty_broker")

    def _crash_broker(self) -> None:
        with self._disturbed("broker") as is_mine:
            if is_mine:
                act = self._done("crash_broker")
                self._servers.broker_proxy.close()
                self._servers.broker.crash()
                self._servers.broker.start()
                self._servers.broker_proxy.open()
                act.until = time.time()

    # Networks

    def _refuse_database(self) -> None:
        proxy = self._servers.database_proxy
        self._disturb("refuse_database", proxy.close, proxy.open)

    def _refuse_broker(self) -> None:
        proxy = self._servers.broker_proxy
        self._disturb("refuse_broker", proxy.close, proxy.open)

    def _silence_database(self) -> None:
        proxy = self._servers.database_proxy
        self._disturb("silence_database", proxy.silence, proxy.speak)

    def _abandon_database(self) -> None:
        """As if the address were another host's by now: who has a connection hears nothing more on it."""
        self._disturb("abandon_database", self._servers.database_proxy.abandon, lambda: None)

    def _silence_broker(self) -> None:
        proxy = self._servers.broker_proxy
        self._disturb("silence_broker", proxy.silence, proxy.speak)

    def _disturb(self, name: str, act: Callable[[], None], heal: Callable[[], None]) -> None:
        server = name.partition("_")[2]
        if server in self._busy:
            return
        self._busy.add(server)
        act()

        def undo() -> None:
            heal()
            self._busy.discard(server)

        self._last(self._done(name), self._dice.uniform(1, 5), undo)

    @contextmanager
    def _disturbed(self, server: str) -> Iterator[bool]:
        """Keep others from a server for as long as the block lasts; says whether somebody else does so already."""
        if server in self._busy:
            yield False
            return
        self._busy.add(server)
        yield True
        self._busy.discard(server)
