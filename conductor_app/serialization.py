"""Payloads, results and failures to stored text and back.

The format is the one Celery itself uses for messages (JSON with kombu's types: datetime, date, time, Decimal, UUID,
bytes), with one rule more: what would not come back as it went in is refused, with the path to it. Two things are
allowed to change, as in all of JSON: a tuple comes back as a list, and an integer key as a string.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import json
import math
import sys
import traceback as traceback_module
import uuid
from collections.abc import Mapping
from typing import Any

from django.db.models import Model, QuerySet
from kombu.utils.json import JSONEncoder
from kombu.utils.json import loads as kombu_loads

from conductor_app.exceptions import Failure, NotSerializable, PayloadTooLarge, StepFailed

MAX_NESTING = 100
#: Python refuses to parse longer integers (``sys.int_info.default_max_str_digits``).
MAX_INT_BITS = 14_000
_ENVELOPE = {"__type__", "__value__"}
_encode_json = JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def dumps(value: Any, what: str, limit: int | None = None) -> str:
    """Return ``value`` as stored text.

    Args:
        value: JSON, with kombu's types.
        what: How the value is called in an error, for example ``payload``.
        limit: Most bytes of the text; ``None`` for no limit.

    Raises:
        NotSerializable: Some part would not come back as it went in; the message has the path to it.
        PayloadTooLarge: The text is longer than ``limit``.
    """
    _validate(value, what, 0)
    text = _encode_json(value)
    # JSON is ASCII here (``ensure_ascii``), so characters are bytes.
    if limit is not None and len(text) > limit:
        raise PayloadTooLarge(
            f"The encoded {what} is too large: {len(text)} > {limit} bytes. "
            f"Store the data elsewhere and pass a reference to it, or raise the limit in CONDUCTOR."
        )
    return text


def loads(text: str | None) -> Any:
    """Return the value that ``dumps`` stored; ``None`` or an empty text is ``None``."""
    return kombu_loads(text) if text else None


def round_trip(value: Any, what: str, limit: int | None = None) -> tuple[str, Any]:
    """Return the stored text and what a replay will read from it."""
    text = dumps(value, what, limit)
    return text, loads(text)


def digest(text: str) -> str:
    """Return 32 hexadecimal digits that tell one stored text from another."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def clean_text(text: str, limit: int) -> str:
    """Return ``text`` in a form that every database stores: without NUL and lone surrogates, cut to ``limit`` bytes."""
    text = text.replace("\x00", "\\x00")
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) > limit:
        raw = raw[: max(limit - 3, 0)] + b"..."
    return raw.decode("utf-8", "ignore")


# --------------------------------------------------------------------------------------------------------- validation


def _validate(value: Any, path: str, depth: int) -> None:
    kind = type(value)
    if value is None or kind is bool or kind is float and math.isfinite(value):
        return
    if depth > MAX_NESTING:
        raise NotSerializable(f"{_shorten(path)} is nested deeper than {MAX_NESTING} levels. Flatten it.")
    if isinstance(value, str):
        _validate_str(value, path)
    elif isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise NotSerializable(f"{path} is an integer of more than 4,000 digits. Pass it as a string.")
    elif isinstance(value, float):
        _refuse_unless_finite(value, path)
    elif isinstance(value, dict):
        _validate_dict(value, path, depth)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _validate(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, decimal.Decimal):
        _refuse_unless_finite(value, path)
    elif not isinstance(value, (dt.datetime, dt.date, dt.time, uuid.UUID, bytes)):
        raise NotSerializable(f"{path} is {_article(value)}. {_advice(value)}")


def _validate_str(value: str, path: str) -> None:
    if "\x00" in value:
        raise NotSerializable(f"{path} contains a NUL character, which PostgreSQL cannot store. Pass bytes, or strip it.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise NotSerializable(
                f"{path} contains a lone surrogate, which is not valid Unicode. Pass bytes, or decode it properly."
            ) from None


def _refuse_unless_finite(value: float | decimal.Decimal, path: str) -> None:
    if not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity"
        raise NotSerializable(f"{name} at {path} is not JSON. Pass None or a string.")


def _validate_dict(value: dict[Any, Any], path: str, depth: int) -> None:
    if value.keys() == _ENVELOPE:
        raise NotSerializable(
            f'{path} is a dict with exactly the keys "__type__" and "__value__", which is how typed values are stored. '
            "Rename one of them."
        )
    keys: set[str] = set()
    for key, item in value.items():
        if isinstance(key, str):
            _validate_str(key, f"{path} key {key!r}")
        elif isinstance(key, bool) or not isinstance(key, int):
            raise NotSerializable(f"{path} has the key {key!r} of type {type(key).__name__}. Keys must be strings.")
        if str(key) in keys:
            raise NotSerializable(f"{path} has the key {str(key)!r} both as a string and as an integer. Use one of them.")
        keys.add(str(key))
        _validate(item, f'{path}["{key}"]', depth + 1)


def _shorten(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:60]}…"


def _article(value: Any) -> str:
    if isinstance(value, Model):
        return f"an instance of the model {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _advice(value: Any) -> str:
    if isinstance(value, Model):
        return "Pass its primary key."
    if isinstance(value, QuerySet):
        return "Pass a list of primary keys."
    if isinstance(value, (set, frozenset)):
        return "Pass a sorted list."
    if isinstance(value, enum.Enum):
        return "Pass its .value."
    if isinstance(value, dt.timedelta):
        return "Pass .total_seconds()."
    if dataclasses.is_dataclass(value):
        return "Pass dataclasses.asdict(…)."
    if isinstance(value, Mapping):
        return "Pass a dict."
    if callable(getattr(value, "__next__", None)):
        return "Pass a list."
    return "Pass values that JSON knows, or convert it first."


# ----------------------------------------------------------------------------------------------------------- failures


def describe(exc: BaseException, limit: int) -> Failure:
    """Return ``exc`` as storable text: class, message, traceback without the values of local variables."""
    cls = type(exc)
    message = str(exc) or cls.__name__
    trace = "".join(traceback_module.format_exception(cls, exc, _user_traceback(exc)))
    args, attributes = _storable_parts(exc)
    return Failure(
        type=f"{cls.__module__}.{cls.__qualname__}",
        message=clean_text(message, limit),
        traceback=clean_text(trace, limit),
        args=args,
        attributes=attributes,
    )


def _user_traceback(exc: BaseException) -> Any:
    """Skip the frames of this package and of Celery that stand above the user's body."""
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not module.startswith(("conductor_app.", "celery.")):
            break
        trace = trace.tb_next
    return trace


def _storable_parts(exc: BaseException) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    def storable(value: Any) -> bool:
        try:
            return len(dumps(value, "value")) <= 4_096
        except NotSerializable:
            return False

    args = tuple(exc.args) if storable(list(exc.args)) else None
    attributes = {
        name: value for name, value in vars(exc).items() if not name.startswith("_") and storable(value)
    }
    return args, attributes


def dump_failure(failure: Failure) -> str:
    """Return a failure as stored text, without its traceback."""
    stored: dict[str, Any] = {"type": failure.type, "message": failure.message}
    if failure.args is not None:
        stored["args"] = list(failure.args)
    if failure.attributes:
        stored["attributes"] = failure.attributes
    return _encode_json(stored)


def load_failure(text: str | None) -> Failure:
    """Return a stored failure; text that is not one gives an ``Unknown`` failure rather than an error."""
    try:
        stored = loads(text)
        args = stored.get("args")
        return Failure(
            type=str(stored["type"]),
            message=str(stored["message"]),
            args=None if args is None else tuple(args),
            attributes=dict(stored.get("attributes") or {}),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return Failure(type="Unknown", message=text or "unknown error")


def revive(failure: Failure) -> Exception:
    """Return the exception that a remembered step failure raises on replay.

    It has the class of the first run if that class is already imported and is an ordinary exception, so the body's
    ``except`` clauses choose the same branch. Nothing is imported and no constructor runs: what the database holds can
    name a class, not call one (cf. CVE-2021-23727).
    """
    cls = _find_exception_class(failure.type)
    if cls is None:
        return StepFailed(failure.message)
    exc: Exception = cls.__new__(cls)
    exc.args = failure.args if failure.args is not None else (failure.message,)
    for name, value in (failure.attributes or {}).items():
        try:
            setattr(exc, name, value)
        except AttributeError:
            continue
    return exc


def _find_exception_class(name: str) -> type[Exception] | None:
    module_name, _, qualname = name.rpartition(".")
    found: Any = sys.modules.get(module_name)
    found = getattr(found, qualname, None)
    if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == module_name:
        return found
    return None


def dump_options(options: Mapping[str, Any]) -> str:
    """Return Celery's own options (signatures, headers) as text; empty options are an empty text."""
    return json.dumps(dict(options), cls=JSONEncoder, separators=(",", ":")) if options else ""
