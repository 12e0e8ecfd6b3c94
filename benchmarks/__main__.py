"""Measure conductor_app and its peers, and print medians, ranges and ratios.

    python -m benchmarks [--peers] [--rounds 3] [--scale 1] [--systems …] [--workloads …]
    python -m benchmarks --profile W1
    python -m benchmarks --growth

PostgreSQL and Redis are started for it on free ports and end with it; RabbitMQ is the server that
CONDUCTOR_TEST_RABBITMQ_URL names, with a queue of its own.

Exit code: 0 if everything was measured, 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.measure import Failed, Workload, measure, workloads
from benchmarks.peers import ALL, CELERY, OTHERS, OURS, VAR, Peer, versions
from benchmarks.results import Figure, Results, Sample, number, tables
from benchmarks.servers import POSTGRES_SETTINGS, Servers, servers

console = Console(soft_wrap=True)


def main() -> int:
    """Measure what the arguments ask for."""
    options = parse(sys.argv[1:])
    # A terminated program cleans up too: its servers and workers must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.profile:
        from benchmarks.profiling import profile

        return profile(options, console)
    if options.growth:
        from benchmarks.growth import growth

        return growth(options, console)
    return benchmark(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse, and refuse what is not there with the names that are."""
    names = sorted({workload.key for workload in workloads(1)})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--peers", action="store_true", help="DBOS, Absurd and Procrastinate too, from PyPI")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help=f"only these: {', '.join(ALL)}")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help=f"only these: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="how much of everything, 0.1 for a tenth")
    parser.add_argument(
        "--pool", default="solo:1", metavar="POOL:CONCURRENCY", help="of each of the two Celery workers"
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for one measurement")
    parser.add_argument("--baseline", default="conductor-rabbitmq", metavar="NAME", help="what ratios are against")
    parser.add_argument("--output", type=Path, default=VAR / "results.json", metavar="FILE")
    parser.add_argument("--append", action="store_true", help="add rounds to the results in the file")
    parser.add_argument("--profile", metavar="WORKLOAD", help="where a worker's time goes, with py-spy")
    parser.add_argument("--growth", action="store_true", help="an empty table against a million executions")
    options = parser.parse_args(arguments)
    for given, known in ((options.systems, ALL), (options.workloads, names), ([options.profile], [None, *names])):
        for name in given or []:
            if name not in known:
                parser.error(f"{name!r} is not known. There are: {', '.join(filter(None, known))}.")
    if options.baseline not in ALL:
        parser.error(f"{options.baseline!r} is not known. There are: {', '.join(ALL)}.")
    pool, _, concurrency = options.pool.partition(":")
    if pool not in {"solo", "prefork", "threads"} or not concurrency.isdigit() or int(concurrency) < 1:
        parser.error(f"{options.pool!r} is no pool and concurrency, such as solo:1, prefork:2 or threads:4.")
    if options.profile and pool != "solo":
        parser.error("Only a solo pool can be profiled: its bodies run in the worker's main thread.")
    if options.rounds < 1 or options.scale <= 0:
        parser.error("Rounds and scale have to be above zero.")
    return options


def benchmark(options: argparse.Namespace) -> int:
    """Measure all systems in turn, round by round, and print the tables."""
    chosen = [ALL[name] for name in options.systems or [p.name for p in OURS + CELERY + OTHERS * options.peers]]
    todo = [w for w in workloads(options.scale) if not options.workloads or w.key in options.workloads]
    results = Results.load(options.output) if options.append and options.output.exists() else Results()
    failures = 0
    with servers({peer.broker for peer in chosen}) as started:
        present = []
        for peer in chosen:
            if peer.broker and peer.broker not in started.brokers:
                results.notes[peer.name] = started.missing[peer.broker]
                console.print(f"{peer.name} is left out: {started.missing[peer.broker]}", style="yellow")
                continue
            if peer.environment:
                console.print(f"{peer.name}: environment {VAR / peer.environment}", style="dim")
            present.append(peer)
        about = describe(started, present, options)
        check_same(results, about)
        results.about = {**about, "versions": {**results.about.get("versions", {}), **about["versions"]}}
        # In the order of the workloads, whichever was measured first.
        results.figures = {
            w.key: Figure(w.key, w.title, w.unit, w.higher_is_better)
            for w in workloads(options.scale)
            if w in todo or w.key in results.figures
        }
        first = {workload.key: results.next_round(workload.key) for workload in todo}
        plan = [
            (first[workload.key] + index, workload, peer)
            for index in range(options.rounds)
            for workload in todo
            for peer in present
            if peer.can(workload.body, replay=workload.kind == "replay")
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(plan))
            for number_of_round, workload, peer in plan:
                progress.update(
                    bar, description=f"round {number_of_round} {workload.title} {workload.unit} {peer.name}"
                )
                failures += not take(results, started, peer, workload, number_of_round, options, progress.console)
                progress.advance(bar)
    show(results, options.baseline)
    console.print(f"results: {options.output}")
    return 1 if failures else 0


def take(
    results: Results,
    started: Servers,
    peer: Peer,
    workload: Workload,
    number_of_round: int,
    options: argparse.Namespace,
    out: Console,
) -> bool:
    """Take one sample, keep and print it; tell whether it came out."""
    began = time.monotonic()
    name = f"round {number_of_round}  {peer.name:<19}{workload.title:>20}"
    try:
        found = measure(started, peer, workload, options.pool, options.timeout)
    except (Failed, OSError, psycopg.Error, subprocess.SubprocessError) as error:
        results.notes[peer.name] = f"{workload.title} {workload.unit}: {error}"
        results.save(options.output)
        out.print(f"{name}  {escape(str(error))}", style="red")
        return False
    sample = Sample(peer.name, workload.key, number_of_round, found.value, found.count, found.costs, found.also)
    results.samples.append(sample)
    results.save(options.output)
    took = time.monotonic() - began
    out.print(f"{name} {number(found.value):>9} {workload.unit:<13} [dim]{took:.0f} s[/dim]", highlight=False)
    return True


def describe(started: Servers, peers: list[Peer], options: argparse.Namespace) -> dict[str, Any]:
    """What has to be known to read the figures."""
    with started.admin() as connection:
        row = connection.execute("SHOW server_version").fetchone()
    assert row
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "scale": options.scale,
        "pool": options.pool,
        "machine": {
            "cores": os.cpu_count(),
            "kernel": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "load at start": round(os.getloadavg()[0], 2),
        },
        "python": platform.python_version(),
        "postgresql": row[0],
        "settings": {"fsync": "on", **POSTGRES_SETTINGS},
        "versions": {peer.name: versions(peer) for peer in peers},
    }


def check_same(results: Results, about: dict[str, Any]) -> None:
    """Refuse to add to results of something else."""
    for key in ("scale", "pool", "python", "postgresql"):
        if results.about and results.about.get(key) != about[key]:
            raise SystemExit(
                f"These results were measured with {key} {results.about.get(key)!r}, and now it is {about[key]!r}:"
                " medians of both would mean nothing. Give another --output."
            )


def show(results: Results, baseline: str) -> None:
    """Print the tables."""
    measured = results.systems()
    if measured and baseline not in measured:
        baseline = measured[0]
    console.print(f"\nMedian (range) and ratio to {baseline}; above 1 is better.", highlight=False)
    for title, (heading, *rows) in tables(results, baseline).items():
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, column in enumerate(heading):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for name, note in results.notes.items():
        console.print(f"{name}: {note}", style="yellow", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
