"""Timeouts, sleeps, retries and backoff fire in time, and each has one outcome."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conductor_app import api
from conductor_app.exceptions import ChildTimedOut, ExecutionFailed
from conductor_app.host import inline
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.store import clock
from conductor_app.transitions import dispatch, waking
from project.celery import app
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.messages import queue_that_nobody_serves
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body

pytestmark = pytest.mark.usefixtures("recorded")

TIMED_OUT = "Child execution timed out after 1s (step 'slow')"
NOBODYS = f"{app.conf.task_default_queue}-nobody"


def test_a_timeout_fails_the_parent_and_cancels_the_child_wherever_it_is(worker: Any) -> None:
    with queue_that_nobody_serves(NOBODYS) as nobody:
        started = worker(pool="threads", concurrency=5)
        uncaught = scenarios.waits_for_slow.delay(seconds=3, timeout=1)
        caught = scenarios.catches_timeout.delay(seconds=3, timeout=1)
        abandoned = scenarios.waits_for_slow.delay(seconds=3, timeout=1, on_timeout="abandon")
        noticed = scenarios.waits_for_checkpoints.delay(seconds=300, timeout=1)
        unserved = scenarios.waits_for_a_queue.delay(queue=nobody, timeout=1)
        wait_for_body(scenarios.slow, number=4)
        assert api.get_result(caught, timeout=20) == {"caught": TIMED_OUT}
        for parent in (uncaught, abandoned, noticed):
            with pytest.raises(ExecutionFailed) as error:
                api.get_result(parent, timeout=20)
            assert str(error.value) == TIMED_OUT
        with pytest.raises(ExecutionFailed, match=r"timed out after 1s \(step 'echo'\)$"):
            api.get_result(unserved, timeout=20)
        wait_until(lambda: not Execution.objects.open().exists(), message="Not every child has ended")
    children = {str(child.parent_id): child for child in Execution.objects.filter(parent__isnull=False)}
    # A body that calls nothing of ctx comes to its end, and its own row keeps its result.
    assert [children[parent.id].status for parent in (uncaught, caught, abandoned)] == ["succeeded"] * 3
    assert [children[parent.id].status for parent in (noticed, unserved)] == ["cancelled"] * 2
    assert children[noticed.id].error_message == "Cancelled: its parent's timeout of 1s ended"
    assert set(Step.objects.values_list("status", flat=True)) == {"timed_out"}
    for step in Step.objects.all():
        assert (step.finished_at - step.created_at).total_seconds() >= 1
    failure = FailedExecution.objects.get(pk=uncaught.id)
    assert (failure.error_class, failure.attempts) == (f"{ChildTimedOut.__module__}.{ChildTimedOut.__name__}", 1)
    assert (failure.step, str(failure.root_cause_id)) == ("slow", str(children[uncaught.id].pk))
    assert count("body", uncaught.id) == 2
    assert "Traceback" not in started.log
    invariants.check(started)


def test_a_timeout_and_a_child_that_end_at_the_same_time_have_one_winner(worker: Any) -> None:
    started = worker(pool="threads", concurrency=8)
    parents = [scenarios.catches_timeout.delay(seconds=0.3, timeout=0.3 + 0.03 * number) for number in range(24)]
    outcomes = [api.get_result(parent, timeout=60) for parent in parents]
    invariants.check(started)
    for parent, outcome in zip(parents, outcomes, strict=True):
        step = Step.objects.get(execution_id=parent.id)
        child = Execution.objects.get(parent_id=parent.id)
        if step.status == "succeeded":
            assert (outcome, child.status) == ({"caught": ""}, "succeeded")
        else:
            assert step.status == "timed_out"
            assert outcome["caught"].startswith("Child execution timed out after ")
            assert child.status in ("cancelled", "succeeded")


def test_sleeps_and_retries_fire_in_time_although_no_message_is_held(worker: Any) -> None:
    started = worker(concurrency=2)
    napping, flaky = scenarios.naps.delay(seconds=1), scenarios.flaky.delay(failures=2)
    later = scenarios.echo.apply_async(kwargs={"value": "later"}, countdown=1)
    assert api.get_result(flaky, timeout=20) == 3
    assert api.get_result(napping, timeout=20) == "rested"
    assert api.get_result(later, timeout=20) == "later"
    nap, delayed = Step.objects.get(name="nap"), Execution.objects.get(pk=later.id)
    assert (nap.finished_at - nap.created_at).total_seconds() >= 1
    assert (delayed.started_at - delayed.created_at).total_seconds() >= 1
    assert (count("body", flaky.id), count("body", napping.id)) == (3, 2)
    assert Execution.objects.get(pk=napping.id).attempt == 1
    invariants.check(started)


@pytest.fixture
def moving_clock(transactional_db: None) -> Iterator[Callable[[float], None]]:
    """A function that moves the clock of this process by so many seconds."""
    yield lambda seconds: clock.shift(dt.timedelta(seconds=seconds))
    clock.reset()


def test_replays_do_not_extend_a_timeout(moving_clock: Callable[[float], None]) -> None:
    """Whatever wakes a waiting parent: it finds its step pending, and waits again for what is left."""
    parent = scenarios.waits_for_a_queue.delay(queue=NOBODYS, timeout=30)
    _run(parent.id)
    step = Step.objects.get(execution_id=parent.id)
    for bodies in (2, 3, 4):
        moving_clock(9)
        waking.wake(step.execution_id)
        _run(parent.id)
        assert count("body", parent.id) == bodies
        assert Step.objects.get(pk=step.pk).deadline_at == step.deadline_at
        assert Execution.objects.get(pk=parent.id).status == "waiting"
    moving_clock(4)
    inline.run_until_idle(app)
    execution = Execution.objects.get(pk=parent.id)
    assert execution.error_message == "Child execution timed out after 30s (step 'echo')"
    assert (execution.status, execution.attempt) == ("failed", 1)
    invariants.check()


def _run(execution_id: str) -> None:
    """Run one execution and leave its child alone."""
    inline.run_once(Execution.objects.get(pk=execution_id), app)


def test_what_is_due_at_several_instants_is_on_time_between_two_sweeps(worker: Any) -> None:
    """Also what no run of this worker has announced: it was stored before the worker began."""
    before = [scenarios.naps.delay(seconds=seconds) for seconds in (8, 10)]
    with dispatch.inline():
        inline.run_until_idle(app)
    worker(pool="threads", concurrency=4, conductor={"SWEEP_SECONDS": 40, "LEASE_SECONDS": 60})
    after = [scenarios.naps.delay(seconds=seconds) for seconds in (1, 2, 3)]
    later = [scenarios.echo.apply_async((number,), countdown=number) for number in (1.5, 2.5)]
    for result in (*before, *after):
        assert api.get_result(result, timeout=30) == "rested"
    assert [api.get_result(result, timeout=30) for result in later] == [1.5, 2.5]
    for sleep in Step.objects.all():
        assert (sleep.finished_at - sleep.deadline_at).total_seconds() < 3
    for execution in Execution.objects.filter(pk__in=[result.id for result in later]):
        assert (execution.started_at - execution.due_at).total_seconds() < 3
