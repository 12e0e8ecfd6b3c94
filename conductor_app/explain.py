"""What an execution is doing and why, in plain words: for ``conductor show``, ``conductor ls`` and the admin.

Everything here is worked out from rows that the caller has read. Nothing is queried, so a list costs no query per row.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from django.utils import timezone

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.serialization import load_failure
from conductor_app.states import ExecutionStatus, StepKind, StepStatus

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

    @property
    def pending(self) -> list[Step]:
        """The steps that are awaited."""
        return [step for step in self.steps if step.status == StepStatus.PENDING]

    @property
    def children(self) -> list[Execution]:
        """The direct children, as far as they are known."""
        return [other for other in self.tree.values() if other.parent_id == self.execution.pk]


# ------------------------------------------------------------------------------------------------------------- words


def label(execution: Execution, now: dt.datetime, pending: Sequence[Step] = ()) -> Label:
    """Return the shape and the word for an execution's status.

    ``retrying`` is a queued execution whose next attempt is due later, ``scheduled`` one whose first attempt is, and
    ``sleeping`` one that waits for nothing but a sleep.
    """
    status = ExecutionStatus(execution.status)
    word = status.value
    if status == ExecutionStatus.QUEUED and execution.due_at > now:
        if execution.attempt > 1:
            return Label(RETRYING_MARK, "retrying")
        word = "scheduled"
    if status == ExecutionStatus.WAITING and pending and all(step.kind == StepKind.SLEEP for step in pending):
        word = "sleeping"
    return Label(MARKS[status], word)


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
    """Return the first line of ``text``, cut to ``limit`` characters."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


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
                f"{duration(silent)} ago. It will be re-queued automatically at "
                f"{instant(execution.lease_expires_at, now)}.",
            )
    text = f"Running on {worker_name(execution.lease_owner)}, {_of(execution.attempt, execution.max_attempts)}"
    if execution.started_at is not None:
        text += f"; first started {_since(execution.started_at, now)} ago"
    if execution.cancel_requested_at is not None:
        text += (
            f". Its cancellation was requested {_since(execution.cancel_requested_at, now)} ago: the body stops at "
            "its next ctx call"
        )
    return Headline(mark, f"{text}.")


def _waiting(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.WAITING]
    pending = situation.pending
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
        )
    step = pending[0]
    since = _since(step.created_at, now)
    if step.kind == StepKind.SLEEP:
        until = "" if step.deadline_at is None else f" until {instant(step.deadline_at, now)}"
        when = "" if step.deadline_at is None else f" ({_in(step.deadline_at, now)})"
        return Headline(mark, f'Sleeping (step "{step.name}"){until}{when}. No worker is held.')
    if step.kind != StepKind.INVOKE:
        return Headline(
            mark,
            f'Waiting for the event of step "{step.name}" since {since} ago. No worker is held. '
            f"It resumes when the event is sent{_times_out(pending, now)}.",
        )
    name = short_name(step.task)
    child = situation.tree.get(step.child_id) if step.child_id is not None else None
    if child is not None and child.status == ExecutionStatus.QUEUED:
        waited = (now - child.due_at).total_seconds()
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
        return Headline(mark, text, _retry_hint(situation))
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
    children = situation.children
    if children:
        cancelled = sum(child.status == ExecutionStatus.CANCELLED for child in children)
        running = sum(not child.is_final for child in children)
        text += f"; {cancelled} {'child' if cancelled == 1 else 'children'} cancelled, {running} left running"
    return Headline(MARKS[ExecutionStatus.CANCELLED], _sentence(text), _retry_hint(situation))


def _retry_hint(situation: Situation) -> tuple[str, ...]:
    execution = situation.execution
    root = situation.tree.get(execution.root_id, execution)
    if root.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ()  # the root went on without it
    return (f"Run it again from where it stopped: manage.py conductor retry {execution.root_id}",)


def _start_worker(situation: Situation, queue: str) -> str:
    return f"Start a worker: celery -A {situation.app} worker -Q {queue}"
