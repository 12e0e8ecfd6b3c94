"""Plain Celery tasks, as they stand in any project, and parents that invoke them."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from celery import Task, shared_task
from celery.exceptions import Ignore, Reject

from conductor_app import ChildCancelled, ChildError, ExecutionContext, durable_task
from conductor_app.store.ids import as_child_id
from tests.app import scenarios
from tests.app.ledger import count, note


def begin(task: Any, key: str = "plain") -> int:
    """Note a run of a plain body, and return how many there were."""
    note(as_child_id(task.request.id), key, task.request.retries)
    return count(key, task.request.id)


@durable_task(max_retries=0)
def invokes(ctx: ExecutionContext, child: str, payload: Any = None, timeout: float | None = None) -> Any:
    """Invoke a task by its name, and return what it returned."""
    note(ctx, "body")
    return {"child": ctx.invoke("child", child, payload, timeout=timeout)}


@durable_task(max_retries=0)
def catches(ctx: ExecutionContext, child: str, payload: Any = None, timeout: float | None = None) -> Any:
    """Invoke a task by its name, and return how it failed."""
    note(ctx, "body")
    try:
        return {"child": ctx.invoke("child", child, payload, timeout=timeout)}
    except ChildCancelled as error:
        return {"cancelled": str(error)}
    except ChildError as error:
        return {"failed": str(error), "error_class": error.error_class}


@durable_task(max_retries=0)
def invokes_tasks_of_django(ctx: ExecutionContext, value: int) -> Any:
    """Invoke tasks of ``django.tasks``, which came with Django 6.0."""
    from tests.app import django_tasks

    doubled = ctx.invoke("double", django_tasks.double, {"value": value})
    return [doubled, ctx.invoke("describe", django_tasks.describe, {"word": "a"})]


@durable_task(max_retries=0)
def maps(ctx: ExecutionContext, values: list[int], max_parallel: int | None = None) -> Any:
    """Run a plain task side by side, and start one beside them."""
    handle = ctx.start("beside", echo, {"value": "beside"})
    mapped = ctx.map("each", echo, [{"value": value} for value in values], max_parallel=max_parallel)
    return [*mapped, *ctx.gather(handle)]


@shared_task(bind=True)
def echo(self: Any, value: Any = None) -> Any:
    begin(self)
    return value


@shared_task(bind=True)
def fails(self: Any, message: str) -> None:
    begin(self)
    raise ValueError(message)


@shared_task(bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0.2, max_retries=3)
def flaky(self: Any, failures: int) -> int:
    """Fail that often, then return how many retries it took."""
    begin(self)
    if self.request.retries < failures:
        raise ConnectionError(f"failure {self.request.retries + 1}")
    return int(self.request.retries)


@shared_task(bind=True, max_retries=1)
def retries_at_once(self: Any, values: list[int]) -> list[int]:
    """Ask for a retry without a delay and with other arguments."""
    begin(self)
    if self.request.retries == 0:
        raise self.retry(kwargs={"values": [*values, 2]}, countdown=0)
    return values


@shared_task(bind=True, max_retries=5)
def waits_for_its_retry(self: Any, countdown: float) -> int:
    if self.request.retries == 0:
        begin(self)
        raise self.retry(countdown=countdown)
    return begin(self)


@shared_task(bind=True)
def kills_its_process(self: Any, times: int) -> int:
    if begin(self) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(self.request.retries)


@shared_task(bind=True, acks_late=True, max_retries=2)
def kills_its_process_late(self: Any, times: int) -> int:
    """The same, with ``acks_late``."""
    if begin(self) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(self.request.retries)


@shared_task(bind=True)
def exits(self: Any) -> None:
    begin(self)
    sys.exit(3)


@shared_task(bind=True, time_limit=1)
def over_the_hard_limit(self: Any) -> None:
    begin(self)
    time.sleep(30)


@shared_task(bind=True, soft_time_limit=1)
def over_the_soft_limit(self: Any) -> None:
    begin(self)
    time.sleep(30)


@shared_task(bind=True)
def slow(self: Any, seconds: float) -> str:
    begin(self)
    time.sleep(seconds)
    note(as_child_id(self.request.id), "plain-end")
    return "done"


@shared_task(bind=True)
def ignores(self: Any) -> None:
    begin(self)
    raise Ignore("nothing to do")


@shared_task(bind=True)
def rejects(self: Any, requeue: bool) -> str:
    """Reject the first delivery."""
    if begin(self) == 1:
        raise Reject("not now", requeue=requeue)
    return "taken"


@shared_task(bind=True, ignore_result=True)
def returns_a_set(self: Any) -> Any:
    begin(self)
    return {1, 2}


@shared_task(bind=True, expires=60)
def routed(self: Any) -> str:
    """Sent to another queue by the project's ``task_routes``."""
    begin(self)
    return str(self.request.delivery_info["routing_key"])


@shared_task(typing=False)
def untyped(**kwargs: Any) -> Any:
    return sorted(kwargs)


class Hooked(Task):
    """A class-based task with hooks and a ``__call__`` of its own."""

    name = "tests.app.plain.hooked"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def run(self, value: int) -> int:
        begin(self)
        return value * 2

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        note(as_child_id(task_id), "before_start")

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(as_child_id(task_id), "on_success")


@shared_task(bind=True)
def kills_time_once(self: Any) -> str:
    """Take for ever, the first time."""
    if begin(self) == 1:
        time.sleep(300)
    return "second"


@shared_task
def applies(seconds: float) -> Any:
    """Run a durable tree in the place of this body, as a plain task may."""
    return scenarios.naps.apply((seconds,)).result
