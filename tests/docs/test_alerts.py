"""The rules for Prometheus and the dashboard for Grafana: they can be loaded, and name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conductor_app.metrics import DatabaseCollector
from tests.docs.pages import ROOT, read
from tests.docs.test_monitoring import PAGE, metrics
from tests.support.executions import queued, running

RULES = "docs/monitoring/alerts.yml"
DASHBOARD = "docs/monitoring/grafana.json"
#: Variables of Grafana's own, and those that its expressions set.
_GRAFANA = re.compile(r"\$(\w+)|\$\{(\w+)\}")
_DURATION = re.compile(r"\d+[smhd]")
_FUNCTIONS = {"absent", "histogram_quantile", "increase", "max", "rate", "sum"}
_WORDS = _FUNCTIONS | {"by", "on", "or", "unless"}


# ---------------------------------------------------------------------------------------------------------------- YAML


def load(text: str) -> Any:
    """Read so much of YAML as rules need: maps, lists of maps, ``>-``, quoted and plain texts, lines of comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert "\t" not in text
    value, rest = _block(lines, 0)
    assert not rest, f"left over: {rest[0]!r}"
    return value


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _block(lines: list[str], indent: int) -> tuple[Any, list[str]]:
    if lines[0].lstrip().startswith("- "):
        items = []
        while lines and _indent(lines[0]) == indent and lines[0].lstrip().startswith("- "):
            first = " " * (indent + 2) + lines[0].lstrip()[2:]
            item, lines = _block([first, *lines[1:]], indent + 2)
            items.append(item)
        return items, lines
    found: dict[str, Any] = {}
    while lines and _indent(lines[0]) == indent:
        key, colon, value = lines[0].strip().partition(":")
        assert colon, f"neither a key nor a list: {lines[0]!r}"
        assert key not in found, f"twice: {key}"
        lines = lines[1:]
        value = value.strip()
        if value == ">-":
            folded = []
            while lines and _indent(lines[0]) > indent:
                folded.append(lines[0].strip())
                lines = lines[1:]
            found[key] = " ".join(folded)
        elif value:
            found[key] = _text(value)
        else:
            found[key], lines = _block(lines, _indent(lines[0]))
    return found, lines


def _text(value: str) -> str:
    if value.startswith('"'):
        return str(json.loads(value))
    assert not re.search(r": | #|^[\[{&*!|>%@`']", value), f"to be quoted: {value}"
    return value


# --------------------------------------------------------------------------------------------------------------- rules


def rules() -> list[dict[str, Any]]:
    loaded = load(read(RULES))
    assert list(loaded) == ["groups"]
    (group,) = loaded["groups"]
    assert set(group) == {"name", "rules"}
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(read(DASHBOARD))["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression, and where it stands."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.fixture
def samples(db: None) -> dict[str, set[str]]:
    """Each series that there is, with its labels."""
    queued()
    running()
    found: dict[str, set[str]] = {}
    for metric in [*metrics(), *DatabaseCollector().collect()]:
        names = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        labels = {label for sample in metric.samples for label in sample.labels}
        for ending in names:
            found[metric.name + ending] = (
                labels | LABELS.get(metric.name, set()) | ({"le"} if ending == "_bucket" else set())
            )
    return found


#: Of what is counted, as the page has them: without a count, a metric has no labels yet.
LABELS = {
    name.removesuffix("_total"): set(re.findall(r"\w+", labels))
    for name, labels in re.findall(r"^\| `(conductor_\w+)` \|([^|]*)\|", read(PAGE), re.MULTILINE)
}


def test_each_alert_says_what_it_is_and_where_to_read_on() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 5
    headings = re.findall(r"^#### (\w+)$", read(PAGE), re.MULTILINE)
    assert headings == names
    for rule in rules():
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert _DURATION.fullmatch(rule.get("for", "1m"))
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"{PAGE}#{rule['alert'].lower()}"
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert named <= set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", rule["expr"]))))


def test_each_expression_is_about_metrics_and_labels_that_there_are(samples: dict[str, set[str]]) -> None:
    for where, expression in expressions():
        named = re.findall(r"\b(conductor_\w+)(?:\{([^}]*)\})?", expression)
        assert named, where
        for metric, matchers in named:
            assert metric in samples, f"{where}: {metric}"
            for label in re.findall(r"(\w+)\s*=~?", matchers):
                assert label in samples[metric], f"{where}: {metric} has no label {label}"
        known = set.union(*(samples[metric] for metric, _matchers in named))
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert set(re.findall(r"\w+", labels)) <= known, where


def test_each_expression_can_be_read() -> None:
    for where, expression in expressions():
        bare = re.sub(r'"[^"]*"', "", expression)
        for opening, closing in ("()", "[]", "{}"):
            assert bare.count(opening) == bare.count(closing), where
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on) \([^)]*\)", "", bare)
        words = set(re.findall(r"[a-z_]+", bare))
        assert {word for word in words if not word.startswith("conductor_")} <= _WORDS, where
        # Counters only grow: what they are at tells nothing.
        for counter in re.finditer(r"(\w+\()?conductor_\w+_(total|bucket|count|sum)\b", expression):
            assert counter[1] in ("rate(", "increase("), where


@pytest.mark.skipif(not find_spec("yaml"), reason="needs PyYAML")
def test_a_reader_of_yaml_finds_the_same() -> None:
    import yaml  # type: ignore[import-untyped, import-not-found, unused-ignore]

    assert yaml.safe_load(read(RULES)) == load(read(RULES))


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, of Prometheus")
def test_promtool_takes_the_rules_and_what_the_dashboard_asks_and_the_alerts_fire(tmp_path: Path) -> None:
    asked = [_GRAFANA.sub("5m", one) if "[$" in one else one for where, one in expressions()]
    recorded = [{"record": f"asked:{number}", "expr": one} for number, one in enumerate(asked)]
    (tmp_path / "asked.yml").write_text(json.dumps({"groups": [{"name": "asked", "rules": recorded}]}))
    behaviour = ROOT / "tests/docs/alerts_behaviour.yml"
    for what in (
        ["check", "rules", ROOT / RULES],
        ["check", "rules", tmp_path / "asked.yml"],
        ["test", "rules", behaviour],
    ):
        done = subprocess.run(["promtool", *what], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wrong", ["a: 1\na: 2", "groups:\n  - x", "a: b: c", "a: [1]", "a: 1\n    b: 2"])
def test_the_reader_refuses_what_it_does_not_know(wrong: str) -> None:
    with pytest.raises(AssertionError):
        load(wrong)


# ----------------------------------------------------------------------------------------------------------- dashboard


def test_the_dashboard_can_be_imported_and_asks_for_its_prometheus() -> None:
    dashboard = json.loads(read(DASHBOARD))
    assert dashboard["title"] == "conductor_app"
    assert "id" not in dashboard, "Grafana gives it one"
    assert dashboard["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for name in set(variables) - {"datasource"}:
        assert variables[name]["datasource"] == source
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["datasource"] == source, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == source
            used = {one or other for one, other in _GRAFANA.findall(target["expr"])}
            assert used <= {*variables, "__rate_interval"}, panel["title"]
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))


def test_the_variables_of_the_dashboard_are_labels_that_there_are(samples: dict[str, set[str]]) -> None:
    for variable in json.loads(read(DASHBOARD))["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert asked
            assert asked[2] in samples[asked[1]]


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(read(DASHBOARD))["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        places = {(at["x"] + right, at["y"] + down) for right in range(at["w"]) for down in range(at["h"])}
        assert not places & taken, panel["title"]
        taken |= places
