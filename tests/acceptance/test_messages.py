"""Messages are doorbells: lost, doubled, late and forged ones change nothing."""

from __future__ import annotations

from typing import Any

import pytest
from celery import states

from conductor_app import api, transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.store.process import process
from project.celery import app
from tests.app import scenarios
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import history, invariants
from tests.support.messages import (
    deliver,
    doorbell,
    empty,
    needs_a_broker,
    publish_garbage,
    queue_that_nobody_serves,
    ring,
)
from tests.support.polling import wait_until
from tests.support.process import NotingBroker, given_back
from tests.support.watching import only, wait_for_body, wait_for_status

pytestmark = pytest.mark.usefixtures("recorded")

OTHER_QUEUE = f"{app.conf.task_default_queue}-other"


@needs_a_broker
def test_lost_messages_of_parents_and_children_are_published_again(worker: Any) -> None:
    started = worker(conductor={"REDISPATCH_SECONDS": 0.5})
    with given_back():
        process.broker = NotingBroker()
        results = [scenarios.pass_through.delay(value=value) for value in range(3)]
    assert [api.get_result(result, timeout=30) for result in results] == [0, 1, 2]
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    invariants.check(started)


@needs_a_broker
def test_a_broker_that_forgets_everything_delays_executions_and_loses_none(worker: Any) -> None:
    with queue_that_nobody_serves(OTHER_QUEUE):
        first = worker(concurrency=1)
        parents = [scenarios.waits_for_a_queue.delay(queue=OTHER_QUEUE, value=value) for value in range(3)]
        for parent in parents:
            wait_for_status(parent, "waiting")
        busy = scenarios.has_one_attempt.delay(seconds=1)
        wait_for_body(scenarios.has_one_attempt)
        queued = [scenarios.pass_through.delay(value=value) for value in range(3)]
        empty(OTHER_QUEUE, first_queue())
        second = worker(concurrency=1, queues=[OTHER_QUEUE])
        assert [api.get_result(parent, timeout=40) for parent in parents] == [0, 1, 2]
        assert [api.get_result(result, timeout=40) for result in queued] == [0, 1, 2]
        assert api.get_result(busy, timeout=20) == "done"
        invariants.check(first, second)


def first_queue() -> str:
    return Execution.objects.filter(parent__isnull=True).values_list("queue", flat=True)[0]


@needs_a_broker
def test_messages_that_come_five_times_too_early_or_too_late_start_nothing(worker: Any) -> None:
    started = worker(pool="threads", concurrency=4)
    results = [scenarios.slow.delay(seconds=0.3) for _ in range(3)]
    later = scenarios.echo.apply_async(kwargs={"value": 1}, countdown=3_600)
    ring(later.id, scenarios.echo, times=3)
    for result in results:
        ring(result.id, scenarios.slow, times=5)
    for result in results:
        assert api.get_result(result, timeout=20) == "done"
        ring(result.id, scenarios.slow, times=3)
    assert api.get_result(scenarios.pass_through.delay(value="last"), timeout=20) == "last"
    wait_until(lambda: started.log.count("dropped") >= 3 * 8 - 3, message="Not every message was delivered")
    assert [count("body", result.id) for result in results] == [1, 1, 1]
    assert (count("body", later.id), Execution.objects.get(pk=later.id).fence) == (0, 0)
    api.cancel(later)
    invariants.check(started)


@needs_a_broker
@pytest.mark.timeout(240)  # each message that can be read costs a look at the database
def test_a_thousand_forged_messages_change_nothing_and_leave_the_worker_up(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=4)
    done = scenarios.echo.delay(value="done")
    assert api.get_result(done, timeout=20) == "done"
    waiting = scenarios.parent_of_the_go.delay()
    running = wait_for_body(scenarios.waits_for_the_go).execution_id
    later = scenarios.echo.apply_async(kwargs={"value": 1}, countdown=3_600)
    known = {str(pk) for pk in Execution.objects.values_list("pk", flat=True)}
    before = list(Execution.objects.order_by("pk").values_list("pk", "status", "fence", "attempt"))

    publish_garbage(scenarios.echo, 1_000, ids=[str(key) for key in (done.id, waiting.id, running, later.id)])
    assert api.get_result(scenarios.pass_through.delay(value="last"), timeout=180) == "last"

    after = Execution.objects.filter(pk__in=known).order_by("pk")
    assert list(after.values_list("pk", "status", "fence", "attempt")) == before
    assert not Ledger.objects.filter(key="forged").exists()
    assert done.state == states.SUCCESS
    assert started.is_alive
    for execution in Execution.objects.open():
        api.cancel(execution)
    # A message that could become an execution, if its arguments did fit, fails as it does for any other task.
    misfits = started.log.count("raised unexpected")
    assert misfits < 50
    invariants.check(started, tracebacks=misfits)


@pytest.mark.parametrize("kind", ["doorbell", "adopted"])
@pytest.mark.parametrize("status", ["queued later", "waiting", "succeeded", "failed", "cancelled"])
def test_a_forged_delivery_changes_nothing_about_the_execution_that_it_names(
    transactional_db: None, status: str, kind: str
) -> None:
    execution = _execution(status)
    before = Execution.objects.filter(pk=execution.pk).values().get()
    told = history.celery_states().get(str(execution.pk), [])
    header = doorbell() if kind == "doorbell" else {}
    task = scenarios.parent_of_the_go
    link = [scenarios.echo.s(value="forged")]
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((), {"no": "such argument"}), ((object(),), {})):
        deliver(task, str(execution.pk), args, kwargs, callbacks=link, errbacks=link, **header)
    assert Execution.objects.filter(pk=execution.pk).values().get() == before
    assert Execution.objects.count() == 1
    assert history.celery_states().get(str(execution.pk), []) == told


def _execution(status: str) -> Execution:
    options = {"countdown": 3_600} if status != "waiting" else {}
    result = scenarios.parent_of_the_go.apply_async(**options)
    execution = Execution.objects.get(pk=result.id)
    if status == "queued later":
        return execution
    if status == "cancelled":
        api.cancel(execution)
    else:
        Execution.objects.filter(pk=result.id).update(due_at=execution.created_at)
        held = transitions.claim(execution.pk, "somebody")
        assert held is not None
        if status == "succeeded":
            transitions.succeed(held, "null")
        elif status == "failed":
            transitions.fail(held, Failure(type="X", message="x"))
        else:
            transitions.suspend(held, transitions.Sleep("nap", seconds=3_600))
    return Execution.objects.get(pk=result.id)


@pytest.mark.parametrize(
    "task_id", ["0b8f7a52-6a0e-4c39-9d1c-5a2f4f1c7e60", "7", "no-uuid", "", "' OR 1=1 --", "x" * 10_000]
)
def test_a_delivery_that_claims_an_execution_that_does_not_exist_is_dropped(
    transactional_db: None, task_id: str
) -> None:
    deliver(scenarios.echo, task_id, **doorbell())
    deliver(scenarios.echo, task_id, (1, 2, 3), {"no": "such argument"}, **doorbell())
    assert not Execution.objects.exists()
    assert history.celery_states() == {}


def test_a_delivery_again_and_again_runs_the_body_once(transactional_db: None) -> None:
    result = scenarios.echo.delay(value=1)
    for _ in range(5):
        deliver(scenarios.echo, result.id, **doorbell())
    assert count("body", result.id) == 1
    assert only(scenarios.echo).fence == 1
    invariants.check()
