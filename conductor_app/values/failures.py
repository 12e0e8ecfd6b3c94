"""Failures: exceptions to stored text, and back to exceptions."""

from __future__ import annotations

import contextlib
import sys
import traceback as traceback_module
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from django.utils.functional import Promise

from conductor_app.exceptions import (
    ControlFlow,
    Failure,
    NewerFormat,
    NotSerializable,
    PayloadTooLarge,
    StepFailed,
    class_path,
)
from conductor_app.values.payloads import dumps, loads
from conductor_app.values.storage_format import encode_json
from conductor_app.values.texts import clean_text

#: Longest argument or attribute of an exception that is remembered, encoded.
_MAX_PART_BYTES = 4_096
#: Of the exceptions and lists inside of an exception's attributes so many are remembered, and so many levels.
_MAX_PARTS = 100
_MAX_PART_LEVELS = 6


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
    return encode_json(_as_stored(failure))


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
