"""The first of several, and one after another, on real workers whose processes die."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import api
from conductor_app.models import Step
from conductor_app.states import StepKind
from tests.app import parallel
from tests.support import invariants

pytestmark = pytest.mark.usefixtures("recorded")


def test_a_worker_that_is_killed_after_the_decision_changes_nothing_of_it(worker: Any) -> None:
    started = worker(concurrency=2)
    result = parallel.decides.delay()
    assert api.get_result(result, timeout=120) == ["quick", 9, 4]
    invariants.check(started)


def test_each_of_fifty_arrives_once_in_the_recorded_order_although_processes_die(worker: Any) -> None:
    started = worker(concurrency=4)
    result = parallel.arrivals.delay(n=50)
    order = api.get_result(result, timeout=200)
    assert sorted(value for _, value in order) == [number * number for number in range(50)]
    waits = Step.objects.filter(execution_id=result.id, kind=StepKind.AS_COMPLETED).order_by("id")
    assert [step for step, _ in order] == [name for wait in waits for name in wait.counted_names]
    invariants.check(started)
