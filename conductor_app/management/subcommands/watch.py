"""``--watch``: draw an answer again and again, until it is final or Ctrl+C."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.core.management.base import CommandError
from django.db import InterfaceError, OperationalError, connections
from rich.console import RenderableType

from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands.base import OK, USAGE
from conductor_app.management.subcommands.findings import line
from conductor_app.models import database
from conductor_app.telling.words import exact

#: Seconds between two looks, unless the call says another number.
SECONDS = 2.0
HELP = f"draw it again every so many seconds (default: {SECONDS:g}) until Ctrl+C"


@dataclass(frozen=True)
class View:
    """An answer as it stands at one instant."""

    drawn: Sequence[RenderableType]
    #: The database's clock.
    now: dt.datetime
    #: Whether it will not change any more.
    is_final: bool = False


def refuse_for_programs(options: dict[str, Any]) -> None:
    """Refuse ``--watch`` where whoever reads wants one answer.

    Raises:
        CommandError: It is combined with such an option.
    """
    for name in ("json", "quiet"):
        if options.get(name):
            raise CommandError(
                f"--watch draws for people; --{name} gives one answer. Leave one of them out.", returncode=USAGE
            )


def watch(out: Output, seconds: float, look: Callable[[], View]) -> int:
    """Draw what ``look`` sees, every so many seconds, and return the exit code.

    An outage of the database is told, and the next look is made all the same; only the first one has to succeed.
    """
    last = None
    try:
        while True:
            try:
                last = view = look()
            except (OperationalError, InterfaceError) as error:
                if last is None:
                    raise
                text = f'Database "{database()}" does not answer: {line(error)}. Looking again.'
                view = View([plain(text, STYLES["FAIL"])], last.now)
            title = f"Every {seconds:g} s until Ctrl+C: {exact(view.now)}"
            out.draw_again(title, view.drawn, is_final=view.is_final)
            if view.is_final:
                return OK
            _close_if_unusable()
            time.sleep(seconds)
    except KeyboardInterrupt:
        return OK


def _close_if_unusable() -> None:
    """Let a connection that has died, or is too old, be replaced by the next look, as between two requests."""
    connection = connections[database()]
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()
