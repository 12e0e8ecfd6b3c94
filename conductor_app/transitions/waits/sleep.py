"""``ctx.sleep`` and ``ctx.sleep_until``: nothing happens until an instant has come."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import steps
from conductor_app.transitions.kinds import Kind, Next, Walk, Words
from conductor_app.transitions.waits.wait import Wait


@dataclass(frozen=True)
class Sleep(Wait):
    """A sleep that has not begun yet."""

    seconds: float | None = None
    until: dt.datetime | None = None

    kind = StepKind.SLEEP

    def open(self, execution: Execution) -> bool:
        """Insert the pending step that the sweeper settles at its instant."""
        until: Any = clock.after(self.seconds) if self.seconds is not None else self.until
        steps.insert(execution, self.step, StepKind.SLEEP, deadline_at=until)
        return True

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Its seconds, or its instant."""
        return (self.until if self.seconds is None else self.seconds,)

    @property
    def due_in(self) -> float | None:
        """Its seconds."""
        return self.seconds or None


class SleepKind(Kind):
    """A sleep."""

    is_lasting = True
    ends_with_execution = True
    is_until_instant = True
    when_overdue = StepStatus.SUCCEEDED
    wakes_alone = True
    status_word = "sleeping"

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Let a sleep that a cancel has ended go on, until the same instant."""
        yield from ()
        steps.resume(step)
        return Next.WAIT

    def words(self, step: Step) -> Words:
        """Return what is said of a sleep."""
        waits = _('Sleeping (step "%(step)s"). No worker is held.')
        if step.deadline_at is not None:
            waits = _('Sleeping (step "%(step)s") until %(instant)s (%(when)s). No worker is held.')
        return Words(
            begun=_('step "%(step)s": sleeps; no worker is held'),
            ends=_('step "%(step)s" ends'),
            waits=waits,
            resumes="",
            what=_("The end of a sleep."),
            then=(_("It resumes by itself."),),
        )


KIND = SleepKind()
