"""Let real workers run on real servers while processes are killed and connections cut, and check what comes out.

    python -m tests.chaos [--seed N] [--roots N] [--seconds S] [--broker redis|rabbitmq] [--hours H] [--report FILE]
        [--no-hand-off]

One round takes ``--seconds``, the start of the stack and the drain. With ``--hours``, rounds with the next seeds follow
until the time is over, and commits are forced to disk.

Exit code: 0 if everything held, 1 if something did not, 2 if a server is not installed. After a 1, the directory with
the logs of the workers and of what was done to them is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import django
import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.chaos import soak, stack

if TYPE_CHECKING:
    from tests.chaos.checker import Verdict
    from tests.chaos.nemesis import Nemesis
    from tests.chaos.workload import Client

#: How long the executions that are open when everything is healed may take, in seconds. A message that was lost several
#: times is published again after 64 s; the pause after several deaths is as long.
QUIET_SECONDS = 100.0
#: How often progress is shown, in seconds, where it cannot be overwritten.
PRINT_SECONDS = 10.0
#: How many violations are printed; the report has all.
SHOWN_VIOLATIONS = 20

console = Console(soft_wrap=True)


def main() -> int:
    """Play one round, or as many as there is time for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="by default a new one")
    parser.add_argument("--roots", type=int, default=1_000, help="how many to start, if the machine keeps up")
    parser.add_argument("--seconds", type=float, default=150, help="for how long faults are injected")
    parser.add_argument("--broker", choices=soak.BROKERS, help="redis; of several rounds, in turn")
    parser.add_argument("--hours", type=float, help="repeat with the next seeds until so much time is over")
    parser.add_argument("--fsync", action="store_true", help="force commits to disk; implied by --hours")
    parser.add_argument("--report", type=Path, help="write the report to this file as JSON")
    parser.add_argument("--no-hand-off", action="store_true", help="publish a message for each run")
    options = parser.parse_args()
    if options.no_hand_off:
        os.environ["CONDUCTOR_CHAOS_HAND_OFF"] = "0"  # of the workers, and of further rounds
    if options.hours is not None:
        return soak.soak(options, console)
    options.broker = options.broker or soak.BROKERS[0]
    try:
        return _round(options)
    except (pytest.skip.Exception, FileNotFoundError) as missing:
        console.print(f"{missing}", style="red", markup=False)
        return 2


def _round(options: argparse.Namespace) -> int:
    began = time.monotonic()
    console.rule(f"chaos, seed {options.seed}, {options.broker}")
    directory = stack.new_directory(options.seed)
    with stack.servers(options.broker, fsync=options.fsync) as servers:
        django.setup()
        logging.disable(logging.WARNING)  # the client's; the report counts what it met
        # What needs Django's settings, which are there only now.
        from django.core.management import call_command
        from django.db import connection

        from tests.chaos import checker
        from tests.chaos.nemesis import Nemesis
        from tests.chaos.operators import Operator
        from tests.chaos.workload import Client
        from tests.support import history

        call_command("migrate", verbosity=0)
        with history.recording(), stack.Workers(directory) as workers:
            client = Client(options.seed, options.roots, options.seconds)
            operator = Operator(options.seed)
            nemesis = Nemesis(servers, workers, options.seed)
            started_after = time.monotonic() - began

            connection.close()  # it would not outlive what follows
            client.start()
            operator.start()
            nemesis.begin()
            _watch("faults", options.seconds, lambda: not client.is_alive(), nemesis.tick, client, nemesis)
            nemesis.end()
            client.finish()
            operator.finish()
            healed = time.monotonic()
            is_quiet = lambda: not client.count_open()  # noqa: E731
            _watch("healing", QUIET_SECONDS, is_quiet, workers.look_after, client, nemesis)
            quiet_after = time.monotonic() - healed

            logs = {worker.log_path.name: worker.log for worker in workers.all}
            verdict = checker.check(client.roots, operator, nemesis, logs, servers.postgres.log)
            verdict.figures |= {
                "seed": options.seed,
                "broker": options.broker,
                "kills": nemesis.kills,
                "acts": dict(nemesis.counts),
                "of_operators": dict(operator.counts),
                "commits_cut": servers.database_proxy.commits_cut,
                "client_errors": dict(client.errors),
                "seconds_to_start": round(started_after, 1),
                "seconds_of_faults": round(healed - began - started_after, 1),
                "seconds_to_quiet": round(quiet_after, 1),
            }
            (directory / "postgres.log").write_text(servers.postgres.log)
    nemesis.save(directory / "nemesis.jsonl")
    verdict.figures["seconds"] = round(time.monotonic() - began, 1)
    _report(verdict, options.report, directory)
    return 1 if verdict.violations else 0


def _watch(
    phase: str, seconds: float, is_over: Callable[[], bool], tick: Callable[[], None], client: Client, nemesis: Nemesis
) -> None:
    """Tick for so many seconds, or until it is over, and show how it goes."""
    began = looked_at = printed_at = time.monotonic()

    def show() -> Table:
        table = Table(title=f"{phase}, {time.monotonic() - began:.0f} of {seconds:.0f} s", title_justify="left")
        for column in ("roots started", "roots open", "kills", "other faults"):
            table.add_column(column, justify="right")
        others = len(nemesis.log) - nemesis.kills
        table.add_row(str(len(client.roots)), str(client.open_roots), str(nemesis.kills), str(others))
        return table

    with Live(show(), console=console, auto_refresh=False, transient=True) as live:
        while (now := time.monotonic()) < began + seconds:
            tick()
            if now - looked_at > 0.5:
                looked_at = now
                if is_over():
                    break
                live.update(show(), refresh=True)
            if not console.is_terminal and now - printed_at > PRINT_SECONDS:
                printed_at = now
                console.print(
                    f"{phase} {now - began:.0f}s: {len(client.roots)} roots, {client.open_roots} open, "
                    f"{nemesis.kills} kills, {len(nemesis.log) - nemesis.kills} other faults"
                )
            time.sleep(0.02)


def _report(verdict: Verdict, path: Path | None, directory: Path) -> None:
    table = Table("figure", "value", title="Chaos", title_justify="left")
    for name, value in verdict.figures.items():
        table.add_row(name.replace("_", " "), soak.shown(value))
    for name, recovery in verdict.recovery.items():
        figures = soak.describe(recovery.seconds) if recovery.seconds else {}
        table.add_row(f"recovery after {name}", soak.shown({**figures, "not counted": recovery.disturbed}))
    console.print(table)
    for violation in verdict.violations[:SHOWN_VIOLATIONS]:
        console.print(violation, style="red", markup=False)
    if hidden := len(verdict.violations) - SHOWN_VIOLATIONS:
        console.print(f"… and {hidden} more", style="red") if hidden > 0 else None
    if path is not None:
        report = {**verdict.figures, "violations": verdict.violations}
        report["recovery"] = {name: dataclasses.asdict(recovery) for name, recovery in verdict.recovery.items()}
        path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    if verdict.violations:
        console.print(f"{len(verdict.violations)} violations. Logs: {directory}", style="red")
    else:
        shutil.rmtree(directory)
        console.print("Everything held.", style="green")


if __name__ == "__main__":
    sys.exit(main())
