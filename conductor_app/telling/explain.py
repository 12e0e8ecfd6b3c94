"""What an execution is doing and why, in plain words: for ``conductor show``, ``conductor ls`` and the admin.

Everything here is worked out from rows that the caller has read. Nothing is queried, so a list costs no query per row.

Sentences are in the active language; commands, ``document`` and the words of ``label`` never are.
"""

from __future__ import annotations

import datetime as dt
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from celery import Celery, current_app
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store.owners import node_name
from conductor_app.values.serialization import load_failure

#: Shape before the word, so that a status never shows by colour alone.
MARKS = {
    ExecutionStatus.QUEUED: "○",
    ExecutionStatus.RUNNING: "▶",
    ExecutionStatus.WAITING: "◐",
    ExecutionStatus.SUCCEEDED: "✓",
    ExecutionStatus.FAILED: "✕",
    ExecutionStatus.CANCELLED: "⊘",
}
RETRYING_MARK = "↻"
#: A due execution that no worker has taken for so many seconds is worth a hint.
UNANSWERED_SECONDS = 60.0
#: After so many messages without an answer, no worker seems to consume the queue.
UNDELIVERABLE_DISPATCHES = 8
#: Why a worker could not read a message.
_REFUSALS = frozenset({"kombu.exceptions.ContentDisallowed", "kombu.exceptions.DecodeError"})

STEP_MARKS = {
    StepStatus.PENDING: "◐",
    StepStatus.SUCCEEDED: "✓",
    StepStatus.FAILED: "✕",
    StepStatus.TIMED_OUT: "✕",
    StepStatus.CANCELLED: "⊘",
}
#: Kinds of steps for which an execution does not hold a worker.
WAITING_KINDS = frozenset({StepKind.INVOKE, StepKind.MAP, StepKind.GATHER, StepKind.SLEEP, StepKind.EVENT})
#: Characters that a terminal would obey, that reorder or hide the text around them, and halves of characters, which
#: cannot be encoded. Tabs and line feeds are none of them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


@dataclass(frozen=True)
class Label:
    """A status as it is shown: a shape and a word."""

    mark: str
    word: str

    def __str__(self) -> str:
        return f"{self.mark} {self.word}"


@dataclass(frozen=True)
class Headline:
    """The one line that says what is going on, and what can be done about it."""

    mark: str
    text: str
    #: What to do, one command or piece of advice each.
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.mark} {self.text}"


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


@dataclass(frozen=True)
class Census:
    """How many direct children an execution has."""

    total: int
    open: int
    cancelled: int


@dataclass(frozen=True)
class Situation:
    """The rows from which a headline is made."""

    execution: Execution
    #: The database's clock.
    now: dt.datetime
    #: What the execution remembers; the pending ones are enough, except for a failed one.
    steps: Sequence[Step] = ()
    #: Executions of the same tree by id, at least the direct children.
    tree: Mapping[uuid.UUID, Execution] = field(default_factory=dict)
    #: The failures of the execution and of the descendants behind it, by id.
    failures: Mapping[uuid.UUID, FailedExecution] = field(default_factory=dict)
    #: What stands after ``celery -A`` in a hint; the current app's by default.
    app: str = ""
    #: How many executions workers are running in a queue that has not answered (``unanswered_queue``).
    at_work: int = 0
    #: Its direct children, counted; ``None`` if all of them are in ``tree``.
    counted: Census | None = None

    @property
    def pending(self) -> list[Step]:
        """The steps that are awaited."""
        return [step for step in self.steps if step.status == StepStatus.PENDING]

    @property
    def children(self) -> list[Execution]:
        """The direct children, as far as they are known."""
        return [other for other in self.tree.values() if other.parent_id == self.execution.pk]

    @property
    def census(self) -> Census:
        """How many direct children there are."""
        if self.counted is not None:
            return self.counted
        children = self.children
        cancelled = sum(child.status == ExecutionStatus.CANCELLED for child in children)
        return Census(len(children), sum(not child.is_final for child in children), cancelled)


# ------------------------------------------------------------------------------------------------------------- words


def label(execution: Execution, now: dt.datetime, pending: Sequence[Step] = ()) -> Label:
    """Return the shape and the word for an execution's status.

    ``retrying`` is a queued execution whose next attempt is due later, ``scheduled`` one whose first attempt is, and
    ``sleeping`` one that waits for nothing but a sleep.
    """
    status = ExecutionStatus(execution.status)
    word = status.value
    if status == ExecutionStatus.QUEUED and execution.due_at is None:
        word = "held back"
    elif status == ExecutionStatus.QUEUED and execution.due_at is not None and execution.due_at > now:
        if execution.attempt > 1:
            return Label(RETRYING_MARK, "retrying")
        word = "scheduled"
    if status == ExecutionStatus.WAITING and pending and all(step.kind == StepKind.SLEEP for step in pending):
        word = "sleeping"
    return Label(MARKS[status], word)


def clean(text: str) -> str:
    """Return ``text`` as ``visible`` does, and on one line."""
    return visible(text).replace("\n", "\\n")


def document(execution: Execution, now: dt.datetime, pending: Sequence[Step] = ()) -> dict[str, Any]:
    """Return a row of a list of executions as plain data, for programs."""
    return {
        "id": execution.pk,
        "task": execution.task,
        "queue": execution.queue,
        "status": execution.status,
        "shown_as": label(execution, now, pending).word,
        "attempt": execution.attempt,
        "max_attempts": execution.max_attempts,
        "waiting_for": [step.name for step in pending],
        "parent": execution.parent_id,
        "root": execution.root_id,
        "step_in_parent": execution.step or None,
        "worker": execution.lease_owner or None,
        "due_at": execution.due_at if execution.status == ExecutionStatus.QUEUED else None,
        "created_at": execution.created_at,
        "started_at": execution.started_at,
        "finished_at": execution.finished_at,
    }


def short_name(task: str) -> str:
    """Return the last part of a task's name."""
    return task.rpartition(".")[2]


def duration(seconds: float) -> str:
    """Return a length of time in its largest unit: ``40 ms``, ``0.2 s``, ``12 s``, ``6 min``, ``3 h``, ``4 d``."""
    seconds = max(seconds, 0.0)
    if seconds < 0.0995:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, unit, size in ((120, "s", 1), (7_200, "min", 60), (172_800, "h", 3_600)):
        if seconds < limit:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // 86_400:.0f} d"


def offset(seconds: float) -> str:
    """Return how long after a beginning something was: ``+0.123 s``, ``+12.3 s``, ``+5 min 7 s``, ``+3 d 0 h``."""
    sign, seconds = "-" if seconds < 0 else "+", abs(seconds)
    if seconds < 59.95:
        return f"{sign}{seconds:.3f} s" if seconds < 9.9995 else f"{sign}{seconds:.1f} s"
    whole = round(seconds)
    for limit, unit, size, smaller, small in ((3_600, "min", 60, "s", 1), (86_400, "h", 3_600, "min", 60)):
        if whole < limit:
            return f"{sign}{whole // size} {unit} {whole % size // small} {smaller}"
    return f"{sign}{whole // 86_400:,} d {whole % 86_400 // 3_600} h"


def instant(when: dt.datetime, now: dt.datetime) -> str:
    """Return an instant in the current time zone: the time of day, and the date if it is another day."""
    when, now = _local(when), _local(now)
    return f"{when:%H:%M:%S}" if when.date() == now.date() else f"{when:%Y-%m-%d %H:%M:%S}"


def exact(when: dt.datetime) -> str:
    """Return an instant in the current time zone, in full."""
    return f"{_local(when):%Y-%m-%d %H:%M:%S %Z}".rstrip()


def attempts(execution: Execution) -> str:
    """Return ``2/4``: the current attempt and how many are allowed; ``2`` if there is no limit."""
    return f"{execution.attempt}" if execution.max_attempts is None else f"{execution.attempt}/{execution.max_attempts}"


def first_line(text: str, limit: int = 200) -> str:
    """Return the first line of what a task wrote, cut to ``limit`` characters.

    What would begin another line of a log, or steer a terminal, is written out: ``\\x1b``.
    """
    lines = text.strip().splitlines()
    line = visible(lines[0][: limit + 1]) if lines else ""
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def visible(text: str) -> str:
    """Return ``text`` with the characters spelled out that a screen would obey instead of showing them."""
    return _INVISIBLE.sub(_spelled_out, text)


def _spelled_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _local(when: dt.datetime) -> dt.datetime:
    return timezone.localtime(when) if timezone.is_aware(when) else when


def _of(attempt: int, max_attempts: int | None) -> str:
    if max_attempts is None:
        return _("attempt %(attempt)d") % {"attempt": attempt}
    return _("attempt %(attempt)d of %(allowed)d") % {"attempt": attempt, "allowed": max_attempts}


def _since(when: dt.datetime, now: dt.datetime) -> str:
    return duration((now - when).total_seconds())


def _in(when: dt.datetime, now: dt.datetime) -> str:
    seconds = (when - now).total_seconds()
    return _("in %(time)s") % {"time": duration(seconds)} if seconds > 0 else _("now due")


def _dated(when: dt.datetime, now: dt.datetime) -> dict[str, str]:
    return {"instant": instant(when, now), "when": _in(when, now)}


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:5])
    return _("%(names)s and %(count)d more") % {"names": shown, "count": len(names) - 5} if len(names) > 5 else shown


# ---------------------------------------------------------------------------------------------------------- headlines


def headline(situation: Situation) -> Headline:
    """Return what an execution is doing, or how it ended, in one or two sentences."""
    write = {
        ExecutionStatus.QUEUED: _queued,
        ExecutionStatus.RUNNING: _running,
        ExecutionStatus.WAITING: _waiting,
        ExecutionStatus.SUCCEEDED: _succeeded,
        ExecutionStatus.FAILED: _failed,
        ExecutionStatus.CANCELLED: _cancelled,
    }[ExecutionStatus(situation.execution.status)]
    said = write(situation)
    astray = _astray(situation.execution)
    return replace(said, text=f"{_sentence(said.text)} {astray}") if astray else said


def _astray(execution: Execution) -> str:
    """Return what is to be said of a run that has missed the step that had woken it, unless that has failed it."""
    if execution.status in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ""
    # Not where a list has left them out: that would be a query for each line.
    if "options" in execution.get_deferred_fields():
        return ""
    try:
        found = execution.astray
    except (ValueError, RecursionError):  # damaged options
        return ""
    if not isinstance(found, dict):
        return ""
    values = {"woken": found.get("woken_by"), "instead": found.get("came_to")}
    if values["instead"] is None:
        return _('A run that step "%(woken)s" had woken returned without coming to it again.') % values
    text = _('A run that step "%(woken)s" had woken came to step "%(instead)s" without coming to it again.')
    return text % values


def unanswered_queue(situation: Situation) -> str | None:
    """Return the queue in which the execution, or the child that it waits for, has been due for too long.

    Whether its workers are busy or there are none, ``Situation.at_work`` tells.
    """
    execution = situation.execution
    if execution.status == ExecutionStatus.QUEUED:
        return str(execution.queue) if _is_unanswered(execution, situation.now) else None
    if execution.status != ExecutionStatus.WAITING:
        return None
    for step in situation.pending:
        child = situation.tree.get(step.child_id) if step.child_id is not None else None
        if child is not None and step.kind == StepKind.INVOKE and _is_unanswered(child, situation.now):
            return str(child.queue)
    return None


def _is_unanswered(execution: Execution, now: dt.datetime) -> bool:
    if execution.status != ExecutionStatus.QUEUED or execution.due_at is None or execution.due_at > now:
        return False
    waited = (now - execution.due_at).total_seconds()
    return waited >= UNANSWERED_SECONDS or execution.dispatches >= UNDELIVERABLE_DISPATCHES


def _queued(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.QUEUED]
    if execution.cancel_requested_at is not None:
        return Headline(mark, _("Queued, and cancelled at the next sweep."))
    if execution.due_at is None:
        return Headline(mark, _("Held back until another child of its map ends (max_parallel)."))
    refused = execution.put_off_because
    if execution.due_at > now and refused:
        values = {"reason": _reason(refused), "when": _in(execution.due_at, now)}
        return Headline(RETRYING_MARK, _("Put off, no attempt is used up: %(reason)s Next try %(when)s.") % values)
    if execution.due_at > now:
        if execution.attempt > 1:
            return Headline(RETRYING_MARK, _retrying(execution, execution.due_at, now))
        return Headline(mark, _("Scheduled for %(instant)s (%(when)s).") % _dated(execution.due_at, now))
    waited = (now - execution.due_at).total_seconds()
    values = {"time": duration(waited), "queue": execution.queue}
    refusal = load_failure(execution.error) if execution.error else None
    if refusal is not None and refusal.type in _REFUSALS:
        text = _('Queued for %(time)s in queue "%(queue)s". %(error)s')
        hint = _("Add json to CELERY_ACCEPT_CONTENT in the workers' settings (conductor.E032), and restart them.")
        return Headline(mark, text % {**values, "error": _sentence(first_line(refusal.message))}, (hint,))
    if _is_unanswered(execution, now):
        if situation.at_work:
            text = _('Queued for %(time)s in queue "%(queue)s", whose workers are busy (%(running)s running).')
            text %= {**values, "running": f"{situation.at_work:,}"}
            return Headline(mark, _with_refusal(text, refused), (_add_worker(situation, execution.queue),))
        text = _('Queued for %(time)s in queue "%(queue)s": no worker took it.') % values
        return Headline(mark, _with_refusal(text, refused), (_start_worker(situation, execution.queue),))
    return Headline(mark, _with_refusal(_('Queued for %(time)s in queue "%(queue)s".') % values, refused))


def _with_refusal(text: str, refused: str) -> str:
    if not refused:
        return text
    return f"{text} {_('It was put off before: %(reason)s') % {'reason': _reason(refused)}}"


def _reason(refused: str) -> str:
    return _sentence(first_line(refused, 400))


def _retrying(execution: Execution, due_at: dt.datetime, now: dt.datetime) -> str:
    failure = load_failure(execution.error)
    values = {
        "attempt": execution.attempt - 1,
        "allowed": execution.max_attempts,
        "error": _error(failure.type, failure.message),
        "when": _in(due_at, now),
    }
    if execution.max_attempts is None:
        return _("Attempt %(attempt)d failed (%(error)s). Next try %(when)s.") % values
    return _("Attempt %(attempt)d of %(allowed)d failed (%(error)s). Next try %(when)s.") % values


def _error(error_class: str, message: str) -> str:
    """Return an error in one line; its class alone if its message may not be seen."""
    return f"{short_name(error_class)}: {first_line(message)}" if message else short_name(error_class)


def _running(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.RUNNING]
    values = {
        "worker": node_name(execution.lease_owner),
        "attempt": _of(execution.attempt, execution.max_attempts),
    }
    if execution.lease_expires_at is not None:
        settings = conductor_settings()
        heartbeat = execution.lease_expires_at - dt.timedelta(seconds=settings.LEASE_SECONDS)
        silent = (now - heartbeat).total_seconds()
        if silent > 2 * settings.HEARTBEAT_SECONDS:
            values |= {"time": duration(silent)}
            text = _("Running, but worker %(worker)s stopped sending heartbeats %(time)s ago.") % values
            return Headline(mark, f"{text} {_when_lapsed(execution, instant(execution.lease_expires_at, now))}")
    if execution.started_at is None:
        text = _("Running on %(worker)s, %(attempt)s.") % values
    else:
        values |= {"time": _since(execution.started_at, now)}
        text = _("Running on %(worker)s, %(attempt)s; first started %(time)s ago.") % values
    if execution.cancel_requested_at is not None:
        text = f"{text} {_when_cancelled(execution, _since(execution.cancel_requested_at, now))}"
    return Headline(mark, text)


def _when_cancelled(execution: Execution, since: str) -> str:
    if _is_plain(execution):
        text = _(
            "Its cancellation was requested %(time)s ago: a plain Celery task cannot be stopped while it runs, so it "
            "runs to its end, and its result is kept."
        )
    else:
        text = _("Its cancellation was requested %(time)s ago: the body stops at its next ctx call.")
    return text % {"time": since}


def _is_plain(execution: Execution) -> bool:
    try:
        return execution.is_plain
    except (ValueError, RecursionError):  # damaged options: whatever they were, the rest can be told
        return False


def _runs_again(execution: Execution) -> bool:
    try:
        return execution.runs_again
    except (ValueError, TypeError, KeyError, RecursionError):
        return True


def _when_lapsed(execution: Execution, at: str) -> str:
    if _runs_again(execution):
        return _("It will be re-queued automatically at %(instant)s.") % {"instant": at}
    text = _("A plain Celery task without acks_late is not run twice: it will be failed at %(instant)s.")
    return text % {"instant": at}


def _waiting(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    # A child that was started is awaited by its gather alone.
    pending = [step for step in situation.pending if step.kind != StepKind.START]
    if execution.cancel_requested_at is not None:
        return Headline(mark, _("Waiting, and cancelled at the next sweep."))
    if not pending:
        return Headline(mark, _("Waiting for nothing: what it waited for is decided. The sweeper wakes it."))
    hints = tuple(_send_hint(step) for step in pending if step.kind == StepKind.EVENT)
    if len(pending) > 1:
        values = {
            "count": len(pending),
            "names": _quoted([step.name for step in pending]),
            "time": _since(min(step.created_at for step in pending), now),
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
        values = {"event": step.task, "step": step.name, "time": _since(step.created_at, now)}
        waits = _('Waiting for the event "%(event)s" (step "%(step)s") since %(time)s ago. No worker is held.') % values
        resumes = _resumes(_("when the event is sent"), pending, now)
        return Headline(mark, f"{waits} {resumes}", hints)
    return _waiting_for_child(step, situation)


def _sleeping(step: Step, now: dt.datetime) -> str:
    if step.deadline_at is None:
        return _('Sleeping (step "%(step)s"). No worker is held.') % {"step": step.name}
    text = _('Sleeping (step "%(step)s") until %(instant)s (%(when)s). No worker is held.')
    return text % {"step": step.name, **_dated(step.deadline_at, now)}


def _waiting_for_many(step: Step, now: dt.datetime) -> str:
    values = {"children": _children(step), "step": step.name, "time": _since(step.created_at, now)}
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
    values = {"task": short_name(step.task), "step": step.name, "time": _since(step.created_at, now)}
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    if child is not None and _is_unanswered(child, now):
        values |= {"time": duration((now - (child.due_at or now)).total_seconds()), "queue": child.queue}
        if situation.at_work:
            values["running"] = f"{situation.at_work:,}"
            return Headline(mark, _not_yet_taken(step, values, now), (_add_worker(situation, child.queue),))
        return Headline(mark, _not_taken(step, values, now), (_start_worker(situation, child.queue),))
    sentences = [
        _('Waiting for %(task)s (step "%(step)s") since %(time)s ago. No worker is held.') % values,
        _resumes(_("when that execution finishes"), [step], now),
    ]
    if child is not None:
        # ``admin.text`` marks the word for translators.
        values = {"status": _(label(child, now).word), "attempt": _of(child.attempt, child.max_attempts)}
        sentences.append(_("That execution is %(status)s, %(attempt)s.") % values)
        if "error" not in child.get_deferred_fields() and child.put_off_because:
            sentences.append(_("It was put off before: %(reason)s") % {"reason": _reason(child.put_off_because)})
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
    return text % {**values, **_dated(step.deadline_at, now)}


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
    return text % {"condition": condition, **_dated(min(deadlines), now)}


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
        then = [_("It resumes with the event's payload."), _send_hint(step)]
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
        then.append(_at_deadline(step) % _dated(step.deadline_at, situation.now))
    return Awaited(step, what, tuple(then), child)


def _at_deadline(step: Step) -> str:
    if step.kind == StepKind.EVENT:
        return _("At %(instant)s (%(when)s) it times out: EventTimedOut is raised here.")
    if step.on_timeout == OnTimeout.ABANDON:
        return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs goes on.")
    return _("At %(instant)s (%(when)s) it times out: ChildTimedOut is raised here, and what still runs is cancelled.")


def _succeeded(situation: Situation) -> Headline:
    execution = situation.execution
    finished_at = execution.finished_at or situation.now
    values = {"since": _since(finished_at, situation.now), "took": _since(execution.created_at, finished_at)}
    return Headline(MARKS[ExecutionStatus.SUCCEEDED], _("Succeeded %(since)s ago in %(took)s.") % values)


def _failed(situation: Situation) -> Headline:
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
            "attempt": _of(made, execution.max_attempts),
        }
        return Headline(mark, text, (*_mismatch_hint(own.type), *_retry_hint(situation)))
    values = {"step": failure.step, "message": message}
    step = next((step for step in situation.steps if step.name == failure.step), None)
    if step is not None and step.status == StepStatus.TIMED_OUT:
        text = _('Timed out at step "%(step)s": %(message)s') if message else _('Timed out at step "%(step)s"')
        text = _sentence(text % values)
        child = situation.tree.get(step.child_id) if step.child_id is not None else None
        if child is not None and not child.is_final:
            still = _("The child is still %(status)s (%(id)s).")
            text = f"{text} {still % {'status': child.get_status_display(), 'id': child.pk}}"
            cancel = _("Cancel the child: %(command)s") % {"command": f"manage.py conductor cancel {child.pk}"}
            return Headline(mark, text, (cancel, *_retry_hint(situation)))
        return Headline(mark, text, _retry_hint(situation))
    text = _('Failed at step "%(step)s": %(message)s') if message else _('Failed at step "%(step)s"')
    text %= values
    if failure.root_cause_id is not None:
        text += f" → {_root_cause(situation, failure.root_cause_id)}"
    return Headline(mark, _sentence(text), _retry_hint(situation))


def _mismatch_hint(error_class: str) -> tuple[str, ...]:
    if short_name(error_class) != "StepMismatch":
        return ()
    return (
        _(
            "The code changed while this execution was in flight. Before it is run again, give the new call a name of "
            "its own, or deploy the old code for as long as such executions are open"
        ),
    )


def _root_cause(situation: Situation, key: uuid.UUID) -> str:
    cause = situation.failures.get(key)
    if cause is None:
        return _("root cause in %(id)s") % {"id": key}
    execution = situation.tree.get(key)
    return _("root cause %(error)s in %(task)s %(id)s (%(attempt)s)") % {
        "error": short_name(cause.error_class),
        "task": short_name(cause.task),
        "id": key,
        "attempt": _of(cause.attempts, None if execution is None else execution.max_attempts),
    }


def _cancelled(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    values = {"time": _since(execution.finished_at or now, now)}
    undecided = [
        step
        for step in situation.steps
        if step.kind != StepKind.STEP and step.status in (StepStatus.PENDING, StepStatus.CANCELLED)
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
    hints = _retry_hint(situation)
    # Not where a list has left it out: that would be a query for each line.
    if "result" not in execution.get_deferred_fields() and execution.has_kept_result:
        text = f"{_sentence(text)} {_('Its body had returned a result by then, which a retry adopts.')}"
        return Headline(MARKS[ExecutionStatus.CANCELLED], text, hints)
    return Headline(MARKS[ExecutionStatus.CANCELLED], _sentence(text), hints)


def _retry_hint(situation: Situation) -> tuple[str, ...]:
    execution = situation.execution
    root = situation.tree.get(execution.root_id, execution)
    if root.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ()  # the root went on without it
    values = {"command": f"manage.py conductor retry {execution.root_id}"}
    kept = [step.name for step in situation.steps if step.status == StepStatus.SUCCEEDED]
    if not kept:
        return (_("Run it again from where it stopped: %(command)s") % values,)
    text = ngettext(
        "Run it again from where it stopped, keeping the result of %(names)s: %(command)s",
        "Run it again from where it stopped, keeping the results of %(names)s: %(command)s",
        len(kept),
    )
    return (text % {**values, "names": _quoted(kept)},)


def _send_hint(step: Step) -> str:
    command = f"manage.py conductor send {step.execution_id} {step.task} --payload JSON"
    return _("Send it: %(command)s") % {"command": command}


def _start_worker(situation: Situation, queue: str) -> str:
    return _("Start a worker: %(command)s") % {"command": _worker_command(situation, queue)}


def _add_worker(situation: Situation, queue: str) -> str:
    text = _("If it has to run sooner, start one more worker: %(command)s")
    return text % {"command": _worker_command(situation, queue)}


def _worker_command(situation: Situation, queue: str) -> str:
    return f"celery -A {situation.app or app_to_load()} worker -Q {queue}"


def unclaimed(mailbox: Mapping[str, int]) -> str:
    """Return what to say of events that were sent and not taken, counted by name; nothing if there are none."""
    if not mailbox:
        return ""
    count = sum(mailbox.values())
    text = ngettext(
        "%(count)s event that nobody waits for: %(names)s",
        "%(count)s events that nobody waits for: %(names)s",
        count,
    )
    names = [
        name if number == 1 or number == count else f"{name} ({number:,})" for name, number in sorted(mailbox.items())
    ]
    shown = ", ".join(names[:5])
    if len(names) > 5:
        shown = _("%(names)s and %(count)d more") % {"names": shown, "count": len(names) - 5}
    return text % {"count": f"{count:,}", "names": shown}


def app_to_load() -> str:
    """Return what ``celery -A`` takes to load the current app: a module or package that has been imported.

    An app's own name is a label that its author has chosen; ``celery -A`` wants the place.
    """
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    name = str(app.main or "")
    if name and _loads(name, app):
        return name
    places = [place for place in list(sys.modules) if not place.startswith(_NOT_A_PROJECT) and _loads(place, app)]
    # Of packages that import it from the module that makes it, the highest.
    found = min(places, key=lambda place: place.count("."), default=name or "project")
    package = found.removesuffix(".celery")
    return package if _loads(package, app) else found


#: Modules that hold an app for other reasons than to be its place.
_NOT_A_PROJECT = ("__", "celery.", "conductor_app", "django_celery_")


def _loads(place: str, app: object) -> bool:
    """Tell whether ``celery -A place`` finds the app, as ``celery.app.utils.find_app`` would, of imported modules."""
    module = sys.modules.get(place)
    if module is None:
        return False
    names = vars(module)
    for attribute in ("app", "celery"):
        value = names.get(attribute)
        if value is not None and not isinstance(value, ModuleType):
            return value is app
    if "__path__" in names and f"{place}.celery" in sys.modules:
        return _loads(f"{place}.celery", app)
    # By type(): to ask a lazy object for its class may evaluate it.
    return next((value for value in list(names.values()) if issubclass(type(value), Celery)), None) is app
