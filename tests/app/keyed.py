"""Durable tasks with a unique key."""

from __future__ import annotations

import time

from conductor_app import DuplicateExecution, ExecutionContext, durable_task
from tests.app.ledger import note

#: A body that nobody stops ends by itself after so many seconds.
_LONGEST = 60


@durable_task(unique="customer", max_retries=3, default_retry_delay=60, retry_backoff=False, retry_jitter=False)
def sync(ctx: ExecutionContext, customer: str, value: int, how: str = "returns") -> int:
    """Begin, do as ``how`` says, and end; each of it is noted."""
    note(ctx, "begun", value)
    try:
        ends_at = time.monotonic() + _LONGEST
        while how == "runs" and time.monotonic() < ends_at:
            ctx.checkpoint()
            time.sleep(0.02)
        if how == "waits":
            ctx.wait_for("item", "item")
        if how == "pauses":
            raise ValueError("not now")
        time.sleep(0.05)
        return value
    finally:
        note(ctx, "ended", value)


@durable_task(max_retries=0)
def parent(ctx: ExecutionContext, customer: str) -> object:
    """Invoke one whose key may be taken, and tell of it after a wait."""
    try:
        done: object = ctx.invoke("sync", sync, {"customer": customer, "value": 7})
    except DuplicateExecution as error:
        done = [str(error.execution_id), error.status]
    ctx.sleep("pause", 0.2)
    return done
