"""``conductor sweep``: what each worker's sweeper does, without a worker."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db import connections
from rich.text import Text

from conductor_app.conf import conductor_settings
from conductor_app.engine import sweeper
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands.base import (
    OK,
    USAGE,
    Subcommand,
    celery_app,
    load_durable_tasks,
    positive_seconds,
)
from conductor_app.transitions import dispatch

_DONE = {
    "lapsed_leases": "executions taken from dead workers",
    "overdue_steps": "timeouts and sleeps ended",
    "expired": "executions that expired before they started",
    "deadlines": "trees to be cancelled, past their deadline",
    "operations": "executions of operations decided",
    "schedules": "schedules that have started their tasks",
    "cancelled": "executions cancelled as requested",
    "unparked": "executions given back that were parked for nothing",
    "stranded": "executions woken that waited for nothing",
    "announced": "outcomes told to Celery",
    "published": "messages published",
}


class Sweep(Subcommand):
    """Sweeps once, or until it is stopped."""

    name = "sweep"
    help = (
        "Do once (or with --loop until stopped) what each worker's sweeper does: timeouts, lost messages and workers."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the loop."""
        parser.add_argument("--loop", action="store_true", help="go on until SIGINT or SIGTERM")
        parser.add_argument(
            "--interval",
            type=positive_seconds,
            help='seconds between two sweeps of --loop (default: CONDUCTOR["SWEEP_SECONDS"])',
        )

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Sweep."""
        if options["interval"] is not None and not options["loop"]:
            raise CommandError(
                "--interval is the pause of --loop. Add --loop, or leave --interval out.", returncode=USAGE
            )
        app = celery_app()
        publish = not dispatch.is_embedded(app)
        try:
            load_durable_tasks(app)
        except Exception as error:  # noqa: BLE001 - the project's own modules are imported
            out.note(f"Schedules are left alone: loading the tasks failed: {type(error).__name__}: {error}")
        if not options["loop"]:
            found = sweeper.sweep(audit=True, publish=publish)
            out.document({"sweeps": 1, "done": dict(found), "published": publish})
            out.print(_told(found))
            if not publish:
                out.print(Text("Nothing is published with the memory:// broker: workers ask the database.", "dim"))
            return OK
        interval = options["interval"] or conductor_settings().SWEEP_SECONDS
        with _stop_requested() as stop:
            sweeps, total = _loop(out, stop, interval, publish=publish)
        out.document({"sweeps": sweeps, "done": dict(total), "published": publish})
        out.print(Text(f"Stopped after {sweeps:,} sweep{'' if sweeps == 1 else 's'}."))
        return OK


def _loop(out: Output, stop: threading.Event, interval: float, *, publish: bool) -> tuple[int, Counter[str]]:
    settings = conductor_settings()
    out.print(Text(f"Sweeping every {interval:g} s; Ctrl-C stops."))
    total: Counter[str] = Counter()
    sweeps = 0
    problem = ""
    first = None
    next_audit = time.monotonic()
    while not stop.is_set():
        now = time.monotonic()
        # As in a worker: after an outage of the database live workers get half a lease to renew theirs.
        reclaim = first is not None and sweeps >= 2 and now - first >= settings.LEASE_SECONDS / 2
        try:
            found = sweeper.sweep(reclaim=reclaim, audit=now >= next_audit, publish=publish)
        except Exception as error:  # noqa: BLE001 - the loop must outlive any outage
            if str(error) != problem:
                problem = str(error)
                out.print(plain(f"Sweeping failed ({type(error).__name__}: {error}); trying again.", STYLES["FAIL"]))
            connections.close_all()
        else:
            problem = ""
            sweeps += 1
            first = now if first is None else first
            total += found
            if now >= next_audit:
                next_audit = now + settings.AUDIT_SECONDS
            if found:
                out.print(_told(found))
        stop.wait(interval)
    return sweeps, total


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Set an event at SIGINT and SIGTERM, so that the sweep at hand is finished."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(found: Counter[str]) -> Text:
    if not found:
        return Text("Swept. Nothing was due.")
    told = "; ".join(f"{_DONE.get(what, what)}: {count:,}" for what, count in found.items())
    return plain(f"Swept. {told[0].upper()}{told[1:]}.")
