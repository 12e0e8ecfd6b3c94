"""What an execution waits for, and what happens then."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind
from conductor_app.telling.hints import add_worker, send_hint, start_worker
from conductor_app.telling.labels import MARKS, label
from conductor_app.telling.queues import is_unanswered
from conductor_app.telling.situation import Headline, Situation
from conductor_app.telling.words import (
    attempt_of,
    dated,
    duration,
    quoted,
    reason,
    short_name,
    since,
)

#: Kinds of steps for which an execution does not hold a worker.
WAITING_KINDS = frozenset({StepKind.INVOKE, StepKind.MAP, StepKind.GATHER, StepKind.SLEEP, StepKind.EVENT})


@dataclass(frozen=True)
class Awaited:
    """One step that an execution waits for, in the words of the admin's panel."""

    step: Step
    #: Whom or what it waits for.
    what: str
    #: What happens when it is decided, in whole sentences.
    then: tuple[str, ...]
    #: The child that stands behind it, if it is a single one and known.
    child: Execution | None = None


def awaited(situation: Situation) -> list[Awaited]:
    """Return what a waiting execution waits for, and what happens then, step by step."""
    if situation.execution.status != ExecutionStatus.WAITING:
        return []
    return [_awaited(step, situation) for step in situation.pending if step.kind != StepKind.START]


def _awaited(step: Step, situation: Situation) -> Awaited:
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    if step.kind == StepKind.SLEEP:
        return Awaited(step, _("The end of a sleep."), (_("It resumes by itself."),))
    if step.kind == StepKind.EVENT:
        what = _('The event "%(event)s".') % {"event": step.task}
        then = [_("It resumes with the event's payload."), send_hint(step)]
    elif step.kind in (StepKind.MAP, StepKind.GATHER):
        what = _("%(children)s.") % {"children": _children(step)}
        if step.kind == StepKind.MAP and step.max_parallel is not None:
            values = {"children": _children(step), "limit": f"{step.max_parallel:,}"}
            what = _("%(children)s, at most %(limit)s at once.") % values
        then = [_resumes(_when_decided(step), (), situation.now)]
        if step.kind == StepKind.MAP and step.fails_fast:
            then.append(_("If one fails, ChildFailed is raised here, and the others are cancelled."))
    else:
        what = _("%(task)s, a child.") % {"task": short_name(step.task)}
        then = [
            _("When it succeeds, this execution resumes with its result."),
            _("If it fails for good, ChildFailed is raised here: uncaught, it fails this execution, too."),
        ]
    if step.deadline_at is not None:
        then.append(_at_deadline(step) % dated(step.deadline_at, situation.now))
    return Awaited(step, what, tuple(then), child)


def _at_deadline(step: Step) -> str:
    if step.kind == StepKind.EVENT:
        return _("At %(instant)s (%(when)s) it times out: EventTimedOut is raised here.")
    if step.on_timeout == OnTimeout.ABANDON:
        return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs goes on.")
    return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs is cancelled.")


def waiting(situation: Situation) -> Headline:
    """Return what an execution waits for, since when, and when it resumes."""
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    # A child that was started is awaited by its gather alone.
    pending = [step for step in situation.pending if step.kind != StepKind.START]
    if execution.cancel_requested_at is not None:
        return Headline(mark, _("Waiting, and cancelled at the next sweep."))
    if not pending:
        return Headline(mark, _("Waiting for nothing: what it waited for is decided. The sweeper wakes it."))
    hints = tuple(send_hint(step) for step in pending if step.kind == StepKind.EVENT)
    if len(pending) > 1:
        values = {
            "count": len(pending),
            "names": quoted([step.name for step in pending]),
            "time": since(min(step.created_at for step in pending), now),
        }
        waits = _("Waiting for %(count)d steps (%(names)s) since %(time)s ago. No worker is held.") % values
        resumes = _resumes(_("when they are decided"), pending, now)
        return Headline(mark, f"{waits} {resumes}", hints)
    step = pending[0]
    if step.kind == StepKind.SLEEP:
        return Headline(mark, _sleeping(step, now))
    if step.kind in (StepKind.MAP, StepKind.GATHER):
        return Headline(mark, f"{_waiting_for_many(step, now)} {_resumes(_when_decided(step), pending, now)}")
    if step.kind == StepKind.EVENT:
        values = {"event": step.task, "step": step.name, "time": since(step.created_at, now)}
        waits = _('Waiting for the event "%(event)s" (step "%(step)s") since %(time)s ago. No worker is held.') % values
        resumes = _resumes(_("when the event is sent"), pending, now)
        return Headline(mark, f"{waits} {resumes}", hints)
    return _waiting_for_child(step, situation)


def _sleeping(step: Step, now: dt.datetime) -> str:
    if step.deadline_at is None:
        return _('Sleeping (step "%(step)s"). No worker is held.') % {"step": step.name}
    text = _('Sleeping (step "%(step)s") until %(instant)s (%(when)s). No worker is held.')
    return text % {"step": step.name, **dated(step.deadline_at, now)}


def _waiting_for_many(step: Step, now: dt.datetime) -> str:
    values = {"children": _children(step), "step": step.name, "time": since(step.created_at, now)}
    if step.kind == StepKind.GATHER:
        return _("Waiting for %(children)s since %(time)s ago. No worker is held.") % values
    if step.max_parallel is None:
        return _('Waiting for %(children)s (step "%(step)s") since %(time)s ago. No worker is held.') % values
    values["limit"] = f"{step.max_parallel:,}"
    text = _(
        'Waiting for %(children)s (step "%(step)s", at most %(limit)s at once) since %(time)s ago. No worker is held.'
    )
    return text % values


def _waiting_for_child(step: Step, situation: Situation) -> Headline:
    now = situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    values = {"task": short_name(step.task), "step": step.name, "time": since(step.created_at, now)}
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    if child is not None and is_unanswered(child, now):
        values |= {"time": duration((now - (child.due_at or now)).total_seconds()), "queue": child.queue}
        if situation.at_work:
            values["running"] = f"{situation.at_work:,}"
            return Headline(mark, _not_yet_taken(step, values, now), (add_worker(situation, child.queue),))
        return Headline(mark, _not_taken(step, values, now), (start_worker(situation, child.queue),))
    sentences = [
        _('Waiting for %(task)s (step "%(step)s") since %(time)s ago. No worker is held.') % values,
        _resumes(_("when that execution finishes"), [step], now),
    ]
    if child is not None:
        # ``admin.text`` marks the word for translators.
        values = {"status": _(label(child, now).word), "attempt": attempt_of(child.attempt, child.max_attempts)}
        sentences.append(_("That execution is %(status)s, %(attempt)s.") % values)
        if "error" not in child.get_deferred_fields() and child.put_off_because:
            sentences.append(_("It was put off before: %(reason)s") % {"reason": reason(child.put_off_because)})
    return Headline(mark, " ".join(sentences))


def _not_taken(step: Step, values: Mapping[str, str], now: dt.datetime) -> str:
    if step.deadline_at is None:
        text = _(
            'Waiting for %(task)s (step "%(step)s"), which has been queued for %(time)s: no worker took it from queue '
            '"%(queue)s".'
        )
        return text % values
    text = _(
        'Waiting for %(task)s (step "%(step)s"), which has been queued for %(time)s: no worker took it from queue '
        '"%(queue)s"; times out at %(instant)s (%(when)s).'
    )
    return text % {**values, **dated(step.deadline_at, now)}


def _not_yet_taken(step: Step, values: Mapping[str, str], now: dt.datetime) -> str:
    text = _(
        'Waiting for %(task)s (step "%(step)s"), which has been queued for %(time)s in queue "%(queue)s", whose '
        "workers are busy (%(running)s running)."
    )
    return f"{text % values} {_resumes(_('when that execution finishes'), [step], now)}"


def _resumes(condition: str, pending: Sequence[Step], now: dt.datetime) -> str:
    deadlines = [step.deadline_at for step in pending if step.deadline_at is not None]
    if not deadlines:
        return _("It resumes %(condition)s.") % {"condition": condition}
    text = _("It resumes %(condition)s; times out at %(instant)s (%(when)s).")
    return text % {"condition": condition, **dated(min(deadlines), now)}


def _when_decided(step: Step) -> str:
    if step.fails_fast:
        return _("once, when all have finished or one has failed")
    return _("once, when all have finished")


def _children(step: Step) -> str:
    """Return whom a map or a gather waits for."""
    values = {"task": short_name(step.task)}
    is_map = step.kind == StepKind.MAP
    if step.remaining is None or step.total is None:
        return _("the %(task)s") % values if is_map else _("the started children")
    values |= {"left": f"{step.remaining:,}", "total": f"{step.total:,}"}
    text = _("%(left)s of %(total)s %(task)s") if is_map else _("%(left)s of %(total)s started children")
    return text % values
