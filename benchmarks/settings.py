"""The project's settings, with the tasks to measure, a database of their own and a queue of their own."""

import json
import os

from project import settings as project
from project.settings import *  # noqa: F403

INSTALLED_APPS = [*project.INSTALLED_APPS, "benchmarks"]

if name := os.environ.get("CONDUCTOR_BENCHMARK_DATABASE"):
    project.DATABASES["default"]["NAME"] = name

if project.DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # A file: workers have to open it, too.
    project.DATABASES["default"]["TEST"] = {"NAME": project.VAR_DIR / "benchmark.sqlite3"}

# As docs/howto/deployment.md says.
if project.DATABASES["default"]["ENGINE"] == "django.db.backends.postgresql":
    project.DATABASES["default"]["OPTIONS"].update(server_side_binding=True, prepare_threshold=2)

# Django would keep every query in memory.
DEBUG = False

CELERY_TASK_DEFAULT_QUEUE = os.environ.get("CONDUCTOR_BENCHMARK_QUEUE", "celery-benchmark")
# A root's result is read from its execution.
CELERY_RESULT_BACKEND = None

# As quiet as the other systems: a line for each execution is not what is measured.
LOGGING = {**project.LOGGING, "loggers": {**project.LOGGING["loggers"], "conductor_app": {"level": "WARNING"}}}

CONDUCTOR = {
    **project.CONDUCTOR,
    "MAX_CHILDREN": 1_000_000,
    **json.loads(os.environ.get("CONDUCTOR_BENCHMARK_SETTINGS", "{}")),
}
