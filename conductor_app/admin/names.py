"""The names of tasks and queues that this project knows, read from Celery's registry and never from a table."""

from __future__ import annotations

import logging

from celery import Celery, current_app

from conductor_app.tasks.task import DurableTask
from conductor_app.telling.words import short_name

logger = logging.getLogger(__name__)


def known_tasks() -> list[str]:
    """Return the names of durable tasks, then those of plain ones, without Celery's own."""
    app = _app()
    names = [name for name in app.tasks if not name.startswith("celery.")]
    return sorted(names, key=lambda name: (not isinstance(app.tasks[name], DurableTask), name))


def tasks_like(text: str) -> list[str]:
    """Return the names of known tasks that begin with ``text``, in full or in their last part; and ``text``."""
    found = [name for name in known_tasks() if name.startswith(text) or short_name(name).startswith(text)]
    return list(dict.fromkeys([text, *found]))


def known_queues() -> list[str]:
    """Return the names of the queues that settings and tasks name."""
    app = _app()
    names = {str(app.conf.task_default_queue), *map(str, app.amqp.queues)}
    for task in app.tasks.values():
        routing = getattr(task, "routing", None) or {}
        names |= {str(queue) for queue in (routing.get("queue"), getattr(task, "queue", None)) if queue}
    return sorted(names)


def _app() -> Celery:
    app: Celery = current_app._get_current_object()  # type: ignore[attr-defined]
    try:
        app.loader.import_default_modules()
    except Exception:  # the project's own modules are imported
        logger.warning("Importing the tasks failed; the admin's filters may miss some.", exc_info=True)
    return app
