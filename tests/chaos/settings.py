"""The test suite's settings, with the tasks of this package, a queue of their own, and short leases."""

import os

from tests import settings as suite
from tests.settings import *  # noqa: F403

INSTALLED_APPS = [*suite.INSTALLED_APPS, "tests.chaos"]

# With RabbitMQ, the server is not ours alone.
CELERY_TASK_DEFAULT_QUEUE = os.environ.get("CONDUCTOR_CHAOS_QUEUE", "celery-chaos")
CELERY_CONTROL_EXCHANGE = CELERY_TASK_DEFAULT_QUEUE

CONDUCTOR = {
    **suite.CONDUCTOR,
    "LEASE_SECONDS": 3,
    "HEARTBEAT_SECONDS": 1,
    "SWEEP_SECONDS": 0.5,
    "REDISPATCH_SECONDS": 2,
    "AUDIT_SECONDS": 5,
    "HAND_OFF": os.environ.get("CONDUCTOR_CHAOS_HAND_OFF") != "0",
}
