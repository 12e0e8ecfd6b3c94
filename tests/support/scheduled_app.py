"""The project's Celery app with tasks that start by themselves, for workers that a test starts."""

from __future__ import annotations

import os

from celery.signals import import_modules

from project.celery import app
from tests.support.scheduled_names import KEPT, MINUTE, NUMBER, PREFIX

__all__ = ["app"]


def kept(ctx: object) -> None:
    del ctx


def register(**_kwargs: object) -> None:
    """Register the tasks, once Django is set up."""
    from conductor_app import ExecutionContext, durable_task
    from tests.app.ledger import note

    def make(kind: str, number: int, **options: object) -> None:
        def body(ctx: ExecutionContext) -> str:
            ctx.step("begin", note, ctx.execution_id, "begin")
            ctx.sleep("a-moment", 0.05)
            ctx.atomic_step("end", note, ctx.execution_id, "end")
            assert ctx.scheduled_at is not None
            return ctx.scheduled_at.isoformat()

        body.__qualname__ = f"body_{kind}_{number}"
        durable_task(name=f"{PREFIX}.{kind}_{number}", max_retries=20, **options)(body)  # type: ignore[call-overload]

    durable_task(name=KEPT, keep=3_600)(kept)

    cron = f"{os.environ.get(MINUTE, '0')} * * * *"
    for number in range(NUMBER):
        make("all", number, cron=cron, tz="UTC", overlap="allow", catch_up="all")
        make("last", number, cron=cron, tz="UTC")
        make("none", number, cron=cron, tz="UTC", catch_up="none")
        make("turns", number, cron=cron, tz="UTC", catch_up="all")


import_modules.connect(register, weak=False)
