"""Schedules: what starts by itself, once, and what becomes of what comes in between."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import current_app
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from conductor_app import DurableTask, api, testing
from conductor_app.engine import schedules, sweeper
from conductor_app.exceptions import ActionRefused, InvalidArgument
from conductor_app.models import Execution, Schedule
from conductor_app.store import clock
from conductor_app.store.ids import derive_tick_id
from conductor_app.tasks import decorator
from conductor_app.transitions import scheduling
from conductor_app.values.timetables import Timetable
from tests.support.bodies import durable, go_on, reload
from tests.support.command import told
from tests.support.executions import claimed, fresh
from tests.support.schedules import row
from tests.support.schedules import schedules as scheduling_tasks

pytestmark = pytest.mark.django_db

HOUR = dt.timedelta(hours=1)
Scheduled = Callable[..., DurableTask[..., Any]]


@pytest.fixture
def scheduled() -> Iterator[Scheduled]:
    """Decorates as ``@durable_task(cron=…)``; every hour, if nothing is said."""
    with scheduling_tasks() as decorate:
        yield decorate


@pytest.fixture(autouse=True)
def _at_half_past() -> None:
    """No hour ends while a test runs."""
    now = clock.read("default")
    half = now.replace(minute=30, second=0, microsecond=0)
    clock.shift((half if half > now else half + HOUR) - now)


def now() -> dt.datetime:
    return clock.read("default")


def started(task: DurableTask[..., Any]) -> list[Execution]:
    """What a schedule has started, in the order of its instants."""
    return list(Execution.objects.filter(task=task.name).order_by("id"))


def instants(task: DurableTask[..., Any]) -> list[dt.datetime]:
    return [found.get_options()["scheduled_at"] for found in started(task)]


def tick(task: DurableTask[..., Any], number: int = 1) -> None:
    """Let so many hours pass, and look just after each of them has ended."""
    for _ in range(number):
        clock.shift(HOUR / 2)
        sweeper.sweep(reclaim=False)
        clock.shift(HOUR / 2)


def outage(task: DurableTask[..., Any], duration: dt.timedelta = 3 * HOUR) -> None:
    """Let time pass in which nobody is there, and come back."""
    row(task)  # it was there before
    clock.shift(duration)
    sweeper.sweep()


def statements(act: Callable[[], object]) -> list[str]:
    with CaptureQueriesContext(connection) as found:
        act()
    return [query["sql"] for query in found if "conductor_app_schedule" in query["sql"]]


# ------------------------------------------------------------------------------------------------------------ the ticks


def test_without_schedules_no_statement_is_about_them() -> None:
    assert statements(lambda: (sweeper.sweep(audit=True), sweeper.due_in(5.0), go_on())) == []


def test_a_schedule_takes_one_read_a_sweep_and_one_to_look_ahead(scheduled: Scheduled) -> None:
    for _ in range(5):
        scheduled()
    sweeper.sweep()
    assert len(statements(sweeper.sweep)) == 1
    assert len(statements(lambda: sweeper.due_in(5.0))) == 1


def test_the_first_sweep_stores_a_schedule_and_starts_nothing(scheduled: Scheduled) -> None:
    task = scheduled(cron=" 0  9 * * 1-5", tz="Europe/Berlin", overlap="queue", catch_up="all", schedule="morning")
    assert sweeper.sweep()["schedules"] == 0
    found = row(task)
    assert (found.name, found.task, found.line, found.zone) == ("morning", task.name, "0 9 * * 1-5", "Europe/Berlin")
    assert (found.overlap, found.catch_up, found.is_paused) == ("queue", "all", False)
    local = found.next_at.astimezone(ZoneInfo("Europe/Berlin"))
    assert (local.hour, local.minute, local > now()) == (9, 0, True)
    assert not Execution.objects.exists()


def test_a_tick_is_an_execution_whose_id_follows_from_name_and_instant(scheduled: Scheduled) -> None:
    task = scheduled(queue="nightly")
    sweeper.sweep()
    at = row(task).next_at
    tick(task)
    (found,) = started(task)
    assert found.pk == derive_tick_id(task.plan.name, at)
    assert (found.queue, found.args, found.kwargs, found.parent_id) == ("nightly", [], {}, None)
    after = row(task)
    assert (after.last_tick_at, after.next_at, after.last_execution_id, after.note) == (at, at + HOUR, found.pk, "")
    for _ in range(3):
        assert sweeper.sweep()["schedules"] == 0
    assert len(started(task)) == 1


def test_the_body_knows_its_instant_and_others_have_none(scheduled: Scheduled) -> None:
    child = durable(lambda ctx: str(ctx.scheduled_at))

    def nightly(ctx: Any) -> list[str]:
        ctx.sleep("a-moment", 5)
        return [ctx.scheduled_at.isoformat(), ctx.invoke("child", child)]

    task = scheduled(nightly)
    with testing.Conductor() as conductor:
        conductor.drain()
        at = row(task).next_at
        conductor.advance(HOUR)
        (found,) = started(task)
        assert found.get_result() == [at.isoformat(), "None"]
        again = api.rerun(found)
        conductor.advance(10)
        assert reload(again).get_result() == [at.isoformat(), "None"]
        assert child.apply().get() == "None"


def test_the_kit_for_bodies_says_the_instant_that_a_test_gives(scheduled: Scheduled) -> None:
    task = scheduled()
    at = dt.datetime(2026, 3, 29, 1, tzinfo=dt.UTC)
    assert testing.run(task, scheduled_at=at) == at.isoformat()
    assert testing.run(task) is None
    with pytest.raises(TypeError, match="scheduled_at of run"):
        testing.run(task, scheduled_at="today")


def test_the_command_sweep_starts_them_too(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    clock.shift(HOUR)
    assert "schedules that have started their tasks: 1" in told("sweep").out.lower()
    assert len(started(task)) == 1


def test_advance_comes_to_each_instant_in_its_turn(scheduled: Scheduled) -> None:
    task = scheduled()
    with testing.Conductor() as conductor:
        assert conductor.advance(5 * HOUR) == 5
    assert [found.status for found in started(task)] == ["succeeded"] * 5
    assert len({found.get_result() for found in started(task)}) == 5
    assert [found.created_at.replace(microsecond=0) for found in started(task)] == instants(task)


def test_eager_runs_start_nothing_by_themselves(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    clock.shift(HOUR)
    assert durable(lambda ctx: ctx.sleep("night", 86_400) or "slept").apply().get() == "slept"
    assert not started(task)


def test_the_next_instant_is_looked_ahead_to(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    assert sweeper.due_in(60.0) is None
    clock.shift(row(task).next_at - now() - dt.timedelta(seconds=20))
    assert sweeper.due_in(60.0) == pytest.approx(20, abs=5)


def test_what_cannot_be_created_moves_nothing_and_is_tried_again(scheduled: Scheduled) -> None:
    broken = [True]

    def tags() -> dict[str, str]:
        if broken:
            raise ValueError("no tags today")
        return {"kind": "nightly"}

    task = scheduled(tags=tags)
    sweeper.sweep()
    before = row(task)
    tick(task)
    assert (row(task).next_at, started(task)) == (before.next_at, [])
    broken.clear()
    sweeper.sweep()
    assert instants(task) == [before.next_at]


# -------------------------------------------------------------------------------------------------------------- outages


@pytest.mark.parametrize("overlap", ["skip", "queue", "allow", "replace"])
@pytest.mark.parametrize(("catch_up", "number"), [("none", 0), ("last", 1)])
def test_after_an_outage_at_most_one_is_made_up_for(
    scheduled: Scheduled, overlap: str, catch_up: str, number: int
) -> None:
    task = scheduled(overlap=overlap, catch_up=catch_up)
    sweeper.sweep()
    first = row(task).next_at
    outage(task)
    assert instants(task) == [first + 2 * HOUR][:number]
    assert f"left out {3 - number} missed from {first.isoformat()} on (catch_up={catch_up})" in row(task).note
    tick(task)
    # Nothing has run so far, so what was made up for is open.
    assert len(started(task)) == (2 if number and overlap == "allow" else 1)


def test_a_last_one_that_is_on_time_is_no_missed_one(scheduled: Scheduled) -> None:
    task = scheduled(catch_up="none")
    sweeper.sweep()
    at = row(task).next_at + 2 * HOUR
    outage(task, at - now() + dt.timedelta(seconds=20))
    assert instants(task) == [at]


def test_all_are_made_up_for_one_after_the_other_or_beside_each_other(scheduled: Scheduled) -> None:
    one, many = scheduled(catch_up="all"), scheduled(catch_up="all", overlap="allow")
    sweeper.sweep()
    first = row(one).next_at
    outage(one)
    assert instants(many) == [first, first + HOUR, first + 2 * HOUR]
    assert instants(one) == [first]
    assert row(one).waiting_instants == [first + HOUR, first + 2 * HOUR]
    with testing.Conductor() as conductor:
        conductor.drain()
    assert instants(one) == [first, first + HOUR, first + 2 * HOUR]
    assert (row(one).waiting, {found.status for found in started(one)}) == ("", {"succeeded"})


def test_of_very_many_the_last_hundred_are_made_up_for_and_the_row_says_so(
    scheduled: Scheduled, caplog: pytest.LogCaptureFixture
) -> None:
    every_minute = scheduled(cron="* * * * *", catch_up="all", overlap="allow")
    hourly = scheduled(catch_up="all", overlap="allow")
    sweeper.sweep()
    outage(hourly, 102 * HOUR)
    assert len(started(every_minute)) == len(started(hourly)) == 100
    assert instants(hourly)[-1] == row(hourly).last_tick_at
    assert "left out 2 missed from" in row(hourly).note
    assert "left out more than 100 missed from" in row(every_minute).note
    assert f"Schedule {row(hourly).name}: left out 2 missed from" in caplog.text


# -------------------------------------------------------------------------------------------------------------- overlap


def test_skip_leaves_out_what_comes_while_one_is_open(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    tick(task, 3)
    assert len(started(task)) == 1
    assert "an earlier execution is open" in row(task).note
    go_on()
    tick(task)
    assert len(started(task)) == 2
    assert row(task).note == ""


def test_queue_lets_one_wait_the_first(scheduled: Scheduled) -> None:
    task = scheduled(overlap="queue")
    sweeper.sweep()
    first = row(task).next_at
    tick(task, 3)
    assert instants(task) == [first]
    assert row(task).waiting_instants == [first + HOUR]
    assert "one waits already" in row(task).note
    run = claimed(started(task)[0])
    sweeper.sweep()
    assert instants(task) == [first]
    api.cancel(run)
    Execution.objects.filter(pk=run.pk).update(lease_expires_at=clock.after(-1))
    with testing.Conductor() as conductor:
        sweeper.sweep()
        sweeper.sweep()
        conductor.drain()
    assert instants(task) == [first, first + HOUR]
    assert row(task).waiting == ""


def test_replace_cancels_what_is_open_and_never_overlaps(scheduled: Scheduled) -> None:
    task = scheduled(overlap="replace")
    sweeper.sweep()
    first = row(task).next_at
    tick(task)
    running = claimed(started(task)[0])
    tick(task)
    assert fresh(running).cancel_reason == f'schedule "{row(task).name}" has come again'
    assert (instants(task), row(task).waiting_instants) == ([first], [first + HOUR])
    tick(task)
    assert (instants(task), row(task).waiting_instants) == ([first], [first + 2 * HOUR])
    Execution.objects.filter(pk=running.pk).update(lease_expires_at=clock.after(-1))
    sweeper.sweep()
    sweeper.sweep()
    assert [found.status for found in started(task)] == ["cancelled", "queued"]
    assert instants(task) == [first, first + 2 * HOUR]


def test_allow_starts_beside_what_is_open(scheduled: Scheduled) -> None:
    task = scheduled(overlap="allow")
    sweeper.sweep()
    tick(task, 3)
    assert len(started(task)) == 3


# ---------------------------------------------------------------------------------------------------- clocks and nights


@pytest.mark.parametrize(
    ("day", "wanted"),
    [((2027, 3, 28), "2027-03-28T01:00:00+00:00"), ((2027, 10, 31), "2027-10-31T00:30:00+00:00")],
)
def test_in_both_nights_a_nightly_task_runs_once(scheduled: Scheduled, day: tuple[int, int, int], wanted: str) -> None:
    task = scheduled(cron="30 2 * * *", tz="Europe/Berlin")
    with testing.Conductor() as conductor:
        conductor.drain()
        clock.shift(dt.datetime(*day, tzinfo=dt.UTC) - dt.timedelta(hours=12) - now())
        conductor.drain()  # one that was missed
        Execution.objects.all().delete()
        conductor.advance(dt.timedelta(hours=24))
    assert [found.get_result() for found in started(task)] == [wanted]


def test_a_clock_that_was_set_back_starts_nothing_twice(scheduled: Scheduled) -> None:
    task = scheduled(overlap="allow")
    sweeper.sweep()
    tick(task, 2)
    clock.shift(-2 * HOUR)
    sweeper.sweep()
    tick(task, 2)
    assert len(started(task)) == 2
    # Not even if the next instant is found anew by that clock, or its row is an old one.
    clock.shift(-2 * HOUR)
    api.pause_schedule(row(task).name)
    api.unpause_schedule(row(task).name)
    assert row(task).next_at == row(task).last_tick_at + HOUR
    Schedule.objects.update(next_at=row(task).last_tick_at - HOUR)
    tick(task, 2)
    assert len(started(task)) == 2


def test_without_time_zones_the_doubled_hour_comes_once(settings: Any) -> None:
    settings.USE_TZ, settings.TIME_ZONE = False, "Europe/Berlin"
    with override_settings(USE_TZ=False, TIME_ZONE="Europe/Berlin"):
        at, found = dt.datetime(2026, 10, 25, 1, 30), []  # noqa: DTZ001
        for _ in range(5):
            at = scheduling.following(Timetable("30 * * * *", "Europe/Berlin"), at) or at
            found.append(at.hour)
    assert found == [2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------- code that changes


def test_a_changed_line_finds_the_next_instant_anew(scheduled: Scheduled) -> None:
    old = scheduled(schedule="report", name="tests.bodies.report")
    sweeper.sweep()
    before = row(old)
    _forget(old)
    task = scheduled(cron="15 4 * * *", catch_up="none", schedule="report", name="tests.bodies.report")
    sweeper.sweep()
    after = row(task)
    assert (after.pk, after.line, after.catch_up) == (before.pk, "15 4 * * *", "none")
    assert (after.next_at.hour, after.next_at.minute) == (4, 15)


def test_another_overlap_leaves_the_next_instant_as_it_is(scheduled: Scheduled) -> None:
    old = scheduled(schedule="report", name="tests.bodies.report")
    sweeper.sweep()
    before = row(old)
    _forget(old)
    clock.shift(HOUR)
    task = scheduled(overlap="allow", schedule="report", name="tests.bodies.report")
    sweeper.sweep()
    assert (row(task).overlap, row(task).next_at) == ("allow", before.next_at)
    sweeper.sweep()
    assert len(started(task)) == 1


def test_the_code_of_a_worker_that_was_started_earlier_gives_way(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    clock.shift(HOUR)
    Schedule.objects.update(line="5 5 * * *", declared_at=clock.after(3_600), seen_at=clock.now())
    sweeper.sweep()
    assert row(task).line == "5 5 * * *"
    assert not started(task)
    # The worker with the newer one is gone.
    clock.shift(dt.timedelta(seconds=2 * schedules.SEEN_SECONDS + 1))
    sweeper.sweep()
    assert row(task).line == "0 * * * *"


def test_a_schedule_that_left_the_code_is_paused_and_goes_on_when_it_is_back(
    scheduled: Scheduled, caplog: pytest.LogCaptureFixture
) -> None:
    task = scheduled()
    sweeper.sweep()
    schedules.note_absence()
    assert not row(task).is_paused
    clock.shift(dt.timedelta(seconds=schedules.ABSENT_SECONDS + 1))
    schedules.note_absence()
    assert row(task).is_paused
    assert row(task).paused_at is None
    assert "is paused: for 10 minutes no worker had it in its code" in caplog.text
    clock.shift(3 * HOUR)
    tick(task)
    assert not started(task)
    assert not row(task).is_paused
    tick(task)
    assert len(started(task)) == 1


def test_one_that_is_in_the_code_says_so_from_time_to_time(scheduled: Scheduled) -> None:
    task = scheduled(cron="0 0 1 1 *")
    sweeper.sweep()
    for _ in range(30):
        clock.shift(dt.timedelta(seconds=schedules.SEEN_SECONDS + 1))
        sweeper.sweep()
        schedules.note_absence()
    assert not row(task).is_paused


def _forget(task: DurableTask[..., Any]) -> None:
    """Take a task out of the code."""
    name, plan = task.name, task.plan
    assert plan is not None
    del current_app.tasks[name]
    decorator._defined_at.pop(name)
    decorator._scheduled_at.pop(plan.name)


# ---------------------------------------------------------------------------------------------------------- by somebody


def test_a_pause_starts_nothing_and_what_came_meanwhile_is_not_made_up_for(scheduled: Scheduled) -> None:
    task = scheduled(catch_up="all", overlap="allow")
    sweeper.sweep()
    name = row(task).name
    assert api.pause_schedule(name, actor="ana", reason="bank incident")
    assert not api.pause_schedule(name, actor="ben")
    assert (row(task).paused_by, row(task).pause_reason) == ("ana", "bank incident")
    tick(task, 3)
    assert not started(task)
    assert sweeper.due_in(3_600.0) is None
    assert api.unpause_schedule(name)
    assert not api.unpause_schedule(name)
    sweeper.sweep()
    assert not started(task)
    tick(task)
    assert len(started(task)) == 1
    assert (row(task).paused_at, row(task).paused_by, row(task).pause_reason) == (None, "", "")


def test_run_now_starts_one_beside_the_instants(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    before = row(task)
    api.pause_schedule(before.name)
    found = api.run_schedule(before.name, actor="ana", reason="the bank asked")
    assert found is not None
    assert found.get_options()["scheduled_at"] == instants(task)[0]
    assert (row(task).next_at, row(task).last_execution_id) == (before.next_at, found.pk)
    assert row(task).note == "run now by ana: the bank asked"
    with pytest.raises(ActionRefused, match=f"starts nothing beside execution {found.pk}, which is open"):
        api.run_schedule(before.name)
    go_on()
    assert api.run_schedule(before.name) is not None


def test_run_now_waits_or_replaces_as_the_overlap_says(scheduled: Scheduled) -> None:
    queued, replaced = scheduled(overlap="queue"), scheduled(overlap="replace")
    sweeper.sweep()
    for task in (queued, replaced):
        assert api.run_schedule(row(task).name) is not None
        assert api.run_schedule(row(task).name) is None
        assert len(row(task).waiting_instants) == 1
    with pytest.raises(ActionRefused, match="starts nothing beside"):
        api.run_schedule(row(queued).name)
    with testing.Conductor() as conductor:
        conductor.drain()
        conductor.drain()
    assert [found.status for found in started(queued)] == ["succeeded", "succeeded"]
    assert [found.status for found in started(replaced)] == ["cancelled", "succeeded"]


def test_a_row_that_has_changed_since_it_was_read_starts_nothing(scheduled: Scheduled) -> None:
    task = scheduled()
    sweeper.sweep()
    name = row(task).name
    clock.shift(HOUR)
    watch = schedules.Watch()
    assert watch.to_do([]) == [name]
    api.pause_schedule(name)
    assert watch.act(name) == 0
    assert not started(task)
    assert row(task).paused_at is not None


def test_what_is_not_there_cannot_be_paused_or_run(scheduled: Scheduled) -> None:
    for act in (api.pause_schedule, api.unpause_schedule, api.run_schedule):
        with pytest.raises(Schedule.DoesNotExist, match='There is no schedule "nobody"'):
            act("nobody")
    task = scheduled()
    sweeper.sweep()
    name, task_name = row(task).name, task.name
    _forget(task)
    with pytest.raises(ActionRefused, match=f'Schedule "{name}" of {task_name} is not in the code of this process'):
        api.run_schedule(name)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_lists_pauses_unpauses_and_runs(scheduled: Scheduled) -> None:
    assert "No schedule." in told("schedules").notes + told("schedules").out
    task = scheduled(schedule="report")
    sweeper.sweep()
    out = told("schedules").out
    assert all(word in out for word in ("report", "0 * * * *", "skip", "last", "goes on"))
    paused = told("schedules", "--pause", "report", "--reason", "incident", "--as", "ana", "--json")
    assert (paused.json["paused_now"], paused.json["paused_by"], paused.json["state"]) == (True, "ana", "paused")
    assert "by ana: incident" in told("schedules").out
    ran = told("schedules", "--run", "report")
    assert f"has started {started(task)[0].pk}" in ran.out
    refused = told("schedules", "--run", "report")
    assert (refused.code, "which is open" in refused.error) == (1, True)
    assert "goes on. Next:" in told("schedules", "--unpause", "report").out
    (listed,) = told("schedules", "--json").json["schedules"]
    assert (listed["name"], listed["line"], listed["last_execution"]) == (
        "report",
        "0 * * * *",
        str(started(task)[0].pk),
    )
    assert told("schedules", "--pause", "nobody").code == 1


def _doctor() -> list[tuple[str, str]]:
    found = told("doctor", "--json").json["checks"]
    return [(check["level"], check["message"]) for check in found if check["name"] == "schedules"]


def test_doctor_tells_of_overdue_paused_absent_and_unknown_schedules(scheduled: Scheduled) -> None:
    assert _doctor() == []
    task = scheduled(schedule="report")
    assert _doctor() == [("WARN", "No worker has stored 1 schedule so far: report.")]
    sweeper.sweep()
    assert _doctor() == [("OK", "1 schedule, none overdue or paused.")]
    clock.shift(HOUR)
    ((level, message),) = _doctor()
    assert (level, message) == ("FAIL", "1 schedule overdue, for 30 min by now: report.")
    sweeper.sweep()
    api.pause_schedule("report")
    assert _doctor() == [("WARN", "1 schedule paused: report.")]
    Schedule.objects.update(absent_at=clock.now())
    assert _doctor() == [("WARN", "1 schedule paused since no worker's code has had it: report.")]
    assert started(task)


def test_metrics_count_overdue_schedules(scheduled: Scheduled) -> None:
    from conductor_app.metrics import DatabaseCollector

    def overdue() -> float:
        (found,) = [one for one in DatabaseCollector().collect() if one.name == "conductor_overdue_schedules"]
        return float(found.samples[0].value)

    scheduled(), scheduled()
    sweeper.sweep()
    assert overdue() == 0
    clock.shift(HOUR)
    assert overdue() == 2
    sweeper.sweep()
    assert overdue() == 0


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"cron": "61 * * * *"}, "cron is no line of cron: bad minute"),
        ({"cron": "0 0 30 2 *"}, "cron names no instant"),
        ({"cron": 5}, "cron must be a line of cron"),
        ({"tz": "Europe/Berlni"}, "tz must be the name of a time zone"),
        ({"overlap": "maybe"}, 'overlap must be one of "skip", "queue", "allow", "replace", got \'maybe\''),
        ({"catch_up": True}, 'catch_up must be one of "none", "last", "all", got True'),
        ({"schedule": ""}, "schedule must be a name of 1–255 printable characters"),
        ({"schedule": " x"}, "schedule must be a name without spaces at its ends"),
        ({"cron": None, "overlap": "skip"}, 'overlap is about a schedule, and there is none: give cron="…", too'),
    ],
)
def test_what_is_no_schedule_is_refused_where_it_is_written(
    scheduled: Scheduled, options: dict[str, Any], what: str
) -> None:
    with pytest.raises((InvalidArgument, TypeError)) as refused:
        scheduled(**options)
    assert what in str(refused.value)


def test_a_task_with_arguments_that_nobody_gives_is_refused(scheduled: Scheduled) -> None:
    def needs(ctx: Any, order: int) -> None: ...

    def needs_not(ctx: Any, order: int = 0, *more: int, **others: int) -> None: ...

    with pytest.raises(TypeError, match="nobody gives it arguments then: missing a required argument: 'order'"):
        scheduled(needs)
    scheduled(needs_not)


def test_two_schedules_of_one_name_are_refused(scheduled: Scheduled) -> None:
    def one(ctx: Any) -> None: ...

    def other(ctx: Any) -> None: ...

    scheduled(one, schedule="report")
    with pytest.raises(ImproperlyConfigured, match='Two schedules are called "report"'):
        scheduled(other, schedule="report")


def test_a_call_does_not_take_what_the_decorator_does(scheduled: Scheduled) -> None:
    with pytest.raises(TypeError, match="It is an option of @durable_task"):
        scheduled().apply_async(cron="0 0 * * *")
