"""What the checks look at: the Celery app, and the worker that runs them, if it is one."""

from __future__ import annotations

from contextvars import ContextVar

from celery import Celery, current_app
from celery.loaders.default import Loader as DefaultLoader

TAG = "conductor"
#: The pool of the worker that runs the checks, if it is one.
worker_pool: ContextVar[str | None] = ContextVar("conductor_app_worker_pool", default=None)
#: How many bodies that worker runs at once, if it says so.
worker_concurrency: ContextVar[int | None] = ContextVar("conductor_app_worker_concurrency", default=None)


def app() -> Celery:
    """Return the current app."""
    current: Celery = current_app._get_current_object()  # type: ignore[attr-defined]
    return current


def has_app(app: Celery) -> bool:
    """Tell whether the project has an app; if not, Celery makes one up, under the name ``default``."""
    return not (app.main == "default" and isinstance(app.loader, DefaultLoader))


def pool(app: Celery) -> str:
    """Return the pool of the worker that runs the checks, or the one that the settings name."""
    return worker_pool.get() or str(app.conf.worker_pool or "prefork")
