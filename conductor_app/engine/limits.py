"""Limits of tasks: the claim of an execution that may have to wait for a place, and what follows its ends."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from celery import Task, current_app

from conductor_app import signals
from conductor_app.engine.run import RunEnded
from conductor_app.models import Execution
from conductor_app.states import FINAL_RUNS, RunOutcome
from conductor_app.store import observing
from conductor_app.store.errors import is_outage
from conductor_app.transitions import limiting
from conductor_app.values.limits import Limit, limits_of
from conductor_app.values.payloads import loads

logger = logging.getLogger("conductor_app.execution")


def claim(execution_id: uuid.UUID, owner: str, task: Task[Any, Any]) -> Execution | None:
    """Claim an execution if the limits of its task let it run; see ``transitions.claim``.

    Raises:
        RunEnded: It waits for a place now.
    """
    keys: list[tuple[Limit, str]] | Exception | None = None

    def wanted_of(execution: Execution) -> Sequence[tuple[Limit, str]]:
        nonlocal keys
        keys = _keys_of(task, execution)
        # If it is an error, the run fails by it, or puts itself off: see ``check_keys``.
        return () if isinstance(keys, Exception) else keys

    found = limiting.claim(execution_id, owner, task.name, wanted_of)
    if isinstance(found, limiting.Parked):
        raise RunEnded("parked", str(found), due_in=found.due_in)
    if found is not None:
        found.limit_keys = keys
    return found


def _keys_of(task: Any, execution: Execution) -> list[tuple[Limit, str]] | Exception:
    try:
        return task.limit_keys(*loads(execution.payload))  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001 - whatever a damaged or newer payload, or a user's function, raises
        logger.debug("The limits of %s cannot be told: %s", execution.pk, error)
        return error


def check_keys(task: object, execution: Execution) -> None:
    """Raise what is wrong with the keys of an execution that has been claimed; nobody has counted it.

    Raises:
        InvalidArgumentType, InvalidArgument: A key cannot be one. Whatever a function given as ``per`` raises.
    """
    if not limits_of(task):
        return
    if execution.limit_keys is None:  # claimed again, after an outage
        execution.limit_keys = _keys_of(task, execution)
    if isinstance(execution.limit_keys, Exception):
        raise execution.limit_keys


def _names(execution: Execution) -> list[tuple[str, str]] | None:
    """Return the limits of an execution with its keys, without a query; ``None`` if only its places tell."""
    keys = execution.limit_keys
    if keys is None and "payload" in vars(execution):
        keys = _keys_of(current_app.tasks.get(execution.task), execution)
    # What it has had, its places tell.
    return [(limit.name, key) for limit, key in keys] if isinstance(keys, list) else None


def follow(task: str) -> None:
    """Hand on the places of a task's executions when they end."""
    observing.followers[task] = _on_move


def _on_move(signal: Any, execution: Execution, **details: Any) -> None:
    if signal is signals.execution_finished:
        run_only = False
    elif signal is signals.run_ended and details["outcome"] not in (*FINAL_RUNS, RunOutcome.LOST):
        # One that is lost keeps its place until its next run: its body may be at work still.
        run_only = True
    else:
        return
    try:
        limiting.leave(execution.pk, run_only=run_only, names=_names(execution))
    except Exception as error:
        if not is_outage(error):
            raise
        logger.warning("The places of execution %s are left to a sweep: %s", execution.pk, error)
