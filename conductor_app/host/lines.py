"""One line in the log for each move of an execution, with the same fields on all of them."""

from __future__ import annotations

import datetime as dt
import logging
from typing import Any

from conductor_app import logs, signals
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.states import RunOutcome
from conductor_app.store import clock, observing, owners
from conductor_app.telling.words import first_line

logger = observing.logger_of_moves


def _extra(move: str, execution: Execution, since: str, *, step: str = "", error: str = "") -> dict[str, Any]:
    """Return the fields of a line.

    Args:
        since: The instant of the execution from which its ``seconds`` are counted; none if it is empty or not loaded.
    """
    known = vars(execution)
    instant = known.get(since)
    return {
        **logs.fields_of(execution),
        "step": step,
        "move": move,
        "worker": owners.shown(known.get("lease_owner") or ""),
        "seconds": round(clock.elapsed_since(instant), 3) if isinstance(instant, dt.datetime) else None,
        "error": error,
    }


def on_created(execution: Execution, **_kwargs: Any) -> None:
    """A caller or a parent has stored it."""
    logger.debug(
        "Execution %s of %s created in queue %s.",
        execution.pk,
        execution.task,
        execution.queue,
        extra=_extra("created", execution, ""),
    )


def on_started(execution: Execution, **_kwargs: Any) -> None:
    """A run begins."""
    logger.debug(
        "Execution %s of %s started: attempt %s, run %s.",
        execution.pk,
        execution.task,
        execution.attempt,
        execution.fence,
        extra=_extra("started", execution, "due_at"),
    )


def on_suspended(execution: Execution, step: str, **_kwargs: Any) -> None:
    """A run has ended to wait."""
    logger.debug(
        'Execution %s of %s suspended: it waits for step "%s".',
        execution.pk,
        execution.task,
        step,
        extra=_extra("suspended", execution, "run_started_at", step=step),
    )


def on_run_ended(execution: Execution, outcome: RunOutcome, **_kwargs: Any) -> None:
    """A worker has given it back; all other ends have a line of their own."""
    if outcome != RunOutcome.RELEASED:
        return
    logger.debug(
        "Execution %s of %s released: it is queued again, at no cost of an attempt.",
        execution.pk,
        execution.task,
        extra=_extra("released", execution, "run_started_at"),
    )


def on_lost(execution: Execution, **_kwargs: Any) -> None:
    """Its worker is dead."""
    logger.warning(
        "Execution %s of %s lost: attempt %s was run by %s, which is dead or has not renewed its lease.",
        execution.pk,
        execution.task,
        execution.attempt,
        owners.shown(execution.lease_owner),
        extra=_extra("lost", execution, "run_started_at"),
    )


def on_retrying(execution: Execution, failure: Failure, delay: float, **_kwargs: Any) -> None:
    """An attempt has failed or was lost, and another one is due."""
    logger.warning(
        "Execution %s of %s: attempt %s failed (%s: %s). Next attempt in %.3gs.",
        execution.pk,
        execution.task,
        execution.attempt,
        failure.type,
        first_line(failure.message, 500),
        delay,
        extra=_extra("retrying", execution, "run_started_at", error=failure.type),
    )


def on_redispatched(execution: Execution, **_kwargs: Any) -> None:
    """No worker has answered its message."""
    logger.info(
        "Execution %s of %s redispatched: no worker has answered its message in queue %s.",
        execution.pk,
        execution.task,
        execution.queue,
        extra=_extra("redispatched", execution, "due_at"),
    )


def on_finished(execution: Execution, status: str, failure: Failure | None = None, **_kwargs: Any) -> None:
    """It is final."""
    if not logger.isEnabledFor(logging.INFO):
        return
    logger.info(
        "Execution %s of %s %s.",
        execution.pk,
        execution.task,
        status,
        extra=_extra(str(status), execution, "created_at", error="" if failure is None else failure.type),
    )


def connect() -> None:
    """Write them from now on."""
    # These come with each run: they are not even announced where nobody wants to see them.
    observing.lines.update(
        {
            signals.execution_created: on_created,
            signals.execution_started: on_started,
            signals.execution_suspended: on_suspended,
            signals.run_ended: on_run_ended,
        }
    )
    for signal, receiver in (
        (signals.execution_lost, on_lost),
        (signals.execution_retrying, on_retrying),
        (signals.execution_redispatched, on_redispatched),
        (signals.execution_finished, on_finished),
    ):
        signal.connect(receiver, dispatch_uid="conductor_app.lines", weak=False)
