"""Find and record what an execution remembers.

The only writer of the table ``Step``, except for ``transitions.waits``, of what one kind of step alone needs, and for
moves (``store.moves``), which write several tables at once.
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
    Q,
    QuerySet,
    TextField,
    UUIDField,
    Value,
    When,
)
from django.db.models.functions import Coalesce, Concat

from conductor_app.exceptions import Failure, NewerFormat, OutcomeLost
from conductor_app.models import CopiedOutcome, Execution, Step, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import (
    CHILD_KINDS,
    FINAL_STATUSES,
    LATE_REASON,
    ExecutionStatus,
    StepKind,
    StepStatus,
)
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.store.statements import Literal, update_returning
from conductor_app.transitions import kinds
from conductor_app.values.failures import read_failure
from conductor_app.values.payloads import read_result


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
    #: Of the run that recorded it; 0 if it was copied.
    fence: int
    #: Of a map or gather: how many children it has.
    total: int | None = None
    #: In which attempt it was opened; 0 if this process has stored it itself.
    attempt: int = 0
    #: See ``Step.counted``.
    counted: str | None = None

    @property
    def is_pending(self) -> bool:
        """Whether the outcome is still open."""
        return self.status == StepStatus.PENDING

    @property
    def counted_names(self) -> list[str]:
        """The names of the members that have decided it, in the order in which they came."""
        return [name for name in (self.counted or "").split(",") if name]

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
        held_by = kinds.of(self.kind).held_by(self.child_id)
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
    "counted",
)


#: A claim brings no more steps, and none with more bytes of results and errors: PostgreSQL takes no field of 1 GB. The
#: run reads them then.
_BROUGHT_STEPS, _BROUGHT_BYTES = 1_000, 16_384


def brought(claimed: str) -> str:
    """Return the query by which the claim of an execution brings its steps on PostgreSQL, as text for ``memory_of``.

    Args:
        claimed: The name of the write that has claimed it. One that is claimed for the first time has no steps.
    """
    table, executions = Step._meta.db_table, Execution._meta.db_table
    columns = {
        name: f"child.{name.removeprefix('child__')}" if name.startswith("child__") else f"{table}.{name}"
        for name in MEMORY_FIELDS
    }
    sizes = [f"COALESCE(OCTET_LENGTH({columns[name]}), 0)" for name in columns if name.endswith(("result", "error"))]
    return f"""
        CASE WHEN {claimed}.fence > 1 THEN (
            SELECT CASE WHEN COUNT(*) <= {_BROUGHT_STEPS} AND COALESCE(BOOL_AND(is_short), TRUE) THEN COALESCE(
                json_agg(json_build_array({", ".join(columns)}) ORDER BY step_id) FILTER (WHERE is_short), '[]'
            )::text END
            FROM (
                SELECT
                    {table}.id AS step_id, {", ".join(f"{source} AS {name}" for name, source in columns.items())},
                    {" + ".join(sizes)} <= {_BROUGHT_BYTES} AS is_short
                FROM {table} LEFT JOIN {executions} AS child ON child.id = {table}.child_id
                WHERE {table}.execution_id = {claimed}.id
                ORDER BY {table}.id
                LIMIT {_BROUGHT_STEPS + 1}
            ) AS remembered
        ) END
    """  # noqa: S608 - names of our own tables and columns


def memory_of(rows: Iterable[Sequence[Any]]) -> dict[str, Memory]:
    """Return what an execution remembers, by ``MEMORY_FIELDS`` of its steps in the order in which they were opened."""
    return {
        row[0]: Memory(
            name=row[0],
            kind=_kind_of(row[0], row[1]),
            status=_STATUSES[row[2]],
            task=row[3],
            payload_digest=row[4],
            child_id=row[5] if row[5] is None or isinstance(row[5], uuid.UUID) else uuid.UUID(row[5]),
            timeout_seconds=row[6],
            # Read from the child, unless it was copied from the source of this fork.
            result=row[9] if row[7] is None and row[1] in CHILD_KINDS else row[7],
            # A child's failure, too; why it was cancelled, or a step failed, is read from the step.
            error=row[10] if row[8] is None and row[2] == StepStatus.FAILED else row[8],
            fence=row[11],
            total=row[12],
            attempt=row[13],
            counted=row[14],
        )
        for row in rows
    }


def woken_by(execution: Execution, memory: dict[str, Memory]) -> str | None:
    """Return the step that the run before this one has opened and waited for, if its outcome has woken this one.

    Whatever the code does then, it comes to that step again, unless it has changed or is not deterministic. Where
    anything else lies between the two runs (another attempt, a shutdown, a lost worker, an operator), nothing is said.
    """
    last = next(reversed(memory.values()), None) if memory else None
    if last is None or not kinds.of(last.kind).suspends or last.is_pending:
        return None
    follows = last.fence == execution.fence - 1 and last.attempt == execution.attempt
    return last.name if follows else None


def _kind_of(name: str, kind: str) -> StepKind:
    try:
        return _KINDS[kind]
    except KeyError:
        raise NewerFormat(f"step {name!r} is of the kind {kind!r}, which another version has written") from None


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


def recall_map(execution_id: uuid.UUID, remembered: Memory) -> list[ChildOutcome]:
    """Return the children of a map in the order of their payloads, in one query."""
    rows: QuerySet[Any] = children_of(execution_id, remembered.name)
    key = "pk"
    if remembered.fence == 0:
        copied = CopiedOutcome.objects.using(database())
        rows, key = copied.filter(step__execution_id=execution_id, step__name=remembered.name), "child_id"
    return [
        ChildOutcome(row[0], row[1] or 0, ExecutionStatus(row[2]), row[3], row[4])
        for row in rows.order_by("position").values_list(key, "position", "status", "result", "error")
    ]


def insert(
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


def deadline(timeout: float | None) -> Any:
    """Return when a timeout ends that begins now."""
    return None if timeout is None else clock.after(timeout)


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
    fields = ("name", "kind", "group_id", "child_id")
    values: dict[str, Any] = {} if result is None else {"result": result}
    decided = update_returning(pending, fields, status=status, error=error, finished_at=clock.now(), **values)
    return decided[0] if decided else None


def settle_overdue(keys: Sequence[int]) -> None:
    """Decide pending steps past their deadline whose rows the current transaction has locked."""
    end_well = kinds.those(lambda kind: kind.when_overdue == StepStatus.SUCCEEDED)
    slept = When(kind__in=end_well, then=Value(StepStatus.SUCCEEDED.value))
    Step.objects.using(database()).filter(pk__in=keys).update(
        status=Case(slept, default=Value(StepStatus.TIMED_OUT.value)), error=None, finished_at=clock.now()
    )


#: Of a map or gather that fails fast: it lets no more failures pass.
TOO_MANY = Q(fails_fast=True, failures__gte=Coalesce("max_failures", 0))
#: Of a gather: with one more success there are enough of them, even if all that have not ended fail.
_ENOUGH = Q(remaining__lte=1 + Coalesce(F("max_failures"), 0) - F("failures"))


def count_down(
    counted: QuerySet[Step],
    status: StepStatus,
    *,
    child_id: uuid.UUID | None = None,
    error: str | None = None,
    member: str | None = None,
) -> Step | None:
    """Count one child of a map, or one member of a gather, as ended.

    The last one decides, the failure that is one too many, and of a gather the success with which there are enough.
    One statement on one row: of two that end together, the second waits for the first, and sees its count.

    Args:
        counted: The row of the map or gather.
        status: How the child ended.
        child_id: The child.
        error: Why it was cancelled.
        member: Of a gather: the step that has ended.

    Returns:
        The row as it is now; ``None`` if it had been decided before.
    """
    is_success = status == StepStatus.SUCCEEDED
    is_last = Q(remaining__lte=1)
    ends_well = _ENOUGH if is_success and member is not None else is_last
    is_decided = ends_well if is_success else ends_well | TOO_MANY
    decisions = [When(ends_well, then=Value(StepStatus.SUCCEEDED.value))]
    counts = Q(counted__isnull=False)
    if not is_success:
        decisions.insert(0, When(TOO_MANY, then=Value(status.value)))
    if member is not None:
        by_one = Q(kind__in=kinds.those(lambda kind: kind.is_decided_by_one), max_failures__isnull=True)
        decisions.insert(0, When(by_one, then=Value(status.value)))
        is_decided |= by_one
        counts &= Q() if is_success else by_one
    values: dict[str, Any] = {
        # The counts last: MySQL assigns from left to right, and the conditions are about the old ones.
        "status": Case(*decisions, default=Value(StepStatus.PENDING.value)),
        "finished_at": Case(When(is_decided, then=clock.now()), default=None, output_field=DateTimeField()),
    }
    if member is not None:
        more = Concat(F("counted"), Value(f"{member},"), output_field=TextField())
        values["counted"] = Case(When(counts, then=more), default=F("counted"), output_field=TextField())
    if not is_success:
        values["child_id"] = Case(When(TOO_MANY, then=Value(child_id, output_field=UUIDField())), default=None)
        values["error"] = Case(When(TOO_MANY, then=Value(error, output_field=TextField())), default=None)
        is_let_pass = When(Q(max_failures__isnull=False) & ~TOO_MANY, then=F("failures") + 1)
        values["failures"] = Case(is_let_pass, default=F("failures"))
    values["remaining"] = F("remaining") - 1
    fields = ("execution_id", "name", "kind", "status", "remaining", "max_failures", "counted", "on_timeout")
    rows = update_returning(counted.filter(status=StepStatus.PENDING), fields, **values)
    return rows[0] if rows else None


def of(execution_id: uuid.UUID, name: str) -> QuerySet[Step]:
    """Return one step's row as a queryset."""
    return Step.objects.using(database()).filter(execution_id=execution_id, name=name)


def children_of(execution_id: uuid.UUID, name: str) -> ExecutionQuerySet:
    """Return the children of a map."""
    return Execution.objects.using(database()).filter(parent_id=execution_id, step=name, position__isnull=False)


def awaiting_gather(execution_id: uuid.UUID, name: str) -> int | None:
    """Return the key of the undecided gather that any failure of this step decides; ``None`` if there is none."""
    found = of(execution_id, name).filter(
        group__status=StepStatus.PENDING, group__fails_fast=True, group__max_failures__isnull=True
    )
    return found.values_list("group_id", flat=True).first()


def lock_pending(key: int) -> bool:
    """Lock a step until the end of the current transaction; tell whether it is undecided."""
    row = Step.objects.using(database()).filter(pk=key, status=StepStatus.PENDING)
    return bool(locked(row).values_list("pk", flat=True))


def is_pending(execution_id: uuid.UUID, name: str) -> bool:
    """Tell whether a step is still undecided, as of now."""
    return of(execution_id, name).filter(status=StepStatus.PENDING).exists()


def reopen(step: Step, *, remaining: int | None = None) -> None:
    """Make a decided step pending again, with a new deadline of the same length: for an operator's retry.

    Args:
        remaining: Of a map: how many children it waits for.
    """
    values: dict[str, Any] = (
        {} if remaining is None else {"remaining": remaining, "failures": 0, "child_id": None, "result": None}
    )
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.PENDING, error=None, finished_at=None, deadline_at=deadline(step.timeout_seconds), **values
    )


def end_waits(execution_id: uuid.UUID, error: str) -> None:
    """Decide for what an execution waited that is cancelled, where nobody else will: a sleep, an event.

    Its children decide their steps when they end, which a child that is late may do with a result.
    """
    pending = Step.objects.using(database()).filter(execution_id=execution_id, status=StepStatus.PENDING)
    ended = {"status": StepStatus.CANCELLED, "error": error, "finished_at": clock.now()}
    alone = kinds.those(lambda kind: kind.ends_with_execution and not kind.comes_after_group)
    pending.filter(kind__in=alone).update(**ended)
    later = pending.filter(kind__in=kinds.those(lambda kind: kind.comes_after_group))
    groups = list(later.order_by("group_id").values_list("group_id", flat=True).distinct())
    if groups:
        # What waits for them first, as everywhere: somebody may just be sending one of the events.
        list(locked(Step.objects.using(database()).filter(pk__in=groups)).values_list("pk", flat=True))
        later.update(**ended)


def resume(step: Step) -> None:
    """Make a step that a cancel has ended pending again, with the same deadline: for an operator's retry."""
    Step.objects.using(database()).filter(pk=step.pk).update(status=StepStatus.PENDING, error=None, finished_at=None)


def adopt(step: Step, **values: Any) -> None:
    """Take the results of children that succeeded after their parent had given up: for an operator's retry."""
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.SUCCEEDED, error=None, finished_at=clock.now(), **values
    )


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
    """Return the steps of an execution that are undecided and stand for many children."""
    many = kinds.those(lambda kind: kind.has_children)
    return list(
        Step.objects.using(database()).filter(execution_id=execution_id, kind__in=many, status=StepStatus.PENDING)
    )


def late_reason(step: Step) -> str:
    """Return why a child is cancelled that is late for a step."""
    return f"{LATE_REASON}{step.timeout_seconds:g}s ended"
