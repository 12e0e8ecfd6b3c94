"""During a deployment, workers of two versions serve one queue: nothing is lost, and no attempt is used up."""

from __future__ import annotations

import datetime as dt
import io
import json
from typing import Any

from celery import states
from celery.result import AsyncResult
from django.core.management import call_command

from conductor_app import api
from conductor_app.models import Execution, FailedExecution
from conductor_app.values.failures import dump_failure, load_failure
from tests.app import versions
from tests.app.ledger import count
from tests.support import invariants
from tests.support.executions import invocation, running
from tests.support.polling import wait_until
from tests.support.results import backends, using
from tests.support.watching import wait_for_status
from tests.support.worker import pools


def wait_until_put_off(result: Any, times: int = 1) -> Execution:
    """Wait until a worker has put it off so often, and return it as it is then."""

    def put_off() -> Execution | None:
        row = Execution.objects.get(pk=result.id)
        done = (load_failure(row.error).attributes or {}).get("put_off_times", 0) if row.put_off_because else 0
        return row if done >= times else None

    return wait_until(put_off, 40, message=lambda: f"It was not put off: {vars(Execution.objects.get(pk=result.id))}")


def shown(result: Any) -> str:
    """What ``conductor show`` says."""
    out = io.StringIO()
    call_command("conductor", "show", str(result.id), stdout=out)
    return " ".join(out.getvalue().split())


@backends
def test_a_task_that_a_worker_does_not_know_waits_for_one_that_does(worker: Any, result_backend: str) -> None:
    with using(result_backend) as env:
        old = worker(pool="prefork", concurrency=1, env={**env, **versions.OLD})
        result = versions.introduced.delay(7)
        row = wait_until_put_off(result, times=2)
        assert (row.status, row.attempt, row.fence) == ("queued", 1, 0)
        assert AsyncResult(result.id).state == states.PENDING
        assert f"{old.name}@" in row.put_off_because
        assert f'took its message and knows no task "{versions.introduced.name}"' in row.put_off_because
        assert "Put off, no attempt is used up: Worker" in shown(result) or "It was put off before" in shown(result)
        new = worker(pool="prefork", concurrency=1, env=env)
        old.stop()
        assert result.get(timeout=60) == 7
        assert result.state == states.SUCCESS
        assert (count("new"), Execution.objects.get(pk=result.id).attempt) == (1, 1)
        assert f"knows no task '{versions.introduced.name}'" in old.log
        assert "Traceback" not in old.log
        invariants.check(old, new)


@pools
def test_a_payload_that_does_not_fit_an_older_worker_waits_for_a_newer_one(worker: Any, pool: str) -> None:
    old = worker(pool=pool, concurrency=1, env=versions.OLD)
    result = versions.charge.delay(7, currency="EUR")
    row = wait_until_put_off(result, times=2)
    assert row.attempt == 1
    assert f"Its payload does not fit {versions.charge.name}(order: int)" in row.put_off_because
    assert "unexpected keyword argument 'currency'" in row.put_off_because
    assert "does not fit" in shown(result)
    assert "is put off by" in old.log
    new = worker(pool=pool, concurrency=1)
    old.stop()  # as at the end of a deployment; until then the two take turns
    assert api.get_result(result, timeout=60) == "7 EUR"
    assert (count("old"), count("new"), Execution.objects.get(pk=result.id).attempt) == (0, 1, 1)
    invariants.check(old, new)


def test_children_of_newer_code_come_through_beside_older_workers(worker: Any) -> None:
    workers = [worker(pool="prefork", concurrency=2, env=env) for env in (versions.OLD, {})]
    results = [versions.order.delay(number) for number in range(5)]
    wait_until(lambda: "is put off by" in workers[0].log, timeout=60, message="The older worker has taken nothing")
    workers[0].stop()  # as at the end of a deployment; until then the two take turns
    assert [api.get_result(result, timeout=90) for result in results] == [[f"{n} EUR"] * 2 for n in range(5)]
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert (count("old"), count("new")) == (0, 10)
    invariants.check(*workers)


def test_a_plain_task_whose_payload_does_not_fit_an_older_worker_waits_for_a_newer_one(worker: Any) -> None:
    from conductor_app.transitions import suspend

    parent = running()
    wait = invocation(
        parent,
        task=versions.send.name,
        max_attempts=4,
        payload='[[],{"order":7,"currency":"EUR"}]',
        options='{"plain":{"acks_late":false},"ignore_result":true}',
    )
    assert suspend(parent, wait)
    child = Execution.objects.get(pk=wait.child.id)
    old = worker(pool="prefork", concurrency=1, env=versions.OLD)
    wait_until_put_off(child)
    worker(pool="prefork", concurrency=1)
    old.stop()
    row = wait_for_status(child, "succeeded", 60)
    assert (row.get_result(), row.attempt, count("old")) == ("7 EUR", 1, 0)
    assert "Traceback" not in old.log


def test_a_payload_that_fits_nobody_fails_after_an_hour_and_says_why(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, env=versions.OLD)
    result = versions.charge.delay(7, currency="EUR")
    row = wait_until_put_off(result)
    failure = load_failure(row.error)
    assert failure.attributes is not None
    failure.attributes["put_off_since"] -= dt.timedelta(hours=1)
    Execution.objects.filter(pk=row.pk).update(error=dump_failure(failure))
    wait_for_status(result, "failed", 40)
    failed = FailedExecution.objects.get(pk=row.pk)
    assert (failed.error_class, failed.attempts) == ("conductor_app.exceptions.PayloadMismatch", 1)
    assert failed.message.startswith(f"The stored payload does not fit {versions.charge.name}(order: int)")
    assert json.dumps(failed.message)
