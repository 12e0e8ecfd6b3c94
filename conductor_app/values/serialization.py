"""Payloads, results and failures to stored text and back.

The format is the one Celery itself uses for messages (JSON with kombu's types: datetime, date, time, Decimal, UUID,
bytes, and those that a project has registered there), with one rule more: what would not come back as it went in is
refused, with the path to it. Two things are allowed to change, as in all of JSON: a tuple comes back as a list, and an
integer key as a string.

That is format 1 of what is stored, and has no mark. A later format begins each value with ``MARK`` and its number, as
no JSON does: so older versions tell it from damage, and leave it to newer ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import hashlib
import io
import json
import math
import sys
import traceback as traceback_module
import types
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from django.db.models import Model, QuerySet
from django.utils.functional import Promise
from kombu.utils.json import JSONEncoder, object_hook

from conductor_app.exceptions import (
    ControlFlow,
    Failure,
    NewerFormat,
    NotSerializable,
    PayloadTooLarge,
    StepFailed,
    class_path,
)
from conductor_app.values.validated import is_model

MAX_NESTING = 100
#: Python refuses to parse longer integers (``sys.int_info.default_max_str_digits``).
MAX_INT_BITS = 14_000
#: Values larger than this are refused even without a limit of their own, in bytes.
_UNLIMITED = 16 * 1_048_576
#: Longest argument or attribute of an exception that is remembered, encoded.
_MAX_PART_BYTES = 4_096
#: Of the exceptions and lists inside of an exception's attributes so many are remembered, and so many levels.
_MAX_PARTS = 100
_MAX_PART_LEVELS = 6
_ENVELOPE = {"__type__", "__value__"}
#: The first character of a value in another format than the first one.
MARK = "#"
_encoder = JSONEncoder(allow_nan=False, separators=(",", ":"))
_encode_json = _encoder.encode


def _object_hook(found: dict[str, Any]) -> Any:
    """As kombu's, which says the same of a type that it does not know and of a value that is damaged."""
    if found.keys() != _ENVELOPE:
        return found
    try:
        return object_hook(found)
    except ValueError as error:
        if error.args[:1] == ("Unsupported type",):
            raise NewerFormat(f"a stored value has the type {shown(found['__type__'], 40)}, unknown here") from None
        raise


#: As kombu's ``loads``, which makes a decoder for each text.
_decode_first_format = json.JSONDecoder(object_hook=_object_hook).decode


def _decode_json(text: str) -> Any:
    try:
        return _decode_first_format(text)
    except ValueError:
        if text.startswith(MARK):
            raise NewerFormat(f"a stored value has the format {shown(text[:8])}, unknown here") from None
        raise


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
    _validate(value, what, limit)
    return _encode(value, what, limit)


def dump_call(args: list[Any], kwargs: Mapping[str, Any], limit: int | None = None) -> str:
    """Return a task's arguments as stored text, ``[args, kwargs]``; errors name the part that the caller wrote.

    Raises:
        NotSerializable, PayloadTooLarge: As for ``dumps``.
    """
    if _is_short(args) and _is_short(kwargs.values()) and all(type(name) is str for name in kwargs):
        types = (*map(type, args), *map(type, kwargs.values()))  # 1 is True, and is not stored as that
        return _dump_short_call(tuple(args), tuple(kwargs.items()), types, limit)
    return _dump_call(args, dict(kwargs), limit)


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


def _dump_call(args: list[Any], kwargs: dict[str, Any], limit: int | None) -> str:
    _validate(kwargs, "payload", limit)
    if args:
        _validate(args[0] if len(args) == 1 else args, "payload", limit)
    return _encode([args, kwargs], "payload", limit)


def _encode(value: Any, what: str, limit: int | None) -> str:
    try:
        text = _encode_json(value)
    except Exception as error:  # a subclass or a tzinfo of the user's takes part, and may raise anything
        raise NotSerializable(f"{what} cannot be encoded: {type(error).__name__}: {error}") from error
    # JSON is ASCII here (``ensure_ascii``), so characters are bytes.
    if limit is not None and len(text) > limit:
        raise PayloadTooLarge(_too_large(what, str(len(text)), limit))
    return text


def _too_large(what: str, size: str, limit: int) -> str:
    verb = "return" if what.startswith("result") else "pass"
    return (
        f"The encoded {what} is too large: {size} > {limit} bytes. "
        f"Store the data elsewhere and {verb} a reference to it, or raise the limit in CONDUCTOR."
    )


def loads(text: str | None) -> Any:
    """Return the value that ``dumps`` stored; ``None`` or an empty text is ``None``.

    Raises:
        NewerFormat: A newer version stored it.
    """
    return _decode_json(text) if text else None


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
        return _decode_json(text)
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


def clean_text(text: str, limit: int) -> str:
    """Return ``text`` in a form that every database stores: without NUL and lone surrogates, cut to ``limit`` bytes."""
    text = text.replace("\x00", "\\x00")
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) > limit:
        raw = raw[: max(limit - 3, 0)] + b"..."
    return raw.decode("utf-8", "ignore")


# --------------------------------------------------------------------------------------------------------- validation


class _Refused(Exception):
    """Some part of a value is refused; each level that it passes adds its part of the path."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(before, after)
        self.before = before
        self.after = after
        self.path: list[str] = []


class _OverBudget(Exception):
    """A value is so large that looking at all of it is no use."""


def _validate(value: Any, what: str, limit: int | None) -> None:
    # Encoded text is at least as long as what _check counts, so a value that it gives up on is too large: a string of
    # gigabytes, or a list that holds itself twice at each of 100 levels.
    budget = _UNLIMITED if limit is None else 2 * limit
    try:
        _check(value, 0, budget)
    except _Refused as refused:
        path = what + "".join(reversed(refused.path))
        after = refused.after.replace("Pass", "Return", 1) if what.startswith("result") else refused.after
        raise NotSerializable(f"{refused.before}{_shorten(path)}{after}") from None
    except _OverBudget:
        raise PayloadTooLarge(_too_large(what, f"more than {budget}", budget if limit is None else limit)) from None


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
        envelope = _encoder.default(value)
    except Exception:  # noqa: BLE001 - kombu does not know it; or what the project has registered for it fails
        envelope = None
    if not isinstance(envelope, dict) or envelope.keys() != _ENVELOPE:
        raise _Refused("", f" is {_article(value)}. {_advice(value)}")
    left = _check(envelope["__value__"], depth + 1, _enter(depth, left))
    try:
        back = _decode_json(_encode_json(envelope))
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
    if value.keys() == _ENVELOPE:
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
        refused.path.append(f'["{_shorten(_key_text(key), 40)}"]')
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


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}…{text[-16:]}"


def shown(value: Any, limit: int = 120) -> str:
    """Return ``repr(value)`` for an error's text: short, and whatever the value's own ``__repr__`` does."""
    try:
        return _shorten(repr(value), limit)
    except Exception:  # noqa: BLE001 - the message matters more than this part of it
        return "?"


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


# ----------------------------------------------------------------------------------------------------------- failures


def describe(exc: BaseException, limit: int) -> Failure:
    """Return ``exc`` as storable text: class, message, traceback without the values of local variables.

    Whatever its class, its arguments or its own methods do: the failure must be stored all the same.
    """
    cls = type(exc)
    try:
        message = str(exc) or cls.__name__
    except BaseException:  # noqa: BLE001 - the class is the user's
        message = f"{cls.__name__} (its own text cannot be shown: str() of it fails)"
    try:
        trace = "".join(traceback_module.format_exception(cls, exc, _user_traceback(exc)))
    except BaseException:  # noqa: BLE001 - its notes, or its cause, may fail, too
        frames = "".join(traceback_module.format_tb(_user_traceback(exc)))
        trace = f"Traceback (most recent call last):\n{frames}{class_path(cls)}: {message}\n"
    try:
        args, attributes, rest = _storable_parts(exc)
    except BaseException:  # noqa: BLE001 - as above
        args, attributes, rest = None, {}, {}
    return Failure(
        type=class_path(cls),
        message=clean_text(message, limit),
        traceback=clean_text(trace, limit),
        args=args,
        attributes=attributes,
        is_partial=bool(rest),
        rest=rest or None,
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


def _is_storable(value: Any) -> bool:
    try:
        dumps(value, "value", _MAX_PART_BYTES)
    except (NotSerializable, PayloadTooLarge):
        return False
    return True


def _storable_parts(
    exc: BaseException, level: int = 0, left: Iterator[int] | None = None
) -> tuple[tuple[Any, ...] | None, dict[str, Any], dict[str, Any]]:
    """Return arguments and attributes that can be stored, and what can be told of the other attributes."""
    # Beside the ordinary attributes those that live in slots: OSError.errno, UnicodeDecodeError.reason, __slots__.
    slots = {
        name: getattr(exc, name)
        for cls in type(exc).__mro__
        for name, member in vars(cls).items()
        if isinstance(member, types.MemberDescriptorType)
        and not name.startswith("__")
        and hasattr(exc, name)
        # A builtin's unset slot reads as None, and is not the same as one set to None: OSError words itself by it.
        and not (cls.__module__ == "builtins" and getattr(exc, name) is None)
    }
    found = {**slots, **vars(exc)}
    attributes = {name: value for name, value in found.items() if _is_storable(value)}
    left = iter(range(_MAX_PARTS)) if left is None else left
    rest = {name: _packed(value, exc, level + 1, left) for name, value in found.items() if name not in attributes}
    rest = {name: packed if _is_storable(packed) else None for name, packed in rest.items()}
    return (tuple(exc.args) if _is_storable(list(exc.args)) else None), attributes, rest


def _packed(value: Any, owner: BaseException, level: int, left: Iterator[int]) -> dict[str, Any] | None:
    """Return a value that holds exceptions, such as the list of itself in a ValidationError, so that it can be stored.

    ``None`` stands for what cannot be: a replay finds ``None`` in its place.
    """
    if value is owner:
        return {"self": True}
    if isinstance(value, Promise):
        return {"value": str(value)}
    if level >= _MAX_PART_LEVELS or next(left, None) is None:
        return None
    if isinstance(value, Exception):
        cls = type(value)
        args, attributes, rest = _storable_parts(value, level, left)
        message = cls.__name__
        with contextlib.suppress(Exception):  # the class is the user's
            message = str(value) or message
        nested = Failure(class_path(cls), message, "", args, attributes, bool(rest), rest)
        return {"failure": _as_stored(nested)}
    if isinstance(value, (list, tuple)) and len(value) <= _MAX_PARTS:
        return {"list": [_packed(item, owner, level + 1, left) for item in value]}
    if isinstance(value, dict) and len(value) <= _MAX_PARTS and all(isinstance(name, str) for name in value):
        return {"dict": {name: _packed(item, owner, level + 1, left) for name, item in value.items()}}
    return {"value": value} if _is_storable(value) else None


def _unpacked(packed: Any, owner: BaseException) -> Any:
    """Return what ``_packed`` has packed."""
    match packed:
        case {"self": True}:
            return owner
        case {"failure": dict(stored)}:
            return revive(_from_stored(stored))
        case {"list": list(items)}:
            return [_unpacked(item, owner) for item in items]
        case {"dict": dict(items)}:
            return {name: _unpacked(item, owner) for name, item in items.items()}
        case {"value": value}:
            return value
    return None


def dump_failure(failure: Failure) -> str:
    """Return a failure as stored text, without its traceback."""
    return _encode_json(_as_stored(failure))


def _as_stored(failure: Failure) -> dict[str, Any]:
    stored: dict[str, Any] = {"type": failure.type, "message": failure.message}
    if failure.args is not None:
        stored["args"] = list(failure.args)
    if failure.attributes:
        stored["attributes"] = failure.attributes
    if failure.is_partial:
        stored["is_partial"] = True
    if failure.rest:
        stored["rest"] = failure.rest
    return stored


def load_failure(text: str | None) -> Failure:
    """Return a stored failure; text that is not one gives an ``Unknown`` failure rather than an error."""
    try:
        return read_failure(text)
    except NewerFormat as error:
        return Failure(type="Unknown", message=f"The error cannot be read: {error}.")


def read_failure(text: str | None) -> Failure:
    """Return a stored failure as ``load_failure`` does, for whoever acts on it.

    Raises:
        NewerFormat: A newer version stored it.
    """
    try:
        return _from_stored(loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Failure(type="Unknown", message=text or "unknown error")


def _from_stored(stored: Any) -> Failure:
    args = stored.get("args")
    return Failure(
        type=str(stored["type"]),
        message=str(stored["message"]),
        args=None if args is None else tuple(args),
        attributes=dict(stored.get("attributes") or {}),
        is_partial=bool(stored.get("is_partial")),
        rest=dict(stored.get("rest") or {}),
    )


def revive(failure: Failure) -> Exception:
    """Return the exception that a stored failure is, for whoever asks how an execution has ended.

    It has the class of the first run if that class is already imported and is an ordinary exception, so the caller's
    ``except`` clauses choose the same branch. Nothing is imported, and no constructor of such a class is called: its
    arguments and attributes are put into a bare instance (cf. CVE-2021-23727).
    """
    return cast(Exception, _revived(failure, lambda cls: issubclass(cls, Exception)))


def revive_in_body(failure: Failure) -> BaseException:
    """Return the exception that a remembered step failure raises on replay: as ``revive``, and of any such class.

    ``asyncio.CancelledError`` is no ``Exception``, and a body can catch it.
    """
    return _revived(failure, is_caught_by_bodies)


def is_caught_by_bodies(cls: type[BaseException]) -> bool:
    """Tell whether a body may catch such an exception of a step's function and go on: it asks nobody to end."""
    return not issubclass(cls, (SystemExit, KeyboardInterrupt, GeneratorExit, ControlFlow)) and cls is not BaseException


def _revived(failure: Failure, is_taken: Callable[[type[BaseException]], bool]) -> BaseException:
    cls = _find_exception_class(failure.type)
    exc = None if cls is None or not is_taken(cls) else _bare(cls)
    if exc is None:
        return StepFailed(failure.message)
    try:
        exc.args = failure.args if failure.args is not None else (failure.message,)
    except Exception:  # noqa: BLE001 - a property of the user's
        return StepFailed(failure.message)
    for name, value in (failure.attributes or {}).items():
        with contextlib.suppress(Exception):  # a property of the user's, or one without a setter
            setattr(exc, name, value)
    for name, packed in (failure.rest or {}).items():
        with contextlib.suppress(Exception):
            setattr(exc, name, _unpacked(packed, exc))
    return exc


def _bare(cls: type[BaseException]) -> BaseException | None:
    """Return an instance that its stored parts are still to be put into, without a call of anything of its class."""
    # Not cls.__new__, which may be the user's and may want arguments.
    builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    try:
        return cast(BaseException, builtin.__new__(cls))
    except TypeError:  # ExceptionGroup alone insists on them
        return None


def _find_exception_class(name: str) -> type[BaseException] | None:
    module_name, found = name, None
    while found is None and "." in module_name:  # a class may stand in another one: Order.DoesNotExist
        module_name = module_name.rpartition(".")[0]
        found = sys.modules.get(module_name)
    for part in name[len(module_name) + 1 :].split("."):
        found = getattr(found, "__dict__", {}).get(part)  # not getattr(), which a module may answer with an import
    if isinstance(found, type) and issubclass(found, BaseException) and found.__module__ == module_name:
        return found
    return None


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
