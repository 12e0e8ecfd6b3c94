"""The statuses of executions and steps, and which moves are allowed. Plain data: no ORM, no Celery.

``queued`` → ``running`` → ``waiting`` → ``queued`` → … → one of ``succeeded``, ``failed``, ``cancelled``.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType


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
    """What stands behind a step."""

    STEP = "step"
    #: One child, and its parent waits for it.
    INVOKE = "invoke"
    #: One child that runs beside its parent; a gather waits for it, if anything does.
    START = "start"
    #: Many children of one task; one row for all of them, with a count of those that have not ended.
    MAP = "map"
    #: Started children that are awaited together; it counts those that are undecided.
    GATHER = "gather"
    SLEEP = "sleep"
    EVENT = "event"


class OnTimeout(StrEnum):
    """What happens to a child whose parent's timeout ended."""

    CANCEL = "cancel"
    ABANDON = "abandon"


#: What the reason of a cancellation begins with that nobody has asked for: a child is late for its parent's timeout.
#: Such a child keeps a result that it returns all the same.
LATE_REASON = "its parent's timeout of "

#: Kinds of steps that stand for one child each.
CHILD_KINDS = frozenset({StepKind.INVOKE, StepKind.START})

OPEN_STATUSES = frozenset({ExecutionStatus.QUEUED, ExecutionStatus.RUNNING, ExecutionStatus.WAITING})
FINAL_STATUSES = frozenset({ExecutionStatus.SUCCEEDED, ExecutionStatus.FAILED, ExecutionStatus.CANCELLED})

#: Every move that ``transitions`` makes from one status to another; ``claim_again`` stays at running. The audit in the
#: tests holds real histories against it.
ALLOWED_MOVES: MappingProxyType[ExecutionStatus, frozenset[ExecutionStatus]] = MappingProxyType(
    {
        ExecutionStatus.QUEUED: frozenset(
            {ExecutionStatus.RUNNING, ExecutionStatus.CANCELLED},
        ),
        ExecutionStatus.RUNNING: frozenset(
            {
                ExecutionStatus.QUEUED,
                ExecutionStatus.WAITING,
                ExecutionStatus.SUCCEEDED,
                ExecutionStatus.FAILED,
                ExecutionStatus.CANCELLED,
            }
        ),
        # To running by a hand-off: the process that has ended the child goes on with the parent.
        ExecutionStatus.WAITING: frozenset(
            {ExecutionStatus.QUEUED, ExecutionStatus.RUNNING, ExecutionStatus.CANCELLED},
        ),
        ExecutionStatus.SUCCEEDED: frozenset(),
        # An operator's retry reopens these two, and nothing else does.
        ExecutionStatus.FAILED: frozenset({ExecutionStatus.QUEUED, ExecutionStatus.WAITING}),
        # To succeeded with the result that its body returned after its cancellation had been asked for.
        ExecutionStatus.CANCELLED: frozenset(
            {ExecutionStatus.QUEUED, ExecutionStatus.WAITING, ExecutionStatus.SUCCEEDED},
        ),
    }
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
