"""What a receiver of ``before_task_publish`` adds where a task is called is seen by all runs of its tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import api
from tests.app import correlated
from tests.app.models import Ledger
from tests.support import invariants

pytestmark = pytest.mark.usefixtures("recorded")


@pytest.fixture
def web_process() -> Iterator[None]:
    """As in a request that has a correlation id."""
    correlated.connect()
    token = correlated.correlation_id.set("c-1")
    yield
    correlated.correlation_id.reset(token)
    correlated.disconnect()


@pytest.mark.parametrize("is_on", [True, False], ids=["handed off", "published"])
def test_a_correlation_id_is_seen_by_every_run(worker: Any, web_process: None, is_on: bool) -> None:
    env = {"CONDUCTOR_TEST_CORRELATED": "1"}
    started = worker(conductor={"HAND_OFF": is_on}, env=env, args=["--include=tests.app.correlated"])
    result = correlated.parent.apply_async(countdown=1)
    assert api.get_result(result, timeout=60) == ["c-1"] * 6
    lines = Ledger.objects.filter(key__startswith="prerun ")
    assert set(lines.values_list("value", flat=True)) == {"c-1"}
    runs = Counter(lines.values_list("key", flat=True))
    # The parent waits for two children, a map, what it started and the nap.
    assert runs["prerun parent"] >= 4
    assert (runs["prerun fails_once"], runs["prerun plain"], runs["prerun echo"]) == (3, 2, 4)
    invariants.check(started)
