"""The two programs of the idea's origin, task for task."""

from __future__ import annotations

from typing import Any

from conductor_app import ExecutionContext, durable_task
from tests.app.ledger import note


@durable_task
def double(ctx: ExecutionContext, value: int) -> dict[str, int]:
    note(ctx, "body")
    return {"result": value * 2}


@durable_task
def quadruple(ctx: ExecutionContext, value: int) -> dict[str, int]:
    note(ctx, "body")
    first = ctx.invoke("double", double, {"value": value})
    return {"result": first["result"] * 2}


@durable_task
def validate(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    note(ctx, "body")
    return {"order_id": order_id, "total": 42}


@durable_task
def charge(ctx: ExecutionContext, total: int) -> dict[str, Any]:
    note(ctx, "body")
    return {"receipt": f"R-{total}"}


@durable_task
def send(ctx: ExecutionContext, receipt: str) -> None:
    note(ctx, "body")


@durable_task
def process_order(ctx: ExecutionContext, order_id: int) -> dict[str, bool]:
    note(ctx, "body")
    order = ctx.invoke("validate", validate, {"order_id": order_id})
    paid = ctx.invoke("charge", charge, {"total": order["total"]}, timeout=30)
    ctx.invoke("send", "tests.app.origin.send", paid)
    return {"success": True}
