"""The tables: executions, the steps they remember, the events sent to them, and those that failed for good."""

from django.db import router

from conductor_app.models.event import Event
from conductor_app.models.execution import Execution
from conductor_app.models.failed_execution import FailedExecution
from conductor_app.models.step import Step


def database() -> str:
    """Return the alias that the project's routers give to our tables; all of them live there."""
    return router.db_for_write(Execution)


__all__ = ["Event", "Execution", "FailedExecution", "Step", "database"]
