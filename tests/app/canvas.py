"""Tasks for chains, groups, chords and callbacks, and a way to die between an outcome and its announcement.

With the directory ``CONDUCTOR_TEST_DIE_IN`` in its environment, a process kills itself at the point that is the value
of the ``pass_on`` which it runs or announces; once, since a file in that directory remembers it.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from celery import shared_task
from celery.backends.base import Backend
from celery.signals import task_success

from conductor_app import ExecutionContext, durable_task
from conductor_app.signals import execution_finished
from tests.app.ledger import count, note
from tests.app.scenarios import boom, echo

#: Where an execution of ``pass_on`` that is given one of these as its value dies, in the order in which it gets there.
POINTS = COMMITTED, CALLBACKS_SENT, RESULT_STORED, ANNOUNCED = (
    "outcome committed",
    "callbacks sent",
    "result stored",
    "announced",
)


@durable_task
def pass_on(ctx: ExecutionContext, value: Any = None) -> Any:
    """Return the value, by way of a child."""
    note(ctx, "body")
    return ctx.invoke("echo", echo, {"value": value})


@durable_task(rate_limit="20/s")
def limited(ctx: ExecutionContext, value: Any = None) -> Any:
    """As ``pass_on``, with a limit that Celery keeps."""
    note(ctx, "body")
    return ctx.invoke("echo", echo, {"value": value})


@durable_task
def add_up(ctx: ExecutionContext, numbers: list[int]) -> int:
    """Add, by way of a child."""
    note(ctx, "body")
    return int(ctx.invoke("echo", echo, {"value": sum(numbers)}))


@durable_task(max_retries=2, retry_backoff=0.05, retry_jitter=False)
def flaky_parent(ctx: ExecutionContext, value: Any) -> Any:
    """Fail on the first attempt, with a child before and one after."""
    before = ctx.invoke("before", echo, {"value": value})
    if ctx.attempt == 1:
        raise ConnectionError("the first attempt fails")
    return ctx.invoke("after", echo, {"value": before})


@durable_task(max_retries=0)
def fail_late(ctx: ExecutionContext, value: Any = None) -> None:
    """Fail by way of a child."""
    ctx.invoke("boom", boom, {"message": "card declined"})


@durable_task(max_retries=0)
def fail_until_told(ctx: ExecutionContext) -> str:
    """Fail, unless the ledger says go."""
    if not count("go"):
        raise ValueError("nobody said go")
    return "gone"


@durable_task(max_retries=0)
def wait_for_ever(ctx: ExecutionContext, value: Any = None) -> None:
    ctx.sleep("for-ever", 86_400)


@durable_task(max_retries=0)
def die(ctx: ExecutionContext, value: Any = None) -> None:
    """Take the process along."""
    os.kill(os.getpid(), signal.SIGKILL)


@durable_task
def collect(ctx: ExecutionContext, value: Any, key: str) -> Any:
    """A durable callback: note what it was called with."""
    note(ctx, key, value)
    return value


@durable_task
def collect_error(ctx: ExecutionContext, task_id: str, key: str) -> None:
    """A durable error callback."""
    note(ctx, key, task_id)


@shared_task
def plain_add(x: int, y: int) -> int:
    note(None, "plain_add")
    return x + y


@shared_task
def plain_sum(numbers: list[int]) -> int:
    note(None, "plain_sum")
    return sum(numbers)


@shared_task
def plain_collect(value: Any, key: str) -> Any:
    note(None, key, value)
    return value


@shared_task
def plain_error(task_id: str, key: str) -> None:
    note(None, key, task_id)


@shared_task
def inline_error(request: Any, exc: Any, traceback: Any) -> None:
    """An error callback in Celery's newer form: called where the failure is handled, with all there is to know."""
    note(None, "inline_error", f"{request.id} {exc}")


@shared_task
def broken_error(request: Any, exc: Any, traceback: Any) -> None:
    """The same, with a mistake."""
    raise KeyError("a mistake in the callback")


# ------------------------------------------------------------------------------------------------------------- to die


def _die_once(point: object) -> None:
    if point not in POINTS:
        return
    try:
        os.close(os.open(os.path.join(os.environ["CONDUCTOR_TEST_DIE_IN"], str(point)), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(mark_as_done: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(mark_as_done)
    def wrapped(self: Any, task_id: str, result: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.get("request")
        # Celery's tracer calls it too, after the announcement, and is told to store nothing.
        is_announced = getattr(request, "task", None) == pass_on.name and not request.ignore_result
        if is_announced and result == CALLBACKS_SENT:
            _die_once(result)
        returned = mark_as_done(self, task_id, result, *args, **kwargs)
        if is_announced and result == RESULT_STORED:
            _die_once(result)
        return returned

    return wrapped


def _on_finished(execution: Any, **_kwargs: Any) -> None:
    if execution.task == pass_on.name and execution.args == [COMMITTED]:
        _die_once(COMMITTED)


def _on_success(sender: Any, result: Any, **_kwargs: Any) -> None:
    if sender.name == pass_on.name and result == ANNOUNCED:
        _die_once(ANNOUNCED)


if "CONDUCTOR_TEST_DIE_IN" in os.environ:
    execution_finished.connect(_on_finished)
    Backend.mark_as_done = _die_in(Backend.mark_as_done)  # type: ignore[method-assign]
    task_success.connect(_on_success)
