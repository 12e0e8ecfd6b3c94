"""``conductor_app``, as it is in this checkout."""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.systems.base import PARALLEL, SEQUENCE, STEPS, TRIVIAL, System


class Conductor(System):
    """Stock Celery workers with the app in their Django project."""

    def prepare(self) -> None:
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)

    def open(self) -> None:
        import django

        django.setup()
        from django.db import connection

        from benchmarks import tasks

        connection.ensure_connection()
        self._tasks: dict[str, Any] = {
            SEQUENCE: tasks.sequence,
            STEPS: tasks.steps,
            PARALLEL: tasks.parallel,
            TRIVIAL: tasks.trivial_root,
        }

    def start(self, body: str, size: int) -> None:
        self._tasks[body].delay(size)

    def work(self) -> None:
        celery_worker("project")


def celery_worker(app: str) -> None:
    """Be a stock Celery worker, in this process: a profiler follows no ``exec``."""
    from celery.__main__ import main

    pool, concurrency = os.environ["CONDUCTOR_BENCHMARK_POOL"].split(":")
    sys.argv = ["celery", "-A", app, "worker", f"--pool={pool}", f"--concurrency={concurrency}", "--loglevel=WARNING"]
    sys.argv += ["--without-mingle", "--without-gossip", f"--hostname=benchmark-{os.getpid()}@%h"]
    main()


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    Conductor().main()
