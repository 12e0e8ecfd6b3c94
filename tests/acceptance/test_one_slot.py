"""One worker with one slot is enough for a tree of any shape: a parent that waits holds nothing."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import api
from conductor_app.exceptions import MaxDepthExceeded
from conductor_app.models import Execution, FailedExecution
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import invariants

pytestmark = pytest.mark.usefixtures("recorded")


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_twenty_levels_and_three_children_in_a_row_need_one_slot(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1)
    deep, three = scenarios.descend.delay(levels=20), scenarios.three_children.delay(value=5)
    assert api.get_result(three, timeout=60) == [5, 6, 7]
    assert api.get_result(deep, timeout=60) == 20
    assert sorted(Execution.objects.filter(root_id=deep.id).values_list("depth", flat=True)) == list(range(21))
    # No suspension costs an attempt: this parent has a single one.
    parent = Execution.objects.get(pk=three.id)
    assert (parent.attempt, parent.max_attempts, parent.fence) == (1, 1, 4)
    assert count("body", three.id) == 4
    invariants.check(started)


def test_an_execution_that_invokes_itself_for_ever_stops_at_max_depth(transactional_db: None, settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "MAX_DEPTH": 3}
    root = scenarios.descend.apply(kwargs={"levels": 3})
    assert root.get() == 3
    result = scenarios.descend.apply(kwargs={"levels": 1_000_000})
    tree = Execution.objects.filter(root_id=result.id).order_by("depth")
    assert [(row.depth, row.status, row.attempt) for row in tree] == [(depth, "failed", 1) for depth in range(4)]
    deepest = FailedExecution.objects.get(pk=tree[3].pk)
    assert deepest.error_class == f"{MaxDepthExceeded.__module__}.{MaxDepthExceeded.__name__}"
    assert "the limit is 3" in deepest.message
    assert tree[0].error_message == f"{'Child execution failed: ' * 3}{deepest.message}"
    assert set(FailedExecution.objects.exclude(pk=deepest.pk).values_list("root_cause_id", flat=True)) == {deepest.pk}
    invariants.check()
