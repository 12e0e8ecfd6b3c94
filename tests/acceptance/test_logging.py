"""What a worker shows of what bodies log."""

from __future__ import annotations

from typing import Any

from conductor_app import api
from tests.app import scenarios


def test_a_stock_worker_shows_task_and_id_on_each_line_of_a_body(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=1)
    result = scenarios.says.delay(line="here")
    api.get_result(result, timeout=30)
    for line in ("here once", "here twice"):
        (shown,) = [text for text in started.log.splitlines() if text.endswith(line)]
        assert shown.endswith(f"] {scenarios.says.name}[{result.id}]: {line}")
        assert ": INFO/ForkPoolWorker-1]" in shown
