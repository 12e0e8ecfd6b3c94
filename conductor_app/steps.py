"""Find and record what an execution remembers. The only writer of the table ``Step``."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from conductor_app import clock
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, Step, database
from conductor_app.serialization import dump_failure, load_failure, loads
from conductor_app.sql import Literal
from conductor_app.states import FINAL_STATUSES, OnTimeout, StepKind, StepStatus


@dataclass(frozen=True)
class Memory:
    """One remembered step, as a replay sees it."""

    name: str
    kind: StepKind
    status: StepStatus
    task: str
    payload_digest: str
    child_id: uuid.UUID | None
    timeout_seconds: float | None
    #: Stored text; of the child for an invocation.
    result: str | None
    error: str | None
    fence: int

    @property
    def is_pending(self) -> bool:
        """Whether the outcome is still open."""
        return self.status == StepStatus.PENDING

    def get_result(self) -> Any:
        """Return the decoded result, a fresh object at each call."""
        return loads(self.result)

    def get_failure(self) -> Failure:
        """Return the stored failure."""
        return load_failure(self.error)


def recall(execution_id: uuid.UUID, name: str | None = None) -> dict[str, Memory]:
    """Return all that an execution remembers (or one step of it) in one query, with the outcomes of its children."""
    rows = Step.objects.using(database()).filter(execution_id=execution_id)
    if name is not None:
        rows = rows.filter(name=name)
    return {
        row[0]: Memory(
            name=row[0],
            kind=StepKind(row[1]),
            status=StepStatus(row[2]),
            task=row[3],
            payload_digest=row[4],
            child_id=row[5],
            timeout_seconds=row[6],
            result=row[9] if row[1] == StepKind.INVOKE else row[7],
            error=row[10] if row[1] == StepKind.INVOKE and row[2] == StepStatus.FAILED else row[8],
            fence=row[11],
        )
        for row in rows.order_by("id").values_list(
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
        )
    }


def record(execution: Execution, name: str, *, result: str | None = None, failure: Failure | None = None) -> None:
    """Insert the outcome of a function that ``ctx.step`` ran; call it while the execution's row is locked."""
    Step.objects.using(database()).create(
        execution_id=execution.pk,
        name=name,
        kind=StepKind.STEP,
        status=StepStatus.SUCCEEDED if failure is None else StepStatus.FAILED,
        result=result,
        error=None if failure is None else dump_failure(failure),
        attempt=execution.attempt,
        fence=execution.fence,
        created_at=clock.now(),
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
) -> None:
    """Insert the pending step that ``child`` will settle; in the transaction that inserts the child."""
    Step.objects.using(database()).create(
        execution_id=execution.pk,
        name=name,
        kind=StepKind.INVOKE,
        status=StepStatus.PENDING,
        task=child.task,
        payload_digest=payload_digest,
        child_id=child.pk,
        timeout_seconds=timeout,
        on_timeout=on_timeout,
        deadline_at=None if timeout is None else clock.after(timeout),
        attempt=execution.attempt,
        fence=execution.fence,
        created_at=clock.now(),
    )


def open_sleep(execution: Execution, name: str, until: Any) -> None:
    """Insert the pending step that the sweeper settles at the instant ``until``."""
    Step.objects.using(database()).create(
        execution_id=execution.pk,
        name=name,
        kind=StepKind.SLEEP,
        status=StepStatus.PENDING,
        deadline_at=until,
        attempt=execution.attempt,
        fence=execution.fence,
        created_at=clock.now(),
    )


def settle(
    execution_id: uuid.UUID, name: str, status: StepStatus, *, error: str | None = None, only_overdue: bool = False
) -> bool:
    """Decide a pending step; ``False`` if it is decided already, so one of child, timeout and cancel wins.

    Args:
        only_overdue: Decide it only past its deadline, which an operator's retry may have moved.
    """
    pending = Step.objects.using(database()).filter(execution_id=execution_id, name=name, status=StepStatus.PENDING)
    if only_overdue:
        pending = pending.filter(deadline_at__lte=clock.now())
    return bool(pending.update(status=status, error=error, finished_at=clock.now()))


def is_pending(execution_id: uuid.UUID, name: str) -> bool:
    """Tell whether a step is still undecided, as of now."""
    return (
        Step.objects.using(database()).filter(execution_id=execution_id, name=name, status=StepStatus.PENDING).exists()
    )


def reopen(step: Step) -> None:
    """Make a decided step pending again, with a new deadline of the same length: for an operator's retry."""
    deadline = None if step.timeout_seconds is None else clock.after(step.timeout_seconds)
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.PENDING, error=None, finished_at=None, deadline_at=deadline
    )


def adopt(step: Step) -> None:
    """Take the result of a child that succeeded after its parent had given up: for an operator's retry."""
    Step.objects.using(database()).filter(pk=step.pk).update(
        status=StepStatus.SUCCEEDED, error=None, finished_at=clock.now()
    )


def overlooked(execution_id: uuid.UUID) -> list[tuple[str, str | None, StepStatus]]:
    """Return pending invocations whose child has ended or is gone, each with the error and outcome to settle it with.

    No transition leaves one behind; an UPDATE or DELETE by hand does.
    """
    pending = Step.objects.using(database()).filter(
        execution_id=execution_id, kind=StepKind.INVOKE, status=StepStatus.PENDING
    )
    found = []
    for name, status, error in pending.values_list("name", "child__status", "child__error"):
        if status is None:
            gone = Failure(type="Cancelled", message="Cancelled: its row was deleted")
            found.append((name, dump_failure(gone), StepStatus.CANCELLED))
        elif status in FINAL_STATUSES:
            outcome = StepStatus(status)
            found.append((name, error if outcome == StepStatus.CANCELLED else None, outcome))
    return found


def overdue(limit: int) -> list[Step]:
    """Return pending steps past their deadline, the oldest first."""
    return list(
        Step.objects.using(database())
        .filter(status=Literal(StepStatus.PENDING.value), deadline_at__lte=clock.now())
        .order_by("deadline_at")
        .only("id", "execution_id", "name", "kind", "child_id", "on_timeout", "timeout_seconds")[:limit]
    )
