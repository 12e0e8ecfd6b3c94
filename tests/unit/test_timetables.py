"""Lines of cron: which are refused, and which instants they name, also in the nights in which clocks are changed."""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.store.ids import derive_tick_id
from conductor_app.values.timetables import Timetable, check_line, check_zone

BERLIN = "Europe/Berlin"
SPRING, AUTUMN = dt.datetime(2026, 3, 28, 23, 0, tzinfo=dt.UTC), dt.datetime(2026, 10, 24, 22, 0, tzinfo=dt.UTC)


def instants(line: str, start: dt.datetime, number: int, zone: str = BERLIN) -> list[str]:
    """The next instants of a line as clocks in its zone show them, with their distance from UTC in hours."""
    timetable, found = Timetable(check_line(line), zone), [start]
    for _ in range(number):
        following = timetable.after(found[-1])
        assert following is not None
        found.append(following)
    return [f"{instant.astimezone(ZoneInfo(zone)):%d %H:%M %z}"[:12] for instant in found[1:]]


@pytest.mark.parametrize(
    ("line", "spring", "autumn"),
    [
        ("30 2 * * *", ["29 03:00 +02", "30 02:30 +02"], ["25 02:30 +02", "26 02:30 +01"]),
        ("0 3 * * *", ["29 03:00 +02", "30 03:00 +02"], ["25 03:00 +01", "26 03:00 +01"]),
        ("*/30 2 * * *", ["29 03:00 +02", "30 02:00 +02"], ["25 02:00 +02", "25 02:30 +02", "26 02:00 +01"]),
        (
            "0 */2 * * *",
            ["29 03:00 +02", "29 04:00 +02", "29 06:00 +02"],
            ["25 02:00 +02", "25 04:00 +01", "25 06:00 +01"],
        ),
    ],
)
def test_of_a_changed_clock_each_instant_comes_once(line: str, spring: list[str], autumn: list[str]) -> None:
    assert instants(line, SPRING + dt.timedelta(hours=1, minutes=1), len(spring))[-len(spring) :] == spring
    assert instants(line, AUTUMN + dt.timedelta(minutes=1), len(autumn)) == autumn


def test_a_line_of_every_hour_goes_on_as_time_does() -> None:
    for line in ("*/30 * * * *", "*/30 0-23 * * *"):
        assert instants(line, SPRING + dt.timedelta(hours=1), 4) == [
            *("29 01:30 +01", "29 03:00 +02"),
            *("29 03:30 +02", "29 04:00 +02"),
        ]
        assert instants(line, AUTUMN + dt.timedelta(hours=1, minutes=30), 5) == [
            *("25 02:00 +02", "25 02:30 +02", "25 02:00 +01", "25 02:30 +01", "25 03:00 +01"),
        ]


def test_a_day_that_a_zone_has_left_out_is_the_next_one_that_it_has() -> None:
    start = dt.datetime(2011, 12, 1, tzinfo=dt.UTC)
    assert instants("0 9 30 12 *", start, 1, "Pacific/Apia") == ["31 00:00 +14"]


def test_instants_rise_through_a_whole_year_in_every_kind_of_zone() -> None:
    for zone in (BERLIN, "America/Sao_Paulo", "Australia/Lord_Howe", "Africa/Casablanca", "UTC"):
        for line in ("*/20 0-3 * * *", "15 * * * *", "0 0 * * *"):
            timetable, now = Timetable(line, zone), dt.datetime(2018, 1, 1, tzinfo=dt.UTC)
            for _ in range(2_000):
                following = timetable.after(now)
                assert following is not None
                assert following > now
                now = following


def test_the_latest_of_a_long_time_are_found_without_looking_at_all() -> None:
    timetable = Timetable("* * * * *", BERLIN)
    first = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
    found, others = timetable.latest(first, SPRING, 100)
    assert (len(found), others) == (100, None)
    assert found[-1] == SPRING
    assert all(later - earlier == dt.timedelta(minutes=1) for earlier, later in itertools.pairwise(found))


def test_of_a_short_time_all_are_counted_and_the_first_is_what_is_known() -> None:
    timetable = Timetable("0 * * * *", BERLIN)
    odd = SPRING - dt.timedelta(hours=4, minutes=30)
    found, others = timetable.latest(odd, SPRING, 3)
    assert others == 3  # what is known, and two of the line
    assert found == [SPRING - dt.timedelta(hours=hours) for hours in (2, 1, 0)]
    assert timetable.latest(odd, odd, 100) == ([odd], 0)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("* * * *", "must have five fields"),
        ("0 * * * * *", "must have five fields"),
        ("@daily", "must have five fields"),
        ("", "must have five fields"),
        ("61 * * * *", "is no line of cron: bad minute"),
        ("0 24 * * *", "is no line of cron: bad hour"),
        ("0 0 0 * *", "is no line of cron: bad day-of-month"),
        ("0 0 * 13 *", "is no line of cron: bad month"),
        ("0 0 * * MON#7", "is no line of cron: bad day-of-week"),
        ("x y z a b", "is no line of cron"),
        ("0 0 30 2 *", "names no instant"),
        ("0 0 31 4,6,9,11 *", "names no instant"),
    ],
)
def test_what_is_no_line_is_refused(line: str, what: str) -> None:
    with pytest.raises(InvalidArgument, match=what):
        check_line(line)


def test_a_line_has_single_spaces_and_names_of_days() -> None:
    assert check_line("  0  9 * *  mon-fri ") == "0 9 * * mon-fri"
    assert check_line("0 0 29 2 *") == "0 0 29 2 *"
    with pytest.raises(InvalidArgumentType, match="got int"):
        check_line(5)


@pytest.mark.parametrize("zone", ["Europe/Berlni", "", "../etc/passwd", "Europe", "x" * 300])
def test_a_zone_that_is_not_there_is_refused(zone: str) -> None:
    with pytest.raises(InvalidArgument, match="must be the name of a time zone"):
        check_zone(zone)


@pytest.mark.parametrize("zone", [dt.UTC, 1, None])
def test_what_is_no_zone_is_refused(zone: Any) -> None:
    with pytest.raises(InvalidArgumentType, match="must be the name of a time zone"):
        check_zone(zone)
    assert check_zone(ZoneInfo(BERLIN)) == BERLIN


def test_a_ticks_id_follows_from_name_and_instant() -> None:
    assert derive_tick_id("nightly", SPRING) == derive_tick_id("nightly", SPRING.astimezone(ZoneInfo(BERLIN)))
    others = {derive_tick_id("nightly", SPRING), derive_tick_id("weekly", SPRING), derive_tick_id("nightly", AUTUMN)}
    assert len(others) == 3
    assert all(found.version == 8 for found in others)
