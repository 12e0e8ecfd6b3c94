"""A line of cron in a time zone, and the instants that it names."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.values.texts import shown

#: Longest line, and longest name of a zone.
LINE_LENGTH, ZONE_LENGTH = 255, 64
_FIELDS = 5
_HOURS_A_DAY = 24
#: Any instant will do to ask whether a line is one.
_SOMEWHEN = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - by the clock on a wall
_MINUTE = dt.timedelta(minutes=1)
#: Of a long time the last part is looked at first: so much, and so many times as much each time after.
_FIRST_LOOK, _MORE = dt.timedelta(hours=1), 6


@dataclass(frozen=True)
class Timetable:
    """The instants of a line of cron, by the clocks of a zone; all instants here are aware, and those returned UTC.

    A line that names some hours of the day goes by the clock on the wall: when clocks are put forward, an instant that
    does not exist is the next one that does; when they are put back, one that comes twice is the first of the two. A
    line of every hour goes on through both nights as time does.
    """

    line: str
    zone: str

    def after(self, instant: dt.datetime) -> dt.datetime | None:
        """Return the first instant after this one; ``None`` if there is none in fifty years."""
        return next((found for found in self._ticks(instant) if found > instant), None)

    def latest(self, first: dt.datetime, until: dt.datetime, most: int) -> tuple[list[dt.datetime], int | None]:
        """Return the last instants up to ``until``, the first of all of which is known, and how many others there are.

        Args:
            first: It counts, whatever the line says.
            until: Not before ``first``.
            most: So many at most.

        Returns:
            The instants in their order, and how many came before them; ``None`` if those are too many to be counted.
        """
        span = _FIRST_LOOK
        while until - span > first:
            found = list(self._between(until - span, until))
            if len(found) > most:
                return found[-most:], None
            span *= _MORE
        found = [first, *self._between(first, until)]
        return found[-most:], max(len(found) - most, 0)

    def _between(self, start: dt.datetime, until: dt.datetime) -> Iterator[dt.datetime]:
        last = start
        for tick in self._ticks(start):
            if tick > until:
                return
            if tick > last:
                last = tick
                yield tick

    def _ticks(self, start: dt.datetime) -> Iterator[dt.datetime]:
        """Yield instants from about ``start`` on; some may come twice, or be a little earlier."""
        zone = _zone(self.zone)
        local = start.astimezone(zone)
        line = _elapsing(self.line)
        if line is not None:
            for tick in CronSim(line, local):
                yield tick.astimezone(dt.UTC)
            return
        for tick in CronSim(self.line, local.replace(tzinfo=None)):
            yield _existing(tick, zone)


@functools.cache
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


@functools.lru_cache(maxsize=1_024)
def _elapsing(line: str) -> str | None:
    """Return a line of every hour as cronsim takes it for one; ``None`` for another one."""
    if len(CronSim(line, _SOMEWHEN).hours) < _HOURS_A_DAY:
        return None
    fields = line.split()
    return " ".join((fields[0], "*", *fields[2:]))


def _existing(wall: dt.datetime, zone: ZoneInfo) -> dt.datetime:
    """Return when clocks in a zone show this first, or else the next time that they show."""
    while True:
        instant = wall.replace(tzinfo=zone, fold=0).astimezone(dt.UTC)
        if instant.astimezone(zone).replace(tzinfo=None) == wall:
            return instant
        wall += _MINUTE


def check_line(line: object, name: str = "cron") -> str:
    """Return a line of cron, with single spaces.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is no line of cron, or names no instant.
    """
    if not isinstance(line, str):
        raise InvalidArgumentType(f'{name} must be a line of cron such as "0 9 * * 1-5", got {type(line).__name__}')
    fields = line.split()
    if len(fields) != _FIELDS or len(line) > LINE_LENGTH:
        raise InvalidArgument(
            f"{name} must have five fields (minute, hour, day of the month, month, day of the week), "
            f'such as "0 9 * * 1-5", got {shown(line)}'
        )
    if _error_of(fields) is None:
        try:
            next(CronSim(" ".join(fields), _SOMEWHEN))
        except StopIteration:
            raise InvalidArgument(_never(name, line)) from None
        return " ".join(fields)
    # Of a day that its months do not have, cronsim says what it says of one that no month has.
    if _error_of([*fields[:3], "*", fields[4]]) is None and _error_of(["0", "0", "*", fields[3], "*"]) is None:
        raise InvalidArgument(_never(name, line))
    raise InvalidArgument(f"{name} is no line of cron: {_error_of(fields)}, got {shown(line)}")


def _never(name: str, line: str) -> str:
    return f"{name} names no instant: no such day comes in fifty years, got {shown(line)}"


def _error_of(fields: list[str]) -> str | None:
    """Return what is wrong with the fields of a line, if anything is."""
    try:
        CronSim(" ".join(fields), _SOMEWHEN)
    except CronSimError as error:
        return str(error).lower()
    except (AssertionError, LookupError, TypeError, ValueError):  # it takes some nonsense for good until it computes
        return "a field cannot be read"
    return None


def check_zone(zone: object, name: str = "tz") -> str:
    """Return the name of a time zone.

    Raises:
        InvalidArgumentType: It is neither a name nor a ``ZoneInfo`` that has one.
        InvalidArgument: There is no such zone.
    """
    key = zone.key if isinstance(zone, ZoneInfo) else zone
    if not isinstance(key, str):
        raise InvalidArgumentType(f'{name} must be the name of a time zone such as "Europe/Berlin", got {shown(zone)}')
    try:
        if len(key) <= ZONE_LENGTH:
            _zone(key)
            return key
    except (LookupError, OSError, ValueError):
        pass
    raise InvalidArgument(
        f'{name} must be the name of a time zone such as "Europe/Berlin", and there is no {shown(key)}'
    )


__all__ = ["LINE_LENGTH", "ZONE_LENGTH", "Timetable", "check_line", "check_zone"]
