"""What has happened to an execution, in order."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from django.utils.translation import gettext as _

from conductor_app.models import Step
from conductor_app.states import ExecutionStatus, StepKind
from conductor_app.telling.story import Story
from conductor_app.telling.words import duration, short_name


@dataclass(frozen=True)
class Moment:
    """Something that happened, or that will."""

    at: dt.datetime
    text: str


def history(story: Story) -> list[Moment]:
    """Return what has happened to an execution, as far as its rows tell, and what will; in order.

    There is no table of moves: the time of a failed attempt, and of a wake-up's next run, is not kept.
    """
    return sorted(_moments(story), key=lambda moment: moment.at)


def shortened(moments: list[Moment], most: int) -> list[Moment]:
    """Return the first and the last moments, and in their middle how many are left out."""
    if len(moments) <= most:
        return moments
    half = most // 2
    hidden = len(moments) - 2 * half
    left_out = Moment(moments[half].at, _("… %(count)s more") % {"count": f"{hidden:,}"})
    return [*moments[:half], left_out, *moments[-half:]]


def _moments(story: Story) -> Iterator[Moment]:
    execution, now = story.execution, story.now
    queued = _('queued by its parent, for step "%(step)s"') if execution.parent_id else _('queued in queue "%(queue)s"')
    yield Moment(execution.created_at, queued % {"step": execution.step, "queue": execution.queue})
    if execution.started_at is not None:
        yield Moment(execution.started_at, _("first run started"))
    for attempt, at in attempts_begun(story.steps):
        yield Moment(at, _("attempt %(attempt)d under way") % {"attempt": attempt})
    for step in story.steps:
        yield from _step_moments(step, story)
    due_at = execution.due_at if execution.status == ExecutionStatus.QUEUED else None
    if due_at is not None and due_at > execution.created_at:
        yield Moment(due_at, _("queued again") if due_at <= now else _("due"))
    if execution.cancel_requested_at is not None:
        reason = execution.cancel_reason.rstrip(": ")
        requested = _("cancel requested: %(reason)s") % {"reason": reason} if reason else _("cancel requested")
        yield Moment(execution.cancel_requested_at, requested)
    if execution.status == ExecutionStatus.RUNNING and execution.lease_expires_at is not None:
        yield Moment(execution.lease_expires_at, _("its lease expires, unless it is renewed"))
    if execution.finished_at is not None:
        yield Moment(execution.finished_at, execution.get_status_display())


def attempts_begun(steps: Iterable[Step]) -> list[tuple[int, dt.datetime]]:
    """Return each attempt after the first with the time of its first new step: it has begun by then."""
    first: dict[int, dt.datetime] = {}
    for step in steps:
        if step.attempt > 1:
            first[step.attempt] = min(first.get(step.attempt, step.created_at), step.created_at)
    return sorted(first.items())


def _step_moments(step: Step, story: Story) -> Iterator[Moment]:
    values = {"step": step.name, "status": step.get_status_display()}
    if step.kind == StepKind.STEP:
        yield Moment(step.created_at, _('step "%(step)s" %(status)s') % values)
        return
    yield Moment(step.created_at, _begun(step))
    child = story.child_of(step)
    if child is not None and child.started_at is not None:
        values |= {
            "task": short_name(child.task),
            "time": duration((child.started_at - child.created_at).total_seconds()),
        }
        yield Moment(child.started_at, _('step "%(step)s": %(task)s started after %(time)s in the queue') % values)
    if step.finished_at is not None:
        values["time"] = duration((step.finished_at - step.created_at).total_seconds())
        yield Moment(step.finished_at, _('step "%(step)s" %(status)s after %(time)s') % values)
    elif step.deadline_at is not None and not story.execution.is_final:
        ends = _('step "%(step)s" ends') if step.kind == StepKind.SLEEP else _('step "%(step)s" times out')
        yield Moment(step.deadline_at, ends % values)


def _begun(step: Step) -> str:
    values = {"step": step.name, "task": short_name(step.task), "event": step.task, "count": f"{step.total or 0:,}"}
    match step.kind:
        case StepKind.INVOKE:
            text = _('step "%(step)s": %(task)s queued, waits for it; no worker is held')
        case StepKind.START:
            text = _('step "%(step)s": %(task)s queued; goes on')
        case StepKind.MAP:
            text = _('step "%(step)s": %(count)s %(task)s queued, waits for them; no worker is held')
        case StepKind.GATHER:
            text = _('step "%(step)s": waits for %(count)s started children; no worker is held')
        case StepKind.SLEEP:
            text = _('step "%(step)s": sleeps; no worker is held')
        case StepKind.EVENT:
            text = _('step "%(step)s": waits for the event "%(event)s"; no worker is held')
        case _:
            text = _('step "%(step)s": waits; no worker is held')
    return text % values
