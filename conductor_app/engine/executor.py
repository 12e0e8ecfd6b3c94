"""One run: from a Celery delivery to a suspension or an outcome.

``claims.take`` claims it, before Celery's tracer begins (``durable_runs``); ``run_body`` is called by the tracer in the
place of the task's body. It returns the result and raises the final error as any task does, so signals, hooks, log
lines and Sentry see each execution once, at its real end. The result backend and callbacks, chain and chord are told
by the engine (``announcements``). Every other way to end a run raises ``RunEnded``, a ``celery.exceptions.Ignore``.
"""

from __future__ import annotations

import functools
import logging
import os
import uuid
from contextlib import suppress
from typing import Any, NoReturn

from celery import Task
from django.db import DatabaseError

from conductor_app import transitions
from conductor_app.body import apart, scopes
from conductor_app.body.context import ExecutionContext
from conductor_app.body.misuse import unclean, unclean_start
from conductor_app.body.run import SWALLOWED_ADVICE, BodyRun, swallowed_suspension
from conductor_app.body.state import Teller
from conductor_app.conf import conductor_settings
from conductor_app.engine import hand_off, outcomes
from conductor_app.engine.claims import held, take
from conductor_app.engine.draining import gives_way
from conductor_app.engine.endings import (
    GoOn,
    cancel,
    come_to_end,
    end_attempt,
    fail_by,
    leave,
    release,
    report,
    store_end,
    succeed,
    suspend,
    tell_celery,
)
from conductor_app.engine.limits import check_keys
from conductor_app.engine.misfits import check_fit, leave_to_newer, payload_mismatch
from conductor_app.engine.run import Run, RunEnded
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ControlFlow,
    EndAttempt,
    Failure,
    LeaseLost,
    NewerFormat,
    ProgrammingError,
    ReleaseExecution,
    StepMismatch,
    SuspendExecution,
    class_path,
)
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from conductor_app.store import observing
from conductor_app.store.process import process
from conductor_app.store.soft_limits import soft_limit
from conductor_app.transitions import steps
from conductor_app.values.limits import limits_of

logger = logging.getLogger("conductor_app.execution")

#: So many runs in a row may miss the step that has woken them: after a deployment one does, or a few while old and new
#: workers run side by side.
MAX_RUNS_ASTRAY = 10

_DETERMINISM_ADVICE = (
    "A body has to take the same steps on each run. Put what may differ from run to run (the time, random numbers, "
    "queries) into ctx.step()."
)


def run(task: Task[Any, Any], execution_id: uuid.UUID) -> Any:
    """Claim one execution and run its body until it ends or waits; where nobody has claimed it for the tracer.

    Returns:
        The decoded result, as every replay and ``AsyncResult.get()`` see it.

    Raises:
        RunEnded: The execution is suspended, retried later, cancelled, or not ours.
        Exception: What failed the execution for good.
    """
    limit = soft_limit()
    limit.hold_back()
    try:
        execution = take(task, execution_id, task.request.hostname)
        with held(task, execution, limit, task.request.hostname) as started:
            return run_body(started)
    finally:
        limit.forget()  # the body is done, and what follows it is not the body's to fail


def run_body(started: Run) -> Any:
    """Run the body of a claimed execution until it ends or waits; for the task's ``__call__``.

    Returns:
        The decoded result.

    Raises:
        RunEnded: The execution is suspended, retried later, cancelled, or another run's.
        Exception: What failed the execution for good.
        SystemExit, KeyboardInterrupt: The process is to end.
    """
    if started.has_begun:
        # A base class calls it twice, to try again for example.
        if started.error is not None:
            raise started.error
        return started.result
    if found := started.watch.added():
        # Nothing is stored here: the transaction around the body would take it along. Whoever holds the run does.
        raise unclean_start(started.task.name, found)
    started.has_begun = True
    _keep_tracer_out(started.task.request)
    try:
        with observing.running(started.execution):
            started.result = come_to_end(started, lambda: _run_claimed(started))
    except RunEnded as ended:
        # Celery keeps the exception for a while, and with it the body's frames and all that they hold.
        started.error = ended
        raise ended.with_traceback(None) from None
    except BaseException as error:
        started.error = error
        raise
    return started.result


def _keep_tracer_out(request: Any) -> None:
    """Take from Celery's tracer what it would act on when a run returns or raises; a message of others has it."""
    request.callbacks = request.errbacks = request.chain = request.chord = None
    request.ignore_result = True


def end_by(started: Run, error: BaseException) -> None:
    """Store what a run has come to that has stored nothing itself: a failed attempt.

    Raises:
        RunEnded: There will be another attempt, or the run had lost its lease.
        Exception: What failed the execution for good.
        SystemExit, KeyboardInterrupt: The process is to end.
    """
    started.limit.hold_back()
    come_to_end(started, lambda: fail_by(started, error))


def succeed_by(started: Run, value: Any) -> None:
    """Store the result of a base class that has not called the body: its ``__call__`` has returned one.

    Raises:
        RunEnded, Exception: As ``end_by``, if that is no result.
    """
    started.limit.hold_back()
    come_to_end(started, lambda: succeed(started, value))


def _run_claimed(started: Run) -> Any:
    execution = started.execution
    if started.misfit is None:
        check_fit(started, bool(started.task.request.is_eager))
    if started.misfit:
        end_attempt(started, payload_mismatch(started.misfit))
    if limits_of(started.task):
        try:
            check_keys(started.task, started.execution)
        except Exception as error:  # noqa: BLE001 - a user's function names keys, too
            end_attempt(started, error)
    recall = _recall_first
    waited_for: str | None = None
    teller = Teller()
    while True:
        if gives_way():
            release(started)
        try:
            memory = recall(execution)
        except NewerFormat as error:  # a kind of step that this version does not know
            leave_to_newer(started, error)
            end_attempt(started, error)
        recall = _recall
        woken_by = waited_for or steps.woken_by(execution, memory)
        context = ExecutionContext(
            execution,
            memory,
            started.lease,
            started.task,
            teller=teller,
            draining=gives_way,
            end_stuck=functools.partial(_end_stuck, started),
        )
        try:
            result = _call_body(started, context, woken_by)
        except GoOn:
            waited_for = context.suspension[0].step if context.suspension else None
            continue  # the awaited step was decided while the body unwound
        except EndAttempt as ended:
            if isinstance(ended.error, NewerFormat):
                leave_to_newer(started, ended.error)
            # With the traceback through the body, which tells the call.
            end_attempt(started, ended.error.with_traceback(ended.__traceback__))
        return result


def _known(execution: Execution) -> dict[str, steps.Memory] | None:
    """Return what an execution remembers, if this process or its claim knows it already."""
    rows, execution.claimed_steps = execution.claimed_steps, None
    if rows is not None:
        return steps.memory_of(rows)
    delivery = hand_off.delivery_of(execution.pk)
    return None if delivery is None else delivery.recall(execution)


def _recall_first(execution: Execution) -> dict[str, steps.Memory]:
    """Return what an execution remembers when its run begins."""
    # A first run has nothing to remember, so it does not ask; except that of a fork.
    if execution.fence == 1 and not execution.is_fork:
        return {}
    known = _known(execution)
    return _recall(execution) if known is None else known


def _recall(execution: Execution) -> dict[str, steps.Memory]:
    return transitions.patiently(lambda: steps.recall(execution.pk))


def _call_body(started: Run, context: ExecutionContext, woken_by: str | None) -> Any:
    """Run the body once and carry out what it asks for.

    Args:
        woken_by: The step to which it has to come again.
    """
    execution, limit = started.execution, started.limit
    task: Any = started.task  # a DurableTask
    value: Any = None
    error: BaseException | None = None
    try:
        with context.entered():
            args, kwargs = task.body_arguments(*started.take_arguments())
            try:
                limit.let_through()
                value = apart.run(scopes.call_body, task, context, args, kwargs)
            finally:
                limit.hold_back()
    except BaseException as raised:  # noqa: BLE001 - the body may raise anything
        limit.hold_back()
        error = raised
    if context._is_forked:
        _end_fork(started, error)
    found = context._left_open(error)
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        leave(started, error)
    context._tell_last()
    if context.ending is not None and not isinstance(error, (ControlFlow, LeaseLost)):
        how = "returned" if error is None else f"raised {type(error).__name__}"
        _report_swallowed_end(context.ending, execution, how)
        error = context.ending
    if isinstance(error, CancelExecution):
        cancel(started)
    if isinstance(error, ReleaseExecution):
        release(started)
    if isinstance(error, (AbandonRun, EndAttempt, LeaseLost)):
        raise error
    if found and (error is None or isinstance(error, SuspendExecution)):
        end_attempt(started, unclean(execution.task, found))
    if context.suspension is not None:
        if not isinstance(error, SuspendExecution):
            _report_swallowed(context, execution, "returned" if error is None else f"raised {type(error).__name__}")
        _check_way(started, context, woken_by)
        suspend(started, context)
    if error is not None:
        if found:
            _note(error, f"It left {' and '.join(found)}, which was rolled back.")
        end_attempt(started, error)
    _check_way(started, context, woken_by)
    return succeed(started, value)


def _check_way(started: Run, context: ExecutionContext, woken_by: str | None) -> None:
    """Tell of a run that has not come to the step that had woken it, before what it has come to is stored.

    Such a run is right after a deployment that adds or removes steps. A body that is not deterministic may open a new
    step in each run, for ever.
    """
    if woken_by is None or context._has_come_to(woken_by):
        return
    execution = started.execution
    came_to = context.suspension[0].step if context.suspension else None
    before = execution.astray or {}
    runs = before.get("runs", 0) + 1 if before.get("fence") in (execution.fence, execution.fence - 1) else 1
    instead = "returned" if came_to is None else f'came to step "{came_to}"'
    message = f'{execution.task} was woken by step "{woken_by}", and {instead} without coming to that step again.'
    if conductor_settings().STRICT_REPLAY or runs >= MAX_RUNS_ASTRAY:
        if runs > 1:
            message = f"{message} So it was {runs} times in a row."
        end_attempt(started, StepMismatch(f"{message} {_DETERMINISM_ADVICE}"))
    logger.warning(
        "%s That is right if a deployment has added or removed steps. If not: %s",
        message,
        _DETERMINISM_ADVICE,
        extra={"execution_id": str(execution.pk)},
    )
    with suppress(DatabaseError):  # the run's own write says what is wrong
        transitions.note_astray(
            execution, {"woken_by": woken_by, "came_to": came_to, "fence": execution.fence, "runs": runs}
        )


def _note(error: BaseException, text: str) -> None:
    logger.warning("A body has raised %s. %s", type(error).__name__, text)
    with suppress(Exception):  # the class is the user's
        error.add_note(text)


def _report_swallowed(context: ExecutionContext, execution: Execution, how: str) -> None:
    logger.error(
        "%s. It is suspended all the same. %s",
        swallowed_suspension(context, execution.task, how),
        SWALLOWED_ADVICE,
        extra={"execution_id": str(execution.pk)},
    )


def _report_swallowed_end(why: ControlFlow, execution: Execution, how: str) -> None:
    logger.error(
        "%s swallowed %s and %s. Its run ends all the same. Use `except Exception`, or re-raise it.",
        execution.task,
        type(why).__name__,
        how,
        extra={"execution_id": str(execution.pk)},
    )


def _end_fork(started: Run, error: BaseException | None) -> NoReturn:
    """End a process that the body has forked, when it comes to the body's end: the run goes on in the other one."""
    if isinstance(error, SystemExit):
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    what = "came to the end of a body, and ends here. End it in the body, with os._exit()"
    if error is None:
        logger.error("A process that %s has forked %s.", started.task.name, what)
    else:
        report(started.execution, f"has forked a process that {what}", error)
    os._exit(1)


def _end_stuck(started: Run, context: BodyRun, what: str) -> None:
    """End a body that swallows its end again and again: nothing that is raised in it would.

    In a pool of processes, by the end of its process. A thread cannot be ended; the execution stays as it is then, so
    that nobody runs it a second time beside this one.
    """
    execution, extra = started.execution, {"execution_id": str(started.execution.pk)}
    if not process.worker.gate.is_own_process:
        logger.critical(
            "%s. In this pool it cannot be ended: it holds a slot until it returns or the worker is restarted. %s",
            what,
            SWALLOWED_ADVICE,
            extra=extra,
        )
        return
    started.limit.hold_back()
    logger.critical("%s. Its process ends, and is replaced. %s", what, SWALLOWED_ADVICE, extra=extra)
    try:
        context._left_open()
        _store_stuck(started, context, f"{what}. {SWALLOWED_ADVICE}")
    except BaseException as error:  # noqa: BLE001 - whatever it is, the process ends, and others see what is left
        if not isinstance(error, RunEnded):
            report(execution, "could not end as it was to", error)
    finally:
        os._exit(1)


def _store_stuck(started: Run, context: BodyRun, message: str) -> None:
    execution = started.execution
    if isinstance(context.ending, ReleaseExecution):
        release(started)
    if isinstance(context.ending, AbandonRun):
        return
    failure = Failure(type=class_path(ProgrammingError), message=message)
    try:
        # Handed off to nobody: this process does not go on.
        store_end(started, lambda: transitions.fail(execution, failure))
    except CancelExecution:
        cancel(started)
    tell_celery(started, outcomes.Outcome(ExecutionStatus.FAILED, error=ProgrammingError(message)))
