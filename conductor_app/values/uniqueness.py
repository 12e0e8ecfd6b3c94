"""Unique keys: what callers and decorators say of them, and the key of a call."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.states import OnConflict
from conductor_app.values.arguments import check_duration
from conductor_app.values.texts import shown

#: Longest key, in bytes.
KEY_BYTES = 255

#: Options of a call that are about it.
OPTIONS = ("unique_key", "on_conflict", "debounce", "debounce_max")

#: The name of an argument, or a function that gets a task's arguments and returns a key; ``None`` is none.
UniqueSource = str | Callable[..., Any]

#: Options of a call whose result may be needed for itself: something waits for the end of just this execution.
_AWAITED = ("link", "link_error", "chain", "chord", "group_id", "reply_to")


@dataclass(frozen=True)
class Unique:
    """The unique key of a call, and what is to be done if an open execution has it."""

    key: str
    on_conflict: OnConflict = OnConflict.RETURN
    #: Seconds for which an execution that has not begun waits for another call of its key.
    debounce: float | None = None
    #: Seconds after the first call at which it begins at the latest.
    debounce_max: float | None = None
    #: Whether the execution that there is may stand for this call.
    may_be_another: bool = True

    @property
    def takes_over(self) -> bool:
        """Whether the call is stored although an open execution has the key: it begins when that has ended."""
        return self.debounce is not None or self.on_conflict == OnConflict.REPLACE


def check_source(source: object, on_conflict: object, fn: Callable[..., Any]) -> None:
    """Refuse a decorator's ``unique`` and ``on_conflict`` that would fail each call.

    Args:
        source: ``unique``.
        on_conflict: What is to be done on a conflict.
        fn: The body.

    Raises:
        TypeError: ``unique`` is neither a name nor a function, names no argument of the body, or is missing.
        ValueError: ``on_conflict`` is none of the three.
    """
    if on_conflict is not None:
        check_on_conflict(on_conflict)
    if source is None:
        if on_conflict is not None:
            raise InvalidArgumentType(
                "on_conflict says what becomes of a call whose unique key is taken. Pass unique=… as well."
            )
        return
    if callable(source):
        return
    if not isinstance(source, str):
        raise InvalidArgumentType(
            f"unique must be the name of an argument, or a function of the arguments, got {type(source).__name__}."
        )
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind not in _STARS]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if source not in names and not takes_any:
        known = ", ".join(names) or "none"
        raise InvalidArgumentType(
            f"unique={source!r} names no argument of {fn.__name__}; it has {known}. "
            "Name one, or pass a function of them."
        )


_STARS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_on_conflict(value: object) -> OnConflict:
    """Return what is to be done on a conflict.

    Raises:
        InvalidArgument: It is none of the three.
    """
    if not isinstance(value, str) or value not in list(OnConflict):
        raise InvalidArgument(f'on_conflict must be "return", "refuse" or "replace", got {shown(value)}.')
    return OnConflict(value)


def check_key(key: object, what: str = "unique_key") -> str:
    """Return a key that may be stored.

    Raises:
        InvalidArgumentType: It is no text. Nothing is converted.
        InvalidArgument: It is empty, longer than 255 bytes, or would not be the same on every database.
    """
    if not isinstance(key, str):
        raise InvalidArgumentType(
            f"{what} must be str, got {type(key).__name__} {shown(key, 40)}. Nothing is converted: write it as text."
        )
    length = len(key.encode("utf-8", "surrogatepass"))
    if not 1 <= length <= KEY_BYTES:
        raise InvalidArgument(f"{what} must have 1–{KEY_BYTES} bytes, got {length}: {shown(key)}.")
    # MySQL ignores spaces at the end when it compares, so two keys would be one there, and only there.
    if key != key.strip() or not key.isprintable():
        raise InvalidArgument(f"{what} must be printable text without spaces at its ends, got {shown(key)}. Strip it.")
    return str.__str__(key)


def unique_of_call(
    options: Mapping[str, Any],
    args: list[Any],
    kwargs: Mapping[str, Any],
    *,
    task: str,
    fn: Callable[..., Any],
    source: UniqueSource | None,
    on_conflict: OnConflict,
    is_child: bool,
    idempotency_key: str | None = None,
) -> Unique | None:
    """Return the unique key of a call; ``None`` if it has none.

    Args:
        options: Those of ``apply_async``, or of a child's signature.
        args: The call's arguments, without the context.
        kwargs: The call's arguments.
        task: The task's name.
        fn: The body.
        source: What the decorator says.
        on_conflict: What the decorator says.
        is_child: Whether it is called by a body, as a step.
        idempotency_key: The call's, if it has one.

    Raises:
        InvalidArgumentType, InvalidArgument: The key cannot be stored, or the call says what cannot be.
    """
    given = options.get("unique_key")
    asked = options.get("on_conflict")
    asked = None if asked is None else check_on_conflict(asked)
    debounce, debounce_max = _debounce(options)
    if given is None and source is None:
        for name in ("on_conflict", "debounce"):
            if options.get(name) is not None:
                raise InvalidArgument(f"{name} is about a unique key, and {task} has none. Pass unique_key=… as well.")
        return None
    if is_child:
        if asked not in (None, OnConflict.REFUSE) or debounce is not None:
            what = "debounce" if debounce is not None else f'on_conflict="{asked}"'
            raise InvalidArgument(
                f"{what} is not for a child: its parent waits for its own child's result. A child whose unique key is "
                "taken raises DuplicateExecution in its parent."
            )
        asked = OnConflict.REFUSE
    if debounce is not None:
        _check_debounced(options, asked, idempotency_key)
    key = check_key(given) if given is not None else _key(source, fn, args, kwargs, task)
    if key is None:
        return None
    decided = asked or on_conflict
    if idempotency_key is not None and decided == OnConflict.RETURN:
        raise InvalidArgument(
            'idempotency_key and a unique key with on_conflict="return" contradict each other: what is returned may be '
            "an execution that has another idempotency key, and the next call with this one would start another one. "
            'Pass on_conflict="refuse" or "replace", or one of the two keys.'
        )
    is_awaited = any(options.get(name) for name in _AWAITED)
    return Unique(key, decided, debounce, debounce_max, may_be_another=not is_awaited)


def _debounce(options: Mapping[str, Any]) -> tuple[float | None, float | None]:
    debounce, longest = options.get("debounce"), options.get("debounce_max")
    seconds = None if debounce is None else check_duration(debounce, "debounce", allow_zero=False)
    most = None if longest is None else check_duration(longest, "debounce_max", allow_zero=False)
    if most is not None and seconds is None:
        raise InvalidArgument("debounce_max limits debounce. Pass debounce=… as well.")
    if most is not None and seconds is not None and most < seconds:
        raise InvalidArgument(f"debounce_max must be ≥ debounce, got {most:g} and {seconds:g}")
    return seconds, most


def _check_debounced(options: Mapping[str, Any], asked: OnConflict | None, idempotency_key: str | None) -> None:
    for name in ("countdown", "eta"):
        if options.get(name) is not None:
            raise InvalidArgument(f"debounce says when the execution is due, and so does {name}. Pass one of the two.")
    if idempotency_key is not None:
        raise InvalidArgument(
            "A debounced call changes the payload of an execution that has not begun, and an idempotency key belongs "
            "to one payload for ever. Pass one of the two."
        )
    if asked in (OnConflict.RETURN, OnConflict.REFUSE):
        raise InvalidArgument(
            f'A debounced call is never lost, so on_conflict="{asked}" has no meaning for it. "replace" cancels an '
            "execution that has begun; without it the call is run after that."
        )
    awaited = [name for name in _AWAITED if options.get(name)]
    if awaited:
        what = "a part of a canvas" if awaited[0] in ("group_id", "reply_to") else f"called with {awaited[0]}"
        raise InvalidArgument(
            f"A debounced call cannot be {what}: it may become a part of an execution that another call has stored, "
            "and nothing would hear of its end."
        )


def _key(
    source: UniqueSource | None, fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], task: str
) -> str | None:
    if callable(source):
        key = source(*args, **kwargs)
        return None if key is None else check_key(key, f"what unique of {task} returns")
    try:
        bound = inspect.signature(fn).bind(None, *args, **kwargs)
    except TypeError as error:
        raise InvalidArgumentType(f"The arguments of {task} do not tell its unique key: {error}") from None
    bound.apply_defaults()
    values = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            values.update(values.pop(parameter.name))
    value = values.get(str(source))
    if value is None:
        return None
    # What names a row, and is the same text in each process.
    if isinstance(value, (int, uuid.UUID)) and not isinstance(value, bool):
        value = str(int(value)) if isinstance(value, int) else str(value)
    return check_key(value, f'argument "{source}" of {task}, its unique key,')
