"""What ``conductor doctor`` finds out about executions: what is due, what is stuck, who keeps others waiting."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from django.db import Error as AnyDatabaseError
from django.db import connections
from django.db.models import Count, Min

from conductor_app.conf import conductor_settings
from conductor_app.management.subcommands.base import counted
from conductor_app.management.subcommands.findings import Finding, line
from conductor_app.models import Execution, Step, database
from conductor_app.models.execution import IS_STOPPED
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock, lock_holders
from conductor_app.telling import stops
from conductor_app.telling.hints import app_to_load
from conductor_app.telling.queues import UNDELIVERABLE_DISPATCHES
from conductor_app.telling.words import clean, duration
from conductor_app.transitions import auditing

#: Something that has been due for this many seconds longer than a sweep takes shows that nobody sweeps.
STUCK_SECONDS = 60.0
#: A session that waits longer than this for a lock of another one is worth a line.
LOCK_SECONDS = 5.0


def executions(served: frozenset[str] | None) -> Iterator[Finding]:
    """Look at what is queued and at what is stuck.

    Args:
        served: The queues that workers say they consume; ``None`` if none could be asked.
    """
    using = database()
    settings = conductor_settings()
    rows = Execution.objects.using(using)
    now = clock.read(using)

    due = rows.with_status(ExecutionStatus.QUEUED).filter(~IS_STOPPED, due_at__lte=clock.now())
    at_work = {row["queue"]: row["number"] for row in _grouped(rows.at_work(), number=Count("pk"))}
    waiting = _grouped(due, number=Count("pk"), oldest=Min("due_at"))
    number = sum(row["number"] for row in waiting)
    oldest = min((row["oldest"] for row in waiting), default=None)
    age = (now - oldest).total_seconds() if oldest else 0.0
    patience = settings.REDISPATCH_SECONDS + STUCK_SECONDS
    late = [row["queue"] for row in waiting if (now - row["oldest"]).total_seconds() > patience]
    unserved = [queue for queue in late if not may_be_served(queue, served, at_work)]
    # Workers of other queues are at work, and some worker that answers nobody may consume these.
    is_unknown = any(queue not in at_work and queue not in (served or ()) for queue in late)
    text = f"{counted(number, 'execution')} queued and due, the oldest for {duration(age)}."
    if not number:
        yield Finding("queue", "OK", "No execution waits for a worker.")
    elif unserved:
        text = f"{text} No worker serves {_queues(unserved)}."
        yield Finding("queue", "FAIL", text, f"Start a worker: {_worker_command(unserved)}")
    elif busy := [queue for queue in late if queue in at_work]:
        running = sum(at_work[queue] for queue in busy)
        text = f"{text} The workers of {_queues(busy)} are busy: {counted(running, 'execution')} running."
        hint = f"If that takes too long, add workers: {_worker_command(busy)}"
        yield Finding("queue", "WARN", text, hint, needs_person=is_unknown)
    elif late:
        hint = "Are there workers for their queues, and enough of them? manage.py conductor ls --status queued"
        yield Finding("queue", "WARN", text, hint, needs_person=is_unknown)
    else:
        yield Finding("queue", "OK", text)

    unanswered = rows.with_status(ExecutionStatus.QUEUED).filter(~IS_STOPPED, dispatches__gte=UNDELIVERABLE_DISPATCHES)
    # Behind others in a busy queue, a message is published again and again without anything being wrong.
    unanswered = unanswered.exclude(queue__in=list(at_work))
    number = unanswered.count()
    if number:
        queues = sorted(set(unanswered.values_list("queue", flat=True)[:1_000]))
        yield Finding(
            "undeliverable",
            "FAIL",
            f"{counted(number, 'execution')} published {UNDELIVERABLE_DISPATCHES} times or more, taken by no worker, "
            f"in {_queues(queues)}.",
            f"Start a worker that knows their tasks: {_worker_command(queues)}",
        )
    else:
        yield Finding("undeliverable", "OK", "None.")

    yield _held(now)
    yield _paused(now)
    yield _stuck(rows, settings.SWEEP_SECONDS + STUCK_SECONDS)


def _held(now: dt.datetime) -> Finding:
    """Tell what people hold: it does not go on by itself."""
    rows = stops.held()
    number = rows.count()
    if not number:
        return Finding("held", "OK", "None.")
    first = rows[0]
    text = f"{counted(number, 'execution')} held, the first of them: {clean(stops.why_held(first, now))}"
    return Finding("held", "WARN", text, "Let them go on: manage.py conductor release --held")


def _paused(now: dt.datetime) -> Finding:
    """Tell which tasks people have paused."""
    found = stops.read_paused()
    if not found:
        return Finding("paused", "OK", "No task.")
    told = [
        f"{clean(one.row.name)} ({counted(one.queued, 'execution')} queued). {clean(stops.why_paused(one.row, now))}"
        for one in found[:5]
    ]
    text = f"{counted(len(found), 'task')} paused: {' '.join(told)}"
    return Finding("paused", "WARN", text, f"Let its runs begin again: manage.py conductor unpause {found[0].row.name}")


def _grouped(rows: Any, **values: Any) -> list[dict[str, Any]]:
    """Return ``values`` of the rows of each queue."""
    return list(rows.order_by("queue").values("queue").annotate(**values))


def may_be_served(queue: str, served: frozenset[str] | None, at_work: Mapping[str, int]) -> bool:
    """Tell whether there may be workers for a queue; one that runs a task in a solo pool answers nobody."""
    if queue in at_work or (served and queue in served):
        return True
    return not served and bool(at_work)


def _queues(names: Sequence[str]) -> str:
    return f"{'queue' if len(names) == 1 else 'queues'} {', '.join(names[:5])}"


def _worker_command(queues: Sequence[str]) -> str:
    return f"celery -A {app_to_load()} worker -Q {','.join(queues[:5])}"


def locks() -> Finding:
    """Look who keeps others waiting: a host that is gone does, until its server notices."""
    connection = connections[database()]
    try:
        found = lock_holders.holders(LOCK_SECONDS, database())
    except AnyDatabaseError as error:
        return Finding("locks", "OK", f"Not looked at: {line(error)}")
    if not found:
        return Finding("locks", "OK", f"No session has waited for a lock for {LOCK_SECONDS:g} s.")
    worst = found[0]
    text = (
        f"{counted(worst.waiting, 'session')} waiting, the first for {duration(worst.longest)}, for locks of session "
    )
    text += f"{worst.session}{f' of {worst.client}' if worst.client else ''}"
    if worst.state:
        text += f" ({worst.state}, its transaction is open for {duration(worst.seconds)})"
    text += "."
    if others := len(found) - 1:
        text = f"{text} {counted(others, 'other session')} {'keeps' if others == 1 else 'keep'} others waiting, too."
    end = "SELECT pg_terminate_backend(%d)" if connection.vendor == "postgresql" else "KILL %d"
    return Finding(
        "locks",
        "WARN",
        text,
        f"If its client is gone, end it: {end % worst.session}. How the server notices: docs/howto/deployment.md.",
    )


def _stuck(rows: Any, grace: float) -> Finding:
    """Look for what a sweeper would have dealt with long ago."""
    before = clock.after(-grace)
    late = Step.objects.using(database()).filter(status=StepStatus.PENDING, deadline_at__lt=before)
    found = {
        "running with a lapsed lease": rows.with_status(ExecutionStatus.RUNNING)
        .filter(lease_expires_at__lt=before)
        .count(),
        "waiting past a deadline": late.count(),
        "open past the deadline of their tree": rows.past_deadline().filter(tree_deadline_at__lt=before).count(),
        "to be cancelled": rows.to_cancel().filter(cancel_requested_at__lt=before).count(),
        "waiting for nothing": waiting_for_nothing(rows).count() + len(auditing.in_vain()),
    }
    stuck = [f"{number:,} {what}" for what, number in found.items() if number]
    if not stuck:
        return Finding("stuck", "OK", "None.")
    return Finding(
        "stuck",
        "FAIL",
        f"Executions that a sweeper should have moved: {', '.join(stuck)}.",
        "No worker is sweeping. Start one, or run: python manage.py conductor sweep",
    )
