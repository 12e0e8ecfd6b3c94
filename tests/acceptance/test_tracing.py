"""Traces of a real worker."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from conductor_app import api
from tests.app import scenarios
from tests.support.polling import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


def test_the_runs_of_a_tree_in_all_processes_are_one_trace(worker: Any, tmp_path: Path) -> None:
    path = tmp_path / "spans"
    worker(
        pool="prefork",
        concurrency=2,
        conductor={"TRACING": True},
        env={"CONDUCTOR_TEST_SPANS": str(path)},
        args=["--include=tests.app.traced"],
    )
    # As an instrumented web process would pass it on; this process traces nothing.
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    result = scenarios.three_children.apply_async(kwargs={"value": 1}, headers=headers)
    assert api.get_result(result, timeout=40) == [1, 2, 3]
    parent, child = f"run {scenarios.three_children.name}", f"run {scenarios.echo.name}"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) == 7)
    spans = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(span["name"] for span in spans) == {parent: 4, child: 3}
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE}"}
    runs = {span["context"]["span_id"]: span for span in spans if span["name"] == parent}
    assert {span["parent_id"] for span in runs.values()} == {f"0x{CALLER}"}
    assert sorted(span["attributes"]["conductor.run"] for span in runs.values()) == [1, 2, 3, 4]
    # Each child hangs below another run of its parent's.
    assert len({span["parent_id"] for span in spans if span["name"] == child} & set(runs)) == 3
