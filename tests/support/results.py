"""Result backends, switched for one test: in this process and in the workers that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from celery.backends.base import Backend
from django.conf import settings

from conductor_app.models import Execution
from conductor_app.transitions.dispatch import is_embedded
from project.celery import app
from tests.support.polling import wait_until

DISABLED = "disabled://"


class AwayBackend(Backend):
    """A result backend whose server is away."""

    def store_result(self, *_args: object, **_kwargs: object) -> None:
        raise ConnectionRefusedError("the result backend is away")

    def mark_as_failure(self, *_args: object, **_kwargs: object) -> None:
        raise ConnectionRefusedError("the result backend is away")


#: Whether results are kept in the executions' database, unless a test switches to another backend.
IN_DATABASE = settings.CELERY_RESULT_BACKEND == "django-db"


def available() -> list[str]:
    """The result backends that can be tested without another server than the broker."""
    if not IN_DATABASE:
        return [settings.CELERY_RESULT_BACKEND]
    broker = str(app.conf.broker_url)
    return ["django-db", *([broker] if broker.startswith("redis") else [])]


#: For a test that has to hold with each result backend; it takes the argument ``result_backend``.
backends = pytest.mark.parametrize("result_backend", available(), ids=lambda url: url.partition(":")[0])

#: For a test whose plain tasks are sent from this process, where ``memory://`` reaches no worker.
needs_broker = pytest.mark.skipif(is_embedded(app), reason="needs a broker server: memory:// reaches no worker")


@contextmanager
def using(url: str) -> Iterator[dict[str, str]]:
    """Store results at ``url`` in this process; the environment that it yields does so in a worker."""
    before = app.conf.result_backend
    _switch(url)
    try:
        yield {"CELERY_RESULT_BACKEND": url}
    finally:
        if url.startswith("redis"):
            keys = [app.backend.get_key_for_task(str(pk)) for pk in Execution.objects.values_list("pk", flat=True)]
            app.backend.client.delete("nothing", *keys)
        _switch(before)


def _switch(url: str) -> None:
    # Where it is in the environment, Celery takes it from there.
    if "CELERY_RESULT_BACKEND" in os.environ:
        os.environ["CELERY_RESULT_BACKEND"] = url
    # By its name in Django's settings, which Celery 5.6 looks for first.
    app.conf.changes["CELERY_RESULT_BACKEND"] = url
    app._backend_cache = None
    if hasattr(app._local, "backend"):
        del app._local.backend


def settled(timeout: float = 30) -> None:
    """Wait until every execution is final and Celery has been told of each."""
    wait_until(
        lambda: not Execution.objects.open().exists() and not Execution.objects.filter(announce_at__isnull=False),
        timeout,
        message=lambda: f"Not settled: {list(Execution.objects.values_list('task', 'status', 'announce_at'))}",
    )
