"""Names of steps and events, and keys that a caller has chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from celery import Task
from celery.canvas import Signature
from celery.local import Proxy

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.values.payloads import digest
from conductor_app.values.texts import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")
_NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.:-]*"
NAME_LENGTH = 128


def step_name(step: object, call: str = "") -> str:
    """Return the name of a step, which comes first in ``call``."""
    if call and not isinstance(step, str):
        _check_not_forgotten(step, call)
    return check_name(step, "step name")


def _check_not_forgotten(step: object, call: str) -> None:
    """Refuse what comes second, a task or a function, in the place of a step's name.

    Raises:
        InvalidArgumentType: It is such a thing.
    """
    if issubclass(type(step), Proxy):
        step = cast(Any, step)._get_current_object()
    if isinstance(step, (Task, Signature)):
        what, name = f"the task {step.name}", str(step.name).rpartition(".")[2]
    elif callable(step):
        name = getattr(step, "__name__", "")
        what = f"{type(step).__name__} {getattr(step, '__qualname__', None) or shown(step)}"
    else:
        return
    name = name if name.isidentifier() else "…"
    raise InvalidArgumentType(
        f'step name must be str, got {what}. The step\'s name comes first: ctx.{call}("name", {name}, …)'
    )


def check_name(name: object, what: str) -> str:
    """Return the name of a step or an event.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is empty, too long, or has other characters than ASCII letters, digits and ``_ . : -``.
    """
    if type(name) is str and _NAME.match(name):
        return name
    if not isinstance(name, str):
        raise InvalidArgumentType(f"{what} must be str, got {type(name).__name__}")
    if not name:
        raise InvalidArgument(f"{what} must be 1–{NAME_LENGTH} characters")
    if len(name) > NAME_LENGTH:
        raise InvalidArgument(f"{what} must be 1–{NAME_LENGTH} characters: {len(name)} > {NAME_LENGTH}")
    if not _NAME.match(name):
        raise InvalidArgument(f"{what} {name!r} must match {_NAME_PATTERN}: ASCII letters, digits and _ . : -")
    return str.__str__(name)  # a member of an Enum is written by its value


def check_recorded_name(name: object, what: str) -> str:
    """Return what may be the name of a step that is recorded: one of the user's, or of a ``ctx.gather``.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is empty.
    """
    if not isinstance(name, str):
        raise InvalidArgumentType(f"{what} must be str, the name of a step, got {type(name).__name__}")
    if not name:
        raise InvalidArgument(f"{what} must be the name of a step, got an empty text")
    return str.__str__(name)


def check_key(key: object, name: str) -> str:
    """Return a key that the caller has chosen.

    Raises:
        InvalidArgumentType: It is no text.
        InvalidArgument: It is empty, longer than 255 characters, or would not be the same on every database.
    """
    if not isinstance(key, str):
        raise InvalidArgumentType(f"{name} must be str, got {type(key).__name__}")
    if not 1 <= len(key) <= 255:
        raise InvalidArgument(f"{name} must have 1–255 characters, got {len(key)}")
    # MySQL ignores spaces at the end when it compares, so two keys would be one there, and only there.
    if key != key.strip() or not key.isprintable():
        raise InvalidArgument(f"{name} must be printable text without spaces at its ends, got {key!r}. Strip it.")
    return str.__str__(key)


def gather_name(members: Sequence[str], *, return_exceptions: bool, need: int | None = None) -> str:
    """Return the name under which a gather is remembered; no step of the user's can have it."""
    more = ",return_exceptions" if return_exceptions else "" if need is None else f",need={need}"
    return _shortened(f"gather({','.join(members)}{more})")


def batch_name(step: str, number: int) -> str:
    """Return the name of a wait of an ``as_completed``; but for the first, no step of the user's has it."""
    return step if number == 1 else _shortened(f"{step}#{number}")


def peek_name(step: str, number: int) -> str:
    """Return the name under which a look at a handle is remembered; no step of the user's can have it."""
    return _shortened(f"peek({step}{'' if number == 1 else f',{number}'})")


def _shortened(name: str) -> str:
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[:88]}…{digest(name)})"
