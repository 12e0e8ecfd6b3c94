"""Holds and pauses with real workers: nothing begins, nothing is lost, and all goes on after the release."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connections

from conductor_app import api, transitions
from conductor_app.models import Attempt, Execution, PausedTask
from conductor_app.states import RunOutcome
from conductor_app.store import clock
from tests.app import scenarios, stops
from tests.app.ledger import count, note
from tests.app.models import Ledger
from tests.support import invariants
from tests.support.executions import new, queued
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body, wait_for_status

pytestmark = pytest.mark.usefixtures("recorded")

WHY = "bank incident"
QUICK = {"SWEEP_SECONDS": 0.5}
#: How many are queued of a task that is paused.
MANY = 300


def bodies_of(result: Any) -> int:
    return Ledger.objects.filter(execution_id=result.id, key="body").count()


def settled(worker: Any) -> None:
    """Return when a worker has been seen to do what comes after what is held."""
    del worker
    assert api.get_result(scenarios.echo.delay(value="after"), timeout=40) == "after"


def test_a_queued_one_begins_after_its_release(worker: Any) -> None:
    result = scenarios.pass_through.delay(value=7)
    assert api.hold(result, WHY, actor="ana")
    started = worker(conductor=QUICK)
    settled(started)
    assert bodies_of(result) == 0
    assert api.release(result)
    assert api.get_result(result, timeout=40) == 7
    invariants.check(started)


def test_a_running_body_ends_at_its_next_call_and_goes_on_from_there(worker: Any) -> None:
    started = worker(concurrency=1, conductor=QUICK)
    result = stops.walks.delay(steps=12)
    wait_until(lambda: count("step-3"), 40)
    assert api.hold(result, WHY)
    row = wait_until(lambda: Execution.objects.filter(pk=result.id).exclude(status="running").first(), 20)
    assert (row.status, row.attempt, row.is_held) == ("queued", 1, True)
    taken = Ledger.objects.filter(key__startswith="step-").count()
    settled(started)
    assert Ledger.objects.filter(key__startswith="step-").count() == taken < 12
    assert [run.outcome for run in Attempt.objects.filter(execution=result.id)] == [RunOutcome.RELEASED]
    api.release(result)
    assert api.get_result(result, timeout=40) == 1, "no attempt was used up"
    assert [count(f"step-{number}") for number in range(12)] == [1] * 12
    invariants.check(started)


@pytest.mark.parametrize("call", ["step", "atomic_step", "invoke", "map", "start"])
def test_each_call_that_begins_something_new_ends_the_run_of_a_held_one(worker: Any, call: str) -> None:
    started = worker(concurrency=1, conductor=QUICK)
    result = stops.pauses.delay(call)
    wait_for_body(stops.pauses)
    wait_until(lambda: Execution.objects.get(pk=result.id).steps.filter(name="known").exists(), 20)
    assert api.hold(result, WHY)
    note(None, "go")
    wait_for_status(result, "queued")
    settled(started)
    assert (count("effect"), count("after")) == (0, 0)
    assert not Execution.objects.filter(parent=result.id).exists()
    api.release(result)
    assert api.get_result(result, timeout=40) == [1, 0]
    invariants.check(started)


def test_a_long_body_ends_at_a_checkpoint(worker: Any) -> None:
    started = worker(concurrency=1, conductor=QUICK)
    result = scenarios.slow.delay(seconds=3, checkpoints=True)
    wait_for_body(scenarios.slow)
    assert api.hold(result, WHY)
    wait_for_status(result, "queued")
    settled(started)
    assert bodies_of(result) == 1
    api.release(result)
    assert api.get_result(result, timeout=40) == "done"
    invariants.check(started)


def test_a_waiting_one_hears_of_its_child_and_goes_on_after_the_release(worker: Any) -> None:
    started = worker(conductor=QUICK)
    result = stops.waits_for_durable.delay()
    wait_for_body(stops.returns_when_told)
    assert api.hold(result, WHY, tree=False)
    note(None, "go")
    wait_for_status(result, "queued")
    settled(started)
    assert Attempt.objects.filter(execution=result.id).count() == 1
    api.release(result)
    assert api.get_result(result, timeout=40) == "done"
    invariants.check(started)


def test_in_a_retry_pause_the_next_attempt_begins_after_the_release(worker: Any) -> None:
    started = worker(conductor=QUICK)
    result = scenarios.flaky.delay(failures=1)
    wait_for_body(scenarios.flaky)
    wait_for_status(result, "queued")
    assert api.hold(result, WHY)
    settled(started)
    if bodies_of(result) == 1:  # else its pause was over before
        assert not Execution.objects.get(pk=result.id).is_final
    api.release(result)
    assert api.get_result(result, timeout=40) == 2
    invariants.check(started)


def test_a_held_one_is_cancelled(worker: Any) -> None:
    started = worker(conductor=QUICK)
    result = stops.walks.delay(steps=400)
    wait_until(lambda: count("step-1"), 40)
    api.hold(result, WHY)
    wait_for_status(result, "queued")
    assert api.cancel(result, "no use")
    wait_for_status(result, "cancelled")
    invariants.check(started)


def test_a_child_of_a_paused_task_is_not_gone_on_with(worker: Any) -> None:
    started = worker(conductor=QUICK)
    api.pause(scenarios.echo, WHY)
    result = scenarios.pass_through.delay(value=7)
    wait_for_status(result, "waiting")
    assert api.get_result(scenarios.flaky.delay(failures=0), timeout=40) == 1
    child = Execution.objects.get(parent=result.id)
    assert (child.status, child.fence) == ("queued", 0)
    assert api.unpause(scenarios.echo)
    assert api.get_result(result, timeout=40) == 7
    invariants.check(started)


def test_a_plain_task_is_paused_too(worker: Any) -> None:
    started = worker(conductor=QUICK)
    api.pause(stops.plain_when_told, WHY)
    note(None, "go")
    result = stops.waits_for_plain.delay()
    wait_for_status(result, "waiting")
    settled(started)
    assert count("end") == 0
    api.unpause(stops.plain_when_told)
    assert api.get_result(result, timeout=40) == "done"
    invariants.check(started)


def test_none_of_many_is_stranded_when_its_task_is_paused_and_unpaused_again_and_again(worker: Any) -> None:
    results = [scenarios.echo.delay(value=number) for number in range(MANY)]
    workers = [worker(concurrency=2, conductor={**QUICK, "REDISPATCH_SECONDS": 600}) for _ in range(2)]
    for _ in range(5):
        before = Execution.objects.filter(status="succeeded").count()
        api.pause(scenarios.echo, WHY)
        api.unpause(scenarios.echo)
        if before < MANY:
            wait_until(lambda before=before: Execution.objects.filter(status="succeeded").count() > before, 60)
    api.pause(scenarios.echo, WHY)
    wait_until(lambda: not Execution.objects.filter(status="running").exists(), 40)
    done = Execution.objects.filter(status="succeeded").count()
    assert api.get_result(scenarios.flaky.delay(failures=0), timeout=40) == 1
    assert Execution.objects.filter(status="succeeded").count() == done + 1
    api.unpause(scenarios.echo)
    wait_until(lambda: not Execution.objects.open().exists(), 120, message=lambda: str(left()))
    assert {bodies_of(result) for result in results} == {1}
    for one in workers:
        invariants.check(one)


def left() -> list[Any]:
    return list(Execution.objects.open().values("status", "due_at", "dispatch_at", "dispatches", "held_at")[:10])


def test_five_thousand_are_parked_and_given_back_with_claims_in_flight(transactional_db: None) -> None:
    """Without a worker, so that it takes seconds: sweepers park, claims are refused, somebody unpauses meanwhile."""
    template = queued()
    rows = []
    for _ in range(4_999):
        key = new().id
        rows.append(template.copied(pk=key, id=key, root_id=key))
    stored = Execution.objects.get(pk=template.pk)
    for row in rows:
        row.created_at, row.due_at, row.dispatch_at = stored.created_at, stored.due_at, stored.dispatch_at
    Execution.objects.bulk_create(rows, batch_size=500)
    Execution.objects.update(dispatch_at=clock.after(-1))
    api.pause(template.task, WHY)
    over = threading.Event()
    errors: list[BaseException] = []

    def sweep() -> None:
        try:
            while not over.is_set():
                for one in transitions.take_for_dispatch(200):
                    # As a message of which nobody has heard before the task was paused.
                    transitions.claim(one.pk, "test@host/9")
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=sweep, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: Execution.objects.filter(dispatch_at=clock.Never()).count() > 2_000 or errors, 60)
    assert not errors
    assert api.unpause(template.task)
    assert not PausedTask.objects.exists()
    wait_until(
        lambda: not Execution.objects.filter(status="queued").exists() or errors, 120, message=lambda: str(left())
    )
    over.set()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert Execution.objects.filter(status="running", fence=1).count() == 5_000
