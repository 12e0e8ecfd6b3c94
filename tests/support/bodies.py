"""Durable bodies that a test writes for itself, run in this process, and what became of their executions."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable
from typing import Any

from celery import current_app

from conductor_app import DurableTask, durable_task
from conductor_app.host import inline
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.store import clock

_numbers = itertools.count(1)


def durable(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """As ``@durable_task``, with a name that no other test uses."""
    if fn is not None and not fn.__name__.isidentifier():
        fn.__name__ = "body"
    if fn is None:
        return lambda decorated: durable(decorated, **options)
    return durable_task(**{"name": f"tests.bodies.{fn.__name__}_{next(_numbers)}", **options})(fn)


def redeploy(task: DurableTask[..., Any], fn: Callable[..., Any]) -> None:
    """Give ``task`` another body, as a deployment does while its executions wait."""
    task.run = fn


def run(task: DurableTask[..., Any], **kwargs: Any) -> Execution:
    """Run a whole tree, skipping over due times, and return its root."""
    return reload(task.apply(kwargs=kwargs))


def start(task: DurableTask[..., Any], **kwargs: Any) -> Execution:
    """Store an execution, and run its tree as far as it goes without waiting for due times; return its root."""
    result = task.delay(**kwargs)
    go_on()
    return reload(result)


def go_on() -> int:
    """Run all that is due, and return how many runs there were."""
    return inline.run_until_idle(current_app._get_current_object())


def reload(execution: Any) -> Execution:
    """Return an execution as it is stored now."""
    return Execution.objects.get(pk=getattr(execution, "id", execution))


def child(parent: Execution, step: str) -> Execution:
    """Return the child that stands behind a step."""
    return Execution.objects.get(parent=parent, step=step)


def failure(execution: Execution) -> FailedExecution:
    """Return why an execution failed for good."""
    return FailedExecution.objects.get(execution=execution)


def counts() -> tuple[int, int, int]:
    """How many executions, steps and failed executions are stored."""
    return Execution.objects.count(), Step.objects.count(), FailedExecution.objects.count()


def class_name(cls: type) -> str:
    """The name under which an exception class is stored."""
    return f"{cls.__module__}.{cls.__qualname__}"


def advance(seconds: float) -> int:
    """Move the clock, run all that is due then, and return how many runs there were; ``clock.reset()`` undoes it."""
    clock.shift(dt.timedelta(seconds=seconds))
    return go_on()
