"""The project's settings, for the test suite and for the worker processes that it starts.

``DATABASE_URL`` and ``CELERY_BROKER_URL`` choose the servers, as everywhere in the project. A worker process also gets,
in its environment, the name of the test database and the test's own ``CONDUCTOR`` keys: see ``tests.support.worker``.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from project import settings as project
from project.settings import *  # noqa: F403

INSTALLED_APPS = [*project.INSTALLED_APPS, "tests.app"]

_database = project.DATABASES["default"]
if _test_database := os.environ.get("CONDUCTOR_TEST_DATABASE_NAME"):
    # A worker process: the database that the test process has already created.
    _database["NAME"] = _test_database
elif _database["ENGINE"].endswith(".sqlite3"):
    # A file: worker processes have to open the same database, and cannot share an in-memory one.
    _directory = tempfile.mkdtemp(prefix="conductor-test-")
    atexit.register(shutil.rmtree, _directory, ignore_errors=True)
    _database["TEST"] = {**_database.get("TEST", {}), "NAME": str(Path(_directory) / "test.sqlite3")}

if os.environ.get("CONDUCTOR_TEST_PREPARED") and _database["ENGINE"].endswith(".postgresql"):
    # Not in a process that a test gives another database. As docs/howto/deployment.md recommends for PostgreSQL.
    _database["OPTIONS"].update(server_side_binding=True, prepare_threshold=2)

if _database["ENGINE"].endswith(".mysql") and "pymysql" in sys.modules:
    # Otherwise it reads the certificates of the machine for each connection, which takes 50 ms of the processor.
    _database["OPTIONS"].setdefault("ssl_disabled", True)

if _pool := os.environ.get("CONDUCTOR_TEST_POOL"):
    _database["OPTIONS"]["pool"] = json.loads(_pool)
    _database["CONN_MAX_AGE"] = 0

CONDUCTOR = {
    **getattr(project, "CONDUCTOR", {}),
    "LEASE_SECONDS": 3,
    "HEARTBEAT_SECONDS": 0.5,
    "SWEEP_SECONDS": 0.3,
    "REDISPATCH_SECONDS": 1.5,
    "AUDIT_SECONDS": 5,
    **json.loads(os.environ.get("CONDUCTOR_TEST_OVERRIDES", "{}")),
}

# Queues, keys and a control exchange of its own, so that the suite takes nothing from a broker that others use too, nor
# one of its processes from another (pytest-xdist names them; the workers that they start inherit the variable).
CELERY_TASK_DEFAULT_QUEUE = "-".join(["celery-test", *os.environ.get("PYTEST_XDIST_WORKER", "").split()])
CELERY_CONTROL_EXCHANGE = CELERY_TASK_DEFAULT_QUEUE
CELERY_TASK_ROUTES = {"tests.app.plain.routed": {"queue": f"{CELERY_TASK_DEFAULT_QUEUE}-plain"}}
if project.CELERY_BROKER_URL.startswith("redis"):
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        **getattr(project, "CELERY_BROKER_TRANSPORT_OPTIONS", {}),
        "unacked_key": f"{CELERY_TASK_DEFAULT_QUEUE}.unacked",
        "unacked_index_key": f"{CELERY_TASK_DEFAULT_QUEUE}.unacked_index",
        "unacked_mutex_key": f"{CELERY_TASK_DEFAULT_QUEUE}.unacked_mutex",
    }

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
