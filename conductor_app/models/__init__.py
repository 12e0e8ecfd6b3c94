"""The three tables: executions, the steps they remember, and the executions that failed for good."""

from django.db import router

from conductor_app.models.execution import Execution
from conductor_app.models.failed_execution import FailedExecution
from conductor_app.models.step import Step


def database() -> str:
    """Return the alias that the project's routers give to our tables; all three live there."""
    return router.db_for_write(Execution)


__all__ = ["Execution", "FailedExecution", "Step", "database"]
