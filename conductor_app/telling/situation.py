"""The rows from which a headline is made, and the headline."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from conductor_app.models import Execution, FailedExecution, PausedTask, Step
from conductor_app.states import ExecutionStatus, StepStatus


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
class Census:
    """How many direct children an execution has."""

    total: int
    open: int
    cancelled: int


@dataclass(frozen=True)
class Parked:
    """For which place of a limit an execution waits."""

    limit: str
    key: str
    #: Of a number: how many places there are, and how many of them are taken. Of a rate, ``None`` and 0.
    number: int | None
    taken: int
    #: Since when it waits, and how many wait before it.
    since: dt.datetime
    before: int
    #: Some executions that have a place, the oldest first.
    holders: tuple[uuid.UUID, ...] = ()


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
    #: Where it waits for a place of a limit, if it was looked for.
    parked: Parked | None = None
    #: Why it does not begin although it is queued, if its task is paused.
    paused: PausedTask | None = None
    #: Its direct children, counted; ``None`` if all of them are in ``tree``.
    counted: Census | None = None

    @property
    def deadline(self) -> dt.datetime | None:
        """When its tree is cancelled, if the row of the root is known; ``None`` if nothing says so."""
        root = self.execution if self.execution.parent_id is None else self.tree.get(self.execution.root_id)
        # Not where a list has left it out: that would be a query for each line.
        is_known = root is not None and "tree_deadline_at" not in root.get_deferred_fields()
        return root.tree_deadline_at if root is not None and is_known else None

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
