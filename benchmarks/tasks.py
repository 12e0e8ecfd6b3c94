"""What is measured. Without a limit of attempts: what kills workers is not to fail what they run."""

from __future__ import annotations

from benchmarks import marks
from conductor_app import ExecutionContext, durable_task


@durable_task(max_retries=None)
def double(ctx: ExecutionContext, n: int) -> int:
    """Do nothing else."""
    return 2 * n


@durable_task(max_retries=None)
def fan_out(ctx: ExecutionContext, children: int, max_parallel: int | None = None) -> int:
    """Map over so many numbers, and add up what comes back."""
    return sum(ctx.map("double", double, ({"n": n} for n in range(children)), max_parallel=max_parallel))


@durable_task(max_retries=None)
def one_by_one(ctx: ExecutionContext, children: int) -> int:
    """Invoke so many children, one after another, and leave no marks."""
    return sum(ctx.invoke(f"child-{n}", double, {"n": n}) for n in range(children))


@durable_task(max_retries=None)
def trivial(ctx: ExecutionContext, n: int) -> int:
    """Do nothing: a child."""
    return n


@durable_task(max_retries=None)
def trivial_root(ctx: ExecutionContext, n: int) -> int:
    """Do nothing: a root."""
    marks.begin()
    marks.end()
    return n


@durable_task(max_retries=None)
def sequence(ctx: ExecutionContext, count: int) -> int:
    """Invoke so many children, one after another."""
    marks.begin()
    total = sum(ctx.invoke(f"child-{n}", trivial, {"n": n}) for n in range(count))
    marks.end()
    return total


@durable_task(max_retries=None)
def steps(ctx: ExecutionContext, count: int) -> int:
    """Remember so many steps."""
    marks.begin()
    total = sum(ctx.step(f"step-{n}", int, n) for n in range(count))
    marks.end()
    return total


@durable_task(max_retries=None)
def parallel(ctx: ExecutionContext, count: int) -> int:
    """Invoke so many children side by side."""
    marks.begin()
    total = sum(ctx.map("children", trivial, ({"n": n} for n in range(count))))
    marks.end()
    return total
