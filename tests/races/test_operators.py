"""An operator's retry meets children that are just ending, cancellations that are just noticed, and other operators."""

from __future__ import annotations

import datetime as dt

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.engine import pruner, sweeper
from conductor_app.exceptions import CancelExecution, Failure, RetryRefused
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import Pending, waking
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import FAILURE, claimed, family, fresh, invoke, running, step_of

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def timed_out(on_timeout: str) -> tuple[Execution, Execution]:
    """A parent that failed of its child's timeout, and the child, which still runs."""
    parent, child = family(timeout=60, on_timeout=on_timeout)
    Step.objects.filter(execution=parent.pk).update(deadline_at=clock.after(-1))
    assert transitions.decide_overdue(step_of(parent))
    parent = claimed(parent)
    transitions.fail(parent, Failure(type="ChildTimedOut", message="…"), step="child", child_id=child.pk)
    return parent, child


@isolations
@pytest.mark.parametrize("stop", ["after transitions.steps.reopen", BEFORE_COMMIT])
def test_a_child_that_ends_during_the_retry_wakes_its_parent(
    race: Race, stop: str, isolation: IsolationLevel | None
) -> None:
    parent, child = timed_out("abandon")
    retrying = race.hold("operator", transitions.reopen, parent.pk, stop=stop, isolation=isolation)
    ending = race.start("child", transitions.succeed, child, "1", isolation=isolation).wait_blocked(by=retrying)
    retrying.go_on().result()
    ending.result()
    assert step_of(parent).status == StepStatus.SUCCEEDED
    assert fresh(parent).status == ExecutionStatus.QUEUED


@isolations
@pytest.mark.parametrize("stop", ["after transitions.steps.settle", BEFORE_COMMIT])
def test_a_retry_during_the_childs_end_adopts_its_result(
    race: Race, stop: str, isolation: IsolationLevel | None
) -> None:
    parent, child = timed_out("abandon")
    ending = race.hold("child", transitions.succeed, child, "1", stop=stop, isolation=isolation)
    retrying = race.start("operator", transitions.reopen, parent.pk, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    retrying.result()
    assert step_of(parent).status == StepStatus.SUCCEEDED
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_retry_during_the_childs_failure_runs_the_child_again(race: Race) -> None:
    parent, child = timed_out("abandon")
    ending = race.hold("child", transitions.fail, child, FAILURE)
    retrying = race.start("operator", transitions.reopen, parent.pk).wait_blocked(by=ending)
    ending.go_on().result()
    retrying.result()
    assert fresh(child).status == ExecutionStatus.QUEUED
    assert step_of(parent).status == StepStatus.PENDING
    assert fresh(parent).status == ExecutionStatus.WAITING


def test_a_body_that_notices_a_withdrawn_cancellation_runs_again(race: Race) -> None:
    parent, child = timed_out("cancel")
    assert fresh(child).cancel_requested_at is not None
    cancelling = race.start(
        "child", transitions.cancel_running, child, stop="before transitions.cancelling.flag_children"
    ).wait_stopped()
    race.start("operator", transitions.reopen, parent.pk).result()
    assert cancelling.go_on().result() is None
    assert fresh(child).status == ExecutionStatus.QUEUED
    transitions.succeed(claimed(child), "1")
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_result_of_a_run_whose_cancellation_is_withdrawn_just_then_is_a_success(race: Race) -> None:
    parent, child = running_child_of_a_cancelled_parent()
    ending = race.start(
        "child",
        lambda: transitions.cancel_running(child, result="1"),
        stop="before transitions.cancelling.flag_children",
    ).wait_stopped()
    race.start("operator", transitions.reopen, parent.pk).result()
    assert ending.go_on().result() is None
    assert (fresh(child).status, step_of(parent).status) == (ExecutionStatus.SUCCEEDED, StepStatus.SUCCEEDED)
    assert fresh(parent).status == ExecutionStatus.QUEUED


@isolations
def test_a_retry_during_a_cancelled_end_adopts_its_result(race: Race, isolation: IsolationLevel | None) -> None:
    parent, child = running_child_of_a_cancelled_parent()
    ending = race.hold("child", lambda: transitions.cancel_running(child, result="1"), isolation=isolation)
    retrying = race.start("operator", transitions.reopen, parent.pk, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    retrying.result()
    assert (fresh(child).status, step_of(parent).status) == (ExecutionStatus.SUCCEEDED, StepStatus.SUCCEEDED)
    assert fresh(parent).status == ExecutionStatus.QUEUED


def running_child_of_a_cancelled_parent() -> tuple[Execution, Execution]:
    parent, child = family()
    assert api.cancel(parent)
    assert fresh(child).cancel_requested_at is not None
    return parent, child


def test_a_retry_during_the_cancellation_runs_the_child_again(race: Race) -> None:
    parent, child = timed_out("cancel")
    cancelling = race.hold("child", transitions.cancel_running, child)
    retrying = race.start("operator", transitions.reopen, parent.pk).wait_blocked(by=cancelling)
    cancelling.go_on().result()
    retrying.result()
    assert fresh(child).status == ExecutionStatus.QUEUED
    assert fresh(parent).status == ExecutionStatus.WAITING


def test_a_retry_and_a_grandchilds_end_do_not_wait_for_each_other(race: Race) -> None:
    """The retry locks grandchild, child, root in this order, as the grandchild's end does."""
    root = running()
    child = claimed(invoke(root))
    grandchild = claimed(invoke(child))
    api.cancel(root)
    assert fresh(child).status == ExecutionStatus.CANCELLED
    ending = race.hold(
        "grandchild",
        lambda: transitions.cancel_running(grandchild, result="1"),
        stop="before transitions.waking.wake",
    )
    retrying = race.start("operator", transitions.reopen, root.pk).wait_blocked(by=ending)
    ending.go_on().result()
    retrying.result()
    assert not race.conflicts()
    assert fresh(grandchild).status == ExecutionStatus.SUCCEEDED, "the retry adopts what its body had returned"
    assert fresh(child).status == ExecutionStatus.QUEUED, "its step has succeeded: it goes on"
    assert fresh(root).status == ExecutionStatus.WAITING


def test_of_two_operators_one_retries(race: Race) -> None:
    parent, child = family()
    transitions.fail(child, FAILURE)
    parent = claimed(parent)
    transitions.fail(parent, FAILURE, step="child", child_id=child.pk)
    first = race.hold("first", transitions.reopen, parent.pk)
    second = race.start("second", transitions.reopen, parent.pk).wait_blocked(by=first)
    first.go_on().result()
    with pytest.raises(RetryRefused, match=r"is waiting\. Only a failed or cancelled one"):
        second.result()
    assert fresh(parent).status == ExecutionStatus.WAITING
    assert fresh(child).status == ExecutionStatus.QUEUED


def test_an_overdue_step_that_is_reopened_meanwhile_gets_its_new_deadline(race: Race) -> None:
    """The sweeper has listed the step, another one decides it, the parent fails, and an operator retries it."""
    parent, _child = family(timeout=60, on_timeout="abandon")
    Step.objects.filter(execution=parent.pk).update(deadline_at=clock.after(-1))
    listed = step_of(parent)
    assert transitions.decide_overdue(step_of(parent))
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=listed.child_id)
    transitions.reopen(parent.pk)
    assert transitions.decide_overdue(listed) is False
    assert step_of(parent).status == StepStatus.PENDING


@pytest.mark.parametrize("pruned_first", [True, False], ids=["pruner first", "operator first"])
def test_a_tree_is_pruned_or_retried_but_not_both(race: Race, pruned_first: bool) -> None:
    run = running()
    transitions.fail(run, FAILURE)
    Execution.objects.filter(pk=run.pk).update(finished_at=clock.after(-3_600))
    age = dt.timedelta(minutes=1)
    if pruned_first:
        pruning = race.hold("pruner", pruner.prune, age)
        retrying = race.start("operator", transitions.reopen, run.pk).wait_blocked(by=pruning)
        assert pruning.go_on().result() == 1
        assert retrying.outcome() is Execution.DoesNotExist
    else:
        retrying = race.hold("operator", transitions.reopen, run.pk)
        assert race.start("pruner", pruner.prune, age).result() == 0
        retrying.go_on().result()
        assert fresh(run).status == ExecutionStatus.QUEUED


def test_a_cancel_while_the_body_suspends_is_carried_out(race: Race) -> None:
    parent, child = family()
    waking.wake(parent.pk)
    parent = claimed(parent)
    suspending = race.hold("parent", transitions.suspend, parent, Pending("child"))
    cancelling = race.start("operator", api.cancel, parent.pk).wait_blocked(by=suspending)
    suspending.go_on().result()
    assert cancelling.result() is True
    assert fresh(parent).status == ExecutionStatus.CANCELLED
    assert fresh(child).cancel_requested_at is not None


def test_a_body_that_suspends_while_it_is_cancelled_is_told(race: Race) -> None:
    parent, _child = family()
    waking.wake(parent.pk)
    parent = claimed(parent)
    flagging = race.hold("operator", flag_in_transaction, parent)
    suspending = race.start("parent", transitions.suspend, parent, Pending("child")).wait_blocked(by=flagging)
    flagging.go_on().result()
    assert suspending.outcome() is CancelExecution
    transitions.cancel_running(parent)
    sweeper.sweep(publish=False)
    assert fresh(parent).status == ExecutionStatus.CANCELLED


def flag_in_transaction(execution: Execution) -> None:
    with transaction.atomic():
        transitions.request_cancel(execution.pk, "")
