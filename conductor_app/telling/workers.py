"""Who is at work and on which queues, as workers say themselves and as leases show; in a handful of queries."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Count, F, Min, Q, QuerySet, Window
from django.db.models.functions import RowNumber

from conductor_app.conf import conductor_settings
from conductor_app.models import Attempt, Execution, Worker, database
from conductor_app.models.execution import IS_STOPPED
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.owners import node_name, worker_of

#: Workers that have not been seen for so long are not shown, unless they left leases.
SHOWN_FOR = dt.timedelta(minutes=10)
#: Who writes every ten seconds and has not done so for this many is silent: killed, cut off, or its machine sleeps.
SILENT_SECONDS = 60.0
#: Most workers, and most queues, that are shown.
MOST = 200
#: Most workers that are read, to know who serves what.
MOST_READ = 5_000
#: Of what a worker runs, so many are named.
MOST_RUNS = 5
#: So many queued executions are counted.
MOST_QUEUED = 10_000
#: Runs that ended within so many seconds make the throughput, and of all runs the latest so many.
THROUGHPUT_SECONDS = 300
LATEST_RUNS = 10_000

ALIVE, STOPPING, SILENT = "alive", "stopping", "silent"
SERVED, BUSY, PAUSED, UNSERVED = "served", "busy", "paused", "unserved"
#: In this order they are shown: a person looks for what is wrong among queues, and for who is there among workers.
_WORKER_STATES = (ALIVE, STOPPING, SILENT)
_QUEUE_STATES = (UNSERVED, BUSY, PAUSED, SERVED)


@dataclass(frozen=True)
class Run:
    """What a worker runs."""

    id: uuid.UUID
    task: str
    queue: str


@dataclass
class SeenWorker:
    """One worker."""

    id: str
    name: str
    #: ``alive``, ``stopping`` or ``silent``.
    state: str
    #: Its row; ``None`` if leases alone tell of it: it is older than this page, or no worker but a program that runs
    #: executions itself.
    row: Worker | None
    queues: list[str]
    #: Executions whose lease is valid, the processes that hold them, and those whose lease has lapsed.
    running: int = 0
    processes: int = 0
    lapsed: int = 0
    #: Some of what it runs, the oldest first.
    runs: list[Run] = field(default_factory=list)

    @property
    def slots(self) -> int | None:
        """How many bodies it can run at once; ``None`` if nobody says so."""
        return None if self.row is None else self.row.slots

    @property
    def busy(self) -> int:
        """How many of its slots are taken; a process of a prefork pool may have claimed what it runs next."""
        if self.row is None:
            return self.running
        return min(self.processes if self.row.pool == "prefork" else self.running, self.row.slots)

    @property
    def is_full(self) -> bool:
        """Whether it has no free slot, as far as one can tell."""
        return self.row is None or self.busy >= self.row.slots

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        row = self.row
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state,
            "host": row and row.host,
            "pid": row and row.pid,
            "pool": row and row.pool,
            "slots": self.slots,
            "busy": self.busy,
            "running": self.running,
            "lapsed": self.lapsed,
            "queues": self.queues,
            "versions": row
            and {"conductor_app": row.package, "celery": row.celery, "django": row.django, "python": row.python},
            "release": row and row.release,
            "started_at": row and row.started_at,
            "seen_at": row and row.seen_at,
            "runs": [{"id": str(run.id), "task": run.task, "queue": run.queue} for run in self.runs],
        }


@dataclass
class SeenQueue:
    """One queue."""

    name: str
    #: ``served``, ``busy`` if all slots of its workers are taken and something is due, ``unserved`` without a worker,
    #: and ``paused`` if all that would be due is held, or of paused tasks.
    state: str
    queued: int
    #: Without those.
    due: int
    #: Those that are held, or of paused tasks.
    stopped: int
    oldest_due_at: dt.datetime | None
    running: int
    #: Runs that ended there, each minute.
    per_minute: float
    #: The node names of workers that serve it and do not shut down.
    workers: list[str]

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "queue": self.name,
            "state": self.state,
            "queued": self.queued,
            "due": self.due,
            "stopped": self.stopped,
            "oldest_due_at": self.oldest_due_at,
            "running": self.running,
            "per_minute": self.per_minute,
            "workers": self.workers[:MOST],
        }


@dataclass(frozen=True)
class Attendance:
    """All of them, as of one instant of the database's clock."""

    now: dt.datetime
    workers: list[SeenWorker]
    queues: list[SeenQueue]
    more_workers: int
    more_queues: int
    #: Over how many seconds the throughput was taken: less than ``THROUGHPUT_SECONDS`` if there were very many runs.
    throughput_seconds: float

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "read_at": self.now,
            "workers": [worker.document() for worker in self.workers],
            "more_workers": self.more_workers,
            "queues": [queue.document() for queue in self.queues],
            "more_queues": self.more_queues,
            "queued_are_bounded_at": MOST_QUEUED,
            "throughput_seconds": self.throughput_seconds,
        }


def read(seen: QuerySet[Execution] | None = None) -> Attendance:
    """Read who is there and what waits, in seven queries.

    Args:
        seen: The executions that somebody may see; all by default. Of those who see a part, nobody learns which other
            queues there are, who serves nothing but them, or what runs there.
    """
    rows: Any = Execution.objects.using(database()) if seen is None else seen
    now = clock.read(database())
    workers = _workers(now)
    running = _add_leases(workers, rows)
    queued = _queued(rows)
    _add_runs(workers, rows)
    if seen is not None:
        _narrow(workers, {*running, *queued})
    seconds, ended = _ended(seen, now)
    queues = _queues(workers.values(), running, queued, {name: 60 * runs / seconds for name, runs in ended.items()})
    found = sorted(workers.values(), key=lambda each: (_WORKER_STATES.index(each.state), each.name, each.id))
    more_workers, more_queues = (max(len(every) - MOST, 0) for every in (found, queues))
    return Attendance(now, found[:MOST], queues[:MOST], more_workers, more_queues, seconds)


def alive() -> list[Worker]:
    """Return the rows of workers that are there and do not shut down, in one query."""
    return list(_latest().filter(seen_at__gt=clock.after(-_silence()), is_stopping=False)[:MOST_READ])


def _latest() -> QuerySet[Worker]:
    return Worker.objects.using(database()).order_by("-seen_at")


def _silence() -> float:
    return max(SILENT_SECONDS, 3 * conductor_settings().SWEEP_SECONDS)


def _workers(now: dt.datetime) -> dict[str, SeenWorker]:
    silent_since = now - dt.timedelta(seconds=_silence())
    rows = _latest().filter(seen_at__gt=now - max(SHOWN_FOR, 2 * (now - silent_since)))[:MOST_READ]
    found = {}
    for row in rows:
        state = SILENT if row.seen_at <= silent_since else STOPPING if row.is_stopping else ALIVE
        found[row.pk] = SeenWorker(row.pk, row.name, state, row, row.queue_names())
    return found


def _add_leases(workers: dict[str, SeenWorker], rows: Any) -> dict[str, int]:
    """Add to workers what they run, and those of whom leases alone tell; return what runs in each queue."""
    running = rows.order_by().with_status(ExecutionStatus.RUNNING)
    by_process = running.values("lease_owner", "queue").annotate(
        count=Count("pk"), lapsed=Count("pk", filter=Q(lease_expires_at__lt=clock.now()))
    )
    processes: dict[str, set[str]] = defaultdict(set)
    in_queue: dict[str, int] = defaultdict(int)
    for row in by_process:
        owner, valid = row["lease_owner"], row["count"] - row["lapsed"]
        key = worker_of(owner)
        worker = workers.get(key)
        if worker is None:
            worker = workers[key] = SeenWorker(key, node_name(owner), SILENT, None, [])
        worker.running += valid
        worker.lapsed += row["lapsed"]
        in_queue[row["queue"]] += valid
        if valid:
            processes[key].add(owner)
        if worker.row is None:
            worker.state = ALIVE if worker.running else SILENT
            worker.queues = sorted({*worker.queues, row["queue"]})
    for key, owners in processes.items():
        workers[key].processes = len(owners)
    return in_queue


def _queued(rows: Any) -> dict[str, dict[str, Any]]:
    is_due = Q(due_at__lte=clock.now()) & ~IS_STOPPED
    found = rows.order_by().foremost(MOST_QUEUED).values("queue")
    found = found.annotate(
        queued=Count("pk"),
        due=Count("pk", filter=is_due),
        stopped=Count("pk", filter=IS_STOPPED),
        oldest=Min("due_at", filter=is_due),
    )
    return {row["queue"]: row for row in found}


def _ended(seen: QuerySet[Execution] | None, now: dt.datetime) -> tuple[float, dict[str, int]]:
    """Return in how many seconds how many runs have ended in each queue.

    An attempt has neither a queue of its own nor an index by its end: of the latest ``LATEST_RUNS`` by their ids, the
    executions say the queue. If all of them have ended within ``THROUGHPUT_SECONDS``, the time is theirs.
    """
    rows = Attempt.objects.using(database())
    since = now - dt.timedelta(seconds=THROUGHPUT_SECONDS)
    # On its own: with a subquery in the place of the id, a planner may read the whole table.
    last = rows.order_by("-id").values_list("id", "finished_at")[LATEST_RUNS - 1 : LATEST_RUNS].first()
    if last is not None:
        rows, since = rows.filter(id__gte=last[0]), max(last[1], since)
    if seen is not None:
        rows = rows.filter(execution__in=seen)
    ended = rows.order_by().values("execution__queue").annotate(runs=Count("pk", filter=Q(finished_at__gt=since)))
    found = {row["execution__queue"]: row["runs"] for row in ended if row["execution__queue"] is not None}
    return max((now - since).total_seconds(), 1.0), found


def _add_runs(workers: dict[str, SeenWorker], rows: Any) -> None:
    nth = Window(RowNumber(), partition_by=[F("lease_owner")], order_by=F("id").asc())
    running = rows.order_by().with_status(ExecutionStatus.RUNNING).annotate(nth=nth).filter(nth__lte=MOST_RUNS)
    for row in running.order_by("id").values("id", "task", "queue", "lease_owner")[:MOST_READ]:
        worker = workers.get(worker_of(row["lease_owner"]))
        if worker is not None and len(worker.runs) < MOST_RUNS:
            worker.runs.append(Run(row["id"], row["task"], row["queue"]))


def _narrow(workers: dict[str, SeenWorker], queues: set[str]) -> None:
    for key, worker in list(workers.items()):
        worker.queues = [name for name in worker.queues if name in queues]
        if not (worker.queues or worker.running or worker.lapsed):
            del workers[key]


def _queues(
    workers: Iterable[SeenWorker],
    running: dict[str, int],
    queued: dict[str, dict[str, Any]],
    per_minute: dict[str, float],
) -> list[SeenQueue]:
    serving: dict[str, list[SeenWorker]] = defaultdict(list)
    for worker in workers:
        if worker.state == ALIVE:
            for name in worker.queues:
                serving[name].append(worker)
    found = []
    for name in {*serving, *running, *queued}:
        row = queued.get(name, {"queued": 0, "due": 0, "stopped": 0, "oldest": None})
        state = SERVED if name in serving else UNSERVED
        if row["due"] and state == SERVED and all(worker.is_full for worker in serving[name]):
            state = BUSY
        elif row["stopped"] and not row["due"]:
            state = PAUSED
        names = sorted({worker.name for worker in serving[name]})
        found.append(
            SeenQueue(
                name,
                state,
                row["queued"],
                row["due"],
                row["stopped"],
                row["oldest"],
                running.get(name, 0),
                round(per_minute.get(name, 0.0), 1),
                names,
            )
        )
    return sorted(found, key=lambda queue: (_QUEUE_STATES.index(queue.state), -queue.due, -queue.queued, queue.name))
