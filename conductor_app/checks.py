"""System checks ``conductor.E…`` and ``conductor.W…``; ``docs/reference/checks.md`` tells what each one is about.

Checks about settings run with every ``manage.py check``; those about running in production with ``--deploy``; the one
about tables with ``--database``. Checks about tasks look at the tasks that are loaded, which is all of them in a worker
and in ``manage.py conductor doctor``.

Celery hides the checks of Django from whoever starts a worker, so a worker that starts runs all of ours
(``report_to_worker``) and writes what they say to stderr.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import re
import sys
import threading
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

from celery import Celery, current_app
from celery.app.backends import by_url
from celery.backends.rpc import RPCBackend
from celery.loaders.default import Loader as DefaultLoader
from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage, Tags
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand
from django.db import Error as AnyDatabaseError
from django.db import connections
from kombu import serialization

from conductor_app.body import scopes
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.tasks.durable import DurableTask
from conductor_app.transitions import dispatch

logger = logging.getLogger("conductor_app.worker")

TAG = "conductor"
MODELS = (Execution, Step, FailedExecution)
#: What SQLite needs for several processes that write at the same time, as it stands among its ``OPTIONS``.
SQLITE_OPTIONS = (
    '"transaction_mode": "IMMEDIATE", "timeout": 20, "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL"'
)
#: Seconds that a worker's start waits for the database.
DATABASE_PATIENCE_SECONDS = 5.0

#: Names of Celery's pools, by the module that implements them and by what the setting may say.
_POOLS = {
    "prefork": "prefork",
    "processes": "prefork",
    "thread": "threads",
    "threads": "threads",
    "solo": "solo",
    "gevent": "gevent",
    "eventlet": "eventlet",
}
#: The pool of the worker that runs the checks, if it is one.
_worker_pool: ContextVar[str | None] = ContextVar("conductor_app_worker_pool", default=None)
#: How many bodies that worker runs at once, if it says so.
_worker_concurrency: ContextVar[int | None] = ContextVar("conductor_app_worker_concurrency", default=None)


# ---------------------------------------------------------------------------------------------------- what is looked at


def _app() -> Celery:
    app: Celery = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def has_app(app: Celery) -> bool:
    """Tell whether the project has an app; if not, Celery makes one up, under the name ``default``."""
    return not (app.main == "default" and isinstance(app.loader, DefaultLoader))


def broker_transports(app: Celery) -> set[str]:
    """Return the transports of the broker's URLs: ``amqp``, ``redis`` …"""
    return {name.partition("+")[0].partition(":")[0] for name in _broker_urls(app)}


def _broker_urls(app: Celery) -> dict[str, str]:
    """Return a URL of the broker for each scheme: ``amqp``, ``redis+socket`` …"""
    urls = app.conf.broker_write_url or app.conf.broker_url or "amqp://"
    found = urls.split(";") if isinstance(urls, str) else urls
    return {str(url).partition("://")[0]: str(url) for url in found}


def durable_tasks(app: Celery) -> list[DurableTask[Any, Any]]:
    """Return the durable tasks that are loaded.

    An app that is not finalized has none: finalizing it here would be too early for whoever connects to
    ``on_after_finalize`` in a module that is imported later.
    """
    if not getattr(app, "finalized", False):
        return []
    return [task for _name, task in sorted(app.tasks.items()) if isinstance(task, DurableTask)]


def missing_tables(using: str) -> list[str]:
    """Return the tables that the database lacks.

    Raises:
        Error: It cannot be asked.
    """
    connection = connections[using]
    with connection.cursor() as cursor:
        present = set(connection.introspection.table_names(cursor))
    return [table for table in (model._meta.db_table for model in MODELS) if table not in present]


def _pool(app: Celery) -> str:
    return _worker_pool.get() or str(app.conf.worker_pool or "prefork")


def _named(tasks: Sequence[DurableTask[Any, Any]]) -> str:
    names = ", ".join(task.name for task in tasks[:3])
    return f"{names} and {len(tasks) - 3} more" if len(tasks) > 3 else names


# ----------------------------------------------------------------------------------------------------------- the checks


def tables_missing(using: str) -> CheckMessage:
    """Return E001 for a database."""
    return checks.Error(
        f'conductor_app tables do not exist in database "{using}".',
        hint="Run: python manage.py migrate conductor_app",
        id="conductor.E001",
    )


# Without our tag: Django 6.1 runs the checks of a tag on all databases, although nobody named one, and a database that
# does not answer would hold up a worker that starts, and `manage.py check --tag conductor`.
@checks.register(Tags.database)
def check_tables(databases: Sequence[str] | None = None, **_kwargs: Any) -> list[CheckMessage]:
    """E001: the tables are missing."""
    using = database()
    if using not in (databases or ()) or _is_migrating():
        return []
    try:
        return [tables_missing(using)] if missing_tables(using) else []
    except AnyDatabaseError:
        return []  # Not about tables; whatever comes next will say so.


def _is_migrating() -> bool:
    """Tell whether ``manage.py migrate`` runs the checks: it would refuse to create the tables for lack of them."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        command = frame.f_locals.get("self")
        if isinstance(command, BaseCommand) and any(
            cls.__module__ == "django.core.management.commands.migrate" for cls in type(command).__mro__
        ):
            return True
    return False


@checks.register(TAG)
def check_app(**_kwargs: Any) -> list[CheckMessage]:
    """E003: no Celery app, or no broker."""
    app = _app()
    if not has_app(app):
        return [
            checks.Error(
                "No Celery app is configured; messages would go to amqp://guest@localhost.",
                hint='Add "from .celery import app as celery_app" to the __init__.py of the project\'s package.',
                id="conductor.E003",
            )
        ]
    if not (app.conf.broker_write_url or app.conf.broker_url):
        return [
            checks.Error(
                f'No broker is configured for the Celery app "{app.main}"; messages would go to amqp://guest@localhost.',
                hint='Set CELERY_BROKER_URL, to "memory://" if there is no broker server.',
                id="conductor.E003",
            )
        ]
    return []


@checks.register(TAG)
def check_result_backend(**_kwargs: Any) -> list[CheckMessage]:
    """W009: there is no result backend."""
    app = _app()
    backend = str(app.conf.result_backend or "disabled")
    if not has_app(app) or backend.partition(":")[0] != "disabled":
        return []
    return [
        checks.Warning(
            "CELERY_RESULT_BACKEND is not set: durable execution works, but AsyncResult.get() cannot.",
            hint='Use "django-db" (django-celery-results), or conductor_app.api.get_result().',
            id="conductor.W009",
        )
    ]


@checks.register(TAG)
def check_result_address(**_kwargs: Any) -> list[CheckMessage]:
    """W034: a result backend that sends results to the process that asked for them."""
    app = _app()
    backend = str(app.conf.result_backend or "disabled")
    try:
        found: Any = cast(Any, by_url)(backend, app.loader)[0]  # its stubs are wrong
    except Exception:  # noqa: BLE001 - a backend that cannot be loaded; Celery says so when it is used
        return []
    if not has_app(app) or not issubclass(found, RPCBackend):
        return []
    return [
        checks.Warning(
            f"CELERY_RESULT_BACKEND is {backend.partition(':')[0]}, which sends results to the process that called the "
            "task: that of a durable task never arrives, and AsyncResult.get() waits for ever.",
            hint='Use "django-db" (django-celery-results) or Redis, or conductor_app.api.get_result().',
            id="conductor.W034",
        )
    ]


@checks.register(TAG)
def check_transport(**_kwargs: Any) -> list[CheckMessage]:
    """E036: a broker to which nothing can be sent, which ``.delay()`` takes for one that is away."""
    app = _app()
    if not has_app(app):
        return []
    return [
        checks.Error(
            f'Celery cannot talk to a broker "{name}://": {reason}. Executions are stored and no message is ever sent.',
            hint="Check CELERY_BROKER_URL, and that the transport's library is installed.",
            id="conductor.E036",
        )
        for name, url in _broker_urls(app).items()
        if (reason := _unusable(app, name, url))
    ]


def _unusable(app: Celery, name: str, url: str) -> str:
    """Return why there is no transport for a broker's URL, or an empty text."""
    kind, _, part = name.partition("+")
    if kind in ("redis", "rediss") and part not in ("", "socket"):
        # kombu takes it for a server of its own on this machine.
        return f"kombu knows no Redis {part}"
    try:
        app.connection_for_write(url).transport  # noqa: B018 - it is made here
    except Exception as error:  # noqa: BLE001 - whatever a library raises that is missing
        return str(error).strip("'\" ").rstrip(".") or type(error).__name__
    return ""


@checks.register(TAG)
def check_time_zone(**_kwargs: Any) -> list[CheckMessage]:
    """E033: instants that are stored as local times, where clocks are put back."""
    if settings.USE_TZ or not _has_daylight_saving():
        return []
    return [
        checks.Error(
            f"USE_TZ is False and the clocks of {settings.TIME_ZONE or 'this machine'} are put forward and back: what "
            "is due around then comes an hour late, or at once, and leases lapse an hour late, or at once.",
            hint='Set USE_TZ = True, or a TIME_ZONE without daylight saving, such as "UTC". Do it while no execution '
            "is open: instants that are stored keep their old meaning.",
            id="conductor.E033",
        )
    ]


def _has_daylight_saving() -> bool:
    """Tell whether the offset to UTC changes within the year that comes."""
    zone = zoneinfo.ZoneInfo(settings.TIME_ZONE) if settings.TIME_ZONE else None
    first = dt.datetime.now(dt.UTC)
    offsets = {(first + dt.timedelta(days=day)).astimezone(zone).utcoffset() for day in range(0, 371, 7)}
    return len(offsets) > 1


@checks.register(TAG)
def check_tenants(**_kwargs: Any) -> list[CheckMessage]:
    """E035: django-tenants gives each tenant tables of ours, at which no worker looks."""
    if not getattr(settings, "TENANT_MODEL", None):
        return []
    of_tenants = {"TENANT_APPS": getattr(settings, "TENANT_APPS", ())}
    if getattr(settings, "HAS_MULTI_TYPE_TENANTS", False):
        public = getattr(settings, "PUBLIC_SCHEMA_NAME", "public")
        types = getattr(settings, "TENANT_TYPES", {})
        of_tenants = {f'TENANT_TYPES["{name}"]': kind.get("APPS", ()) for name, kind in types.items() if name != public}
    return [
        checks.Error(
            f"conductor_app is in {where}: each tenant gets tables of its own, and workers look at those of the public "
            "schema. What a tenant's request starts is stored and never runs.",
            hint="Move conductor_app to SHARED_APPS (the APPS of the public type), and migrate. A task's tenant "
            "travels in its payload or in a header.",
            id="conductor.E035",
        )
        for where, apps in of_tenants.items()
        if any(name.partition(".")[0] == "conductor_app" for name in apps)
    ]


@checks.register(TAG, deploy=True)
def check_eager(**_kwargs: Any) -> list[CheckMessage]:
    """W013: eager mode."""
    if not _app().conf.task_always_eager:
        return []
    return [
        checks.Warning(
            "CELERY_TASK_ALWAYS_EAGER is on: .delay() runs the whole tree in the caller's process.",
            hint="Remove it from production settings; it is made for tests.",
            id="conductor.W013",
        )
    ]


@checks.register(TAG)
def check_sqlite(**_kwargs: Any) -> list[CheckMessage]:
    """W014: SQLite without what several processes need."""
    using = database()
    settings = connections[using].settings_dict
    if connections[using].vendor != "sqlite":
        return []
    options = settings.get("OPTIONS", {})
    lacks = []
    if str(options.get("transaction_mode")).upper() not in ("IMMEDIATE", "EXCLUSIVE"):
        lacks.append("transaction_mode IMMEDIATE")
    connection: Any = connections[using]
    in_memory = connection.is_in_memory_db()
    if not in_memory and not re.search(r"journal_mode\s*=\s*['\"]?wal\b", str(options.get("init_command")), re.I):
        lacks.append("journal_mode WAL")
    if not lacks:
        return []
    return [
        checks.Warning(
            f'SQLite database "{using}" has no {" and no ".join(lacks)}: processes that write at the same time will '
            'meet "database is locked".',
            hint=f'Add to DATABASES["{using}"]["OPTIONS"]: {SQLITE_OPTIONS}',
            id="conductor.W014",
        )
    ]


@checks.register(TAG)
def check_settings(**_kwargs: Any) -> list[CheckMessage]:
    """E017: ``CONDUCTOR`` is wrong."""
    try:
        if path := conductor_settings().AROUND_BODY:
            scopes.of_project(path)
    except ImproperlyConfigured as error:
        return [
            checks.Error(
                str(error), hint="docs/reference/settings.md lists the keys of CONDUCTOR.", id="conductor.E017"
            )
        ]
    return []


@checks.register(TAG)
def check_pickle(**_kwargs: Any) -> list[CheckMessage]:
    """E018: workers would unpickle messages."""
    accepted = {str(item) for item in _app().conf.accept_content or ()}
    if not accepted & {"pickle", "application/x-python-serialize"}:
        return []
    return [
        checks.Error(
            "CELERY_ACCEPT_CONTENT has pickle: whoever can write to the broker can run code in the workers.",
            hint='Remove pickle from CELERY_ACCEPT_CONTENT; durable tasks need "json" and nothing else. While other '
            'tasks of yours send pickles, add "conductor.E018" to SILENCED_SYSTEM_CHECKS.',
            id="conductor.E018",
        )
    ]


@checks.register(TAG)
def check_json(**_kwargs: Any) -> list[CheckMessage]:
    """E032: workers would read none of our messages."""
    accepted = _app().conf.accept_content
    types: Any = cast(Any, serialization).registry.name_to_type  # its stubs do not know it
    if accepted is None or types["json"] in {types.get(str(item), str(item)) for item in accepted}:
        return []
    named = ", ".join(sorted(map(str, accepted))) or "nothing"
    return [
        checks.Error(
            f"CELERY_ACCEPT_CONTENT has no json, only {named}: workers refuse the messages of durable tasks, and none "
            "of them ever runs.",
            hint='Add "json" to CELERY_ACCEPT_CONTENT. What other tasks send may stay in it.',
            id="conductor.E032",
        )
    ]


@checks.register(TAG)
def check_message_options(**_kwargs: Any) -> list[CheckMessage]:
    """W019: options about messages, which a durable task's doorbell cannot have."""
    found: list[CheckMessage] = []
    for task in durable_tasks(_app()):
        names = set(getattr(task, "ignored_options", ()))
        # Set behind the decorator's back: by a base class, or by CELERY_TASK_ANNOTATIONS.
        names |= {
            name
            for name in ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "track_started")
            if getattr(task, name, False)
        }
        if task.serializer != "json":
            names.add("serializer")
        if names:
            found.append(
                checks.Warning(
                    f"Task {task.name} sets {', '.join(sorted(names))}, which means nothing for a durable task: its "
                    "message only says that there is something to run and is acknowledged at once; leases bring back "
                    "what a dead worker ran.",
                    hint="Remove it from @durable_task, its base class or CELERY_TASK_ANNOTATIONS.",
                    id="conductor.W019",
                )
            )
    return found


@checks.register(TAG)
def check_autoretry(**_kwargs: Any) -> list[CheckMessage]:
    """W020: Celery's own retries around a durable body."""
    return [
        checks.Warning(
            f"Task {task.name} gets autoretry_for from its base class: Celery's own retries are wrapped around the "
            "durable body, and would publish messages that nothing asked for.",
            hint="Pass autoretry_for to @durable_task, which keeps retries in the database.",
            id="conductor.W020",
        )
        for task in durable_tasks(_app())
        if hasattr(task, "_orig_run")
    ]


@checks.register(TAG, deploy=True)
def check_prefetch(**_kwargs: Any) -> list[CheckMessage]:
    """W021: a worker takes more messages than it can run."""
    app = _app()
    conf = app.conf
    if dispatch.is_embedded(app) or conf.worker_prefetch_multiplier == 1 or conf.get("worker_disable_prefetch"):
        return []
    return [
        checks.Warning(
            f"CELERY_WORKER_PREFETCH_MULTIPLIER is {conf.worker_prefetch_multiplier}: short executions are parked "
            "behind a long one while other workers are idle.",
            hint="Set CELERY_WORKER_PREFETCH_MULTIPLIER = 1.",
            id="conductor.W021",
        )
    ]


@checks.register(TAG, deploy=True)
def check_redis(**_kwargs: Any) -> list[CheckMessage]:
    """W022: a Redis client that waits for ever."""
    app = _app()
    options = app.conf.broker_transport_options or {}
    if not broker_transports(app) & {"redis", "rediss", "sentinel"} or options.get("socket_timeout"):
        return []
    return [
        checks.Warning(
            "The Redis broker has no socket_timeout: a process that publishes while the server is silently gone waits "
            "for ever.",
            hint='Add to CELERY_BROKER_TRANSPORT_OPTIONS: "socket_timeout": 5, "socket_connect_timeout": 3, '
            '"socket_keepalive": True, "health_check_interval": 25.',
            id="conductor.W022",
        )
    ]


@checks.register(TAG, deploy=True)
def check_amqp(**_kwargs: Any) -> list[CheckMessage]:
    """W023: RabbitMQ may lose messages and nobody is told."""
    app = _app()
    options = app.conf.broker_transport_options or {}
    if not broker_transports(app) & {"amqp", "amqps", "pyamqp"} or options.get("confirm_publish"):
        return []
    return [
        checks.Warning(
            "The AMQP broker does not confirm what is published: a message that it drops is missed only after "
            'CONDUCTOR["REDISPATCH_SECONDS"].',
            hint='Add to CELERY_BROKER_TRANSPORT_OPTIONS: "confirm_publish": True.',
            id="conductor.W023",
        )
    ]


@checks.register(TAG, deploy=True)
def check_connection_pool(**_kwargs: Any) -> list[CheckMessage]:
    """W024: a connection pool that each prefork process would rebuild for each task."""
    if _pool(_app()) != "prefork":
        return []
    return [
        checks.Warning(
            f'DATABASES["{alias}"]["OPTIONS"]["pool"] is on, and Celery\'s prefork pool closes it before and after '
            "each task: every run builds a pool of connections to use one of them.",
            hint="Leave the pool to web processes: turn it off in the settings of the workers, or use --pool=threads.",
            id="conductor.W024",
        )
        for alias in _our_aliases()
        if connections[alias].settings_dict.get("OPTIONS", {}).get("pool")
    ]


@checks.register(TAG, deploy=True)
def check_pool_size(**_kwargs: Any) -> list[CheckMessage]:
    """W031: a connection pool that is smaller than the worker's pool of threads. Only a worker knows how many."""
    concurrency = _worker_concurrency.get()
    if _pool(_app()) != "threads" or concurrency is None:
        return []
    found: list[CheckMessage] = []
    for alias in _our_aliases():
        pool = connections[alias].settings_dict.get("OPTIONS", {}).get("pool")
        size = _pool_size(pool) if pool else None
        if size is not None and size < concurrency + 1:
            found.append(
                checks.Warning(
                    f'DATABASES["{alias}"]["OPTIONS"]["pool"] has {size} connections at most, and this worker runs '
                    f"{concurrency} bodies at once: those that find none free wait, and fail after the pool's timeout.",
                    hint=f'Set "max_size" to {concurrency + 1} or more: one for each thread of the worker, and one for '
                    "its main thread. Sweeper and heartbeats have connections outside the pool.",
                    id="conductor.W031",
                )
            )
    return found


def _pool_size(pool: Any) -> int | None:
    # psycopg_pool's defaults: 4, and no more than that.
    options = pool if isinstance(pool, dict) else {}
    size = options.get("max_size") or options.get("min_size", 4)
    return size if isinstance(size, int) else None


#: What ends a connection whose other end has silently gone, by vendor, as it stands in ``DATABASES``.
DEAD_CONNECTION_OPTIONS: dict[str, dict[str, int]] = {
    "postgresql": {
        "connect_timeout": 5,
        "tcp_user_timeout": 15_000,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    },
    "mysql": {"connect_timeout": 5, "read_timeout": 60, "write_timeout": 60},
}
#: Those without which a client waits for as long as the kernel does.
_NEEDED_OPTIONS = {
    "postgresql": ("connect_timeout", "tcp_user_timeout", "keepalives_idle"),
    "mysql": ("connect_timeout", "read_timeout", "write_timeout"),
}


@checks.register(TAG, deploy=True)
def check_dead_connections(**_kwargs: Any) -> list[CheckMessage]:
    """W030: a client that waits for a database host that is silently gone."""
    using = database()
    connection = connections[using]
    settings = connection.settings_dict
    options = settings.get("OPTIONS", {})
    # A socket of this machine's ends with the server; a service's file may have them.
    host = str(options.get("host") or settings.get("HOST") or "")
    if not host or host.startswith("/") or "service" in options:
        return []
    missing = [name for name in _NEEDED_OPTIONS.get(connection.vendor, ()) if name not in options]
    if not missing:
        return []
    advised = ", ".join(f'"{name}": {value}' for name, value in DEAD_CONNECTION_OPTIONS[connection.vendor].items())
    return [
        checks.Warning(
            f'Database "{using}" has no {" and no ".join(missing)}: a process whose database host is silently gone '
            "waits for it for as long as the kernel does, up to two hours.",
            hint=f'Add to DATABASES["{using}"]["OPTIONS"]: {advised}.',
            id="conductor.W030",
        )
    ]


@checks.register(TAG)
def check_isolation(**_kwargs: Any) -> list[CheckMessage]:
    """W025: an isolation level at which transactions refuse what they should wait for."""
    using = database()
    level = _isolation_level(using)
    if level in ("", "READ COMMITTED", "READ UNCOMMITTED"):
        return []
    hint = f'Remove "isolation_level" from DATABASES["{using}"]["OPTIONS"]; Django\'s own choice is right.'
    return [_isolation_warning(using, level, hint)]


def _isolation_warning(using: str, level: str, hint: str) -> CheckMessage:
    return checks.Warning(
        f'Database "{using}" works at the isolation level {level}: transactions that meet fail and are repeated, '
        "where at READ COMMITTED one waits for the other.",
        hint=hint,
        id="conductor.W025",
    )


@checks.register(Tags.database)
def check_session(databases: Sequence[str] | None = None, **_kwargs: Any) -> list[CheckMessage]:
    """W025, where the server sets the level, for a role or a database; the settings do not tell."""
    using = database()
    if using not in (databases or ()):
        return []
    try:
        return session_warnings(using)
    except AnyDatabaseError:
        return []  # Whatever comes next will say so.


def session_warnings(using: str) -> list[CheckMessage]:
    """Return what is to be said about how the server sets up our sessions.

    Raises:
        Error: It cannot be asked.
    """
    connection = connections[using]
    # With MySQL, Django sets a level of its own for each session. So does it with PostgreSQL, if the settings name one.
    if connection.vendor != "postgresql" or "isolation_level" in connection.settings_dict.get("OPTIONS", {}):
        return []
    with connection.cursor() as cursor:
        cursor.execute("SHOW default_transaction_isolation")
        level = str(cursor.fetchone()[0]).upper()
    if level in ("READ COMMITTED", "READ UNCOMMITTED"):
        return []
    hint = (
        "The server says so for this role or database. Run: ALTER ROLE … RESET default_transaction_isolation (or ALTER "
        f'DATABASE), or add "isolation_level": IsolationLevel.READ_COMMITTED to DATABASES["{using}"]["OPTIONS"].'
    )
    return [_isolation_warning(using, level, hint)]


def _isolation_level(using: str) -> str:
    """Return the level that the settings ask for, or an empty string."""
    connection = connections[using]
    options = connection.settings_dict.get("OPTIONS", {})
    if "isolation_level" not in options or connection.vendor not in ("postgresql", "mysql"):
        return ""
    level = options["isolation_level"]
    if level is None:
        # MySQL: the server's own default, REPEATABLE READ unless it was changed.
        return "of the server's default (REPEATABLE READ)" if connection.vendor == "mysql" else ""
    if connection.vendor == "postgresql" and not isinstance(level, str):
        from django.db.backends.postgresql.psycopg_any import IsolationLevel  # noqa: PLC0415 - needs a driver

        with contextlib.suppress(ValueError):
            level = IsolationLevel(level).name
    return str(level).upper().replace("_", " ")


@checks.register(TAG)
def check_time_limits(**_kwargs: Any) -> list[CheckMessage]:
    """W026: time limits on a pool that has none. Only a worker knows its pool, so only a worker asks."""
    app = _app()
    pool = _worker_pool.get()
    if pool not in ("threads", "solo", "gevent", "eventlet"):
        return []
    limited = [task for task in durable_tasks(app) if task.time_limit or task.soft_time_limit]
    everywhere = app.conf.task_time_limit or app.conf.task_soft_time_limit
    if not limited and not everywhere:
        return []
    what = f"the time limits of {_named(limited)}" if limited else "CELERY_TASK_TIME_LIMIT"
    return [
        checks.Warning(
            f"This worker's pool, {pool}, does not enforce {what}.",
            hint="Use --pool=prefork, or a timeout in the parent: ctx.invoke(…, timeout=30).",
            id="conductor.W026",
        )
    ]


@checks.register(TAG, deploy=True)
def check_broker_retries(**_kwargs: Any) -> list[CheckMessage]:
    """W027: workers that give up on a broker that is away."""
    app = _app()
    retries = app.conf.broker_connection_max_retries
    if dispatch.is_embedded(app) or not retries:
        return []
    return [
        checks.Warning(
            f"CELERY_BROKER_CONNECTION_MAX_RETRIES is {retries}: a worker exits when the broker is away for longer, "
            "and nothing starts it again unless a supervisor does.",
            hint="Set CELERY_BROKER_CONNECTION_MAX_RETRIES = None.",
            id="conductor.W027",
        )
    ]


@checks.register(TAG, deploy=True)
def check_soft_shutdown(**_kwargs: Any) -> list[CheckMessage]:
    """W028: SIGTERM kills what runs."""
    if os.environ.get("REMAP_SIGTERM") != "SIGQUIT" or _app().conf.worker_soft_shutdown_timeout:
        return []
    return [
        checks.Warning(
            "REMAP_SIGTERM=SIGQUIT makes SIGTERM a cold shutdown, and CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT is 0: what "
            "runs is killed, and its bodies begin again.",
            hint="Set CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT to the supervisor's grace period less 10 seconds.",
            id="conductor.W028",
        )
    ]


@checks.register(TAG)
def check_autocommit(**_kwargs: Any) -> list[CheckMessage]:
    """E029: nothing would be committed."""
    using = database()
    if connections[using].settings_dict.get("AUTOCOMMIT", True):
        return []
    return [
        checks.Error(
            f'DATABASES["{using}"]["AUTOCOMMIT"] is False: the moves of executions would never be committed.',
            hint="Remove AUTOCOMMIT; use transaction.atomic() where a transaction is wanted.",
            id="conductor.E029",
        )
    ]


def _our_aliases() -> list[str]:
    """Return the aliases that a run works with: ours, and ``default`` where it is another one."""
    return list(dict.fromkeys([database(), "default"]))


# ----------------------------------------------------------------------------------------------------- a worker's start


def report_to_worker(instance: Any = None, options: Any = None, **_kwargs: Any) -> None:
    """Run all checks for a worker that starts, and write to stderr what they say, in a line or two each.

    Takes the arguments of ``celery.signals.celeryd_init``. A worker starts whatever the checks say, and also when the
    database is away. ``CELERY_SKIP_CHECKS`` skips them, as it does Celery's own call of Django's checks.
    """
    del instance
    if os.environ.get("CELERY_SKIP_CHECKS"):
        return
    options = options or {}
    # The command line says `pool`, `app.Worker(…)` says `pool_cls`, and CELERY_WORKER_POOL is for who says nothing.
    token = _worker_pool.set(_name_pool(options.get("pool_cls") or options.get("pool") or _app().conf.worker_pool))
    concurrency = options.get("concurrency") or _app().conf.worker_concurrency or os.cpu_count()
    size = _worker_concurrency.set(int(concurrency) if concurrency else None)
    try:
        for message in _messages_for_worker():
            _write(message)
    except Exception as error:  # noqa: BLE001 - a check that breaks must not keep a worker from starting
        logger.warning("The checks of conductor_app failed: %s: %s", type(error).__name__, error)
    finally:
        _worker_concurrency.reset(size)
        _worker_pool.reset(token)


def _messages_for_worker() -> Iterator[CheckMessage]:
    messages = checks.run_checks(tags=[TAG], include_deployment_checks=True)
    yield from sorted(messages, key=lambda message: (-message.level, str(message.id), message.msg))
    yield from _ask_database()


def _ask_database() -> Iterable[CheckMessage]:
    """Look for the tables, in a thread: a database that does not answer must not hold up the worker."""
    using = database()
    found: list[CheckMessage] = []

    def look() -> None:
        try:
            if missing_tables(using):
                found.append(tables_missing(using))
            found.extend(session_warnings(using))
        except Exception as error:  # noqa: BLE001 - a driver that is missing, settings that are wrong, a server that is away
            found.append(_database_away(using, str(error)))
        finally:
            connections.close_all()

    _run_for(look, DATABASE_PATIENCE_SECONDS, lambda: found.append(_database_away(using, "no answer yet")))
    return found


def _database_away(using: str, reason: str) -> CheckMessage:
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return checks.Warning(
        f'Database "{using}" does not answer ({line}), so its tables were not checked.',
        hint="The worker goes on and tries again; `python manage.py conductor doctor` tells more.",
    )


def _run_for(work: Callable[[], None], seconds: float, give_up: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, name="conductor-checks", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        give_up()


def _name_pool(pool: Any) -> str | None:
    module = pool.partition(":")[0] if isinstance(pool, str) else getattr(pool, "__module__", "")  # or a plain name
    return _POOLS.get(str(module).rpartition(".")[2])


def _write(message: CheckMessage) -> None:
    if message.is_silenced():
        return
    name = {checks.ERROR: "ERROR", checks.WARNING: "WARNING"}.get(message.level, "NOTE")
    where = f" {message.id}" if message.id else " conductor"
    hint = f"\n    {message.hint}" if message.hint else ""
    # Celery sets up its logging later, and would have it swallowed by --loglevel.
    sys.stderr.write(f"{name}{where}: {message.msg}{hint}\n")
    sys.stderr.flush()
