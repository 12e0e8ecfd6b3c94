"""Run what is due in this process, and move the clock. No broker, no worker, no threads."""

from __future__ import annotations

import datetime as dt

from celery import Celery
from celery.app import app_or_default

from conductor_app import clock, dispatch, inline
from conductor_app.arguments import check_duration
from conductor_app.models import database

#: More runs than this in one call are taken for a loop.
MAX_RUNS = 10_000


def drain(app: Celery | None = None, *, max_runs: int = MAX_RUNS) -> int:
    """Run all that is due, with all that follows from it, until nothing is.

    Due times are respected: what sleeps, waits for its retry or its countdown stays where it is (see ``advance``).

    Args:
        app: The Celery app whose tasks are run; the current one by default.
        max_runs: More runs than this are taken for a loop.

    Returns:
        How many runs there were; a suspended execution takes several.

    Raises:
        RuntimeError: There were ``max_runs`` runs, and more is due.
        UnknownTask: The task of an execution that is due is not registered.
    """
    with dispatch.inline():
        return inline.run_until_idle(app_or_default(app), max_runs=max_runs)


def advance(seconds: float | dt.timedelta, app: Celery | None = None, *, max_runs: int = MAX_RUNS) -> int:
    """Let ``seconds`` pass on ``conductor_app``'s clock, and run all that becomes due, in the order of its instants.

    A timeout after 30 s is decided after a child's retry at 10 s has run, as it would be in production. Only
    ``conductor_app``'s clock moves, in this process; the fixture and the mixin set it right when the test ends.

    Args:
        seconds: How long, in seconds or as a ``timedelta``.
        app: The Celery app whose tasks are run; the current one by default.
        max_runs: More runs than this are taken for a loop.

    Returns:
        How many runs there were.

    Raises:
        InvalidArgument, InvalidArgumentType: ``seconds`` is negative, too large, or no duration.
        RuntimeError: There were ``max_runs`` runs, and more is due.
        UnknownTask: The task of an execution that is due is not registered.
    """
    duration = dt.timedelta(seconds=check_duration(seconds, "seconds of advance()"))
    runs = drain(app, max_runs=max_runs)
    now = clock.read(database())
    end = now + duration
    while (instant := inline.next_instant(after=now)) is not None and instant <= end:
        inline.move_clock_to(instant)
        now = clock.read(database())
        runs += drain(app, max_runs=max_runs - runs)
    inline.move_clock_to(end)
    return runs + drain(app, max_runs=max_runs - runs)
