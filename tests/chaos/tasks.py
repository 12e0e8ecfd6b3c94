"""What runs. Each body is a function of its payload, however often it is killed, so that its outcome is known before.

``work`` leaves two traces: one in the transaction that remembers the step, and one outside of it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import shared_task
from django.apps import apps

from conductor_app import ChildFailed, ChildTimedOut, ExecutionContext, Limit, durable_task
from conductor_app.store.ids import as_child_id
from tests.app.ledger import note

#: Kills cost attempts, and must not decide what becomes of an execution. Ended sessions fail attempts by the dozen; the
#: pause after them must end before the patience with those that are still open does.
PATIENT: dict[str, Any] = {
    "max_retries": None,
    "retry_backoff": 0.1,
    "retry_backoff_max": 5,
    "retry_jitter": False,
}
PAUSE_SECONDS = 0.15
#: How the keys of the traces begin: steps of either kind, and a plain task that runs at most once.
INSIDE, OUTSIDE, ONCE = "inside", "outside", "once"
#: Schedules whose executions may be open beside each other, or may not.
ALLOWING, SKIPPING = "chaos-allow", "chaos-skip"


@durable_task(**PATIENT)
def work(ctx: ExecutionContext, n: int) -> int:
    """Return 2n + 1, with a side effect in a step of either kind, and some time between them to be killed."""
    fence = ctx._execution.fence
    ctx.step(OUTSIDE, note, ctx.execution_id, OUTSIDE, fence)
    time.sleep(PAUSE_SECONDS)
    ctx.atomic_step(INSIDE, note, ctx.execution_id, INSIDE, fence)
    return 2 * n + 1


@durable_task(**PATIENT)
def lingering(ctx: ExecutionContext, steps: int) -> int:
    """Take several seconds, so that a zombie wakes up while another run is under way."""
    fence = ctx._execution.fence
    for index in range(steps):
        time.sleep(2 * PAUSE_SECONDS)
        ctx.atomic_step(f"{INSIDE}-{index}", note, ctx.execution_id, f"{INSIDE}-{index}", fence)
    return steps


@durable_task(**PATIENT)
def sequence(ctx: ExecutionContext, n: int) -> int:
    """Three children, one after another."""
    for name in ("first", "second", "third"):
        n = ctx.invoke(name, work, {"n": n})
    return n


@durable_task(**PATIENT)
def mapped(ctx: ExecutionContext, numbers: list[int], max_parallel: int | None) -> list[int]:
    """Children side by side, of one task."""
    return list(ctx.map("works", work, [{"n": n} for n in numbers], max_parallel=max_parallel))


@durable_task(**PATIENT)
def gathered(ctx: ExecutionContext, numbers: list[int]) -> list[int]:
    """Children side by side, started one by one, with one that is awaited alone."""
    handles = [ctx.start(f"work-{n}", work, {"n": n}) for n in numbers]
    alone = ctx.invoke("alone", work, {"n": 0})
    return [alone, *ctx.gather(*handles)]


@shared_task(acks_late=True, max_retries=None)
def plain(n: int) -> int:
    """As ``work``, without traces; runs again when its process dies."""
    return 2 * n + 1


@shared_task(bind=True)
def plain_once(self: Any, n: int) -> int:
    """Leave a trace; does not run again when its process dies."""
    note(as_child_id(self.request.id), ONCE)
    return n


@durable_task(**PATIENT)
def foreign(ctx: ExecutionContext, n: int) -> list[int]:
    """Plain Celery tasks as children."""
    try:
        ctx.invoke("once", plain_once, {"n": n})
    except ChildFailed as error:
        if "Worker died: " not in str(error):
            raise
    alone = ctx.invoke("alone", plain, {"n": n})
    return [alone, *ctx.map("plains", plain, [{"n": n}, {"n": n + 1}])]


@durable_task(**PATIENT)
def tree(ctx: ExecutionContext, depth: int) -> int:
    """Two branches at each level; return the number of leaves."""
    if depth == 0:
        return 1
    left = ctx.start("left", tree, {"depth": depth - 1})
    return int(ctx.invoke("right", tree, {"depth": depth - 1})) + int(ctx.gather(left)[0])


@durable_task(**PATIENT)
def flaky(ctx: ExecutionContext, n: int) -> int:
    """Succeed on the third attempt."""
    if ctx.attempt < 3:
        raise ConnectionError(f"attempt {ctx.attempt} fails")
    return n


@durable_task(**PATIENT)
def persistent(ctx: ExecutionContext, n: int) -> int:
    return int(ctx.invoke("flaky", flaky, {"n": n}))


@durable_task(**PATIENT, dont_autoretry_for=(ValueError,))
def refused(ctx: ExecutionContext, n: int) -> None:
    """Fail for good."""
    raise ValueError(f"{n} is refused")


@durable_task(**PATIENT)
def unforgiving(ctx: ExecutionContext, n: int) -> None:
    ctx.invoke("refused", refused, {"n": n})


@durable_task(**PATIENT)
def compensating(ctx: ExecutionContext, n: int) -> list[Any]:
    """Catch the child's failure, and go on."""
    try:
        ctx.invoke("refused", refused, {"n": n})
    except ChildFailed as error:
        return [str(error), ctx.invoke("compensation", work, {"n": n})]
    return []


@durable_task(**PATIENT)
def limbo(ctx: ExecutionContext, busy: bool) -> None:
    """Do nothing until cancelled, with a worker or without."""
    if busy:
        deadline = time.monotonic() + 3_600
        while time.monotonic() < deadline:
            time.sleep(0.05)
            ctx.checkpoint()
    ctx.sleep("for-ever", 86_400)


@durable_task(**PATIENT)
def hasty(ctx: ExecutionContext, busy: bool, timeout: float) -> str:
    """Catch a timeout."""
    try:
        ctx.invoke("limbo", limbo, {"busy": busy}, timeout=timeout)
    except ChildTimedOut as error:
        return str(error)
    return "in time"


@durable_task(**PATIENT)
def doomed(ctx: ExecutionContext) -> None:
    """Wait until somebody cancels it."""
    ctx.map("limbos", limbo, [{"busy": False}, {"busy": True}])


@durable_task(**PATIENT)
def sleeper(ctx: ExecutionContext, seconds: float) -> str:
    ctx.sleep("nap", seconds)
    return "rested"


@durable_task(**PATIENT)
def waiter(ctx: ExecutionContext, count: int) -> list[Any]:
    """Take that many events."""
    return [ctx.wait_for(f"item-{index}", "item") for index in range(count)]


@durable_task(**PATIENT)
def reckless(ctx: ExecutionContext, n: int) -> int:
    """Kill the process, once; with the threads and solo pools that is the whole worker."""
    if ctx.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(ctx.invoke("work", work, {"n": n}))


@durable_task(**PATIENT, time_limit=1)
def overlong(ctx: ExecutionContext, n: int) -> int:
    """Run into the hard time limit, once; the threads and solo pools have none."""
    if ctx.attempt == 1:
        time.sleep(3)
    return int(ctx.invoke("work", work, {"n": n}))


bank = Limit("chaos-bank", 3, holds="run")
account = Limit("chaos-account", 1, holds="open", per="account")
starts = Limit("chaos-starts", rate="60/m", burst=3)


@durable_task(**PATIENT, limits=[bank])
def banked(ctx: ExecutionContext, n: int) -> int:
    """Three run at a time; between its two runs, others may."""
    time.sleep(PAUSE_SECONDS)
    ctx.sleep("nap", 0.2)
    time.sleep(PAUSE_SECONDS)
    return n


@durable_task(**PATIENT)
def crowd(ctx: ExecutionContext, numbers: list[int], max_parallel: int | None) -> list[int]:
    return list(ctx.map("crowd", banked, [{"n": n} for n in numbers], max_parallel=max_parallel))


@durable_task(**PATIENT, limits=[account, bank])
def accounted(ctx: ExecutionContext, account: int, n: int) -> int:
    """One of an account is open at a time, and three run, with those of ``banked``."""
    return int(ctx.invoke("work", work, {"n": n}))


@durable_task(**PATIENT, limits=[starts])
def rated(ctx: ExecutionContext, n: int) -> int:
    """One a second starts."""
    ctx.sleep("nap", 0.2)
    return n


@durable_task(**PATIENT)
def keyed(ctx: ExecutionContext, n: int) -> int:
    """Be open for a while, of which half needs a worker."""
    time.sleep(PAUSE_SECONDS)
    ctx.sleep("nap", 0.5)
    time.sleep(PAUSE_SECONDS)
    return n


def _scheduled(name: str, overlap: str) -> dict[str, Any]:
    # The operator lets its instants come; a line of cron names whole minutes. Not in the process of tests that import
    # this: each sweep there would look after it.
    return {"cron": "0 0 1 1 *", "overlap": overlap, "schedule": name} if apps.is_installed("tests.chaos") else {}


@durable_task(**PATIENT, **_scheduled(ALLOWING, "allow"))
def ticking(ctx: ExecutionContext) -> str:
    return _tick(ctx)


@durable_task(**PATIENT, **_scheduled(SKIPPING, "skip"))
def ticking_alone(ctx: ExecutionContext) -> str:
    return _tick(ctx)


def _tick(ctx: ExecutionContext) -> str:
    time.sleep(PAUSE_SECONDS)
    ctx.sleep("nap", 2)
    assert ctx.scheduled_at is not None
    return ctx.scheduled_at.isoformat()


@durable_task(max_retries=2)
def poison(ctx: ExecutionContext) -> None:
    """Kill the process, always."""
    os.kill(os.getpid(), signal.SIGKILL)
