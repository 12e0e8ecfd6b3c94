"""The statuses of executions and steps, and which moves are allowed. Plain data: no ORM, no Celery.

``queued`` → ``running`` → ``waiting`` → ``queued`` → … → one of ``succeeded``, ``failed``, ``cancelled``.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

from django.utils.translation import gettext_noop as _


class ExecutionStatus(StrEnum):
    """Where an execution stands."""

    #: Runnable now, or at ``due_at`` (a countdown, a retry). A worker's claim moves it on. A crash changes nothing.
    QUEUED = "queued"
    #: A worker holds its lease. A crash leaves a lease that lapses; the sweeper then queues it again.
    RUNNING = "running"
    #: Suspended on a child, a sleep or an event. No worker is held; settling the awaited step moves it on.
    WAITING = "waiting"
    #: Final: the body returned, its result is stored.
    SUCCEEDED = "succeeded"
    #: Final: all attempts used, or an error that no retry can mend. A ``FailedExecution`` says why.
    FAILED = "failed"
    #: Final: cancelled by a person, by a parent, by a timeout, or expired before it started.
    CANCELLED = "cancelled"


class StepStatus(StrEnum):
    """What an execution knows of one of its steps."""

    #: Not decided: a child runs, a sleep lasts, an event has not come.
    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class StepKind(StrEnum):
    """What stands behind a step. ``transitions.waits`` has a module for each, and the admin shows it under its name."""

    STEP = _("step")
    #: One child, and its parent waits for it.
    INVOKE = _("invoke")
    #: One child that runs beside its parent; a gather waits for it, if anything does.
    START = _("start")
    #: Many children of one task; one row for all of them, with a count of those that have not ended.
    MAP = _("map")
    #: Started children that are awaited together; it counts those that are undecided.
    GATHER = _("gather")
    #: Started children, events and timers of which the one is awaited that is decided first.
    FIRST = _("first")
    #: The same, one after another; one step for each wait.
    AS_COMPLETED = _("as_completed")
    SLEEP = _("sleep")
    EVENT = _("event")
    #: An instant that is awaited beside other things.
    TIMER = _("timer")
    #: An event that is awaited beside other things.
    MESSAGE = _("message")


class RunOutcome(StrEnum):
    """How a run of an execution's body has ended."""

    #: It waits for a step.
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    #: For good.
    FAILED = "failed"
    #: It failed, and another attempt follows.
    RETRIED = "retried"
    #: Its process died, or its lease passed.
    LOST = "lost"
    #: Its worker gave the execution back, at no cost of an attempt.
    RELEASED = "released"
    CANCELLED = "cancelled"


#: Runs after which nothing goes on, unless an operator has it tried again.
FINAL_RUNS = frozenset({RunOutcome.SUCCEEDED, RunOutcome.FAILED, RunOutcome.CANCELLED})
#: Runs that have an error to tell of; they are kept for as long as their execution is.
FAILED_RUNS = frozenset({RunOutcome.FAILED, RunOutcome.RETRIED, RunOutcome.LOST})


class LimitKind(StrEnum):
    """What a limit counts."""

    #: Bodies that run.
    RUN = "run"
    #: Executions from their first start to their end.
    OPEN = "open"
    #: Attempts that start in a time.
    RATE = "rate"


class PlaceState(StrEnum):
    """How an execution stands to a limit of its task."""

    #: It waits for a place: it is queued, and not due.
    PARKED = "parked"
    #: A place was handed to it, or the instant of its start; its message is under way.
    GRANTED = "granted"
    #: It was admitted. What it counts for, its execution tells.
    HELD = "held"


class OperationKind(StrEnum):
    """What an operator may ask for."""

    RETRY = "retry"
    RERUN = "rerun"
    FORK = "fork"
    CANCEL = "cancel"
    WAKE = "wake"
    SEND = "send"
    PUBLISH = "publish"
    HOLD = "hold"
    RELEASE = "release"


class OperationSource(StrEnum):
    """By which way it was asked for."""

    ADMIN = "admin"
    COMMAND = "command"
    API = "api"


class ItemState(StrEnum):
    """What became of one execution of an operation."""

    #: Not begun. A sweeper decides it; stopping the operation stops it.
    PENDING = "pending"
    DONE = "done"
    #: It was impossible for this one.
    REFUSED = "refused"
    #: There was no such execution any more.
    GONE = "gone"
    #: An error that nobody expected; the worker's log has it.
    FAILED = "failed"
    #: The operation was stopped before its turn.
    STOPPED = "stopped"


class OnTimeout(StrEnum):
    """What happens to a child whose parent's timeout ended."""

    CANCEL = "cancel"
    ABANDON = "abandon"


class OnConflict(StrEnum):
    """What a call gets whose unique key an open execution has."""

    #: That one.
    RETURN = "return"
    #: ``DuplicateExecution``.
    REFUSE = "refuse"
    #: A new one, which begins when the old one, which is cancelled, has ended.
    REPLACE = "replace"


#: What the reason of a cancellation begins with that nobody has asked for: a child is late for its parent's timeout.
#: Such a child keeps a result that it returns all the same.
LATE_REASON = "its parent's timeout of "

#: Kinds of steps that stand for one child each.
CHILD_KINDS = frozenset({StepKind.INVOKE, StepKind.START})

OPEN_STATUSES = frozenset({ExecutionStatus.QUEUED, ExecutionStatus.RUNNING, ExecutionStatus.WAITING})
FINAL_STATUSES = frozenset({ExecutionStatus.SUCCEEDED, ExecutionStatus.FAILED, ExecutionStatus.CANCELLED})

#: Every move that ``transitions`` makes from one status to another, and what makes it. ``None`` is a new execution;
#: ``claim_again`` stays at running. The diagram of statuses is made from this, the tests' audit holds real histories
#: against it, and declared moves are compared with it.
MOVES: MappingProxyType[tuple[ExecutionStatus | None, ExecutionStatus], str] = MappingProxyType(
    {
        (None, ExecutionStatus.QUEUED): "delay, or invoked by a parent",
        (None, ExecutionStatus.RUNNING): "invoked, and handed off",
        (ExecutionStatus.QUEUED, ExecutionStatus.RUNNING): "a worker claims it",
        (ExecutionStatus.RUNNING, ExecutionStatus.WAITING): "suspended on a child, a sleep or an event",
        (ExecutionStatus.WAITING, ExecutionStatus.QUEUED): "the step is settled",
        # By the process that has ended the child, and goes on with the parent.
        (ExecutionStatus.WAITING, ExecutionStatus.RUNNING): "the child is done, hand-off",
        (ExecutionStatus.RUNNING, ExecutionStatus.QUEUED): "retry, worker lost, worker shuts down, held",
        (ExecutionStatus.RUNNING, ExecutionStatus.SUCCEEDED): "the body returns",
        (ExecutionStatus.RUNNING, ExecutionStatus.FAILED): "no attempt is left",
        (ExecutionStatus.QUEUED, ExecutionStatus.CANCELLED): "cancel, expired",
        (ExecutionStatus.RUNNING, ExecutionStatus.CANCELLED): "cancel, the body notices",
        (ExecutionStatus.WAITING, ExecutionStatus.CANCELLED): "cancel",
        (ExecutionStatus.FAILED, ExecutionStatus.QUEUED): "operator's retry",
        (ExecutionStatus.FAILED, ExecutionStatus.WAITING): "operator's retry, a child runs again",
        (ExecutionStatus.CANCELLED, ExecutionStatus.QUEUED): "operator's retry",
        (ExecutionStatus.CANCELLED, ExecutionStatus.WAITING): "operator's retry, a child runs again",
        # With the result that its body returned after its cancellation had been asked for.
        (ExecutionStatus.CANCELLED, ExecutionStatus.SUCCEEDED): "operator's retry, its body had returned",
    }
)
#: The statuses that may follow each one.
ALLOWED_MOVES: MappingProxyType[ExecutionStatus, frozenset[ExecutionStatus]] = MappingProxyType(
    {status: frozenset(after for before, after in MOVES if before == status) for status in ExecutionStatus}
)

#: The state that Celery's ``AsyncResult`` shows for each status.
CELERY_STATES: MappingProxyType[ExecutionStatus, str] = MappingProxyType(
    {
        ExecutionStatus.QUEUED: "PENDING",
        ExecutionStatus.RUNNING: "STARTED",
        ExecutionStatus.WAITING: "SUSPENDED",
        ExecutionStatus.SUCCEEDED: "SUCCESS",
        ExecutionStatus.FAILED: "FAILURE",
        ExecutionStatus.CANCELLED: "REVOKED",
    }
)
