"""How a schedule stands."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Schedule, database
from conductor_app.store import clock
from conductor_app.telling.words import clean, instant, since

#: A schedule is late if its instant came so many seconds ago, and nobody has acted on it.
OVERDUE_SECONDS = 120.0

GOES_ON, PAUSED, ABSENT, OVERDUE, ENDED = "goes on", "paused", "left the code", "overdue", "ended"


def overdue() -> QuerySet[Schedule]:
    """Return the schedules whose instant has come, and on which nobody acts; the one first that waits longest."""
    rows = Schedule.objects.using(database()).filter(paused_at__isnull=True, absent_at__isnull=True)
    return rows.filter(next_at__lt=clock.after(-OVERDUE_SECONDS)).order_by("next_at")


def state(row: Schedule, now: dt.datetime) -> str:
    """Return how it stands, in one word for programs."""
    if row.absent_at is not None:
        return ABSENT
    if row.paused_at is not None:
        return PAUSED
    if row.next_at is None:
        return ENDED
    return OVERDUE if (now - row.next_at).total_seconds() > OVERDUE_SECONDS else GOES_ON


def sentence(row: Schedule, now: dt.datetime) -> str:
    """Return how it stands, and why."""
    found = state(row, now)
    if found == ABSENT:
        return _("paused: no worker's code has had it for %(time)s") % {"time": since(row.absent_at or now, now)}
    if found == PAUSED:
        time = since(row.paused_at or now, now)
        said = _("paused for %(time)s") % {"time": time}
        if row.paused_by:
            said = _("paused for %(time)s by %(actor)s") % {"time": time, "actor": clean(row.paused_by)}
        return f"{said}: {clean(row.pause_reason)}" if row.pause_reason else said
    if found == ENDED:
        return _("no instant comes any more")
    if found == OVERDUE:
        return _("overdue for %(time)s: does a worker have its task?") % {"time": since(row.next_at or now, now)}
    if row.waiting:
        return _("waits for the end of its last execution")
    return _("goes on")


def following(row: Schedule, now: dt.datetime) -> str:
    """Return its next instant; empty if it comes to none."""
    return "" if row.next_at is None or row.is_paused else instant(row.next_at, now)


def document(row: Schedule, now: dt.datetime) -> dict[str, Any]:
    """Return a schedule as plain data."""
    return {
        "name": row.name,
        "task": row.task,
        "line": row.line,
        "zone": row.zone,
        "overlap": row.overlap,
        "catch_up": row.catch_up,
        "state": state(row, now),
        "next_at": row.next_at,
        "paused_at": row.paused_at,
        "paused_by": row.paused_by,
        "pause_reason": row.pause_reason,
        "absent_at": row.absent_at,
        "last_tick_at": row.last_tick_at,
        "last_execution": row.last_execution_id,
        "waiting": row.waiting_instants,
        "note": row.note,
        "seen_at": row.seen_at,
    }
