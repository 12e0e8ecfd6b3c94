"""The deadline of a tree, while its root ends, is retried or is cancelled, and while several sweepers look."""

from __future__ import annotations

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import CancelExecution
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import OWNER, fresh, queued, running, unsaved

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)
#: Between a sweeper's look at a root and its write.
AFTER_A_LOOK = "before transitions.cancelling.deadline_reason"
SWEEPERS, MANY = 4, 40


def late(execution: Execution) -> Execution:
    """Let the deadline of its tree have passed."""
    Execution.objects.filter(pk=execution.pk).update(tree_deadline_at=clock.after(-1))
    return execution


def end_in_transaction(execution: Execution) -> bool:
    """Its one write, with a COMMIT before which it can stop."""
    with transaction.atomic():
        return transitions.end_late(execution.pk)


@isolations
def test_a_root_that_is_just_ending_keeps_its_result(race: Race, isolation: IsolationLevel | None) -> None:
    run = late(running())
    ending = race.hold("run", transitions.succeed, run, "1", isolation=isolation)
    sweeping = race.start("sweeper", transitions.end_late, run.pk, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert sweeping.result() is False
    row = fresh(run)
    assert (row.status, row.cancel_requested_at, row.cancel_reason) == (ExecutionStatus.SUCCEEDED, None, "")


@isolations
def test_a_root_that_ends_after_its_deadline_is_cancelled(race: Race, isolation: IsolationLevel | None) -> None:
    run = late(running())
    sweeping = race.hold("sweeper", end_in_transaction, run, isolation=isolation)
    ending = race.start("run", transitions.succeed, run, "1", isolation=isolation).wait_blocked(by=sweeping)
    assert sweeping.go_on().result() is True
    assert ending.outcome() is CancelExecution
    transitions.cancel_running(run, result="1")
    assert fresh(run).status == ExecutionStatus.CANCELLED
    assert fresh(run).has_kept_result


def end_and_retry(execution: Execution) -> None:
    api.cancel(execution, reason="no stock")
    api.retry(execution)


@isolations
def test_a_sweeper_that_has_seen_the_old_deadline_leaves_a_retry_alone(
    race: Race, isolation: IsolationLevel | None
) -> None:
    root = late(queued(max_duration=60.0, options='{"max_duration":60.0}'))
    sweeping = race.hold("sweeper", transitions.end_late, root.pk, stop=AFTER_A_LOOK, isolation=isolation)
    race.start("operator", end_and_retry, root, isolation=isolation).result()
    assert sweeping.go_on().result() is False
    row = fresh(root)
    assert (row.status, row.cancel_requested_at) == (ExecutionStatus.QUEUED, None)
    assert row.tree_deadline_at is not None
    assert row.tree_deadline_at > clock.read("default")


@isolations
def test_a_sweeper_that_has_seen_it_open_keeps_the_reason_of_a_cancel(
    race: Race, isolation: IsolationLevel | None
) -> None:
    run = late(running())
    sweeping = race.hold("sweeper", transitions.end_late, run.pk, stop=AFTER_A_LOOK, isolation=isolation)
    assert race.start("operator", api.cancel, run, "no stock", isolation=isolation).result() is True
    assert sweeping.go_on().result() is False
    assert fresh(run).cancel_reason == "no stock"


def test_a_retry_that_is_just_written_has_another_deadline(race: Race) -> None:
    root = late(queued(max_duration=60.0, options='{"max_duration":60.0}'))
    api.cancel(root)
    retrying = race.hold("operator", api.retry, root)
    assert race.start("sweeper", transitions.end_late, root.pk).result() is False
    retrying.go_on().result()
    assert fresh(root).status == ExecutionStatus.QUEUED


@pytest.mark.parametrize("stop", [AFTER_A_LOOK, BEFORE_COMMIT])
def test_of_two_sweepers_one_acts(race: Race, stop: str) -> None:
    run = late(running())
    first = race.hold("first", end_in_transaction, run, stop=stop)
    second = race.start("second", transitions.end_late, run.pk)
    if stop == BEFORE_COMMIT:
        second.wait_blocked(by=first)
        first.go_on()
    else:
        assert second.result() is True
        first.go_on()
    assert sorted([first.result(), second.result()]) == [False, True]


def test_each_late_root_is_ended_once_however_many_sweep(race: Race) -> None:
    rows = [unsaved() for _ in range(MANY)]
    for row in rows:
        row.status, row.dispatch_at, row.started_at = ExecutionStatus.WAITING, None, clock.after(-50)
        row.due_at = row.created_at = clock.after(-60)
        row.tree_deadline_at = clock.after(-1)
    Execution.objects.bulk_create(rows)
    with race.rounds(*[lambda _: sweeper.sweep(publish=False)] * SWEEPERS) as play:
        counts = play(None)
    assert sum(found["deadlines"] for found in counts) == MANY
    assert sum(found["cancelled"] for found in counts) == MANY
    assert set(Execution.objects.values_list("status", flat=True)) == {ExecutionStatus.CANCELLED}


def test_a_root_is_claimed_or_ended_and_then_meets_it(race: Race) -> None:
    run = late(running())
    transitions.release(run)
    sweeping = race.hold("sweeper", end_in_transaction, run)
    claiming = race.start("worker", transitions.claim, run.pk, OWNER).wait_blocked(by=sweeping)
    assert sweeping.go_on().result() is True
    assert claiming.result() is None
    assert transitions.cancel_flagged(run.pk)
