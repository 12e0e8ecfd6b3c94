"""The figures of the overview, read in a handful of bounded queries: what is open, late, has ended and fails."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.exceptions import EmptyResultSet
from django.db.models import Case, Count, DateTimeField, F, Max, Min, Q, QuerySet, TextField, Value, When
from django.db.models.functions import Coalesce, TruncMinute

from conductor_app.admin import causes
from conductor_app.admin.grouping import as_stored, grouped
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.models.execution import IS_STOPPED
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.owners import node_name
from conductor_app.store.statements import Literal
from conductor_app.telling import stops
from conductor_app.telling.queues import UNANSWERED_SECONDS
from conductor_app.transitions import kinds

CACHE_KEY = "conductor_app.overview"
#: The latest so many executions are looked through for what has ended.
LATEST = 50_000
#: Of queued and of waiting executions, so many are looked at.
MOST_OPEN = 10_000
MINUTES = 60
LONG_WAIT = dt.timedelta(hours=1)
MOST_WORKERS = 50
MOST_QUEUES = 50


@dataclass(frozen=True)
class Sight:
    """What somebody may see."""

    #: The executions, and the failures; ``None`` are all.
    executions: QuerySet[Execution] | None = None
    failures: QuerySet[FailedExecution] | None = None
    with_messages: bool = True

    @property
    def key(self) -> str:
        """The name of what is seen in the cache: people share it who see the same."""
        seen = repr([self.with_messages, _as_text(self.executions), _as_text(self.failures)])
        return f"{CACHE_KEY}:{database()}:{hashlib.sha256(seen.encode()).hexdigest()}"


def _as_text(rows: QuerySet[Any] | None) -> Any:
    try:
        return None if rows is None else rows.query.sql_with_params()
    except EmptyResultSet:
        return "nothing"


def read(sight: Sight) -> dict[str, Any]:
    """Read everything that the page shows to somebody, as plain data, in six queries."""
    waiting = _waiting(sight)
    now = waiting["now"]
    queues, workers = _open(sight)
    ended, by_minute, is_all = _ended(sight, now)
    queued = sum(queue["queued"] for queue in queues)
    due = [queue["oldest_due_at"] for queue in queues if queue["oldest_due_at"] is not None]
    overdue = {
        "message": _earliest(queue["next_message_at"] for queue in queues),
        "lease": _earliest(worker["first_lease_ends_at"] for worker in workers),
        "step": waiting["first_deadline_at"],
    }
    return {
        "read_at": now,
        "open": {
            "queued": queued,
            "running": sum(worker["running"] for worker in workers),
            "waiting": waiting["count"],
        },
        "open_are_bounded_at": MOST_OPEN,
        "oldest_queued_at": min(due, default=None),
        "held": stops.held(sight.executions)[: MOST_OPEN + 1].count(),
        "paused_tasks": [paused.document() for paused in stops.read_paused(sight.executions)],
        "waiting_longer_than_an_hour": waiting["long"],
        "longest_waiting_since": waiting["since"],
        "ended_in_the_last_hour": ended,
        "ended_by_minute": by_minute,
        "ended_is_complete": is_all,
        "failures": [
            {
                "cause": group.cause,
                "error_class": group.error_class,
                "message": group.sample if sight.with_messages else None,
                "count": group.count,
                "tasks": sorted(group.tasks),
                "first_at": group.first_at,
                "last_at": group.last_at,
            }
            for group in causes.groups(sight.failures, with_messages=sight.with_messages)
        ],
        "workers": workers[:MOST_WORKERS],
        "queues": queues[:MOST_QUEUES],
        "overdue": {name: instant for name, instant in overdue.items() if instant is not None and instant < now},
    }


def _executions(sight: Sight) -> Any:
    return Execution.objects.using(database()) if sight.executions is None else sight.executions


def _waiting(sight: Sight) -> dict[str, Any]:
    """Look at the awaited steps with the earliest deadlines: an execution waits for one at a time."""
    awaited = Step.objects.using(database()).filter(status=Literal(StepStatus.PENDING.value))
    # A step of a cancelled execution is undecided until its child has ended, and nobody waits for it.
    awaited = awaited.filter(execution__status=ExecutionStatus.WAITING)
    if sight.executions is not None:
        awaited = awaited.filter(execution__in=sight.executions.values("pk"))
    beside = kinds.those(lambda kind: not kind.suspends)
    awaited = awaited.exclude(kind__in=beside).order_by(F("deadline_at").asc(nulls_last=True))
    nothing = Max(Case(When(pk__isnull=True, then=F("created_at"))))
    found: dict[str, Any] = awaited[: MOST_OPEN + 1].aggregate(
        count=Count("pk"),
        long=Count("pk", filter=Q(created_at__lt=clock.after(-LONG_WAIT))),
        since=Min("created_at"),
        first_deadline_at=Min("deadline_at"),
        # The database's clock, whether or not anything waits.
        now=Coalesce(nothing, clock.now(), output_field=DateTimeField()),
    )
    if found["now"] is None:  # somebody may see nothing, so the database was not asked
        found["now"] = clock.read(database())
    return found


def _open(sight: Sight) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Look at queued executions by queue and at running ones by process: one query, two partial indexes."""
    rows = _executions(sight).order_by()
    queued = rows.foremost(MOST_OPEN)
    unanswered = Q(due_at__lte=clock.after(-UNANSWERED_SECONDS)) & ~IS_STOPPED
    by_queue = queued.values(group=Value("queued", output_field=TextField()), name=F("queue"), of=F("queue")).annotate(
        count=Count("pk"),
        late=Count("pk", filter=unanswered),
        first=Min("due_at", filter=Q(due_at__lte=clock.now()) & ~IS_STOPPED),
        next=Min("dispatch_at", filter=~IS_STOPPED),
    )
    running = rows.with_status(ExecutionStatus.RUNNING)
    by_process = running.values(
        group=Value("running", output_field=TextField()), name=F("lease_owner"), of=F("queue")
    ).annotate(
        count=Count("pk"),
        late=Count("pk", filter=Q(lease_expires_at__lt=clock.now())),
        first=Min("lease_expires_at"),
        next=Max("lease_expires_at"),
    )
    queues: list[dict[str, Any]] = []
    processes: list[dict[str, Any]] = []
    for row in by_queue.union(by_process, all=True).order_by():
        (queues if row["group"] == "queued" else processes).append(dict(row))
    at_work: Counter[str] = Counter()
    for row in processes:
        at_work[row["of"]] += row["count"] - row["late"]
    return (
        sorted(
            (
                {
                    "queue": row["name"],
                    "queued": row["count"],
                    "unanswered": row["late"],
                    "running": at_work[row["name"]],
                    "oldest_due_at": as_stored(row["first"]),
                    "next_message_at": as_stored(row["next"]),
                }
                for row in queues
            ),
            key=lambda queue: (-queue["unanswered"], -queue["queued"], queue["queue"]),
        ),
        _by_worker(processes),
    )


def _by_worker(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the processes of each worker; a heartbeat moves a lease to ``LEASE_SECONDS`` from then."""
    lease = dt.timedelta(seconds=conductor_settings().LEASE_SECONDS)
    found: dict[str, dict[str, Any]] = {}
    for row in processes:
        first, last = as_stored(row["first"]), as_stored(row["next"])
        worker = found.setdefault(
            node_name(row["name"]),
            {
                "worker": node_name(row["name"]),
                "running": 0,
                "lapsed": 0,
                "last_heartbeat_at": last - lease,
                "first_lease_ends_at": first,
            },
        )
        worker["running"] += row["count"]
        worker["lapsed"] += row["late"]
        worker["last_heartbeat_at"] = max(worker["last_heartbeat_at"], last - lease)
        worker["first_lease_ends_at"] = min(worker["first_lease_ends_at"], first)
    return sorted(found.values(), key=lambda worker: worker["worker"])


def _ended(sight: Sight, now: dt.datetime) -> tuple[dict[str, int], list[dict[str, Any]], bool]:
    """Count what has ended in the last hour by status and minute, among the latest executions."""
    since = now.replace(second=0, microsecond=0) - dt.timedelta(minutes=MINUTES - 1)
    minute_of = TruncMinute("finished_at", tzinfo=dt.UTC if settings.USE_TZ else None)
    latest = _executions(sight).order_by("-id")
    latest = latest.annotate(minute=Case(When(finished_at__gte=since, then=minute_of)))
    counted = grouped(latest.values("status", "minute")[:LATEST], ["status", "minute"])
    ended: Counter[str] = Counter({"succeeded": 0, "failed": 0, "cancelled": 0})
    minutes = [since + dt.timedelta(minutes=number) for number in range(MINUTES)]
    by_minute: dict[dt.datetime, Counter[str]] = {minute: Counter() for minute in minutes}
    seen = 0
    for status, instant, count in counted:
        seen += count
        minute = as_stored(instant)
        if minute in by_minute:
            ended[status] += count
            by_minute[minute][status] += count
    listed = [{"minute": minute, **{status: found[status] for status in ended}} for minute, found in by_minute.items()]
    return dict(ended), listed, seen < LATEST


def _earliest(instants: Iterable[dt.datetime | None]) -> dt.datetime | None:
    return min((instant for instant in instants if instant is not None), default=None)
