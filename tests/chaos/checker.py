"""What has to hold when everything is healed and quiet again, and how long recovery took."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db import connection
from django.db.models import F

from conductor_app.conf import conductor_settings
from conductor_app.models import Attempt, Execution, FailedExecution, Place, Step
from conductor_app.states import ExecutionStatus, LimitKind, RunOutcome, StepKind, StepStatus
from conductor_app.values.limits import Limit, limits_of
from tests.app.models import Ledger
from tests.chaos import tasks
from tests.chaos.nemesis import FROZEN_SECONDS, Act, Nemesis
from tests.chaos.operators import LAST_WINS, SCHEDULED, Operator
from tests.chaos.workload import Root
from tests.support import history, invariants

#: Seconds on top of a published bound: two cores, and every process wants them.
GRACE_SECONDS = 2.0

#: How much later than its end a run must have written to be a zombie.
ZOMBIE_SECONDS = 1.0

#: What others than the client start.
OF_OPERATORS = {task.name for task in (tasks.keyed, *SCHEDULED)}

#: Lines of a worker's log that must not be there.
_FORBIDDEN = ("lost wake-up is healed", "swallowed")
#: Last lines of the tracebacks that may be there: bodies that fail for good, connections that were cut.
_EXPECTED_TRACEBACKS = re.compile(
    r"ValueError: \d+ is refused$|\S*ChildFailed: Child execution failed: \d+ is refused$"
    # Celery's answers to the death of a pool process that has not quite started, and of one while the broker is away:
    # the worker ends, and is started again.
    r"|\S*WorkerLostError: Could not start worker processes$|StopIteration$"
    # kombu's Redis transport, when the connection is lost with unacknowledged messages (kombu#582): the same.
    r"|AttributeError: 'NoneType' object has no attribute 'hostname'$"
    # py-amqp drops the part of a frame that it has read when the rest is not there yet and the connection just dies
    # (``read_frame``, EAGAIN). Celery connects anew.
    r"|\S*UnexpectedFrame: Received frame_end .*$"
    # py-amqp looks for a channel without a number before it opens one (``Connection.channel``). A connection that dies
    # just there is told of as "during handling" of that.
    r"|KeyError: None$"
    # A warm shutdown while the broker is away, in the middle of an attempt to connect.
    r"|\S*WorkerShutdown: 0$"
    # Celery says it of plain tasks, with the cause inside of another error.
    r"|\S*WorkerLostError: Worker exited prematurely|\S*ExceptionWithTraceback: $"
    r"|\S*(OperationalError|InterfaceError|ConnectionError|ConnectionResetError|ConnectionRefusedError|TimeoutError"
    r"|BrokenPipeError|RecoverableConnectionError|ConnectionForced|ConnectionClosed|AdminShutdown|OSError)\b"
)
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*([^\s].*)$", re.MULTILINE)


@dataclass
class Recovery:
    """How long runs went on counting after their process had ended, or had been frozen."""

    #: The published bound, in seconds.
    bound: float
    seconds: list[float] = field(default_factory=list)
    #: Runs that are not counted: the database was away meanwhile.
    disturbed: int = 0


@dataclass
class Verdict:
    """What was found."""

    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    #: By the act that ended or froze the processes.
    recovery: dict[str, Recovery] = field(default_factory=dict)


def check(
    roots: Mapping[uuid.UUID, Root],
    operator: Operator,
    nemesis: Nemesis,
    worker_logs: Mapping[str, str],
    database_log: str,
) -> Verdict:
    """Hold the tables, the ledgers, the history and the logs against what was to be; the stack is quiet."""
    verdict = Verdict()
    executions = {execution.pk: execution for execution in Execution.objects.all()}
    verdict.violations += [f"Not settled: {text}" for text in invariants.unsettled()]
    verdict.violations += invariants.violations()
    verdict.violations += _of_roots(roots, executions)
    verdict.violations += _of_limits(verdict.figures)
    verdict.violations += _of_keys(operator.accepted, operator.last_numbers)
    verdict.violations += _of_schedules(operator.instants)
    verdict.violations += _of_ledgers(verdict.figures)
    verdict.violations += _of_fences()
    verdict.violations += _of_children()
    verdict.violations += _of_sessions()
    verdict.violations += _of_database_log(database_log, verdict.figures)
    for name, log in worker_logs.items():
        verdict.violations += [f"{name}: {wrong}" for wrong in _of_worker_log(log)]
    verdict.violations += _of_recovery(nemesis.log, list(nemesis.outages()), verdict.recovery)
    verdict.figures |= {
        "roots": len(roots),
        "executions": len(executions),
        "runs": sum(execution.fence for execution in executions.values()),
        "attempts_beyond_the_first": sum(
            moved.attempt - moved.old_attempt
            for moves in history.moves().values()
            for moved in moves
            if moved.attempt > moved.old_attempt
        ),
        "by_status": dict(Counter(execution.status for execution in executions.values())),
    }
    return verdict


def _of_roots(roots: Mapping[uuid.UUID, Root], executions: Mapping[uuid.UUID, Execution]) -> Iterator[str]:
    stored = {key for key, row in executions.items() if row.parent_id is None and row.task not in OF_OPERATORS}
    for key in stored ^ set(roots):
        yield f"Root {key} was {'never started' if key in stored else 'accepted, and is lost'}"
    for key, root in roots.items():
        if (execution := executions.get(key)) is None:
            continue
        if execution.status != root.status:
            yield f"{execution} {execution.status}, not {root.status}: {execution.error_message or root.payload}"
        elif root.status == ExecutionStatus.SUCCEEDED and execution.get_result() != root.result:
            yield f"{execution} returned {execution.get_result()!r}, not {root.result!r}"
        elif not execution.error_message.startswith(root.error):
            yield f"{execution} failed with {execution.error_message!r}, not {root.error!r}"
    causes = dict(FailedExecution.objects.values_list("pk", "root_cause_id"))
    for key, root in roots.items():
        if root.task is tasks.unforgiving and causes.get(key) == key:
            yield f"{key} failed of itself, not of its child"


Interval = tuple[dt.datetime, dt.datetime]


def _of_limits(figures: dict[str, Any]) -> Iterator[str]:
    """At no time more than a limit has, by what was recorded of runs and executions; and nobody left waiting."""
    for limit, key, intervals in _held():
        name = f"{limit.name} {key}".rstrip()
        most = _most_at_once(intervals)
        figures.setdefault("most_at_once", {})[name] = most
        if most > limit.number:
            yield f"Limit {name} was held by {most} at once"
    yield from _of_rate(tasks.starts, figures)
    for place in Place.objects.exclude(state="held"):
        yield f"Place {place} of {place.execution_id} is left"
    figures["places_left"] = Place.objects.count()


def _held() -> Iterator[tuple[Limit, str, list[Interval]]]:
    """Yield limits with their keys, and from when to when each run or execution had a place."""
    by_key: dict[tuple[Limit, str], list[Interval]] = defaultdict(list)
    for task in (tasks.banked, tasks.accounted):
        rows = {row.pk: row for row in Execution.objects.filter(task=task.name)}
        runs: dict[uuid.UUID, list[Attempt]] = defaultdict(list)
        for run in Attempt.objects.filter(execution__task=task.name).order_by("run"):
            runs[run.execution_id].append(run)
        for row in rows.values():
            kwargs = row.kwargs
            for limit in limits_of(task):
                key = str(kwargs[limit.per]) if isinstance(limit.per, str) else ""
                if limit.kind is LimitKind.RUN:
                    by_key[limit, key] += _runs(row, runs[row.pk])
                elif row.started_at is not None and row.finished_at is not None:
                    by_key[limit, key].append((row.started_at, row.finished_at))
    for (limit, key), intervals in by_key.items():
        yield limit, key, intervals


def _runs(execution: Execution, runs: list[Attempt]) -> Iterator[Interval]:
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        until = run.finished_at
        if run.outcome == RunOutcome.LOST:
            # Its body may be at work still: it keeps its place until its next run.
            until = following.started_at if following is not None else execution.finished_at or until
        yield run.started_at, until


def _most_at_once(intervals: Iterable[Interval]) -> int:
    """Return how many there were at the same time; one may begin at the instant at which another one ends."""
    changes = sorted((instant, change) for begin, end in intervals for instant, change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _of_rate(limit: Limit, figures: dict[str, Any]) -> Iterator[str]:
    """No more starts since the first one than the rate lets; one that was let, and came late, may be beside others."""
    starts: dict[tuple[uuid.UUID, int], dt.datetime] = {}
    for run in Attempt.objects.filter(execution__task=tasks.rated.name).order_by("-run"):
        starts[run.execution_id, run.attempt] = run.started_at
    assert limit.seconds is not None
    instants = sorted(starts.values())
    figures["starts_of_a_rate"] = len(instants)
    for number, instant in enumerate(instants, 1):
        allowed = limit.number + (instant - instants[0]).total_seconds() / limit.seconds
        if number > allowed:
            yield f"Of limit {limit.name}, {number} had started at {instant}, and {allowed:.1f} were allowed"


def _of_keys(accepted: Iterable[uuid.UUID], last_numbers: Mapping[str, int]) -> Iterator[str]:
    """Of each key one after another. Only what another one has replaced is cancelled; the last one runs to its end."""
    by_key: dict[str, list[Execution]] = defaultdict(list)
    for row in Execution.objects.filter(task=tasks.keyed.name).order_by("created_at"):
        by_key[row.own_key or ""].append(row)
    for lost in set(accepted) - {row.pk for rows in by_key.values() for row in rows}:
        yield f"{lost} was accepted with a unique key, and is lost"
    for key, rows in by_key.items():
        open_ones = [(row.started_at, row.finished_at) for row in rows if row.started_at and row.finished_at]
        if _most_at_once(open_ones) > 1:
            yield f"Of the unique key {key}, {_most_at_once(open_ones)} were open at once"
        last = rows[-1]
        if last.status != ExecutionStatus.SUCCEEDED:
            yield f"{last} is the last of the unique key {key}, and {last.status}"
        elif key in LAST_WINS and last.get_result() != last_numbers[key]:
            yield f"{last} of the key {key} returned {last.get_result()}, and was last called with {last_numbers[key]}"
        for row in rows:
            if row.status == ExecutionStatus.CANCELLED and key == "returned":
                yield f"{row} of the unique key {key} is cancelled, and nobody has replaced it"
            elif row.status not in (ExecutionStatus.SUCCEEDED, ExecutionStatus.CANCELLED):
                yield f"{row} of the unique key {key} {row.status}"


def _of_schedules(instants: Mapping[str, set[dt.datetime]]) -> Iterator[str]:
    """Each instant that came was started once; or at most once, if it may be left out."""
    for task, name in SCHEDULED.items():
        rows = list(Execution.objects.filter(task=task.name))
        started = Counter(row.get_options().get("scheduled_at") for row in rows)
        for instant, times in started.items():
            if times > 1 or instant not in instants[name]:
                yield f"Schedule {name} has started {instant} {times} times"
        if task is tasks.ticking:
            for instant in instants[name] - set(started):
                yield f"Schedule {name} has never started {instant}"
        elif _most_at_once([(row.created_at, row.finished_at) for row in rows if row.finished_at]) > 1:
            yield f"Executions of schedule {name} were open beside each other"
        for row in rows:
            if row.status != ExecutionStatus.SUCCEEDED:
                yield f"{row} of schedule {name} {row.status}: {row.error_message}"


def _of_ledgers(figures: dict[str, Any]) -> Iterator[str]:
    """Exactly one trace of each atomic step that is remembered, at least one of each other one; no fence twice."""
    traces: Counter[tuple[uuid.UUID, str]] = Counter()
    runs: dict[tuple[uuid.UUID, str], set[int]] = defaultdict(set)
    for execution_id, key, fence, pid in Ledger.objects.values_list("execution_id", "key", "value", "pid"):
        traces[execution_id, key] += 1
        runs[execution_id, fence].add(pid)
    named = Step.objects.filter(kind=StepKind.STEP, status=StepStatus.SUCCEEDED).values_list("execution_id", "name")
    remembered = set(named)
    for execution_id, name in remembered - set(traces):
        yield f"Step {name} of {execution_id} is remembered, and was never done"
    for (execution_id, key), times in traces.items():
        is_known = (execution_id, key) in remembered
        if key == tasks.ONCE and times > 1:
            yield f"The plain task {execution_id} was begun {times} times"
        if key.startswith(tasks.INSIDE) and (times > 1 or not is_known):
            yield f"Step {key} of {execution_id} was done {times} times and is {'' if is_known else 'not '}remembered"
    for (execution_id, fence), pids in runs.items():
        if len(pids) > 1:
            yield f"Fence {fence} of {execution_id} was held by the processes {sorted(pids)}"
    for kind in (tasks.INSIDE, tasks.OUTSIDE):
        done = [times for (_, key), times in traces.items() if key.startswith(kind)]
        figures[f"{kind}_steps"] = len(done)
        figures[f"{kind}_steps_repeated"] = sum(done) - len(done)


def _of_fences() -> Iterator[str]:
    """No run records anything after it was given up."""
    # Not the runs that suspended: frozen in the middle of that transaction, they record late, and rightly.
    left = history.left_running(for_another_attempt=True)
    for step in Step.objects.filter(fence__gt=0).exclude(status=StepStatus.CANCELLED):
        given_up_at = left.get((step.execution_id, step.fence))
        # The instants are those at which two transactions, or their statements, began.
        if given_up_at is not None and step.created_at.timestamp() > given_up_at + ZOMBIE_SECONDS:
            late = step.created_at.timestamp() - given_up_at
            yield f"Step {step} of {step.execution_id} was recorded by run {step.fence}, {late:.1f}s after its end"


def _of_children() -> Iterator[str]:
    early = Execution.objects.filter(
        parent__status=ExecutionStatus.SUCCEEDED,
        status=ExecutionStatus.SUCCEEDED,
        finished_at__gt=F("parent__finished_at"),
    )
    for child in early:
        yield f"{child} succeeded after its parent"
    for child in Execution.objects.filter(parent__status=ExecutionStatus.CANCELLED).open():
        yield f"{child} is {child.status} under a parent that is cancelled"


def _of_sessions() -> Iterator[str]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid, query FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
            "AND state_change < clock_timestamp() - interval '5 seconds'"
        )
        for pid, query in cursor.fetchall():
            yield f"Session {pid} is idle in a transaction since {query!r}"


def _of_database_log(log: str, figures: dict[str, Any]) -> Iterator[str]:
    errors = Counter(
        line.partition("ERROR:")[2].strip().partition('"')[0] for line in log.splitlines() if " ERROR: " in line
    )
    figures["deadlocks"] = errors["deadlock detected"]
    figures["database_errors"] = dict(errors)
    if figures["deadlocks"]:
        yield f"{figures['deadlocks']} deadlocks"


def _of_worker_log(log: str) -> Iterator[str]:
    for line in log.splitlines():
        if any(bad in line for bad in _FORBIDDEN):
            yield line
    for last_line in _TRACEBACK.findall(log):
        if not _EXPECTED_TRACEBACKS.match(last_line):
            yield f"traceback: {last_line}"


def _of_recovery(acts: list[Act], outages: list[tuple[float, float]], found: dict[str, Recovery]) -> Iterator[str]:
    """Compare when the runs of dead and frozen processes were given up with the published bound."""
    settings = conductor_settings()
    left = history.left_running()
    moved = {run for act in acts if act.name == "shift_lease" for run in act.victims}
    for name in sorted({act.name for act in acts if act.victims} - {"shift_lease"}):
        # A process that is frozen in the middle of a transaction keeps its locks until it wakes up.
        frozen = FROZEN_SECONDS if name == "freeze" else 0
        recovery = found[name] = Recovery(round(settings.LEASE_SECONDS + 1.2 * settings.SWEEP_SECONDS + frozen, 1))
        allowed = recovery.bound + GRACE_SECONDS
        for act in acts:
            if act.name != name:
                continue
            took = [left[run] - act.at for run in act.victims if run in left and run not in moved]
            if _is_disturbed(act, outages, 2 * allowed, settings.LEASE_SECONDS):
                recovery.disturbed += len(took)
                continue
            recovery.seconds += took
            for value in took:
                if value > 2 * allowed:
                    yield f"A run of {act.target} was given up {value:.1f}s after {name}; {allowed:.1f}s are allowed"


def _is_disturbed(act: Act, outages: Iterable[tuple[float, float]], window: float, settling: float) -> bool:
    """Tell whether the database was away meanwhile; after an outage, leases are left alone for a while."""
    return any(begin < act.at + window and end + settling > act.at for begin, end in outages)
