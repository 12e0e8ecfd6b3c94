"""What a body has met once it meets on each replay, whatever the database does."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from conductor_app import api
from conductor_app.exceptions import ExecutionFailed
from conductor_app.models import Execution, FailedExecution, Step
from tests.app import remembered
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import invariants
from tests.support.databases import end_other_sessions
from tests.support.polling import wait_until
from tests.support.watching import wait_for_status

needs_sessions = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="SQLite has neither sessions nor locks on a row"
)


@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_statement_that_is_cancelled_is_refunded_and_never_shipped(worker: Any, call: str) -> None:
    started = worker(concurrency=2)
    result = remembered.refunds.delay(call=call)
    assert api.get_result(result, timeout=40) == "refunded"
    assert (count("refund"), count("ship")) == (1, 0)
    invariants.check(started)


@needs_sessions
def test_two_atomic_steps_that_lock_each_other_out_both_take_effect_once(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2)
    keys = [Ledger.objects.create(key="shared", value="0", pid=0).pk for _ in range(2)]
    results = [remembered.locks_both.delay(keys=order) for order in (keys, keys[::-1])]
    assert [api.get_result(result, timeout=60) for result in results] == [1, 1]
    assert [row.value for row in Ledger.objects.filter(key="shared")] == ["2", "2"]
    assert "was undone and is run again" in started.log
    invariants.check(started)


@needs_sessions
@pytest.mark.usefixtures("recorded")
def test_atomic_steps_whose_sessions_the_server_ends_take_effect_once_and_cost_no_attempt(worker: Any) -> None:
    worker(pool="threads", concurrency=2)
    results = [remembered.notes_often.delay(times=20) for _ in range(2)]
    wait_until(lambda: count("often") > 1, 30, message="No body has begun")
    for _ in range(8):
        before = [count("often", result.id) for result in results]
        end_other_sessions()
        # One step whose session ends each time is not run for ever.
        wait_until(
            lambda before=before: all(
                count("often", result.id) > min(number, 19) for result, number in zip(results, before, strict=True)
            ),
            30,
            message="A step is not run again",
        )
    assert [api.get_result(result, timeout=60) for result in results] == [1, 1]
    assert [count("often", result.id) for result in results] == [20, 20]
    invariants.check()


@pytest.mark.parametrize(
    ("step", "how"), [("one", "deleted"), ("one", "unlinked"), ("many", "deleted"), ("beside", "emptied")]
)
def test_a_parent_whose_childs_outcome_is_gone_fails_and_gets_no_none(worker: Any, step: str, how: str) -> None:
    started = worker(pool="prefork", concurrency=2)
    result = remembered.naps_after_all.delay()
    wait_until(
        lambda: Step.objects.filter(execution_id=result.id, name="nap").exists(), 40, message="It does not sleep"
    )
    wait_for_status(result, "waiting")
    children = Execution.objects.filter(parent_id=result.id, step=step)
    if how == "deleted":
        children.filter(pk=children.latest("id").pk).delete()
    elif how == "unlinked":
        Step.objects.filter(execution_id=result.id, name=step).update(child=None)
    else:
        children.update(result=None)
    with pytest.raises(ExecutionFailed, match=f"Step '{step}' was recorded as succeeded, and its .* is gone"):
        api.get_result(result, timeout=40)
    failed = FailedExecution.objects.get(pk=result.id)
    assert (failed.error_class, failed.step, failed.attempts) == ("conductor_app.exceptions.OutcomeLost", step, 1)
    started.wait_for_log("is gone")
