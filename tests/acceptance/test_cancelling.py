"""Once `api.cancel` has returned True: no step's function begins any more, and the end is cancelled."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import ChildCancelled, api
from conductor_app.exceptions import ExecutionCancelled, ExecutionFailed
from conductor_app.models import Execution, FailedExecution
from tests.app import scenarios, stops
from tests.app.ledger import count, note
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body, wait_for_status
from tests.support.worker import pools

pytestmark = pytest.mark.usefixtures("recorded")

#: No heartbeat tells a body of anything during a test.
NO_HEARTBEAT = {"LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 100}


@pools
def test_no_function_of_a_step_begins_after_a_cancel(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1, conductor=NO_HEARTBEAT)
    for number, call in enumerate(["step", "atomic_step", "start", "invoke", "map"], 1):
        result = stops.pauses.delay(call)
        wait_for_body(stops.pauses, number)
        assert api.cancel(result) is True
        note(None, "go")
        wait_for_status(result, "cancelled")
        assert count("effect") == count("after") == 0, call
        assert not Execution.objects.get(pk=result.id).children.exists()
        _forget("go")
    invariants.check(started)


def test_a_body_that_cancels_itself_begins_no_step_either(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, conductor=NO_HEARTBEAT)
    result = stops.cancels_itself.delay()
    wait_for_status(result, "cancelled")
    assert (count("before"), count("effect")) == (1, 0)


@pools
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
def test_a_body_that_ends_after_a_cancel_is_cancelled_and_a_retry_adopts_what_it_returned(
    worker: Any, fails: bool, pool: str
) -> None:
    started = worker(pool=pool, concurrency=1, conductor=NO_HEARTBEAT)
    link = scenarios.echo.s()
    result = stops.returns_when_told.apply_async(kwargs={"fails": fails}, link=link)
    wait_for_body(stops.returns_when_told)
    assert api.cancel(result, reason="the customer called") is True
    note(None, "go")
    with pytest.raises(ExecutionCancelled, match="the customer called"):
        api.get_result(result, timeout=40)
    row = Execution.objects.get(pk=result.id)
    assert (count("end"), row.get_result(), row.attempt) == (1, None if fails else "done", 1)
    assert not FailedExecution.objects.exists()
    assert not Execution.objects.filter(task=scenarios.echo.name).exists()
    api.retry(result)
    if fails:
        with pytest.raises(ExecutionFailed, match="card declined"):
            api.get_result(result, timeout=40)
    else:
        assert api.get_result(result, timeout=40) == "done"
        # Its callbacks are called as after any success.
        wait_until(lambda: Execution.objects.filter(task=scenarios.echo.name, status="succeeded").exists(), 40)
        assert Execution.objects.get(task=scenarios.echo.name).get_result() == "done"
    assert count("body", result.id) == 1 + fails
    invariants.check(started, tracebacks=int(fails))


def test_children_of_a_cancelled_parent_keep_what_they_return_and_a_retry_of_the_parent_adopts_it(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2, conductor=NO_HEARTBEAT)
    durable, plain = stops.waits_for_durable.delay(), stops.waits_for_plain.delay()
    parents = [durable, plain]
    children = Execution.objects.filter(parent_id__in=[parent.id for parent in parents])
    wait_until(lambda: count("body") == 2, 40)
    assert [api.cancel(parent) for parent in parents] == [True, True]
    note(None, "go")
    wait_until(lambda: children.filter(status="cancelled").count() == 2, 40)
    assert [child.get_result() for child in children] == ["done", "done"]
    for parent in parents:
        with pytest.raises(ExecutionCancelled):
            api.get_result(parent, timeout=20)
        api.retry(parent)
        assert api.get_result(parent, timeout=40) == "done"
    assert (count("body"), count("end")) == (2, 2)
    assert set(children.values_list("status", flat=True)) == {"succeeded"}
    invariants.check(started)


def test_a_cancelled_child_that_returned_is_a_cancelled_child_for_its_parent(worker: Any) -> None:
    worker(pool="prefork", concurrency=2, conductor=NO_HEARTBEAT)
    parent = stops.waits_for_durable.delay()
    wait_until(lambda: count("body") == 1, 40)
    child = Execution.objects.get(parent_id=parent.id)
    assert api.cancel(child)
    note(None, "go")
    with pytest.raises(ExecutionFailed, match="Child execution was cancelled"):
        api.get_result(parent, timeout=40)
    assert FailedExecution.objects.get().error_class.endswith(ChildCancelled.__name__)
    api.retry(parent)
    assert api.get_result(parent, timeout=40) == "done"
    assert count("body") == 1


def test_a_child_that_is_late_for_a_timeout_keeps_its_success(worker: Any) -> None:
    worker(pool="prefork", concurrency=2, conductor={**NO_HEARTBEAT, "SWEEP_SECONDS": 0.5})
    parent = stops.waits_for_durable.delay(timeout=1)
    with pytest.raises(ExecutionFailed, match="timed out"):
        api.get_result(parent, timeout=40)
    child = Execution.objects.get(parent_id=parent.id)
    note(None, "go")
    wait_until(lambda: Execution.objects.get(pk=child.pk).is_final, 40)
    child.refresh_from_db()
    assert (child.status, child.get_result()) == ("succeeded", "done")
    api.retry(parent)
    assert api.get_result(parent, timeout=40) == "done"
    assert count("body") == 1


def _forget(key: str) -> None:
    from tests.app.models import Ledger

    Ledger.objects.filter(key=key).delete()
