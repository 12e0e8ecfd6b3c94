"""What kinds of waits have in common that wait for other steps: how they are opened, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import StepStatus
from conductor_app.store import clock
from conductor_app.transitions import guards, kinds, running, steps, waking
from conductor_app.transitions.waits.wait import Wait
from conductor_app.values.payloads import dumps


@dataclass(frozen=True)
class MembersWait(Wait):
    """Steps that are awaited together."""

    #: Their names.
    members: Sequence[str]
    #: Whether a failure that is one too many decides.
    fails_fast: bool
    #: How many failures it lets pass; ``None`` is none, and then all have to succeed.
    max_failures: int | None = None

    @property
    def opens_first(self) -> bool:
        """It does: a wait for steps that were decided is none."""
        return True

    @property
    def counts_some(self) -> bool:
        """Whether not all of them decide, so that those have to be noted that do."""
        return self.max_failures is not None

    def is_there(self, execution: Execution) -> bool:
        """Record it; tell whether there is nothing left to wait for."""
        # Steps before executions, as everywhere: a member that is just ending holds its step and then asks for the
        # execution's row.
        guards.must_hold(execution)
        if _open(execution, self).status == StepStatus.PENDING:
            return False
        running.lock_held(execution)  # what a run records, it records while it holds its execution
        return True


def _open(execution: Execution, wait: MembersWait) -> Step:
    """Insert the step that waits for the undecided ones of its members, and settle it at once if nothing is awaited.

    The members are locked: one that is just being decided is either counted here as decided, or counts this down.
    """
    using = database()
    group = steps.insert(
        execution,
        wait.step,
        wait.kind,
        total=len(wait.members),
        remaining=len(wait.members),
        fails_fast=wait.fails_fast,
        max_failures=wait.max_failures,
        counted="" if wait.counts_some else None,
        result=dumps(list(wait.members), "members"),
    )
    rows = Step.objects.using(using).filter(execution_id=execution.pk, name__in=wait.members)
    if rows.filter(status=StepStatus.PENDING).update(group=group) == len(wait.members):
        return group
    decided = rows.exclude(status=StepStatus.PENDING).only("name", "status", "error", "child_id")
    _count(group, {step.name: step for step in decided}, wait)
    values = {name: getattr(group, name) for name in ("status", "remaining", "failures", "counted")}
    if group.status != StepStatus.PENDING:
        values.update(error=group.error, child_id=group.child_id, finished_at=clock.now())
    Step.objects.using(using).filter(pk=group.pk).update(**values)
    if group.status != StepStatus.PENDING:
        kinds.of(group.kind).decided(group, by=None)
    return group


def _count(group: Step, decided: dict[str, Step], wait: MembersWait) -> None:
    """Count members that were decided before, as ``steps.count_down`` would have, in the order of the arguments."""
    group.remaining = len(wait.members)
    for name in wait.members:
        step = decided.get(name)
        if step is None:
            continue
        group.remaining -= 1
        let_pass = wait.max_failures or 0
        if step.status == StepStatus.SUCCEEDED:
            if wait.counts_some:
                group.counted = f"{group.counted}{name},"
            if group.remaining <= let_pass - group.failures:
                group.status = StepStatus.SUCCEEDED
        elif wait.fails_fast and group.failures >= let_pass:
            group.status, group.error, group.child_id = step.status, step.error, step.child_id
        else:
            group.failures += wait.max_failures is not None
            if not group.remaining:
                group.status = StepStatus.SUCCEEDED
        if group.status != StepStatus.PENDING:
            return


def cancel_unstarted(group: Step, reason: str) -> None:
    """Cancel those children of the undecided members of a step that no run has started; its row is locked.

    Past those that somebody has locked: children come before steps, and this comes after one.
    """
    for row in waking.cancel_unstarted(children_of(group), reason, skip=True):
        steps.settle(group.execution_id, row.step, StepStatus.CANCELLED, error=row.error)


def children_of(group: Step, beside: str = "") -> ExecutionQuerySet:
    """Return the children of the undecided members of a step, except the member ``beside``."""
    members: Any = Step.objects.using(database()).filter(
        execution_id=group.execution_id, group_id=group.pk, status=StepStatus.PENDING
    )
    keys = list(members.exclude(name=beside).values_list("child_id", flat=True))
    return Execution.objects.using(database()).filter(pk__in=[key for key in keys if key is not None])
