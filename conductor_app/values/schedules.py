"""What ``@durable_task(cron=…)`` says: when a task is started by itself, and what becomes of what comes in between."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from django.conf import settings

from conductor_app.exceptions import InvalidArgument
from conductor_app.values.texts import shown
from conductor_app.values.timetables import Timetable, check_line, check_zone

E = TypeVar("E", bound=StrEnum)

#: The decorator's options that are about a schedule.
OPTIONS = ("cron", "tz", "overlap", "catch_up", "schedule")
_NAME_LENGTH = 255


class Overlap(StrEnum):
    """What becomes of a tick while the execution of an earlier one is open."""

    #: It is left out.
    SKIP = "skip"
    #: It waits for that one's end; of several, the first.
    QUEUE = "queue"
    #: It starts beside that one.
    ALLOW = "allow"
    #: That one is cancelled, and it starts when that one has ended; of several, the last.
    REPLACE = "replace"


class CatchUp(StrEnum):
    """What becomes of ticks at whose time no worker was there."""

    NONE = "none"
    #: Of all of them, the last one starts.
    LAST = "last"
    #: All start, up to a hundred.
    ALL = "all"


@dataclass(frozen=True)
class Plan:
    """The schedule of a task, as the code says it."""

    name: str
    timetable: Timetable
    overlap: Overlap = Overlap.SKIP
    catch_up: CatchUp = CatchUp.LAST
    #: When this process has read it, by ``time.monotonic()``: of two that differ, the later one counts.
    read_at: float = field(default_factory=time.monotonic, compare=False)


def plan_of(options: Mapping[str, Any], task: str) -> Plan | None:
    """Return the plan that options of ``@durable_task`` make; ``None`` if they say nothing of one.

    Args:
        options: Those of the decorator.
        task: The task's name, which is the schedule's by default.

    Raises:
        InvalidArgument, InvalidArgumentType: One of them is wrong.
    """
    given = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    if not given:
        return None
    if "cron" not in given:
        raise InvalidArgument(f'{next(iter(given))} is about a schedule, and there is none: give cron="…", too')
    timetable = Timetable(check_line(given["cron"]), check_zone(given.get("tz", settings.TIME_ZONE)))
    overlap = _member(Overlap, given.get("overlap", Overlap.SKIP), "overlap")
    catch_up = _member(CatchUp, given.get("catch_up", CatchUp.LAST), "catch_up")
    return Plan(_checked_name(given.get("schedule", task)), timetable, overlap, catch_up)


def _member(kind: type[E], value: object, name: str) -> E:
    try:
        return kind(str(value))
    except ValueError:
        known = ", ".join(f'"{member}"' for member in kind)
        raise InvalidArgument(f"{name} must be one of {known}, got {shown(value)}") from None


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_LENGTH or not name.isprintable():
        raise InvalidArgument(f"schedule must be a name of 1–{_NAME_LENGTH} printable characters, got {shown(name)}")
    if name != name.strip():
        raise InvalidArgument(f"schedule must be a name without spaces at its ends, got {shown(name)}")
    return name
