"""``ctx.gather``: wait for started children together. How they count it down is in ``start``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.transitions import waking
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ManyKind, late_words, when_all_have_ended
from conductor_app.transitions.waits.members import MembersWait, cancel_unstarted, forget_messages, in_flight


@dataclass(frozen=True)
class Gather(MembersWait):
    """Started children that are awaited together."""

    kind = StepKind.GATHER


class GatherKind(ManyKind):
    """A gather."""

    has_members = True

    def decided(self, step: Step, *, by: str | None) -> None:
        """Cancel what need not start any more, unless all had to succeed: then that is done before."""
        del by
        forget_messages(step)
        if step.max_failures is not None and step.status != StepStatus.SUCCEEDED:
            cancel_unstarted(step, "too many of its siblings have failed")

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Delete it: the next run waits for its members again."""
        yield from ()
        Step.objects.using(database()).filter(pk=step.pk).delete()
        return Next.RUN

    def in_flight(self) -> QuerySet[Any] | None:
        """Return its undecided members whose children go on."""
        return in_flight()

    def recount(self, step: Step) -> None:
        """Decide it: those of its members that had ended have just been settled, and counted it down."""
        waking.settle(step.execution_id, step.name, StepStatus.SUCCEEDED)

    def words(self, step: Step) -> Words:
        """Return what is said of a gather."""
        is_counted = step.remaining is not None and step.total is not None
        children = _("%(left)s of %(total)s started children") if is_counted else _("the started children")
        if step.max_failures is not None:
            children = _("%(needed)s results of %(total)s started children")
        return Words(
            begun=_('step "%(step)s": waits for %(total)s started children; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_("Waiting for %(children)s since %(time)s ago. No worker is held."),
            resumes=when_all_have_ended(step),
            what=_("%(children)s."),
            then=(_("It resumes %(condition)s.") % {"condition": when_all_have_ended(step)},),
            at_deadline=late_words(step),
            children=children,
        )


KIND = GatherKind()
