"""Which executions are meant: the filters that subcommands share."""

from __future__ import annotations

import argparse
import datetime as dt
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import Q
from django.utils.dateparse import parse_date, parse_datetime

from conductor_app.exceptions import InvalidArgument
from conductor_app.management.subcommands.base import (
    USAGE,
    celery_app,
    load_durable_tasks,
    parse_duration,
    positive_int,
)
from conductor_app.models import Execution, database
from conductor_app.models.execution import ExecutionQuerySet
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.telling.tags import trees_with
from conductor_app.telling.words import clean, exact, short_name
from conductor_app.values.tags import parse_tag

#: Options that say which executions are meant. ``--root-only`` and ``--limit`` only narrow what these choose.
CHOOSING = ("status", "task", "queue", "worker", "since", "until", "key", "unique", "tag", "held")
NARROWING = ("root_only", "limit")
#: The years of an instant that is no slip.
_YEARS = range(1970, 9_999)


def add_filters(parser: CommandParser, *, limit: int) -> None:
    """Declare the filters.

    Args:
        parser: The subcommand's.
        limit: What ``--limit`` is without it.
    """
    parser.add_argument(
        "--status",
        action="append",
        choices=[item.value for item in ExecutionStatus],
        help="only of this status; may be repeated",
    )
    parser.add_argument("--task", type=_text, help="only of this task: its full name, or the last part of it")
    parser.add_argument("--queue", type=_text, help="only in this Celery queue")
    parser.add_argument(
        "--worker",
        type=_text,
        metavar="NODE",
        help="only what this worker runs now: its node name, or the beginning of the lease's owner as JSON has it",
    )
    parser.add_argument(
        "--since",
        type=_moment,
        metavar="WHEN",
        help="only created at this instant or later: in ISO 8601, or a length of time ago such as 15m, 2h, 3d",
    )
    parser.add_argument(
        "--until",
        type=_moment,
        metavar="WHEN",
        help="only created before this instant: in ISO 8601, or a length of time ago such as 15m, 2h, 3d",
    )
    parser.add_argument("--key", type=_text, help="only with this idempotency key")
    parser.add_argument("--unique", type=_text, metavar="KEY", help="only open ones with this unique key")
    parser.add_argument(
        "--tag",
        action="append",
        type=_tag,
        metavar="KEY=VALUE",
        help="only of trees with this tag; may be repeated, then with all of them",
    )
    parser.add_argument("--held", action="store_true", help="only what somebody holds")
    parser.add_argument("--root-only", action="store_true", help="no children")
    parser.add_argument("--limit", type=positive_int, help=f"at most so many (default: {limit})")


def is_chosen(options: dict[str, Any]) -> bool:
    """Tell whether the options say which executions are meant."""
    return any(options[name] for name in CHOOSING)


def given(options: dict[str, Any]) -> list[str]:
    """Return the filters that were given, as the user writes them."""
    return [f"--{name.replace('_', '-')}" for name in (*CHOOSING, *NARROWING) if options[name]]


def chosen(options: dict[str, Any], now: dt.datetime) -> ExecutionQuerySet:
    """Return the executions that the options choose, in no order; no query is made but a short one for each tag.

    Args:
        options: The options of ``add_filters``.
        now: The database's clock.

    Raises:
        CommandError: No execution can be meant.
    """
    rows = Execution.objects.using(database())
    statuses = set(options["status"] or ())
    failed_alone = statuses == {ExecutionStatus.FAILED.value}
    if failed_alone:
        # Each has a row among the failures, which are few beside all executions.
        rows = rows.filter(failure__isnull=False, status=ExecutionStatus.FAILED)
    elif len(statuses) == 1:
        rows = rows.with_status(ExecutionStatus(*statuses))
    elif statuses:
        rows = rows.filter(status__in=sorted(statuses))
    if options["task"]:
        rows = rows.filter(task__in=_task_names(options["task"]))
    if options["queue"]:
        rows = rows.filter(queue=options["queue"])
    if options["worker"]:
        rows = rows.filter(_held_by(options["worker"]))
    since, until = (_instant(options[name], now) for name in ("since", "until"))
    if since is not None and until is not None and since >= until:
        raise CommandError(
            f"Nothing is created since {exact(since)} and until {exact(until)}: --since comes first.", returncode=USAGE
        )
    if since is not None:
        rows = rows.filter(created_at__gte=since)
        if failed_alone:
            # It failed after it was created, and by that instant an index finds it.
            rows = rows.filter(failure__failed_at__gte=since)
    if until is not None:
        rows = rows.filter(created_at__lt=until)
    if options["key"]:
        rows = rows.filter(idempotency_key=options["key"])
    if options["unique"]:
        rows = rows.filter(unique_key=options["unique"])
    for key, value in options["tag"] or ():
        rows = rows.filter(root__in=trees_with(key, value))
    if options["held"]:
        rows = rows.held()
    if options["root_only"]:
        rows = rows.filter(parent__isnull=True)
    return rows


def described(options: dict[str, Any]) -> str:
    """Return `` of status failed, task charge``; empty without a filter."""
    filters = [f"status {' or '.join(options['status'])}"] if options["status"] else []
    filters += [
        f"{name} {clean(options[name])}" for name in ("task", "queue", "worker", "key", "unique") if options[name]
    ]
    filters += [f"tag {clean(key)}={clean(value)}" for key, value in options["tag"] or ()]
    words = [f" of {', '.join(filters)}"] if filters else []
    words += [" that are held"] if options["held"] else []
    words += [f" created {name} {_shown(options[name])}" for name in ("since", "until") if options[name]]
    return "".join(words)


def _held_by(worker: str) -> Q:
    """Return the condition that a worker holds the lease: an owner is ``<node name>/<token>/<process id>``."""
    # Not every node that begins so: `celery@web1` is not `celery@web10`.
    return Q(lease_owner__startswith=worker if "/" in worker else f"{worker}/")


def _task_names(wanted: str) -> list[str]:
    """Return the full names that the user may mean; the name itself if no such task is known (any more)."""
    names = load_durable_tasks(celery_app())
    return [wanted, *(name for name in names if name != wanted and short_name(name) == wanted)]


# -------------------------------------------------------------------------------------------------- values of options


def _text(text: str) -> str:
    """Return a text that is not empty; for argparse."""
    # `cancel --queue "$QUEUE"` without that variable is not meant for all queues.
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    # A shell may hand over bytes that are no text, and databases take no null.
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("it has characters that no database takes")
    return text


def _tag(text: str) -> tuple[str, str]:
    """Return a key and a value; for argparse."""
    try:
        return parse_tag(_text(text))
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _moment(text: str) -> dt.datetime | dt.timedelta:
    """Return an instant, or how long ago it was; for argparse."""
    try:
        day = parse_date(text)
        found = parse_datetime(text) if day is None else dt.datetime.combine(day, dt.time())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no instant: {error}") from None
    if found is not None:
        if found.year not in _YEARS:
            raise argparse.ArgumentTypeError(f"{text!r} is before {_YEARS[0]} or after {_YEARS[-1]}")
        return clock.aware(found)
    try:
        return parse_duration(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither an instant such as 2026-11-22T20:33 nor a length of time such as 15m, 2h or 3d"
        ) from None


def _instant(moment: dt.datetime | dt.timedelta | None, now: dt.datetime) -> dt.datetime | None:
    return now - moment if isinstance(moment, dt.timedelta) else moment


def _shown(moment: dt.datetime | dt.timedelta) -> str:
    if isinstance(moment, dt.timedelta):
        seconds = moment.total_seconds()
        unit, size = next((unit, size) for unit, size in _SIZES if seconds >= size or size == 1)
        return f"{seconds / size:g}{unit} ago"
    return exact(moment)


_SIZES = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
