"""Durable child invocation for Django and Celery.

Public names are imported when they are first used, so ``import conductor_app`` works before ``django.setup()``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conductor_app.body.children import ChildHandle as ChildHandle
    from conductor_app.body.children import EventHandle as EventHandle
    from conductor_app.body.children import Handle as Handle
    from conductor_app.body.children import TimerHandle as TimerHandle
    from conductor_app.body.context import ExecutionContext as ExecutionContext
    from conductor_app.exceptions import ChildCancelled as ChildCancelled
    from conductor_app.exceptions import ChildError as ChildError
    from conductor_app.exceptions import ChildFailed as ChildFailed
    from conductor_app.exceptions import ChildTimedOut as ChildTimedOut
    from conductor_app.exceptions import ConductorError as ConductorError
    from conductor_app.exceptions import DuplicateExecution as DuplicateExecution
    from conductor_app.exceptions import EventTimedOut as EventTimedOut
    from conductor_app.exceptions import LeaseLost as LeaseLost
    from conductor_app.exceptions import LimitDeadlock as LimitDeadlock
    from conductor_app.exceptions import NoneSucceeded as NoneSucceeded
    from conductor_app.exceptions import SuspendExecution as SuspendExecution
    from conductor_app.tasks.decorator import durable_task as durable_task
    from conductor_app.tasks.task import DurableTask as DurableTask
    from conductor_app.values.limits import Limit as Limit

__version__ = "0.1.0"

_EXPORTS = {
    "ChildCancelled": "conductor_app.exceptions",
    "ChildError": "conductor_app.exceptions",
    "ChildFailed": "conductor_app.exceptions",
    "ChildHandle": "conductor_app.body.children",
    "ChildTimedOut": "conductor_app.exceptions",
    "ConductorError": "conductor_app.exceptions",
    "DuplicateExecution": "conductor_app.exceptions",
    "DurableTask": "conductor_app.tasks.task",
    "EventHandle": "conductor_app.body.children",
    "EventTimedOut": "conductor_app.exceptions",
    "ExecutionContext": "conductor_app.body.context",
    "Handle": "conductor_app.body.children",
    "LeaseLost": "conductor_app.exceptions",
    "Limit": "conductor_app.values.limits",
    "LimitDeadlock": "conductor_app.exceptions",
    "NoneSucceeded": "conductor_app.exceptions",
    "SuspendExecution": "conductor_app.exceptions",
    "TimerHandle": "conductor_app.body.children",
    "durable_task": "conductor_app.tasks.decorator",
}

__all__ = [*sorted(_EXPORTS), "__version__"]  # noqa: PLE0604 - names, each a string


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_EXPORTS[name])
    except RuntimeError as error:
        if "INSTALLED_APPS" not in str(error):
            raise
        raise _not_installed(name) from None
    return getattr(module, name)


def _not_installed(name: str) -> Exception:
    """Return what Django's own words for a model without an app mean here. (No system check could: it is not there.)"""
    from django.core.exceptions import ImproperlyConfigured  # noqa: PLC0415

    frame = sys._getframe(2)  # the module that wants the name, behind the machinery of its import
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return ImproperlyConfigured(
        f'{frame.f_globals.get("__name__")} uses conductor_app.{name}, but "conductor_app" is not in INSTALLED_APPS. '
        "Add it, then run: python manage.py migrate conductor_app (conductor.E002)"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
