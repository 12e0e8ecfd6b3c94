"""How fast executions are started: by one ``.delay()`` after another, and by ``start_many``.

    python -m benchmarks.start_many [--count 10000] [--singles 2000] [--rounds 3] [--keys] [--tags]

No worker runs. Both rates count from the first call until all messages are out that the caller publishes itself.

Exit code: 1 if ``start_many`` is less than 8 times as fast.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import uuid
from typing import Any

from rich.table import Table

from benchmarks import stack

#: So many times the rate of single calls is promised.
PROMISED = 8


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_many", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="executions of one start_many")
    parser.add_argument("--singles", type=int, default=2_000, help="calls of .delay()")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keys", action="store_true", help="with idempotency keys")
    parser.add_argument("--tags", action="store_true", help="with a tag each")
    options = parser.parse_args()
    stack.setup()
    rates: dict[str, list[float]] = {".delay()": [], "start_many": []}
    with stack.fresh_database():
        for _ in range(options.rounds):
            rates[".delay()"].append(_one_by_one(options.singles, keys=options.keys, tags=options.tags))
            rates["start_many"].append(_together(options.count, keys=options.keys, tags=options.tags))
    table = Table("", "executions per second", "range")
    for name, measured in rates.items():
        spread = f"{min(measured):,.0f} to {max(measured):,.0f}"
        table.add_row(name, f"{statistics.median(measured):,.0f}", spread)
    stack.console.print(table)
    times = statistics.median(rates["start_many"]) / statistics.median(rates[".delay()"])
    stack.console.print(f"start_many of {options.count:,} has {times:.1f} times the rate.")
    return 0 if times >= PROMISED else 1


def _one_by_one(count: int, *, keys: bool, tags: bool) -> float:
    from benchmarks.tasks import trivial

    given: dict[str, Any] = {"tags": {"tenant": "acme"}} if tags else {}
    started = time.perf_counter()
    for number in range(count):
        if keys:
            given["idempotency_key"] = str(uuid.uuid4())
        trivial.apply_async((number,), **given)
    return count / (time.perf_counter() - started)


def _together(count: int, *, keys: bool, tags: bool) -> float:
    from benchmarks.tasks import trivial

    started = time.perf_counter()
    trivial.start_many(
        [{"n": number} for number in range(count)],
        idempotency_keys=[str(uuid.uuid4()) for _ in range(count)] if keys else None,
        tags={"tenant": "acme"} if tags else None,
    )
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
