"""What a body leaves on its connection is its own error, and no run after it sees any of it."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from conductor_app import api
from conductor_app.exceptions import ExecutionFailed, InvokeInsideTransaction, UncleanConnection
from conductor_app.models import Execution, FailedExecution
from tests.app import endings, scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.bodies import class_name
from tests.support.polling import wait_until
from tests.support.worker import pools

#: Only what the database or its driver has.
LACKS = {
    "sqlite": {"failed", "read only, raw", "search path", "statement timeout"},
    "mysql": {"search path"},
    "postgresql": set(),
}[connection.vendor]
LEFT = [kind for kind in endings.LEFT if kind not in LACKS]
HARMLESS = [kind for kind in endings.HARMLESS if kind not in LACKS]
#: Far longer than a test: no lease that lapses may mend anything.
LONG_LEASE = {"LEASE_SECONDS": 600, "REDISPATCH_SECONDS": 20}
LATER = 20


def go_on(number: int = LATER) -> None:
    """Run more executions than one, with a child each, in the same process."""
    results = [scenarios.pass_through.delay(value=value) for value in range(number)]
    assert [api.get_result(result, timeout=60) for result in results] == list(range(number))
    assert set(Execution.objects.filter(task=scenarios.pass_through.name).values_list("attempt", flat=True)) == {1}


def why(execution: Any) -> FailedExecution:
    return FailedExecution.objects.get(pk=execution.id)


@pools
def test_what_loses_writes_is_the_attempts_error_and_nothing_is_left_of_it(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1, conductor=LONG_LEASE)
    for kind in LEFT if pool == "prefork" else ["block", "autocommit"]:
        result = endings.leaves.delay(kind=kind)
        with pytest.raises(ExecutionFailed):
            api.get_result(result, timeout=30)
        assert why(result).error_class == class_name(UncleanConnection), kind
        assert endings.LEFT[kind][1] in why(result).message, kind
        assert 'on the connection "default"' in why(result).message
        assert (why(result).attempts, count("body", result.id)) == (2, 2)
        wait_until(lambda result=result: result.state == "FAILURE")
        go_on(3)
    # A retry may end well, and a parent hears of a failure at once.
    assert api.get_result(endings.leaves.delay(kind="block", always=False), timeout=30) == "left"
    caught = endings.catches.delay(child=endings.leaves.name, payload={"kind": "block"})
    assert api.get_result(caught, timeout=30)["error_class"] == class_name(UncleanConnection)
    go_on()
    assert count("lost") == 0
    invariants.check()


def test_session_settings_and_closed_connections_are_no_error_and_stay_with_their_body(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    for kind in HARMLESS:
        result = endings.leaves.delay(kind=kind)
        assert api.get_result(result, timeout=30) == "left", kind
        assert count("body", result.id) == 1
        caught = endings.catches.delay(child=endings.leaves.name, payload={"kind": kind})
        assert api.get_result(caught, timeout=30) == {"child": "left"}
        go_on(3)
    go_on()
    invariants.check()


def test_what_a_suspended_or_failing_body_leaves_is_found_too(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    for kind in LEFT:
        waiting, raising = endings.leaves_and_waits.delay(kind=kind), endings.leaves_and_raises.delay(kind=kind)
        for result in (waiting, raising):
            with pytest.raises(ExecutionFailed):
                api.get_result(result, timeout=30)
        assert why(waiting).error_class == class_name(UncleanConnection), kind
        assert endings.LEFT[kind][1] in why(waiting).message
        # The body's own error counts, and says what was found besides.
        assert (why(raising).error_class, why(raising).message) == ("builtins.ValueError", "its own")
        if kind != "read only, raw":
            assert endings.LEFT[kind][1] in why(raising).traceback
        go_on(2)
    go_on()
    invariants.check()


@pytest.mark.parametrize("call", ["invoke", "after", "step", "atomic_step"])
def test_calls_are_refused_in_whatever_transaction_is_open(worker: Any, call: str) -> None:
    worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    kinds = ["block", "blocks", "autocommit", "begin"]
    for kind in kinds[:2] if call == "atomic_step" else kinds:
        result = endings.calls_inside.delay(kind=kind, call=call)
        with pytest.raises(ExecutionFailed, match="which would undo the memory of it"):
            api.get_result(result, timeout=30)
        assert why(result).error_class == class_name(InvokeInsideTransaction), kind
        go_on(2)
    assert count("lost") == 0
    invariants.check()


def test_a_plain_child_gets_its_outcome_whatever_it_leaves(worker: Any) -> None:
    """Celery has told of its outcome before anybody can look."""
    worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    for kind in [*LEFT, *HARMLESS]:
        results = [endings.catches.delay(child=endings.plain_leaves.name, payload={"kind": kind}) for _ in range(3)]
        for result in results:
            assert api.get_result(result, timeout=30) == {"child": "left"}, kind
        go_on(3)
    invariants.check()


def test_a_plain_task_of_nobody_does_not_poison_the_process(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, conductor=LONG_LEASE)
    if not scenarios.echo.app.conf.broker_url.startswith("memory"):
        for kind in ("block", "blocks", "autocommit", "begin"):
            endings.plain_leaves.delay(kind=kind)
            go_on(2)
    assert api.get_result(scenarios.pass_through.delay(value=1), timeout=30) == 1


def test_a_soft_time_limit_inside_of_a_block_is_the_attempts_error(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=4, conductor=LONG_LEASE)
    results = [endings.transacts_until_the_limit.delay() for _ in range(24)]
    for result in results:
        assert api.get_result(result, timeout=90) == "done"
    go_on(8)
    rows = Execution.objects.filter(task=endings.transacts_until_the_limit.name)
    # More than one of them where a claim takes a second.
    assert min(rows.values_list("attempt", flat=True)) == 2
    assert all("SoftTimeLimitExceeded" in (row.error or "") or row.error is None for row in rows)
    assert "Worker died" not in started.log
    invariants.check()


@pools
def test_a_connection_on_which_nothing_can_be_claimed_is_thrown_away(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1, conductor={**LONG_LEASE, "REDISPATCH_SECONDS": 0.3})
    spoiling = endings.catches.delay(child=endings.spoils_its_connection.name)
    assert api.get_result(spoiling, timeout=40) == {"child": "spoilt"}
    go_on(3)
    if pool != "gevent":  # where the next run has a greenlet, and so a connection, of its own
        assert "This one is thrown away" in started.log


def test_a_process_that_can_claim_nothing_is_replaced(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1, conductor={**LONG_LEASE, "REDISPATCH_SECONDS": 0.3})
    spoilt = endings.catches.delay(child=endings.spoils_the_process.name)
    pid = wait_until(started.pool_pids)[0]
    wait_until(lambda: "It ends, and is replaced" in started.log, 40)
    go_on(3)
    assert pid not in started.pool_pids()
    assert api.get_result(spoilt, timeout=30) == {"child": pid}
