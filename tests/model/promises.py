"""What limits and schedules promise, checked against what the database recorded of runs and not by their own counts."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.utils import timezone

from conductor_app import DurableTask
from conductor_app.models import Attempt, Execution, LimitKey, PausedTask, Place, Schedule
from conductor_app.states import FINAL_STATUSES, ExecutionStatus, LimitKind, PlaceState, RunOutcome
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.values.limits import Limit, limits_of
from conductor_app.values.schedules import CatchUp, Overlap
from tests.app import programs
from tests.support import history
from tests.support.history import Move

#: The limits of programs, by task.
LIMITS: dict[str, tuple[Limit, ...]] = {task.name: limits_of(task) for task in programs.TASKS.values()}


@dataclass(frozen=True)
class _Used:
    """What an execution has of limits, by its history alone."""

    #: Its body runs, or may do so: its worker is taken for dead, and no other run has begun.
    runs: bool
    #: It has begun since it was stored, or since an operator's retry, and has not ended.
    is_begun: bool
    #: Attempts that have started.
    starts: int


def limits_exceeded() -> Iterator[str]:
    """Say of which limit more have a place than it has, or more have started than it lets."""
    used = _used()
    for limit, (rows, _) in used.items():
        held = [row for row, what in rows.items() if (what.runs if limit.kind is LimitKind.RUN else what.is_begun)]
        if limit.kind is not LimitKind.RATE and len(held) > limit.number:
            yield f"{limit} is held by {len(held)}: {held}"
        starts = sum(what.starts for what in rows.values())
        assert limit.kind is not LimitKind.RATE or limit.seconds
        if limit.seconds and starts > limit.number + process.clock_offset.total_seconds() / limit.seconds:
            yield f"{limit}: {starts} have started within {process.clock_offset}"


def stranded() -> Iterator[str]:
    """Say who waits for a place that is free; to be asked when a sweep has just ended, and nothing else goes on."""
    paused = set(PausedTask.objects.values_list("name", flat=True))
    now = clock.read("default")
    for limit, (rows, places) in _used().items():
        may_go_on = {
            row: place
            for row, place in places.items()
            if row.status == ExecutionStatus.QUEUED
            and row.held_at is None
            and row.cancel_requested_at is None
            and row.task not in paused
        }
        waiting = [row for row, place in may_go_on.items() if place.state == PlaceState.PARKED]
        if not waiting:
            continue
        if limit.kind is LimitKind.RATE:
            known = LimitKey.objects.get(limit=limit.name)
            step = dt.timedelta(seconds=limit.seconds or 0)
            # Starts that are handed out may be paid for when they take place.
            granted = sum(place.state == PlaceState.GRANTED for place in places.values())
            is_free = max(known.paid_until or now, now) + (granted + 1 - limit.number) * step <= now
        else:
            taken = {row for row, what in rows.items() if (what.runs if limit.kind is LimitKind.RUN else what.is_begun)}
            taken |= {row for row, place in places.items() if place.state == PlaceState.GRANTED and not row.is_final}
            is_free = len(taken) < limit.number
        if is_free:
            yield f"{limit} has a free place, for which {waiting} wait; places: {list(places.values())}"


def _used() -> dict[Limit, tuple[dict[Execution, _Used], dict[Execution, Place]]]:
    limited = [name for name, limits in LIMITS.items() if limits]
    executions = {row.pk: row for row in Execution.objects.filter(task__in=limited)}
    if not executions:
        return {}
    moves = history.moves()
    lost = set(Attempt.objects.filter(outcome=RunOutcome.LOST).values_list("execution_id", "run"))
    used = {row: _of_history(moves[row.pk], lost) for row in executions.values()}
    places: dict[str, dict[Execution, Place]] = {}
    for place in Place.objects.all():
        if place.execution_id in executions:
            places.setdefault(place.limit, {})[executions[place.execution_id]] = place
    return {
        limit: (
            {row: what for row, what in used.items() if limit in LIMITS[row.task]},
            places.get(limit.name, {}),
        )
        for limit in {limit for name in limited for limit in LIMITS[name]}
    }


def _of_history(moves: list[Move], lost: set[tuple[uuid.UUID, int]]) -> _Used:
    is_begun, opened = False, 0
    starts: set[tuple[int, int]] = set()
    for move in moves:
        opened += move.old_status in FINAL_STATUSES
        if move.status == ExecutionStatus.RUNNING:
            is_begun = True
            starts.add((opened, move.attempt))
        elif move.status in FINAL_STATUSES or move.old_status in FINAL_STATUSES:
            is_begun = False
    last = moves[-1]
    is_lost = (
        (last.old_status, last.status) == (ExecutionStatus.RUNNING, ExecutionStatus.QUEUED)
        and (last.execution_id, last.fence) in lost
    )  # fmt: skip
    return _Used(last.status == ExecutionStatus.RUNNING or is_lost, is_begun, len(starts))


class Ticks:
    """One schedule, watched from step to step."""

    def __init__(self, task: DurableTask[..., Any]) -> None:
        self._task = task
        assert task.plan is not None
        self.plan = task.plan
        #: Whether somebody has paused it: then instants are left out.
        self.was_paused = False
        self._before: tuple[Any, ...] | None = None

    def row(self) -> Schedule | None:
        return Schedule.objects.filter(name=self.plan.name).first()

    def mistakes(self) -> Iterator[str]:
        """Say what is wrong with what it has started so far."""
        row = self.row()
        if row is None:
            return
        executions = list(Execution.objects.filter(task=self._task.name, parent=None))
        instants = Counter(execution.get_options().get("scheduled_at") for execution in executions)
        ticks = sorted(instant for instant in instants if instant is not None and _is_of_line(instant))
        for instant, number in instants.items():
            if instant is not None and number > 1:
                yield f"The tick of {instant} was started {number} times"
        if ticks and (row.last_tick_at is None or row.last_tick_at < ticks[-1]):
            yield f"The tick of {ticks[-1]} was started, and the last one is {row.last_tick_at}"
        yield from self._beside_each_other(executions)
        if row.paused_at is not None:
            self.was_paused = True
            now = (row.paused_at, row.last_tick_at, tuple(ticks))
            if self._before is not None and self._before[0] == row.paused_at and self._before != now:
                yield f"It has ticked while it was paused: {self._before}, then {now}"
            self._before = now
        else:
            self._before = None
        if (self.plan.overlap, self.plan.catch_up) == (Overlap.ALLOW, CatchUp.ALL) and not self.was_paused and ticks:
            missing = [instant for instant in _minutes(ticks[0], row.last_tick_at) if instant not in instants]
            if missing:
                yield f"The ticks of {missing} were never started"

    def _beside_each_other(self, executions: list[Execution]) -> Iterator[str]:
        if self.plan.overlap is Overlap.ALLOW:
            return
        open_ones = [row for row in executions if not row.is_final]
        if len(open_ones) > 1:
            # An operator may run one again that has ended, beside the next one.
            moves = history.moves()
            is_again = {row for row in open_ones if any(move.old_status in FINAL_STATUSES for move in moves[row.pk])}
            if len(open_ones) - len(is_again) > 1:
                yield f"{open_ones} are open beside each other, and overlap is {self.plan.overlap}"


def _is_of_line(instant: dt.datetime) -> bool:
    return (instant.second, instant.microsecond) == (0, 0)


def _minutes(first: dt.datetime, last: dt.datetime | None) -> Iterator[dt.datetime]:
    while last is not None and first <= last:
        yield first
        first += dt.timedelta(minutes=1)


def seconds_to_next(row: Schedule) -> float:
    """Return in how many seconds the next instant of a schedule comes, or how long ago it was."""
    assert row.next_at is not None
    now = clock.read("default")
    return (_aware(row.next_at) - _aware(now)).total_seconds()


def _aware(instant: dt.datetime) -> dt.datetime:
    return timezone.make_aware(instant, dt.UTC) if timezone.is_naive(instant) else instant
