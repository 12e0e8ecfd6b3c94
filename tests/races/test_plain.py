"""Two deliveries of one plain child, and its loss against its end: one of them wins."""

from __future__ import annotations

from contextlib import suppress

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.exceptions import CancelExecution, LeaseLost
from conductor_app.models import Execution, FailedExecution
from conductor_app.states import ExecutionStatus
from tests.races.harness import Race
from tests.support.executions import FAILURE, claimed, fresh, invoke, running, step_of
from tests.support.invariants import violations

pytestmark = pytest.mark.races

EARLY = '{"plain":{"acks_late":false},"ignore_result":true}'


def claim(child: Execution, owner: str) -> Execution | None:
    """Claim as a message of the first attempt does, in a transaction that a race can hold."""
    with transaction.atomic():
        return transitions.claim(child.pk, owner, child.task, 1)


def plain_child() -> Execution:
    return invoke(running(), options=EARLY)


def test_of_two_deliveries_one_runs(race: Race) -> None:
    child = plain_child()
    first = race.hold("first", claim, child, "w@h/1")
    second = race.start("second", claim, child, "w@h/2").wait_blocked(by=first)
    winner = first.go_on().result()
    assert winner is not None
    assert second.result() is None
    assert (fresh(child).lease_owner, fresh(child).fence) == ("w@h/1", 1)


def test_a_copy_that_waits_for_the_end_of_a_failed_attempt_does_not_take_the_next_one(race: Race) -> None:
    run = claimed(plain_child(), "w@h/1")
    retrying = race.hold("retry", transitions.retry_later, run, FAILURE, 60)
    copy = race.start("copy", claim, run, "w@h/2")
    retrying.go_on().result()
    assert copy.result() is None
    assert (fresh(run).status, fresh(run).attempt) == (ExecutionStatus.QUEUED, 2)


@pytest.mark.parametrize("first", ["succeed", "lose"])
def test_a_run_that_ends_while_it_is_given_up_has_one_outcome(race: Race, first: str) -> None:
    run = claimed(plain_child(), "w@h/1")

    def succeed() -> None:
        with suppress(LeaseLost):
            transitions.succeed(run, "1")

    def lose() -> bool:
        return transitions.lose(run.pk, owner="w@h/1")

    acts = {"succeed": succeed, "lose": lose}
    leader = race.hold("first", acts.pop(first))
    (second,) = acts.values()
    follower = race.start("second", second)
    leader.go_on().result()
    follower.result()
    row = fresh(run)
    assert row.status == (ExecutionStatus.SUCCEEDED if first == "succeed" else ExecutionStatus.FAILED)
    assert FailedExecution.objects.filter(pk=row.pk).exists() == (first == "lose")
    assert step_of(Execution.objects.get(pk=row.parent_id)).status == row.status
    assert not violations()


def test_a_cancel_that_meets_a_claim_lets_the_body_run_to_its_end_and_keeps_what_it_returned(race: Race) -> None:
    child = plain_child()
    claiming = race.hold("worker", claim, child, "w@h/1")
    cancelling = race.start("operator", api.cancel, child.pk).wait_blocked(by=claiming)
    run = claiming.go_on().result()
    assert cancelling.result()
    assert fresh(child).status == ExecutionStatus.RUNNING
    with pytest.raises(CancelExecution):
        transitions.succeed(run, "1")
    assert transitions.cancel_running(run, result="1")
    assert (fresh(child).status, fresh(child).get_result()) == (ExecutionStatus.CANCELLED, 1)
    assert not violations()
