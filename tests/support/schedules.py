"""Tasks with a schedule, forgotten when a test has ended: every sweep of the process would look after them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import _state, current_app

from conductor_app import DurableTask
from conductor_app.models import Schedule
from conductor_app.tasks import decorator
from tests.support.bodies import durable

_numbers = itertools.count(1)


@contextmanager
def schedules() -> Iterator[Callable[..., DurableTask[..., Any]]]:
    """A function that decorates another one, or an empty one, as ``@durable_task(cron=…)`` does."""
    tasks, names = set(current_app.tasks), [dict(decorator._defined_at), dict(decorator._scheduled_at)]
    finalizers = set(_state._on_app_finalizers)

    def scheduled(fn: Any = None, cron: str | None = "0 * * * *", **options: Any) -> DurableTask[..., Any]:
        def nothing(ctx: Any) -> str | None:
            return None if ctx.scheduled_at is None else ctx.scheduled_at.isoformat()

        return durable(fn or nothing, cron=cron, **options)

    try:
        yield scheduled
    finally:
        for name in set(current_app.tasks) - tasks:
            del current_app.tasks[name]
        _state._on_app_finalizers.intersection_update(finalizers)
        for known, before in zip((decorator._defined_at, decorator._scheduled_at), names, strict=True):
            known.clear()
            known.update(before)


def row(task: DurableTask[..., Any]) -> Schedule:
    """The stored schedule of a task."""
    assert task.plan is not None
    return Schedule.objects.get(name=task.plan.name)
