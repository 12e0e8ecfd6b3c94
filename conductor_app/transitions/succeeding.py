"""End a run that has returned, and wake its parent."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from django.db import transaction
from django.db.models import Exists, Q
from django.db.models.lookups import Exact

from conductor_app import signals
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, RunOutcome, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.moves import Lock, Move, Update
from conductor_app.store.slots import NOW, Found, after, column, given
from conductor_app.transitions import claiming, dispatch, guards, kinds, parts, uniqueness, waking

_SUCCEEDED = {
    "result": given(Execution, "result"),
    "error": None,
    **parts.NO_LEASE,
    **parts.FINAL,
    "finished_at": NOW,
    "announce_at": after("announce_in"),
    "status": ExecutionStatus.SUCCEEDED,
}
#: A late child keeps its result.
_MAY_SUCCEED = parts.HELD & parts.UNASKED
_RUN_SUCCEEDED = parts.run_ended(RunOutcome.SUCCEEDED)
_SUCCEED = Move(Update("ended", Execution, _MAY_SUCCEED, _SUCCEEDED), _RUN_SUCCEEDED)


@functools.cache
def _succeed_child(kind: StepKind) -> Move:
    """Return the end of a child that is all of its parent's invocation, or one of a map; and its parent's wake-up.

    Nothing is written for a step of another kind, or that is gone. A step that is settled stays as it is, and so does
    the parent.
    """
    of_kind = Step.objects.using(database()).filter(
        execution_id=given(Step, "execution_id", "parent"), name=given(Step, "name", "step"), kind=kind.value
    )
    parent = Found("child", "parent_id", column(Execution, "parent_id"))
    settled, status = (Found("settled", name, column(Step, name)) for name in ("execution_id", "status"))
    return Move(
        Update("child", Execution, _MAY_SUCCEED & Q(Exists(of_kind)), _SUCCEEDED, returning=["parent_id"]),
        _RUN_SUCCEEDED,
        # A step that an operator's retry is just reopening is pending once it is locked; the statement may not see it.
        Lock(
            "entry",
            Step,
            Q(execution_id=parent, name=given(Step, "name", "step")),
            finds=[("is_open", parts.flag(Q(status=StepStatus.PENDING)))],
        ),
        Update(
            "settled",
            Step,
            Q(Found("entry", "is_open")),
            kinds.of(kind).when_child_succeeds or {},
            of="entry",
            returning=["execution_id", "status"],
        ),
        *waking.wake_by(Q(id=settled) & ~Q(Exact(status, StepStatus.PENDING.value))),
        tells=["parent"],
    )


def succeed(execution: Execution, result: str, hand_off: claiming.HandOff | None = None) -> None:
    """running → succeeded, with the stored result; wakes the parent.

    Args:
        hand_off: Gets the parent, if that was woken.

    Raises:
        LeaseLost: Another run has taken over; the result is discarded.
        CancelExecution: The execution is to be cancelled instead; ``cancel_running`` keeps the result.
    """

    using = database()
    announce_in = guards.announcement_delay(execution, running=True)
    outcome = {
        **parts.ran(execution),
        "result": result,
        "announce_in": None if announce_in is None else clock.interval(announce_in),
    }

    def work() -> None:
        if _succeed_with_parent(execution, outcome, hand_off):
            return
        is_alone = execution.parent_id is None and execution.own_key is None
        with contextlib.nullcontext() if is_alone else transaction.atomic(using=using):
            if not _SUCCEED.make(using, savepoint=is_alone, **outcome):
                raise guards.refusal(execution)
            with claiming.handing_off(hand_off):
                waking.settle_parent(execution, StepStatus.SUCCEEDED)
            uniqueness.release_successor(execution)
            _tell(execution)

    is_recorded = functools.partial(guards.is_mine, execution, status=ExecutionStatus.SUCCEEDED, result=result)
    guards.persist(work, unless_already=is_recorded)


def _succeed_with_parent(execution: Execution, outcome: dict[str, Any], hand_off: claiming.HandOff | None) -> bool:
    """End a child, and wake its parent, in one move; ``False`` if that has refused, or is not enough."""
    if execution.parent_id is None:
        return False
    if execution.position is not None and execution.get_options().get("throttled"):
        return False  # its end lets a sibling go
    if execution.own_key is not None:
        return False  # its end lets whoever has its key by now go
    # What is known of the parent here does not change while that waits; how it stands, the move looks at.
    parent = None if hand_off is None else hand_off.recalls(execution.parent_id)
    offer = hand_off if parent is not None and hand_off is not None and hand_off.wants(parent) else None
    rows = _succeed_child(StepKind.INVOKE if execution.position is None else StepKind.MAP).make(
        database(),
        **outcome,
        parent=execution.parent_id,
        step=execution.step,
        known=-1 if parent is None else parent.fence,
        is_claimed=offer is not None,
        **parts.lease("" if offer is None else offer.owner),
        **parts.published(dispatch.first_publication(execution.root_id)),
    )
    if not rows:
        return False
    woken, is_claimed = waking.woken(rows[0], parent, offer)
    if woken is not None and offer is not None and is_claimed:
        offer.confirm(woken)
    elif woken is not None and woken.status == ExecutionStatus.QUEUED:
        # A claim of its own, just after the commit that woke it; as with a message, the sweeper makes up for a process
        # that dies between the two. It may have been queued before: a second ring of the bell is harmless.
        claiming.pass_on(woken, hand_off)
    _tell(execution)
    return True


def _tell(execution: Execution) -> None:
    guards.send_signal(signals.run_ended, execution, outcome=RunOutcome.SUCCEEDED)
    guards.send_signal(signals.execution_finished, execution, status=ExecutionStatus.SUCCEEDED)
