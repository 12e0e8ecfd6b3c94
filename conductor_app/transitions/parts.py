"""Guards and values that several moves have, by their names (``store.moves``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db.models import (
    BooleanField,
    Case,
    CharField,
    DateTimeField,
    Exists,
    Expression,
    ExpressionWrapper,
    F,
    Model,
    Q,
    QuerySet,
    When,
)
from django.db.models.expressions import Value
from django.db.models.functions import Coalesce
from django.db.models.lookups import Exact

from conductor_app.conf import conductor_settings
from conductor_app.models import Attempt, Execution, PausedTask, Step
from conductor_app.models.execution import IS_PAUSED
from conductor_app.states import LATE_REASON, ExecutionStatus, OnTimeout, RunOutcome, StepStatus
from conductor_app.store import clock
from conductor_app.store.moves import Insert, Update
from conductor_app.store.slots import NOW, AnyField, Earlier, Given, PastIndexes, Slot, after, column, given
from conductor_app.transitions import dispatch

NO_LEASE: dict[str, Any] = {"lease_owner": "", "lease_expires_at": None}
#: Of an execution that nobody holds.
RELEASED: dict[str, Any] = {"held_at": None, "held_by": None, "hold_reason": None}
NOT_QUEUED: dict[str, Any] = {"dispatch_at": None, "dispatches": 0}
#: Of an execution that becomes final: each write that makes one so frees its unique key.
FINAL: dict[str, Any] = {"unique_key": None}


#: Of an execution that is found by its key.
STATUS = PastIndexes(F("status"), output_field=CharField())


def has_status(status: ExecutionStatus) -> Q:
    """Return the guard of an execution that is found by its key."""
    return Q(Exact(STATUS, status.value))


def dispatch_at(span: str | Slot) -> Expression:
    """Return when the sweeper is to publish an execution that is queued and due now; see ``published``.

    Args:
        span: How long after now, at the latest.
    """
    return Earlier(after(span), Given("dispatch_by", DateTimeField()), output_field=DateTimeField())


def flag(condition: Q) -> Expression:
    """Return a condition as something that a lock finds."""
    return ExpressionWrapper(condition, output_field=BooleanField())


def either(model: type[Model], *choices: tuple[Expression, dict[str, Any]]) -> dict[str, Any]:
    """Return values by conditions: that of the first choice that is met and names the column, or the old one."""
    names = dict.fromkeys(name for _, values in choices for name in values)
    return {name: _either(column(model, name), choices) for name in names}


def _either(field: AnyField, choices: Sequence[tuple[Expression, dict[str, Any]]]) -> Case:
    def value(given: Any) -> Any:
        return given if hasattr(given, "resolve_expression") else Value(given, output_field=field)

    name = field.attname
    cases = [When(condition, then=value(values[name])) for condition, values in choices if name in values]
    return Case(*cases, default=F(name), output_field=field)


#: What only the run may change that holds the execution; as ``ExecutionQuerySet.held_by``. See ``held``.
HELD = Q(
    id=given(Execution, "id"), fence=given(Execution, "fence"), lease_owner=given(Execution, "lease_owner", "holder")
) & has_status(ExecutionStatus.RUNNING)
NOT_TO_CANCEL = Q(cancel_requested_at__isnull=True)
#: As ``ExecutionQuerySet.unasked``.
UNASKED = NOT_TO_CANCEL | Q(cancel_reason__startswith=LATE_REASON)

#: Nobody holds the execution (``transitions.holding``). ``HELD`` is about the run that holds the lease.
NOT_ON_HOLD = Q(held_at__isnull=True)
#: Of an execution that is queued: a run of it may begin, as far as people have a say.
IS_LET = NOT_TO_CANCEL & NOT_ON_HOLD & ~Q(IS_PAUSED)
#: The same of a child that does not exist yet.
CHILD_IS_LET = ~Q(Exists(QuerySet(PausedTask).filter(name=given(Execution, "task"))))
#: A run may store children: those of a held one would run beside it.
MAY_HAVE_CHILDREN = HELD & NOT_TO_CANCEL & NOT_ON_HOLD

#: A run ends, and its execution waits for children that it stores.
WAIT = Update("waiting", Execution, MAY_HAVE_CHILDREN, {**NO_LEASE, **NOT_QUEUED, "status": ExecutionStatus.WAITING})
#: Of a step that a run opens or records.
STEP: dict[str, Any] = {
    "execution_id": given(Step, "execution_id", "id"),
    "name": given(Step, "name", "step"),
    "attempt": given(Step, "attempt"),
    "fence": given(Step, "fence"),
    "created_at": NOW,
}
#: Of a step that stands for children; see ``opened``.
OPENED: dict[str, Any] = {
    **STEP,
    "status": StepStatus.PENDING,
    "payload_digest": given(Step, "payload_digest"),
    "timeout_seconds": given(Step, "timeout_seconds", "timeout"),
    "on_timeout": given(Step, "on_timeout"),
    "deadline_at": after("deadline_in"),
}

#: Of an execution that is claimed; see ``lease``.
CLAIMED: dict[str, Any] = {
    "fence": F("fence") + 1,
    "lease_owner": given(Execution, "lease_owner", "owner"),
    "lease_expires_at": after("lease"),
    "started_at": Coalesce("started_at", NOW),
    "run_started_at": NOW,
    **NOT_QUEUED,
    "status": ExecutionStatus.RUNNING,
}
#: Of an execution that is queued and due now; see ``published``. What else its status says is written, too, for one
#: that waits only since this move waited: PostgreSQL checks constraints with the old row's values first.
QUEUED: dict[str, Any] = {
    "due_at": NOW,
    "dispatch_at": dispatch_at("dispatch_in"),
    "finished_at": None,
    **NO_LEASE,
    "status": ExecutionStatus.QUEUED,
}


def run_ended(outcome: RunOutcome, **more: Any) -> Insert:
    """Return the row of a run that ends, of what that knows of itself (``ran``)."""
    return Insert(
        "run",
        Attempt,
        {
            "execution_id": given(Attempt, "execution_id", "id"),
            "attempt": given(Attempt, "attempt"),
            "run": given(Attempt, "run", "fence"),
            "worker": given(Attempt, "worker", "holder"),
            "due_at": clock.Instant(given(Attempt, "due_at", "run_due_at")),
            "started_at": clock.Instant(given(Attempt, "started_at", "run_started_at")),
            "finished_at": NOW,
            "outcome": outcome,
            **more,
        },
    )


#: Of one that waits for the step that it opens.
RUN_SUSPENDED = run_ended(RunOutcome.SUSPENDED, step=given(Attempt, "step"))


def held(execution: Execution) -> dict[str, Any]:
    """Return by what a run holds its execution."""
    return {"id": execution.pk, "fence": execution.fence, "holder": execution.lease_owner}


def ran(execution: Execution) -> dict[str, Any]:
    """Return what a run says of itself when it ends, and by what it holds its execution."""
    return {
        **held(execution),
        "attempt": execution.attempt,
        "run_due_at": execution.due_at,
        "run_started_at": execution.run_started_at,
    }


def opened(
    execution: Execution, step: str, payload_digest: str, timeout: float | None, on_timeout: OnTimeout
) -> dict[str, Any]:
    """Return what a run says of itself, and of the step that it opens."""
    return {
        **ran(execution),
        "step": step,
        "payload_digest": payload_digest,
        "timeout": timeout,
        "deadline_in": None if timeout is None else clock.interval(timeout),
        "on_timeout": on_timeout,
    }


def lease(owner: str) -> dict[str, Any]:
    """Return who claims an execution, and for how long."""
    return {"owner": owner, "lease": clock.interval(conductor_settings().LEASE_SECONDS, skipping=False)}


def published(first: dispatch.FirstPublication) -> dict[str, Any]:
    """Return when the sweeper is to publish an execution."""
    return {"dispatch_in": clock.interval(first.seconds), "dispatch_by": first.by}
