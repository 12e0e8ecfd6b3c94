"""What is run again from a step."""

from __future__ import annotations

import time
from typing import Any

from conductor_app import ChildFailed, ExecutionContext, durable_task
from tests.app.ledger import count, note


@durable_task(max_retries=0)
def double(ctx: ExecutionContext, number: int) -> int:
    return 2 * number


@durable_task(max_retries=0)
def out_of_stock(ctx: ExecutionContext) -> None:
    raise ValueError("no stock")


@durable_task(max_retries=0)
def pay(ctx: ExecutionContext, amount: int) -> str:
    note(ctx, "charge")
    return f"paid {amount}"


def _check() -> str:
    note(None, "check")
    return "checked"


@durable_task(max_retries=3)
def settled(ctx: ExecutionContext, amount: int = 1, is_slow: bool = False) -> list[Any]:
    """Record a step, a map and a failed child, and then charge; a slow one waits once, until it is killed."""
    seen: list[Any] = [ctx.step("check", _check), ctx.map("double", double, [{"number": n} for n in range(3)])]
    try:
        ctx.invoke("stock", out_of_stock)
    except ChildFailed as error:
        seen.append(str(error))
    if is_slow and not count("slow", ctx.execution_id):
        note(ctx, "slow")
        while True:
            time.sleep(0.05)
    return [*seen, ctx.invoke("charge", pay, {"amount": amount})]
