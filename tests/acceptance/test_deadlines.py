"""The deadline of a tree with real workers: it ends in time, wherever its executions are, and each has one outcome."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import api
from conductor_app.exceptions import ExecutionCancelled
from conductor_app.models import Execution
from project.celery import app
from tests.app import scenarios
from tests.support import invariants
from tests.support.messages import queue_that_nobody_serves
from tests.support.polling import wait_until

pytestmark = pytest.mark.usefixtures("recorded")

NOBODYS = f"{app.conf.task_default_queue}-nobody-in-time"


def test_a_tree_ends_at_its_deadline_wherever_it_is(worker: Any) -> None:
    with queue_that_nobody_serves(NOBODYS) as nobody:
        started = worker(pool="threads", concurrency=4)
        asleep = scenarios.naps.apply_async(kwargs={"seconds": 300}, deadline=3)
        below = scenarios.waits_for_checkpoints.apply_async(kwargs={"seconds": 300, "timeout": 300}, deadline=3)
        unserved = scenarios.waits_for_a_queue.apply_async(kwargs={"queue": nobody, "timeout": 300}, deadline=3)
        queued = scenarios.echo.apply_async((1,), countdown=300, deadline=3)
        in_time = scenarios.naps.apply_async(kwargs={"seconds": 0.1}, deadline=60)
        for result in (asleep, below, unserved, queued):
            with pytest.raises(ExecutionCancelled, match=r"^Cancelled: its deadline of .* is over$"):
                api.get_result(result, timeout=40)
        assert api.get_result(in_time, timeout=40) == "rested"
        wait_until(lambda: not Execution.objects.open().exists(), 40, message="Not every child has ended")
    assert set(Execution.objects.exclude(pk=in_time.id).values_list("status", flat=True)) == {"cancelled"}
    for row in Execution.objects.filter(parent=None, status="cancelled"):
        assert row.finished_at is not None
        assert row.tree_deadline_at is not None
        assert row.finished_at >= row.tree_deadline_at
    api.retry(asleep)
    assert Execution.objects.get(pk=asleep.id).tree_deadline_at is None
    api.cancel(asleep)
    invariants.check(started)
