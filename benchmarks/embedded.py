"""How long an invocation takes with the embedded default: SQLite, ``memory://`` and one worker that is idle.

    python -m benchmarks.embedded [--calls 100] [--concurrency 2]

Calls a root without children and one with a single child in turn, one call after another, with hand-off and without.
Prints the median and the range from ``delay()`` to the end as the database tells them, and what the child adds.
``DATABASE_URL`` and ``CELERY_BROKER_URL`` choose other servers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

from rich.table import Table

from benchmarks import stack

#: Calls that are not counted.
WARM_UPS = 10


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=2, help="pool processes of the worker")
    options = parser.parse_args()
    stack.setup()
    from django.conf import settings

    table = Table("hand-off", "root alone, ms", "with one child, ms", "the child adds, ms")
    for is_on in (True, False):
        os.environ["CONDUCTOR_BENCHMARK_SETTINGS"] = json.dumps({"HAND_OFF": is_on})
        with stack.fresh_database(), stack.Workers(1, concurrency=options.concurrency):
            alone, with_child = _measure(options.calls)
        added = statistics.median(with_child) - statistics.median(alone)
        table.add_row("on" if is_on else "off", _shown(alone), _shown(with_child), f"{added:.0f}")
    stack.console.print(f"{settings.DATABASES['default']['ENGINE']}, {settings.CELERY_BROKER_URL}")
    stack.console.print(table)
    return 0


def _measure(calls: int) -> tuple[list[float], list[float]]:
    from benchmarks.tasks import one_by_one

    found: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UPS + calls):
        for count in (0, 1):
            result = one_by_one.delay(count)
            took = _seconds(result.id)
            if number >= WARM_UPS:
                found[count].append(took * 1_000)
            # An idle worker looks again and again; let it be at any point of that.
            time.sleep(0.01 * (number % 7))
    return found


def _seconds(execution_id: str) -> float:
    from conductor_app.models import Execution

    row = Execution.objects.filter(pk=execution_id, finished_at__isnull=False)
    ended = stack.wait(row.first, timeout=60, interval=0.005)
    return float((ended.finished_at - ended.created_at).total_seconds())


def _shown(values: list[float]) -> str:
    ordered = sorted(values)
    p95 = ordered[int(len(ordered) * 0.95)]
    return f"{statistics.median(ordered):.0f} (p95 {p95:.0f}, {ordered[0]:.0f} to {ordered[-1]:.0f})"


if __name__ == "__main__":
    sys.exit(main())
