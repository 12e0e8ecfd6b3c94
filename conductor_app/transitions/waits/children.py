"""What kinds of waits have in common that have children."""

from __future__ import annotations

import uuid

from django.utils.translation import gettext as _

from conductor_app.exceptions import Failure, OutcomeLost, RetryRefused
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, OnTimeout
from conductor_app.transitions import cancelling, guards, reopening, steps
from conductor_app.transitions.kinds import Kind, Walk
from conductor_app.values.failures import dump_failure


class ChildKind(Kind):
    """A step that stands for one child."""

    has_child = True

    def cancel_late(self, step: Step) -> None:
        """Ask the child to stop. If it is just ending, this waits for its commit."""
        if step.child_id is not None:
            cancelling.flag(step.child_id, steps.late_reason(step))

    def held_by(self, child_id: uuid.UUID | None) -> str:
        """Return what has become of the child."""
        child = "the child that held it" if child_id is None else f"the child {child_id}, which held it,"
        return f"{child} has been deleted or changed"


class ManyKind(Kind):
    """A step that counts children."""

    def held_by(self, child_id: uuid.UUID | None) -> str:
        """Return what has become of the children."""
        return "a child that held a part of it has been deleted or changed"


def forgotten(execution: Execution, step: str) -> OutcomeLost | None:
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


def reopen_child(execution: Execution, step: Step) -> Walk:
    """Reopen the child behind a step; tell whether there is something to wait for."""
    child = Execution.objects.using(database()).filter(pk=step.child_id).first() if step.child_id else None
    if child is None:
        raise RetryRefused(
            f"The child of step {step.name!r} of execution {execution.pk} has been deleted, and its outcome with it. "
            "Start a new execution instead.",
            reason="a child of it has been deleted",
        )
    if child.status == ExecutionStatus.SUCCEEDED or not (yield reopening.let_go_on(child)):
        steps.adopt(step)
        return False
    steps.reopen(step)
    return True


def deleted_error() -> str:
    """Return the error with which a step is decided whose child was deleted before it had ended, as stored text."""
    return dump_failure(Failure(type="Cancelled", message="Cancelled: its row was deleted"))


def late_words(step: Step) -> str:
    """Return what is said of the deadline of a step with children."""
    if step.on_timeout == OnTimeout.ABANDON:
        return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs goes on.")
    return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs is cancelled.")


def when_all_have_ended(step: Step) -> str:
    """Return when a step is decided that counts children."""
    if step.max_failures is not None and step.counted is not None:
        return _("once, when enough have succeeded or too many have failed")
    if step.max_failures is not None:
        return _("once, when all have finished or too many have failed")
    if step.fails_fast:
        return _("once, when all have finished or one has failed")
    return _("once, when all have finished")
