"""An execution is forked while an operator retries it, somebody prunes it, or a child of it that was abandoned ends."""

from __future__ import annotations

import datetime as dt

import pytest

from conductor_app import api, transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, Fork, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.executions import FAILURE, claimed, fresh, invoke, running

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def failed() -> Execution:
    """A root that has recorded a step, and failed of its child after it."""
    run = running()
    transitions.record_step(run, "first", result='"kept"')
    child = claimed(invoke(run))
    transitions.fail(child, FAILURE)
    parent = claimed(fresh(run))
    transitions.fail(parent, FAILURE, step="child", child_id=child.pk)
    return parent


def remembered(execution: Execution) -> list[tuple[str, str]]:
    return list(Step.objects.filter(execution_id=execution.pk).order_by("id").values_list("name", "status"))


@isolations
def test_a_fork_during_a_retry_sees_that_it_has_not_ended(race: Race, isolation: IsolationLevel | None) -> None:
    source = failed()
    retrying = race.hold("operator", api.retry, source.pk, isolation=isolation)
    forking = race.start("fork", api.fork, source.pk, "child", isolation=isolation).wait_blocked(by=retrying)
    retrying.go_on().result()
    assert forking.outcome() is ActionRefused
    assert not Fork.objects.exists()
    assert fresh(source).status == ExecutionStatus.WAITING


@isolations
def test_a_retry_during_a_fork_comes_after_it(race: Race, isolation: IsolationLevel | None) -> None:
    source = failed()
    forking = race.hold("fork", api.fork, source.pk, "child", isolation=isolation, stop=BEFORE_COMMIT)
    retrying = race.start("operator", api.retry, source.pk, isolation=isolation).wait_blocked(by=forking)
    fork = forking.go_on().result()
    retrying.result()
    assert remembered(fork) == [("first", StepStatus.SUCCEEDED)]
    assert fresh(source).status == ExecutionStatus.WAITING


@isolations
def test_a_retry_that_has_changed_steps_alone_is_not_waited_for(race: Race, isolation: IsolationLevel | None) -> None:
    """It holds the child and the step by then, and asks for the root last: nobody waits in a circle."""
    source = failed()
    stop = "after transitions.steps.reopen"
    retrying = race.hold("operator", api.retry, source.pk, stop=stop, isolation=isolation)
    fork = race.start("fork", api.fork, source.pk, "child", isolation=isolation).result()
    retrying.go_on().result()
    assert remembered(fork) == [("first", StepStatus.SUCCEEDED)]
    assert fresh(source).status == ExecutionStatus.WAITING


@pytest.mark.parametrize("first", ["fork", "pruner"])
def test_a_fork_and_the_pruner(race: Race, first: str) -> None:
    source = failed()
    Execution.objects.filter(pk=source.pk).update(finished_at=clock.after(-3_600))
    age = dt.timedelta(minutes=30)
    if first == "fork":
        forking = race.hold("fork", api.fork, source.pk, "child")
        assert race.start("pruner", pruner.prune, age).result() == 0
        fork = forking.go_on().result()
        assert pruner.prune(age) == 2
        assert remembered(fork) == [("first", StepStatus.SUCCEEDED)]
    else:
        pruning = race.hold("pruner", pruner.prune, age)
        forking = race.start("fork", api.fork, source.pk, "child").wait_blocked(by=pruning)
        pruning.go_on().result()
        assert forking.outcome() is Execution.DoesNotExist
        assert not Step.objects.exists()
