"""Two executions of one task side by side: where they went different ways, and which steps took longer."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from django.db.models import QuerySet

from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus
from conductor_app.telling import runs
from conductor_app.telling.story import Story
from conductor_app.telling.words import seconds_between

#: Among the latest so many executions one is looked for that has succeeded.
LATEST = 20_000


@dataclass(frozen=True)
class Pair:
    """A step of the one, of the other, or of both."""

    name: str
    own: Step | None
    other: Step | None

    @property
    def differs(self) -> bool:
        """Whether only one of them has it, or it ended differently."""
        return self.own is None or self.other is None or self.own.status != self.other.status


def partner(execution: Execution, rows: QuerySet[Execution]) -> Execution | None:
    """Return the latest execution of the same task that has succeeded, among the latest of all; in two queries."""
    keys = rows.order_by("-pk").values_list("pk", flat=True)
    oldest = next(iter(keys[LATEST : LATEST + 1]), None)
    others = rows.filter(task=execution.task, status=ExecutionStatus.SUCCEEDED).exclude(pk=execution.pk)
    if oldest is not None:
        others = others.filter(pk__gt=oldest)
    return others.order_by("-pk").first()


def pairs(own: Story, other: Story) -> Iterator[Pair]:
    """Yield the steps of both by their names, in the order of the first; what only the other has, where it has it."""
    theirs = {step.name: step for step in other.steps}
    ours = {step.name for step in own.steps}
    left = [step for step in other.steps if step.name not in ours]
    before: dict[str | None, list[Step]] = {}
    last: str | None = None
    for step in other.steps:
        if step in left:
            before.setdefault(last, []).append(step)
        else:
            last = step.name
    for missing in before.get(None, []):
        yield Pair(missing.name, None, missing)
    for step in own.steps:
        yield Pair(step.name, step, theirs.get(step.name))
        for missing in before.get(step.name, []):
            yield Pair(missing.name, None, missing)


def seconds(step: Step | None) -> float | None:
    """Return how long a step took; ``None`` if it is not decided, not there, or copied."""
    if step is None or step.finished_at is None or step.is_copied:
        return None
    return seconds_between(step.created_at, step.finished_at)


def totals(story: Story) -> dict[str, float]:
    """Return how many seconds an execution was queued, ran and waited, and how long it took in all."""
    execution = story.execution
    drawn = runs.spans(execution, story.attempts, story.steps, story.now)
    found = dict.fromkeys((runs.QUEUED, runs.RUNNING, runs.WAITING), 0.0)
    for segment in drawn.segments:
        found[segment.state] += segment.seconds
    end: dt.datetime = execution.finished_at or story.now
    return {**found, "total": seconds_between(execution.created_at, end)}


def lines(first: str, second: str) -> Iterator[tuple[str, str, bool]]:
    """Yield two texts line by line, and whether the lines differ."""
    for one, other in zip_longest(first.splitlines(), second.splitlines(), fillvalue=""):
        yield one, other, one != other
