"""A program with durable tasks and a worker of ``celery.contrib.testing``, twice; it prints what becomes of them."""

from __future__ import annotations

import json

import django

django.setup()

from celery import shared_task  # noqa: E402
from celery.contrib.testing.worker import start_worker  # noqa: E402

from conductor_app import ExecutionContext, api, durable_task  # noqa: E402
from conductor_app.store.process import process  # noqa: E402
from project.celery import app  # noqa: E402


@shared_task(name="embedded.plain")
def plain(value: int) -> int:
    return value + 1


@durable_task(name="embedded.waits", max_retries=1, retry_backoff=False, default_retry_delay=0.1)
def waits(ctx: ExecutionContext) -> list[int]:
    child = ctx.invoke("plain", plain, {"value": 1})
    ctx.sleep("nap", 0.2)
    if ctx.attempt == 1:
        raise ValueError("again")
    return [child, ctx.attempt]


def main() -> None:
    for _ in range(2):
        with start_worker(app, perform_ping_check=False, loglevel="CRITICAL"):
            result = waits.apply_async(countdown=0.2)
            print(json.dumps(api.get_result(result, timeout=30)), flush=True)
    worker = process.worker
    state = [worker.is_draining(), type(worker.gate).__name__, worker.is_embedded]
    print(json.dumps(state), json.dumps(waits.apply().get()), flush=True)


if __name__ == "__main__":
    main()
