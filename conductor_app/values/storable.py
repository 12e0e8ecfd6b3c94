"""What can be stored: whatever would not come back as it went in is refused, with the path to it.

Two things are allowed to change, as in all of JSON: a tuple comes back as a list, and an integer key as a string.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import io
import math
import uuid
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from django.db.models import Model, QuerySet
from django.utils.functional import Promise

from conductor_app.exceptions import NotSerializable, PayloadTooLarge
from conductor_app.values.storage_format import ENVELOPE, MAX_INT_BITS, MAX_NESTING, decode_json, encode_json, encoder
from conductor_app.values.texts import shorten, shown
from conductor_app.values.validated import is_model

#: Values larger than this are refused even without a limit of their own, in bytes.
_UNLIMITED = 16 * 1_048_576


class _Refused(Exception):
    """Some part of a value is refused; each level that it passes adds its part of the path."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(before, after)
        self.before = before
        self.after = after
        self.path: list[str] = []


class _OverBudget(Exception):
    """A value is so large that looking at all of it is no use."""


def validate(value: Any, what: str, limit: int | None) -> None:
    """Refuse a value that would not come back as it went in, and one that is far too large."""
    # Encoded text is at least as long as what _check counts, so a value that it gives up on is too large: a string of
    # gigabytes, or a list that holds itself twice at each of 100 levels.
    budget = _UNLIMITED if limit is None else 2 * limit
    try:
        _check(value, 0, budget)
    except _Refused as refused:
        path = what + "".join(reversed(refused.path))
        after = refused.after.replace("Pass", "Return", 1) if what.startswith("result") else refused.after
        raise NotSerializable(f"{refused.before}{shorten(path)}{after}") from None
    except _OverBudget:
        raise PayloadTooLarge(too_large(what, f"more than {budget}", budget if limit is None else limit)) from None


def too_large(what: str, size: str, limit: int) -> str:
    """Return an error's text about a value that is too large."""
    verb = "return" if what.startswith("result") else "pass"
    return (
        f"The encoded {what} is too large: {size} > {limit} bytes. "
        f"Store the data elsewhere and {verb} a reference to it, or raise the limit in CONDUCTOR."
    )


def _check(value: Any, depth: int, left: int) -> int:
    """Refuse what would not come back as it went in, and return how many bytes are left."""
    if value is None or value is True or value is False:
        return left
    if isinstance(value, str):
        left -= len(value)
        if left >= 0:
            _check_str(value)
    elif isinstance(value, int):
        _check_int(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _not_finite(nan=math.isnan(value))
    elif isinstance(value, dict):
        return _check_dict(value, depth, left)
    elif isinstance(value, (list, tuple)):
        return _check_list(value, depth, left)
    elif isinstance(value, decimal.Decimal):
        if not value.is_finite():
            raise _not_finite(nan=value.is_nan())
    elif isinstance(value, bytes):
        left -= len(value)
    elif not isinstance(value, (dt.datetime, dt.date, dt.time, uuid.UUID)):
        return _check_registered(value, depth, left)
    if left < 0:
        raise _OverBudget
    return left


def _check_registered(value: Any, depth: int, left: int) -> int:
    """Refuse a value, unless its type is registered with kombu and it comes back from there as it went in."""
    try:
        envelope = encoder.default(value)
    except Exception:  # noqa: BLE001 - kombu does not know it; or what the project has registered for it fails
        envelope = None
    if not isinstance(envelope, dict) or envelope.keys() != ENVELOPE:
        raise _Refused("", f" is {_article(value)}. {_advice(value)}")
    left = _check(envelope["__value__"], depth + 1, _enter(depth, left))
    try:
        back = decode_json(encode_json(envelope))
        is_same = bool(type(back) is type(value) and back == value)
    except Exception as error:  # noqa: BLE001 - the project's functions may raise anything
        raise _Refused("", f" is {_article(value)}, which cannot be decoded again: {shown(error)}.") from None
    if not is_same:
        raise _Refused(
            "",
            f" is {_article(value)}, which comes back from what is registered for it as {shown(back, 60)}. "
            "Its class needs an __eq__, and the two functions have to fit each other.",
        )
    return left


def _check_str(value: str) -> None:
    if "\x00" in value:
        raise _Refused("", " contains a NUL character, which PostgreSQL cannot store. Pass bytes, or strip it.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Refused(
                "", " contains a lone surrogate, which is not valid Unicode. Pass bytes, or decode it properly."
            ) from None


def _check_int(value: int) -> None:
    if value.bit_length() > MAX_INT_BITS:
        raise _Refused("", " is an integer of more than 4,000 digits. Pass it as a string.")


def _not_finite(*, nan: bool) -> _Refused:
    return _Refused(f"{'NaN' if nan else 'Infinity'} at ", " is not JSON. Pass None or a string.")


def _check_list(value: list[Any] | tuple[Any, ...], depth: int, left: int) -> int:
    left = _enter(depth, left - 2 * len(value))
    index = 0
    try:
        for item in value:
            left = _check(item, depth + 1, left)
            index += 1
    except _Refused as refused:
        refused.path.append(f"[{index}]")
        raise
    return left


def _check_dict(value: dict[Any, Any], depth: int, left: int) -> int:
    left = _enter(depth, left - 2 * len(value))
    if value.keys() == ENVELOPE:
        raise _Refused(
            "",
            ' is a dict with exactly the keys "__type__" and "__value__", which is how typed values are stored. '
            "Rename one of them.",
        )
    key: Any = None
    try:
        for key, item in value.items():  # noqa: B007 - an error's path needs the key that raised it
            left = _check(item, depth + 1, left)
    except _Refused as refused:
        refused.path.append(f'["{shorten(_key_text(key), 40)}"]')
        raise
    return _check_keys(value, left)


def _check_keys(value: dict[Any, Any], left: int) -> int:
    integers = False
    for key in value:
        if isinstance(key, str):
            left -= len(key)
            if left < 0:
                raise _OverBudget
            try:
                _check_str(key)
            except _Refused as refused:
                refused.before = f"The key {shown(key, 40)} of "
                raise
        elif isinstance(key, bool) or not isinstance(key, int):
            raise _Refused("", f" has the key {shown(key, 40)} of type {type(key).__name__}. Keys must be strings.")
        else:
            if key.bit_length() > MAX_INT_BITS:
                raise _Refused("", " has an integer of more than 4,000 digits as a key. Pass it as a string.")
            integers = True
    if integers:
        for key in value:
            if not isinstance(key, str) and int.__repr__(key) in value:
                raise _Refused(
                    "", f" has the key '{int.__repr__(key)}' both as a string and as an integer. Use one of them."
                )
    return left


def _key_text(key: Any) -> str:
    """Return a key as JSON will have it; an Enum's own text is another one."""
    if isinstance(key, str):
        return str.__str__(key)
    return int.__repr__(key) if isinstance(key, int) and key.bit_length() <= MAX_INT_BITS else "…"


def _enter(depth: int, left: int) -> int:
    if depth >= MAX_NESTING:
        raise _Refused("", f" is nested deeper than {MAX_NESTING} levels. Flatten it.")
    if left < 0:
        raise _OverBudget
    return left


def _article(value: Any) -> str:
    if isinstance(value, Model):
        return f"an instance of the model {value.__class__.__name__}"
    if isinstance(value, Promise):
        return "a lazy text"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _advice(value: Any) -> str:
    for kinds, advice in _ADVICE:
        if isinstance(value, kinds):
            return advice
    if isinstance(value, type):
        return "Pass its name."
    if is_model(value):
        return 'Annotate the parameter with its class, or pass .model_dump(mode="json").'
    if dataclasses.is_dataclass(value):
        return "Annotate the parameter with its class, or pass dataclasses.asdict(…)."
    if isinstance(value, Iterable):
        return "Pass a list."
    return "Pass values that JSON knows, or convert it first."


#: What to do about values that are often passed by mistake; the first match counts.
_ADVICE: tuple[tuple[Any, str], ...] = (
    (Model, "Pass its primary key."),
    (QuerySet, "Pass a list of primary keys."),
    (Promise, "Pass str(…) of it: a translation has to be chosen now, not in the worker."),
    ((set, frozenset), "Pass a sorted list."),
    (enum.Enum, "Pass its .value."),
    (dt.timedelta, "Pass .total_seconds()."),
    ((bytearray, memoryview), "Pass bytes(…)."),
    ((BaseException, complex, fractions.Fraction), "Pass str(…)."),
    (Awaitable, "Pass what it returns: asgiref.sync.async_to_sync calls an async function."),
    (io.IOBase, "Pass what you read from it, or its name."),
    (Mapping, "Pass a dict."),
)
