"""Durable tasks with children that run side by side."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from conductor_app import ChildCancelled, ChildFailed, ChildTimedOut, ExecutionContext, durable_task
from conductor_app.models import Execution
from tests.app.ledger import note


@durable_task(max_retries=8, dont_autoretry_for=(ValueError,))
def square(ctx: ExecutionContext, n: int, seconds: float = 0.0, fails: bool = False, dies: bool = False) -> int:
    """Return n², after some time; fail for good, or kill the process in the first attempt, if asked to."""
    note(ctx, "body")
    if dies and ctx.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
        ctx.checkpoint()
    if fails:
        raise ValueError(f"{n} is refused")
    return n * n


@durable_task
def sum_of_squares(ctx: ExecutionContext, n: int, **options: Any) -> dict[str, Any]:
    """Map over the numbers below ``n``; return the sum, and how many runs it took."""
    note(ctx, "body")
    squares = ctx.map("squares", square, [{"n": number} for number in range(n)], **options)
    return {"sum": sum(squares), "runs": ctx._execution.fence}


@durable_task(max_retries=0)
def maps(ctx: ExecutionContext, payloads: list[Any], **options: Any) -> list[Any]:
    """Map over ``payloads``; errors come back as their text."""
    note(ctx, "body")
    values = ctx.map("squares", square, payloads, **options)
    return [f"{type(value).__name__}: {value}" if isinstance(value, Exception) else value for value in values]


@durable_task(max_retries=0)
def compensating_map(ctx: ExecutionContext, payloads: list[Any]) -> dict[str, Any]:
    """Catch a map's failure, and go on with another child."""
    note(ctx, "body")
    try:
        ctx.map("squares", square, payloads)
    except (ChildFailed, ChildTimedOut, ChildCancelled) as error:
        caught = str(error)
    after = ctx.invoke("after", square, {"n": 7})
    return {"caught": caught, "after": after}


@durable_task(max_retries=0)
def starts(ctx: ExecutionContext, payloads: list[Any], gathered: int | None = None, **options: Any) -> list[Any]:
    """Start one child per payload, and gather the first ``gathered`` of them (all by default)."""
    note(ctx, "body")
    handles = [ctx.start(f"child-{number}", square, payload) for number, payload in enumerate(payloads)]
    values = ctx.gather(*handles[:gathered], **options)
    return [f"{type(value).__name__}: {value}" if isinstance(value, Exception) else value for value in values]


@durable_task(max_retries=0)
def compensating_gather(ctx: ExecutionContext, payloads: list[Any]) -> dict[str, Any]:
    """Catch a gather's failure, go on with another child, then gather what is left."""
    note(ctx, "body")
    handles = [ctx.start(f"child-{number}", square, payload) for number, payload in enumerate(payloads)]
    try:
        ctx.gather(*handles)
    except (ChildFailed, ChildTimedOut, ChildCancelled) as error:
        caught = str(error)
    after = ctx.invoke("after", square, {"n": 7})
    rest = ctx.gather(*handles, return_exceptions=True)
    return {"caught": caught, "after": after, "rest": [str(value) for value in rest]}


@durable_task
def tree(ctx: ExecutionContext, depth: int, width: int) -> int:
    """A tree of maps; return how many leaves it has."""
    if depth == 0:
        return 1
    return sum(ctx.map("branches", tree, [{"depth": depth - 1, "width": width}] * width))


@durable_task(max_retries=0)
def chord_of_plain_tasks(ctx: ExecutionContext, n: int) -> dict[str, Any]:
    """A header of other people's tasks side by side, and a body that gets all their results."""
    note(ctx, "body")
    sums = ctx.map("header", "tests.app.tasks.add", [{"x": number, "y": number} for number in range(n)])
    parts = ctx.map("parts", "celery.starmap", [{"task": _add(), "it": [[one, 1]]} for one in sums], max_parallel=3)
    together = ctx.invoke("body", "celery.accumulate", parts)
    return {"sums": sums, "together": together}


def _add() -> dict[str, Any]:
    return {"task": "tests.app.tasks.add", "args": [], "kwargs": {}, "options": {}}


@durable_task
def arrivals(ctx: ExecutionContext, n: int) -> list[list[Any]]:
    """Square the numbers below ``n``, of which each fifth kills its process once; return them as they arrive.

    The body kills its process, too, in its first attempt, after the third of them.
    """
    handles = [
        ctx.start(f"n{number}", square, {"n": number, "seconds": 0.05, "dies": not number % 5}) for number in range(n)
    ]
    order: list[Any] = []
    for handle in ctx.as_completed("arrivals", *handles):
        order.append([handle.step, handle.result()])
        if len(order) == 3 and ctx.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return order


@durable_task
def decides(ctx: ExecutionContext) -> list[Any]:
    """Wait for the first of two children; die when both have ended, before anything else is recorded."""
    slow = ctx.start("slow", square, {"n": 2, "seconds": 1})
    quick = ctx.start("quick", square, {"n": 3})
    winner, value = ctx.first("decision", slow, quick, ctx.timer("late", 300))
    if ctx.attempt == 1:
        deadline = time.monotonic() + 60
        while Execution.objects.filter(parent_id=ctx.execution_id).open().exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return [winner.step, value, slow.result()]
