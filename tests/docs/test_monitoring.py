"""The page on monitoring names the metrics and attributes that there are."""

from __future__ import annotations

import inspect
import logging
import logging.config
import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from conductor_app import tracing
from conductor_app.logs import NOTHING
from conductor_app.metrics import MAX_ROWS, DatabaseCollector, EngineMetrics
from tests.docs.pages import blocks, prose, read

PAGE = "docs/howto/monitoring.md"


def metrics() -> list[Metric]:
    registry = CollectorRegistry()
    EngineMetrics(registry)
    return [*registry.collect(), *DatabaseCollector().collect()]


def name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


@pytest.mark.django_db
def test_every_metric_is_on_the_page_with_its_kind_and_no_other_is() -> None:
    rows = re.findall(r"^\| `(conductor_\w+)` \|[^|]*\| (\w+) \|", prose(PAGE), re.MULTILINE)
    assert rows == [(name(metric), metric.type) for metric in sorted(metrics(), key=lambda one: _place(rows, one))]
    assert f"{MAX_ROWS:,}" in prose(PAGE)


def _place(rows: list[tuple[str, str]], metric: Metric) -> int:
    return rows.index((name(metric), metric.type))


def test_the_logging_of_the_page_can_be_set_up_and_knows_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block.text for block in blocks(PAGE) if block.is_settings and "LOGGING" in block.text]
    shown: dict[str, Any] = {}
    exec(block, shown)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        logging.config.dictConfig(shown["LOGGING"])
        (handler,) = root.handlers
    finally:
        root.setLevel(level)
    record = logging.LogRecord("any", logging.INFO, __file__, 1, "hello", None, None)
    assert handler.filter(record)
    assert handler.format(record).endswith("INFO any [ ] hello")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [A-Z]", prose(PAGE).partition("## Logs")[2], re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(rows))) >= set(NOTHING)


def test_every_attribute_of_a_span_is_on_the_page() -> None:
    attributes = set(re.findall(r'"(conductor\.[a-z_]+)"', inspect.getsource(tracing)))
    attributes.discard("conductor.delay_seconds")  # of an event
    assert attributes
    assert attributes <= set(re.findall(r"`(conductor\.[a-z_]+)`", read(PAGE)))
