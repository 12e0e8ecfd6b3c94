"""What has happened to an execution, in order."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.models import Attempt, Execution, Step
from conductor_app.states import ExecutionStatus, RunOutcome
from conductor_app.store import owners
from conductor_app.telling.attempts import queue_seconds, run_seconds
from conductor_app.telling.story import Story
from conductor_app.telling.waits import values_of
from conductor_app.telling.words import duration, first_line, seconds_between, short_name
from conductor_app.transitions import kinds

#: Characters of an error in a line.
_MESSAGE_LENGTH = 120


@dataclass(frozen=True)
class Moment:
    """Something that happened, or that will."""

    at: dt.datetime
    text: str


def history(story: Story) -> list[Moment]:
    """Return what has happened to an execution, as far as its rows tell, and what will; in order."""
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
    yield from _run_moments(story)
    copied = sum(step.is_copied for step in story.steps)
    if copied:
        hidden = story.step_count > len(story.steps)
        yield Moment(execution.created_at, _copied(copied, is_all=not hidden))
    for deed in story.deeds:
        yield Moment(deed.at, deed.text(execution))
    for step in story.steps:
        yield from _step_moments(step, story)
    due_at = execution.told_due_at
    if due_at is not None and due_at > execution.created_at:
        yield Moment(due_at, _("queued again") if due_at <= now else _("due"))
    if execution.cancel_requested_at is not None:
        reason = execution.cancel_reason.rstrip(": ")
        requested = _("cancel requested: %(reason)s") % {"reason": reason} if reason else _("cancel requested")
        yield Moment(execution.cancel_requested_at, requested)
    ends_at = story.situation.deadline
    if ends_at is not None and not execution.is_final and execution.cancel_requested_at is None:
        yield Moment(ends_at, _("the deadline of its tree: it is cancelled"))
    if execution.status == ExecutionStatus.RUNNING and execution.lease_expires_at is not None:
        yield Moment(execution.lease_expires_at, _("its lease expires, unless it is renewed"))
    if execution.finished_at is not None:
        yield Moment(execution.finished_at, execution.get_status_display())


def _copied(number: int, *, is_all: bool) -> str:
    """Return in words that steps were copied; of very many, only some are read."""
    if not is_all:
        return _("the outcomes of its first steps were copied from the execution that it was forked from")
    return ngettext(
        "the outcome of %(count)d step was copied from the execution that it was forked from",
        "the outcomes of %(count)d steps were copied from the execution that it was forked from",
        number,
    ) % {"count": number}


def _run_moments(story: Story) -> Iterator[Moment]:
    """Yield when each run after the first began, and what failed it or took it away."""
    execution = story.execution
    if not story.attempts:
        for attempt, at in attempts_begun(story.steps):
            yield Moment(at, _("attempt %(attempt)d under way") % {"attempt": attempt})
    for row in story.attempts:
        words = {
            "attempt": row.attempt,
            "worker": owners.shown(row.worker),
            "queued": duration(queue_seconds(row)),
            "time": duration(run_seconds(row)),
            "error": in_short(row),
        }
        if row.run > 1:
            yield Moment(row.started_at, _run_began() % words)
        if row.outcome in _ENDS:
            yield Moment(_end_of(row, execution), _ENDS[RunOutcome(row.outcome)]() % words)
    began = execution.run_started_at
    if execution.status == ExecutionStatus.RUNNING and execution.fence > 1 and began is not None:
        yield Moment(began, _run_began() % _of_current(execution))


def _end_of(row: Attempt, execution: Execution) -> dt.datetime:
    """Return when a run ended: not after the end of the execution, which the same transaction notes a moment before."""
    if execution.finished_at is None or row.run != execution.fence:
        return row.finished_at
    return min(row.finished_at, execution.finished_at)


def _of_current(execution: Execution) -> dict[str, Any]:
    began, due = execution.run_started_at, execution.due_at
    queued = 0.0 if began is None or due is None else seconds_between(due, began)
    return {
        "attempt": execution.attempt,
        "worker": owners.shown(execution.lease_owner),
        "queued": duration(queued),
    }


def in_short(attempt: Attempt) -> str:
    """Return the error of a run in a line: the class without its module, and the message's first line."""
    name = attempt.error_class.rpartition(".")[2]
    message = first_line(attempt.message, _MESSAGE_LENGTH)
    return f"{name}: {message}" if message else name


def _run_began() -> str:
    return _("attempt %(attempt)d: a run began on %(worker)s, after %(queued)s in the queue")


#: What is told of the end of a run; a wait and the execution's own end are told by the step, and by the status.
_ENDS = {
    RunOutcome.FAILED: lambda: _("attempt %(attempt)d failed for good after %(time)s: %(error)s"),
    RunOutcome.RETRIED: lambda: _("attempt %(attempt)d failed after %(time)s: %(error)s"),
    RunOutcome.LOST: lambda: _("attempt %(attempt)d was lost after %(time)s: %(error)s"),
    RunOutcome.RELEASED: lambda: _("%(worker)s gave it back after %(time)s"),
}


def attempts_begun(steps: Iterable[Step]) -> list[tuple[int, dt.datetime]]:
    """Return each attempt after the first with the time of its first new step: it has begun by then."""
    first: dict[int, dt.datetime] = {}
    for step in steps:
        if step.attempt > 1:
            first[step.attempt] = min(first.get(step.attempt, step.created_at), step.created_at)
    return sorted(first.items())


def _step_moments(step: Step, story: Story) -> Iterator[Moment]:
    if step.is_copied:
        return  # told of all together
    kind = kinds.of(step.kind)
    words = kind.words(step)
    values = {**values_of(step, words, story.now), "status": step.get_status_display()}
    yield Moment(step.created_at, words.begun % values)
    if not kind.is_wait:
        return
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
        yield Moment(step.deadline_at, words.ends % values)
