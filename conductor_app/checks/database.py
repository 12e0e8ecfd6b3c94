"""The connections to the database, and how its server sets up sessions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Tags
from django.db import Error as AnyDatabaseError
from django.db import connections

from conductor_app.checks import subject
from conductor_app.models import database

#: What SQLite needs for several processes that write at the same time, as it stands among its ``OPTIONS``.
SQLITE_OPTIONS = (
    '"transaction_mode": "IMMEDIATE", "timeout": 20, "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL"'
)
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


@checks.register(subject.TAG)
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


@checks.register(subject.TAG, deploy=True)
def check_connection_pool(**_kwargs: Any) -> list[CheckMessage]:
    """W024: a connection pool that each prefork process would rebuild for each task."""
    if subject.pool(subject.app()) != "prefork":
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


@checks.register(subject.TAG, deploy=True)
def check_pool_size(**_kwargs: Any) -> list[CheckMessage]:
    """W031: a connection pool that is smaller than the worker's pool of threads. Only a worker knows how many."""
    concurrency = subject.worker_concurrency.get()
    if subject.pool(subject.app()) != "threads" or concurrency is None:
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


@checks.register(subject.TAG, deploy=True)
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


@checks.register(subject.TAG)
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


@checks.register(subject.TAG)
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
