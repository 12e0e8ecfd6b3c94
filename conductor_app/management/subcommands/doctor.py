"""``conductor doctor``: is everything there that durable executions need?"""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from celery import Celery
from django.core import checks as system_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import Error as AnyDatabaseError
from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from django.db.models import Count, Min
from rich.table import Table
from rich.text import Text

from conductor_app.checks import schema
from conductor_app.checks.broker import check_app
from conductor_app.checks.database import session_warnings
from conductor_app.checks.result_backend import check_result_backend
from conductor_app.checks.subject import TAG, has_app
from conductor_app.conf import conductor_settings
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands.base import (
    OK,
    PROBLEM,
    Subcommand,
    celery_app,
    counted,
    load_durable_tasks,
)
from conductor_app.models import Execution, Step, database
from conductor_app.models.stranded import waiting_for_nothing
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock, lock_holders
from conductor_app.store.owners import node_name
from conductor_app.telling.hints import app_to_load
from conductor_app.telling.queues import UNDELIVERABLE_DISPATCHES
from conductor_app.telling.words import clean, duration
from conductor_app.transitions import dispatch, steps

T = TypeVar("T")

#: Seconds that the broker has to answer.
BROKER_SECONDS = 2
#: Seconds that workers have to answer.
PING_SECONDS = 1.0
#: More seconds than this between two clocks are odd.
SKEW_SECONDS = 5.0
#: Something that has been due for this many seconds longer than a sweep takes shows that nobody sweeps.
STUCK_SECONDS = 60.0
#: A session that waits longer than this for a lock of another one is worth a line.
LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is well, and what to do if not."""

    name: str
    #: ``OK``, ``WARN`` or ``FAIL``.
    level: str
    message: str
    hint: str = ""

    @property
    def is_well(self) -> bool:
        """Whether what comes after it can rely on it."""
        return self.level != "FAIL"


class Doctor(Subcommand):
    """Looks at settings, database, broker, workers and executions, and changes nothing."""

    name = "doctor"
    help = "Check settings, database, broker, workers, and whether executions are stuck."

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Look at everything; one thing that is broken does not stop the rest."""
        del options
        findings = []
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for finding in _examine():
            findings.append(finding)
            text = plain(finding.message)
            if finding.hint:
                text.append("\n→ ", style="dim").append_text(plain(finding.hint))
            table.add_row(Text(finding.level, STYLES[finding.level]), finding.name, text)
        failed = sum(finding.level == "FAIL" for finding in findings)
        warned = sum(finding.level == "WARN" for finding in findings)
        out.document({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
        out.print(table)
        verdict = "Everything is well." if not warned else f"{counted(warned, 'warning')}, nothing is broken."
        if failed:
            verdict = f"{counted(failed, 'problem')}, {counted(warned, 'warning')}."
        out.print(Text(), Text(verdict, STYLES["FAIL"] if failed else STYLES["WARN"] if warned else STYLES["OK"]))
        return PROBLEM if failed else OK


def _examine() -> Iterator[Finding]:
    app = celery_app()
    settings = _settings()
    yield settings
    answers = _database()
    yield answers
    tables = _tables() if answers.is_well else None
    if tables is not None:
        yield tables
        yield _clock()
    yield _app()
    served: frozenset[str] | None = None
    if has_app(app):
        broker = _broker(app)
        yield broker
        yield _result_backend(app)
        workers, served = _workers(app, broker)
        yield workers
        yield _tasks(app)
    if tables is not None and tables.is_well and settings.is_well:
        yield from _executions(served)
        yield _locks()
    yield from _other_checks()


# ------------------------------------------------------------------------------------------------ settings and database


def _settings() -> Finding:
    try:
        conductor_settings()
    except ImproperlyConfigured as error:
        return Finding("settings", "FAIL", str(error), "docs/reference/settings.md lists the keys of CONDUCTOR.")
    return Finding("settings", "OK", "CONDUCTOR is right.")


def _database() -> Finding:
    using = database()
    started = time.monotonic()
    try:
        clock.read(using)
    except (AnyDatabaseError, ImproperlyConfigured) as error:
        return Finding("database", "FAIL", f'Database "{using}" does not answer: {_line(error)}', "Check DATABASES.")
    took = (time.monotonic() - started) * 1_000
    connection = connections[using]
    name = connection.settings_dict["NAME"]
    return Finding("database", "OK", f'{connection.display_name} "{name}" answers in {took:.0f} ms.')


def _tables() -> Finding:
    using = database()
    if schema.missing_tables(using):
        message = schema.tables_missing(using)
        return Finding("tables", "FAIL", str(message.msg), str(message.hint))
    executor = MigrationExecutor(connections[using])
    targets = [key for key in executor.loader.graph.leaf_nodes() if key[0] == "conductor_app"]
    unapplied = [migration.name for migration, _ in executor.migration_plan(targets)]
    if unapplied:
        return Finding(
            "tables",
            "FAIL",
            f'Migrations of conductor_app are not applied to database "{using}": {", ".join(unapplied)}.',
            "Run: python manage.py migrate conductor_app",
        )
    return Finding("tables", "OK", "All migrations of conductor_app are applied.")


def _clock() -> Finding:
    before = dt.datetime.now(dt.UTC)
    theirs = clock.read(database())
    ours = before + (dt.datetime.now(dt.UTC) - before) / 2
    if theirs.tzinfo is None:
        ours = ours.astimezone().replace(tzinfo=None)
    skew = (ours - theirs).total_seconds()
    text = f"This machine's clock is {abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the database's."
    if abs(skew) > SKEW_SECONDS:
        return Finding(
            "clock",
            "WARN",
            text,
            "Deadlines hold all the same: only the database's clock decides them. Logs are hard to read; run NTP.",
        )
    return Finding("clock", "OK", text)


# --------------------------------------------------------------------------------------------------- Celery, its broker


_BROKER_HINT = (
    "Check CELERY_BROKER_URL. Until the broker is back, executions are stored as queued; then they are published."
)


def _app() -> Finding:
    messages = check_app()
    if messages:
        return Finding("celery app", "FAIL", str(messages[0].msg), str(messages[0].hint))
    return Finding("celery app", "OK", f'The Celery app is "{celery_app().main}".')


def _broker(app: Celery) -> Finding:
    if dispatch.is_embedded(app):
        return Finding("broker", "OK", "memory://: no broker server, workers take due executions from the database.")
    url = app.connection_for_write().as_uri()
    started = time.monotonic()
    try:
        warning = _within(BROKER_SECONDS + 0.5, lambda: _ask_broker(app))
    except TimeoutError:
        return Finding("broker", "FAIL", f"{url} did not answer within {BROKER_SECONDS:g} s.", _BROKER_HINT)
    except Exception as error:  # noqa: BLE001 - each client library raises its own errors
        return Finding("broker", "FAIL", f"{url} cannot be reached: {_line(error)}", _BROKER_HINT)
    if warning:
        return Finding("broker", "WARN", f"{url} answers, but {warning}", "Set maxmemory-policy noeviction in Redis.")
    return Finding("broker", "OK", f"{url} answers in {(time.monotonic() - started) * 1_000:.0f} ms.")


def _ask_broker(app: Celery) -> str:
    """Connect, and return what is wrong with the broker, if anything."""
    with app.connection_for_write(connect_timeout=BROKER_SECONDS) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=BROKER_SECONDS)
        if connection.transport.driver_type != "redis":
            return ""
        channel: Any
        with connection.channel() as channel:
            try:
                memory = channel.client.config_get("maxmemory*")
            except Exception:  # noqa: BLE001 - many hosted servers refuse CONFIG
                return ""
        policy = memory.get("maxmemory-policy", "noeviction")
        if policy != "noeviction" and str(memory.get("maxmemory", "0")) != "0":
            return f"it may throw messages away when its memory is full (maxmemory-policy {policy})."
        return ""


def _result_backend(app: Celery) -> Finding:
    messages = check_result_backend()
    if messages:
        return Finding("result backend", "WARN", str(messages[0].msg), str(messages[0].hint))
    return Finding("result backend", "OK", f"{_without_password(str(app.conf.result_backend))} is configured.")


def _workers(app: Celery, broker: Finding) -> tuple[Finding, frozenset[str] | None]:
    """Return what is known of workers, and the queues that those who answered consume; ``None`` if none was asked."""
    if dispatch.is_embedded(app):
        text = f"Not asked: with memory:// nobody can reach a worker. {_seen_in_database()}".rstrip()
        return Finding("workers", "OK", text), None
    if not broker.is_well:
        return Finding("workers", "WARN", "Not asked: the broker does not answer."), None
    inspect = app.control.inspect(timeout=PING_SECONDS)
    try:
        replies = _within(PING_SECONDS + BROKER_SECONDS, inspect.active_queues) or {}
    except Exception as error:  # noqa: BLE001 - each client library raises its own errors
        return Finding("workers", "WARN", f"They could not be asked: {_line(error)}"), None
    names = sorted(replies)
    if not names:
        text = f"No worker answered within {PING_SECONDS:g} s."
        return Finding("workers", "WARN", text, f"Start one: celery -A {app_to_load()} worker"), frozenset()
    served = frozenset(str(queue["name"]) for queues in replies.values() for queue in queues or ())
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return Finding("workers", "OK", f"{counted(len(names), 'worker')} answered: {shown}."), served


def _seen_in_database() -> str:
    try:
        running = Execution.objects.using(database()).with_status(ExecutionStatus.RUNNING)
        owners = set(running.filter(lease_expires_at__gt=clock.now()).values_list("lease_owner", flat=True)[:1_000])
    except AnyDatabaseError:
        return ""
    names = sorted({node_name(owner) for owner in owners})
    return f"At work: {', '.join(names[:5])}." if names else "None is at work now."


def _tasks(app: Celery) -> Finding:
    try:
        names = load_durable_tasks(app)
    except Exception as error:  # noqa: BLE001 - the project's own modules are imported
        return Finding("tasks", "FAIL", f"Loading the tasks failed: {type(error).__name__}: {_line(error)}")
    if not names:
        return Finding(
            "tasks",
            "WARN",
            "No durable task is registered.",
            "Put @durable_task above a function in the tasks.py of an installed app.",
        )
    return Finding("tasks", "OK", f"{counted(len(names), 'durable task')} registered.")


# ----------------------------------------------------------------------------------------------------------- executions


def _executions(served: frozenset[str] | None) -> Iterator[Finding]:
    """Look at what is queued and at what is stuck.

    Args:
        served: The queues that workers say they consume; ``None`` if none could be asked.
    """
    using = database()
    settings = conductor_settings()
    rows = Execution.objects.using(using)
    now = clock.read(using)

    due = rows.with_status(ExecutionStatus.QUEUED).filter(due_at__lte=clock.now())
    at_work = {row["queue"]: row["number"] for row in _grouped(rows.at_work(), number=Count("pk"))}
    waiting = _grouped(due, number=Count("pk"), oldest=Min("due_at"))
    number = sum(row["number"] for row in waiting)
    oldest = min((row["oldest"] for row in waiting), default=None)
    age = (now - oldest).total_seconds() if oldest else 0.0
    patience = settings.REDISPATCH_SECONDS + STUCK_SECONDS
    late = [row["queue"] for row in waiting if (now - row["oldest"]).total_seconds() > patience]
    unserved = [queue for queue in late if not _may_be_served(queue, served, at_work)]
    text = f"{counted(number, 'execution')} queued and due, the oldest for {duration(age)}."
    if not number:
        yield Finding("queue", "OK", "No execution waits for a worker.")
    elif unserved:
        text = f"{text} No worker serves {_queues(unserved)}."
        yield Finding("queue", "FAIL", text, f"Start a worker: {_worker_command(unserved)}")
    elif busy := [queue for queue in late if queue in at_work]:
        running = sum(at_work[queue] for queue in busy)
        text = f"{text} The workers of {_queues(busy)} are busy: {counted(running, 'execution')} running."
        yield Finding("queue", "WARN", text, f"If that takes too long, add workers: {_worker_command(busy)}")
    elif late:
        hint = "Are there workers for their queues, and enough of them? manage.py conductor ls --status queued"
        yield Finding("queue", "WARN", text, hint)
    else:
        yield Finding("queue", "OK", text)

    unanswered = rows.with_status(ExecutionStatus.QUEUED).filter(dispatches__gte=UNDELIVERABLE_DISPATCHES)
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

    yield _stuck(rows, settings.SWEEP_SECONDS + STUCK_SECONDS)


def _grouped(rows: Any, **values: Any) -> list[dict[str, Any]]:
    """Return ``values`` of the rows of each queue."""
    return list(rows.order_by("queue").values("queue").annotate(**values))


def _may_be_served(queue: str, served: frozenset[str] | None, at_work: Mapping[str, int]) -> bool:
    """Tell whether there may be workers for a queue; one that runs a task in a solo pool answers nobody."""
    if queue in at_work or (served and queue in served):
        return True
    return not served and bool(at_work)


def _queues(names: Sequence[str]) -> str:
    return f"{'queue' if len(names) == 1 else 'queues'} {', '.join(names[:5])}"


def _worker_command(queues: Sequence[str]) -> str:
    return f"celery -A {app_to_load()} worker -Q {','.join(queues[:5])}"


def _locks() -> Finding:
    """Look who keeps others waiting: a host that is gone does, until its server notices."""
    connection = connections[database()]
    try:
        found = lock_holders.holders(LOCK_SECONDS, database())
    except AnyDatabaseError as error:
        return Finding("locks", "OK", f"Not looked at: {_line(error)}")
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
        "to be cancelled": rows.to_cancel().filter(cancel_requested_at__lt=before).count(),
        "waiting for nothing": waiting_for_nothing(rows).count() + len(steps.in_vain()),
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


# ------------------------------------------------------------------------------------------------ all the other checks

#: Checks that have a line of their own.
_SHOWN = {"conductor.E001", "conductor.E003", "conductor.E017", "conductor.W009"}


def _other_checks() -> Iterator[Finding]:
    messages = system_checks.run_checks(tags=[TAG], include_deployment_checks=True)
    with contextlib.suppress(AnyDatabaseError):  # has a line of its own
        messages += session_warnings(database())
    shown = [message for message in messages if message.id not in _SHOWN and not message.is_silenced()]
    for message in sorted(shown, key=lambda message: (-message.level, str(message.id))):
        level = "FAIL" if message.level >= system_checks.ERROR else "WARN"
        yield Finding(str(message.id), level, str(message.msg), str(message.hint or ""))
    if not shown:
        yield Finding("system checks", "OK", "All others are silent.")


# -------------------------------------------------------------------------------------------------------------- helpers


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread, so that no client library can hold us up.

    Raises:
        TimeoutError: It was not done in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="conductor-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return clean(text.splitlines()[0])


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    credentials, at, address = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}{separator}{user}{':**' if ':' in credentials else ''}{at}{address}"
