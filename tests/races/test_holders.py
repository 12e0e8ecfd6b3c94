"""Many want to run one execution: one of them holds it, and only that one writes."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import transaction

from conductor_app import transitions
from conductor_app.exceptions import LeaseLost
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepKind
from conductor_app.store import clock
from conductor_app.store.ids import derive_child_id, new_root_id
from conductor_app.transitions import creating, leases, steps
from tests.races.harness import IsolationLevel, Race
from tests.support.executions import claimed, fresh, invocation, new, queued, running, unsaved

pytestmark = pytest.mark.races


def lapse(execution: Execution) -> None:
    Execution.objects.filter(pk=execution.pk).update(lease_expires_at=clock.after(-1))


def test_of_eight_claims_one_wins(race: Race) -> None:
    rows = [unsaved() for _ in range(60)]
    for row in rows:
        row.due_at = row.created_at = row.dispatch_at = clock.after(-1)
    Execution.objects.bulk_create(rows)

    def claim(owner: str) -> Any:
        return lambda row: transitions.claim(row.pk, owner)

    with race.rounds(*(claim(f"test@host/{number}") for number in range(8))) as play:
        for row in rows:
            winners = [run for run in play(row) if run is not None]
            assert [(run.fence, run.status) for run in winners] == [(1, ExecutionStatus.RUNNING)]
    owners = Execution.objects.values_list("lease_owner", flat=True)
    assert len(set(owners)) > 1, "the claims did not run at the same time"


def test_a_claim_at_repeatable_read_finds_the_row_taken(race: Race) -> None:
    execution = queued()
    first = race.hold("first", lambda: claim_in_transaction(execution))
    second = race.start(
        "second", transitions.claim, execution.pk, "test@host/2", isolation=IsolationLevel.REPEATABLE_READ
    ).wait_blocked(by=first)
    first.go_on().result()
    assert second.result() is None
    assert fresh(execution).lease_owner == "test@host/1"


def claim_in_transaction(execution: Execution) -> None:
    with transaction.atomic():
        assert transitions.claim(execution.pk, "test@host/1") is not None


def test_a_lease_that_is_just_renewed_is_not_reclaimed(race: Race) -> None:
    run = running()
    lapse(run)
    lease = leases.Lease(run)
    renewing = race.hold("heartbeat", renew_in_transaction, lease)
    # The sweeper does not wait for the row: it is in use.
    assert race.start("sweeper", transitions.lose, run.pk).result() is False
    renewing.go_on().result()
    assert transitions.lose(run.pk) is False
    assert not lease.lost
    assert fresh(run).status == ExecutionStatus.RUNNING


def renew_in_transaction(lease: leases.Lease) -> None:
    with transaction.atomic():
        leases.renew([lease])


def test_a_heartbeat_that_comes_after_the_reclaim_notices(race: Race) -> None:
    run = running()
    lapse(run)
    lease = leases.Lease(run)
    losing = race.hold("sweeper", transitions.lose, run.pk)
    assert race.start("heartbeat", leases.renew, [lease]).result() == [lease], "it waits for no row"
    assert not lease.lost, "that is not decided yet"
    renewing = race.start("heartbeat", leases.renew_locked, lease, 20).wait_blocked(by=losing)
    assert losing.go_on().result() is True
    renewing.result()
    leases.renew([lease])
    assert lease.lost
    row = fresh(run)
    assert (row.status, row.attempt, row.lease_expires_at) == (ExecutionStatus.QUEUED, 2, None)


@pytest.mark.parametrize("zombie_is_first", [True, False], ids=["zombie first", "live run first"])
def test_a_step_is_remembered_once_and_both_runs_see_the_same(race: Race, zombie_is_first: bool) -> None:
    zombie = running()
    lapse(zombie)
    if zombie_is_first:
        recording = race.hold("zombie", transitions.record_step, zombie, "charge", stop="after step")
        assert transitions.lose(zombie.pk) is False, "its row is locked: it is no zombie yet"
        recording.go_on().result()
        transitions.lose(zombie.pk)
        live = claimed(zombie, "test@host/2")
        assert "charge" in steps.recall(live.pk)
    else:
        transitions.lose(zombie.pk)
        live = claimed(zombie, "test@host/2")
        recording = race.hold("live", transitions.record_step, live, "charge", stop="after step")
        # The fence is compared at once: a zombie does not even wait.
        assert race.start("zombie", transitions.record_step, zombie, "charge").outcome() is LeaseLost
        recording.go_on().result()
    assert Step.objects.filter(execution=zombie.pk).count() == 1


def test_a_zombie_that_wakes_while_its_execution_is_reclaimed_cannot_write(race: Race) -> None:
    zombie = running()
    lapse(zombie)
    losing = race.hold("sweeper", transitions.lose, zombie.pk)
    writing = race.start("zombie", transitions.record_step, zombie, "charge").wait_blocked(by=losing)
    losing.go_on().result()
    assert writing.outcome() is LeaseLost
    assert not Step.objects.filter(execution=zombie.pk).exists()


@pytest.mark.parametrize(
    "act",
    [
        lambda run: transitions.succeed(run, "1"),
        lambda run: transitions.suspend(run, invocation(run)),
        transitions.release,
    ],
    ids=["succeed", "suspend", "release"],
)
def test_a_zombies_end_that_waits_for_the_reclaim_changes_nothing(race: Race, act: Any) -> None:
    zombie = running()
    lapse(zombie)
    losing = race.hold("sweeper", transitions.lose, zombie.pk)
    ending = race.start("zombie", act, zombie).wait_blocked(by=losing)
    losing.go_on().result()
    assert ending.outcome() is LeaseLost
    assert fresh(zombie).status == ExecutionStatus.QUEUED
    assert Execution.objects.count() == 1


@pytest.mark.parametrize("holder", ["a step", "a suspension"])
def test_a_child_can_be_inserted_while_its_parents_row_is_locked(race: Race, holder: str) -> None:
    """The locks are weak ones (``FOR NO KEY UPDATE``), so a foreign key's check does not wait."""
    parent = running()
    if holder == "a step":
        holding = race.hold("parent", transitions.record_step, parent, "charge", stop="after held")
    else:
        holding = race.hold("parent", transitions.suspend, parent, invocation(parent))
    child = creating.timeless_row(new(id=derive_child_id(parent.pk, "other")), parent, "other")
    child.created_at = child.due_at = child.dispatch_at = clock.now()
    race.start("child", lambda: child.save(force_insert=True)).result()
    remembered = Step(execution_id=parent.pk, name="other", kind=StepKind.INVOKE, status="pending", child_id=child.pk)
    remembered.created_at = clock.now()
    race.start("step", remembered.save).result()
    holding.go_on().result()


def create_in_transaction(new: creating.NewExecution) -> tuple[Execution, bool]:
    """As a web request does, with ``ATOMIC_REQUESTS``."""
    with transaction.atomic():
        return transitions.create(new)


def test_of_two_messages_with_one_id_one_execution_is_created(race: Race) -> None:
    message = new(id=new_root_id())
    first = race.hold("first", create_in_transaction, message)
    second = race.start("second", transitions.create, message).wait_blocked(by=first)
    assert first.go_on().result()[1] is True
    execution, created = second.result()
    assert (execution.pk, created) == (message.id, False)


def test_of_two_callers_with_one_idempotency_key_both_get_the_same_execution(race: Race) -> None:
    first = race.hold("first", create_in_transaction, new(idempotency_key="order-7"))
    second = race.start("second", transitions.create, new(idempotency_key="order-7")).wait_blocked(by=first)
    kept, _ = first.go_on().result()
    assert second.result() == (kept, False)
