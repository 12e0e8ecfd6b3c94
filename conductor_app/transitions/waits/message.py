"""``ctx.event``: an event that is awaited beside other things. What waits for it takes it, if it counts there.

Its step is there while something waits for it, and once it is taken. How it is sent is in ``event``.
"""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from conductor_app.exceptions import CancelExecution
from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.transitions import guards, mailbox, running, steps
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.members import MemberKind


def take_if_there(execution: Execution, name: str, event: str) -> None:
    """Take an event that has been sent, if there is one; without waiting.

    Raises:
        LeaseLost: Another run has taken over; nothing is stored.
        CancelExecution: The execution is to be cancelled; nothing is stored.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            if running.lock_held(execution):
                raise CancelExecution
            step = steps.insert(execution, name, StepKind.MESSAGE, task=event)
            payload = mailbox.take(step)
            if payload is None:
                transaction.set_rollback(True, using=database())
            else:
                steps.settle(execution.pk, name, StepStatus.SUCCEEDED, result=payload)

    try:
        guards.persist(work)
    except IntegrityError:
        if not steps.of(execution.pk, name).exists():
            raise
        # It is taken already: this run's COMMIT got no answer.


class MessageKind(MemberKind):
    """An event that is awaited beside other things."""

    ends_with_execution = True
    comes_after_group = True
    noun, verb = "event", "waits for"

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Delete it: whatever waits for it opens it again."""
        yield from ()
        Step.objects.using(database()).filter(pk=step.pk).delete()
        return Next.ANYTHING

    def named(self, step: Step) -> str:
        """Return the event's name."""
        return f'event "{step.task}"'

    def words(self, step: Step) -> Words:
        """Return what is said of it; a headline has what waits for it instead."""
        return Words(
            begun=_('step "%(step)s": the event "%(event)s" is awaited'),
            ends=_('step "%(step)s" times out'),
            waits="",
            resumes="",
            what=_('The event "%(event)s".'),
            then=(),
        )


KIND = MessageKind()
