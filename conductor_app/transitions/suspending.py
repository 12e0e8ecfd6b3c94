"""End a run that waits."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, transaction

from conductor_app import signals
from conductor_app.exceptions import CancelExecution, OutcomeLost
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.opened import is_transaction
from conductor_app.transitions import claiming, creating, dispatch, guards, running, sending, statements, steps
from conductor_app.values.payloads import dump_options, loads

#: Children of a map that one INSERT stores.
_INSERT_BATCH = 500
#: Payloads of a map's children that one statement stores, in bytes; more are stored in batches.
_ONE_STATEMENT_BYTES = 16_777_216


@dataclass(frozen=True)
class Invocation:
    """A child that does not exist yet, and how long its parent waits for it."""

    step: str
    child: creating.NewExecution
    payload_digest: str
    timeout: float | None
    on_timeout: OnTimeout


@dataclass(frozen=True)
class Map:
    """Children of one task that do not exist yet, one for each payload."""

    step: str
    task: str
    children: Sequence[creating.NewExecution]
    payload_digest: str
    timeout: float | None
    on_timeout: OnTimeout
    max_parallel: int | None
    fails_fast: bool


@dataclass(frozen=True)
class Gather:
    """Started children that are awaited together."""

    step: str
    #: Names of the steps that started them.
    members: Sequence[str]
    fails_fast: bool


@dataclass(frozen=True)
class Sleep:
    """A sleep that has not begun yet."""

    step: str
    seconds: float | None = None
    until: dt.datetime | None = None


@dataclass(frozen=True)
class AwaitEvent:
    """An event for which no step waits yet; it may have been sent already."""

    step: str
    event: str
    timeout: float | None


@dataclass(frozen=True)
class Pending:
    """A step that an earlier run opened and that was undecided when this one read it."""

    step: str


Wait = Invocation | Map | Gather | Sleep | AwaitEvent | Pending


def start_child(execution: Execution, wait: Invocation) -> steps.Memory:
    """Store a child that runs beside its parent, and return what the parent remembers of it.

    Raises:
        LeaseLost: Another run has taken over; nothing is stored.
        CancelExecution: The execution is to be cancelled; nothing is stored.
        OutcomeLost: It is there; somebody has deleted the step that stands for it.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            if running.lock_held(execution):
                raise CancelExecution
            _open_child(execution, wait, StepKind.START)

    unless_started: IntegrityError | None = None
    try:
        guards.persist(work)
    except IntegrityError as error:
        unless_started = error
    # It is started already if this run's COMMIT got no answer.
    started = guards.patiently(lambda: steps.recall(execution.pk, wait.step)).get(wait.step)
    if started is None:
        raise _forgotten(execution, wait.step) or unless_started or guards.lease_lost(execution)
    return started


def _forgotten(execution: Execution, step: str) -> OutcomeLost | None:
    """Return the error to raise if a step cannot be opened since its children are there, and what they stand for not.

    No transition leaves that behind; a DELETE by hand does.
    """
    children = Execution.objects.using(database()).filter(parent_id=execution.pk, step=step)
    if not guards.patiently(children.exists):
        return None
    return OutcomeLost(
        f"Step '{step}' has a child, and what was recorded of the step is gone: its row has been deleted. A replay "
        "cannot go on without it. Restore what is missing and retry the execution, or start a new one.",
        step=step,
    )


def suspend(
    execution: Execution,
    wait: Wait,
    before_commit: Callable[[], None] | None = None,
    hand_off: claiming.HandOff | None = None,
) -> bool:
    """running → waiting, after the body has unwound; stores the child, or opens the step, that is waited for.

    Args:
        before_commit: Called while the row is locked, so that nobody can resume the execution before it returns.
        hand_off: Gets the child that is waited for.

    Returns:
        ``False`` if the step is decided already (meanwhile, or by an event that was sent before): the execution is
        still running, and its body can go on.

    Raises:
        LeaseLost: Another run has taken over.
        CancelExecution: The execution is to be cancelled.
        OutcomeLost: The children that are to be stored are there; somebody has deleted the step that stands for them.
    """

    def work() -> bool:
        # What stands beside it in its transaction says no more than that it waits.
        at_once = _at_once(execution, wait, hand_off, is_alone=is_transaction(database()))
        if at_once is not None:
            with contextlib.nullcontext() if before_commit is None else transaction.atomic(using=database()):
                at_once()
                if before_commit is not None:
                    before_commit()
            return True
        with transaction.atomic(using=database()):
            if isinstance(wait, AwaitEvent) and _is_there(execution, wait):
                return False
            # Steps before executions, as everywhere: a member that is just ending holds its step and then asks for
            # this row.
            if isinstance(wait, Gather) and _is_gathered(execution, wait):
                return False
            if isinstance(wait, Map) and not wait.children:
                running.lock_held(execution)
                _open_map(execution, wait)
                return False
            guards.leave_running(execution, status=ExecutionStatus.WAITING, cancel_requested=False, **guards.NOT_QUEUED)
            if isinstance(wait, Pending):
                # A new statement, after this row was written: whoever settles the step writes this row too, so either
                # that commit is visible here, or it will find this execution waiting.
                if not steps.is_pending(execution.pk, wait.step):
                    transaction.set_rollback(True, using=database())
                    return False
            elif isinstance(wait, Sleep):
                until: Any = clock.after(wait.seconds) if wait.seconds is not None else wait.until
                steps.open_sleep(execution, wait.step, until)
            elif isinstance(wait, Map):
                _open_map(execution, wait)
            elif isinstance(wait, Invocation):
                with claiming.handing_off(hand_off):
                    _open_child(execution, wait, StepKind.INVOKE)
            if before_commit is not None:
                before_commit()
            guards.send_signal(signals.execution_suspended, execution, step=wait.step)
        return True

    try:
        return guards.persist(work)
    except IntegrityError:
        if not isinstance(wait, AwaitEvent | Gather) and not (isinstance(wait, Map) and not wait.children):
            if (forgotten := _forgotten(execution, wait.step)) is not None:
                raise forgotten from None
            raise
        # Recorded already, by this run, whose COMMIT got no answer: an event that it took, a gather of children that
        # had ended, a map of none. Had it been left waiting, the guards would have said so.
        return False


def _at_once(
    execution: Execution, wait: Wait, hand_off: claiming.HandOff | None, *, is_alone: bool
) -> Callable[[], None] | None:
    """Return what suspends an execution in one statement, if there is one."""
    if isinstance(wait, Invocation) and _is_one_statement(wait):
        return lambda: _suspend_at_once(execution, wait, hand_off, is_alone=is_alone)
    if isinstance(wait, Map) and _is_one_statement_of_many(wait):
        return lambda: _suspend_on_map_at_once(execution, wait)
    return None


def _is_one_statement(wait: Invocation) -> bool:
    new = wait.child
    return creating.is_due(new) and new.expires is None and statements.are_at_hand()


def _suspend_at_once(
    execution: Execution, wait: Invocation, hand_off: claiming.HandOff | None, *, is_alone: bool
) -> None:
    child = creating.timeless_row(wait.child, execution, wait.step)
    offer = hand_off if hand_off is not None and hand_off.wants(child) else None
    suspended = statements.suspend(
        execution,
        child,
        None if offer is None else offer.owner,
        is_alone=is_alone,
        payload_digest=wait.payload_digest,
        timeout=wait.timeout,
        on_timeout=wait.on_timeout,
    )
    if not suspended:
        raise guards.refusal(execution)
    guards.send_signal(signals.execution_created, child)
    if offer is not None:
        offer.confirm(child)
    else:
        dispatch.on_commit(child)
    guards.send_signal(signals.execution_suspended, execution, step=wait.step)


def _is_one_statement_of_many(wait: Map) -> bool:
    return (
        statements.are_at_hand()
        and 0 < sum(len(new.payload) for new in wait.children) <= _ONE_STATEMENT_BYTES
        and all(creating.is_due(new) and new.expires is None and new.idempotency_key is None for new in wait.children)
    )


def _suspend_on_map_at_once(execution: Execution, wait: Map) -> None:
    in_flight = _in_flight(wait)
    children = [
        creating.timeless_row(new, execution, wait.step, position=position)
        for position, new in enumerate(_children_of(wait))
    ]
    suspended = statements.suspend_on_map(
        execution,
        children,
        task=wait.task,
        payload_digest=wait.payload_digest,
        in_flight=in_flight,
        max_parallel=wait.max_parallel,
        fails_fast=wait.fails_fast,
        timeout=wait.timeout,
        on_timeout=wait.on_timeout,
    )
    if not suspended:
        raise guards.refusal(execution)
    dispatch.on_commit(*children[:in_flight])
    for child in children:
        guards.send_signal(signals.execution_created, child)
    guards.send_signal(signals.execution_suspended, execution, step=wait.step)


def _is_there(execution: Execution, wait: AwaitEvent) -> bool:
    """Open the step of an event; tell whether it is decided: the event was sent before, or the step only looks.

    The execution's row is locked first, and looked at the mailbox in a new statement: whoever sends an event writes
    this row too, so either that commit is visible here, or it will find the step.
    """
    if running.lock_held(execution):
        raise CancelExecution
    step = steps.open_event(execution, wait.step, wait.event, timeout=wait.timeout)
    if sending.deliver(step):
        return True
    if wait.timeout != 0:
        return False
    steps.settle(execution.pk, wait.step, StepStatus.TIMED_OUT)
    return True


def _is_gathered(execution: Execution, wait: Gather) -> bool:
    """Record the gather; tell whether there is nothing left to wait for."""
    guards.must_hold(execution)
    gather = steps.open_gather(execution, wait.step, wait.members, fails_fast=wait.fails_fast)
    if gather.status == StepStatus.PENDING:
        return False
    running.lock_held(execution)  # what a run records, it records while it holds its execution
    return True


def _open_map(execution: Execution, wait: Map) -> None:
    in_flight = _in_flight(wait)
    children = [
        creating.queued_row(new, execution, wait.step, position=position, is_held=position >= in_flight)
        for position, new in enumerate(_children_of(wait))
    ]
    Execution.objects.using(database()).bulk_create(children, batch_size=_INSERT_BATCH)
    steps.open_map(
        execution,
        wait.step,
        task=wait.task,
        payload_digest=wait.payload_digest,
        total=len(children),
        timeout=wait.timeout,
        on_timeout=wait.on_timeout,
        max_parallel=wait.max_parallel,
        fails_fast=wait.fails_fast,
    )
    dispatch.on_commit(*children[:in_flight])
    for child in children:
        guards.send_signal(signals.execution_created, child)


def _in_flight(wait: Map) -> int:
    return len(wait.children) if wait.max_parallel is None else min(wait.max_parallel, len(wait.children))


def _children_of(wait: Map) -> Sequence[creating.NewExecution]:
    is_throttled = _in_flight(wait) < len(wait.children)
    return [_throttled(child) for child in wait.children] if is_throttled else wait.children


def _throttled(child: creating.NewExecution) -> creating.NewExecution:
    """Return the child with the mark that its end lets a sibling go."""
    options = dict(loads(child.options) or {})
    return dataclasses.replace(child, options=dump_options({**options, "throttled": True}))


def _open_child(execution: Execution, wait: Invocation, kind: StepKind) -> None:
    child = creating.queued_row(wait.child, execution, wait.step)
    child.save(force_insert=True, using=database())
    steps.open_invocation(
        execution,
        wait.step,
        child,
        payload_digest=wait.payload_digest,
        timeout=wait.timeout,
        on_timeout=wait.on_timeout,
        kind=kind,
    )
    guards.send_signal(signals.execution_created, child)
    if creating.is_due(wait.child):
        # A started child is to run beside its parent, not after it.
        ring = claiming.ring if kind == StepKind.INVOKE else dispatch.on_commit
        ring(child)
