"""``conductor doctor``: is everything there that durable executions need?"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from celery import Celery
from django.core import checks as system_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandParser
from django.db import Error as AnyDatabaseError
from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from rich.table import Table
from rich.text import Text

from conductor_app.checks import schema
from conductor_app.checks.broker import check_app
from conductor_app.checks.database import session_warnings
from conductor_app.checks.result_backend import check_result_backend
from conductor_app.checks.subject import TAG, has_app
from conductor_app.conf import conductor_settings
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands import attendance
from conductor_app.management.subcommands.base import (
    OK,
    PROBLEM,
    Subcommand,
    celery_app,
    counted,
    load_durable_tasks,
)
from conductor_app.management.subcommands.bounded import within
from conductor_app.management.subcommands.findings import Finding, line
from conductor_app.management.subcommands.open_work import executions, locks
from conductor_app.management.subcommands.scheduled import schedule_findings
from conductor_app.models import Execution, database
from conductor_app.store import clock
from conductor_app.store.owners import node_name
from conductor_app.telling.hints import app_to_load
from conductor_app.transitions import dispatch

#: Seconds that the broker has to answer.
BROKER_SECONDS = 2
#: Seconds that workers have to answer.
PING_SECONDS = 1.0
#: More seconds than this between two clocks are odd.
SKEW_SECONDS = 5.0


class Doctor(Subcommand):
    """Looks at settings, database, broker, workers and executions, and changes nothing."""

    name = "doctor"
    help = "Check settings, database, broker, workers, and whether executions are stuck."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare how strict it is."""
        parser.add_argument(
            "--strict",
            action="store_true",
            help="exit 1 also if nobody is known to sweep, or to serve a queue whose executions are late",
        )

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Look at everything; one thing that is broken does not stop the rest."""
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
        wanting = [finding.name for finding in findings if finding.needs_person] if options["strict"] else []
        out.document({"ok": not failed and not wanting, "checks": [_document(finding) for finding in findings]})
        out.print(table)
        verdict = "Everything is well." if not warned else f"{counted(warned, 'warning')}, nothing is broken."
        if failed:
            verdict = f"{counted(failed, 'problem')}, {counted(warned, 'warning')}."
        out.print(Text(), Text(verdict, STYLES["FAIL"] if failed else STYLES["WARN"] if warned else STYLES["OK"]))
        if wanting:
            out.note(f"--strict: a person is needed for {', '.join(wanting)}.")
        return PROBLEM if failed or wanting else OK


def _document(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "needs_person": finding.needs_person or not finding.is_well}


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
        rows = attendance.alive()
        yield attendance.seen(rows)
        yield from executions(attendance.with_queues(served, rows))
        yield from schedule_findings()
        yield locks()
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
        return Finding("database", "FAIL", f'Database "{using}" does not answer: {line(error)}', "Check DATABASES.")
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
        warning = within(BROKER_SECONDS + 0.5, lambda: _ask_broker(app))
    except TimeoutError:
        return Finding("broker", "FAIL", f"{url} did not answer within {BROKER_SECONDS:g} s.", _BROKER_HINT)
    except Exception as error:  # noqa: BLE001 - each client library raises its own errors
        return Finding("broker", "FAIL", f"{url} cannot be reached: {line(error)}", _BROKER_HINT)
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
        replies = within(PING_SECONDS + BROKER_SECONDS, inspect.active_queues) or {}
    except Exception as error:  # noqa: BLE001 - each client library raises its own errors
        text = f"They could not be asked: {line(error)}"
        return Finding("workers", "WARN", text, needs_person=not _at_work()), None
    names = sorted(replies)
    if not names:
        text = f"No worker answered within {PING_SECONDS:g} s."
        # Each worker sweeps. In a solo pool, one that runs a task answers nobody, and renews its lease.
        hint = f"Start one: celery -A {app_to_load()} worker"
        return Finding("workers", "WARN", text, hint, needs_person=not _at_work()), frozenset()
    served = frozenset(str(queue["name"]) for queues in replies.values() for queue in queues or ())
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return Finding("workers", "OK", f"{counted(len(names), 'worker')} answered: {shown}."), served


def _seen_in_database() -> str:
    names = _at_work()
    if names is None:
        return ""
    return f"At work: {', '.join(names[:5])}." if names else "None is at work now."


def _at_work() -> list[str] | None:
    """Return the workers that hold a lease, or say that they are there; ``None`` if the database does not tell."""
    try:
        running = Execution.objects.using(database()).at_work()
        owners = set(running.values_list("lease_owner", flat=True)[:1_000])
    except AnyDatabaseError:
        return None
    return sorted({*(node_name(owner) for owner in owners), *(row.name for row in attendance.alive())})


def _tasks(app: Celery) -> Finding:
    try:
        names = load_durable_tasks(app)
    except Exception as error:  # noqa: BLE001 - the project's own modules are imported
        return Finding("tasks", "FAIL", f"Loading the tasks failed: {type(error).__name__}: {line(error)}")
    if not names:
        return Finding(
            "tasks",
            "WARN",
            "No durable task is registered.",
            "Put @durable_task above a function in the tasks.py of an installed app.",
        )
    return Finding("tasks", "OK", f"{counted(len(names), 'durable task')} registered.")


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


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    credentials, at, address = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}{separator}{user}{':**' if ':' in credentials else ''}{at}{address}"
