"""Run what is due in this process, and move the clock. No broker, no worker, no threads."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import PurePath

from celery import Celery
from celery.app import app_or_default
from django.db import connections
from django.db.backends.base.creation import TEST_DATABASE_PREFIX
from django.test.utils import _TestState

from conductor_app.exceptions import NotATestDatabase
from conductor_app.host import inline
from conductor_app.models import Execution, database
from conductor_app.store import clock, eager
from conductor_app.transitions import dispatch
from conductor_app.values.arguments import check_duration

logger = logging.getLogger("conductor_app.testing")

#: More runs than this in one call are taken for a loop.
MAX_RUNS = 10_000


def drain(app: Celery | None = None, *, max_runs: int = MAX_RUNS, any_database: bool = False) -> int:
    """Run all that is due, with all that follows from it, until nothing is.

    Due times are respected: what sleeps, waits for its retry or its countdown stays where it is (see ``advance``). So
    are holds and pauses: what is held, or of a paused task, is not run, and a line of the log says how many there are.

    Args:
        app: The Celery app whose tasks are run; the current one by default.
        max_runs: More runs than this are taken for a loop.
        any_database: Also on a database that no test runner has made. All that is due there is then run here, whoever
            has started it.

    Returns:
        How many runs there were; a suspended execution takes several.

    Raises:
        NotATestDatabase: Nothing is done; see ``any_database``.
        RuntimeError: There were ``max_runs`` runs, and more is due.
        UnknownTask: The task of an execution that is due is not registered.
    """
    if not any_database:
        _check_database()
    with eager.outside(), dispatch.inline():
        runs = inline.run_until_idle(app_or_default(app), max_runs=max_runs)
        _tell_of_held()
    return runs


def _tell_of_held() -> None:
    executions = Execution.objects.using(database()).order_by()
    held, paused = executions.held().count(), executions.of_paused_tasks().count()
    if held or paused:
        logger.warning("Not run: %d executions are held, and %d are of paused tasks.", held, paused)


def advance(
    seconds: float | dt.timedelta, app: Celery | None = None, *, max_runs: int = MAX_RUNS, any_database: bool = False
) -> int:
    """Let ``seconds`` pass on ``conductor_app``'s clock, and run all that becomes due, in the order of its instants.

    A timeout after 30 s is decided after a child's retry at 10 s has run, as it would be in production. Only
    ``conductor_app``'s clock moves, in this process; the fixture and the mixin set it right when the test ends.

    Args:
        seconds: How long, in seconds or as a ``timedelta``.
        app: The Celery app whose tasks are run; the current one by default.
        max_runs: More runs than this are taken for a loop.
        any_database: Also on a database that no test runner has made; see ``drain``. What others have timed there is
            then decided by this process's clock.

    Returns:
        How many runs there were.

    Raises:
        NotATestDatabase: Nothing is done; see ``any_database``.
        InvalidArgument, InvalidArgumentType: ``seconds`` is negative, too large, or no duration.
        RuntimeError: There were ``max_runs`` runs, and more is due.
        UnknownTask: The task of an execution that is due is not registered.
    """
    duration = dt.timedelta(seconds=check_duration(seconds, "seconds of advance()"))
    runs = drain(app, max_runs=max_runs, any_database=any_database)
    with eager.outside():
        now = clock.read(database())
        end = now + duration
        while (instant := inline.next_instant(after=now)) is not None and instant <= end:
            clock.shift(inline.time_until(instant))
            now = clock.read(database())
            runs += drain(app, max_runs=max_runs - runs, any_database=True)
        clock.shift(inline.time_until(end))
    return runs + drain(app, max_runs=max_runs - runs, any_database=True)


def _check_database() -> None:
    if not _is_test_database():
        raise NotATestDatabase(
            f'Database "{database()}" ({connections[database()].settings_dict["NAME"]}) was made by no test runner, '
            "and drain() and advance() decide and run whatever is due in a database, whoever has started it. Use them "
            "in a test, or .apply() to run one tree here. If it is for tests all the same, pass any_database=True."
        )


def _is_test_database() -> bool:
    """Tell whether a test runner has made the database, by the names that Django and pytest-django give."""
    settings = connections[database()].settings_dict
    name, chosen = str(settings["NAME"]), settings["TEST"]["NAME"]
    if name == ":memory:" or "mode=memory" in name:
        return True  # nobody else sees it
    if not hasattr(_TestState, "saved_data"):
        return False
    # Copies for parallel processes have a suffix.
    is_chosen = bool(chosen) and name.startswith(str(PurePath(chosen).with_suffix("")))
    return is_chosen or PurePath(name).name.startswith(TEST_DATABASE_PREFIX)
