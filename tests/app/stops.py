"""Bodies that are in the middle of something when their worker is asked to end, or they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery import shared_task

from conductor_app import ExecutionContext, api, durable_task
from tests.app.ledger import count, note

#: Longer than any test, and it ends by itself.
PATIENCE_SECONDS = 120


def pause(name: str) -> None:
    """Return when the test has written the line ``name``; no ``ctx`` call."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not count(name) and time.monotonic() < deadline:
        time.sleep(0.05)


@durable_task(max_retries=0)
def walks(ctx: ExecutionContext, steps: int, seconds: float = 0.1) -> int:
    """Take one step after another, with a pause before each, and return the attempt."""
    note(ctx, "body")
    for number in range(steps):
        time.sleep(seconds)
        ctx.step(f"step-{number}", note, ctx, f"step-{number}")
    return ctx.attempt


CALLS: dict[str, Callable[[ExecutionContext], Any]] = {
    "step": lambda ctx: ctx.step("new", note, ctx, "effect"),
    "atomic_step": lambda ctx: ctx.atomic_step("new", note, ctx, "effect"),
    "invoke": lambda ctx: ctx.invoke("new", effect),
    "map": lambda ctx: ctx.map("new", effect, [None]),
    "start": lambda ctx: ctx.gather(ctx.start("new", effect)),
    "sleep": lambda ctx: ctx.sleep("new", 0.1),
    "wait_for": lambda ctx: ctx.wait_for("new", "approval"),
    "checkpoint": lambda ctx: ctx.checkpoint(),
}


@durable_task(max_retries=0)
def pauses(ctx: ExecutionContext, call: str, swallows: bool = False) -> list[Any]:
    """Remember a step, wait for the test, and make a call that is not recorded."""
    note(ctx, "body")
    ctx.step("known", int)
    pause("go")
    try:
        CALLS[call](ctx)
    except BaseException:
        if not swallows:
            raise
        note(ctx, "swallowed")
        CALLS[call](ctx)
    note(ctx, "after")
    return [ctx.attempt, ctx.step("known-too", int)]


@durable_task(max_retries=0)
def returns_when_told(ctx: ExecutionContext, fails: bool = False) -> str:
    """Wait for the test, make no ``ctx`` call, and end."""
    note(ctx, "body")
    pause("go")
    note(ctx, "end")
    if fails:
        raise ValueError("card declined")
    return "done"


@durable_task
def effect(ctx: ExecutionContext) -> None:
    note(ctx, "effect")


@durable_task(max_retries=0)
def waits_for_plain(ctx: ExecutionContext) -> Any:
    return ctx.invoke("plain", plain_when_told)


@shared_task(bind=True, max_retries=0)
def plain_when_told(self: Any) -> str:
    """The same as a plain Celery task."""
    note(self.request.id, "body")
    pause("go")
    note(self.request.id, "end")
    return "done"


@durable_task(max_retries=0)
def waits_for_durable(ctx: ExecutionContext, timeout: float | None = None) -> Any:
    return ctx.invoke("durable", returns_when_told, timeout=timeout)


@durable_task(max_retries=0)
def cancels_itself(ctx: ExecutionContext) -> None:
    ctx.step("before", note, ctx, "before")
    api.cancel(ctx.execution_id)
    ctx.step("new", note, ctx, "effect")
