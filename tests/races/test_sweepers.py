"""Any number of sweepers: each finding is acted on once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction

from conductor_app import transitions
from conductor_app.engine import announcements, sweeper
from conductor_app.models import Execution, Step
from conductor_app.states import ALLOWED_MOVES, FINAL_STATUSES, ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.ids import new_root_id
from conductor_app.store.process import process
from tests.races.harness import Race
from tests.support import history
from tests.support.executions import OWNER, family, fresh, queued, step_of, unsaved
from tests.support.process import NotingBroker

pytestmark = pytest.mark.races

SWEEPERS = 4
MANY = 40


@pytest.fixture(autouse=True)
def recorded(race: Race) -> Iterator[None]:
    """Let the database record every move."""
    with history.recording():
        yield


def rows(count: int = MANY, **values: Any) -> list[Execution]:
    """Roots with these values, inserted as they are."""
    made = [unsaved() for _ in range(count)]
    for row in made:
        row.due_at = row.created_at = row.dispatch_at = clock.after(-60)
        for name, value in values.items():
            setattr(row, name, value)
    return Execution.objects.bulk_create(made)


def sweep_together(race: Race, **options: Any) -> dict[str, int]:
    """Let all sweepers sweep once at the same time; return how often each kind of finding was acted on in all."""
    with race.rounds(*[lambda _: sweeper.sweep(**options)] * SWEEPERS) as play:
        counts = play(None)
    total: dict[str, int] = {}
    for count in counts:
        for what, number in count.items():
            total[what] = total.get(what, 0) + number
    return total


def moves_of_each() -> set[tuple[str, ...]]:
    """The statuses that executions have gone through."""
    return {tuple(move.status for move in moves) for moves in history.moves().values()}


def test_each_message_is_published_once(race: Race) -> None:
    process.broker = broker = NotingBroker()
    due = rows(200)
    assert sweep_together(race) == {"published": 200}
    assert sorted(broker.ids) == sorted(row.pk for row in due)
    assert set(Execution.objects.values_list("dispatches", flat=True)) == {1}


def test_each_lapsed_lease_is_reclaimed_once(race: Race) -> None:
    rows(
        status=ExecutionStatus.RUNNING,
        dispatch_at=None,
        started_at=clock.after(-50),
        fence=1,
        lease_owner=OWNER,
        lease_expires_at=clock.after(-1),
    )
    assert sweep_together(race, publish=False) == {"lapsed_leases": MANY}
    assert set(Execution.objects.values_list("status", "attempt")) == {(ExecutionStatus.QUEUED, 2)}
    assert moves_of_each() == {("running", "queued")}


def test_each_sleep_ends_once_and_wakes_once(race: Race) -> None:
    asleep = rows(status=ExecutionStatus.WAITING, dispatch_at=None, started_at=clock.after(-50), fence=1)
    Step.objects.bulk_create(
        Step(
            execution=row,
            name="nap",
            kind="sleep",
            status="pending",
            deadline_at=clock.after(-1),
            created_at=clock.after(-40),
        )
        for row in asleep
    )
    assert sweep_together(race, publish=False) == {"overdue_steps": MANY}
    assert moves_of_each() == {("waiting", "queued")}


def test_each_flagged_execution_is_cancelled_once_and_each_expired_one(race: Race) -> None:
    rows(cancel_requested_at=clock.now())
    rows(deadline_at=clock.after(-1))
    assert sweep_together(race, publish=False) == {"cancelled": MANY, "expired": MANY}
    assert moves_of_each() == {("queued", "cancelled")}


def test_each_end_is_announced_once(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[Any] = []
    monkeypatch.setattr(announcements, "deliver", lambda execution: announced.append(execution.pk))
    done = rows(
        status=ExecutionStatus.SUCCEEDED, dispatch_at=None, finished_at=clock.now(), announce_at=clock.after(-1)
    )
    assert sweep_together(race, publish=False) == {"announced": MANY}
    assert sorted(announced) == sorted(row.pk for row in done)


def test_everything_at_once_leaves_nothing_broken(race: Race) -> None:
    """Timeouts, cancels, dead workers and completions in the same families, while four sweepers sweep."""
    families = [family(timeout=60) for _ in range(12)]
    keys = [parent.pk for parent, _ in families]
    Step.objects.filter(execution__in=keys[::2]).update(deadline_at=clock.after(-1))
    Execution.objects.filter(pk__in=[child.pk for _, child in families[::3]]).update(lease_expires_at=clock.after(-1))
    for key in keys[::4]:
        transitions.request_cancel(key, "")

    def complete(_: Any) -> None:
        for _parent, child in families:
            transitions.succeed(child, "1")

    with race.rounds(*[lambda _: sweeper.sweep(publish=False)] * SWEEPERS, complete) as play:
        for _ in range(5):
            play(None)
    assert not race.conflicts()
    for parent, _child in families:
        row, step = fresh(parent), step_of(parent)
        assert (row.status == ExecutionStatus.WAITING) == (step.status == "pending")
    for moves in history.moves().values():
        assert all(move.status in ALLOWED_MOVES[ExecutionStatus(move.old_status)] for move in moves[1:])
        assert sum(move.status in FINAL_STATUSES for move in moves) <= 1


def test_sweepers_do_not_wait_for_a_row_that_is_in_use(race: Race) -> None:
    execution = queued()
    other = queued(id=new_root_id())
    Execution.objects.update(dispatch_at=clock.after(-1))

    def hold_the_row() -> None:
        with transaction.atomic():
            assert transitions.claim(execution.pk, OWNER) is not None

    holding = race.hold("worker", hold_the_row)
    taken = race.start("sweeper", transitions.take_for_dispatch, 10).result()
    assert [row.pk for row in taken] == [other.pk]
    holding.go_on().result()
