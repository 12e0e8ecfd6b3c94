"""One run: from a Celery delivery to a suspension or an outcome.

``take`` claims it, before Celery's tracer begins (``durable_runs``); ``run_body`` is called by the tracer in the place
of the task's body. It returns the result and raises the final error as any task does, so signals, hooks, log lines and
Sentry see each execution once, at its real end. The result backend and callbacks, chain and chord are told here
(``announcements``). Every other way to end a run raises ``RunEnded``, a ``celery.exceptions.Ignore``.

Whatever ends a run, something is stored of it while its lease is held: what the tracer raises around the body, a
``BaseException``, an error in a run's own last write (``end_by``).
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

from celery import Task
from celery.exceptions import Ignore, WorkerShutdown, WorkerTerminate
from django.db import DatabaseError, IntegrityError, InterfaceError, connections

from conductor_app import transitions
from conductor_app.body import apart, left_open, scopes
from conductor_app.body.context import ExecutionContext
from conductor_app.body.misuse import as_misuse, unclean, unclean_start
from conductor_app.body.run import SWALLOWED_ADVICE, BodyRun, swallowed_suspension
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, hand_off, outcomes
from conductor_app.engine.process import process
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ChildError,
    ControlFlow,
    EndAttempt,
    EventTimedOut,
    Failure,
    LeaseLost,
    NewerFormat,
    NotSerializable,
    OutcomeLost,
    PayloadMismatch,
    PayloadTooLarge,
    ProgrammingError,
    ReleaseExecution,
    RetryExecution,
    StepMismatch,
    SuspendExecution,
    UncleanConnection,
    WorkerLost,
    class_path,
)
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import observing, owners
from conductor_app.store.soft_limits import SoftLimit, soft_limit
from conductor_app.store.sql import is_outage, is_read_only, name_outage, raising_read_only
from conductor_app.transitions import dispatch, steps
from conductor_app.transitions.leases import Lease, keeper
from conductor_app.values.retries import RetryPolicy
from conductor_app.values.serialization import describe, dumps, loads

T = TypeVar("T")

logger = logging.getLogger("conductor_app.execution")

#: So many claims in a row may fail in a process whose database answers other connections; then the process ends.
MAX_FAILED_CLAIMS = 3

#: So many runs in a row may miss the step that has woken them: after a deployment one does, or a few while old and new
#: workers run side by side.
MAX_RUNS_ASTRAY = 10

_DETERMINISM_ADVICE = (
    "A body has to take the same steps on each run. Put what may differ from run to run (the time, random numbers, "
    "queries) into ctx.step()."
)

#: Told by the worker: whether this worker shuts down.
is_draining: Callable[[], bool] = lambda: False  # noqa: E731


class RunEnded(Ignore):
    """A run has ended without a final outcome; Celery acknowledges the message and records nothing.

    It travels from the pool process to the worker's main process, which words the event and knows when to sweep next.

    Args:
        what: ``suspended``, ``retrying``, ``cancelled``, ``released``, ``postponed``, ``dropped`` or ``abandoned``.
        detail: The rest of the log line.
        due_in: Seconds until the sweeper has something to do for this execution, if that is known.
        step: The awaited step of a suspension.
    """

    def __init__(self, what: str, detail: str = "", due_in: float | None = None, step: str = "") -> None:
        super().__init__(what, detail, due_in, step)
        self.what = what
        self.detail = detail
        self.due_in = due_in
        self.step = step

    def __str__(self) -> str:
        return f"{self.what}{': ' if self.detail else ''}{self.detail}"

    def __repr__(self) -> str:
        return f"<run {self}>"

    def event(self) -> tuple[str, dict[str, Any]] | None:
        """Return the type and the fields of the event by which Celery's monitors hear of it; ``None`` if of none."""
        if self.what == "suspended":
            return "task-suspended", {"step": self.step}
        if self.what == "retrying":
            return "task-retried", {"exception": self.detail, "traceback": ""}
        if self.what == "cancelled":
            return "task-revoked", {"terminated": False, "signum": None, "expired": False}
        return None

    @staticmethod
    def describe(shown: str) -> str:
        """Return what ``repr()`` of a ``RunEnded`` says, or an empty string for another exception's."""
        return shown[5:-1] if shown.startswith("<run ") and shown.endswith(">") else ""


class Run:
    """A claimed execution in this process's hands, until it is stored what has become of it."""

    def __init__(
        self, task: Task[Any, Any], execution: Execution, lease: Lease, limit: SoftLimit, hostname: str | None
    ) -> None:
        self.task = task
        self.execution = execution
        self.lease = lease
        self.limit = limit
        self.hostname = hostname
        #: Whether the task's body, or what is in its place, has been called.
        self.has_begun = False
        #: Whether nothing is left to be stored: it is, or it is another run's.
        self.is_over = False
        #: How it ended, if the body was called: the result, or what was raised.
        self.result: Any = None
        self.error: BaseException | None = None
        #: What is open when it begins is not its own: a caller's, in eager mode and in tests.
        self.watch = left_open.Watch()
        #: How its arguments do not fit its body, if that was looked at; an empty text if they do.
        self.misfit: str | None = None
        #: Whether the body has told the result backend itself how it stands, by ``update_state``.
        self.reports_state = False
        self._arguments: tuple[list[Any], dict[str, Any]] | None = None
        #: Why the arguments are another worker's to read.
        self.newer: NewerFormat | None = None

    def arguments(self) -> tuple[list[Any], dict[str, Any]] | None:
        """Return the row's arguments for a look; the first call of the body gets the same.

        ``None`` if they cannot be read: that is the body's error.
        """
        if self._arguments is None:
            try:
                self._arguments = loads(self.execution.payload)
            except NewerFormat as error:
                self.newer = error
            except Exception:
                logger.debug("The payload of %s cannot be read.", self.execution.pk, exc_info=True)
        return self._arguments

    def take_arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the row's arguments for one call of the body, which may change them."""
        given, self._arguments = self._arguments, None
        return loads(self.execution.payload) if given is None else given


#: The run that is at work in this thread.
current_run: ContextVar[Run | None] = ContextVar("conductor_app_run", default=None)


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


def take(task: Task[Any, Any], execution_id: uuid.UUID, hostname: str | None) -> Execution:
    """Claim the execution that a delivery is about.

    Raises:
        RunEnded: There is nothing to run.
    """
    global _failed_claims  # noqa: PLW0603
    delivery = _delivery_of(execution_id)
    try:
        execution = None if delivery is None else delivery.take(execution_id)
        if execution is None:
            execution = claim(execution_id, owners.lease_owner(hostname), task.name)
        if execution is not None and keeper.holds(execution_id, execution.fence):
            # The database has crashed and forgotten the claim of another thread's run, which is still at it and could
            # write what this one may. The next fence tells them apart.
            execution = transitions.claim_again(execution_id, execution.lease_owner, task.name)
        is_known = execution is not None or Execution.objects.using(database()).filter(pk=execution_id).exists()
    except (DatabaseError, InterfaceError) as error:
        raise not_claimed(execution_id, error) from None
    _failed_claims = 0
    if not is_known:
        raise RunEnded(
            "dropped",
            "this database has no such execution: it was deleted, or what published the message uses another database",
        )
    if execution is None:
        raise RunEnded("dropped", "not queued, not due, or another run has it")
    return execution


_failed_claims = 0


def not_claimed(execution_id: uuid.UUID, error: Exception) -> RunEnded:
    """Return how a delivery ends whose claim has failed on a new connection, too; the row is queued.

    Raises:
        SystemExit: The database answers others, and not this process of a pool: another one is to take its place.
    """
    global _failed_claims  # noqa: PLW0603
    if is_outage(error) or not _answers_others():
        # Nothing was claimed, the row is queued: the sweeper rings again.
        logger.warning("Execution %s was not claimed, %s: %s", execution_id, name_outage(error), error)
        return RunEnded("abandoned", name_outage(error))
    _failed_claims += 1
    logger.error(
        "Execution %s was not claimed (%s), though the database answers other connections. This one is thrown away.",
        execution_id,
        error,
    )
    if not connections[database()].in_atomic_block:
        del connections[database()]
    if hand_off.gate.is_own_process and _failed_claims >= MAX_FAILED_CLAIMS:
        logger.critical("%d claims in a row have failed in this process. It ends, and is replaced.", _failed_claims)
        raise SystemExit(1)
    return RunEnded("abandoned", "this process cannot use its connection to the database")


def _answers_others() -> bool:
    """Tell whether the database answers a connection that has nothing to do with this thread's."""
    try:
        fresh = connections.create_connection(database())
        try:
            with fresh.cursor() as cursor:
                cursor.execute("SELECT 1")
        finally:
            fresh.close()
    except Exception:  # noqa: BLE001 - whatever the driver raises
        return False
    return True


@contextmanager
def held(task: Task[Any, Any], execution: Execution, limit: SoftLimit, hostname: str | None) -> Iterator[Run]:
    """Hold a claimed execution's lease, and make its run the current one."""
    with keeper.hold(execution, _on_loss(execution)) as lease:
        started = Run(task, execution, lease, limit, hostname)
        token = current_run.set(started)
        try:
            yield started
        finally:
            current_run.reset(token)


def _on_loss(execution: Execution) -> Callable[[], None]:
    delivery = _delivery_of(execution.pk)
    return functools.partial(resume_unsuspended, () if delivery is None else tuple(delivery.suspended))


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
            started.result = _ended(started, lambda: _run_claimed(started))
    except RunEnded as ended:
        # Celery keeps the exception for a while, and with it the body's frames and all that they hold.
        started.error = ended
        raise ended.with_traceback(None) from None
    except BaseException as error:
        started.error = error
        raise
    return started.result


def end_by(started: Run, error: BaseException) -> None:
    """Store what a run has come to that has stored nothing itself: a failed attempt.

    Raises:
        RunEnded: There will be another attempt, or the run had lost its lease.
        Exception: What failed the execution for good.
        SystemExit, KeyboardInterrupt: The process is to end.
    """
    started.limit.hold_back()
    _ended(started, lambda: _fail_by(started, error))


def succeed_by(started: Run, value: Any) -> None:
    """Store the result of a base class that has not called the body: its ``__call__`` has returned one.

    Raises:
        RunEnded, Exception: As ``end_by``, if that is no result.
    """
    started.limit.hold_back()
    _ended(started, lambda: _succeed(started, value))


def _ended(started: Run, act: Callable[[], T]) -> T:
    """Let a run come to its end, which is stored whatever happens on the way."""
    try:
        try:
            return act()
        except (RunEnded, AbandonRun, LeaseLost):
            raise
        except BaseException as error:
            if started.is_over:
                raise
            # One of the run's own writes, most often. What stood in its way must not stand in the next one's.
            started.limit.hold_back()
            report(started.execution, "could not end as it was to", error)
            left_open.discard(database())
            _fail_by(started, error)
    except AbandonRun as error:
        started.is_over = True
        logger.error("Run of execution %s is abandoned: %s", started.execution.pk, error)
        raise RunEnded("abandoned", str(error)) from None
    except LeaseLost as error:
        started.is_over = True
        logger.warning("%s", error, extra={"execution_id": str(started.execution.pk)})
        started.lease.on_loss()
        raise RunEnded("dropped", "its lease is lost") from None
    except DatabaseError as error:
        if started.is_over:
            raise
        # Not even the failure can be stored. Nothing else is left to try.
        started.is_over = True
        logger.critical("What became of execution %s cannot be stored: %s", started.execution.pk, error)
        _lose_unstorable(started, error)


def resume_unsuspended(parents: Sequence[Execution]) -> None:
    """Queue what waits for an execution that is lost, if that does not wait, either: the database has crashed.

    A suspension that this process goes on with does not wait for the disk. Undone, the row says that this process still
    runs the parent, and at the end of the lease the sweeper would take that for a death and an attempt.

    Args:
        parents: Each waited for the next one, and the last one for what is lost. Of those that the database remembers,
            the innermost is the one that it takes to be running.
    """
    for parent in reversed(parents):
        with suppress(LeaseLost, AbandonRun, DatabaseError):
            transitions.release(parent)
            logger.warning("Execution %s runs again: the database has forgotten its suspension.", parent.pk)
            return


def claim(execution_id: uuid.UUID, owner: str, task: str, attempt: int | None = None) -> Execution | None:
    """Claim an execution; see ``transitions.claim``.

    Raises:
        DatabaseError: The database is away. If its COMMIT was made all the same, the lease ends unused.
    """
    keeper.watch()
    with suppress(DatabaseError, InterfaceError):
        return transitions.claim(execution_id, owner, task, attempt)
    # A kept connection may not have outlived the pause between two runs, or a body has left its session in a state in
    # which nothing can be claimed.
    left_open.discard(database())
    execution = transitions.claim(execution_id, owner, task, attempt)
    if execution is None and not keeper.holds(execution_id):
        execution = transitions.claim_again(execution_id, owner, task)
    return execution


def _run_claimed(started: Run) -> Any:
    execution = started.execution
    if started.misfit is None:
        _put_off_misfit(started, bool(started.task.request.is_eager))
    if started.misfit:
        _end_attempt(started, payload_mismatch(started.misfit))
    # A first run has nothing to remember, so it does not ask.
    known: dict[str, steps.Memory] | None = {} if execution.fence == 1 else _known(execution)
    waited_for: str | None = None
    while True:
        if _gives_way():
            _release(started)
        memory = _recall(execution) if known is None else known
        known = None
        woken_by = waited_for or steps.woken_by(execution, memory)
        context = ExecutionContext(
            execution,
            memory,
            started.lease,
            started.task,
            draining=_gives_way,
            end_stuck=functools.partial(_end_stuck, started),
        )
        try:
            result = _call_body(started, context, woken_by)
        except _GoOn:
            waited_for = context.suspension[0].step if context.suspension else None
            continue  # the awaited step was decided while the body unwound
        except EndAttempt as ended:
            if isinstance(ended.error, NewerFormat):
                _leave_to_newer(started, ended.error)
            # With the traceback through the body, which tells the call.
            _end_attempt(started, ended.error.with_traceback(ended.__traceback__))
        return result


def put_off_misfit(started: Run, *, is_eager: bool) -> None:
    """End a run whose body does not take its payload: leave it to a worker whose code is as old as the payload.

    Before the task's base class and hooks: what those make of arguments that they do not know is no attempt's error.
    Where there is no other worker, the attempt fails: in eager mode and in tests.

    Raises:
        RunEnded: It is put off, or it is cancelled, or another run's.
    """
    _ended(started, lambda: _put_off_misfit(started, is_eager))


def _put_off_misfit(started: Run, is_eager: bool) -> None:
    task, execution = started.task, started.execution
    arguments = started.arguments()
    # Damaged by hand, the attempt says what is wrong.
    misfit = "" if arguments is None else task.misfit(*arguments)  # type: ignore[attr-defined]  # DurableTask has it
    if started.newer is not None:
        misfit = f"{task.name} here ({started.newer})"
    started.misfit = misfit
    if misfit and not (is_eager or dispatch.is_inline()):
        try:
            ended = _store(started, lambda: put_off(execution, misfit, started.hostname))
        except CancelExecution:
            _cancel(started)
        if ended is not None:
            raise ended
        started.is_over = False


def _leave_to_newer(started: Run, error: NewerFormat) -> None:
    """Leave a run to a newer worker that has come upon a recorded outcome which is not to be read here."""
    if started.task.request.is_eager or dispatch.is_inline():
        return
    why = f"recorded outcomes cannot all be read ({error})"
    try:
        ended = _store(started, lambda: put_off(started.execution, "", started.hostname, why))
    except CancelExecution:
        _cancel(started)
    if ended is not None:
        raise ended from None
    started.is_over = False


def payload_mismatch(misfit: str) -> PayloadMismatch:
    """Return the error of a payload that nobody could be found for."""
    return PayloadMismatch(
        f"The stored payload does not fit {misfit}. It was stored by code of another version. Deploy code that takes "
        "it, and retry the execution."
    )


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


def _gives_way() -> bool:
    """Tell whether runs are given back now; not those of eager mode, which nobody else takes."""
    return is_draining() and not dispatch.is_inline()


class _GoOn(Exception):
    """The body can be run again at once."""


def _delivery_of(execution_id: uuid.UUID) -> hand_off.Delivery | None:
    """Return the delivery that this run belongs to; none for one in eager mode, inside another body for example."""
    delivery = hand_off.current.get()
    return delivery if delivery is not None and delivery.running == execution_id else None


def _known(execution: Execution) -> dict[str, steps.Memory] | None:
    """Return what an execution remembers, if this process or its claim knows it already."""
    rows, execution.claimed_steps = execution.claimed_steps, None
    if rows is not None:
        return steps.memory_of(rows)
    delivery = _delivery_of(execution.pk)
    return None if delivery is None else delivery.recall(execution)


@contextmanager
def _handing_off(execution: Execution) -> Iterator[transitions.HandOff | None]:
    """Let the last transition of a run, which gets what this yields, claim what this process runs next."""
    delivery = _delivery_of(execution.pk)
    if delivery is None:
        yield None
        return
    offer = delivery.offer(execution)
    try:
        yield offer
    finally:
        delivery.claimed = offer.claimed or _claimed_unheard(offer.wanted, execution.lease_owner)


def _claimed_unheard(wanted: Execution | None, owner: str) -> Execution | None:
    """Take up a claim whose COMMIT got no answer, if it was made."""
    if wanted is None or keeper.holds(wanted.pk):
        return None
    try:
        left_open.discard(database())
        return transitions.claim_again(wanted.pk, owner, wanted.task)
    except DatabaseError as error:
        logger.warning("Execution %s may be left to its lease, %s: %s", wanted.pk, name_outage(error), error)
        return None


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
        _leave(started, error)
    if context.ending is not None and not isinstance(error, (ControlFlow, LeaseLost)):
        how = "returned" if error is None else f"raised {type(error).__name__}"
        _report_swallowed_end(context.ending, execution, how)
        error = context.ending
    if isinstance(error, CancelExecution):
        _cancel(started)
    if isinstance(error, ReleaseExecution):
        _release(started)
    if isinstance(error, (AbandonRun, EndAttempt, LeaseLost)):
        raise error
    if found and (error is None or isinstance(error, SuspendExecution)):
        _end_attempt(started, unclean(execution.task, found))
    if context.suspension is not None:
        if not isinstance(error, SuspendExecution):
            _report_swallowed(context, execution, "returned" if error is None else f"raised {type(error).__name__}")
        _check_way(started, context, woken_by)
        _suspend(started, context)
    if error is not None:
        if found:
            _note(error, f"It left {' and '.join(found)}, which was rolled back.")
        _end_attempt(started, error)
    _check_way(started, context, woken_by)
    return _succeed(started, value)


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
        _end_attempt(started, StepMismatch(f"{message} {_DETERMINISM_ADVICE}"))
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
    if not hand_off.gate.is_own_process:
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
        _release(started)
    if isinstance(context.ending, AbandonRun):
        return
    failure = Failure(type=class_path(ProgrammingError), message=message)
    try:
        # Handed off to nobody: this process does not go on.
        _store(started, lambda: transitions.fail(execution, failure))
    except CancelExecution:
        _cancel(started)
    _tell_celery(started, outcomes.Outcome(ExecutionStatus.FAILED, error=ProgrammingError(message)))


def _note(error: BaseException, text: str) -> None:
    logger.warning("A body has raised %s. %s", type(error).__name__, text)
    with suppress(Exception):  # the class is the user's
        error.add_note(text)


def _leave(started: Run, error: SystemExit | KeyboardInterrupt) -> NoReturn:
    """End the run of a body that was to end its process, and let the exception pass where there is one to end."""
    if is_ending(error):
        _store(started, lambda: transitions.release(started.execution))
        raise error
    if process.is_told_to_end():
        # A revoke, or the hard time limit: the worker's main process knows why, and what becomes of the execution.
        started.is_over = True
        raise error
    try:
        _end_attempt(started, error)
    except Exception:
        if started.is_over and hand_off.gate.is_own_process:
            raise error from None
        raise


def report(execution: Execution, what: str, error: BaseException) -> None:
    """Log an error with its traceback, whatever its class makes of that."""
    failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
    logger.error(
        "Execution %s %s: %s: %s",
        execution.pk,
        what,
        failure.type,
        failure.message,
        exc_info=outcomes.portable(error, failure.message),
        extra={"execution_id": str(execution.pk)},
    )


def _fail_by(started: Run, error: BaseException) -> NoReturn:
    """End a run whose body has not raised this, or cannot be asked."""
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        _leave(started, error)
    _end_attempt(started, error)


def is_ending(error: BaseException) -> bool:
    """Tell whether this is how a worker ends that shuts down."""
    return is_draining() or isinstance(error, (WorkerShutdown, WorkerTerminate))


def _store(started: Run, write: Callable[[], T], *, reads_only: list[str] | None = None) -> T:
    """Carry out the write that ends a run; on a new connection if the body's session does not take it.

    Args:
        reads_only: Gets what the body left, if that is why.

    Raises:
        UncleanConnection: The body left a read-only session; only with ``reads_only``.
    """
    try:
        with raising_read_only(reads_only is not None):
            done = write()
    except (DatabaseError, InterfaceError) as error:
        if isinstance(error, IntegrityError) or connections[database()].in_atomic_block:
            raise
        only_reads = is_read_only(error)
    else:
        started.is_over = True
        return done
    # Not before: the error keeps its cursor, and SQLite the transaction of a statement as long as that.
    left_open.discard(database())
    if reads_only is not None and only_reads and not left_open.is_server_read_only(database()):
        reads_only.append(f'{left_open.READ_ONLY} on the connection "{database()}"')
        raise unclean(started.execution.task, reads_only)
    done = write()
    started.is_over = True
    return done


def _succeed(started: Run, value: Any) -> Any:
    execution = started.execution
    try:
        text = dumps(value, f"result of {execution.task}", conductor_settings().MAX_RESULT_BYTES)
    except (NotSerializable, PayloadTooLarge) as error:
        _end_attempt(started, error)
    cancelled: Failure | None = None

    def write() -> None:
        nonlocal cancelled
        try:
            transitions.succeed(execution, text, offer)
        except CancelExecution:
            cancelled = transitions.cancel_running(execution, offer, result=text)

    try:
        with _handing_off(execution) as offer:
            _store(started, write, reads_only=[])
    except UncleanConnection as error:
        _end_attempt(started, error)
    if cancelled is not None:
        _end_cancelled(started, cancelled, "its body had returned a result, which a retry adopts")
    if delivery := _delivery_of(execution.pk):
        delivery.settle(execution, text)
        delivery.suspended.clear()
    result = loads(text)
    _tell_celery(started, outcomes.Outcome(ExecutionStatus.SUCCEEDED, result))
    return result


def _suspend(started: Run, context: ExecutionContext) -> NoReturn:
    assert context.suspension is not None
    execution = started.execution
    wait, _place = context.suspension
    try:
        with _handing_off(execution) as offer:
            suspended = _store(
                started,
                lambda: transitions.suspend(execution, wait, _state_writer(started, wait), offer),
                reads_only=[],
            )
    except CancelExecution:
        _cancel(started)
    except OutcomeLost as lost:
        raise EndAttempt(lost) from None
    except UncleanConnection as error:
        _end_attempt(started, error)
    if not suspended:
        started.is_over = False
        raise _GoOn
    if (delivery := _delivery_of(execution.pk)) and isinstance(wait, transitions.Invocation):
        delivery.keep(execution, wait, context.memory)
        if delivery.claimed is not None:
            delivery.suspended.append(execution)
    due_in = getattr(wait, "timeout", None) or getattr(wait, "seconds", None)
    detail = f"waiting for step {wait.step!r}"
    if isinstance(wait, transitions.Invocation):
        detail += f" ({wait.child.task} {wait.child.id})"
    elif isinstance(wait, transitions.Map):
        detail += f" ({len(wait.children)} of {wait.task})"
    elif isinstance(wait, transitions.AwaitEvent):
        detail += f" (event {wait.event!r})"
    raise RunEnded("suspended", detail, due_in, wait.step) from None


def _release(started: Run) -> NoReturn:
    """Give an execution back: whatever its body did after it was told so, it is run again from what is recorded."""
    _store(started, lambda: transitions.release(started.execution))
    raise RunEnded("released", "the worker shuts down") from None


def _cancel(started: Run, detail: str = "") -> NoReturn:
    """End an execution that is to be cancelled.

    Args:
        detail: What the log is to say beside the reason.
    """
    execution = started.execution
    with _handing_off(execution) as offer:
        failure = _store(started, lambda: transitions.cancel_running(execution, offer))
    if failure is None:
        raise RunEnded("released", "its cancellation was withdrawn") from None
    _end_cancelled(started, failure, detail)


def _end_cancelled(started: Run, failure: Failure, detail: str) -> NoReturn:
    _tell_celery(started, outcomes.cancelled(failure.message))
    reason = started.execution.cancel_reason
    raise RunEnded("cancelled", "; ".join(filter(None, (reason, detail))), 0.0) from None


def _end_attempt(started: Run, error: BaseException) -> NoReturn:
    """Retry later if the policy allows and attempts are left; else fail for good and raise the error."""
    task, execution = started.task, started.execution
    error = as_misuse(error, task.name)
    limit = conductor_settings().MAX_ERROR_BYTES
    policy: RetryPolicy = task.retry_policy  # type: ignore[attr-defined]  # DurableTask has it
    # What is no Exception is tried again where any Exception would be, unless it is named.
    is_retried = policy.allows(error) or (
        not isinstance(error, (Exception, *policy.dont_autoretry_for)) and policy.allows(Exception())
    )
    delay: float | None = policy.delay(execution.attempt) if is_retried else None
    if isinstance(error, RetryExecution):
        delay = policy.delay(execution.attempt) if error.countdown is None else error.countdown
        if isinstance(error.exc, Exception):
            error = error.exc
    failure = _failure(execution, error, limit)
    if delay is not None and execution.has_attempts_left:
        seconds = delay
        try:
            _store(started, lambda: transitions.retry_later(execution, failure, seconds))
        except CancelExecution:
            _cancel(started, _raised(failure))
        raise RunEnded(
            "retrying",
            f"attempt {execution.attempt} failed ({next(iter(failure.message.splitlines()), '')}), "
            f"the next one is due in {delay:.3g}s",
            delay,
        ) from None
    if isinstance(error, RetryExecution):
        error.args = (f"ctx.retry() asked for another attempt, but attempt {execution.attempt} was the last one.",)
        failure = describe(error, limit)
    step = error.step if isinstance(error, (ChildError, EventTimedOut, OutcomeLost)) else ""
    child_id = error.child_id if isinstance(error, ChildError) else None
    try:
        with _handing_off(execution) as offer:
            _store(started, lambda: transitions.fail(execution, failure, step=step, child_id=child_id, hand_off=offer))
    except CancelExecution:
        _cancel(started, _raised(failure))
    is_death = isinstance(error, KeyboardInterrupt)
    told = WorkerLost(failure.message) if is_death else outcomes.portable(error, failure.message)
    _tell_celery(started, outcomes.Outcome(ExecutionStatus.FAILED, error=told, traceback=failure.traceback))
    raise told


def _failure(execution: Execution, error: BaseException, limit: int) -> Failure:
    failure = describe(error, limit)
    # Not an error that code raises: somebody, or something, interrupts the process.
    return transitions.worker_lost(execution, failure) if isinstance(error, KeyboardInterrupt) else failure


def _lose_unstorable(started: Run, error: BaseException) -> NoReturn:
    try:
        left_open.discard(database())
        transitions.lose(started.execution.pk, owner=started.execution.lease_owner)
    except DatabaseError as again:
        logger.critical("Execution %s is left to its lease: %s", started.execution.pk, again)
    raise RunEnded("abandoned", f"its outcome cannot be stored: {error}") from None


def _raised(failure: Failure) -> str:
    return f"its body raised {failure.type}: {failure.message}".splitlines()[0]


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


def _keep_tracer_out(request: Any) -> None:
    """Take from Celery's tracer what it would act on when a run returns or raises; a message of others has it."""
    request.callbacks = request.errbacks = request.chain = request.chord = None
    request.ignore_result = True


def _tell_celery(started: Run, outcome: outcomes.Outcome) -> None:
    """Tell Celery of the outcome, which is committed; what fails here, the sweeper does again."""
    execution = started.execution
    options = execution.get_options()
    if not options.get("announce") or dispatch.is_left_to_sweeper(options) or announcements.is_resting():
        return
    try:
        announcements.tell(execution, outcome, started.hostname)
    except (Exception, AbandonRun) as error:  # noqa: BLE001 - whatever broker and result backend raise
        logger.warning(
            "Execution %s %s, but Celery could not be told (%s: %s). It will be told again.",
            execution.pk,
            outcome.status,
            type(error).__name__,
            error,
            extra={"execution_id": str(execution.pk)},
        )


def _state_writer(started: Run, wait: transitions.Wait) -> Callable[[], None] | None:
    """Return what shows in the result backend that an execution waits, while its row is locked.

    ``None`` without a result backend, and if the body has said there how it stands.
    """
    execution = started.execution
    if started.reports_state or not announcements.is_shown(execution):
        return None
    child_id = wait.child.id if isinstance(wait, transitions.Invocation) else None
    info = {"waiting_for": wait.step, "child": None if child_id is None else str(child_id)}
    state = conductor_settings().REPORTED_STATE
    return lambda: announcements.show(execution, state, info, started.hostname)
