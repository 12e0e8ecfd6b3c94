"""Tasks of which workers of two versions have different ideas.

``CONDUCTOR_TEST_VERSION=old`` makes a process one from before the deployment. What is not set is the newer code.
"""

import os
from typing import Any

from celery import shared_task

from conductor_app import ExecutionContext, durable_task
from tests.app.ledger import note

#: The environment of a worker that was not deployed yet.
OLD = {"CONDUCTOR_TEST_VERSION": "old"}

if os.environ.get("CONDUCTOR_TEST_VERSION") == "old":

    @durable_task(max_retries=3, retry_backoff=False, default_retry_delay=0)
    def charge(ctx: ExecutionContext, order: int) -> str:
        note(ctx, "old")
        return f"{order}"

    @shared_task(max_retries=3, default_retry_delay=0)
    def send(order: int) -> str:
        note(None, "old")
        return f"{order}"
else:

    @durable_task
    def introduced(ctx: ExecutionContext, value: Any) -> Any:
        note(ctx, "new")
        return value

    @durable_task(max_retries=3, retry_backoff=False, default_retry_delay=0)
    def charge(ctx: ExecutionContext, order: int, currency: str) -> str:  # type: ignore[misc]
        note(ctx, "new")
        return f"{order} {currency}"

    @shared_task(max_retries=3, default_retry_delay=0)
    def send(order: int, currency: str) -> str:  # type: ignore[misc]
        note(None, "new")
        return f"{order} {currency}"

    @durable_task
    def order(ctx: ExecutionContext, number: int) -> list[str]:
        """Invoke both kinds of children, each with what only newer code takes."""
        payload = {"order": number, "currency": "EUR"}
        return [ctx.invoke("charge", charge, payload), ctx.invoke("send", send, payload)]
