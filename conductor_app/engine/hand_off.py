"""What a process goes on with when a run ends: a child for which its parent waits, a parent whose child is done.

A message would take such an execution through the broker, often back to the same process. Instead the commit that
makes it runnable claims it, too, and the process runs it when Celery is done with the run before. Nothing else is
different: each is a run of its own, with a claim, a lease, a fence and everything that Celery does around a task.

It is for executions that any worker of the queue may run at once. Whatever the broker, Celery's main process or an
operator have a say in (another queue, priorities, time and rate limits) goes through the broker.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from celery import current_app

from conductor_app.body.plain import is_invocable
from conductor_app.models import Execution
from conductor_app.states import StepKind, StepStatus
from conductor_app.store.process import process
from conductor_app.transitions import HandOff, Invocation, dispatch, kinds, steps
from conductor_app.values.limits import limits_of

#: So many runs follow one delivery, and none begins so many seconds after the first of them: then what waits in the
#: queue has a turn.
MAX_RUNS = 200
MAX_SECONDS = 2.0

#: Options of an execution that the broker or the worker's main process acts on.
_NOT_OURS = ("plain", "time_limit", "soft_time_limit", "exchange", "routing_key", "stamps")


def is_limited(task: Any) -> bool:
    """Tell whether Celery's main process watches over the runs of a task."""
    return bool(task.rate_limit or task.time_limit or task.soft_time_limit)


@dataclass(frozen=True)
class _Kept:
    """What a parent remembers while its child runs in the same process."""

    parent: Execution
    memory: dict[str, steps.Memory]
    child: steps.Memory


class Delivery:
    """One message, the run that it is about, and those that follow in this process."""

    def __init__(self, execution_id: uuid.UUID) -> None:
        #: The execution that runs now.
        self.running = execution_id
        #: What runs next; it is claimed.
        self.claimed: Execution | None = None
        #: Who has suspended, one on the next, on what runs next; since the last commit that waited for the disk.
        self.suspended: list[Execution] = []
        self._runs = 0
        self._ends_at: float | None = None
        self._kept: dict[uuid.UUID, _Kept] = {}

    def offer(self, execution: Execution) -> HandOff:
        """Return what the last transition of a run hands its successor to."""
        return HandOff(
            execution.lease_owner, lambda following: self._accepts(execution, following), self._recall_parent
        )

    def _recall_parent(self, execution_id: uuid.UUID) -> Execution | None:
        kept = self._kept.get(execution_id)
        return None if kept is None else kept.parent

    def _accepts(self, ending: Execution, following: Execution) -> bool:
        if self._runs >= MAX_RUNS or not process.worker.gate.is_open() or dispatch.is_inline():
            return False
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            return False
        # Its message came from this queue, so this worker serves it.
        if following.queue != ending.queue or following.priority is not None:
            return False
        if any(ending.get_options().get(name) for name in ("exchange", "routing_key")):
            return False
        task = current_app.tasks.get(following.task)
        if task is None or not is_invocable(task) or is_limited(task) or limits_of(task):
            return False
        options = following.get_options()
        return not any(options.get(name) for name in _NOT_OURS)

    def begin_next(self) -> Execution | None:
        """Return what runs next."""
        if self.claimed is not None:
            self._runs += 1
            self._ends_at = self._ends_at or time.monotonic() + MAX_SECONDS
            self.running = self.claimed.pk
            process.worker.gate.show(self.claimed.pk)
        return self.claimed

    def take(self, execution_id: uuid.UUID) -> Execution | None:
        """Return an execution that this process has claimed already; its run begins."""
        execution, self.claimed = self.claimed, None
        if execution is not None and execution.pk != execution_id:
            self.claimed = execution
            return None
        return execution

    # A replay does not read what this process has just written.

    def keep(self, parent: Execution, wait: Invocation, memory: Mapping[str, steps.Memory]) -> None:
        """Keep what a parent remembers while its child runs here."""
        lasting = all(
            known.status == StepStatus.SUCCEEDED and kinds.of(known.kind).is_lasting for known in memory.values()
        )
        if not lasting:
            # Started children end meanwhile; an operator's retry changes failures.
            self._kept.pop(parent.pk, None)
            return
        child = steps.Memory(
            name=wait.step,
            kind=StepKind.INVOKE,
            status=StepStatus.SUCCEEDED,
            task=wait.child.task,
            payload_digest=wait.payload_digest,
            child_id=wait.child.id,
            timeout_seconds=wait.timeout,
            result=None,
            error=None,
            fence=parent.fence,
            attempt=parent.attempt,
        )
        self._kept[parent.pk] = _Kept(parent, dict(memory), child)

    def settle(self, child: Execution, result: str) -> None:
        """Note the result of a child that has just ended here, and whose parent runs next."""
        kept = None if child.parent_id is None else self._kept.get(child.parent_id)
        if kept is not None and kept.child.child_id == child.pk:
            kept.memory[kept.child.name] = kept.child._replace(result=result)

    def recall(self, execution: Execution) -> dict[str, steps.Memory] | None:
        """Return what an execution remembers, if no other run can have added to it since it was kept."""
        kept = self._kept.pop(execution.pk, None)
        if kept is None or execution.fence != kept.parent.fence + 1 or kept.child.name not in kept.memory:
            return None
        return kept.memory


#: The delivery that is at work in this thread.
current: ContextVar[Delivery | None] = ContextVar("conductor_app_delivery", default=None)


def delivery_of(execution_id: uuid.UUID) -> Delivery | None:
    """Return the delivery that this run belongs to; none for one in eager mode, inside another body for example."""
    delivery = current.get()
    return delivery if delivery is not None and delivery.running == execution_id else None


def is_between_runs() -> bool:
    """Tell whether another run follows in this thread, or has not quite begun."""
    delivery = current.get()
    return delivery is not None and delivery.claimed is not None
