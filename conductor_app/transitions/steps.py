"""Find and record what an execution remembers.

The only writer of the table ``Step``, except for ``transitions.statements``, which writes several tables at once.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from django.db.models import (
    Case,
    DateTimeField,
    F,
    OuterRef,
    Q,
    QuerySet,
    Subquery,
    TextField,
    UUIDField,
    Value,
    When,
)

from conductor_app.exceptions import Failure, OutcomeLost
from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import (
    CHILD_KINDS,
    FINAL_STATUSES,
    OPEN_STATUSES,
    ExecutionStatus,
    OnTimeout,
    StepKind,
    StepStatus,
)
from conductor_app.store import clock
from conductor_app.store.statements import Literal, update_returning
from conductor_app.values.failures import dump_failure, read_failure
from conductor_app.values.payloads import dumps, read_result


class Memory(NamedTuple):
    """One remembered step, as a replay sees it."""

    name: str
    kind: StepKind
    status: StepStatus
    task: str
    payload_digest: str
    child_id: uuid.UUID | None
    timeout_seconds: float | None
    #: Stored text; of the child for one that stands for a child.
    result: str | None
    error: str | None
    fence: int
    #: Of a map or gather: how many children it has.
    total: int | None = None
    #: In which attempt it was opened; 0 if this process has stored it itself.
    attempt: int = 0

    @property
    def is_pending(self) -> bool:
        """Whether the outcome is still open."""
        return self.status == StepStatus.PENDING

    def get_result(self) -> Any:
        """Return the decoded result, a fresh object at each call.

        Raises:
            OutcomeLost: There is none.
        """
        return read_result(self.result, functools.partial(self.lost, "result"))

    def get_failure(self) -> Failure:
        """Return the stored failure, or why it was cancelled.

        Raises:
            OutcomeLost: There is none.
        """
        if self.error is None and self.status == StepStatus.FAILED:
            raise self.lost("error")
        return read_failure(self.error)

    def lost(self, what: str) -> OutcomeLost:
        """Return the error to raise when something is gone that was recorded."""
        held_by = "has been deleted or changed"
        if self.kind in CHILD_KINDS:
            child = "the child that held it" if self.child_id is None else f"the child {self.child_id}, which held it,"
            held_by = f"{child} has been deleted or changed"
        elif self.kind in (StepKind.MAP, StepKind.GATHER):
            held_by = "a child that held a part of it has been deleted or changed"
        return OutcomeLost(
            f"Step '{self.name}' was recorded as {self.status}, and its {what} is gone: {held_by}. A replay cannot go "
            "on without it. Restore what is missing and retry the execution, or start a new one.",
            step=self.name,
        )


def recall(execution_id: uuid.UUID, name: str | None = None) -> dict[str, Memory]:
    """Return all that an execution remembers (or one step of it) in one query, with the outcomes of its children."""
    rows = Step.objects.using(database()).filter(execution_id=execution_id)
    if name is not None:
        rows = rows.filter(name=name)
    return memory_of(rows.order_by("id").values_list(*MEMORY_FIELDS))


#: What is read of a step, and of the child that it stands for, in this order.
MEMORY_FIELDS = (
    "name",
    "kind",
    "status",
    "task",
    "payload_digest",
    "child_id",
    "timeout_seconds",
    "result",
    "error",
    "child__result",
    "child__error",
    "fence",
    "total",
    "attempt",
)


def memory_of(rows: Iterable[Sequence[Any]]) -> dict[str, Memory]:
    """Return what an execution remembers, by ``MEMORY_FIELDS`` of its steps in the order in which they were opened."""
    return {
        row[0]: Memory(
            name=row[0],
            kind=_KINDS[row[1]],
            status=_STATUSES[row[2]],
            task=row[3],
            payload_digest=row[4],
            child_id=row[5] if row[5] is None or isinstance(row[5], uuid.UUID) else uuid.UUID(row[5]),
            timeout_seconds=row[6],
            result=row[9] if row[1] in CHILD_KINDS else row[7],
            # A child's failure is read from the child; why it was cancelled, or a step failed, from the step.
            error=row[10] if row[5] is not None and row[2] == StepStatus.FAILED else row[8],
            fence=row[11],
            total=row[12],
            attempt=row[13],
        )
        for row in rows
    }


#: Kinds of steps for which a run ends.
_SUSPENDING_KINDS = frozenset({StepKind.INVOKE, StepKind.MAP, StepKind.GATHER, StepKind.SLEEP, StepKind.EVENT})


def woken_by(execution: Execution, memory: dict[str, Memory]) -> str | None:
    """Return the step that the run before this one has opened and waited for, if its outcome has woken this one.

    Whatever the code does then, it comes to that step again, unless it has changed or is not deterministic. Where
    anything else lies between the two runs (another attempt, a shutdown, a lost worker, an operator), nothing is said.
    """
    last = next(reversed(memory.values()), None) if memory else None
    if last is None or last.kind not in _SUSPENDING_KINDS or last.is_pending:
        return None
    follows = last.fence == execution.fence - 1 and last.attempt == execution.attempt
    return last.name if follows else None


_KINDS = {kind.value: kind for kind in StepKind}
_STATUSES = {status.value: status for status in StepStatus}


@dataclass(frozen=True)
class ChildOutcome:
    """How one child of a map ended, or that it has not."""

    child_id: uuid.UUID
    position: int
    status: ExecutionStatus
    result: str | None
    error: str | None

    @property
    def is_open(self) -> bool:
        """Whether the child goes on."""
        return self.status not in FINAL_STATUSES


def recall_map(execution_id: uuid.UUID, name: str) -> list[ChildOutcome]:
    """Return the children of a map in the order of their payloads, in one query."""
    rows = children_of(execution_id, name)
    return [
        ChildOutcome(row[0], row[1] or 0, ExecutionStatus(row[2]), row[3], row[4])
        for row in rows.order_by("position").values_list("pk", "position", "status", "result", "error")
    ]


def _insert(
    execution: Execution, name: str, kind: StepKind, *, status: StepStatus = StepStatus.PENDING, **values: Any
) -> Step:
    """Insert a step of the run that holds ``execution``."""
    return Step.objects.using(database()).create(
        execution_id=execution.pk,
        name=name,
        kind=kind,
        status=status,
        attempt=execution.attempt,
        fence=execution.fence,
        created_at=clock.now(),
        **values,
    )


def _deadline(timeout: float | None) -> Any:
    return None if timeout is None else clock.after(timeout)


def record(execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None) -> None:
    """Insert the outcome of a function that ``ctx.step`` ran; call it while the execution's row is locked."""
    _insert(
        execution,
        name,
        StepKind.STEP,
        status=StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED,
        result=result,
        error=None if failure is None else dump_failure(failure),
        finished_at=clock.now(),
    )


def open_invocation(
    execution: Execution,
    name: str,
    child: Execution,
    *,
    payload_digest: str,
    timeout: float | None,
    on_timeout: OnTimeout,
    kind: StepKind = StepKind.INVOKE,
) -> None:
    """Insert the pending step that ``child`` will settle; in the transaction that inserts the child."""
    _insert(
        execution,
        name,
        kind,
        task=child.task,
        payload_digest=payload_digest,
        child_id=child.pk,
        timeout_seconds=timeout,
        on_timeout=on_timeout,
        deadline_at=_deadline(timeout),
    )


def open_map(
    execution: Execution,
    name: str,
    *,
    task: str,
    payload_digest: str,
    total: int,
    timeout: float | None,
    on_timeout: OnTimeout,
    max_parallel: int | None,
    fails_fast: bool,
) -> None:
    """Insert the step that the last of ``total`` children will settle; without children it is settled already."""
    _insert(
        execution,
        name,
        StepKind.MAP,
        status=StepStatus.PENDING if total else StepStatus.SUCCEEDED,
        task=task,
        payload_digest=payload_digest,
        total=total,
        remaining=total,
        max_parallel=max_parallel,
        fails_fast=fails_fast,
        timeout_seconds=timeout,
        on_timeout=on_timeout,
        deadline_at=_deadline(timeout) if total else None,
        finished_at=None if total else clock.now(),
    )


def open_gather(execution: Execution, name: str, members: Sequence[str], *, fails_fast: bool) -> Step:
    """Insert the step that waits for the undecided ones of ``members``, and settle it at once if nothing is awaited.

    The members are locked: one that is just being decided is either counted here as decided, or counts this down.
    """
    using = database()
    gather = _insert(
        execution,
        name,
        StepKind.GATHER,
        total=len(members),
        remaining=len(members),
        fails_fast=fails_fast,
        result=dumps(list(members), "members"),
    )
    rows = Step.objects.using(using).filter(execution_id=execution.pk, name__in=members)
    gather.remaining = rows.filter(status=StepStatus.PENDING).update(group=gather)
    failed: dict[str, Step] = {}
    if fails_fast:
        undone = rows.exclude(status__in=[StepStatus.PENDING, StepStatus.SUCCEEDED])
        failed = {step.name: step for step in undone.only("name", "status", "error", "child_id")}
    values: dict[str, Any] = {"remaining": gather.remaining}
    first = next((failed[name] for name in members if name in failed), None)
    if first is not None:
        gather.status = first.status
        values.update(status=first.status, error=first.error, child_id=first.child_id, finished_at=clock.now())
    elif not gather.remaining:
        gather.status = StepStatus.SUCCEEDED
        values.update(status=StepStatus.SUCCEEDED, finished_at=clock.now())
    Step.objects.using(using).filter(pk=gather.pk).update(**values)
    return gather


def open_sleep(execution: Execution, name: str, until: Any) -> None:
    """Insert the pending step that the sweeper settles at the instant ``until``."""
    _insert(
        execution,
        name,
        StepKind.SLEEP,
        deadline_at=until,
    )


def open_event(execution: Execution, name: str, event: str, *, timeout: float | None) -> Step:
    """Insert the pending step that an event of the name ``event`` will settle."""
    return _insert(
        execution,
        name,
        StepKind.EVENT,
        task=event,
        timeout_seconds=timeout,
        deadline_at=_deadline(timeout),
    )


def awaiting(execution_id: uuid.UUID, event: str) -> Step | None:
    """Return the oldest pending step that waits for an event of this name, as of now."""
    pending = Step.objects.using(database()).filter(
        execution_id=execution_id, kind=StepKind.EVENT, task=event, status=StepStatus.PENDING
    )
    return pending.order_by("id").only("id", "execution_id", "name").first()


def settle(
    execution_id: uuid.UUID,
    name: str,
    status: StepStatus,
    *,
    error: str | None = None,
    only_overdue: bool = False,
    result: str | None = None,
) -> Step | None:
    """Decide a pending step; ``None`` if it is decided already, so one of child, timeout and cancel wins.

    Args:
        only_overdue: Decide it only past its deadline, which an operator's retry may have moved.
        result: Stored text; of an event, whose payload it is.
    """
    pending = of(execution_id, name).filter(status=StepStatus.PENDING)
    if only_overdue:
        pending = pending.filter(deadline_at__lte=clock.now())
    fields = ("kind", "group_id", "child_id")
    values: dict[str, Any] = {} if result is None else {"result": result}
    decided = update_returning(pending, fields, status=status, error=error, finished_at=clock.now(), **values)
    return decided[0] if decided else None


def settle_overdue(keys: Sequence[int]) -> None:
    """Decide pending steps past their deadline whose rows the current transaction has locked: sleeps end well."""
    slept = When(kind=StepKind.SLEEP, then=Value(StepStatus.SUCCEEDED.value))
    Step.objects.using(database()).filter(pk__in=keys).update(
        status=Case(slept, default=Value(StepStatus.TIMED_OUT.value)), error=None, finished_at=clock.now()
    )


def count_down(
    counted: QuerySet[Step], status: StepStatus, *, child_id: uuid.UUID | None = None, error: str | None = None
) -> Step | None:
    """Count one child of a map or gather as ended; the last one, or the first failure of one that fails fast, decides.

    One statement on one row: of two last children, the second waits for the first, and sees its count.

    Args:
        counted: The row of the map or gather.
        status: How the child ended.
        child_id: The child.
        error: Why it was cancelled.

    Returns:
        The row as it is now; ``None`` if it had been decided before.
    """
    is_last: Any = Q(remaining__lte=1)
    decisions = [When(is_last, then=Value(StepStatus.SUCCEEDED.value))]
    if status != StepStatus.SUCCEEDED:
        decisions.insert(0, When(fails_fast=True, then=Value(status.value)))
        is_last |= Q(fails_fast=True)
    values: dict[str, Any] = {
        # The count last: MySQL assigns from left to right, and the conditions are about the old one.
        "status": Case(*decisions, default=Value(StepStatus.PENDING.value)),
        "finished_at": Case(When(is_last, then=clock.now()), default=None, output_field=DateTimeField()),
    }
    if status != StepStatus.SUCCEEDED:
        values["child_id"] = Case(When(fails_fast=True, then=Value(child_id, output_field=UUIDField())), default=None)
        values["error"] = Case(When(fails_fast=True, then=Value(error, output_field=TextField())), default=None)
    values["remaining"] = F("remaining") - 1
    rows = update_returning(
        counted.filter(status=StepStatus.PENDING), ("execution_id", "name", "kind", "status", "remaining"), **values
    )
    return rows[0] if rows else None


def of(execution_id: uuid.UUID, name: str) -> QuerySet[Step]:
    """Return one step's row as a queryset."""
    return Step.objects.using(database()).filter(execution_id=execution_id, name=name)


def children_of(execution_id: uuid.UUID, name: str) -> ExecutionQuerySet:
    """Return the children of a map."""
    return Execution.objects.using(database()).filter(parent_id=execution_id, step=name, position__isnull=False)


def awaiting_gather(execution_id: uuid.UUID, name: str) -> int | None:
    """Return the key of the undecided gather that a failure of this step decides; ``None`` if there is none."""
    found = of(execution_id, name).filter(group__status=StepStatus.PENDING, group__fails_fast=True)
    return found.values_list("group_id", flat=True).first()


def members_beside(execution_id: uuid.UUID, name: str, gather: int) -> ExecutionQuerySet:
    """Return the children of the undecided members of a gather, except the step ``name``."""
    members = Step.objects.using(database()).filter(
        execution_id=execution_id, group_id=gather, status=StepStatus.PENDING
    )
    keys = list(members.exclude(name=name).values_list("child_id", flat=True))
    return Execution.objects.using(database()).filter(pk__in=[key for key in keys if key is not None])


def note_late(step: Step) -> None:
    """Freeze which children of a map that has just timed out are late; call it while the step's row is locked.

    A child that has ended and is not committed yet is late too: it has still to count the map down, and will be told
    that it is decided.
    """
    children = children_of(step.execution_id, step.name)
    positions = list(children.open().order_by("position").values_list("position", flat=True))
    Step.objects.using(database()).filter(pk=step.pk).update(result=dumps(positions, "positions"))


def is_pending(execution_id: uuid.UUID, name: str) -> bool:
    """Tell whether a step is still undecided, as of now."""
    return of(execution_id, name).filter(status=StepStatus.PENDING).exists()


def reopen(step: Step, *, remaining: int | None = None) -> None:
    """Make a decided step pending again, with a new deadline of the same length: for an operator's retry.

    Args:
        remaining: Of a map: how many children it waits for.
    """
    deadline = _deadline(step.timeout_seconds)
    values: dict[str, Any] = {} if remaining is None else {"remaining": remaining, "child_id": None, "result": None}
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.PENDING, error=None, finished_at=None, deadline_at=deadline, **values
    )


def end_waits(execution_id: uuid.UUID, error: str) -> None:
    """Decide the sleep or event for which an execution waited that is cancelled: nobody else will.

    Its children decide their steps when they end, which a child that is late may do with a result.
    """
    waits = Step.objects.using(database()).filter(
        execution_id=execution_id, kind__in=[StepKind.SLEEP, StepKind.EVENT], status=StepStatus.PENDING
    )
    waits.update(status=StepStatus.CANCELLED, error=error, finished_at=clock.now())


def resume_sleep(step: Step) -> None:
    """Make a sleep that a cancel has ended pending again, until the same instant: for an operator's retry."""
    Step.objects.using(database()).filter(pk=step.pk).update(status=StepStatus.PENDING, error=None, finished_at=None)


def forget(step: Step) -> None:
    """Delete a gather: the next run waits for its members again."""
    Step.objects.using(database()).filter(pk=step.pk).delete()


def adopt(step: Step) -> None:
    """Take the results of children that succeeded after their parent had given up: for an operator's retry."""
    values: dict[str, Any] = {"result": None, "child_id": None} if step.kind == StepKind.MAP else {}
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.SUCCEEDED, error=None, finished_at=clock.now(), **values
    )


def overlooked(execution_id: uuid.UUID) -> list[tuple[str, str | None, StepStatus]]:
    """Return pending invocations whose child has ended or is gone, each with the error and outcome to settle it with.

    No transition leaves one behind; an UPDATE or DELETE by hand does.
    """
    pending = Step.objects.using(database()).filter(
        execution_id=execution_id, kind__in=sorted(CHILD_KINDS), status=StepStatus.PENDING
    )
    found = []
    for name, status, error in pending.values_list("name", "child__status", "child__error"):
        if status is None:
            found.append((name, deleted_error(), StepStatus.CANCELLED))
        elif status in FINAL_STATUSES:
            outcome = StepStatus(status)
            found.append((name, error if outcome == StepStatus.CANCELLED else None, outcome))
    return found


def deleted_error() -> str:
    """Return the error with which a step is decided whose child was deleted before it had ended, as stored text."""
    return dump_failure(Failure(type="Cancelled", message="Cancelled: its row was deleted"))


def in_vain(
    limit: int | None = None, *, execution_id: uuid.UUID | None = None, root_id: uuid.UUID | None = None
) -> list[Step]:
    """Return undecided maps and gathers that are waited for while no child of theirs is in flight.

    No transition leaves one behind; an UPDATE or DELETE by hand does. A child that a map holds back is not in flight:
    those that end let it go.
    """
    waited_for = Step.objects.using(database()).filter(
        status=Literal(StepStatus.PENDING.value), execution__status=ExecutionStatus.WAITING
    )
    if execution_id is not None:
        waited_for = waited_for.filter(execution_id=execution_id)
    if root_id is not None:
        waited_for = waited_for.filter(execution__root_id=root_id)
    is_open = Q(status__in=sorted(OPEN_STATUSES))
    children = Execution.objects.using(database()).filter(
        is_open,
        ~Q(status=ExecutionStatus.QUEUED) | Q(due_at__isnull=False),
        parent=OuterRef("execution_id"),
        step=OuterRef("name"),
        position__isnull=False,
    )
    # By execution and not by group: an index has the execution.
    members = Step.objects.using(database()).filter(
        execution=OuterRef("execution_id"),
        group=OuterRef("pk"),
        status=StepStatus.PENDING,
        child__status__in=sorted(OPEN_STATUSES),
    )
    found: list[Step] = []
    for kind, in_flight in ((StepKind.MAP, children), (StepKind.GATHER, members)):
        # One row of each, not EXISTS: PostgreSQL would make that a join, and read all open executions for it.
        counted = waited_for.filter(kind=kind).annotate(in_flight=Subquery(in_flight.values("pk")[:1]))
        found += counted.filter(in_flight=None)[:limit]
    return found


def set_remaining(step: Step, remaining: int) -> None:
    """Set the count of an undecided map or gather right."""
    Step.objects.using(database()).filter(pk=step.pk, status=StepStatus.PENDING).update(remaining=remaining)


def overdue(limit: int, known: Sequence[int] = (), root_id: uuid.UUID | None = None) -> list[Step]:
    """Return pending steps past their deadline, the oldest first, except those whose keys are ``known``.

    Args:
        root_id: Only those of this tree.
    """
    fields = ("id", "execution_id", "name", "kind", "child_id", "on_timeout", "timeout_seconds")
    rows = overdue_rows().exclude(pk__in=known) if known else overdue_rows()
    rows = rows if root_id is None else rows.filter(execution__root_id=root_id)
    return list(rows.order_by("deadline_at").only(*fields)[:limit])


def overdue_rows() -> QuerySet[Step]:
    """Pending steps past their deadline."""
    return Step.objects.using(database()).filter(status=Literal(StepStatus.PENDING.value), deadline_at__lte=clock.now())


def next_deadline_in(seconds: float, since: float) -> float | None:
    """Return in how many seconds the next deadline of a pending step passes, if it does within so many.

    Args:
        since: One that passed up to so many seconds ago is the next one, too.
    """
    pending = Step.objects.using(database()).filter(status=Literal(StepStatus.PENDING.value))
    soon = pending.filter(deadline_at__gt=clock.after(-since), deadline_at__lte=clock.after(seconds))
    return clock.seconds_to_first(soon, "deadline_at")


def pending_maps(execution_id: uuid.UUID) -> list[Step]:
    """Return the maps of an execution that are undecided."""
    return list(
        Step.objects.using(database()).filter(execution_id=execution_id, kind=StepKind.MAP, status=StepStatus.PENDING)
    )
