"""How an execution has ended."""

from __future__ import annotations

import uuid

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.telling.hints import mismatch_hint, retry_hint
from conductor_app.telling.labels import MARKS
from conductor_app.telling.situation import Headline, Situation
from conductor_app.telling.words import (
    attempt_of,
    first_line,
    sentence,
    short_name,
    since,
)
from conductor_app.transitions import kinds
from conductor_app.values.failures import load_failure


def succeeded(situation: Situation) -> Headline:
    """Return when an execution succeeded, and how long it took."""
    execution = situation.execution
    finished_at = execution.finished_at or situation.now
    values = {"since": since(finished_at, situation.now), "took": since(execution.created_at, finished_at)}
    return Headline(MARKS[ExecutionStatus.SUCCEEDED], _("Succeeded %(since)s ago in %(took)s.") % values)


def failed(situation: Situation) -> Headline:
    """Return why an execution failed, where, and how to run it again."""
    execution = situation.execution
    mark = MARKS[ExecutionStatus.FAILED]
    failure = situation.failures.get(execution.pk)
    own = load_failure(execution.error)
    message = first_line(own.message)
    if failure is None or not failure.step:
        made = execution.attempt if failure is None else failure.attempts
        text = _("Failed: %(message)s (%(error)s, %(attempt)s).") if message else _("Failed (%(error)s, %(attempt)s).")
        text %= {
            "message": message,
            "error": short_name(own.type),
            "attempt": attempt_of(made, execution.max_attempts),
        }
        return Headline(mark, text, (*mismatch_hint(own.type), *retry_hint(situation)))
    values = {"step": failure.step, "message": message}
    step = next((step for step in situation.steps if step.name == failure.step), None)
    if step is not None and step.status == StepStatus.TIMED_OUT:
        text = _('Timed out at step "%(step)s": %(message)s') if message else _('Timed out at step "%(step)s"')
        text = sentence(text % values)
        child = situation.tree.get(step.child_id) if step.child_id is not None else None
        if child is not None and not child.is_final:
            still = _("The child is still %(status)s (%(id)s).")
            text = f"{text} {still % {'status': child.get_status_display(), 'id': child.pk}}"
            cancel = _("Cancel the child: %(command)s") % {"command": f"manage.py conductor cancel {child.pk}"}
            return Headline(mark, text, (cancel, *retry_hint(situation)))
        return Headline(mark, text, retry_hint(situation))
    text = _('Failed at step "%(step)s": %(message)s') if message else _('Failed at step "%(step)s"')
    text %= values
    if failure.root_cause_id is not None:
        text += f" → {_root_cause(situation, failure.root_cause_id)}"
    return Headline(mark, sentence(text), retry_hint(situation))


def _root_cause(situation: Situation, key: uuid.UUID) -> str:
    cause = situation.failures.get(key)
    if cause is None:
        return _("root cause in %(id)s") % {"id": key}
    execution = situation.tree.get(key)
    return _("root cause %(error)s in %(task)s %(id)s (%(attempt)s)") % {
        "error": short_name(cause.error_class),
        "task": short_name(cause.task),
        "id": key,
        "attempt": attempt_of(cause.attempts, None if execution is None else execution.max_attempts),
    }


def cancelled(situation: Situation) -> Headline:
    """Return when an execution was cancelled, and what became of its children."""
    execution, now = situation.execution, situation.now
    values = {"time": since(execution.finished_at or now, now)}
    undecided = [
        step
        for step in situation.steps
        if kinds.of(step.kind).is_wait and step.status in (StepStatus.PENDING, StepStatus.CANCELLED)
    ]
    if undecided:
        values["step"] = undecided[-1].name
        text = _('Cancelled %(time)s ago while waiting for "%(step)s"') % values
    else:
        text = _("Cancelled %(time)s ago") % values
    if execution.cancel_reason:
        text += f": {first_line(execution.cancel_reason)}"
    census = situation.census
    if census.total:
        children = ngettext(
            "%(cancelled)s child cancelled, %(open)s left running",
            "%(cancelled)s children cancelled, %(open)s left running",
            census.cancelled,
        )
        text += f"; {children % {'cancelled': f'{census.cancelled:,}', 'open': f'{census.open:,}'}}"
    hints = retry_hint(situation)
    # Not where a list has left it out: that would be a query for each line.
    if "result" not in execution.get_deferred_fields() and execution.has_kept_result:
        kept = _("Its body had returned a result by then, which a retry adopts.")
        return Headline(MARKS[ExecutionStatus.CANCELLED], f"{sentence(text)} {kept}", hints)
    return Headline(MARKS[ExecutionStatus.CANCELLED], sentence(text), hints)
