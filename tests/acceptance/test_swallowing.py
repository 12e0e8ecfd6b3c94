"""A body that swallows its end for ever is ended."""

from __future__ import annotations

from typing import Any

from conductor_app import api
from conductor_app.exceptions import ProgrammingError
from conductor_app.models import Execution, FailedExecution
from tests.app import endings, scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.bodies import class_name
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body, wait_for_status

#: Far longer than a test: no lease that lapses may bring an end about.
PATIENT = {"LEASE_SECONDS": 600, "REDISPATCH_SECONDS": 600}


def test_a_body_that_swallows_its_end_for_ever_is_ended_with_its_process(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1, conductor=PATIENT)
    (before,) = started.pool_pids()
    for how in ("", "block"):
        result = endings.never_stops.delay(how=how)
        parent = endings.catches.delay(child=endings.never_stops.name, payload={"how": how})
        failure = wait_until(lambda result=result: FailedExecution.objects.filter(pk=result.id).first(), 30)
        assert failure.error_class == class_name(ProgrammingError)
        assert "tests.app.endings.never_stops swallowed the suspension at endings.py:" in failure.message
        assert "(step 'child') and called on at endings.py:" in failure.message
        assert (failure.attempts, count("body", result.id)) == (1, 1)
        assert not Execution.objects.filter(parent=result.id).exists()
        wait_until(lambda result=result: result.state == "FAILURE")
        # Its parent hears of it, and the slot is free again.
        assert api.get_result(parent, timeout=30)["error_class"] == class_name(ProgrammingError)
        assert api.get_result(scenarios.pass_through.delay(value=how), timeout=30) == how
    cancelled = endings.never_stops.delay(how="checkpoint")
    wait_for_body(endings.never_stops, number=5)
    assert api.cancel(cancelled.id)
    wait_for_status(cancelled, "cancelled")
    assert api.get_result(scenarios.pass_through.delay(value="alive"), timeout=30) == "alive"
    assert started.pool_pids() != [before]
    assert count("lost") == 0
    assert started.log.count("Its process ends, and is replaced.") == 5
    invariants.check()
