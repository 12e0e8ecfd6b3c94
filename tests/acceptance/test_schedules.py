"""Any number of workers, and kills at any time: each tick of a schedule is one execution, and ends. Old trees go."""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from django.db.models import F
from django.utils import timezone

from conductor_app import transitions
from conductor_app.models import Execution, Schedule
from conductor_app.store import clock
from tests.app.models import Ledger
from tests.support import invariants
from tests.support.executions import running
from tests.support.polling import wait_until
from tests.support.scheduled_names import KEPT, MINUTE, NUMBER, PREFIX
from tests.support.worker import Worker

pytestmark = pytest.mark.usefixtures("recorded")

HOUR = dt.timedelta(hours=1)
Start = Callable[..., list[Worker]]


@pytest.fixture
def due() -> dt.datetime:
    """The next instant of all schedules: half an hour from now."""
    return (timezone.now() + HOUR / 2).replace(second=0, microsecond=0)


@pytest.fixture
def start(worker: Callable[..., Worker], due: dt.datetime) -> Start:
    """Starts workers that have the schedules."""

    def started(number: int = 1) -> list[Worker]:
        env = {MINUTE: str(due.minute)}
        begun = [worker(app="tests.support.scheduled_app", pool="threads", env=env, wait=False) for _ in range(number)]
        return [one.wait_ready(60) for one in begun]

    return started


def of(kind: str) -> Any:
    return Execution.objects.filter(task__startswith=f"{PREFIX}.{kind}_")


def missed(kind: str, since: dt.datetime) -> None:
    """Let it look as if nobody had been there since an instant of the schedules."""
    rows = Schedule.objects.filter(name__startswith=f"{PREFIX}.{kind}")
    rows.update(next_at=since, version=F("version") + 1)


def stored() -> None:
    wait_until(lambda: Schedule.objects.count() == 4 * NUMBER, 40)


def instants(kind: str) -> Counter[tuple[str, dt.datetime]]:
    return Counter((row.task, row.get_options()["scheduled_at"]) for row in of(kind))


def test_of_200_ticks_each_starts_once_although_workers_are_killed(start: Start, due: dt.datetime) -> None:
    workers = start(5)
    stored()
    assert set(Schedule.objects.values_list("next_at", flat=True)) == {due}
    ticks = 200 // NUMBER
    for number in range(2, ticks + 1, 2):
        # Those of earlier rounds come again: the row is put back, as an old backup would be.
        missed("all", due - number * HOUR)
        wait_until(lambda least=NUMBER * (number - 2): of("all").count() > least, 60)
        if number % 6 == 0:
            workers.pop(0).kill()
            workers += start()
    wait_until(lambda: of("all").count() >= 200, 60, message=lambda: f"{of('all').count()} of 200")
    wait_until(lambda: not of("all").exclude(status="succeeded").exists(), 90, interval=0.1)
    found = instants("all")
    assert len(found) == 200
    assert set(found.values()) == {1}
    ends = Ledger.objects.filter(key="end").values_list("execution_id", flat=True)
    assert Counter(map(str, ends)) == {str(pk): 1 for pk in of("all").values_list("pk", flat=True)}
    # Five sweepers on a machine that is busy get in each other's way.
    invariants.check(*workers, excused="has to wait")


def test_after_three_hours_without_a_worker_each_policy_holds(start: Start, due: dt.datetime) -> None:
    (first,) = start()
    stored()
    first.stop()
    for kind in ("all", "last", "none", "turns"):
        missed(kind, due - 3 * HOUR)
    workers = start(2)
    wait_until(lambda: of("turns").filter(status="succeeded").count() == 3 * NUMBER, 90)
    invariants.check(*workers)
    tasks = range(NUMBER)
    three = [due - hours * HOUR for hours in (3, 2, 1)]
    assert instants("none") == {}
    assert instants("last") == {(f"{PREFIX}.last_{number}", due - HOUR): 1 for number in tasks}
    for kind in ("all", "turns"):
        assert instants(kind) == {(f"{PREFIX}.{kind}_{number}", at): 1 for number in tasks for at in three}
    for number in tasks:
        turns = of("turns").filter(task=f"{PREFIX}.turns_{number}").order_by("id")
        for earlier, later in itertools.pairwise(turns):
            assert earlier.finished_at <= later.created_at
    assert not Schedule.objects.exclude(next_at=due).exists()


def test_workers_delete_trees_that_are_kept_no_longer(start: Start) -> None:
    for number in range(20):
        run = running(task=KEPT)
        transitions.succeed(run, "1")
        Execution.objects.filter(pk=run.pk).update(finished_at=clock.after(-3_700 if number < 15 else -3_000))
    start(2)
    wait_until(lambda: Execution.objects.count() == 5, 40)
