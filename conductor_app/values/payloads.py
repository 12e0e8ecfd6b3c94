"""Payloads, results and Celery's options to stored text and back, and digests of that text."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from typing import Any

from kombu.utils.json import JSONEncoder

from conductor_app.exceptions import NotSerializable, PayloadTooLarge
from conductor_app.values.storable import too_large, validate
from conductor_app.values.storage_format import decode_json, encode_json


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
    validate(value, what, limit)
    return _encode(value, what, limit)


def dump_call(args: list[Any], kwargs: Mapping[str, Any], limit: int | None = None, what: str = "payload") -> str:
    """Return a task's arguments as stored text, ``[args, kwargs]``; errors name the part that the caller wrote.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        limit: Most bytes of the text; ``None`` for no limit.
        what: How they are called in an error.

    Raises:
        NotSerializable, PayloadTooLarge: As for ``dumps``.
    """
    if _is_short(args) and _is_short(kwargs.values()) and all(type(name) is str for name in kwargs):
        types = (*map(type, args), *map(type, kwargs.values()))  # 1 is True, and is not stored as that
        with nullcontext() if what == "payload" else suppress(NotSerializable, PayloadTooLarge):
            return _dump_short_call(tuple(args), tuple(kwargs.items()), types, limit)
    return _dump_call(args, dict(kwargs), limit, what)


#: Values that a text of so many characters at most says are remembered with it: a replay stores them again and again.
_SHORT = 100
_SIMPLE = frozenset({int, bool, type(None)})


def _is_short(values: Collection[Any]) -> bool:
    return len(values) <= 8 and all(
        len(value) <= _SHORT if type(value) is str else type(value) in _SIMPLE for value in values
    )


@functools.lru_cache(maxsize=4_096)
def _dump_short_call(args: tuple[Any, ...], kwargs: tuple[Any, ...], types: tuple[Any, ...], limit: int | None) -> str:
    del types
    return _dump_call(list(args), dict(kwargs), limit)


def _dump_call(args: list[Any], kwargs: dict[str, Any], limit: int | None, what: str = "payload") -> str:
    validate(kwargs, what, limit)
    if args:
        validate(args[0] if len(args) == 1 else args, what, limit)
    return _encode([args, kwargs], what, limit)


def _encode(value: Any, what: str, limit: int | None) -> str:
    try:
        text = encode_json(value)
    except Exception as error:  # a subclass or a tzinfo of the user's takes part, and may raise anything
        raise NotSerializable(f"{what} cannot be encoded: {type(error).__name__}: {error}") from error
    # JSON is ASCII here (``ensure_ascii``), so characters are bytes.
    if limit is not None and len(text) > limit:
        raise PayloadTooLarge(too_large(what, str(len(text)), limit))
    return text


def loads(text: str | None) -> Any:
    """Return the value that ``dumps`` stored; ``None`` or an empty text is ``None``.

    Raises:
        NewerFormat: A newer version stored it.
    """
    return decode_json(text) if text else None


def read_result(text: str | None, lost: Callable[[], Exception]) -> Any:
    """Return the value of a stored result; a stored ``None`` is the text ``null``.

    Args:
        text: What is stored.
        lost: Makes the error to raise if nothing is, or something that ``dumps`` never stores.

    Raises:
        NewerFormat: A newer version stored it.
    """
    if not text:
        raise lost()
    try:
        return decode_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise lost() from error


def round_trip(value: Any, what: str, limit: int | None = None) -> tuple[str, Any]:
    """Return the stored text and what a replay will read from it."""
    text = dumps(value, what, limit)
    return text, loads(text)


def digest(text: str) -> str:
    """Return 32 hexadecimal digits that tell one stored value from another; the order of keys is no difference."""
    return _short_digest(text) if len(text) <= _SHORT else _digest(text)


def _digest(text: str) -> str:
    if text.count('":') > 1:
        text = json.dumps(json.loads(text), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_short_digest = functools.lru_cache(maxsize=4_096)(_digest)


def dump_options(options: Mapping[str, Any]) -> str:
    """Return Celery's own options (signatures, headers) as text; empty options are an empty text."""
    if not options:
        return ""
    try:
        return json.dumps(dict(options), cls=JSONEncoder, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise NotSerializable(
            f"Celery's options of the execution ({', '.join(options)}) have to be JSON, since they are stored: {error}"
        ) from None
