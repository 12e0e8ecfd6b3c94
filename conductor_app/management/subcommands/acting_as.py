"""``--as`` and ``--reason``: for whom a command acts, and why."""

from __future__ import annotations

import getpass
import os
from typing import Any

from django.core.management.base import CommandError, CommandParser

from conductor_app.exceptions import ConductorError
from conductor_app.management.subcommands.base import USAGE
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.states import OperationSource
from conductor_app.transitions.operating import By, check_actor


def accept_actor(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--as",
        dest="actor",
        metavar="NAME",
        help="who asks for it, kept and shown in the history (default: the user of the operating system)",
    )
    parser.add_argument("--reason", default="", help="why, kept and shown in the history")


def must_have_reason(options: dict[str, Any]) -> None:
    """Refuse a call that does not say why.

    Raises:
        CommandError: It does not.
    """
    if not options["reason"].strip():
        raise CommandError("Why? Give --reason; it is shown wherever people look for what stands.", returncode=USAGE)


def by_whom(options: dict[str, Any]) -> By:
    """Return for whom a command acts.

    Raises:
        CommandError: The name cannot be stored.
    """
    name = options["actor"]
    if name is None:
        name = _user()
    try:
        check_actor(name)
    except ConductorError as error:
        raise CommandError(f"argument --as: {error}", returncode=USAGE) from None
    return By(name, options["reason"], OperationSource.COMMAND)


def _user() -> str:
    """Return the name of the operating system's user; in a container it may be a number alone."""
    try:
        name = getpass.getuser()
    except (ImportError, KeyError, OSError):
        name = f"uid {os.getuid()}" if hasattr(os, "getuid") else ""
    return "".join(character for character in name if character.isprintable())[:ACTOR_LENGTH]
