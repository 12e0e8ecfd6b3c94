"""How long a map takes, by its number of children; and that it ends right while workers are killed.

    python -m benchmarks.fan_out [--children 100 1000 10000] [--rounds 3] [--kill-every SECONDS]

Prints the median seconds and the milliseconds per child. With ``--kill-every``, every so many seconds a pool process,
or each sixth time a whole worker, is killed and replaced.

Exit code: 1 if a sum is wrong, or a parent was woken more than once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import TYPE_CHECKING

from rich.progress import Progress
from rich.table import Table

from benchmarks import stack

if TYPE_CHECKING:
    from conductor_app.models import Execution


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fan_out", description=__doc__.splitlines()[0])
    parser.add_argument("--children", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=1, help="pool processes of each worker")
    parser.add_argument("--max-parallel", type=int)
    parser.add_argument("--kill-every", type=float, metavar="SECONDS")
    options = parser.parse_args()
    stack.setup()

    seconds: dict[int, list[float]] = {count: [] for count in options.children}
    kills: dict[int, int] = dict.fromkeys(options.children, 0)
    wrong = 0
    with (
        stack.fresh_database(),
        stack.Workers(options.workers, concurrency=options.concurrency) as workers,
        Progress(console=stack.console) as progress,
    ):
        _run(2, None, workers, None, progress)  # both workers are up, and have imported everything
        for _ in range(options.rounds):
            for count in options.children:
                root, took, killed = _run(count, options.max_parallel, workers, options.kill_every, progress)
                seconds[count].append(took)
                kills[count] += killed
                if root.get_result() != count * (count - 1) or root.fence - root.attempt != 1:
                    wrong += 1
                    stack.console.print(
                        f"{count} children: {root.get_result()!r} after {root.fence} runs, attempt {root.attempt}",
                        style="red",
                    )
    table = Table("children", "seconds", "range", "ms per child", "kills")
    for count, measured in seconds.items():
        median = statistics.median(measured)
        spread = f"{min(measured):.2f} to {max(measured):.2f}"
        table.add_row(f"{count:,}", f"{median:.2f}", spread, f"{median / count * 1000:.2f}", str(kills[count]))
    stack.console.print(table)
    return 1 if wrong else 0


def _run(
    count: int, max_parallel: int | None, workers: stack.Workers, kill_every: float | None, progress: Progress
) -> tuple[Execution, float, int]:
    from benchmarks.tasks import fan_out
    from conductor_app.models import Execution
    from conductor_app.states import ExecutionStatus

    started = time.perf_counter()
    result = fan_out.delay(count, max_parallel=max_parallel)
    root = Execution.objects.filter(pk=result.id)
    done = Execution.objects.filter(parent_id=result.id, status=ExecutionStatus.SUCCEEDED)
    bar = progress.add_task(f"{count:,} children", total=count)
    kills = 0
    killed_at = looked_at = time.monotonic()
    while not root.get().is_final:
        time.sleep(0.02)
        now = time.monotonic()
        if kill_every and now - killed_at >= kill_every:
            number = kills % len(workers.processes)
            if kills % 6 == 5:
                workers.kill_and_replace(number)
                kills += 1
            else:
                kills += workers.kill_pool_process(number)
            killed_at = now
        if now - looked_at > 1:
            looked_at = now
            progress.update(bar, completed=done.count())
    took = time.perf_counter() - started
    progress.remove_task(bar)
    return root.get(), took, kills


if __name__ == "__main__":
    sys.exit(main())
