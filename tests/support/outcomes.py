"""Several runs of pytest, one after another, and the table of what they came to."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
COLOURS = {PASSED: "green", FAILED: "red", SKIPPED: "yellow"}
EXIT_FAILED, EXIT_SKIPPED = 1, 3
#: What pytest returns when no test is left to run.
NOTHING_CHOSEN = 5

#: Rich takes a log for 80 columns wide, which is too narrow for the table.
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


@dataclass
class Outcome:
    """What one run came to."""

    name: str
    verdict: str
    reason: str = ""
    #: Whether only a part of the suite was to run.
    is_part: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0


def unavailable(name: str, reason: str, *, is_required: bool = True) -> Outcome:
    """Return the outcome of a run that lacks something; CI has to have it if it is required."""
    verdict = FAILED if is_required and os.environ.get("CI", "").lower() == "true" else SKIPPED
    console.print(f"{name} {verdict}: {reason}", markup=False)
    return Outcome(name, verdict, reason)


def run_pytest(
    name: str, python: str | Path, arguments: Sequence[str], environment: Mapping[str, str], *, is_part: bool
) -> Outcome:
    """Run pytest, with its output passed through.

    Args:
        is_part: Whether ``arguments`` leave out a part of the suite, so that there may be nothing to run.
    """
    with tempfile.TemporaryDirectory(prefix="conductor-test-") as directory:
        report = Path(directory, "report.xml")
        start = time.monotonic()
        exit_code = subprocess.run(
            [python, "-m", "pytest", f"--junit-xml={report}", *arguments],
            env={**os.environ, **environment},
            check=False,
        ).returncode
        seconds = time.monotonic() - start
        if exit_code == NOTHING_CHOSEN and is_part:
            # The caller's arguments name tests that are not part of it.
            exit_code = 0
        reason = f"pytest ended with {exit_code}" if exit_code else ""
        return Outcome(name, FAILED if exit_code else PASSED, reason, is_part, _counts(report), seconds)


def _counts(report: Path) -> dict[str, int]:
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):  # pytest did not get as far as writing it
        return {}
    total = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    return {PASSED: total["tests"] - failed - total["skipped"], FAILED: failed, SKIPPED: total["skipped"]}


def show(title: str, kind: str, outcomes: Sequence[Outcome]) -> None:
    """Print the table, and why something failed or was skipped."""
    table = Table(title=title, title_justify="left")
    table.add_column(kind, no_wrap=True)
    table.add_column("tests", no_wrap=True)
    for column in (PASSED, FAILED, SKIPPED, "seconds"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for outcome in outcomes:
        counts = [str(outcome.counts.get(key, "–")) for key in (PASSED, FAILED, SKIPPED)]
        colour = COLOURS[outcome.verdict]
        verdict = f"[{colour}]{outcome.verdict}[/{colour}]"
        tests = ("part" if outcome.is_part else "all") if outcome.counts else "–"
        table.add_row(outcome.name, tests, *counts, f"{outcome.seconds:.1f}", verdict)
    console.print()
    console.print(table)
    for outcome in outcomes:
        if outcome.reason:
            console.print(f"{outcome.name} {outcome.verdict}: {outcome.reason}", markup=False)


def run_chosen(
    parser: argparse.ArgumentParser,
    title: str,
    kind: str,
    members: Sequence[Any],
    run: Callable[[Any, argparse.Namespace], Outcome],
    is_wanted: Callable[[Any, argparse.Namespace], bool] = lambda _member, _options: True,
) -> set[str]:
    """Run those of ``members`` that the command line chooses by their names, all by default; return their verdicts.

    Args:
        title: Of the table.
        kind: What each of ``members`` is.
        run: Gets one of them, and what the parser found: ``pytest_args`` are more arguments of pytest.
        is_wanted: Gets the same; whether one is to be run that is not chosen by its name.
    """
    parser.add_argument("--only", action="append", choices=[member.name for member in members], help="may be repeated")
    parser.add_argument("pytest_args", nargs="*", metavar="pytest arguments", help="after --")
    options = parser.parse_args()

    chosen = [
        member for member in members if (member.name in options.only if options.only else is_wanted(member, options))
    ]
    outcomes = [run(member, options) for member in chosen]
    show(title, kind, outcomes)
    return {outcome.verdict for outcome in outcomes}
