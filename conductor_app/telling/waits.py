"""What an execution waits for, and what happens then."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus
from conductor_app.telling.hints import add_worker, start_worker
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
from conductor_app.transitions import kinds
from conductor_app.transitions.kinds import Words


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
    return [_awaited(step, situation) for step in _awaited_steps(situation)]


def _awaited_steps(situation: Situation) -> list[Step]:
    """Return the undecided steps, without those for which nobody waits: a started child has its gather for that."""
    return [step for step in situation.pending if kinds.of(step.kind).suspends]


def _awaited(step: Step, situation: Situation) -> Awaited:
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    words = kinds.of(step.kind).words(step)
    values = values_of(step, words, situation.now)
    then = [text % values for text in words.then]
    if step.deadline_at is not None and words.at_deadline:
        then.append(words.at_deadline % values)
    return Awaited(step, words.what % values, tuple(then), child)


def values_of(step: Step, words: Words, now: dt.datetime) -> dict[str, str]:
    """Return what stands in the places of the words that are said of a step."""
    values = {
        "step": step.name,
        "task": short_name(step.task),
        "event": step.task,
        "execution": str(step.execution_id),
        "left": f"{step.remaining or 0:,}",
        "total": f"{step.total or 0:,}",
        "needed": f"{(step.total or 0) - (step.max_failures or 0):,}",
        "limit": f"{step.max_parallel or 0:,}",
        "time": since(step.created_at, now),
    }
    if step.deadline_at is not None:
        values |= dated(step.deadline_at, now)
    return {**values, "children": words.children % values}


def waiting(situation: Situation) -> Headline:
    """Return what an execution waits for, since when, and when it resumes."""
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    pending = _awaited_steps(situation)
    if execution.cancel_requested_at is not None:
        return Headline(mark, _("Waiting, and cancelled at the next sweep."))
    if not pending:
        return Headline(mark, _("Waiting for nothing: what it waited for is decided. The sweeper wakes it."))
    hints = tuple(hint for step in pending if (hint := _hint(step, now)))
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
    if kinds.of(step.kind).has_child:
        return _waiting_for_child(step, situation)
    return Headline(mark, _waiting_for(step, now), hints)


def _hint(step: Step, now: dt.datetime) -> str:
    words = kinds.of(step.kind).words(step)
    return words.hint % values_of(step, words, now)


def _waiting_for(step: Step, now: dt.datetime) -> str:
    words = kinds.of(step.kind).words(step)
    waits = words.waits % values_of(step, words, now)
    return f"{waits} {_resumes(words.resumes, [step], now)}" if words.resumes else waits


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
    sentences = [_waiting_for(step, now)]
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
