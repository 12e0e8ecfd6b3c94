"""When an execution was queued, ran and waited."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from conductor_app.models import Attempt, Execution, Step
from conductor_app.states import FINAL_RUNS, ExecutionStatus, RunOutcome
from conductor_app.telling.attempts import has_failed
from conductor_app.telling.history import attempts_begun
from conductor_app.transitions import kinds

QUEUED, RUNNING, WAITING = "queued", "running", "waiting"


@dataclass(frozen=True)
class Segment:
    """A stretch of time in one state."""

    state: str
    begin: dt.datetime
    end: dt.datetime
    #: Whether it is a run that failed, or was lost.
    has_failed: bool = False

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end - self.begin).total_seconds()


@dataclass(frozen=True)
class Spans:
    """What an execution did from its creation to its end, or to now."""

    segments: tuple[Segment, ...]
    #: When each attempt after the first began.
    attempts: tuple[dt.datetime, ...] = ()


def spans(row: Execution, attempts: Sequence[Attempt], steps: Sequence[Step], now: dt.datetime) -> Spans:
    """Return what an execution did, by the runs that are kept of it.

    What no kept run tells of (``KEEP_ATTEMPTS``, or a row from before there were any) is told by its steps: between two
    waits it counts as running.

    Args:
        row: The execution.
        attempts: Its runs that have ended, in their order.
        steps: Its steps, for what is not told by them.
        now: The present.
    """
    end = max(row.finished_at or now, row.created_at)
    known = [*attempts, *_going_on(row, end)]
    if not known:
        return Spans(tuple(_by_steps(row, steps, end)), tuple(at for _, at in attempts_begun(steps)))
    segments = list(_before(row, known[0], steps))
    for previous, run in zip([None, *known], known, strict=False):
        if previous is not None:
            segments += _between(previous, run, steps)
        segments.append(Segment(RUNNING, run.started_at, max(run.finished_at, run.started_at), has_failed(run)))
    segments += _after(row, known[-1], end)
    firsts: dict[int, dt.datetime] = {}
    for run in known:
        firsts.setdefault(run.attempt, run.started_at)
    begun = tuple(begin for attempt, begin in firsts.items() if attempt > 1)
    return Spans(tuple(_clipped(segments, row.created_at)), begun)


def _going_on(row: Execution, now: dt.datetime) -> Iterator[Attempt]:
    """Yield the run that has not ended, as if it ended now; it has no outcome."""
    began = row.run_started_at
    if row.status == ExecutionStatus.RUNNING and began is not None:
        due = row.due_at or began
        yield Attempt(run=row.fence, attempt=row.attempt, due_at=due, started_at=began, finished_at=now, outcome="")


def _before(row: Execution, first: Attempt, steps: Sequence[Step]) -> Iterator[Segment]:
    """Yield what came before the first run that is known."""
    if first.run <= 1:
        yield from _queued(row.created_at, first.due_at, first.started_at)
        return
    until = min(max(first.due_at, row.created_at), first.started_at)
    yield from _by_steps(row, steps, until)
    yield Segment(QUEUED, until, first.started_at)


def _between(previous: Attempt, run: Attempt, steps: Sequence[Step]) -> Iterator[Segment]:
    due = min(max(run.due_at, previous.finished_at), run.started_at)
    if run.run > previous.run + 1:
        # Some that are not kept any more.
        yield from _awake(previous.finished_at, due, _waits(steps, previous.finished_at, due))
        yield Segment(QUEUED, due, run.started_at)
    elif previous.outcome in FINAL_RUNS:
        # It had ended; an operator has had it tried again.
        yield Segment(QUEUED, due, run.started_at)
    else:
        yield from _queued(previous.finished_at, due, run.started_at)


def _after(row: Execution, last: Attempt, end: dt.datetime) -> Iterator[Segment]:
    if row.status == ExecutionStatus.WAITING:
        yield Segment(WAITING, last.finished_at, end)
    elif row.status == ExecutionStatus.QUEUED:
        due = end if row.due_at is None else row.due_at
        since = max(due, last.finished_at) if last.outcome in FINAL_RUNS else last.finished_at
        yield from _queued(min(since, end), min(max(due, since), end), end)
    elif row.is_final and last.outcome not in FINAL_RUNS:
        # Cancelled while it waited, or decided by somebody else than a run.
        yield Segment(WAITING if last.outcome == RunOutcome.SUSPENDED else QUEUED, last.finished_at, end)


def _queued(begin: dt.datetime, due: dt.datetime, end: dt.datetime) -> Iterator[Segment]:
    """Yield a wait that ends when it is due (a step's end, a pause, a countdown), and its time in the queue."""
    due = min(max(due, begin), end)
    yield Segment(WAITING, begin, due)
    yield Segment(QUEUED, due, end)


def _clipped(segments: Iterable[Segment], begin: dt.datetime) -> Iterator[Segment]:
    for one in segments:
        if one.end > one.begin >= begin:
            yield one


# ------------------------------------------------------------------------------------------- what no run tells of


def _by_steps(row: Execution, steps: Sequence[Step], end: dt.datetime) -> Iterator[Segment]:
    """Yield what an execution did from its creation to ``end``, without gaps, as far as its steps tell."""
    if row.started_at is None:
        yield from _queued(row.created_at, row.due_at or row.created_at, end)
        return
    begin = min(max(row.started_at, row.created_at), end)
    yield Segment(QUEUED, row.created_at, begin)
    waits = _waits(steps, begin, end)
    active = end
    if row.status == ExecutionStatus.QUEUED:
        # It has failed an attempt or was woken since the last that is known of it.
        known = [when for step in steps for when in (step.created_at, step.finished_at) if when is not None]
        active = min(max([begin, *known]), end)
    elif row.status == ExecutionStatus.WAITING and not waits:
        waits = [(begin, end)]  # for something that was not read
    yield from _awake(begin, active, waits)
    if end > active:
        yield Segment(QUEUED, max(active, waits[-1][1] if waits else active), end)


def _awake(begin: dt.datetime, end: dt.datetime, waits: Iterable[tuple[dt.datetime, dt.datetime]]) -> Iterator[Segment]:
    for wait_begin, wait_end in waits:
        if wait_begin > begin:
            yield Segment(RUNNING, begin, wait_begin)
        yield Segment(WAITING, wait_begin, wait_end)
        begin = wait_end
    if end > begin:
        yield Segment(RUNNING, begin, end)


def _waits(steps: Iterable[Step], begin: dt.datetime, end: dt.datetime) -> list[tuple[dt.datetime, dt.datetime]]:
    """Return when no worker was held, as stretches that do not overlap."""
    merged: list[tuple[dt.datetime, dt.datetime]] = []
    spans = (
        (min(max(step.created_at, begin), end), min(max(step.finished_at or end, begin), end))
        for step in steps
        if kinds.of(step.kind).suspends
    )
    for since, until in sorted(spans):
        if until <= since:
            continue
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((since, until))
    return merged
