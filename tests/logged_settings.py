"""``tests.settings``, with every line of a worker's log as ``ExecutionFilter`` completes it."""

from tests.settings import *  # noqa: F403

CELERY_WORKER_HIJACK_ROOT_LOGGER = False
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"execution": {"()": "conductor_app.logs.ExecutionFilter"}},
    "formatters": {"line": {"format": "<%(execution_id)s|%(root_id)s|%(run)s> %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "filters": ["execution"], "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}
