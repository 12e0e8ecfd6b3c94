"""What an execution is doing and why, in plain words: for ``conductor show``, ``conductor ls`` and the admin.

Everything here is worked out from rows that the caller has read. Nothing is queried, so a list costs no query per row.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.serialization import load_failure
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus

#: Shape before the word, so that a status never shows by colour alone.
MARKS = {
    ExecutionStatus.QUEUED: "○",
    ExecutionStatus.RUNNING: "▶",
    ExecutionStatus.WAITING: "⧗",
    ExecutionStatus.SUCCEEDED: "✓",
    ExecutionStatus.FAILED: "✕",
    ExecutionStatus.CANCELLED: "⊘",
}
RETRYING_MARK = "↻"
#: A due execution that no worker has taken for so many seconds is worth a hint.
UNANSWERED_SECONDS = 60.0
#: After so many messages without an answer, no worker seems to consume the queue.
UNDELIVERABLE_DISPATCHES = 8

STEP_MARKS = {
    StepStatus.PENDING: "⧗",
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
    #: What stands after ``celery -A`` in a hint.
    app: str = "project"
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


def worker_name(lease_owner: str) -> str:
    """Return the node name in a lease's owner."""
    return lease_owner.rpartition("/")[0] or lease_owner


def _local(when: dt.datetime) -> dt.datetime:
    return timezone.localtime(when) if timezone.is_aware(when) else when


def _of(attempt: int, max_attempts: int | None) -> str:
    return f"attempt {attempt}" if max_attempts is None else f"attempt {attempt} of {max_attempts}"


def _since(when: dt.datetime | None, now: dt.datetime) -> str:
    return "" if when is None else duration((now - when).total_seconds())


def _in(when: dt.datetime, now: dt.datetime) -> str:
    seconds = (when - now).total_seconds()
    return f"in {duration(seconds)}" if seconds > 0 else "now due"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


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
    return write(situation)


def _queued(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.QUEUED]
    if execution.cancel_requested_at is not None:
        return Headline(mark, "Queued, and cancelled at the next sweep.")
    if execution.due_at is None:
        return Headline(mark, "Held back until another child of its map ends (max_parallel).")
    if execution.due_at > now:
        when = _in(execution.due_at, now)
        if execution.attempt > 1:
            failure = load_failure(execution.error)
            what = f"{short_name(failure.type)}: {first_line(failure.message)}"
            previous = _of(execution.attempt - 1, execution.max_attempts).capitalize()
            return Headline(RETRYING_MARK, f"{previous} failed ({what}). Next try {when}.")
        return Headline(mark, f"Scheduled for {instant(execution.due_at, now)} ({when}).")
    waited = (now - execution.due_at).total_seconds()
    text = f'Queued for {duration(waited)} in queue "{execution.queue}"'
    if waited >= UNANSWERED_SECONDS or execution.dispatches >= UNDELIVERABLE_DISPATCHES:
        return Headline(mark, f"{text}: no worker took it.", (_start_worker(situation, execution.queue),))
    return Headline(mark, f"{text}.")


def _running(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.RUNNING]
    if execution.lease_expires_at is not None:
        settings = conductor_settings()
        heartbeat = execution.lease_expires_at - dt.timedelta(seconds=settings.LEASE_SECONDS)
        silent = (now - heartbeat).total_seconds()
        if silent > 2 * settings.HEARTBEAT_SECONDS:
            return Headline(
                mark,
                f"Running, but worker {worker_name(execution.lease_owner)} stopped sending heartbeats "
                f"{duration(silent)} ago. {_when_lapsed(execution)} at {instant(execution.lease_expires_at, now)}.",
            )
    text = f"Running on {worker_name(execution.lease_owner)}, {_of(execution.attempt, execution.max_attempts)}"
    if execution.started_at is not None:
        text += f"; first started {_since(execution.started_at, now)} ago"
    if execution.cancel_requested_at is not None:
        text += f". Its cancellation was requested {_since(execution.cancel_requested_at, now)} ago: " + (
            "a plain Celery task cannot be stopped while it runs, so it runs to its end and keeps its result"
            if _is_plain(execution)
            else "the body stops at its next ctx call"
        )
    return Headline(mark, f"{text}.")


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


def _when_lapsed(execution: Execution) -> str:
    if _runs_again(execution):
        return "It will be re-queued automatically"
    return "A plain Celery task without acks_late is not run twice: it will be failed"


def _waiting(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    # A child that was started is awaited by its gather alone.
    pending = [step for step in situation.pending if step.kind != StepKind.START]
    if execution.cancel_requested_at is not None:
        return Headline(mark, "Waiting, and cancelled at the next sweep.")
    if not pending:
        return Headline(mark, "Waiting for nothing: what it waited for is decided. The sweeper wakes it.")
    if len(pending) > 1:
        names = _quoted([step.name for step in pending])
        since = _since(min(step.created_at for step in pending), now)
        return Headline(
            mark,
            f"Waiting for {len(pending)} steps ({names}) since {since} ago. No worker is held. "
            f"It resumes when they are decided{_times_out(pending, now)}.",
            tuple(_send_hint(step) for step in pending if step.kind == StepKind.EVENT),
        )
    step = pending[0]
    since = _since(step.created_at, now)
    if step.kind == StepKind.SLEEP:
        until = "" if step.deadline_at is None else f" until {instant(step.deadline_at, now)}"
        when = "" if step.deadline_at is None else f" ({_in(step.deadline_at, now)})"
        return Headline(mark, f'Sleeping (step "{step.name}"){until}{when}. No worker is held.')
    if step.kind in (StepKind.MAP, StepKind.GATHER):
        return Headline(
            mark,
            f"{_waiting_for_many(step)} since {since} ago. No worker is held. It resumes once, "
            f"{_when_decided(step)}{_times_out(pending, now)}.",
        )
    if step.kind == StepKind.EVENT:
        return Headline(
            mark,
            f'Waiting for the event "{step.task}" (step "{step.name}") since {since} ago. No worker is held. '
            f"It resumes when the event is sent{_times_out(pending, now)}.",
            (_send_hint(step),),
        )
    name = short_name(step.task)
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    if child is not None and child.status == ExecutionStatus.QUEUED:
        waited = (now - (child.due_at or now)).total_seconds()
        if waited >= UNANSWERED_SECONDS or child.dispatches >= UNDELIVERABLE_DISPATCHES:
            return Headline(
                mark,
                f'Waiting for {name} (step "{step.name}"), which has been queued for {duration(waited)}: no worker '
                f'took it from queue "{child.queue}"{_times_out(pending, now)}.',
                (_start_worker(situation, child.queue),),
            )
    text = (
        f'Waiting for {name} (step "{step.name}") since {since} ago. No worker is held. '
        f"It resumes when that execution finishes{_times_out(pending, now)}."
    )
    if child is not None:
        text += f" That execution is {label(child, now).word}, {_of(child.attempt, child.max_attempts)}."
    return Headline(mark, text)


def awaited(situation: Situation) -> list[Awaited]:
    """Return what a waiting execution waits for, and what happens then, step by step."""
    if situation.execution.status != ExecutionStatus.WAITING:
        return []
    return [_awaited(step, situation) for step in situation.pending if step.kind != StepKind.START]


def _awaited(step: Step, situation: Situation) -> Awaited:
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    name = short_name(step.task)
    if step.kind == StepKind.SLEEP:
        return Awaited(step, "The end of a sleep.", ("It resumes by itself.",))
    if step.kind == StepKind.EVENT:
        then = ["It resumes with the event's payload.", _send_hint(step)]
        what = f'The event "{step.task}".'
    elif step.kind == StepKind.MAP:
        what = f"{_left(step)} {name}{_parallel(step)}."
        then = [f"It resumes once, {_when_decided(step)}."]
        if step.fails_fast:
            then.append("If one fails, ChildFailed is raised here, and the others are cancelled.")
    elif step.kind == StepKind.GATHER:
        what = f"{_left(step)} started children."
        then = [f"It resumes once, {_when_decided(step)}."]
    else:
        what = f"{name}, a child."
        then = [
            "When it succeeds, this execution resumes with its result.",
            "If it fails for good, ChildFailed is raised here: uncaught, it fails this execution, too.",
        ]
    if step.deadline_at is not None:
        error = "EventTimedOut" if step.kind == StepKind.EVENT else "ChildTimedOut"
        at = instant(step.deadline_at, situation.now)
        end = f"At {at} ({_in(step.deadline_at, situation.now)}) it times out: {error} is raised here"
        if step.kind != StepKind.EVENT:
            goes_on = step.on_timeout == OnTimeout.ABANDON
            end += ", and what still runs goes on" if goes_on else ", and what still runs is cancelled"
        then.append(f"{end}.")
    return Awaited(step, what, tuple(then), child)


def _waiting_for_many(step: Step) -> str:
    if step.kind == StepKind.GATHER:
        return f"Waiting for {_left(step)} started children"
    return f'Waiting for {_left(step)} {short_name(step.task)} (step "{step.name}"{_parallel(step)})'


def _left(step: Step) -> str:
    return f"{step.remaining:,} of {step.total:,}" if step.remaining is not None and step.total is not None else "the"


def _parallel(step: Step) -> str:
    return "" if step.max_parallel is None else f", at most {step.max_parallel:,} at once"


def _when_decided(step: Step) -> str:
    return "when all have finished or one has failed" if step.fails_fast else "when all have finished"


def _times_out(pending: Sequence[Step], now: dt.datetime) -> str:
    deadlines = [step.deadline_at for step in pending if step.deadline_at is not None]
    if not deadlines:
        return ""
    return f"; times out at {instant(min(deadlines), now)} ({_in(min(deadlines), now)})"


def _succeeded(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    took = ""
    if execution.finished_at is not None:
        took = f" in {duration((execution.finished_at - execution.created_at).total_seconds())}"
    text = f"Succeeded {_since(execution.finished_at, now)} ago{took}."
    return Headline(MARKS[ExecutionStatus.SUCCEEDED], text)


def _failed(situation: Situation) -> Headline:
    execution = situation.execution
    mark = MARKS[ExecutionStatus.FAILED]
    failure = situation.failures.get(execution.pk)
    own = load_failure(execution.error)
    message = first_line(own.message)
    if failure is None or not failure.step:
        made = execution.attempt if failure is None else failure.attempts
        text = f"Failed: {message} ({short_name(own.type)}, {_of(made, execution.max_attempts)})."
        return Headline(mark, text, (*_mismatch_hint(own.type), *_retry_hint(situation)))
    step = next((step for step in situation.steps if step.name == failure.step), None)
    if step is not None and step.status == StepStatus.TIMED_OUT:
        text = _sentence(f'Timed out at step "{failure.step}": {message}')
        child = situation.tree.get(step.child_id) if step.child_id is not None else None
        if child is not None and not child.is_final:
            text += f" The child is still {child.status} ({child.pk})."
            return Headline(
                mark, text, (f"Cancel the child: manage.py conductor cancel {child.pk}", *_retry_hint(situation))
            )
        return Headline(mark, text, _retry_hint(situation))
    text = f'Failed at step "{failure.step}": {message}'
    return Headline(mark, _sentence(f"{text}{_root_cause(situation, failure)}"), _retry_hint(situation))


def _mismatch_hint(error_class: str) -> tuple[str, ...]:
    if short_name(error_class) != "StepMismatch":
        return ()
    return (
        "The code changed while this execution was in flight. Before it is run again, give the new call a name of its "
        "own, or deploy the old code for as long as such executions are open",
    )


def _root_cause(situation: Situation, failure: FailedExecution) -> str:
    if failure.root_cause_id is None:
        return ""
    cause = situation.failures.get(failure.root_cause_id)
    if cause is None:
        return f" → root cause in {failure.root_cause_id}"
    execution = situation.tree.get(failure.root_cause_id)
    allowed = None if execution is None else execution.max_attempts
    return (
        f" → root cause {short_name(cause.error_class)} in {short_name(cause.task)} {failure.root_cause_id} "
        f"({_of(cause.attempts, allowed)})"
    )


def _cancelled(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    text = f"Cancelled {_since(execution.finished_at, now)} ago"
    undecided = [
        step
        for step in situation.steps
        if step.kind != StepKind.STEP and step.status in (StepStatus.PENDING, StepStatus.CANCELLED)
    ]
    if undecided:
        text += f' while waiting for "{undecided[-1].name}"'
    if execution.cancel_reason:
        text += f": {first_line(execution.cancel_reason)}"
    census = situation.census
    if census.total:
        noun = "child" if census.cancelled == 1 else "children"
        text += f"; {census.cancelled:,} {noun} cancelled, {census.open:,} left running"
    return Headline(MARKS[ExecutionStatus.CANCELLED], _sentence(text), _retry_hint(situation))


def _retry_hint(situation: Situation) -> tuple[str, ...]:
    execution = situation.execution
    root = situation.tree.get(execution.root_id, execution)
    if root.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ()  # the root went on without it
    kept = [step.name for step in situation.steps if step.status == StepStatus.SUCCEEDED]
    keeping = f", keeping {'the results' if len(kept) > 1 else 'the result'} of {_quoted(kept)}" if kept else ""
    return (f"Run it again from where it stopped{keeping}: manage.py conductor retry {execution.root_id}",)


def _send_hint(step: Step) -> str:
    return f"Send it: manage.py conductor send {step.execution_id} {step.task} --payload JSON"


def _start_worker(situation: Situation, queue: str) -> str:
    return f"Start a worker: celery -A {situation.app} worker -Q {queue}"
