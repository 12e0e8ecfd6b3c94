"""How an execution ended, in the form in which Celery is told."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from typing import Any

from celery.exceptions import TaskRevokedError
from celery.utils.serialization import get_pickleable_exception

from conductor_app.exceptions import ExecutionFailed, OutcomeLost, StepFailed
from conductor_app.models import Execution, FailedExecution, database
from conductor_app.states import ExecutionStatus
from conductor_app.values.failures import read_failure, revive

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How an execution ended, in the form in which Celery is told."""

    status: ExecutionStatus
    result: Any = None
    error: Exception | None = None
    traceback: str = ""


def outcome_of(execution: Execution) -> Outcome:
    """Return how a final execution ended, as its row says."""
    if execution.status == ExecutionStatus.CANCELLED:
        return cancelled(execution.error_message)
    if execution.status == ExecutionStatus.FAILED:
        trace = FailedExecution.objects.using(database()).filter(pk=execution.pk).values_list("traceback", flat=True)
        error = revive(read_failure(execution.error))
        if isinstance(error, StepFailed):  # its class is not known here
            error = ExecutionFailed(str(error))
        error = portable(error, execution.error_message)
        return Outcome(ExecutionStatus.FAILED, error=error, traceback=next(iter(trace), ""))
    try:
        return Outcome(ExecutionStatus.SUCCEEDED, execution.get_result())
    except OutcomeLost as lost:
        # Whoever waits is not to get something that nobody returned.
        return Outcome(ExecutionStatus.FAILED, error=lost)


def cancelled(message: str) -> Outcome:
    """Return the outcome of a cancelled execution."""
    return Outcome(ExecutionStatus.CANCELLED, error=TaskRevokedError(message))


def portable(error: BaseException, message: str) -> Exception:
    """Return what Celery is told of a body's error: it, if Celery's tracer, its pools and its backends can carry it.

    They take no ``BaseException`` for an error, and an exception whose arguments, texts or pickling misbehave would be
    lost on its way, and the outcome with it.
    """
    if isinstance(error, Exception):
        try:
            str(error), repr(error), tuple(error.args), traceback.format_exception(error)
            get_pickleable_exception(error)
        except BaseException:  # noqa: BLE001 - whatever its class makes of it
            logger.debug("Celery cannot carry %s.", type(error).__qualname__)
        else:
            return error
    return ExecutionFailed(message).with_traceback(error.__traceback__)
