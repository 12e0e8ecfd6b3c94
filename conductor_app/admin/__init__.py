"""Executions, steps, events, failures, operations, schedules, paused tasks in the admin: to look at and to act on."""

from conductor_app.admin.entries import register_pages
from conductor_app.admin.events import EventAdmin
from conductor_app.admin.executions import ExecutionAdmin
from conductor_app.admin.failures import MESSAGE_LENGTH, FailedExecutionAdmin
from conductor_app.admin.operation_pages import OperationAdmin
from conductor_app.admin.paused_tasks import PausedTaskAdmin
from conductor_app.admin.schedule_pages import ScheduleAdmin
from conductor_app.admin.steps import StepAdmin

__all__ = [
    "MESSAGE_LENGTH",
    "EventAdmin",
    "ExecutionAdmin",
    "FailedExecutionAdmin",
    "OperationAdmin",
    "PausedTaskAdmin",
    "ScheduleAdmin",
    "StepAdmin",
    "register_pages",
]
