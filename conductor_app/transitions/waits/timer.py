"""``ctx.timer``: an instant that is awaited beside other things."""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from conductor_app.exceptions import CancelExecution
from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import guards, running, steps
from conductor_app.transitions.kinds import Next, Walk, Words
from conductor_app.transitions.waits.members import MemberKind


def start_timer(execution: Execution, name: str, seconds: float) -> steps.Memory:
    """Insert the step of a timer that begins now, and return what is remembered of it.

    Raises:
        LeaseLost: Another run has taken over; nothing is stored.
        CancelExecution: The execution is to be cancelled; nothing is stored.
    """

    def work() -> None:
        with transaction.atomic(using=database()):
            if running.lock_held(execution):
                raise CancelExecution
            is_over = seconds <= 0
            steps.insert(
                execution,
                name,
                StepKind.TIMER,
                status=StepStatus.SUCCEEDED if is_over else StepStatus.PENDING,
                deadline_at=clock.after(seconds),
                finished_at=clock.now() if is_over else None,
            )

    unless_started: IntegrityError | None = None
    try:
        guards.persist(work)
    except IntegrityError as error:
        unless_started = error
    # It is there already if this run's COMMIT got no answer.
    started = guards.patiently(lambda: steps.recall(execution.pk, name)).get(name)
    if started is None:
        raise unless_started or guards.lease_lost(execution)
    return started


class TimerKind(MemberKind):
    """A timer."""

    ends_with_execution = True
    when_overdue = StepStatus.SUCCEEDED

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Let one that a cancel has ended go on, until the same instant."""
        yield from ()
        steps.resume(step)
        return Next.ANYTHING

    def words(self, step: Step) -> Words:
        """Return what is said of a timer; a headline has what waits for it instead."""
        return Words(
            begun=_('step "%(step)s": a timer begins'),
            ends=_('step "%(step)s" ends'),
            waits="",
            resumes="",
            what=_("The end of a timer."),
            then=(),
        )


KIND = TimerKind()
