"""What takes long: the latest runs by task, and the slowest executions of now."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Max, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from conductor_app.models import Attempt, Execution, Step, database
from conductor_app.states import FAILED_RUNS, FINAL_RUNS, ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.telling.words import seconds_between

#: The latest so many runs are looked through.
LATEST = 10_000
#: Of those that somebody may see, among the latest so many of all.
_LATEST_OF_ALL = 200_000
#: Most tasks, and most executions of each kind, that are told of.
MOST_TASKS, MOST_EXECUTIONS = 50, 15
#: The periods by their names, in seconds.
PERIODS = {"hour": 3_600, "day": 86_400}
#: Of a hundred.
SHARES = (50, 95, 99)


@dataclass
class Durations:
    """The runs of one task: seconds."""

    task: str
    runs: int = 0
    #: Runs that failed or were lost.
    failures: int = 0
    running: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    #: From the creation to the end, of executions that ended.
    whole: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it with the shares of each list in the place of the list."""
        return {
            "task": self.task,
            "runs": self.runs,
            "failures": self.failures,
            "run_seconds": shares(self.running),
            "queue_seconds": shares(self.queued),
            "whole_seconds": shares(self.whole),
        }


def shares(values: Sequence[float]) -> dict[str, float] | None:
    """Return the value that 50, 95 and 99 of a hundred do not exceed; ``None`` without values."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{share}": ordered[max(math.ceil(share / 100 * len(ordered)), 1) - 1] for share in SHARES}


def read(period: str, seen: QuerySet[Execution] | None = None) -> dict[str, Any]:
    """Return, as plain data and in at most five queries, what took long in a period, and what takes long now.

    Args:
        period: A name of ``PERIODS``.
        seen: The executions that may be told of; ``None`` are all.
    """
    now = clock.read(database())
    since = now - dt.timedelta(seconds=PERIODS[period])
    tasks, is_all = _by_task(since, seen)
    slowest = sorted(tasks.values(), key=lambda one: (-sum(one.running), one.task))
    return {
        "read_at": now,
        "period": period,
        "is_complete": is_all,
        "looked_through": LATEST,
        "tasks": [one.as_dict() for one in slowest[:MOST_TASKS]],
        "more_tasks": max(len(slowest) - MOST_TASKS, 0),
        "running": _running(seen),
        "waiting": _waiting(seen),
    }


def _by_task(since: dt.datetime, seen: QuerySet[Execution] | None) -> tuple[dict[str, Durations], bool]:
    rows = Attempt.objects.using(database()).order_by("-id")
    if seen is not None:
        # Who may see few of them does not read the whole table for it.
        last = rows.values_list("id", flat=True).first() or 0
        rows = rows.filter(execution__in=seen, id__gt=last - _LATEST_OF_ALL)
    found = rows.values_list(
        "execution__task", "outcome", "due_at", "started_at", "finished_at", "execution__created_at"
    )[:LATEST]
    tasks: dict[str, Durations] = {}
    number = 0
    is_past = False
    for task, outcome, due, began, ended, created in found:
        number += 1
        if ended < since:
            is_past = True
            break
        one = tasks.setdefault(task, Durations(task))
        one.runs += 1
        one.failures += outcome in FAILED_RUNS
        one.running.append(seconds_between(began, ended))
        one.queued.append(seconds_between(due, began))
        if outcome in FINAL_RUNS:
            one.whole.append(seconds_between(created, ended))
    return tasks, is_past or number < LATEST


def _running(seen: QuerySet[Execution] | None) -> list[dict[str, Any]]:
    rows = _rows(seen).filter(status=ExecutionStatus.RUNNING)
    since = Coalesce("run_started_at", "started_at", "created_at")
    return _told(rows.annotate(since=since).order_by("since", "id"), "lease_owner")


def _waiting(seen: QuerySet[Execution] | None) -> list[dict[str, Any]]:
    """Return those that were created first: they have waited for the longest, in all."""
    last = Attempt.objects.using(database()).filter(execution=OuterRef("pk")).order_by()
    ended = Subquery(last.values("execution").annotate(last=Max("finished_at")).values("last"))
    rows = _rows(seen).filter(status=ExecutionStatus.WAITING).order_by("id")[:MOST_EXECUTIONS]
    # The subquery for those alone that are told of.
    chosen = Execution.objects.using(database()).filter(pk__in=list(rows.values_list("pk", flat=True)))
    pending = Step.objects.using(database()).filter(execution=OuterRef("pk"), status=StepStatus.PENDING).order_by("id")
    told = chosen.annotate(
        since=Coalesce(ended, "started_at", "created_at"), waits_for=Subquery(pending.values("name")[:1])
    )
    return _told(told.order_by("since", "id"), "waits_for")


def _told(rows: QuerySet[Any], *more: str) -> list[dict[str, Any]]:
    return list(rows.values("id", "task", "created_at", "since", *more)[:MOST_EXECUTIONS])


def _rows(seen: QuerySet[Execution] | None) -> QuerySet[Execution]:
    return Execution.objects.using(database()).all() if seen is None else seen.using(database())
