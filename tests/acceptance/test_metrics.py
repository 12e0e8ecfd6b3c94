"""Metrics of a real worker, counted in its pool processes and served by its main process."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conductor_app import api
from tests.app import scenarios
from tests.support.polling import wait_until
from tests.support.watching import only, wait_for_body
from tests.support.worker import Worker

SERVED = {"METRICS": True, "METRICS_LISTEN": "127.0.0.1:0"}


def scraped(started: Worker) -> dict[str, float]:
    """What Prometheus would get from the worker now: samples by their names and labels."""
    pattern = r"Metrics are served at (http://[\d.:]+/metrics)"
    url = wait_until(lambda: re.search(pattern, started.log), message=started.log_tail)[1]
    with urllib.request.urlopen(url, timeout=20) as response:
        text = response.read().decode()
    return {
        " ".join([sample.name, *(sample.labels[label] for label in sorted(sample.labels))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_serves_what_all_its_processes_have_counted(worker: Any, pool: str, tmp_path: Path) -> None:
    directory = tmp_path / "metrics"
    env = {"PROMETHEUS_MULTIPROC_DIR": str(directory)} if pool == "prefork" else {}
    started = worker(pool=pool, concurrency=2, conductor=SERVED, env=env)
    results = [scenarios.three_children.delay(value=number) for number in range(4)]
    for result in results:
        api.get_result(result, timeout=40)
    parent, child = scenarios.three_children.name, scenarios.echo.name
    ended = f"conductor_executions_total succeeded {child}"
    wait_until(lambda: scraped(started).get(ended) == 12, message=lambda: str(scraped(started)))
    found = scraped(started)
    assert found[f"conductor_executions_total succeeded {parent}"] == 4
    assert found[f"conductor_suspensions_total {parent}"] == 12
    assert found[f"conductor_run_seconds_count {child}"] == 12
    assert found[f"conductor_run_ends_total suspended {parent}"] == 12
    assert found[f"conductor_run_ends_total succeeded {child}"] == 12
    assert found[f"conductor_execution_seconds_count {parent}"] == 4
    wait_until(lambda: scraped(started).get("conductor_sweep_seconds_count", 0) >= 2)
    assert found["conductor_wakeups_healed_total"] == 0


def test_a_killed_process_is_counted_and_takes_no_counts_with_it(worker: Any, tmp_path: Path) -> None:
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    started = worker(pool="prefork", concurrency=1, conductor={**SERVED, "LEASE_SECONDS": 600}, env=env)
    api.get_result(scenarios.echo.delay(value=1), timeout=20)
    task = scenarios.lingers.name
    result = scenarios.lingers.delay(seconds=300)
    started.kill_pool_process(wait_for_body(scenarios.lingers).pid)
    assert api.get_result(result, timeout=40) == 2
    wait_until(lambda: scraped(started).get(f"conductor_executions_total succeeded {task}") == 1)
    found = scraped(started)
    assert found[f"conductor_runs_lost_total {task}"] == 1
    assert found[f"conductor_retries_total {task}"] == 1
    assert found[f"conductor_run_ends_total lost {task}"] == 1
    assert found[f"conductor_executions_total succeeded {scenarios.echo.name}"] == 1
    assert only(scenarios.lingers).attempt == 2
