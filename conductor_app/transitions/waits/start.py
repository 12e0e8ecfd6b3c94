"""``ctx.start``: one child that runs beside its parent; a gather waits for it, if anything does."""

from __future__ import annotations

import uuid

from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.store.moves import Lock
from conductor_app.store.slots import Given
from conductor_app.transitions import creating, dispatch, guards, parts, steps, uniqueness, waking
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ChildKind, forgotten, late_words, reopen_child
from conductor_app.transitions.waits.invoke import Invocation, opening, store_child
from conductor_app.transitions.waits.members import children_of, pass_on

_HELD = Lock("parent", Execution, parts.MAY_HAVE_CHILDREN)
_START = {
    "due": opening([_HELD], StepKind.START, parts.QUEUED),
    "timed": opening([_HELD], StepKind.START, creating.timed(Given)),
}


def start_child(execution: Execution, wait: Invocation) -> steps.Memory:
    """Store a child that runs beside its parent, and return what the parent remembers of it.

    Raises:
        LeaseLost: Another run has taken over; nothing is stored.
        CancelExecution: The execution is to be cancelled; nothing is stored.
        ReleaseExecution: Somebody holds it; nothing is stored.
        OutcomeLost: It is there; somebody has deleted the step that stands for it.
        DuplicateExecution: An open execution has the child's unique key; nothing is stored.
    """

    def work() -> None:
        child = creating.timeless_row(wait.child, execution, wait.step)
        store_child(_START["timed" if creating.has_times(wait.child) else "due"], execution, wait, child)
        if creating.is_due(wait.child):
            dispatch.on_commit(child)  # it is to run beside its parent, not after it

    unless_started: IntegrityError | None = None
    try:
        guards.persist(work)
    except IntegrityError as error:
        unless_started = error
    # It is started already if this run's COMMIT got no answer.
    started = guards.patiently(lambda: steps.recall(execution.pk, wait.step)).get(wait.step)
    if started is None:
        lost = forgotten(execution, wait.step)
        if lost is None and unless_started is not None and wait.child.unique is not None:
            task, key = wait.child.task, wait.child.unique.key
            holder = guards.patiently(lambda: uniqueness.holder_of(task, key))
            if holder is None:  # it has just ended
                return start_child(execution, wait)
            raise uniqueness.duplicate(task, key, holder, wait.child.unique)
        raise lost or unless_started or guards.lease_lost(execution)
    return started


class StartKind(ChildKind):
    """A started child."""

    suspends = False

    def pass_on(self, step: Step, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None) -> None:
        """Count down what waits for it."""
        pass_on(step, status, error=error, root_id=root_id)

    def member_failed(
        self,
        execution_id: uuid.UUID,
        name: str,
        status: StepStatus,
        error: str | None,
        *,
        gather: int,
        only_overdue: bool,
        root_id: uuid.UUID | None,
    ) -> bool:
        """Decide a started child's step, its gather, and the steps of those that need not start any more."""
        with transaction.atomic(using=database()):
            # Children before steps, as everywhere.
            reason = f"its sibling {name} {status}"
            group = Step(pk=gather, execution_id=execution_id)
            siblings = waking.cancel_unstarted(children_of(group, beside=name), reason)
            step = steps.settle(execution_id, name, status, error=error, only_overdue=only_overdue)
            if step is None:
                transaction.set_rollback(True, using=database())
                return False
            # The cause first: it is what the gather raises.
            waking.pass_on(step, execution_id, status, error=error, root_id=root_id)
            for row in siblings:
                steps.settle(execution_id, row.step, StepStatus.CANCELLED, error=row.error)
        return True

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Reopen the child. Nothing waits for it alone: the body runs, and gathers again."""
        return Next.RUN if (yield reopen_child(execution, step)) else Next.ANYTHING

    def words(self, step: Step) -> Words:
        """Return what is said of a started child; a headline has its gather instead."""
        return Words(
            begun=_('step "%(step)s": %(task)s queued; goes on'),
            ends=_('step "%(step)s" times out'),
            waits="",
            resumes="",
            what=_("%(task)s, a child."),
            then=(),
            at_deadline=late_words(step),
        )


KIND = StartKind()
