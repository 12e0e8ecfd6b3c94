"""Plain Celery tasks as durable children, on real workers: Celery runs and retries them, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from celery import current_app
from django.conf import settings
from django_celery_results.models import TaskResult

from conductor_app import api
from conductor_app.body.plain import django_tasks
from conductor_app.exceptions import ExecutionFailed
from conductor_app.models import Execution, FailedExecution
from conductor_app.transitions import dispatch
from tests.app import plain
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.app.tasks import add
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.worker import pools

pytestmark = pytest.mark.usefixtures("recorded")

#: Where the settings of the tests send ``plain.routed``.
PLAIN_QUEUE: str = settings.CELERY_TASK_ROUTES[plain.routed.name]["queue"]
#: Far longer than a test: only Celery's report of a death can end what a dead process ran.
LONG_LEASE = {"LEASE_SECONDS": 600}


def child_of(result: Any) -> Execution:
    return Execution.objects.get(parent_id=result.id)


def wait_for_run(task: Any, number: int = 1) -> Ledger:
    """Wait until a plain body has begun ``number`` times, and return the latest line that one wrote."""
    rows = Execution.objects.filter(task=task.name).values("pk")
    lines = Ledger.objects.filter(key="plain", execution_id__in=rows)
    wait_until(lambda: lines.count() >= number, 30, message=f"{task.name} has not begun {number} times")
    return lines.latest("id")


@pools
def test_results_failures_and_retries_reach_the_parent(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1 if pool == "solo" else 2)
    value = {"a": [1, None, 0.5], "b": "ü"}
    results = {
        "echo": plain.invokes.delay(child=plain.echo.name, payload={"value": value}),
        "none": plain.invokes.delay(child=plain.echo.name),
        "add": plain.invokes.delay(child=add.name, payload={"x": 2, "y": 3}),
        "builtin": plain.invokes.delay(child="celery.accumulate", payload=[1, 2]),
        "hooked": plain.invokes.delay(child=plain.Hooked.name, payload={"value": 4}),
        "flaky": plain.invokes.delay(child=plain.flaky.name, payload={"failures": 2}),
        "at once": plain.invokes.delay(child=plain.retries_at_once.name, payload={"values": [1]}),
        "requeued": plain.invokes.delay(child=plain.rejects.name, payload={"requeue": True}),
    }
    mapped = plain.maps.delay(values=[1, 2, 3, 4], max_parallel=2)
    assert api.get_result(mapped, timeout=60) == [1, 2, 3, 4, "beside"]
    expected: dict[str, Any] = {
        "echo": value,
        "none": None,
        "add": 5,
        "builtin": [[1, 2]],
        "hooked": 8,
        "flaky": 2,
        "at once": [1, 2],
        "requeued": "taken",
    }
    for name, result in results.items():
        assert api.get_result(result, timeout=60) == {"child": expected[name]}, name
        assert count("body", result.id) == 2
    flaky = child_of(results["flaky"])
    assert (flaky.attempt, flaky.max_attempts) == (3, 4)
    runs = Ledger.objects.filter(key="plain", execution_id=flaky.pk)
    assert list(runs.values_list("value", flat=True)) == ["0", "1", "2"]
    hooked = child_of(results["hooked"])
    assert [count(key, hooked.pk) for key in ("before_start", "plain", "on_success")] == [1, 1, 1]
    failing = plain.invokes.delay(child=plain.fails.name, payload={"message": "card 4711 declined: ünknown"})
    with pytest.raises(ExecutionFailed, match=r"^Child execution failed: card 4711 declined: ünknown$"):
        api.get_result(failing, timeout=30)
    failure = FailedExecution.objects.get(pk=child_of(failing).pk)
    assert (failure.error_class, failure.attempts) == ("builtins.ValueError", 1)
    assert "raise ValueError(message)" in failure.traceback
    assert "trace_task" not in failure.traceback
    for child, message, error_class in (
        (plain.flaky.name, "Child execution failed: failure 4", "builtins.ConnectionError"),
        (
            plain.ignores.name,
            f"Child execution failed: {plain.ignores.name} ended with neither a result nor an error by raising "
            "Ignore('nothing to do').",
            "conductor_app.exceptions.TaskEndedWithoutOutcome",
        ),
        (
            plain.rejects.name,
            f"Child execution failed: {plain.rejects.name} ended with neither a result nor an error by raising "
            "Reject('not now', False).",
            "conductor_app.exceptions.TaskEndedWithoutOutcome",
        ),
        (
            plain.returns_a_set.name,
            f"Child execution failed: result of {plain.returns_a_set.name} is a set. Return a sorted list.",
            "conductor_app.exceptions.NotSerializable",
        ),
    ):
        payload = {"failures": 9} if child == plain.flaky.name else None
        payload = {"requeue": False} if child == plain.rejects.name else payload
        caught = api.get_result(plain.catches.delay(child=child, payload=payload), timeout=60)
        assert caught["error_class"] == error_class
        assert caught["failed"].startswith(message), caught
    invariants.check(started, tracebacks=4)


def test_no_result_backend_is_needed_and_a_broken_one_changes_nothing(worker: Any) -> None:
    for backend in ("disabled://", "tests.support.results:AwayBackend"):
        started = worker(pool="prefork", env={"CELERY_RESULT_BACKEND": backend})
        result = plain.invokes.delay(child=plain.echo.name, payload={"value": 7})
        assert api.get_result(result, timeout=30) == {"child": 7}
        failing = plain.catches.delay(child=plain.fails.name, payload={"message": "declined"})
        assert api.get_result(failing, timeout=30) == {
            "failed": "Child execution failed: declined",
            "error_class": "builtins.ValueError",
        }
        retried = plain.invokes.delay(child=plain.flaky.name, payload={"failures": 1})
        assert api.get_result(retried, timeout=30) == {"child": 1}
        started.kill()


def test_a_child_keeps_its_own_queue(worker: Any) -> None:
    worker(pool="prefork")
    routed = worker(pool="solo", concurrency=1, queues=[PLAIN_QUEUE])
    result = plain.invokes.delay(child=plain.routed.name)
    assert api.get_result(result, timeout=30) == {"child": PLAIN_QUEUE}
    child = child_of(result)
    assert child.queue == PLAIN_QUEUE
    assert child.deadline_at is not None
    assert str(child.pk) in routed.log


def test_a_killed_process_fails_the_child_and_one_with_acks_late_runs_again(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=3, conductor=LONG_LEASE)
    early = plain.catches.delay(child=plain.kills_its_process.name, payload={"times": 1})
    late = plain.invokes.delay(child=plain.kills_its_process_late.name, payload={"times": 1})
    always = plain.catches.delay(child=plain.kills_its_process_late.name, payload={"times": 99})
    exiting = plain.catches.delay(child=plain.exits.name)
    for result in (early, exiting):
        caught = api.get_result(result, timeout=60)
        assert caught["failed"].startswith("Child execution failed: Worker died: ")
        assert caught["failed"].endswith(
            "It is not run again: it is a plain Celery task without acks_late, and may have done its work."
        )
        assert caught["error_class"] == "conductor_app.exceptions.WorkerLost"
        assert count("plain", child_of(result).pk) == 1
    assert api.get_result(late, timeout=60) == {"child": 1}
    assert count("plain", child_of(late).pk) == 2
    assert api.get_result(always, timeout=60)["failed"].endswith("stopped while running attempt 3 of 3.")
    assert count("plain", child_of(always).pk) == 3
    invariants.check(started, tracebacks=99)


def test_every_kill_is_heard_of(worker: Any) -> None:
    """The main process stores a failure, forks, and stores the next: the fork must not cost it its connection."""
    started = worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    for _ in range(3):
        result = plain.catches.delay(child=plain.kills_its_process.name, payload={"times": 1})
        assert "Worker died: " in api.get_result(result, timeout=20)["failed"]
        told = current_app.AsyncResult(str(child_of(result).pk))
        wait_until(lambda told=told: told.state == "FAILURE", message="Celery has not heard of it")
    invariants.check(started, tracebacks=99)


def test_a_worker_that_is_gone_is_missed_by_its_lease(worker: Any) -> None:
    first = worker(pool="prefork", concurrency=2)
    early = plain.catches.delay(child=plain.slow.name, payload={"seconds": 300})
    wait_for_run(plain.slow)
    first.kill()
    second = worker(pool="prefork", concurrency=2)
    assert "Worker died: " in api.get_result(early, timeout=40)["failed"]
    assert count("plain", child_of(early).pk) == 1
    invariants.check(second)


def test_time_limits_fail_the_child(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2, conductor=LONG_LEASE)
    hard, soft = (
        plain.catches.delay(child=task.name) for task in (plain.over_the_hard_limit, plain.over_the_soft_limit)
    )
    caught = api.get_result(hard, timeout=40)
    assert caught["error_class"] == "billiard.exceptions.TimeLimitExceeded"
    assert caught["failed"].startswith("Child execution failed: TimeLimitExceeded(1")
    assert api.get_result(soft, timeout=40)["error_class"] == "billiard.exceptions.SoftTimeLimitExceeded"
    assert count("plain") == 2
    invariants.check(started, tracebacks=99)


@pools
def test_a_running_child_that_is_cancelled_ends_cancelled_and_its_result_is_kept(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1)
    result = plain.catches.delay(child=plain.slow.name, payload={"seconds": 1.5})
    wait_for_run(plain.slow)
    child = child_of(result)
    assert api.cancel(child.pk, reason="too late")
    assert "too late" in api.get_result(result, timeout=30)["cancelled"]
    assert (child_of(result).status, child_of(result).get_result()) == ("cancelled", "done")
    invariants.check(started)


def test_a_queued_child_that_is_cancelled_never_runs(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1)
    result = plain.catches.delay(child=plain.routed.name)
    child = wait_until(lambda: Execution.objects.filter(parent_id=result.id, status="queued").first())
    assert api.cancel(child.pk, reason="not wanted")
    assert "not wanted" in api.get_result(result, timeout=30)["cancelled"]
    other = worker(pool="solo", concurrency=1, queues=[PLAIN_QUEUE])
    last = plain.invokes.delay(child=plain.routed.name)
    assert api.get_result(last, timeout=30) == {"child": PLAIN_QUEUE}
    assert count("plain") == 1
    invariants.check(started, other)


def test_a_parent_that_times_out_cancels_its_retrying_child(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2)
    result = plain.catches.delay(child=plain.waits_for_its_retry.name, payload={"countdown": 4}, timeout=1.5)
    assert api.get_result(result, timeout=30)["failed"].startswith("Child execution timed out after 1.5s")
    invariants.check(started)
    assert child_of(result).status == "cancelled"
    assert count("plain") == 1


def test_revoking_a_running_child_with_terminate_cancels_it_and_an_operator_can_retry_it(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    result = plain.invokes.delay(child=plain.kills_time_once.name)
    wait_for_run(plain.kills_time_once)
    child = child_of(result)
    current_app.control.revoke(str(child.pk), terminate=True) if not dispatch.is_embedded() else pytest.skip(
        "memory:// takes no remote commands"
    )
    with pytest.raises(ExecutionFailed, match="revoked through Celery"):
        api.get_result(result, timeout=40)
    assert child_of(result).status == "cancelled"
    api.retry(result)
    assert api.get_result(result, timeout=40) == {"child": "second"}
    invariants.check(started, tracebacks=9)


def test_a_task_that_no_worker_knows_uses_up_its_attempts(worker: Any) -> None:
    from conductor_app.transitions import suspend
    from tests.support.executions import invocation, running

    parent = running()
    options = '{"plain":{"acks_late":false},"ignore_result":true}'
    assert suspend(parent, invocation(parent, task="tests.not.there", max_attempts=2, options=options))
    started = worker(pool="prefork", concurrency=1, conductor={"REDISPATCH_SECONDS": 0.5})
    child = Execution.objects.get(parent_id=parent.pk)
    wait_until(lambda: Execution.objects.get(pk=child.pk).is_final, 40, message="It is not final")
    failure = FailedExecution.objects.get(pk=child.pk)
    assert (failure.error_class, failure.attempts) == ("celery.exceptions.NotRegistered", 2)
    assert 'knows no task "tests.not.there"' in failure.message
    invariants.check(started, tracebacks=99, timeout=20)


def test_celery_stores_the_result_of_a_child_as_of_any_task(worker: Any) -> None:
    worker(pool="prefork")
    result = plain.invokes.delay(child=plain.echo.name, payload={"value": 7})
    assert api.get_result(result, timeout=30) == {"child": 7}
    row = TaskResult.objects.get(task_id=str(child_of(result).pk))
    assert (row.status, row.result) == ("SUCCESS", "7")


@pools
@pytest.mark.skipif(django_tasks is None, reason="django.tasks came with Django 6.0")
def test_tasks_of_django_run_as_children(worker: Any, pool: str) -> None:
    worker(pool=pool)
    result = plain.invokes_tasks_of_django.delay(value=4)
    assert api.get_result(result, timeout=30) == [8, ["a", 1]]
