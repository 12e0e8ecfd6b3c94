"""``ctx.invoke``: one child, and its parent waits for it. ``start`` opens its child alike."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import BooleanField, Expression
from django.utils.translation import gettext as _

from conductor_app import signals
from conductor_app.exceptions import ReleaseExecution
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store.moves import Insert, Move, Part
from conductor_app.store.slots import NOW, Given, given
from conductor_app.transitions import claiming, creating, dispatch, guards, parts, pausing
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ChildKind, late_words, reopen_child
from conductor_app.transitions.waits.wait import Wait


@dataclass(frozen=True)
class Invocation(Wait):
    """A child that does not exist yet, and how long its parent waits for it."""

    child: creating.NewExecution
    payload_digest: str
    timeout: float | None
    on_timeout: OnTimeout

    kind = StepKind.INVOKE

    is_one_move = True

    @property
    def has_keys(self) -> bool:
        """Whether its child has one."""
        return self.child.unique is not None

    def suspend(self, execution: Execution, hand_off: claiming.HandOff | None, *, is_alone: bool) -> None:
        """Store the child, queued, or claimed if this process goes on with it."""
        child = creating.timeless_row(self.child, execution, self.step)
        has_times = creating.has_times(self.child)
        offer = hand_off if not has_times and hand_off is not None and hand_off.wants(child) else None
        timing = "timed" if has_times else "due" if offer is None else "claimed"
        # Claimed here, this process notices the loss with its next statement; else nobody would, until the lease ends.
        may_be_lost = is_alone and execution.has_attempts_left and child.has_attempts_left
        try:
            store_child(_SUSPEND[timing], execution, self, child, offer, may_be_lost=may_be_lost)
        except ReleaseExecution:
            if offer is None or not pausing.is_paused(child.task):
                raise
            # Whoever runs a child of a paused task looks at the row; so it is stored as one that nobody goes on with.
            offer.wanted = None
            offer = None
            store_child(_SUSPEND["due"], execution, self, child)
        if offer is not None:
            offer.confirm(child)
        elif creating.is_due(self.child):
            claiming.pass_on(child, hand_off if has_times else None)

    @property
    def due_in(self) -> float | None:
        """Its timeout."""
        return self.timeout or None

    @property
    def child_id(self) -> uuid.UUID | None:
        """The child."""
        return self.child.id

    @property
    def detail(self) -> str:
        """The child's task and id."""
        return f" ({self.child.task} {self.child.id})"


def opening(
    first: Sequence[Part], kind: StepKind, timing: dict[str, Any], may_be_lost: Expression | None = None
) -> Move:
    """Return the move of a run that stores a child, and the pending step that it will settle.

    Args:
        first: What becomes of the execution, and of its run.
        timing: When the child may start.
        may_be_lost: As for ``Move``.
    """
    own = {name: given(Execution, name, "child" if name == "id" else name) for name in creating.OWN}
    step = {**parts.OPENED, "kind": kind, "task": given(Step, "task"), "child_id": given(Step, "child_id", "child")}
    return Move(
        *first,
        Insert("child", Execution, {**creating.CHILD, **own, **timing}, returning=["created_at", "due_at"]),
        Insert("opened", Step, step),
        tells=["child"],
        may_be_lost=may_be_lost,
    )


_MAY_BE_LOST = Given("may_be_lost", BooleanField())
_WAIT = (parts.WAIT, parts.RUN_SUSPENDED)
_GO_ON = dataclasses.replace(parts.WAIT, where=parts.WAIT.where & parts.CHILD_IS_LET)
_SUSPEND = {
    "claimed": opening((_GO_ON, parts.RUN_SUSPENDED), StepKind.INVOKE, creating.CLAIMED, _MAY_BE_LOST),
    "due": opening(_WAIT, StepKind.INVOKE, parts.QUEUED),
    "timed": opening(_WAIT, StepKind.INVOKE, creating.timed(Given)),
}


def store_child(
    move: Move,
    execution: Execution,
    wait: Invocation,
    child: Execution,
    offer: claiming.HandOff | None = None,
    *,
    may_be_lost: bool = False,
) -> None:
    """Make a move that ``opening`` has returned; the child gets its status and instants.

    Args:
        child: Its row, without instants.
        offer: Who claims it.
        may_be_lost: Whether a crash of the database may undo it.

    Raises:
        LeaseLost, CancelExecution: Nothing is stored.
        ReleaseExecution: Nothing is stored, since somebody holds the execution; or has paused the task of a child that
            this process would go on with.
    """
    if offer is not None:
        start = parts.lease(offer.owner)
    else:
        start = parts.published(dispatch.first_publication(child.root_id))
        if creating.has_times(wait.child):
            start.update(creating.times(wait.child))
    rows = move.make(
        database(),
        child=child.pk,
        task=child.task,
        queue=child.queue,
        priority=child.priority,
        payload=child.payload,
        max_attempts=child.max_attempts,
        unique_key=child.unique_key,
        options=child.options,
        root_id=child.root_id,
        depth=child.depth,
        may_be_lost=may_be_lost,
        **start,
        **parts.opened(execution, wait.step, wait.payload_digest, wait.timeout, wait.on_timeout),
    )
    if not rows:
        raise guards.refusal_of_children(execution)
    child.created_at, child.due_at = rows[0]
    if offer is not None:
        child.status, child.fence, child.lease_owner = ExecutionStatus.RUNNING, 1, offer.owner
        child.started_at = child.run_started_at = child.created_at
    guards.send_signal(signals.execution_created, child)


class InvokeKind(ChildKind):
    """A child that is awaited; its end settles the step (``waking.settle_parent``)."""

    is_lasting = True
    wakes_alone = True
    when_child_succeeds = {"error": None, "finished_at": NOW, "status": StepStatus.SUCCEEDED}

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Reopen the child, and wait for it."""
        return Next.WAIT if (yield reopen_child(execution, step)) else Next.ANYTHING

    def words(self, step: Step) -> Words:
        """Return what is said of a child that is awaited."""
        return Words(
            begun=_('step "%(step)s": %(task)s queued, waits for it; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_('Waiting for %(task)s (step "%(step)s") since %(time)s ago. No worker is held.'),
            resumes=_("when that execution finishes"),
            what=_("%(task)s, a child."),
            then=(
                _("When it succeeds, this execution resumes with its result."),
                _("If it fails for good, ChildFailed is raised here: uncaught, it fails this execution, too."),
            ),
            at_deadline=late_words(step),
        )


KIND = InvokeKind()
