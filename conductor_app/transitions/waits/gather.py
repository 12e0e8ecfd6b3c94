"""``ctx.gather``: wait for started children together. How they count it down is in ``start``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import OuterRef, QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step, database
from conductor_app.states import OPEN_STATUSES, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import guards, running, steps, waking
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ManyKind, late_words, when_all_have_ended
from conductor_app.transitions.waits.wait import Wait
from conductor_app.values.payloads import dumps


@dataclass(frozen=True)
class Gather(Wait):
    """Started children that are awaited together."""

    #: Names of the steps that started them.
    members: Sequence[str]
    fails_fast: bool

    kind = StepKind.GATHER

    @property
    def opens_first(self) -> bool:
        """It does: a gather of children that had ended needs no wait."""
        return True

    def is_there(self, execution: Execution) -> bool:
        """Record the gather; tell whether there is nothing left to wait for."""
        return _is_gathered(execution, self)


def _is_gathered(execution: Execution, wait: Gather) -> bool:
    # Steps before executions, as everywhere: a member that is just ending holds its step and then asks for the
    # execution's row.
    guards.must_hold(execution)
    gather = _open(execution, wait.step, wait.members, fails_fast=wait.fails_fast)
    if gather.status == StepStatus.PENDING:
        return False
    running.lock_held(execution)  # what a run records, it records while it holds its execution
    return True


def _open(execution: Execution, name: str, members: Sequence[str], *, fails_fast: bool) -> Step:
    """Insert the step that waits for the undecided ones of ``members``, and settle it at once if nothing is awaited.

    The members are locked: one that is just being decided is either counted here as decided, or counts this down.
    """
    using = database()
    gather = steps.insert(
        execution,
        name,
        StepKind.GATHER,
        total=len(members),
        remaining=len(members),
        fails_fast=fails_fast,
        result=dumps(list(members), "members"),
    )
    rows = Step.objects.using(using).filter(execution_id=execution.pk, name__in=members)
    gather.remaining = rows.filter(status=StepStatus.PENDING).update(group=gather)
    failed: dict[str, Step] = {}
    if fails_fast:
        undone = rows.exclude(status__in=[StepStatus.PENDING, StepStatus.SUCCEEDED])
        failed = {step.name: step for step in undone.only("name", "status", "error", "child_id")}
    values: dict[str, Any] = {"remaining": gather.remaining}
    first = next((failed[name] for name in members if name in failed), None)
    if first is not None:
        gather.status = first.status
        values.update(status=first.status, error=first.error, child_id=first.child_id, finished_at=clock.now())
    elif not gather.remaining:
        gather.status = StepStatus.SUCCEEDED
        values.update(status=StepStatus.SUCCEEDED, finished_at=clock.now())
    Step.objects.using(using).filter(pk=gather.pk).update(**values)
    return gather


class GatherKind(ManyKind):
    """A gather."""

    has_members = True

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Delete it: the next run waits for its members again."""
        yield from ()
        Step.objects.using(database()).filter(pk=step.pk).delete()
        return Next.RUN

    def in_flight(self) -> QuerySet[Any] | None:
        """Return its undecided members whose children go on."""
        # By execution and not by group: an index has the execution.
        return Step.objects.using(database()).filter(
            execution=OuterRef("execution_id"),
            group=OuterRef("pk"),
            status=StepStatus.PENDING,
            child__status__in=sorted(OPEN_STATUSES),
        )

    def recount(self, step: Step) -> None:
        """Decide it: those of its members that had ended have just been settled, and counted it down."""
        waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)

    def words(self, step: Step) -> Words:
        """Return what is said of a gather."""
        is_counted = step.remaining is not None and step.total is not None
        return Words(
            begun=_('step "%(step)s": waits for %(total)s started children; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_("Waiting for %(children)s since %(time)s ago. No worker is held."),
            resumes=when_all_have_ended(step),
            what=_("%(children)s."),
            then=(_("It resumes %(condition)s.") % {"condition": when_all_have_ended(step)},),
            at_deadline=late_words(step),
            children=_("%(left)s of %(total)s started children") if is_counted else _("the started children"),
        )


KIND = GatherKind()
