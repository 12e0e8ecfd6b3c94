"""What starts by itself: each worker looks after the schedules of the tasks that it has, together with all others."""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import time
from typing import Any

from celery import current_app

from conductor_app.conf import conductor_settings
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, Schedule, database
from conductor_app.store import clock
from conductor_app.store.ids import derive_tick_id
from conductor_app.transitions import NewExecution, scheduling
from conductor_app.transitions.operating import By
from conductor_app.transitions.scheduling import Tick
from conductor_app.values.payloads import dump_options, loads
from conductor_app.values.schedules import CatchUp, Overlap, Plan

logger = logging.getLogger("conductor_app.engine.sweeper")

#: Most ticks that are made up for, and that wait.
MOST_MISSED = 100
#: A tick that is acted on so many seconds after its instant, or more, was missed.
LATE_SECONDS = 60.0
#: How often a worker says that it has a schedule, in seconds; what another one has said counts, too.
SEEN_SECONDS = 60.0
#: A schedule that nobody has said to have for so long, in seconds, has left the code.
ABSENT_SECONDS = 600.0
#: How often a change is tried again that another one has come before.
_TRIES = 5


def planned() -> dict[str, Any]:
    """Return the tasks of this process that have a schedule, by its name."""
    plans = ((getattr(task, "plan", None), task) for task in list(current_app.tasks.values()))
    return {plan.name: task for plan, task in plans if isinstance(plan, Plan)}


class Watch:
    """One sweep's look at the schedules of this process's tasks; without any, it asks the database nothing."""

    def __init__(self) -> None:
        self._tasks = planned()
        self._rows: dict[str, Any] = {}

    def to_do(self, known: list[str]) -> list[str]:
        """Return the names of those with which there is something to do: known ones are locked."""
        if not self._tasks:
            return []
        rows = Schedule.objects.using(database()).filter(name__in=list(self._tasks))
        self._rows = {row.name: row for row in rows.annotate(read_at=clock.now())}
        return sorted(name for name in self._tasks if name not in known and self._has_work(name))

    def _has_work(self, name: str) -> bool:
        row, plan = self._rows.get(name), self._tasks[name].plan
        if row is None or _is_other(row, plan, self._tasks[name].name) or row.absent_at is not None:
            return True
        return _was_seen_long_ago(row, SEEN_SECONDS) or _is_due(row)

    def act(self, name: str) -> int:
        """Do it; return how many executions were started.

        Raises:
            RowsLocked: Somebody has locked the row.
        """
        task, row = self._tasks[name], self._rows.get(name)
        plan: Plan = task.plan
        up = time.monotonic() - plan.read_at
        if row is None:
            scheduling.declare(plan, task.name, up=up)
            return 0
        if _is_other(row, plan, task.name):
            # While two releases are at work, that of the worker that was started last counts.
            if dt.timedelta(seconds=up) < row.read_at - row.declared_at or _was_seen_long_ago(row, 2 * SEEN_SECONDS):
                scheduling.redeclare(row, plan, task.name, up=up)
            return 0
        if row.absent_at is not None:
            scheduling.redeclare(row, plan, task.name, up=up)
            return 0
        if _was_seen_long_ago(row, SEEN_SECONDS):
            scheduling.see(row)
        if not _is_due(row):
            return 0
        found = decide(row, plan, row.read_at)
        if found is None:
            return 0
        started = scheduling.tick(row, found, lambda instant: _new(task, instant))
        if started is None:
            return 0
        if found.note:
            logger.log(logging.WARNING if found.is_missed else logging.INFO, "Schedule %s: %s.", name, found.note)
        return len(started)


def due_in(seconds: float, since: float) -> float | None:
    """Return in how many seconds the next instant of this process's schedules comes, if within so many.

    Args:
        since: What came in the last so many seconds counts, too.
    """
    tasks = planned()
    if not tasks:
        return None
    rows = going_on().filter(name__in=list(tasks), next_at__gt=clock.after(-since), next_at__lte=clock.after(seconds))
    return clock.seconds_to_first(rows, "next_at")


def next_instant(after: dt.datetime | None = None) -> dt.datetime | None:
    """Return the next instant of this process's schedules, later than ``after``; for the test kit."""
    tasks = planned()
    if not tasks:
        return None
    later = {"next_at__isnull": False} if after is None else {"next_at__gt": after}
    rows = going_on().filter(name__in=list(tasks), **later).order_by("next_at")
    found: dt.datetime | None = rows.values_list("next_at", flat=True).first()
    return found


def going_on() -> Any:
    """Return the schedules that nobody has paused."""
    return Schedule.objects.using(database()).filter(paused_at__isnull=True, absent_at__isnull=True)


def note_absence() -> None:
    """Pause the schedules that have left the code, and say so."""
    for name in scheduling.note_absence(ABSENT_SECONDS):
        logger.warning(
            "Schedule %s is paused: for %.0f minutes no worker had it in its code. It goes on when one has.",
            name,
            ABSENT_SECONDS / 60,
        )


def _is_other(row: Schedule, plan: Plan, task: str) -> bool:
    said = (row.task, row.line, row.zone, row.overlap, row.catch_up)
    return said != (task, plan.timetable.line, plan.timetable.zone, plan.overlap, plan.catch_up)


def _was_seen_long_ago(row: Any, seconds: float) -> bool:
    return bool((row.read_at - row.seen_at).total_seconds() > seconds)


def _is_due(row: Any) -> bool:
    return row.paused_at is None and (row.waiting != "" or (row.next_at is not None and row.next_at <= row.read_at))


# ------------------------------------------------------------------------------------------------------------- a tick


class _Turns:
    """The instants that have come, each of which starts, waits, or is left out."""

    def __init__(self, row: Schedule, plan: Plan, *, is_open: bool) -> None:
        self._plan = plan
        self._is_busy = is_open and plan.overlap is not Overlap.ALLOW
        self._open = row.last_execution_id if self._is_busy else None
        self.start: list[dt.datetime] = []
        self.waiting = row.waiting_instants
        self.cancels = False
        self.notes: list[str] = []
        self.is_missed = False

    def begin(self) -> None:
        """Start what has waited, if its turn has come: one, or all that may run beside each other."""
        while self.waiting and not self._is_busy:
            self._start(self.waiting.pop(0))

    def take(self, instant: dt.datetime, *, is_missed: bool = False) -> None:
        """Take one that has come.

        Args:
            is_missed: Whether it is to be made up for, one after the other.
        """
        if not self._is_busy and not self.waiting:
            self._start(instant)
        elif self._plan.overlap is Overlap.REPLACE:
            self.cancels |= self._open is not None
            self._leave_out(self.waiting, f"that of {_said(instant)} has come")
            self.waiting = [instant]
        elif self._may_wait(is_missed=is_missed):
            self.waiting.append(instant)
        elif self.waiting:
            self._leave_out([instant], "one waits already")
        else:
            self._leave_out([instant], "an earlier execution is open")

    def _may_wait(self, *, is_missed: bool) -> bool:
        if is_missed:
            return len(self.waiting) < MOST_MISSED
        return self._plan.overlap is Overlap.QUEUE and not self.waiting

    def _start(self, instant: dt.datetime) -> None:
        self.start.append(instant)
        self._is_busy = self._plan.overlap is not Overlap.ALLOW

    def _leave_out(self, instants: list[dt.datetime], why: str) -> None:
        if instants:
            self.notes.append(f"left out {', '.join(map(_said, instants))}: {why}")

    def result(self, **values: Any) -> Tick:
        """Return what becomes of them all."""
        reason = f'schedule "{self._plan.name}" has come again' if self.cancels else ""
        note = "; ".join(self.notes)
        return Tick(tuple(self.start), tuple(self.waiting), values, reason, note, is_missed=self.is_missed)


def decide(row: Schedule, plan: Plan, now: dt.datetime) -> Tick | None:
    """Return what becomes of a schedule's instants up to ``now``; ``None`` if nothing changes."""
    turns = _Turns(row, plan, is_open=_is_open(row, plan))
    turns.begin()
    if row.next_at is None or row.next_at > now:
        return turns.result() if turns.start else None
    first, until = scheduling.in_zone(row.next_at), scheduling.in_zone(now)
    late = until - dt.timedelta(seconds=max(LATE_SECONDS, 2 * conductor_settings().SWEEP_SECONDS))
    instants, left_out = plan.timetable.latest(first, until, MOST_MISSED)
    missed = [instant for instant in instants if instant < late]
    on_time = instants[len(missed) :]
    if plan.catch_up is CatchUp.ALL:
        kept = missed
    else:
        # At most one after an outage, and none if the next one has come by now.
        kept = missed[-1:] if plan.catch_up is CatchUp.LAST and not on_time else []
        left_out = None if left_out is None else left_out + len(missed) - len(kept)
    if left_out != 0:
        turns.is_missed = True
        number = f"more than {MOST_MISSED}" if left_out is None else str(left_out)
        turns.notes.append(f"left out {number} missed from {_said(first)} on (catch_up={plan.catch_up.value})")
    for instant in kept:
        turns.take(clock.aware(instant), is_missed=plan.catch_up is CatchUp.ALL)
    for instant in on_time:
        turns.take(clock.aware(instant))
    last = clock.aware(instants[-1])
    return turns.result(last_tick_at=last, next_at=scheduling.following(plan.timetable, now))


def _is_open(row: Schedule, plan: Plan) -> bool:
    if row.last_execution_id is None or plan.overlap is Overlap.ALLOW:
        return False
    return Execution.objects.using(database()).filter(pk=row.last_execution_id).open().exists()


def _said(instant: dt.datetime) -> str:
    return scheduling.in_zone(instant).isoformat(timespec="seconds")


def _new(task: Any, instant: dt.datetime) -> NewExecution:
    """Return the execution of an instant."""
    name = task.plan.name
    new: NewExecution = task.new_execution(
        [],
        {},
        {},
        what=f'payload of schedule "{name}"',
        execution_id=derive_tick_id(name, scheduling.in_zone(instant)),
        is_root=True,
    )
    options = {**(loads(new.options) or {}), "schedule": name, "scheduled_at": instant}
    return dataclasses.replace(new, options=dump_options(options))


# --------------------------------------------------------------------------------------------------------- by somebody


def run_now(name: str, by: By) -> Execution | None:
    """Start a schedule's task now, beside its instants, as its overlap says.

    Returns:
        What was started; ``None`` if it waits for the end of what is open.

    Raises:
        Schedule.DoesNotExist: There is none.
        ActionRefused: What it has started last is open, or one waits already; or this process does not have its task.
    """

    def start(row: Schedule) -> tuple[bool, Execution | None]:
        task = _task_of(row)
        now = clock.read(database())
        turns = _Turns(row, task.plan, is_open=_is_open(row, task.plan))
        turns.take(now)
        if not turns.start and now not in turns.waiting:
            raise ActionRefused(
                f'Schedule "{name}" starts nothing beside execution {row.last_execution_id}, which is open '
                f'(overlap="{row.overlap}"). Wait for its end, or cancel it.',
                reason="an earlier execution is open",
            )
        turns.notes.append(f"run now{f' by {by.actor}' if by.actor else ''}{f': {by.reason}' if by.reason else ''}")
        started = scheduling.tick(row, turns.result(), lambda instant: _new(task, instant))
        return started is not None, started[0] if started else None

    for _ in range(_TRIES):
        is_done, execution = start(find(name))
        if is_done:
            return execution
    raise ActionRefused(f'Schedule "{name}" is changing all the time. Try again.', reason="it is changing")


def pause(name: str, by: By) -> bool:
    """Let a schedule start nothing by itself; tell whether nobody had done so before.

    Raises:
        Schedule.DoesNotExist: There is none.
    """
    return scheduling.pause(find(name), by.actor, by.reason)


def unpause(name: str) -> bool:
    """Let a paused schedule go on with the instants that come; tell whether it was paused.

    Raises:
        Schedule.DoesNotExist: There is none.
    """
    return scheduling.unpause(find(name))


def find(name: str) -> Schedule:
    """Return a schedule as it is stored now.

    Raises:
        Schedule.DoesNotExist: There is none.
    """
    found = Schedule.objects.using(database()).filter(name=name).first()
    if found is None:
        raise Schedule.DoesNotExist(f'There is no schedule "{name}". A worker that has it in its code stores it.')
    return found


def _task_of(row: Schedule) -> Any:
    task: Any = current_app.tasks.get(row.task)
    if task is None:
        # A web process has not needed all of its modules so far.
        current_app.loader.import_default_modules()
        task = current_app.tasks.get(row.task)
    if task is None or task.plan is None or task.plan.name != row.name:
        raise ActionRefused(
            f'Schedule "{row.name}" of {row.task} is not in the code of this process, so it cannot be run here.',
            reason="not in the code",
        )
    return task
