"""A run of a body, under what the body calls: what it remembers, how far it has come, and what has ended it."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

from celery import Task
from django.db import DatabaseError, InterfaceError

from conductor_app import transitions
from conductor_app.body import left_open
from conductor_app.body.journal import DatabaseJournal, Journal
from conductor_app.body.logger import ReplayAwareLogger, log_extra
from conductor_app.body.places import caller, shown_place
from conductor_app.body.plain import Invocable
from conductor_app.body.state import Teller
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import (
    AbandonRun,
    CancelExecution,
    ContextClosed,
    ControlFlow,
    EndAttempt,
    InvokeInsideTransaction,
    LeaseLost,
    NestedDurableCall,
    NewerFormat,
    OutcomeLost,
    ReleaseExecution,
    StepMismatch,
    StepNameReused,
    SuspendExecution,
    TooManySteps,
    WrongThread,
)
from conductor_app.models import Execution
from conductor_app.states import StepKind
from conductor_app.store import interrupted
from conductor_app.transitions import kinds, steps
from conductor_app.transitions.leases import Lease
from conductor_app.values.failures import describe, is_caught_by_bodies
from conductor_app.values.state import Told

R = TypeVar("R")

#: A body that swallows its end and makes so many calls after it is not going to stop.
MAX_SWALLOWED = 10

logger = logging.getLogger("conductor_app.execution")

#: The context of the body that runs in this thread.
current_context: ContextVar[BodyRun | None] = ContextVar("conductor_app_context", default=None)


class BodyRun:
    """One run of a body, in one thread; ``ExecutionContext`` adds what the body calls."""

    def __init__(
        self,
        execution: Execution,
        memory: dict[str, steps.Memory],
        lease: Lease,
        task: Task[Any, Any] | None = None,
        *,
        journal: Journal | None = None,
        teller: Teller | None = None,
        draining: Callable[[], bool] = lambda: False,
        end_stuck: Callable[[BodyRun, str], None] = lambda _context, _what: None,
    ) -> None:
        self._execution = execution
        self._memory = memory
        self._journal: Journal = DatabaseJournal(execution) if journal is None else journal
        #: What it tells, over all passes of a run.
        self._teller = Teller() if teller is None else teller
        self._lease = lease
        self._task = task
        self._draining = draining
        #: Ends a run whose body swallows its end again and again, where that can be ended.
        self._end_stuck = end_stuck
        self._swallowed = 0
        self._replayed = 0
        #: Where each step was called: file and line.
        self._used: dict[str, tuple[str, int]] = {}
        #: What each child that was invoked is, by its identity.
        self._children: dict[int, tuple[object, Invocable]] = {}
        #: How often the body has looked at each handle.
        self._peeks: dict[str, int] = {}
        self._inside: str | None = None
        self._unrecorded: tuple[str, BaseException] | None = None
        self._suspension: tuple[transitions.Wait, tuple[str, int]] | None = None
        self._ending: ControlFlow | None = None
        self._is_lost = False
        self._closed = False
        self._thread = threading.get_ident()
        self._process = os.getpid()
        self._watch = left_open.Watch()
        #: When the database last said that this run may go on.
        self._checked_at = lease.renewed_at
        #: Logs like any logger, with the execution's ids, and stays silent while the body replays what it did before.
        self.logger = ReplayAwareLogger(execution, lambda: self.is_replaying)

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def execution_id(self) -> uuid.UUID:
        """Id of this execution; also its Celery task id."""
        return self._execution.pk

    @property
    def root_id(self) -> uuid.UUID:
        """Id of the root of this execution's tree."""
        return self._execution.root_id

    @property
    def parent_id(self) -> uuid.UUID | None:
        """Id of the parent, or ``None`` for a root."""
        return self._execution.parent_id

    @property
    def attempt(self) -> int:
        """The current attempt, counted from 1; suspensions do not count."""
        return self._execution.attempt

    @property
    def scheduled_at(self) -> dt.datetime | None:
        """The instant of its schedule for which it was started; ``None`` for any other execution.

        It may have been started later, and its retries are of the same instant.
        """
        if '"scheduled_at"' not in self._execution.options:
            return None
        found: dt.datetime | None = self._execution.get_options().get("scheduled_at")
        return found

    @functools.cached_property
    def deadline(self) -> dt.datetime | None:
        """When the tree of this execution is cancelled, if it has not ended; ``None`` if nothing says so.

        Read once in a run, when it is asked for. An operator's retry gives the tree another one.
        """
        with self._beyond_the_body():
            return self._journal.deadline()

    @property
    def task(self) -> Task[Any, Any] | None:
        """The Celery task whose body this is."""
        return self._task

    @property
    def is_replaying(self) -> bool:
        """Whether the body has not yet passed all that earlier runs have done."""
        return self._replayed < len(self._memory)

    # ------------------------------------------------------------------------------------------------------ the insides

    @property
    def suspension(self) -> tuple[transitions.Wait, tuple[str, int]] | None:
        """What the body waits for, and where it said so; for the executor."""
        return self._suspension

    @property
    def ending(self) -> ControlFlow | None:
        """What has ended the body, whatever that made of it; for the executor."""
        return self._ending

    @property
    def memory(self) -> Mapping[str, steps.Memory]:
        """All that the execution remembers by now; for the executor."""
        return self._memory

    @property
    def reached(self) -> list[str]:
        """The steps that the body has come to in this run, in their order; for the test kit."""
        return list(self._used)

    def _has_come_to(self, step: str) -> bool:
        """Whether the body has called this step in this run; for the executor."""
        return step in self._used

    @contextmanager
    def entered(self) -> Any:
        """Make this the current context while the body runs, and close it afterwards; for the executor."""
        token = current_context.set(self)
        self._watch.begin()
        try:
            yield
        finally:
            current_context.reset(token)
            self._closed = True

    def _left_open(self, raised: BaseException | None = None) -> list[str]:
        """Clean this thread's connections after the body, and return what would have lost writes; for the executor."""
        return self._watch.end(None if isinstance(raised, ControlFlow) else raised)

    def _keep_in_mind(self, step: str, error: BaseException) -> None:
        """Let the next call record a step's failure: the body has caught it then."""
        if is_caught_by_bodies(type(error)):
            self._unrecorded = (step, error)

    def flush(self) -> None:
        """Record a step's failure that the body has caught; for the executor."""
        if self._unrecorded is not None:
            step, error = self._unrecorded
            self._unrecorded = None
            failure = describe(error, conductor_settings().MAX_ERROR_BYTES)
            with self._beyond_the_body():
                self._memory[step] = self._journal.record(step, failure=failure)
            self._replayed += 1

    def _enter(self, step: str, call: str, *, may_repeat: bool = False) -> None:
        """Check everything that is wrong with any call, whatever is remembered."""
        self._usable(call)
        place = caller()
        if step in self._used and not may_repeat:
            raise StepNameReused(
                f'Step name "{step}" was already used at {shown_place(self._used[step])} and again at '
                f"{shown_place(place)}; give each call its "
                f'own name, in a loop for example f"{step}-{{index}}".'
            )
        self._used[step] = place
        if found := self._watch.added():
            where = "inside transaction.atomic()" if "atomic() block" in found[0] else f"with {' and '.join(found)}"
            raise InvokeInsideTransaction(
                f"{call} was called {where}, which would undo the memory of it. Call it outside, "
                "or put the writes into ctx.atomic_step()."
            )
        # Before this call ends the body: it has seen the failure, and a later run must see it, too.
        self.flush()
        self._lease_must_hold()
        self._pass_on()

    def _tell(self, call: str, note: Callable[[bool], None]) -> None:
        """Note what the body tells, and store it if it is time to.

        Args:
            call: How the call is named in an error.
            note: Notes it, as a replay or not.
        """
        self._usable(call, may_nest=True)
        if self._inside is None:
            self.flush()
            self._lease_must_hold()
        is_replay = self.is_replaying
        if not is_replay and self._teller.is_to_look and not self._watch.added():
            self._teller.look(self._journal)
        note(is_replay)
        self._pass_on()

    def _pass_on(self) -> None:
        """Store what the body tells, if it is time to, and not in a transaction of the body's."""
        if self._teller.is_due and not self._watch.added():
            with self._beyond_the_body():
                self._teller.store(self._journal)

    def _tell_last(self) -> None:
        """Store the last of what the body has told; for the executor, whose own write finds out what this does not."""
        if self._teller.is_used and not self._is_lost:
            is_again = self._execution.attempt > 1 or (self._execution.fence == 1 and self._execution.is_fork)
            with suppress(LeaseLost):
                self._teller.finish(self._journal, may_have_missed=is_again)

    def _told(self) -> Told:
        """Return all that the execution has told; for the executor."""
        return self._teller.shown(self._journal)

    def _must_be_closed(self, found: list[str], call: str) -> None:
        """Refuse to record a step whose function has left a transaction open: the memory of it would be undone."""
        if found:
            raise InvokeInsideTransaction(
                f"The function of {call} left {' and '.join(found)}, which would undo the memory of it. "
                "Use `with transaction.atomic():`, which ends with its block."
            )

    def _usable(self, call: str, *, may_nest: bool = False) -> None:
        if self._closed:
            raise ContextClosed(
                f"{call} was called after the run had ended. A context is good for one run of the body."
            )
        self._must_be_in_its_process(call)
        if threading.get_ident() != self._thread:
            raise WrongThread(f"{call} was called in another thread than the one that runs the body.")
        if self._inside is not None and not may_nest:
            raise NestedDurableCall(
                f"{call} was called inside {self._inside}. A step's function must not call ctx; call it from the body."
            )
        if self._suspension is not None or self._ending is not None:
            # The body calls on after its end. It gets no further.
            self._note_swallowed()
            raise SuspendExecution if self._ending is None else self._ending

    def _note_swallowed(self) -> None:
        """Tell of the first call after the body's end, unless it unwinds, and end a body that does not stop calling."""
        if isinstance(sys.exception(), ControlFlow):
            return  # in a `finally`, most often
        self._swallowed += 1
        if self._swallowed not in (1, MAX_SWALLOWED):
            return
        how = f"called on at {shown_place(caller())}"
        if self._suspension is not None:
            what = swallowed_suspension(self, self._execution.task, how)
        else:
            what = f"{self._execution.task} swallowed {type(self._ending).__name__} and {how}"
        if self._swallowed == 1:
            logger.error("%s. It gets no further. %s", what, SWALLOWED_ADVICE, extra=log_extra(self._execution))
        else:
            self._end_stuck(self, f"{what}, {MAX_SWALLOWED} times")

    @property
    def _is_forked(self) -> bool:
        """Whether this is a copy of the context, in a process that the body has forked; for the executor."""
        return os.getpid() != self._process

    def _must_be_in_its_process(self, call: str) -> None:
        if self._is_forked:
            raise WrongThread(f"{call} was called in a process that was forked from the one that runs the body.")

    @contextmanager
    def _beyond_the_body(self) -> Any:
        """Let no error of ours reach the body where it could be caught.

        What the body does about an exception has to be what it does on each replay. Nothing remembers an error of one
        of our own statements, nor that a recorded outcome was gone.
        """
        try:
            yield
        except LeaseLost:
            self._is_lost = True  # each later call says so, too
            raise
        except CancelExecution:
            self._ending = CancelExecution()  # so does a body's that swallows it and calls on
            raise
        except ReleaseExecution:
            self._lease.on_hold = True
            self._ending = ReleaseExecution()
            raise
        except AbandonRun as error:
            self._ending = AbandonRun(*error.args)
            raise
        except (DatabaseError, InterfaceError, OutcomeLost, NewerFormat) as error:
            self._ending = EndAttempt(error)
            raise self._ending from None

    def _lease_must_hold(self) -> None:
        if self._lease.lost or self._is_lost:
            raise LeaseLost(
                f"The lease of execution {self._execution.pk} is lost: another run took over. "
                "This run can write no more."
            )
        if self._lease.cancel_requested:
            self._end(CancelExecution())

    def _give_way(self) -> None:
        """Give the execution back if the worker shuts down or somebody holds it, before a new call does anything.

        One that suspends needs not ask: a suspension gives the worker free, too, and loses nothing.
        """
        if self._draining() or self._lease.on_hold:
            self._end(ReleaseExecution())

    def _end(self, why: ControlFlow) -> NoReturn:
        """End the body; it gets no further, whatever it makes of that."""
        self._ending = why
        raise why

    def _ask_unless_asked_within(self, seconds: float) -> None:
        """Ask the database whether this run may go on, if it has not said so for a while."""
        if time.monotonic() - self._checked_at >= seconds:
            with self._beyond_the_body():
                self._journal.check_held()
            self._checked_at = time.monotonic()

    def _recall(self, step: str, kind: StepKind, *, task: str = "", payload_digest: str = "") -> Any:
        remembered = self._memory.get(step)
        if remembered is None:
            limit = conductor_settings().MAX_STEPS
            if len(self._memory) >= limit:
                raise TooManySteps(
                    f'"{step}" would be step number {limit + 1} of execution {self._execution.pk}; '
                    f'the limit is {limit}. Split the work into children, or raise CONDUCTOR["MAX_STEPS"].'
                )
            return None
        self._replayed += 1
        if remembered.kind != kind:
            raise StepMismatch(
                f'Step "{step}" was recorded as {remembered.kind} and the code now calls it as {kind}. '
                "Give the new call its own step name."
            )
        if remembered.task != task:
            does = kinds.of(kind)
            raise StepMismatch(
                f'Step "{step}" recorded {does.noun} {remembered.task} and the code now {does.verb} {task}. '
                "Give the new call its own step name."
            )
        if remembered.payload_digest != payload_digest:
            message = (
                f'Step "{step}" was recorded with another payload than the code now passes; '
                "the recorded outcome counts. "
                "Payloads should follow from the execution's own payload and earlier steps."
            )
            if self._journal.is_strict:
                raise StepMismatch(message)
            logger.warning(message, extra=log_extra(self._execution))
        return remembered

    def _closing(self, work: Callable[[], R], call: str) -> R:
        """Run the function of an ``atomic_step``, and refuse what it leaves open; inside of that step's block."""
        watch = left_open.Watch()
        try:
            done = work()
        except BaseException as error:
            interrupted.close_raised_in(error, blocks=1)
            watch.clean()
            raise
        self._must_be_in_its_process(call)
        self._must_be_closed(watch.clean(), call)
        return done

    def _suspend(self, wait: transitions.Wait) -> NoReturn:
        self._suspension = (wait, self._used[wait.step])
        raise SuspendExecution(wait.step)

    @contextmanager
    def _nested(self, call: str) -> Any:
        self._inside = call
        try:
            yield
        finally:
            self._inside = None


#: What to tell whoever wrote a body that swallows its suspension.
SWALLOWED_ADVICE = "Use `except Exception`, or re-raise conductor_app.SuspendExecution; do not return from `finally`."


def swallowed_suspension(context: BodyRun, task: str, how: str) -> str:
    """Return where a body swallowed its suspension, and how it went on (``returned``, ``raised ValueError``)."""
    assert context.suspension is not None
    wait, place = context.suspension
    return f"{task} swallowed the suspension at {shown_place(place)} (step {wait.step!r}) and {how}"
