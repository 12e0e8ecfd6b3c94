"""What was measured: samples, their medians and ratios, and the tables made of them. It measures nothing itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One figure of one system in one round."""

    system: str
    #: The figure's key, such as ``W1 wf/s``; with all of its samples it makes a column.
    figure: str
    round: int
    value: float
    #: How many roots, or for a latency calls, it comes from.
    count: int = 0
    #: What the database did for each unit of work: ``statements``, ``commits``, ``wal_kb``, ``syncs``.
    costs: dict[str, float] = field(default_factory=dict)
    #: More of the same distribution, such as ``p95``.
    also: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """How a figure is to be read."""

    key: str
    title: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class Summary:
    """The median of some rounds and their range."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass
class Results:
    """A file of samples, and what they were measured on."""

    about: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    #: By system: why it is missing, or what went wrong.
    notes: dict[str, str] = field(default_factory=dict)
    growth: dict[str, Any] = field(default_factory=dict)
    #: By system and workload: whose a worker's time was, in shares of it.
    profiles: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that ``save`` wrote.

        Raises:
            SystemExit: The file is none, with the reason.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                about=data["about"],
                figures={key: Figure(**figure) for key, figure in data["figures"].items()},
                samples=[Sample(**sample) for sample in data["samples"]],
                notes=data["notes"],
                growth=data["growth"],
                profiles=data.get("profiles", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no file of results: {error!r}. Measure first: make bench") from error

    def save(self, path: Path) -> None:
        """Write everything; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    def next_round(self, figure: str) -> int:
        """The number of the round that comes next, from 1."""
        return max((sample.round for sample in self.samples if sample.figure == figure), default=0) + 1

    def systems(self) -> list[str]:
        """Names in the order in which they were measured first."""
        return list(dict.fromkeys(sample.system for sample in self.samples))

    def of(self, system: str, figure: str) -> list[Sample]:
        """The samples of one cell."""
        return [sample for sample in self.samples if (sample.system, sample.figure) == (system, figure)]

    def summary(self, system: str, figure: str) -> Summary | None:
        """Median and range of one cell; None if it was not measured."""
        return summarize(sample.value for sample in self.of(system, figure))

    def also(self, system: str, figure: str, name: str) -> float | None:
        """Median over the rounds of something else of the same distribution."""
        found = summarize(sample.also[name] for sample in self.of(system, figure) if name in sample.also)
        return found and found.median

    def cost(self, system: str, figure: str, name: str) -> float | None:
        """Median of a cost for each unit of work; None if it was not measured."""
        found = summarize(sample.costs[name] for sample in self.of(system, figure) if name in sample.costs)
        return found and found.median

    def ratio(self, system: str, figure: str, baseline: str) -> float | None:
        """How many times better than the baseline; the median of the ratios within each round.

        What one round measures was measured within minutes, so that a machine that is slower an hour later, or is
        shared, falls out of the ratio.
        """
        higher = self.figures[figure].higher_is_better
        theirs = {sample.round: sample.value for sample in self.of(baseline, figure)}
        ratios = [
            better(sample.value, theirs[sample.round], higher_is_better=higher)
            for sample in self.of(system, figure)
            if theirs.get(sample.round) and sample.value
        ]
        return statistics.median(ratios) if ratios else None


def summarize(values: Iterable[float]) -> Summary | None:
    """Median, lowest and highest; None of nothing."""
    found = list(values)
    if not found:
        return None
    return Summary(statistics.median(found), min(found), max(found), len(found))


def better(value: float, than: float, *, higher_is_better: bool) -> float:
    """How many times better one figure is than another: above 1 is better, below 1 worse."""
    return value / than if higher_is_better else than / value


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of all do not exceed (nearest rank).

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def number(value: float | None) -> str:
    """Three digits that count, and no exponent: 1,234 · 56.7 · 8.90; a dash for nothing."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(results: Results, system: str, figure: str, baseline: str) -> str:
    """``median (low to high) ×ratio`` of one system and figure; of a latency also the 95th percentile."""
    found = results.summary(system, figure)
    if found is None:
        return "–"
    text = number(found.median)
    if found.rounds > 1:
        text += f" ({number(found.low)} to {number(found.high)})"
    if (p95 := results.also(system, figure, "p95")) is not None:
        text += f", p95 {number(p95)}"
    ratio = results.ratio(system, figure, baseline)
    return text if ratio is None or system == baseline else f"{text} ×{ratio:.2f}"


#: The costs of one W1 workflow: key and heading.
COSTS = {"statements": "statements", "commits": "commits", "syncs": "WAL syncs", "wal_kb": "WAL kB"}


def tables(results: Results, baseline: str) -> dict[str, list[list[str]]]:
    """All tables, by their titles: rows of cells, the first row being the heading."""
    systems = results.systems()
    found: dict[str, list[list[str]]] = {}

    def add(title: str, figures: list[Figure]) -> None:
        measured = [figure for figure in figures if any(results.of(system, figure.key) for system in systems)]
        rows = [
            [system, *(cell(results, system, figure.key, baseline) for figure in measured)]
            for system in systems
            if any(results.of(system, figure.key) for figure in measured)
        ]
        if rows:
            found[title] = [["", *(f"{figure.title}, {figure.unit}" for figure in measured)], *rows]

    everything = list(results.figures.values())
    add("Rates", [figure for figure in everything if figure.higher_is_better])
    add("Times", [figure for figure in everything if not figure.higher_is_better and "replay" not in figure.key])
    replay = [figure for figure in everything if "replay" in figure.key]
    add("Replay", replay)
    statements = [
        [system, *(number(results.cost(system, figure.key, "statements")) for figure in replay)]
        for system in systems
        if any(results.cost(system, figure.key, "statements") for figure in replay)
    ]
    if statements:
        found["Replay, statements for each child"] = [["", *(figure.title for figure in replay)], *statements]
    for figure in everything:
        costs = [
            [system, *(number(results.cost(system, figure.key, name)) for name in COSTS)]
            for system in systems
            if any(results.cost(system, figure.key, name) for name in COSTS)
        ]
        if figure.higher_is_better and costs:
            found[f"The database's part in {figure.title}, for each root"] = [["", *COSTS.values()], *costs]
    return found


def markdown(rows: list[list[str]]) -> str:
    """One table in Markdown."""
    heading, *body = rows
    lines = [heading, ["---"] + ["--:"] * (len(heading) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
