"""Schedules: what they are, who has paused them, and their ticks. The only writer of the table ``Schedule``.

A tick and what it starts are one transaction, which changes nothing unless the row is as it was read. What it starts
has an id that follows from the schedule's name and the instant, so that even a row that was put back starts nothing
twice.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from conductor_app.models import Execution, Schedule, database
from conductor_app.store import clock
from conductor_app.store.locks import is_background, leave_if_locked, locked
from conductor_app.transitions import cancelling, creating, guards
from conductor_app.transitions.creating import NewExecution
from conductor_app.values.payloads import dumps
from conductor_app.values.schedules import Plan
from conductor_app.values.texts import clean_text
from conductor_app.values.timetables import Timetable

#: Bytes of a reason and of a note that are kept.
_TEXT_BYTES = 1_000


@dataclass(frozen=True)
class Tick:
    """What becomes of a schedule's instants that have come."""

    #: Those that are acted on now; an execution is started for each.
    start: Sequence[dt.datetime] = ()
    #: Those whose turn comes when the last execution has ended.
    waiting: Sequence[dt.datetime] = ()
    #: What else changes of the row.
    values: dict[str, Any] = field(default_factory=dict)
    #: Why the last execution is to be cancelled; empty if it is not.
    cancel: str = ""
    #: What was left out, or waits.
    note: str = ""
    #: Whether that is about instants at whose time no worker was there.
    is_missed: bool = False


def declare(plan: Plan, task: str, *, up: float) -> bool:
    """Store the row of a schedule that is new; its first instant is still to come.

    Args:
        plan: As the code says it.
        task: The task's name.
        up: How many seconds ago this process has read that code.

    Returns:
        Whether it was stored; not if another worker has just done so.
    """

    def work() -> bool:
        try:
            with transaction.atomic(using=database()):
                Schedule.objects.using(database()).create(
                    name=plan.name, **_said(plan, task, up), next_at=_next(plan.timetable, None)
                )
        except IntegrityError:
            return False
        return True

    return guards.persist_briefly(work)


def redeclare(row: Schedule, plan: Plan, task: str, *, up: float) -> bool:
    """Write what the code says of a schedule now; if its instants are others, the next one is found anew.

    Returns:
        Whether this call has.
    """
    values = _said(plan, task, up)
    if row.absent_at is not None or (row.line, row.zone) != (plan.timetable.line, plan.timetable.zone):
        values["next_at"] = _next(plan.timetable, row.last_tick_at)
    return _change(row, absent_at=None, **values)


def see(row: Schedule) -> bool:
    """Say that a worker has a schedule in its code, just as the row says."""
    return _write(Schedule.objects.using(database()).filter(pk=row.pk, version=row.version), seen_at=clock.now())


def note_absence(seconds: float) -> list[str]:
    """Pause the schedules that no worker has said to have for so long; return their names.

    Raises:
        RowsLocked: Somebody has locked one.
    """
    using = database()
    rows = Schedule.objects.using(using).filter(seen_at__lt=clock.after(-seconds), absent_at__isnull=True)
    gone = list(rows)
    return [row.name for row in gone if _write(rows.filter(pk=row.pk), absent_at=clock.now(), version=F("version") + 1)]


def _said(plan: Plan, task: str, up: float) -> dict[str, Any]:
    return {
        "task": task,
        "line": plan.timetable.line,
        "zone": plan.timetable.zone,
        "overlap": plan.overlap.value,
        "catch_up": plan.catch_up.value,
        "seen_at": clock.now(),
        "declared_at": clock.after(-up),
    }


# --------------------------------------------------------------------------------------------------------------- pauses


def pause(row: Schedule, actor: str, reason: str) -> bool:
    """Let a schedule start nothing by itself; tell whether nobody had done so before."""
    rows = Schedule.objects.using(database()).filter(pk=row.pk, paused_at__isnull=True)
    return _write(
        rows,
        paused_at=clock.now(),
        paused_by=actor,
        pause_reason=clean_text(reason, _TEXT_BYTES),
        version=F("version") + 1,
    )


def unpause(row: Schedule) -> bool:
    """Let a paused schedule go on with the instants that come; tell whether it was paused.

    What came meanwhile is left out, whatever it does after an outage: it was to be so.
    """
    rows = Schedule.objects.using(database()).filter(pk=row.pk, paused_at__isnull=False)
    return _write(
        rows,
        paused_at=None,
        paused_by="",
        pause_reason="",
        next_at=_next(Timetable(row.line, row.zone), row.last_tick_at),
        version=F("version") + 1,
    )


# ---------------------------------------------------------------------------------------------------------------- ticks


def tick(row: Schedule, found: Tick, new: Callable[[dt.datetime], NewExecution]) -> list[Execution] | None:
    """Move a schedule on, and start what is to be started for its instants, in one transaction.

    Args:
        row: As it was read; if it has changed since, nothing is done.
        found: What becomes of its instants.
        new: Returns the execution of an instant, with the id that follows from it.

    Returns:
        What was started; ``None`` if the row had changed, or another sweeper has it in its hands.

    Raises:
        RowsLocked: Somebody has locked the execution that is to be cancelled.
    """
    # Whatever is wrong with one of them is to be known before anything is written.
    begun = [new(instant) for instant in found.start]
    values: dict[str, Any] = {
        **found.values,
        "waiting": dumps(list(found.waiting), "waiting instants") if found.waiting else "",
        "note": clean_text(found.note, _TEXT_BYTES),
    }
    if begun:
        values["last_execution_id"] = begun[-1].id

    def work() -> list[Execution] | None:
        with transaction.atomic(using=database()):
            # A sweeper leaves it to the one that has it: if that one dies, the next sweep finds it as it was. Somebody
            # who runs it now waits, and then finds another row.
            if locked(_current(row), skip=is_background()).first() is None:
                return None
            _current(row).update(**values, version=F("version") + 1)
            if found.cancel and row.last_execution_id is not None:
                cancelling.flag(row.last_execution_id, found.cancel)
            made = [creating.create(one) for one in begun]
        return [execution for execution, is_new in made if is_new]

    return guards.persist_briefly(work)


def _current(row: Schedule) -> Any:
    return Schedule.objects.using(database()).filter(pk=row.pk, version=row.version)


def _change(row: Schedule, **values: Any) -> bool:
    return _write(_current(row), **values, version=F("version") + 1)


def _write(rows: Any, **values: Any) -> bool:
    leave_if_locked(rows)
    return bool(guards.persist_briefly(lambda: rows.update(**values)))


def stored(instant: dt.datetime | None) -> dt.datetime | None:
    """Return an instant as Django stores it."""
    return None if instant is None else clock.aware(instant)


def in_zone(instant: dt.datetime) -> dt.datetime:
    """Return a stored instant as an aware one."""
    return timezone.make_aware(instant) if timezone.is_naive(instant) else instant


def following(timetable: Timetable, instant: dt.datetime) -> dt.datetime | None:
    """Return the first instant of a timetable after a stored one, as Django stores it."""
    found = timetable.after(in_zone(instant))
    # Without time zones the second of two equal hours looks as if it came before the first one's end.
    while found is not None and clock.aware(found) <= instant:
        found = timetable.after(found)
    return stored(found)


def _next(timetable: Timetable, last: dt.datetime | None) -> dt.datetime | None:
    """Return the next instant after now, and after the last one that was acted on: the clock may have been set back."""
    now = clock.read(database())
    return following(timetable, now if last is None else max(now, last))
