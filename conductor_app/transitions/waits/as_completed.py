"""``ctx.as_completed``: several steps, one after another as they are decided. Each wait for more of them is a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.children import ManyKind
from conductor_app.transitions.waits.members import MembersWait, decide_by_hand, forget_messages, in_flight


@dataclass(frozen=True)
class AsCompleted(MembersWait):
    """Steps of which those are awaited that are decided next."""

    kind = StepKind.AS_COMPLETED

    @property
    def takes_all(self) -> bool:
        """It does: what has been decided meanwhile comes at once."""
        return True

    def in_order(self, decided: Mapping[str, Step]) -> Iterable[str]:
        """Return those first that were decided, in that order."""
        finished = sorted((step for step in decided.values()), key=lambda step: _place(step, self.members))
        names = [step.name for step in finished]
        return [*names, *(name for name in self.members if name not in decided)]


def _place(step: Step, members: Iterable[str]) -> Any:
    return step.finished_at, list(members).index(step.name)


class AsCompletedKind(ManyKind):
    """A wait for those that are decided next."""

    has_members = True
    is_decided_by_one = True

    def decided(self, step: Step, *, by: str | None) -> None:
        """Leave the events in the mailbox that have not come first."""
        del by
        forget_messages(step)

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Delete it: the next run waits for its members again."""
        yield from ()
        Step.objects.using(database()).filter(pk=step.pk).delete()
        return Next.RUN

    def in_flight(self) -> QuerySet[Any] | None:
        """Return its undecided members that go on."""
        return in_flight()

    def recount(self, step: Step) -> None:
        """Decide it by one of its members that are decided."""
        decide_by_hand(step)

    def words(self, step: Step) -> Words:
        """Return what is said of it."""
        return Words(
            begun=_('step "%(step)s": waits for the next of %(total)s; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_('Waiting for the next of %(total)s (step "%(step)s") since %(time)s ago. No worker is held.'),
            resumes=_("when the next of them is decided"),
            what=_("The next of %(total)s."),
            then=(_("It resumes %(condition)s.") % {"condition": _("when the next of them is decided")},),
        )


KIND = AsCompletedKind()
