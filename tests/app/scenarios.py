"""Durable tasks for everything that can go wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.db import connection

from conductor_app import ChildCancelled, ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, durable_task
from tests.app.crashes import QUIET
from tests.app.ledger import count, note


@durable_task
def echo(ctx: ExecutionContext, value: Any = None) -> Any:
    note(ctx, "body")
    return value


@durable_task
def pass_through(ctx: ExecutionContext, value: Any = None) -> Any:
    """Invoke ``echo`` and return what it returned."""
    note(ctx, "body")
    return ctx.invoke("echo", echo, {"value": value})


@durable_task
def says(ctx: ExecutionContext, line: str) -> Any:
    """Log a line before and after a child."""
    ctx.logger.info("%s once", line)
    ctx.invoke("echo", echo)
    ctx.logger.info("%s twice", line)


@durable_task(max_retries=0)
def boom(ctx: ExecutionContext, message: str = "card declined") -> None:
    note(ctx, "body")
    raise ValueError(message)


@durable_task(max_retries=0)
def parent_of_boom(ctx: ExecutionContext, message: str = "card declined") -> None:
    note(ctx, "body")
    ctx.invoke("charge", boom, {"message": message})


@durable_task(max_retries=0)
def grandparent_of_boom(ctx: ExecutionContext, message: str = "card declined") -> None:
    note(ctx, "body")
    ctx.invoke("sub", parent_of_boom, {"message": message})


@durable_task(max_retries=0)
def compensates(ctx: ExecutionContext) -> dict[str, str]:
    """Catch the child's failure, and go on."""
    note(ctx, "body")
    try:
        ctx.invoke("charge", boom)
    except ChildFailed as error:
        ctx.step("compensate", note, None, "compensate")
        ctx.invoke("after", echo, {"value": 1})
        return {"caught": str(error)}
    return {"caught": ""}


@durable_task(max_retries=2, retry_backoff=0.1, retry_jitter=False)
def flaky(ctx: ExecutionContext, failures: int) -> int:
    """Fail that often, then return the attempt."""
    note(ctx, "body")
    if ctx.attempt <= failures:
        raise ConnectionError(f"attempt {ctx.attempt} failed")
    return ctx.attempt


@durable_task
def slow(ctx: ExecutionContext, seconds: float, checkpoints: bool = False) -> str:
    """Take that long."""
    note(ctx, "body")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if checkpoints:
            ctx.checkpoint()
    note(ctx, "slow-end")
    return "done"


@durable_task(max_retries=0)
def waits_for_slow(
    ctx: ExecutionContext, seconds: float, timeout: float | None = None, on_timeout: str = "cancel"
) -> dict[str, str]:
    note(ctx, "body")
    return {"slow": ctx.invoke("slow", slow, {"seconds": seconds}, timeout=timeout, on_timeout=on_timeout)}


@durable_task(max_retries=0)
def catches_timeout(ctx: ExecutionContext, seconds: float, timeout: float) -> dict[str, str]:
    note(ctx, "body")
    try:
        ctx.invoke("slow", slow, {"seconds": seconds}, timeout=timeout)
    except ChildTimedOut as error:
        return {"caught": str(error)}
    return {"caught": ""}


@durable_task(max_retries=0)
def catches_cancel(ctx: ExecutionContext, seconds: float) -> dict[str, str]:
    try:
        ctx.invoke("slow", slow, {"seconds": seconds})
    except ChildCancelled as error:
        return {"caught": str(error)}
    return {"caught": ""}


@durable_task
def naps(ctx: ExecutionContext, seconds: float) -> str:
    note(ctx, "body")
    ctx.sleep("nap", seconds)
    return "rested"


@durable_task(max_retries=2)
def kills_its_process(ctx: ExecutionContext, times: int) -> int:
    """Die like a process that the kernel kills, on the first attempts."""
    note(ctx, "body")
    if ctx.attempt <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.attempt


@durable_task(max_retries=0)
def parent_of_killer(ctx: ExecutionContext, times: int) -> dict[str, int]:
    note(ctx, "body")
    return {"attempt": ctx.invoke("killer", kills_its_process, {"times": times})}


@durable_task
def steps_then_child(ctx: ExecutionContext) -> list[Any]:
    """Two steps, a child, and a step after it."""
    first = ctx.step("first", _noted, None, "first", 1)
    second = ctx.atomic_step("second", _noted, None, "second", 2)
    child = ctx.invoke("child", echo, {"value": 3})
    last = ctx.step("last", _noted, None, "last", 4)
    return [first, second, child, last]


def _noted(execution_id: Any, key: str, value: Any) -> Any:
    note(execution_id, key)
    return value


@durable_task
def descend(ctx: ExecutionContext, levels: int) -> int:
    """Invoke itself ``levels`` times, and count."""
    if levels == 0:
        return 0
    return 1 + int(ctx.invoke("down", "tests.app.scenarios.descend", {"levels": levels - 1}))


@durable_task(time_limit=1, max_retries=1, retry_backoff=0.1)
def over_the_hard_limit(ctx: ExecutionContext) -> int:
    note(ctx, "body")
    if ctx.attempt == 1:
        time.sleep(30)
    return ctx.attempt


@durable_task
def add(ctx: ExecutionContext, x: int, y: int) -> int:
    """Add by way of a child, so that it suspends."""
    note(ctx, "body")
    return int(ctx.invoke("echo", echo, {"value": x + y}))


@durable_task
def total(ctx: ExecutionContext, numbers: list[int]) -> int:
    note(ctx, "body")
    return sum(numbers)


@durable_task
def lingers(ctx: ExecutionContext, seconds: float) -> int:
    """Take that long on the first attempt, and return the attempt."""
    note(ctx, "body")
    if ctx.attempt == 1:
        time.sleep(seconds)
        note(ctx, "late")
    return ctx.attempt


@durable_task(max_retries=0)
def waits_for_lingerer(ctx: ExecutionContext, seconds: float, timeout: float | None = None) -> dict[str, int]:
    note(ctx, "body")
    return {"attempt": ctx.invoke("lingers", lingers, {"seconds": seconds}, timeout=timeout)}


@durable_task
def dawdles(ctx: ExecutionContext, seconds: float, marks: str) -> int:
    """Take that long on the first run, and return how many there were; write nothing into the database meanwhile.

    A file ``end`` beside the directory ``marks`` ends it before.
    """
    del ctx
    mark = Path(marks) / uuid.uuid4().hex
    is_first = not list(mark.parent.iterdir())
    mark.touch()
    ends_at = time.monotonic() + seconds
    while is_first and time.monotonic() < ends_at and not mark.parent.with_name("end").exists():
        time.sleep(0.05)
    return len(list(mark.parent.iterdir()))


@durable_task
def waits_for_dawdler(ctx: ExecutionContext, seconds: float, marks: str) -> int:
    note(ctx, "body")
    return ctx.invoke("dawdles", dawdles, {"seconds": seconds, "marks": marks})


@durable_task
def invokes_dawdler(ctx: ExecutionContext, seconds: float, marks: str) -> int:
    """As ``waits_for_dawdler``, and without a line in the ledger."""
    return ctx.invoke("dawdles", dawdles, {"seconds": seconds, "marks": marks})


@durable_task
def waits_for_one_that_waits(ctx: ExecutionContext, seconds: float, marks: str) -> int:
    note(ctx, "body")
    return ctx.invoke("waits", invokes_dawdler, {"seconds": seconds, "marks": marks})


@durable_task(max_retries=0)
def has_one_attempt(ctx: ExecutionContext, seconds: float) -> str:
    """Take that long, and never again."""
    note(ctx, "body")
    time.sleep(seconds)
    return "done"


@durable_task
def waits_for_the_go(ctx: ExecutionContext) -> int:
    """Go on when the ledger says so, and give way to a shutdown before."""
    note(ctx, "body")
    while not count("go"):
        time.sleep(0.02)
        ctx.checkpoint()
    return ctx.attempt


@durable_task(max_retries=0)
def parent_of_the_go(ctx: ExecutionContext) -> dict[str, int]:
    note(ctx, "body")
    return {"attempt": ctx.invoke("go", waits_for_the_go)}


@durable_task(max_retries=0)
def three_children(ctx: ExecutionContext, value: int) -> list[int]:
    """Suspend three times without an attempt to lose."""
    note(ctx, "body")
    return [ctx.invoke(f"echo-{index}", echo, {"value": value + index}) for index in range(3)]


@durable_task(max_retries=1)
def exits(ctx: ExecutionContext, times: int) -> int:
    """End the process from inside, on the first attempts."""
    note(ctx, "body")
    if ctx.attempt <= times:
        sys.exit(3)
    return ctx.attempt


@durable_task(max_retries=1)
def raises_a_base_exception(ctx: ExecutionContext, times: int) -> int:
    """Raise what ``except Exception`` does not catch, on the first attempts."""
    note(ctx, "body")
    if ctx.attempt <= times:
        raise KeyboardInterrupt
    return ctx.attempt


@durable_task(soft_time_limit=1, max_retries=1, retry_backoff=0.1)
def over_the_soft_limit(ctx: ExecutionContext) -> int:
    note(ctx, "body")
    if ctx.attempt == 1:
        try:
            time.sleep(30)
        except SoftTimeLimitExceeded:
            note(ctx, "soft-limit")
            raise
    return ctx.attempt


@durable_task(max_retries=0)
def waits_for_a_queue(ctx: ExecutionContext, queue: str, value: Any = None, timeout: float | None = None) -> Any:
    """Invoke ``echo`` on another queue."""
    note(ctx, "body")
    return ctx.invoke("echo", echo, {"value": value}, queue=queue, timeout=timeout)


@durable_task(max_retries=0)
def waits_for_checkpoints(ctx: ExecutionContext, seconds: float, timeout: float) -> Any:
    """Invoke a long child that notices its cancellation."""
    note(ctx, "body")
    return ctx.invoke("slow", slow, {"seconds": seconds, "checkpoints": True}, timeout=timeout)


@durable_task(max_retries=None, retry_backoff=0.1, retry_jitter=False)
def step_by_step(ctx: ExecutionContext, steps: int, pause: float) -> list[int]:
    """Remember a step after each pause, with a child at the end."""
    note(ctx, "body")
    done = [ctx.step(f"step-{index}", _slow_step, index, pause) for index in range(steps)]
    done.append(int(ctx.invoke("echo", echo, {"value": steps})))
    return done


def _slow_step(index: int, pause: float) -> int:
    time.sleep(pause)
    return index


@durable_task(max_retries=0)
def waits_for_the_nap(ctx: ExecutionContext, seconds: float) -> str:
    note(ctx, "body")
    return str(ctx.invoke("nap", naps, {"seconds": seconds}))


@durable_task
def dies_at_commit(ctx: ExecutionContext, runs: list[str], child_runs: list[str]) -> dict[str, Any]:
    """Kill the process around the commit that ends a run, the way ``runs`` says for each run, and invoke a child."""
    _die_at_commit(ctx, runs)
    child = ctx.invoke("child", "tests.app.scenarios.leaf_dies_at_commit", {"runs": child_runs})
    return {"attempt": ctx.attempt, "child": child}


@durable_task
def leaf_dies_at_commit(ctx: ExecutionContext, runs: list[str]) -> int:
    _die_at_commit(ctx, runs)
    return ctx.attempt


def _die_at_commit(ctx: ExecutionContext, runs: list[str]) -> None:
    note(ctx, "body")
    run = count("body", ctx.execution_id) - 1
    moment = runs[run] if run < len(runs) else ""
    commit = connection._commit

    def commit_and_die() -> None:
        if moment == "after":
            commit()
        os.kill(os.getpid(), signal.SIGKILL)

    def execute_and_die(execute: Any, sql: str, *rest: Any) -> Any:
        is_deadly = not connection.in_atomic_block and not sql.startswith(QUIET)
        if is_deadly and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = execute(sql, *rest)
        if is_deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    if moment:
        connection._commit = commit_and_die
        connection.execute_wrappers.append(execute_and_die)


@durable_task(retry_backoff=0.1)
def waits_for_events(ctx: ExecutionContext, number: int, timeout: float | None = None) -> list[Any]:
    """Wait for that many events, and note each."""
    note(ctx, "body")
    values = []
    for index in range(number):
        values.append(ctx.wait_for(f"event-{index}", "item", timeout=timeout))
        ctx.step(f"noted-{index}", note, ctx.execution_id, "event", values[-1])
    return values


@durable_task(max_retries=0)
def catches_a_late_event(ctx: ExecutionContext, timeout: float) -> dict[str, Any]:
    """Wait in vain, then for as long as it takes."""
    note(ctx, "body")
    try:
        return {"in time": ctx.wait_for("first", "item", timeout=timeout)}
    except EventTimedOut as error:
        return {"caught": str(error), "late": ctx.wait_for("second", "item")}


@durable_task(max_retries=2)
def dies_before_it_waits(ctx: ExecutionContext, moment: str) -> Any:
    """Kill the process around the commit with which the first run takes its event, or suspends."""
    _die_at_commit(ctx, [moment])
    return [ctx.wait_for("event", "item"), ctx.attempt]
