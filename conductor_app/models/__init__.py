"""The tables: executions, runs, steps, tags, states, events, failures, who did what, places, schedules, workers."""

from django.db import router

from conductor_app.models.attempt import Attempt
from conductor_app.models.event import Event
from conductor_app.models.execution import Execution
from conductor_app.models.failed_execution import FailedExecution
from conductor_app.models.fork import CopiedOutcome, Fork
from conductor_app.models.operation import Operation, OperationItem
from conductor_app.models.paused_task import PausedTask
from conductor_app.models.place import LimitKey, Place
from conductor_app.models.published_state import PublishedState
from conductor_app.models.schedule import Schedule
from conductor_app.models.step import Step
from conductor_app.models.tag import Tag
from conductor_app.models.worker import Worker


def database() -> str:
    """Return the alias that the project's routers give to our tables; all of them live there."""
    return router.db_for_write(Execution)


__all__ = [
    "Attempt",
    "CopiedOutcome",
    "Event",
    "Execution",
    "FailedExecution",
    "Fork",
    "LimitKey",
    "Operation",
    "OperationItem",
    "PausedTask",
    "Place",
    "PublishedState",
    "Schedule",
    "Step",
    "Tag",
    "Worker",
    "database",
]
