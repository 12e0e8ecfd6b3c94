"""The page on monitoring names the metrics and attributes that there are."""

from __future__ import annotations

import inspect
import re

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from conductor_app import tracing
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


@pytest.mark.django_db
def test_the_alerts_are_about_metrics_that_exist() -> None:
    (alerts,) = [block.text for block in blocks(PAGE) if block.language == "yaml"]
    named = set(re.findall(r"\bconductor_(?!app\b)\w+", alerts))
    assert named
    assert named <= {name(metric) for metric in metrics()}


def test_every_attribute_of_a_span_is_on_the_page() -> None:
    attributes = set(re.findall(r'"(conductor\.[a-z_]+)"', inspect.getsource(tracing)))
    attributes.discard("conductor.delay_seconds")  # of an event
    assert attributes
    assert attributes <= set(re.findall(r"`(conductor\.[a-z_]+)`", read(PAGE)))
