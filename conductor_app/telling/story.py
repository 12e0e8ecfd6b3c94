"""All that is stored about one execution, in queries and rows whose number does not depend on how large its tree is."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from django.db.models import QuerySet

from conductor_app.models import Attempt, Execution, FailedExecution, PublishedState, Step, database
from conductor_app.states import StepStatus
from conductor_app.store import clock
from conductor_app.telling.asked import asked_for
from conductor_app.telling.attempts import read_attempts
from conductor_app.telling.failures import Cause, causes, read_failures
from conductor_app.telling.forks import Forks, read_forks
from conductor_app.telling.keys import conceal_predecessor, holder_of_key
from conductor_app.telling.limits import with_limit
from conductor_app.telling.mailbox import mailbox_of
from conductor_app.telling.operations import Deed, read_deeds
from conductor_app.telling.queues import with_queue
from conductor_app.telling.situation import Situation
from conductor_app.telling.state import TOLD, progress_of
from conductor_app.telling.steps import read_steps
from conductor_app.telling.tags import tags_of_trees
from conductor_app.telling.tree import (
    TREE_FIELDS,
    Branch,
    Picked,
    ancestry,
    pick,
    read_with_ancestors,
)
from conductor_app.telling.withholding import as_seen, withhold
from conductor_app.values.state import ExecutionState


@dataclass(frozen=True)
class Story:
    """All rows about one execution."""

    execution: Execution
    situation: Situation
    #: Steps of the execution, in the order in which they were recorded. Each has ``value``, the beginning of its stored
    #: result, and ``value_length``, the length of all of it.
    steps: list[Step]
    #: How many steps it has.
    step_count: int
    #: What its children remember, as far as they wait or have waited.
    waits: Mapping[uuid.UUID, list[Step]]
    #: The failures from the execution down to the root cause.
    causes: list[Cause]
    #: How many executions its tree has.
    node_count: int
    #: How many children each parent has.
    child_counts: Mapping[uuid.UUID | None, int]
    #: How many events of each name were sent to it that no step has taken.
    mailbox: Mapping[str, int] = field(default_factory=dict)
    #: Runs of the execution that have ended, in their order; the latest, if there are very many.
    attempts: list[Attempt] = field(default_factory=list)
    #: Those of its children.
    attempts_of: Mapping[uuid.UUID, list[Attempt]] = field(default_factory=dict)
    #: Those of its tree.
    tags: Mapping[str, str] = field(default_factory=dict)
    #: What people have done to it and to its root.
    deeds: list[Deed] = field(default_factory=list)
    #: What it was forked from, and what was forked from it.
    forks: Forks = field(default_factory=Forks)
    #: The open execution that has the unique key which it was given.
    key_holder: uuid.UUID | None = None
    #: What it and others of its tree tell of themselves.
    states: Mapping[uuid.UUID, PublishedState | None] = field(default_factory=dict)

    @property
    def now(self) -> dt.datetime:
        """The database's clock when it was read."""
        return self.situation.now

    @property
    def tree(self) -> Mapping[uuid.UUID, Execution]:
        """The executions of its tree that were read."""
        return self.situation.tree

    @property
    def asked_for(self) -> Mapping[int, list[Deed]]:
        """What people have asked for, of each run that began because of that; see ``asked.asked_for``."""
        return asked_for(self.execution, self.attempts, self.deeds)

    def child_of(self, step: Step) -> Execution | None:
        """Return the child that stands behind a step, if it was read."""
        return self.tree.get(step.child_id) if step.child_id is not None else None

    def progress_of(self, row: Execution) -> ExecutionState | None:
        """Return how far it, or another one of its tree, is; ``None`` if that is not known."""
        steps = self.steps if row.pk == self.execution.pk else self.waits.get(row.pk, ())
        return progress_of(row, self.states.get(row.pk), steps)

    @property
    def published(self) -> str:
        """What it publishes, as stored text; an empty one if nothing."""
        return str(getattr(self.states.get(self.execution.pk), "published", ""))

    def error_of(self, step: Step) -> str | None:
        """Return the stored error of a step; of one whose child has failed, the child's."""
        if step.error or step.status != StepStatus.FAILED:
            return step.error
        child = self.child_of(step)
        return None if child is None else child.error

    def branches(self) -> Branch:
        """Return the tree from its root, or from the highest ancestor that is still there."""
        path = [row.pk for row in ancestry(self.execution, self.tree)]
        children: dict[uuid.UUID | None, list[Execution]] = defaultdict(list)
        for row in self.tree.values():
            # The highest one has no parent here, even if a hand has made rows each other's parents.
            if row.pk != path[-1]:
                children[row.parent_id].append(row)
        for below in children.values():
            below.sort(key=lambda row: (row.created_at, row.position or 0, row.pk))
        top = self._branch(self.tree[path[-1]], 0, path, children[path[-1]])
        to_draw = [top]
        while to_draw:
            branch = to_draw.pop()
            branch.children.extend(
                self._branch(row, branch.depth + 1, path, children[row.pk]) for row in children[branch.execution.pk]
            )
            to_draw.extend(branch.children)
        return top

    def _branch(self, row: Execution, depth: int, path: list[uuid.UUID], below: list[Execution]) -> Branch:
        hidden = max(self.child_counts.get(row.pk, 0) - len(below), 0)
        return Branch(row, depth, row.pk == self.execution.pk, row.pk in path, hidden=hidden)


def read(execution_id: uuid.UUID, *, preview: int | None, whole: bool = False) -> Story | None:
    """Read everything about one execution; ``None`` if there is none.

    Args:
        execution_id: Which one.
        preview: Characters of each step's result to read; ``None`` reads all of it.
        whole: Whether to read all of its tree and steps, however many there are.
    """
    rows = Execution.objects.using(database()).select_related("failure")
    execution = rows.filter(pk=execution_id).first()
    return None if execution is None else tell(execution, preview=preview, whole=whole, with_mailbox=True)


def tell(
    execution: Execution,
    *,
    preview: int | None,
    whole: bool = False,
    seen: QuerySet[Execution] | None = None,
    with_messages: bool = True,
    with_mailbox: bool = False,
) -> Story:
    """Read everything about an execution that was read with ``select_related("failure")``; see ``read``.

    Args:
        execution: Which one.
        preview: As for ``read``.
        whole: As for ``read``.
        seen: The executions that may be told of beside it; ``None`` are all. It is told as if the others did not exist.
        with_mailbox: Whether to look for events that no step has taken.
        with_messages: Whether the messages and tracebacks of errors may be told, and not their classes alone.
    """
    own: FailedExecution | None = getattr(execution, "failure", None)
    now = clock.read(database())
    if whole:
        rows = Execution.objects.using(database()).filter(root_id=execution.root_id).order_by("created_at", "id")
        told = (f"published_state__{name}" for name in TOLD)
        tree = {row.pk: row for row in rows.select_related("published_state").only(*TREE_FIELDS, "error", *told)}
        states = {key: getattr(row, "published_state", None) for key, row in tree.items()}
        picked = Picked(keys=list(tree), lanes=[], nodes=len(tree), children={})
    else:
        picked = pick(execution, seen)
        cause = own.root_cause_id if own is not None else None
        keys = {execution.pk, *picked.keys, *([] if cause is None else [cause])}
        tree = {row.pk: row for row in read_with_ancestors(sorted(keys), execution.pk)}
        states = {key: getattr(row, "told", None) for key, row in tree.items()}
    tree[execution.pk] = execution
    steps, waits = read_steps(execution, picked.lanes, preview, whole=whole)
    attempts, attempts_of = read_attempts(execution, picked.lanes, whole=whole)
    conceal_predecessor(execution, seen)
    if seen is not None:
        tree = as_seen(seen, execution, own, steps, tree)
    failures = read_failures(execution, own, tree, whole=whole)
    if not with_messages:
        withhold(tree.values(), steps, failures.values(), attempts)
    situation = Situation(
        execution=execution,
        now=now,
        steps=steps,
        tree=tree,
        failures=failures,
        counted=picked.children.get(execution.pk),
    )
    situation = with_limit(with_queue(situation, seen), seen)
    return Story(
        execution=execution,
        situation=situation,
        steps=steps,
        step_count=max((step.step_count for step in steps), default=0),  # type: ignore[attr-defined]  # annotated
        waits=waits,
        attempts=attempts,
        attempts_of=attempts_of,
        causes=list(causes(execution, own, failures, tree)),
        node_count=max(picked.nodes, len(tree)),
        child_counts={key: census.total for key, census in picked.children.items()},
        mailbox=mailbox_of(execution.pk) if with_mailbox else {},
        tags=tags_of_trees([execution.root_id], seen)[execution.root_id],
        deeds=read_deeds(execution, seen),
        forks=read_forks(execution, seen),
        key_holder=holder_of_key(execution, seen),
        states=states,
    )
