"""What an operator finds in the admin: an order whose child is slow, and one that waits for a person."""

from __future__ import annotations

import time
from typing import Any

from conductor_app import ExecutionContext, durable_task
from tests.app.ledger import count, note

#: While the ledger has no such line, nothing is packed.
PACKER_IS_BACK = "the packer is back"
#: While the ledger has no such line, no bill is paid.
BANK_IS_OPEN = "the bank is open"
#: Its account is closed for good.
CLOSED_ACCOUNT = 13


@durable_task(max_retries=0)
def pack(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Hold a worker until somebody packs."""
    note(ctx, "body")
    while not count(PACKER_IS_BACK):
        ctx.checkpoint()
        time.sleep(0.05)
    return {"parcel": f"PKG-{order_id}"}


@durable_task(max_retries=0)
def weigh(ctx: ExecutionContext, order_id: int) -> int:
    """Return at once."""
    return 7 * order_id


@durable_task(max_retries=0)
def deliver(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Wait for a slow child."""
    weight = ctx.invoke("weigh", weigh, {"order_id": order_id})
    parcel = ctx.invoke("pack", pack, {"order_id": order_id})
    return {"weight": weight, **parcel}


@durable_task(max_retries=0)
def release(ctx: ExecutionContext, order_id: int) -> bool:
    """Wait for a person."""
    return bool(ctx.wait_for("approval", "approved", timeout=86_400)["yes"])


@durable_task(max_retries=0)
def bill(ctx: ExecutionContext, order_id: int) -> int:
    """Fail while the bank is closed."""
    ctx.step("reserve", lambda: order_id)
    if order_id == CLOSED_ACCOUNT or not count(BANK_IS_OPEN):
        raise ConnectionError("the bank does not answer")
    return order_id
