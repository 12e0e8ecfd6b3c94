"""Schedules: sweepers, pauses and kills that meet at one tick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction
from django.db.models import F

from conductor_app import DurableTask, api
from conductor_app.engine import schedules, sweeper
from conductor_app.models import Execution, Schedule
from conductor_app.store import clock
from conductor_app.store.locks import waiting_at_most
from tests.races.harness import Race
from tests.support.polling import wait_until
from tests.support.schedules import row
from tests.support.schedules import schedules as scheduling_tasks

pytestmark = pytest.mark.races

Scheduled = Callable[..., DurableTask[..., Any]]


@pytest.fixture
def scheduled(race: Race) -> Iterator[Scheduled]:
    """Decorates as ``@durable_task(cron=…)``, stores the schedule, and lets an instant of it come."""
    del race
    with scheduling_tasks() as decorate:

        def due(number: int = 1, **options: Any) -> Any:
            tasks = [decorate(cron="0 0 1 1 *", **options) for _ in range(number)]
            sweeper.sweep()
            for task in tasks:
                come(task)
            return tasks if number > 1 else tasks[0]

        yield due
    Schedule.objects.all().delete()


def come(task: DurableTask[..., Any]) -> None:
    """Let an instant have come a moment ago."""
    Schedule.objects.filter(pk=row(task).pk).update(next_at=clock.after(-1), version=F("version") + 1)


def act(task: DurableTask[..., Any]) -> Callable[[], int]:
    """What a sweeper does that has read the schedule just now."""
    watch, name = schedules.Watch(), row(task).name
    assert name in watch.to_do([])
    return lambda: watch.act(name)


def test_of_four_sweepers_that_have_read_the_same_row_one_starts_it(race: Race, scheduled: Scheduled) -> None:
    task = scheduled(overlap="allow")
    with race.rounds(*[lambda look: look()] * 4) as play:
        for number in range(1, 11):
            looks = act(task)
            assert sorted(play(looks)) == [0, 0, 0, 1]
            assert Execution.objects.filter(task=task.name).count() == number
            come(task)


def test_sweepers_start_each_of_many_schedules_once(race: Race, scheduled: Scheduled) -> None:
    tasks: Any = scheduled(10)
    with race.rounds(*[lambda _: sweeper.sweep()["schedules"]] * 4) as play:
        shares = play(None)
    assert sum(shares) == 10
    assert Execution.objects.count() == len(tasks)


def pause(name: str) -> bool:
    with transaction.atomic():
        return api.pause_schedule(name)


def test_a_tick_waits_for_a_pause_and_then_starts_nothing(race: Race, scheduled: Scheduled) -> None:
    task = scheduled()
    look = act(task)
    pausing = race.hold("operator", pause, row(task).name)
    ticking = race.start("sweeper", look).wait_blocked(by=pausing)
    assert pausing.go_on().result() is True
    assert ticking.result() == 0
    assert not Execution.objects.exists()


def test_a_pause_waits_for_a_tick_and_holds_from_the_next_one_on(race: Race, scheduled: Scheduled) -> None:
    task = scheduled(overlap="allow")
    ticking = race.hold("sweeper", act(task))
    pausing = race.start("operator", api.pause_schedule, row(task).name).wait_blocked(by=ticking)
    assert ticking.go_on().result() == 1
    assert pausing.result() is True
    come(task)
    sweeper.sweep()
    assert Execution.objects.count() == 1


def test_a_tick_whose_sweeper_was_killed_is_started_by_another(race: Race, scheduled: Scheduled) -> None:
    task = scheduled()
    first = race.hold("first", act(task))
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [first.pid])
    wait_until(lambda: sweeper.sweep()["schedules"])
    first.go_on()
    # The first tries again on a new connection, if it has not waited for too long, and finds another row.
    with suppress(OperationalError):
        assert first.result() == 0
    assert Execution.objects.count() == 1


def test_a_sweeper_passes_over_a_tick_that_another_one_has_in_its_hands(race: Race, scheduled: Scheduled) -> None:
    first_look, second_look = act(task := scheduled()), act(task)
    first = race.hold("first", first_look)

    def in_background() -> int:
        with waiting_at_most(sweeper.AT_ONCE_SECONDS, "default"):
            return second_look()

    assert race.start("second", in_background).result() == 0
    assert first.go_on().result() == 1


def test_of_two_who_run_one_now_one_is_refused(race: Race, scheduled: Scheduled) -> None:
    task = scheduled()
    name = row(task).name
    first = race.hold("ana", api.run_schedule, name)
    second = race.start("ben", api.run_schedule, name).wait_blocked(by=first)
    started = first.go_on().result()
    with pytest.raises(Exception, match=f"starts nothing beside execution {started.pk}"):
        second.result()
    assert Execution.objects.count() == 1


def test_of_two_workers_that_store_one_schedule_both_go_on(race: Race) -> None:
    with scheduling_tasks() as decorate:
        task = decorate()
        watches = [schedules.Watch(), schedules.Watch()]
        for watch in watches:
            watch.to_do([])
        first = race.hold("first", watches[0].act, task.plan.name)
        second = race.start("second", watches[1].act, task.plan.name).wait_blocked(by=first)
        assert (first.go_on().result(), second.result()) == (0, 0)
        assert Schedule.objects.count() == 1
    Schedule.objects.all().delete()
