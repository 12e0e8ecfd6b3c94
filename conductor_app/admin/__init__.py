"""Executions, steps, events and failures in the admin: to look at and to act on, never to edit."""

from conductor_app.admin.events import EventAdmin
from conductor_app.admin.executions import ExecutionAdmin
from conductor_app.admin.failures import MESSAGE_LENGTH, FailedExecutionAdmin
from conductor_app.admin.steps import StepAdmin

__all__ = ["MESSAGE_LENGTH", "EventAdmin", "ExecutionAdmin", "FailedExecutionAdmin", "StepAdmin"]
