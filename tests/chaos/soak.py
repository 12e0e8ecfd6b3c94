"""Rounds one after another, each in a process of its own with new servers, and what they come to together."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: How long faults are injected in a round, in seconds.
ROUND_SECONDS = 600.0
#: The rounds take turns.
BROKERS = ("redis", "rabbitmq")
#: The figures that are added up.
SUMS = (
    "roots",
    "executions",
    "runs",
    "attempts_beyond_the_first",
    "inside_steps",
    "inside_steps_repeated",
    "outside_steps",
    "outside_steps_repeated",
    "kills",
    "commits_cut",
    "deadlocks",
    "seconds",
)


def soak(options: argparse.Namespace, console: Console) -> int:
    """Play rounds until the time is over.

    Returns:
        The worst exit code of a round; 1 also if the recovery of all rounds together misses a bound at its 99th
        percentile.
    """
    deadline = time.monotonic() + options.hours * 3_600
    worst, seed = 0, options.seed
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="conductor-soak-") as directory:
        while worst != 2 and (left := deadline - time.monotonic()) > 0:
            seconds = min(ROUND_SECONDS, left)
            broker = options.broker or BROKERS[len(reports) % len(BROKERS)]
            path = Path(directory) / f"{seed}.json"
            command = [sys.executable, "-m", "tests.chaos", f"--seed={seed}", f"--seconds={seconds}", "--fsync"]
            command += [f"--roots={options.roots}", f"--broker={broker}", f"--report={path}"]
            worst = max(worst, subprocess.run(command, check=False).returncode)
            if not path.exists():
                worst = max(worst, 1)
                break
            reports.append(json.loads(path.read_text()))
            if options.report is not None:  # after each round: the rest may be interrupted
                options.report.write_text(json.dumps(add_up(reports), indent=2) + "\n")
            seed += 1
    summary = add_up(reports)
    _show(summary, console)
    return max(worst, 1 if summary["violations"] else 0)


def add_up(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of several rounds together."""
    summary: dict[str, Any] = {"rounds": len(reports), "seeds": [report["seed"] for report in reports]}
    summary |= {name: round(sum(report.get(name, 0) for report in reports)) for name in SUMS}
    for name in ("by_status", "acts", "database_errors", "client_errors"):
        summary[name] = dict(sum((Counter(report.get(name, {})) for report in reports), Counter()))
    summary["fewest_roots_and_kills_of_a_round"] = [
        min((report[name] for report in reports), default=0) for name in ("roots", "kills")
    ]
    summary["longest_seconds_to_quiet"] = max((report["seconds_to_quiet"] for report in reports), default=0)
    summary["violations"] = [violation for report in reports for violation in report["violations"]]
    samples: dict[str, list[float]] = defaultdict(list)
    bounds: dict[str, float] = {}
    for report in reports:
        for name, recovery in report["recovery"].items():
            samples[name] += recovery["seconds"]
            bounds[name] = recovery["bound"]
    summary["recovery"] = {}
    for name, seconds in sorted(samples.items()):
        if not seconds:
            continue
        figures = describe(seconds)
        summary["recovery"][name] = {**figures, "bound": bounds[name]}
        if figures["p99"] > bounds[name]:
            summary["violations"].append(
                f"99 % of the runs were given up within {figures['p99']}s after {name}; {bounds[name]}s are the bound"
            )
    return summary


def describe(seconds: Iterable[float]) -> dict[str, float]:
    """Return count, median, 99th percentile and maximum."""
    ordered = sorted(seconds)
    p99 = ordered[math.ceil(len(ordered) * 0.99) - 1]
    return {
        "runs": len(ordered),
        "median": round(statistics.median(ordered), 2),
        "p99": round(p99, 2),
        "max": round(ordered[-1], 2),
    }


def shown(value: Any) -> str:
    """Return a figure as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    return str(value)


def _show(summary: dict[str, Any], console: Console) -> None:
    table = Table("figure", "value", title=f"Soak of {summary['rounds']} rounds", title_justify="left")
    for name, value in summary.items():
        if name not in ("violations", "recovery", "rounds"):
            table.add_row(name.replace("_", " "), shown(value))
    for name, recovery in summary["recovery"].items():
        table.add_row(f"recovery after {name}", shown(recovery))
    console.print(table)
    for violation in summary["violations"]:
        console.print(violation, style="red", markup=False)
    if summary["violations"]:
        console.print(f"{len(summary['violations'])} violations.", style="red")
    else:
        console.print("Everything held.", style="green")
