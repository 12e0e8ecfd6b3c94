"""What holds for every execution, whatever happened to workers, brokers and databases."""

from __future__ import annotations

import itertools
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from celery.result import AsyncResult
from celery.states import READY_STATES
from django_celery_results.models import TaskResult

from conductor_app.models import CopiedOutcome, Execution, FailedExecution, Step
from conductor_app.states import (
    ALLOWED_MOVES,
    CELERY_STATES,
    CHILD_KINDS,
    FINAL_STATUSES,
    ExecutionStatus,
    StepKind,
    StepStatus,
)
from tests.support import history
from tests.support.history import Move
from tests.support.polling import wait_until
from tests.support.worker import Worker

#: What a child is whose parent remembers it so. After a timeout the child may end in any way, or go on.
CHILD_STATUS = {
    StepStatus.SUCCEEDED: ExecutionStatus.SUCCEEDED,
    StepStatus.FAILED: ExecutionStatus.FAILED,
    StepStatus.CANCELLED: ExecutionStatus.CANCELLED,
}


def check(
    *workers: Worker, timeout: float = 40, tracebacks: int | Callable[[str], int] = 0, excused: str | None = None
) -> None:
    """Wait until every execution is final and Celery knows of it, and check what has to hold then.

    Args:
        workers: Their logs must show no healed wake-up, no failed sweep and no unexpected error.
        timeout: Seconds to wait for the executions.
        tracebacks: How many tracebacks a log may show at most: those of bodies that fail for good. Or what counts them
            in a log.
        excused: What a line of the logs may say, a regular expression.
    """
    __tracebackhide__ = True
    wait_until(
        lambda: not unsettled(),
        timeout,
        interval=0.1,
        message=lambda: "Executions are not final, or not announced:\n  " + "\n  ".join(unsettled()),
    )
    found = violations()
    for worker in workers:
        log = worker.log
        found += _of_log(log, tracebacks if isinstance(tracebacks, int) else tracebacks(log), excused)
    assert not found, "Broken invariants:\n  " + "\n  ".join(found)


def unsettled() -> list[str]:
    """Say which executions are not final, or final and not announced to Celery."""
    return [
        f"{execution} is {execution.status} (attempt {execution.attempt}, fence {execution.fence}, due "
        f"{execution.due_at}, dispatch {execution.dispatch_at}, lease {execution.lease_expires_at} of "
        f"{execution.lease_owner or 'nobody'}, announcement {execution.announce_at})"
        for execution in Execution.objects.order_by("pk")
        if not execution.is_final or execution.announce_at is not None
    ]


def violations() -> list[str]:
    """Say what is wrong with what the database holds now; executions may still be open."""
    executions = {execution.pk: execution for execution in Execution.objects.all()}
    steps = list(Step.objects.all())
    failures = {failure.pk: failure for failure in FailedExecution.objects.all()}
    steps_of: dict[uuid.UUID, list[Step]] = defaultdict(list)
    for step in steps:
        steps_of[step.execution_id].append(step)
    children_of: dict[tuple[uuid.UUID, str], list[Execution]] = defaultdict(list)
    found: list[str] = []
    for execution in executions.values():
        found += [f"{execution} ({execution.status}) {wrong}" for wrong in _of_execution(execution, failures)]
        if execution.parent_id:
            parent, siblings = executions.get(execution.parent_id), steps_of[execution.parent_id]
            found += [f"{execution} ({execution.status}) {wrong}" for wrong in _of_child(execution, parent, siblings)]
            children_of[execution.parent_id, execution.step].append(execution)
    for step in steps:
        found += [
            f'Step "{step}" ({step.status}) of {executions[step.execution_id]} {wrong}'
            for wrong in _of_step(step, executions, children_of[step.execution_id, step.name])
        ]
    found += _of_results(executions.values())
    found += _of_keys(executions)
    if history.is_recording():
        recorded = history.moves()
        for execution_id, moves in recorded.items():
            found += [f"The history of {execution_id} {wrong}" for wrong in _of_history(moves)]
            if moves[-1].status != executions[execution_id].status:
                found.append(f"The history of {execution_id} ends in {moves[-1].status}")
        # Celery itself records that a plain task's process died, whatever follows.
        ended_once = {
            str(key)
            for key, moves in recorded.items()
            if not any(map(_is_reopening, moves)) and not executions[key].is_plain
        }
        for task_id, states in history.celery_states().items():
            if task_id in ended_once and any(state in READY_STATES for state in states[:-1]):
                found.append(f"Celery was told that {task_id} is {', then '.join(states)}")
    return found


def _of_keys(executions: dict[uuid.UUID, Execution]) -> Iterator[str]:
    begun: dict[tuple[str, str], list[Execution]] = defaultdict(list)
    for execution in executions.values():
        if execution.is_final and execution.unique_key is not None:
            yield f"{execution} ({execution.status}) has a unique key, and has ended"
        if execution.unique_key not in (None, execution.own_key):
            yield f"{execution} ({execution.status}) has another unique key than it was given"
        if execution.own_key is not None and execution.started_at is not None and not execution.is_final:
            begun[execution.task, execution.own_key].append(execution)
        if execution.predecessor is not None:
            before = executions.get(execution.predecessor)
            if before is None or before.is_final:
                yield f"{execution} ({execution.status}) waits for an end that has been"
            if execution.status != ExecutionStatus.QUEUED or execution.due_at is not None:
                yield f"{execution} ({execution.status}) waits for an end, and goes on"
    for (_, key), rows in begun.items():
        if len(rows) > 1:
            yield f"Of the unique key {key}, {len(rows)} have begun and are open: {rows}"


def _of_execution(execution: Execution, failures: dict[uuid.UUID, FailedExecution]) -> Iterator[str]:
    is_failed = execution.status == ExecutionStatus.FAILED
    failure = failures.get(execution.pk)
    if is_failed != (failure is not None):
        yield f"has {'no' if failure is None else 'a'} failed execution"
    if failure is not None and (failure.attempts, failure.task) != (execution.attempt, execution.task):
        yield f"failed as {failure.task} after {failure.attempts} attempts, and has {execution.attempt}"
    # A body may return after its cancellation was asked for.
    is_kept = execution.has_kept_result and execution.cancel_requested_at is not None
    if (execution.result is not None) != (execution.status == ExecutionStatus.SUCCEEDED) and not is_kept:
        yield f"has the result {execution.result!r}"
    if execution.status == ExecutionStatus.WAITING and not execution.steps.filter(status=StepStatus.PENDING).exists():
        yield "waits for nothing"
    if execution.status != ExecutionStatus.RUNNING and (execution.lease_owner or execution.lease_expires_at):
        yield f"is leased to {execution.lease_owner}"
    if execution.max_attempts is not None and execution.attempt > execution.max_attempts:
        yield f"has attempt {execution.attempt} of {execution.max_attempts}"
    # The next attempt is counted when the last one ends, and may never begin.
    claimed = execution.attempt - (execution.status in (ExecutionStatus.QUEUED, ExecutionStatus.CANCELLED))
    if execution.started_at is not None and execution.fence < claimed:
        yield f"has attempt {execution.attempt} after {execution.fence} claims"
    if (execution.started_at is None) != (execution.fence == 0):
        yield f"was started at {execution.started_at} with fence {execution.fence}"
    instants = [execution.created_at, execution.started_at, execution.finished_at]
    known = [instant for instant in instants if instant is not None]
    if known != sorted(known):
        yield f"was created, started and finished at {', '.join(map(str, instants))}"


def _of_child(child: Execution, parent: Execution | None, parent_steps: Iterable[Step]) -> Iterator[str]:
    if parent is None:
        yield "has lost its parent"
        return
    if (child.root_id, child.depth) != (parent.root_id, parent.depth + 1):
        yield f"has root {child.root_id} and depth {child.depth} under {parent.root_id} and {parent.depth}"
    if child.position is not None:
        named = [step for step in parent_steps if step.name == child.step]
    else:
        named = [
            step
            for step in parent_steps
            if step.child_id == child.pk and step.kind not in (StepKind.GATHER, StepKind.FIRST)
        ]
    if [step.name for step in named] != [child.step]:
        yield f'is step "{child.step}" of its parent, which knows it as {[step.name for step in named]}'
    abandoned = any(step.status == StepStatus.TIMED_OUT and step.on_timeout == "abandon" for step in named)
    # Siblings of a child that failed its map go on if they had started, and a started child that nobody gathers too.
    abandoned |= any(step.kind in (StepKind.MAP, StepKind.START) for step in named)
    # One that is asked to stop ends with the next sweep, or with its body's next call.
    abandoned |= child.cancel_requested_at is not None
    if parent.status in FINAL_STATUSES and child.status not in FINAL_STATUSES and not abandoned:
        yield f"is open under a parent that {parent.status}"


def _of_step(step: Step, executions: dict[uuid.UUID, Execution], children: list[Execution]) -> Iterator[str]:
    execution = executions[step.execution_id]
    child = executions.get(step.child_id) if step.child_id else None
    if step.is_copied:
        yield from _of_copy(step, children)
        return
    if (
        step.status == StepStatus.PENDING
        and step.kind not in (StepKind.START, StepKind.TIMER)  # which may have lost
        and execution.status in (ExecutionStatus.SUCCEEDED, ExecutionStatus.FAILED)
    ):
        yield f"is pending, and its execution {execution.status}"
    if step.finished_at is not None and step.finished_at < step.created_at:
        yield f"was created at {step.created_at} and finished at {step.finished_at}"
    if step.kind == StepKind.MAP:
        open_children = [row for row in children if row.status not in FINAL_STATUSES]
        if sorted(row.position or 0 for row in children) != list(range(step.total or 0)):
            yield f"has {len(children)} children of {step.total}"
        if step.status == StepStatus.PENDING and step.remaining != len(open_children) and not execution.is_final:
            yield f"counts {step.remaining} open children of {len(open_children)}"
        if step.status == StepStatus.SUCCEEDED and open_children:
            yield f"has {len(open_children)} open children"
    if step.kind not in CHILD_KINDS:
        return
    if child is None:
        yield "has lost its child"
    elif (step.status in CHILD_STATUS and child.status != CHILD_STATUS[StepStatus(step.status)]) or (
        step.status == StepStatus.PENDING and child.status in FINAL_STATUSES and execution.status not in FINAL_STATUSES
    ):
        yield f"has a child that {child.status}"


def _of_copy(step: Step, children: list[Execution]) -> Iterator[str]:
    """A step of a fork that its source has recorded: whatever its children were, it needs none of them."""
    if step.status == StepStatus.PENDING:
        yield "was copied, and is pending"
    if children:
        yield f"was copied, and has {len(children)} children"
    if step.kind in CHILD_KINDS and step.status == StepStatus.SUCCEEDED and step.result is None:
        yield "was copied without its result"
    if step.status == StepStatus.FAILED and step.error is None:
        yield "was copied without its error"
    outcomes = list(CopiedOutcome.objects.filter(step=step).order_by("position").values_list("position", flat=True))
    if outcomes != list(range((step.total or 0) if step.kind == StepKind.MAP else 0)):
        yield f"was copied with {len(outcomes)} outcomes of {step.total}"


def _of_results(executions: Iterable[Execution]) -> Iterator[str]:
    """What Celery's result backend says has to fit, and of durable tasks it knows roots alone."""
    children = [str(execution.pk) for execution in executions if execution.parent_id and not execution.is_plain]
    for task_id in TaskResult.objects.filter(task_id__in=children).values_list("task_id", flat=True):
        yield f"The result backend knows the child {task_id}"
    for execution in executions:
        options = execution.get_options()
        if execution.parent_id or not options.get("announce") or options.get("ignore_result", True):
            continue
        state = AsyncResult(options.get("celery_id") or str(execution.pk)).state
        if execution.is_final and execution.announce_at is None and state != CELERY_STATES[execution.status]:
            yield f"{execution} ({execution.status}) has the Celery state {state}"


def _of_history(moves: list[Move]) -> Iterator[str]:
    first = moves[0]
    # The second is a child that its parent's process has claimed as it stored it.
    if (first.status, first.fence, first.attempt) not in (
        (ExecutionStatus.QUEUED, 0, 1),
        (ExecutionStatus.RUNNING, 1, 1),
    ):
        yield f"begins with {first}"
    ends = 0
    for before, move in itertools.pairwise(moves):
        if (move.old_status, move.old_fence, move.old_attempt) != (before.status, before.fence, before.attempt):
            yield f"has a gap before {move}"
        is_claim = move.status == ExecutionStatus.RUNNING
        # Of a claim whose COMMIT got no answer, the process takes up the lease that it holds already.
        is_claimed_again = is_claim and move.old_status == ExecutionStatus.RUNNING and move.keeps_owner
        if move.status not in ALLOWED_MOVES[ExecutionStatus(move.old_status)] and not is_claimed_again:
            yield f"goes from {move.old_status} to {move.status}"
        if move.fence != move.old_fence + is_claim:
            yield f"has fence {move.fence} after {move.old_fence} at {move.old_status} → {move.status}"
        is_retried = (move.old_status, move.status) == (ExecutionStatus.RUNNING, ExecutionStatus.QUEUED)
        if (
            move.attempt != move.old_attempt
            and not _is_reopening(move)
            and not (is_retried and move.attempt == move.old_attempt + 1)
        ):
            yield f"has attempt {move.attempt} after {move.old_attempt} at {move.old_status} → {move.status}"
        ends += (move.status in FINAL_STATUSES) - _is_reopening(move)
    if ends > 1:
        yield f"ends {ends} times"


def _is_reopening(move: Move) -> bool:
    return move.old_status in FINAL_STATUSES


def _of_log(log: str, tracebacks: int, excused: str | None) -> Iterator[str]:
    for line in log.splitlines():
        if excused is not None and re.search(excused, line):
            continue
        if any(bad in line for bad in ("lost wake-up is healed", "Sweeping", "Unrecoverable error", "swallowed")):
            yield f"A worker's log says: {line}"
    shown = log.count("Traceback (most recent call last)")
    if shown > tracebacks:
        yield f"A worker's log shows {shown} tracebacks, {tracebacks} expected"
