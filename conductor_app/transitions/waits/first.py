"""``ctx.first``: whichever of several steps is decided first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step, database
from conductor_app.states import OnTimeout, StepKind, StepStatus
from conductor_app.store.locks import locked
from conductor_app.transitions import cancelling, guards, steps, waking
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ManyKind
from conductor_app.transitions.waits.members import (
    MembersWait,
    cancel_unstarted,
    children_of,
    decide_by_hand,
    forget_messages,
    in_flight,
)


@dataclass(frozen=True)
class First(MembersWait):
    """Steps of which the one is awaited that is decided first, or that succeeds first."""

    #: What becomes of the children behind the others.
    losers: OnTimeout = OnTimeout.ABANDON

    kind = StepKind.FIRST

    def values(self) -> dict[str, Any]:
        """Return what becomes of the losers."""
        return {"on_timeout": self.losers}


def cancel_losers(execution: Execution, name: str) -> None:
    """Cancel the losers that somebody had locked when the step was decided.

    Raises:
        LeaseLost: Another run has taken over.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            guards.must_hold(execution)
            group = steps.of(execution.pk, name).get()
            children = children_of(group)
            for row in waking.cancel_unstarted(children, _lost(name)):
                steps.settle(execution.pk, row.step, StepStatus.CANCELLED, error=row.error)
            cancelling.flag_all(children, _lost(name))

    guards.persist(work)


def _lost(name: str) -> str:
    return f'it was not the first in step "{name}" of its parent'


class FirstKind(ManyKind):
    """A wait for the first of several."""

    has_members = True
    is_decided_by_one = True

    def decided(self, step: Step, *, by: str | None) -> None:
        """Leave the losing events in the mailbox, and ask the losing children to stop if they are to."""
        del by
        forget_messages(step)
        if step.on_timeout == OnTimeout.CANCEL:
            cancel_unstarted(step, _lost(step.name))
            # Past those that are locked: one of them may be ending, and wait for this step. The next run sees to it.
            free = locked(children_of(step).open().unasked(), skip=True).values_list("pk", flat=True)
            cancelling.flag_all(Execution.objects.using(database()).filter(pk__in=list(free)), _lost(step.name))

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Delete it: the next run waits for its members again."""
        yield from ()
        Step.objects.using(database()).filter(pk=step.pk).delete()
        return Next.RUN

    def in_flight(self) -> QuerySet[Any] | None:
        """Return its undecided members that go on."""
        return in_flight()

    def recount(self, step: Step) -> None:
        """Decide it by those of its members that are decided."""
        decide_by_hand(step)

    def words(self, step: Step) -> Words:
        """Return what is said of it."""
        resumes = _("when the first of them is decided")
        if step.max_failures is not None:
            resumes = _("when the first of them has succeeded, or all have failed")
        return Words(
            begun=_('step "%(step)s": waits for the first of %(total)s; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_('Waiting for the first of %(total)s (step "%(step)s") since %(time)s ago. No worker is held.'),
            resumes=resumes,
            what=_("The first of %(total)s."),
            then=(_("It resumes %(condition)s.") % {"condition": resumes},),
        )


KIND = FirstKind()
