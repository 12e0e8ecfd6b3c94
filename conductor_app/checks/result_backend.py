"""The result backend."""

from __future__ import annotations

from typing import Any, cast

from celery.app.backends import by_url
from celery.backends.rpc import RPCBackend
from django.core import checks
from django.core.checks import CheckMessage

from conductor_app.checks import subject


@checks.register(subject.TAG)
def check_result_backend(**_kwargs: Any) -> list[CheckMessage]:
    """W009: there is no result backend."""
    app = subject.app()
    backend = str(app.conf.result_backend or "disabled")
    if not subject.has_app(app) or backend.partition(":")[0] != "disabled":
        return []
    return [
        checks.Warning(
            "CELERY_RESULT_BACKEND is not set: durable execution works, but AsyncResult.get() cannot.",
            hint='Use "django-db" (django-celery-results), or conductor_app.api.get_result().',
            id="conductor.W009",
        )
    ]


@checks.register(subject.TAG)
def check_result_address(**_kwargs: Any) -> list[CheckMessage]:
    """W034: a result backend that sends results to the process that asked for them."""
    app = subject.app()
    backend = str(app.conf.result_backend or "disabled")
    try:
        found: Any = cast(Any, by_url)(backend, app.loader)[0]  # its stubs are wrong
    except Exception:  # noqa: BLE001 - a backend that cannot be loaded; Celery says so when it is used
        return []
    if not subject.has_app(app) or not issubclass(found, RPCBackend):
        return []
    return [
        checks.Warning(
            f"CELERY_RESULT_BACKEND is {backend.partition(':')[0]}, which sends results to the process that called the "
            "task: that of a durable task never arrives, and AsyncResult.get() waits for ever.",
            hint='Use "django-db" (django-celery-results) or Redis, or conductor_app.api.get_result().',
            id="conductor.W034",
        )
    ]
