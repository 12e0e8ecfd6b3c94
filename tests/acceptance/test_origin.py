"""The origin's two programs on a real worker, and its five sentences."""

from __future__ import annotations

from typing import Any

import pytest

from conductor_app import api
from conductor_app.models import Execution
from tests.app import origin
from tests.app.ledger import count
from tests.support.worker import pools


@pools
def test_parent_receives_the_childs_return_value(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1)
    result = origin.quadruple.delay(value=5)
    assert api.get_result(result, timeout=20) == {"result": 20}
    assert count("body", result.id) == 2
    assert result.get(timeout=20) == {"result": 20}
    assert result.state == "SUCCESS"


@pools
def test_three_children_one_after_another(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1)
    result = origin.process_order.delay(order_id=7)
    assert api.get_result(result, timeout=20) == {"success": True}
    assert count("body", result.id) == 4
    tree = Execution.objects.filter(root_id=result.id)
    assert [(row.status, row.attempt) for row in tree] == [("succeeded", 1)] * 4


@pytest.mark.parametrize("eager", [False, True])
def test_inline(db: None, settings: Any, eager: bool) -> None:
    result = origin.process_order.apply(kwargs={"order_id": 7})
    assert result.get() == {"success": True}
    assert count("body", result.id) == 4
