"""Bodies that tell how far they are."""

from __future__ import annotations

from conductor_app import ExecutionContext, LeaseLost, durable_task
from tests.app.ledger import note
from tests.app.stops import pause


@durable_task
def tells(ctx: ExecutionContext) -> str:
    ctx.progress(1, 3, "begun")
    ctx.publish("receipt", {"id": 7})
    pause("go")
    ctx.progress(2, 3)
    ctx.sleep("nap", 0.1)
    ctx.progress(3, 3, "rested")
    return "done"


@durable_task(max_retries=3, retry_backoff=False, default_retry_delay=0)
def tells_late(ctx: ExecutionContext) -> int:
    """Tell something once more when another run has taken over."""
    note(ctx, "body")
    ctx.progress(ctx.attempt, note=f"attempt {ctx.attempt}")
    if ctx.attempt == 1:
        pause("go")
        try:
            ctx.progress(100, note="a zombie")
        except LeaseLost:
            note(ctx, "refused")
            raise
    return ctx.attempt
