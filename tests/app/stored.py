"""Tasks of the executions that earlier versions stored (``tests/compat``): they stay as they are."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from typing import Any

from celery import shared_task

from conductor_app import ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, durable_task

#: Each type of value that is stored.
VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "integers": [0, -1, 2**70],
    "float": 0.1,
    "text": 'ä"\\\n\u2028😀',
    "decimal": decimal.Decimal("12.30"),
    "uuid": uuid.UUID("0190a5d8-6a7e-7cc4-8f00-0123456789ab"),
    "datetime": dt.datetime(2026, 11, 28, 12, 30, 15, 250_000, tzinfo=dt.UTC),
    "date": dt.date(2026, 11, 28),
    "time": dt.time(12, 30, 15),
    "bytes": b"\x00\xff",
    "nested": {"list": [1, [2, {"three": 3}]], "empty": [{}, []]},
}


class Declined(Exception):
    """An error with arguments and an attribute of its own."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


def decline() -> None:
    """Raise it."""
    raise Declined(402, "no funds")


@shared_task
def plain(number: int) -> int:
    """A plain Celery task."""
    return number + 1


@durable_task
def echo(ctx: ExecutionContext, value: Any = None) -> Any:
    """Return the payload."""
    return value


@durable_task(max_retries=0)
def waits(ctx: ExecutionContext, name: str = "") -> list[Any]:
    """Wait for an event."""
    return [name, ctx.wait_for("wait", "go")]


@durable_task(max_retries=0)
def waits_in_time(ctx: ExecutionContext) -> str:
    """Wait for an event that does not come."""
    try:
        ctx.wait_for("wait", "go-in-time", timeout=60)
    except EventTimedOut as error:
        return str(error)
    return "in time"


@durable_task(max_retries=0)
def invokes(ctx: ExecutionContext) -> list[Any]:
    """Invoke a child that waits."""
    return ["parent", ctx.invoke("child", waits, {"name": "invoked"})]


@durable_task(max_retries=0)
def invokes_in_time(ctx: ExecutionContext) -> str:
    """Invoke a child that is late."""
    try:
        ctx.invoke("child", waits_in_time, timeout=30)
    except ChildTimedOut as error:
        return str(error)
    return "in time"


@durable_task(max_retries=0)
def maps(ctx: ExecutionContext) -> list[Any]:
    """Map over three children, one at a time."""
    return ctx.map("each", waits, [{"name": f"mapped {number}"} for number in range(3)], max_parallel=1)


@durable_task(max_retries=0)
def gathers(ctx: ExecutionContext) -> list[Any]:
    """Start two children of which one has ended, and wait for both."""
    first = ctx.start("first", waits, {"name": "gathered"})
    second = ctx.start("second", echo, {"value": 2})
    return ctx.gather(first, second)


@durable_task(max_retries=0)
def sleeps(ctx: ExecutionContext) -> str:
    """Sleep for a minute."""
    ctx.sleep("nap", 60)
    return "rested"


@durable_task(max_retries=0)
def invokes_plain(ctx: ExecutionContext) -> int:
    """Invoke a plain Celery task."""
    return ctx.invoke("plain", plain, {"number": 1})


@durable_task(max_retries=0)
def remembers(ctx: ExecutionContext, given: dict[str, Any]) -> dict[str, Any]:
    """Remember values and failures, and then wait."""
    kept = ctx.step("keep", lambda: given)
    together = ctx.atomic_step("keep-together", lambda: [None, 1])
    caught: list[Any] = []
    try:
        ctx.step("decline", decline)
    except Declined as error:
        caught += [type(error).__name__, error.code, list(error.args)]
    try:
        ctx.invoke("fails", fails)
    except ChildFailed as error:
        caught.append(str(error))
    caught.append(ctx.invoke("none", echo))
    ctx.wait_for("wait", "go")
    return {"same": kept == given == VALUES, "together": together, "caught": caught}


@durable_task(max_retries=0)
def fails(ctx: ExecutionContext) -> None:
    """Fail for good."""
    raise ValueError("card declined")


@durable_task(max_retries=0)
def fails_below(ctx: ExecutionContext) -> Any:
    """Fail by a child, until that is let through."""
    return ctx.invoke("child", fails_until_it_may)


#: Names of what does not fail any more.
may_pass: set[str] = set()


@durable_task(max_retries=0)
def fails_until_it_may(ctx: ExecutionContext) -> str:
    """Fail unless a test says otherwise."""
    if "child" not in may_pass:
        raise ValueError("not yet")
    return "passed"


@durable_task(max_retries=3, retry_backoff=60, retry_jitter=False)
def retries(ctx: ExecutionContext) -> int:
    """Fail in the first attempt."""
    if ctx.attempt == 1:
        raise ConnectionError("try again")
    return ctx.attempt
