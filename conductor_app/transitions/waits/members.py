"""What kinds of waits have in common that wait for other steps: how they are opened, and how they end.

Locks are taken in one order: a started child's step, or a timer's; the step that waits for it; the messages that this
one waits for. So whoever sends an event locks the step that waits for it first.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db.models import OuterRef, Q, QuerySet

from conductor_app.exceptions import CancelExecution
from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import OPEN_STATUSES, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import guards, kinds, mailbox, running, steps, waking
from conductor_app.transitions.kinds import Kind
from conductor_app.transitions.waits.wait import Wait
from conductor_app.values.payloads import dumps, loads


@dataclass(frozen=True)
class MembersWait(Wait):
    """Steps that are awaited together."""

    #: Their names.
    members: Sequence[str]
    #: Whether a failure that is one too many decides.
    fails_fast: bool
    #: How many failures it lets pass; ``None`` is none, and then all have to succeed.
    max_failures: int | None = None
    #: What those wait for that are events, by their steps' names.
    events: Mapping[str, str] = field(default_factory=dict)
    #: Whether there are timers among them.
    has_timers: bool = False

    @property
    def opens_first(self) -> bool:
        """It does: a wait for steps that were decided is none."""
        return True

    @property
    def counts_some(self) -> bool:
        """Whether those have to be noted that do their part."""
        return self.max_failures is not None or bool(self.events) or kinds.of(self.kind).is_decided_by_one

    @property
    def takes_all(self) -> bool:
        """Whether it takes all that were decided before, and not the first of them alone."""
        return False

    def values(self) -> dict[str, Any]:
        """Return what else its row holds."""
        return {}

    def in_order(self, decided: Mapping[str, Step]) -> Iterable[str]:
        """Return its members in the order in which they count that were decided before."""
        del decided
        return self.members

    def is_there(self, execution: Execution) -> bool:
        """Record it; tell whether there is nothing left to wait for."""
        # Steps before executions, as everywhere: a member that is just ending holds its step and then asks for the
        # execution's row.
        guards.must_hold(execution)
        group = _insert(execution, self)
        decided = _mark(group, self)
        if self.events and running.lock_held(execution):
            raise CancelExecution
        if decided or self.events:
            _count(execution, group, decided, self)
            _write(group)
        if group.status == StepStatus.PENDING:
            return False
        running.lock_held(execution)  # what a run records, it records while it holds its execution
        return True


def _insert(execution: Execution, wait: MembersWait) -> Step:
    return steps.insert(
        execution,
        wait.step,
        wait.kind,
        total=len(wait.members),
        remaining=len(wait.members),
        fails_fast=wait.fails_fast,
        max_failures=wait.max_failures,
        counted="" if wait.counts_some else None,
        result=dumps(list(wait.members), "members"),
        **wait.values(),
    )


def _mark(group: Step, wait: MembersWait) -> dict[str, Step]:
    """Let the undecided members tell ``group`` when they are decided; return the others.

    The members are locked: one that is just being decided is either found here as decided, or counts ``group`` down.
    """
    rows = Step.objects.using(database()).filter(execution_id=group.execution_id, name__in=wait.members)
    if wait.has_timers:
        end_timers(rows)
    marked = rows.filter(status=StepStatus.PENDING).update(group=group)
    if marked == len(wait.members):
        return {}
    decided = rows.exclude(status=StepStatus.PENDING).only("name", "status", "error", "child_id", "finished_at")
    return {step.name: step for step in decided}


def end_timers(rows: QuerySet[Step]) -> None:
    """Decide those of ``rows`` that are timers and over, which the sweeper has not come to."""
    over = kinds.those(lambda kind: kind.when_overdue == StepStatus.SUCCEEDED and not kind.suspends)
    overdue = rows.filter(kind__in=over, status=StepStatus.PENDING, deadline_at__lte=clock.now())
    overdue.update(status=StepStatus.SUCCEEDED, finished_at=clock.now())


def _count(execution: Execution, group: Step, decided: Mapping[str, Step], wait: MembersWait) -> None:
    """Count members that were decided before, as ``steps.count_down`` would have, until they decide ``group``.

    Events are taken from the mailbox where it is their turn, and waited for if there are none. The execution's row is
    locked: whoever sends one writes that row too, so either that commit is visible here, or it will find the step.
    """
    group.remaining = len(wait.members)
    for name in wait.in_order(decided):
        step = decided.get(name)
        if step is None and name in wait.events:
            step = _take(execution, group, name, wait.events[name])
        if step is None:
            continue
        group.remaining -= 1
        _count_one(group, step, wait)
        if group.status != StepStatus.PENDING and not wait.takes_all:
            return


def _count_one(group: Step, step: Step, wait: MembersWait) -> None:
    let_pass = wait.max_failures or 0
    if kinds.of(group.kind).is_decided_by_one and wait.max_failures is None:
        group.counted = f"{group.counted}{step.name},"
        if group.status == StepStatus.PENDING:
            group.status = step.status
    elif step.status == StepStatus.SUCCEEDED:
        if wait.counts_some:
            group.counted = f"{group.counted}{step.name},"
        if (group.remaining or 0) <= let_pass - group.failures:
            group.status = StepStatus.SUCCEEDED
    elif wait.fails_fast and group.failures >= let_pass:
        group.status, group.error, group.child_id = step.status, step.error, step.child_id
    else:
        group.failures += wait.max_failures is not None
        if not group.remaining:
            group.status = StepStatus.SUCCEEDED


def _take(execution: Execution, group: Step, name: str, event: str) -> Step | None:
    """Open the step of an event; return it if the event is there."""
    step = steps.insert(execution, name, StepKind.MESSAGE, task=event, group=group)
    payload = mailbox.take(step)
    if payload is None:
        return None
    steps.settle(execution.pk, name, StepStatus.SUCCEEDED, result=payload)
    step.status = StepStatus.SUCCEEDED
    return step


def _write(group: Step) -> None:
    values = {name: getattr(group, name) for name in ("status", "remaining", "failures", "counted")}
    if group.status != StepStatus.PENDING:
        values.update(error=group.error, child_id=group.child_id, finished_at=clock.now())
    Step.objects.using(database()).filter(pk=group.pk).update(**values)
    if group.status != StepStatus.PENDING:
        kinds.of(group.kind).decided(group, by=None)


class MemberKind(Kind):
    """A step for which nobody waits alone."""

    suspends = False

    def pass_on(self, step: Step, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None) -> None:
        """Count down what waits for it."""
        pass_on(step, status, error=error, root_id=root_id)


def pass_on(step: Step, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None) -> None:
    """Count down the step that waits for a member that has just been decided."""
    if step.group_id is not None:
        group = Step.objects.using(database()).filter(pk=step.group_id)
        waking.count_down(group, status, child_id=step.child_id, error=error, root_id=root_id, member=step.name)


def forget_messages(group: Step) -> None:
    """Wait no more for the events of a step that is decided: they stay in the mailbox for a later wait."""
    if group.counted is not None:
        waited = Step.objects.using(database()).filter(execution_id=group.execution_id, group_id=group.pk)
        # Nothing refers to them: they have taken no event.
        waited.filter(kind=StepKind.MESSAGE, status=StepStatus.PENDING)._raw_delete(database())


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


def in_flight() -> QuerySet[Any]:
    """Return the undecided members of a step that go on, for a subquery."""
    goes_on = Q(child__status__in=sorted(OPEN_STATUSES)) | Q(kind__in=kinds.those(lambda kind: not kind.has_child))
    # By execution and not by group: an index has the execution.
    return Step.objects.using(database()).filter(
        goes_on, execution=OuterRef("execution_id"), group=OuterRef("pk"), status=StepStatus.PENDING
    )


def decide_by_hand(group: Step) -> None:
    """Decide a step of which one member alone decides, and that has missed it; for the audit."""
    rows = Step.objects.using(database()).filter(execution_id=group.execution_id, name__in=loads(group.result))
    decided = list(rows.exclude(status=StepStatus.PENDING).order_by("finished_at", "id"))
    lets_pass = group.max_failures is not None
    chosen = next((step for step in decided if not lets_pass or step.status == StepStatus.SUCCEEDED), None)
    if chosen is not None:
        Step.objects.using(database()).filter(pk=group.pk).update(counted=f"{chosen.name},")
    status = StepStatus.FAILED if chosen is None else StepStatus(chosen.status)
    if waking.settle(group.execution_id, group.name, status):
        forget_messages(group)
