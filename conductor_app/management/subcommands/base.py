"""What the subcommands of ``manage.py conductor`` share."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import uuid
from collections.abc import Iterable
from typing import Any, ClassVar

from celery import Celery, current_app
from django.core.management.base import CommandError, CommandParser

from conductor_app.management.output import Output
from conductor_app.models import Execution, database
from conductor_app.store.ids import range_of
from conductor_app.tasks.task import DurableTask

#: Exit codes.
OK = 0
PROBLEM = 1
USAGE = 2

#: So much of an id is taken for the whole; of those that begin with less there are many.
LEAST_DIGITS = 6
_PREFIX = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},32}}", re.ASCII)
#: Most digits of a number that is given.
_MOST_DIGITS = 9
#: Most ids that are shown of those that begin alike.
_MOST_SHOWN = 5
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smhdw])", re.ASCII)
#: About 100 years: more than this is a slip, and more than databases can subtract.
_LONGEST_SECONDS = 100 * 366 * 86_400


class Subcommand:
    """One subcommand: its options, and what it does."""

    name: ClassVar[str]
    help: ClassVar[str]

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the options; ``--json`` is declared for all."""

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Do it and return the exit code.

        Raises:
            CommandError: It cannot be done; the message is one line.
        """
        raise NotImplementedError


def execution_ids(texts: Iterable[str]) -> list[uuid.UUID]:
    """Return the ids that the user gave, or the beginnings of, each once, in their order.

    Raises:
        CommandError: One is not a UUID, nor the beginning of one alone.
    """
    found: dict[uuid.UUID, None] = {}
    for text in texts:
        try:
            found[uuid.UUID(text)] = None
        except ValueError:
            found[_begun(text)] = None
    return list(found)


def _begun(text: str) -> uuid.UUID:
    """Return the id that begins with what the user gave."""
    prefix = text.replace("-", "").lower()
    if _PREFIX.fullmatch(prefix) is None:
        raise CommandError(
            f"{text!r} is not an execution's id. An id is a UUID; `manage.py conductor ls` shows them. "
            f"Its first {LEAST_DIGITS} digits or more do if no other begins with them.",
            returncode=USAGE,
        )
    first, last = range_of(prefix)
    rows = Execution.objects.using(database()).filter(pk__gte=first, pk__lte=last).order_by("pk")
    keys = list(rows.values_list("pk", flat=True)[: _MOST_SHOWN + 1])
    if len(keys) == 1:
        return keys[0]
    if not keys:
        raise CommandError(f"There is no execution whose id begins with {text}.", returncode=PROBLEM)
    shown = ", ".join(map(str, keys[:_MOST_SHOWN])) + (", …" if len(keys) > _MOST_SHOWN else "")
    raise CommandError(f"More than one execution's id begins with {text}: {shown}. Give more of it.", returncode=USAGE)


def not_found(execution_id: uuid.UUID) -> str:
    """Return what to say of an id that has no execution."""
    return f"There is no execution {execution_id}. It may have been pruned, or belong to another database."


def parse_duration(text: str) -> dt.timedelta:
    """Return the length of time that ``30d``, ``12h``, ``45m``, ``90s`` or ``2w`` means; for argparse."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time: write 30d, 12h, 45m, 90s or 2w")
    seconds = float(match["number"]) * _UNITS[match["unit"]]
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} must be more than 0 and at most 100 years")
    return dt.timedelta(seconds=seconds)


def positive_int(text: str) -> int:
    """Return a whole number of at least 1; for argparse."""
    # Of more digits it is a slip, and more than databases can count.
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1, and at most 9 digits")
    return int(text)


def positive_seconds(text: str) -> float:
    """Return a number of seconds; for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    # A day: longer pauses are a slip, and more than threads can wait.
    if not 0 < seconds <= _UNITS["d"]:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds greater than 0, at most a day")
    return seconds


def accept_quiet(parser: CommandParser) -> None:
    """Declare ``--quiet``."""
    parser.add_argument("-q", "--quiet", action="store_true", help="write ids alone, one a line")


def celery_app() -> Celery:
    """Return the project's Celery app."""
    app: Celery = current_app._get_current_object()  # type: ignore[attr-defined]
    return app


def load_durable_tasks(app: Celery) -> list[str]:
    """Import the modules with the app's tasks, as a worker does, and return the names of the durable ones."""
    app.loader.import_default_modules()
    return sorted(name for name, task in app.tasks.items() if isinstance(task, DurableTask))


def counted(number: int, noun: str) -> str:
    """Return ``1 execution``, ``2 executions``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def json_value(text: str) -> Any:
    """Return a value given as JSON; for argparse."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); a text needs its quotes: '\"yes\"'"
        ) from None
