"""Tell Celery of a final status: result backend, callbacks, chain, chord.

The run that ends an execution does this after its commit. The sweeper does it for executions that end without a run
(cancelled while waiting, lost with their worker) and for runs that died between their commit and this. Celery's tracer
has no part in it: when the broker or the result backend is away, it would turn a success into a failure.

An announcement that is interrupted is repeated, so messages to plain tasks are sent at least once. Durable tasks are
called exactly once, since their ids are fixed when they are stored as callbacks. A chord's counter in
django-celery-results is no such thing: it is counted down in the transaction that notes that Celery was told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

from celery import current_app, states
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from django.db import DatabaseError, IntegrityError, InterfaceError, connections, router, transaction

from conductor_app import transitions
from conductor_app.engine import calls
from conductor_app.engine.callbacks import (
    PERMANENT_ERRORS,
    ChordBody,
    call_errbacks,
    is_canvas,
    is_durable,
    is_eager,
    signature_of,
)
from conductor_app.engine.outcomes import Outcome, outcome_of
from conductor_app.exceptions import ConductorError
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store.errors import is_outage, is_undone
from conductor_app.store.ids import of_task_id
from conductor_app.store.locks import RowsLocked, locked
from conductor_app.store.opened import is_transaction
from conductor_app.store.process import process
from conductor_app.store.transactions import together

logger = logging.getLogger(__name__)

#: A result backend or broker that took so many seconds to fail is left alone for so many: Celery's Redis backend tries
#: for 20 seconds before it gives up, and the sweeper has other things to do.
SLOW_SECONDS, REST_SECONDS = 1.0, 30.0


def deliver(execution: Execution) -> None:
    """Tell Celery how ``execution``, a final row, ended; for the sweeper.

    Raises:
        Exception: Whatever the broker or the result backend raises; the sweeper then tries again.
    """
    tell(execution, outcome_of(execution))


def restore(execution: Execution) -> None:
    """Write the outcome of a final execution to the result backend once more: Celery may have put another over it.

    Nobody is called, and no chord counted; that was done when Celery was told.

    Raises:
        Exception: Whatever the result backend raises.
    """
    if execution.is_final and execution.announce_at is None and is_shown(execution):
        announcement = _Announcement(execution, outcome_of(execution), None)
        with _watched(announcement.shares_database):
            announcement.store_alone()


def tell(execution: Execution, outcome: Outcome, hostname: str | None = None) -> None:
    """Tell Celery how ``execution`` ended, and note that it was told.

    Raises:
        Exception: Whatever the broker or the result backend raises; it is to be told again.
    """
    announcement = _Announcement(execution, outcome, hostname)
    with _watched(announcement.shares_database):
        # A row that was read after the end says what is stored; a run's own execution is still running to it.
        _tell(announcement, execution, ExecutionStatus(execution.status) if execution.is_final else outcome.status)


def show(execution: Execution, state: str, info: Any = None, hostname: str | None = None) -> None:
    """Write a state that is not final to the result backend, as far as it takes it.

    Call it in the transaction that has locked the execution's row: nobody can then store a later state before.

    Raises:
        DatabaseError: The database that also has the executions has undone that transaction.
    """
    if not is_shown(execution):
        return
    backend = _backend_of(execution.task)
    shares_database = _shares_database(backend)
    is_inside = connections[database()].in_atomic_block
    request = request_of(execution, hostname)
    try:
        with _watched(shares_database), transaction.atomic(using=database()) if is_inside else nullcontext():
            backend.store_result(celery_id(execution), info, state, request=request)
    except Exception as error:
        # A result backend that is away must not stop the execution. But where the transaction is lost as a whole, no
        # savepoint helps, and whoever began it begins it again.
        if is_inside and shares_database and (is_undone(error) or is_outage(error)):
            raise
        logger.warning("%s of execution %s was not written to the result backend: %s", state, execution.pk, error)


def is_shown(execution: Execution) -> bool:
    """Tell whether the result backend is to know how an execution stands, and can be told now."""
    return not execution.get_options().get("ignore_result", True) and not is_resting()


def is_resting() -> bool:
    """Tell whether the result backend or the broker has just been slow to fail, so that nothing is to be told now."""
    return time.monotonic() < process.results_rest_until


@contextmanager
def _watched(shares_database: bool) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        # For the executions' own database everything waits anyway, and goes on when it is back. And what we
        # refuse says nothing of a server: a durable task that may not be called now (its key is taken), a locked row.
        is_own = isinstance(error, ConductorError | RowsLocked) or (
            shares_database and isinstance(error, DatabaseError | InterfaceError)
        )
        if not is_own and time.monotonic() - started >= SLOW_SECONDS:
            process.results_rest_until = time.monotonic() + REST_SECONDS
        raise


def _tell(announcement: _Announcement, execution: Execution, status: ExecutionStatus) -> None:
    announcement.send_messages()
    if not announcement.shares_database:
        announcement.write()
        # Not to be repeated lightly: it may have counted down a chord.
        if not transitions.announced(execution, status):
            _show_as_it_stands(execution)
        return
    is_alone = is_transaction(database())

    def write() -> None:
        # First, since it takes the row's lock: of two that tell at the same time, one counts the chord down.
        if transitions.announced(execution, status, is_alone=is_alone):
            announcement.write()

    together(database(), write)


def _show_as_it_stands(execution: Execution) -> None:
    """Write what holds over the result of an end that somebody has retried before it was written."""
    if not is_shown(execution):
        return

    def write() -> None:
        row = locked(Execution.objects.using(database()).filter(pk=execution.pk)).first()
        if row is not None and row.is_final:
            _Announcement(row, outcome_of(row), None).store_alone()
        elif row is not None:
            show(row, states.PENDING)

    together(database(), write)


def celery_id(execution: Execution) -> str:
    """Return the task id under which Celery's results, chains and chords know an execution.

    That is the execution's own, unless a message of somebody else's brought one that is no UUID.
    """
    return str(execution.get_options().get("celery_id") or execution.pk)


def request_of(execution: Execution, hostname: str | None = None) -> Context:
    """Return the request under which Celery knows an execution; without callbacks, chain and chord."""
    options = execution.get_options()
    shown: dict[str, Any] = {"args": (), "kwargs": {}}
    if current_app.conf.result_extended:
        shown = {"args": execution.args, "kwargs": execution.kwargs}
    return Context(
        options.get("headers") or {},
        id=celery_id(execution),
        task=execution.task,
        hostname=hostname,
        group=options.get("group_id"),
        group_index=options.get("group_index"),
        root_id=options.get("root_id") or str(execution.root_id),
        parent_id=options.get("parent_id") or (str(execution.parent_id) if execution.parent_id else None),
        ignore_result=bool(options.get("ignore_result", True)),
        called_directly=False,
        delivery_info={},
        **shown,
    )


class _Announcement:
    """One execution's end, and whom it concerns."""

    def __init__(self, execution: Execution, outcome: Outcome, hostname: str | None) -> None:
        options = execution.get_options()
        self._execution = execution
        self._outcome = outcome
        self._backend = _backend_of(execution.task)
        self._request = cast(Any, request_of(execution, hostname))
        self._request.errbacks = options.get("link_error")
        self._request.chord = options.get("chord")
        self._store_error = bool(options.get("store_error"))
        self._priority = execution.priority if current_app.conf.task_inherit_parent_priority else None
        chain: list[Any] = options.get("chain") or []
        if outcome.status == ExecutionStatus.SUCCEEDED:
            self._callbacks: list[tuple[Any, list[Any] | None]] = [
                *((signature_of(callback), None) for callback in options.get("link") or ()),
                *((signature_of(following), chain[:-1]) for following in chain[-1:]),
            ]
        else:
            self._callbacks = []
            self._request.chain = chain

    @property
    def shares_database(self) -> bool:
        """Whether results are written to the executions' own database, by django-celery-results."""
        return _shares_database(self._backend)

    def send_messages(self) -> None:
        """Send what goes to the broker, outside of any transaction: a message must not overtake a commit."""
        with self._repeatably():
            for callback, chain in self._callbacks:
                if not self._belongs_to_transaction(callback):
                    self._send(callback, chain)
            if self._outcome.error is not None:
                call_errbacks(self._request, self._outcome.error, self._outcome.traceback)

    def write(self) -> None:
        """Send what only writes to the database, store the result, and count down the chord."""
        with self._repeatably():
            for callback, chain in self._callbacks:
                if self._belongs_to_transaction(callback):
                    self._send(callback, chain)
        with ChordBody(self._request, together=self.shares_database), self._as_chord():
            self._store()

    def store_alone(self) -> None:
        """Store the result, and tell nobody else."""
        self._request.chord = self._request.chain = self._request.errbacks = None
        self._store()

    def _repeatably(self) -> AbstractContextManager[None]:
        """What is called for this end is called on its behalf, however often it is announced."""
        execution, status = self._execution, self._outcome.status
        # An execution succeeds once. After a retry it may fail again, and its error callbacks are called again.
        end = "" if status == ExecutionStatus.SUCCEEDED else f" {status} {execution.fence}"
        return calls.on_behalf_of(f"{execution.pk}{end}", execution.created_at)

    def _as_chord(self) -> AbstractContextManager[None]:
        """A chord's body is called on behalf of its whole header: two parts may each be the last one."""
        if not self._request.chord or self.shares_database:
            return nullcontext()  # counted down in this transaction, and so called once
        return calls.on_behalf_of(f"chord {self._request.group}", self._execution.created_at)

    def _store(self) -> None:
        request, outcome = self._request, self._outcome
        store = not request.ignore_result
        if outcome.status == ExecutionStatus.SUCCEEDED:
            self._backend.mark_as_done(request.id, outcome.result, request=request, store_result=store)
            return
        self._backend.mark_as_failure(
            request.id,
            outcome.error,
            outcome.traceback,
            request=request,
            store_result=store or self._store_error,
            call_errbacks=False,
            state=states.FAILURE if outcome.status == ExecutionStatus.FAILED else states.REVOKED,
        )

    def _belongs_to_transaction(self, callback: Any) -> bool:
        # A canvas of durable tasks alone is stored as a whole or not at all: starting a chord cannot be repeated.
        return self.shares_database and is_canvas(callback) and is_durable(callback) and not is_eager()

    def _send(self, callback: Any, chain: list[Any] | None) -> None:
        """Send what Celery's tracer sends after a success (``_dispatch_callbacks_and_chain`` in its source)."""
        options: dict[str, Any] = {
            "parent_id": self._request.id,
            "root_id": self._request.root_id,
            "priority": self._priority,
        }
        if chain is not None:
            options["chain"] = chain
        try:
            sent = callback.apply_async((self._outcome.result,), **options)
        except PERMANENT_ERRORS as error:
            logger.error(
                "Execution %s succeeded, but its callback %s cannot be called: %s",
                self._execution.pk,
                callback.get("task"),
                error,
                extra={"execution_id": str(self._execution.pk)},
            )
            self._fail_callback(callback, chain, error)
        except IntegrityError:
            if not (self._outcome.status == ExecutionStatus.SUCCEEDED and is_canvas(callback)):
                raise
            # Its chord is counted already: an earlier announcement began to send it and was interrupted.
            logger.warning("Execution %s: its callback had been sent before.", self._execution.pk)
        else:
            if sent is not None:
                self._request.children.append(sent)

    def _fail_callback(self, callback: Any, chain: list[Any] | None, error: Exception) -> None:
        """Fail the callback in the execution's place, so that nobody waits for it.

        Its id may be that of another call, too, which goes on or has ended: what that has to say is not overwritten.
        """
        options = callback.options
        if is_canvas(callback) or not options.get("task_id"):
            return
        request = Context(
            id=options["task_id"],
            task=callback.task,
            errbacks=options.get("link_error"),
            chain=chain,
            chord=options.get("chord"),
            group=options.get("group_id"),
            group_index=options.get("group_index"),
            root_id=self._request.root_id,
            delivery_info={},
        )
        call_errbacks(request, error)
        ids = [request.id, *(one["options"].get("task_id") for one in chain or ())]
        unknown = [task_id for task_id in ids if task_id and not self._is_known(task_id)]
        is_alone = len(unknown) == len(list(filter(None, ids)))
        self._backend.mark_as_failure(request.id, error, request=request, store_result=is_alone, call_errbacks=False)
        for task_id in () if is_alone else unknown:
            self._backend.store_result(task_id, error, states.FAILURE, request=Context(id=task_id, delivery_info={}))

    def _is_known(self, task_id: str) -> bool:
        """Tell whether something has been called by an id, as far as the database and the result backend know."""
        if Execution.objects.using(database()).filter(pk=of_task_id(task_id)).exists():
            return True
        return not isinstance(self._backend, DisabledBackend) and self._backend.get_state(task_id) != states.PENDING


def _backend_of(task_name: str) -> Any:
    task = current_app.tasks.get(task_name)
    return current_app.backend if task is None else task.backend


def _shares_database(backend: Any) -> bool:
    model = getattr(backend, "TaskModel", None)
    return model is not None and router.db_for_write(model) == database()
