"""``conductor alive``: a light look for probes, at the database alone."""

from __future__ import annotations

import time
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser
from django.db import Error as AnyDatabaseError
from django.db import connections
from rich.text import Text

from conductor_app.checks import schema
from conductor_app.management.output import Output
from conductor_app.management.subcommands.base import OK, Subcommand, positive_seconds
from conductor_app.management.subcommands.bounded import within
from conductor_app.management.subcommands.findings import line
from conductor_app.models import database

#: Seconds that the database has to answer, unless the call says another number.
TIMEOUT = 1.0


class Alive(Subcommand):
    """Looks whether the database answers and has the tables. No task is imported, and no broker asked."""

    name = "alive"
    help = "Tell whether the database answers and all migrations are applied; light, for probes."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare how long it may take."""
        parser.add_argument(
            "--timeout",
            type=positive_seconds,
            default=TIMEOUT,
            metavar="SECONDS",
            help=f"how long the database has to answer (default: {TIMEOUT:g})",
        )

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Look, and be done after the time-out, however silent the database is."""
        using, seconds = database(), options["timeout"]
        started = time.monotonic()
        try:
            problem = within(seconds, lambda: _problem(using))
        except TimeoutError:
            raise CommandError(f'Database "{using}" did not answer within {seconds:g} s.') from None
        except (AnyDatabaseError, ImproperlyConfigured) as error:
            raise CommandError(f'Database "{using}" does not answer: {line(error)}') from error
        if problem:
            raise CommandError(problem)
        took = time.monotonic() - started
        out.document({"ok": True, "database": using, "seconds": round(took, 3)})
        out.print(Text(f'Alive: database "{using}" answered in {took * 1_000:.0f} ms, all migrations are applied.'))
        return OK


def _problem(using: str) -> str:
    """Return what is wrong with the tables. Its thread has a connection of its own, which is closed."""
    try:
        if schema.missing_tables(using):
            message = schema.tables_missing(using)
            return f"{message.msg} {message.hint}"
        unapplied = schema.unapplied_migrations(using)
        if unapplied:
            return (
                f'Migrations of conductor_app are not applied to database "{using}": {", ".join(unapplied)}. '
                "Run: python manage.py migrate conductor_app"
            )
        return ""
    finally:
        connections.close_all()
