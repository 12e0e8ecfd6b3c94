"""``manage.py conductor``: look at durable executions and act on them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error as AnyDatabaseError
from django.db import InterfaceError, OperationalError

from conductor_app.checks import schema
from conductor_app.management.output import Output
from conductor_app.management.subcommands.actions import Cancel, Fork, Hold, Publish, Release, Rerun, Retry, Wake
from conductor_app.management.subcommands.alive import Alive
from conductor_app.management.subcommands.base import OK, PROBLEM, USAGE, Subcommand
from conductor_app.management.subcommands.doctor import Doctor
from conductor_app.management.subcommands.limits import Limits
from conductor_app.management.subcommands.ls import Ls
from conductor_app.management.subcommands.operations import Operations
from conductor_app.management.subcommands.pausing import Pause, Unpause
from conductor_app.management.subcommands.prune import Prune
from conductor_app.management.subcommands.schedules import Schedules
from conductor_app.management.subcommands.send import Send
from conductor_app.management.subcommands.show import Show
from conductor_app.management.subcommands.sweep import Sweep
from conductor_app.management.subcommands.workers import Workers
from conductor_app.models import database
from conductor_app.store import eager
from conductor_app.telling.words import clean

SUBCOMMANDS: tuple[Subcommand, ...] = (
    Doctor(),
    Alive(),
    Ls(),
    Show(),
    Workers(),
    Limits(),
    Retry(),
    Rerun(),
    Fork(),
    Cancel(),
    Send(),
    Wake(),
    Publish(),
    Hold(),
    Release(),
    Pause(),
    Unpause(),
    Operations(),
    Schedules(),
    Sweep(),
    Prune(),
)


class Command(BaseCommand):
    """One command with a subcommand for each thing that an operator does.

    Exit codes: 0 if it was done, 1 if something is wrong, refused or not found, 2 for a wrong call.
    """

    help = "Look at durable executions and act on them."
    # Not before a command whose purpose is to tell what is wrong; `doctor` runs those of conductor_app.
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the subcommands."""
        subparsers = parser.add_subparsers(dest="subcommand", metavar="subcommand", required=True)
        for subcommand in SUBCOMMANDS:
            subparser = subparsers.add_parser(subcommand.name, help=subcommand.help, description=subcommand.help)
            subparser.add_argument("--json", action="store_true", help="write one JSON document")
            subcommand.add_arguments(subparser)
            _accept_common_options(subparser)
            subparser.set_defaults(run=subcommand)

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the subcommand, and turn what goes wrong into one line and an exit code."""
        del args
        colour = True if options["force_color"] else False if options["no_color"] else None
        as_json, is_quiet = options["json"], options.get("quiet", False)
        out = Output(self.stdout, stderr=self.stderr, as_json=as_json, is_quiet=is_quiet, colour=colour)
        try:
            if as_json and is_quiet:
                raise CommandError("Give --json or --quiet, not both.", returncode=USAGE)
            with eager.outside():
                code = options["run"].run(out, options)
        except (CommandError, AnyDatabaseError, ImproperlyConfigured) as error:
            refusal = error if isinstance(error, CommandError) else CommandError(_explain(error))
            out.document({"error": str(refusal)})
            if options["traceback"]:
                raise
            raise refusal from error
        except BrokenPipeError:
            _close_broken_pipe()
            code = PROBLEM
        if code != OK:
            sys.exit(code)


def _accept_common_options(parser: CommandParser) -> None:
    """Take Django's own options also after the subcommand: ``conductor ls --settings=…``."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name in ("--settings", "--pythonpath"):
        parser.add_argument(name, **hidden)
    for name in ("--traceback", "--no-color", "--force-color"):
        parser.add_argument(name, action="store_true", **hidden)
    parser.add_argument("-v", "--verbosity", type=int, choices=[0, 1, 2, 3], **hidden)


def _close_broken_pipe() -> None:
    """Let ``| head`` end without a traceback: Python would flush stdout once more at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> str:
    """Return one line for an error of the database or the settings."""
    if isinstance(error, ImproperlyConfigured):
        return clean(str(error))
    using = database()
    with contextlib.suppress(AnyDatabaseError):
        if schema.missing_tables(using):
            message = schema.tables_missing(using)
            return f"{message.msg} {message.hint}"
    reason = str(error).strip() or type(error).__name__
    what = "does not answer" if isinstance(error, (OperationalError, InterfaceError)) else "refused"
    return f'Database "{using}" {what}: {clean(reason.splitlines()[0])}'
