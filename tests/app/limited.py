"""Tasks with limits, and bodies that tell when they run."""

from __future__ import annotations

import time

from conductor_app import ExecutionContext, Limit, durable_task
from tests.app.ledger import note
from tests.app.stops import pause

three = Limit("tests-three", 3, holds="run")
one_open = Limit("tests-one-open", 1, holds="open", per="key")
one_run = Limit("tests-one-run", 1, holds="run", per="key")
left, right = Limit("tests-left", 1, holds="run"), Limit("tests-right", 1, holds="run")
rate = Limit("tests-rate", rate="20/s", burst=2)


@durable_task(limits=[three], max_retries=None, retry_backoff=False, default_retry_delay=0)
def busy(ctx: ExecutionContext, seconds: float = 0.2) -> int:
    note(ctx, "body")
    time.sleep(seconds)
    return ctx.attempt


@durable_task(limits=[one_open])
def keeps(ctx: ExecutionContext, key: str) -> str:
    note(ctx, "body")
    ctx.wait_for("answer", "approved")
    return key


@durable_task(limits=[one_run])
def gives(ctx: ExecutionContext, key: str) -> str:
    note(ctx, "body")
    ctx.wait_for("answer", "approved")
    return key


@durable_task(limits=[one_run])
def holds_until_told(ctx: ExecutionContext, key: str) -> str:
    note(ctx, "body")
    pause("go")
    return key


@durable_task(limits=[left, right])
def needs_both(ctx: ExecutionContext) -> None:
    note(ctx, "body")
    time.sleep(0.02)


@durable_task(limits=[right, left])
def needs_both_too(ctx: ExecutionContext) -> None:
    note(ctx, "body")
    time.sleep(0.02)


@durable_task(limits=[rate])
def rated(ctx: ExecutionContext) -> None:
    note(ctx, "body")


@durable_task
def unlimited(ctx: ExecutionContext) -> str:
    note(ctx, "body")
    return "done"
