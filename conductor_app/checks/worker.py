"""A worker's start, which writes to stderr what all checks say."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage
from django.db import connections

from conductor_app.checks import schema, subject
from conductor_app.checks.database import session_warnings
from conductor_app.models import database

logger = logging.getLogger("conductor_app.worker")
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
    token = subject.worker_pool.set(
        _name_pool(options.get("pool_cls") or options.get("pool") or subject.app().conf.worker_pool)
    )
    concurrency = options.get("concurrency") or subject.app().conf.worker_concurrency or os.cpu_count()
    size = subject.worker_concurrency.set(int(concurrency) if concurrency else None)
    try:
        for message in _messages_for_worker():
            _write(message)
    except Exception as error:  # noqa: BLE001 - a check that breaks must not keep a worker from starting
        logger.warning("The checks of conductor_app failed: %s: %s", type(error).__name__, error)
    finally:
        subject.worker_concurrency.reset(size)
        subject.worker_pool.reset(token)


def _messages_for_worker() -> Iterator[CheckMessage]:
    messages = checks.run_checks(tags=[subject.TAG], include_deployment_checks=True)
    yield from sorted(messages, key=lambda message: (-message.level, str(message.id), message.msg))
    yield from _ask_database()


def _ask_database() -> Iterable[CheckMessage]:
    """Look for the tables, in a thread: a database that does not answer must not hold up the worker."""
    using = database()
    found: list[CheckMessage] = []

    def look() -> None:
        try:
            if schema.missing_tables(using):
                found.append(schema.tables_missing(using))
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
