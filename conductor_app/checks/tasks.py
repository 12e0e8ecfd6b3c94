"""The durable tasks that are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery
from django.core import checks
from django.core.checks import CheckMessage

from conductor_app.checks import subject
from conductor_app.tasks.task import DurableTask


def durable_tasks(app: Celery) -> list[DurableTask[Any, Any]]:
    """Return the durable tasks that are loaded.

    An app that is not finalized has none: finalizing it here would be too early for whoever connects to
    ``on_after_finalize`` in a module that is imported later.
    """
    if not getattr(app, "finalized", False):
        return []
    return [task for _name, task in sorted(app.tasks.items()) if isinstance(task, DurableTask)]


def _named(tasks: Sequence[DurableTask[Any, Any]]) -> str:
    names = ", ".join(task.name for task in tasks[:3])
    return f"{names} and {len(tasks) - 3} more" if len(tasks) > 3 else names


@checks.register(subject.TAG)
def check_message_options(**_kwargs: Any) -> list[CheckMessage]:
    """W019: options about messages, which a durable task's doorbell cannot have."""
    found: list[CheckMessage] = []
    for task in durable_tasks(subject.app()):
        names = set(getattr(task, "ignored_options", ()))
        # Set behind the decorator's back: by a base class, or by CELERY_TASK_ANNOTATIONS.
        names |= {
            name
            for name in ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "track_started")
            if getattr(task, name, False)
        }
        if task.serializer != "json":
            names.add("serializer")
        if names:
            found.append(
                checks.Warning(
                    f"Task {task.name} sets {', '.join(sorted(names))}, which means nothing for a durable task: its "
                    "message only says that there is something to run and is acknowledged at once; leases bring back "
                    "what a dead worker ran.",
                    hint="Remove it from @durable_task, its base class or CELERY_TASK_ANNOTATIONS.",
                    id="conductor.W019",
                )
            )
    return found


@checks.register(subject.TAG)
def check_autoretry(**_kwargs: Any) -> list[CheckMessage]:
    """W020: Celery's own retries around a durable body."""
    return [
        checks.Warning(
            f"Task {task.name} gets autoretry_for from its base class: Celery's own retries are wrapped around the "
            "durable body, and would publish messages that nothing asked for.",
            hint="Pass autoretry_for to @durable_task, which keeps retries in the database.",
            id="conductor.W020",
        )
        for task in durable_tasks(subject.app())
        if hasattr(task, "_orig_run")
    ]


@checks.register(subject.TAG)
def check_time_limits(**_kwargs: Any) -> list[CheckMessage]:
    """W026: time limits on a pool that has none. Only a worker knows its pool, so only a worker asks."""
    app = subject.app()
    pool = subject.worker_pool.get()
    if pool not in ("threads", "solo", "gevent", "eventlet"):
        return []
    limited = [task for task in durable_tasks(app) if task.time_limit or task.soft_time_limit]
    everywhere = app.conf.task_time_limit or app.conf.task_soft_time_limit
    if not limited and not everywhere:
        return []
    what = f"the time limits of {_named(limited)}" if limited else "CELERY_TASK_TIME_LIMIT"
    return [
        checks.Warning(
            f"This worker's pool, {pool}, does not enforce {what}.",
            hint="Use --pool=prefork, or a timeout in the parent: ctx.invoke(…, timeout=30).",
            id="conductor.W026",
        )
    ]
