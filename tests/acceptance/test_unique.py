"""One open execution per key, with real workers: replaced ones, ten in a row, debounced calls, a killed process."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from django.db import connections, transaction

from conductor_app import DuplicateExecution, api
from conductor_app.exceptions import RetryRefused
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from tests.app.keyed import parent, sync
from tests.app.models import Ledger
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.watching import wait_for_status

pytestmark = pytest.mark.usefixtures("recorded")


def call(value: int, how: str = "returns", **options: Any) -> Any:
    return sync.apply_async(kwargs={"customer": "c-7", "value": value, "how": how}, **options)


def never_overlapped() -> list[str]:
    """Return which values have begun, and make sure that each had ended before the next one began."""
    lines = list(Ledger.objects.filter(key__in=("begun", "ended")).order_by("id").values_list("key", "value"))
    for begun, ended in zip(lines[::2], lines[1::2], strict=False):
        assert (begun[0], ended[0], begun[1]) == ("begun", "ended", ended[1]), lines
    return [value for key, value in lines if key == "begun"]


@pytest.mark.parametrize(("how", "status"), [("runs", "running"), ("waits", "waiting"), ("pauses", "queued")])
def test_of_ten_that_replace_one_exactly_the_last_runs_after_its_end(worker: Any, how: str, status: str) -> None:
    started = worker(pool="prefork", concurrency=2)
    first = call(0, how)
    wait_until(lambda: Ledger.objects.filter(key="begun").exists(), message="It has not begun")
    old = wait_for_status(first, status)
    with transaction.atomic():
        results = [call(value, on_conflict="replace") for value in range(1, 11)]

    assert api.get_result(results[-1], timeout=40) == 10
    invariants.check(started, tracebacks=1)
    ends = list(Execution.objects.order_by("id").values_list("status", flat=True))
    assert ends == [ExecutionStatus.CANCELLED] * 10 + [ExecutionStatus.SUCCEEDED]
    assert never_overlapped() == ["0", "10"]
    assert Execution.objects.get(pk=old.pk).attempt == old.attempt


def test_each_of_ten_one_after_another_begins_after_the_end_of_the_one_before_or_never(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2)
    results = [call(0, "runs"), *(call(value, "runs", on_conflict="replace") for value in range(1, 10))]
    results.append(call(10, on_conflict="replace"))

    assert api.get_result(results[-1], timeout=40) == 10
    invariants.check(started, tracebacks=1)
    ends = list(Execution.objects.order_by("id").values_list("status", flat=True))
    assert ends == [ExecutionStatus.CANCELLED] * 10 + [ExecutionStatus.SUCCEEDED]
    assert never_overlapped()[-1] == "10"


def test_one_whose_process_is_killed_lets_the_one_go_that_replaces_it(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2, conductor={"LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 100})
    call(0, "runs")
    line = wait_until(lambda: Ledger.objects.filter(key="begun").first(), message="It has not begun")
    os.kill(line.pid, signal.SIGSTOP)
    second = call(1, on_conflict="replace")
    assert Execution.objects.get(pk=second.id).due_at is None
    os.kill(line.pid, signal.SIGKILL)

    assert api.get_result(second, timeout=40) == 1
    invariants.check(started, tracebacks=1)


def test_twenty_callers_at_once_start_one(worker: Any) -> None:
    started = worker(pool="threads", concurrency=2)
    gate = threading.Barrier(20)
    outcomes: list[Any] = []

    def one(value: int) -> None:
        gate.wait(20)
        try:
            outcomes.append(call(value, "waits", on_conflict="return" if value % 2 else "refuse").id)
        except DuplicateExecution as error:
            outcomes.append(str(error.execution_id))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=one, args=(value,)) for value in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)

    assert len(outcomes) == 20
    assert len(set(outcomes)) == 1
    wait_for_status(outcomes[0], "waiting")
    api.send_event(outcomes[0], "item")
    invariants.check(started)
    assert Execution.objects.count() == 1


def test_debounced_calls_are_one_run_and_none_is_lost_while_that_runs(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2)
    first = [call(value, "waits", debounce=1) for value in range(5)]
    assert {result.id for result in first} == {first[0].id}
    wait_for_status(first[0], "waiting")
    later = [call(value, debounce=0.2) for value in range(5, 8)]
    assert {result.id for result in later} == {later[0].id} != {first[0].id}
    api.send_event(first[0], "item")

    assert api.get_result(first[0], timeout=40) == 4
    assert api.get_result(later[0], timeout=40) == 7
    invariants.check(started)
    assert set(never_overlapped()) == {"4", "7"}


def test_a_child_is_refused_and_its_parent_goes_on(worker: Any) -> None:
    started = worker(pool="threads", concurrency=2)
    holder = call(0, "waits")
    wait_for_status(holder, "waiting")
    refused = parent.delay(customer="c-7")
    alone = parent.delay(customer="c-8")

    assert api.get_result(refused, timeout=40) == [holder.id, "waiting"]
    assert api.get_result(alone, timeout=40) == 7
    api.send_event(holder, "item")
    invariants.check(started)


def test_a_retry_is_refused_while_another_one_has_the_key_and_goes_on_later(worker: Any) -> None:
    started = worker(pool="threads", concurrency=2)
    first = call(0, "waits")
    wait_for_status(first, "waiting")
    api.cancel(first)
    wait_for_status(first, "cancelled")
    second = call(1, "waits")
    wait_for_status(second, "waiting")
    with pytest.raises(RetryRefused, match=second.id):
        api.retry(first)
    api.send_event(second, "item")
    assert api.get_result(second, timeout=40) == 1
    api.retry(first)
    wait_for_status(first, "waiting")
    api.send_event(first, "item")

    assert api.get_result(first, timeout=40) == 0
    invariants.check(started)
