"""System checks ``conductor.E…`` and ``conductor.W…``; ``docs/reference/checks.md`` tells what each one is about.

Checks about settings run with every ``manage.py check``; those about running in production with ``--deploy``; the one
about tables with ``--database``. Checks about tasks look at the tasks that are loaded, which is all of them in a worker
and in ``manage.py conductor doctor``.

Celery hides the checks of Django from whoever starts a worker, so a worker that starts runs all of ours
(``report_to_worker``) and writes what they say to stderr.
"""

from __future__ import annotations

# To import a module registers its checks.
from conductor_app.checks import broker, celery_settings, database, result_backend, schema, settings, tasks  # noqa: F401
from conductor_app.checks.worker import report_to_worker

__all__ = ["report_to_worker"]
