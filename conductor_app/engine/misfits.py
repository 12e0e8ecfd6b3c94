"""Runs that are left to other workers, whose code takes a payload or reads an outcome that is not to be used here."""

from __future__ import annotations

import logging
import socket

from conductor_app import transitions
from conductor_app.engine.endings import cancel, come_to_end, store_end
from conductor_app.engine.run import Run, RunEnded
from conductor_app.exceptions import CancelExecution, Failure, NewerFormat, PayloadMismatch, class_path
from conductor_app.models import Execution
from conductor_app.transitions import dispatch

logger = logging.getLogger("conductor_app.execution")


def put_off_misfit(started: Run, *, is_eager: bool) -> None:
    """End a run whose body does not take its payload: leave it to a worker whose code is as old as the payload.

    Before the task's base class and hooks: what those make of arguments that they do not know is no attempt's error.
    Where there is no other worker, the attempt fails: in eager mode and in tests.

    Raises:
        RunEnded: It is put off, or it is cancelled, or another run's.
    """
    come_to_end(started, lambda: check_fit(started, is_eager))


def check_fit(started: Run, is_eager: bool) -> None:
    """Look whether the body takes its payload; a run is put off if not."""
    task, execution = started.task, started.execution
    arguments = started.arguments()
    # Damaged by hand, the attempt says what is wrong.
    misfit = "" if arguments is None else task.misfit(*arguments)  # type: ignore[attr-defined]  # DurableTask has it
    if started.newer is not None:
        misfit = f"{task.name} here ({started.newer})"
    started.misfit = misfit
    if misfit and not (is_eager or dispatch.is_inline()):
        try:
            ended = store_end(started, lambda: put_off(execution, misfit, started.hostname))
        except CancelExecution:
            cancel(started)
        if ended is not None:
            raise ended
        started.is_over = False


def leave_to_newer(started: Run, error: NewerFormat) -> None:
    """Leave a run to a newer worker that has come upon a recorded outcome which is not to be read here."""
    if started.task.request.is_eager or dispatch.is_inline():
        return
    why = f"recorded outcomes cannot all be read ({error})"
    try:
        ended = store_end(started, lambda: put_off(started.execution, "", started.hostname, why))
    except CancelExecution:
        cancel(started)
    if ended is not None:
        raise ended from None
    started.is_over = False


def put_off(execution: Execution, misfit: str, hostname: str | None, why: str = "") -> RunEnded | None:
    """Leave a claimed execution to other workers; return with what the run ends, or ``None`` if that was tried enough.

    Args:
        execution: It is put off.
        misfit: What its payload does not fit.
        hostname: This worker's name.
        why: What else is the reason.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
    """
    worker = hostname or socket.gethostname()
    reason = f"Its {why or f'payload does not fit {misfit}'} on worker {worker}."
    message = f"{reason} Is the worker as new as the code that stored it?"
    failure = Failure(type=class_path(NewerFormat if why else PayloadMismatch), message=message)
    delay = transitions.put_off(execution, failure)
    if delay is None:
        return None
    logger.warning(
        "Execution %s of %s is put off by %gs. %s",
        execution.pk,
        execution.task,
        delay,
        message,
        extra={"execution_id": str(execution.pk)},
    )
    return RunEnded("postponed", f"{why or 'its payload does not fit'}; another try is due in {delay:g}s", delay)


def payload_mismatch(misfit: str) -> PayloadMismatch:
    """Return the error of a payload that nobody could be found for."""
    return PayloadMismatch(
        f"The stored payload does not fit {misfit}. It was stored by code of another version. Deploy code that takes "
        "it, and retry the execution."
    )
