"""``Limit``: how many executions of a key may run, be open, or start in a time; what callers declare of it."""

from __future__ import annotations

import datetime as dt
import inspect
import re
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.states import LimitKind
from conductor_app.values.texts import shown

NAME_LENGTH = 100
#: Most bytes of a key.
KEY_BYTES = 255
#: Most limits of one task.
MOST_LIMITS = 4

_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smhd])")


class Limit:
    """How many executions may run, be open, or start in a time: of all tasks that have it, for each key by itself.

    Args:
        name: Its name, 1 to 100 characters. Limits of one name are one limit, so they must be equal.
        number: How many at the same time, at least 1; with ``holds``.
        per: What the key is: the name of an argument, or a function that gets the task's arguments. The key is text, an
            ``int`` or a ``UUID``, at most 255 bytes as text. ``None``: one key for all.
        holds: Since when, and until when, an execution has a place. ``"run"``: while its body runs; not while it waits
            for a child, an event, or another attempt. ``"open"``: from its first start to its end, waiting included.
        rate: How many attempts may start: ``"100/m"``, per ``s``, ``m``, ``h`` or ``d``. Runs after a suspension do not
            count.
        burst: How many of them may start at once, if none has started for long; 1 by default.

    Raises:
        InvalidArgumentType, InvalidArgument: What is wrong with it.
    """

    __slots__ = ("__weakref__", "burst", "kind", "name", "number", "per", "rate", "seconds")

    #: The living ones, by name.
    _known: ClassVar[weakref.WeakValueDictionary[str, Limit]] = weakref.WeakValueDictionary()

    def __init__(
        self,
        name: str,
        number: int | None = None,
        *,
        per: str | Callable[..., Any] | None = None,
        holds: Literal["run", "open"] | None = None,
        rate: str | None = None,
        burst: int | None = None,
    ) -> None:
        self.name = _check_name(name)
        what = f'limit "{self.name}"'
        if per is not None and not (callable(per) or isinstance(per, str)):
            raise InvalidArgumentType(
                f"{what}: per must be the name of an argument or a function, got {type(per).__name__}"
            )
        self.per = per
        if (number is None) == (rate is None):
            raise InvalidArgument(
                f'{what} needs either a number, such as Limit("bank", 5, holds="run"), or a rate, such as '
                'Limit("bank-api", rate="100/m"). A task may have one limit of each.'
            )
        #: How many at the same time; of a rate, how many may start at once.
        self.number = _check_count(number if rate is None else 1 if burst is None else burst, what, rate is not None)
        #: Seconds from one start to the next, of a rate; else ``None``.
        self.seconds = None if rate is None else _interval(rate, what)
        self.rate, self.burst = rate, self.number if rate is not None else None
        if rate is not None:
            if holds is not None:
                raise InvalidArgument(f"{what}: holds belongs to a number; a rate counts starts")
            self.kind = LimitKind.RATE
        else:
            if burst is not None:
                raise InvalidArgument(f"{what}: burst belongs to a rate")
            if holds not in (LimitKind.RUN.value, LimitKind.OPEN.value):
                raise InvalidArgument(
                    f'{what} has to say what it counts, got holds={shown(holds)}: holds="run" counts bodies that run, '
                    'holds="open" executions from their first start to their end, waiting included'
                )
            self.kind = LimitKind(holds)
        other = self._known.setdefault(self.name, self)
        if other != self:
            raise InvalidArgument(
                f"Two limits are called {shown(self.name)} and differ: {other!r} and {self!r}. Define it once, and "
                "give it to each task."
            )

    @classmethod
    def known(cls, name: str) -> Limit | None:
        """Return the limit of this name, if this process has defined it."""
        return cls._known.get(name)

    @property
    def slack(self) -> dt.timedelta:
        """Return by how much a start may come before the even pace allows it, and no window has one too many.

        Of a window as long as the rate's unit, GCRA with a tolerance of ``(burst - 1)`` intervals allows as many starts
        as the rate and the burst together, less one. So nearly an interval is left for those that begin late and are
        followed by one that is on time; less of it for a rate that is no whole number.
        """
        if self.seconds is None or self.rate is None:
            return dt.timedelta(0)
        fraction = float(self.rate.partition("/")[0]) % 1
        return dt.timedelta(seconds=self.seconds * (1 - fraction) * 0.9)

    def _parts(self) -> tuple[Any, ...]:
        per = (getattr(self.per, "__module__", ""), _name_of(self.per)) if callable(self.per) else self.per
        return (self.name, self.kind, self.number, self.rate, per)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Limit) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        said = [repr(self.name)]
        if self.rate is None:
            said += [repr(self.number), f'holds="{self.kind.value}"']
        else:
            said += [f'rate="{self.rate}"', f"burst={self.burst}"]
        if self.per is not None:
            said.append(f"per={self.per!r}" if isinstance(self.per, str) else f"per={_name_of(self.per)}")
        return f"Limit({', '.join(said)})"

    def key_of(self, fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the key of an execution.

        Args:
            fn: The task's function, whose first parameter is the context.
            args: Its arguments as they are stored, without the context.
            kwargs: The named ones.

        Raises:
            InvalidArgumentType, InvalidArgument: It cannot be one.
        """
        if self.per is None:
            return ""
        if callable(self.per):
            value, source = self.per(*args, **kwargs), f"what per={_name_of(self.per)} returns"
        else:
            value, source = _argument(fn, self.per, args, kwargs), f'"{self.per}"'
        what = f'the key of limit "{self.name}", {source},'
        if isinstance(value, bool) or not isinstance(value, (str, int, uuid.UUID)):
            raise InvalidArgumentType(f"{what} must be str, int or UUID, got {type(value).__name__} {shown(value, 40)}")
        text = str.__str__(value) if isinstance(value, str) else str(value)
        size = len(text.encode(errors="surrogatepass"))
        if not 1 <= size <= KEY_BYTES:
            raise InvalidArgument(f"{what} must have 1–{KEY_BYTES} bytes, got {size}: {shown(text, 40)}")
        # MySQL ignores spaces at the end when it compares, so two keys would be one there, and only there.
        if text != text.strip() or not text.isprintable():
            raise InvalidArgument(f"{what} must be printable text without spaces at its ends, got {shown(text, 40)}")
        return text


def check_limits(given: object, fn: Callable[..., Any]) -> tuple[Limit, ...]:
    """Return the limits of a task, in the order in which their keys are locked.

    Args:
        given: The decorator's option ``limits``.
        fn: The task's function.

    Raises:
        InvalidArgumentType, InvalidArgument: They cannot be its limits.
    """
    if isinstance(given, (Limit, str, bytes)) or not isinstance(given, Iterable):
        raise InvalidArgumentType(f"limits must be a list of Limit, got {type(given).__name__}. Write limits=[…].")
    limits = list(given)
    for limit in limits:
        if not isinstance(limit, Limit):
            raise InvalidArgumentType(f"limits must be a list of Limit, got one of {type(limit).__name__}")
        if isinstance(limit.per, str):
            _check_argument(fn, limit)
    if len(limits) > MOST_LIMITS:
        raise InvalidArgument(f"a task has {MOST_LIMITS} limits at most, got {len(limits)}")
    names = [limit.name for limit in limits]
    if len(set(names)) < len(names):
        raise InvalidArgument(f"each limit of a task counts once, got {', '.join(names)}")
    return tuple(sorted(limits, key=lambda limit: limit.name))


def limits_of(task: object) -> tuple[Limit, ...]:
    """Return the limits of a Celery task; a plain one has none."""
    return getattr(task, "limits", ())


def keys_of(
    limits: Iterable[Limit], fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> list[tuple[Limit, str]]:
    """Return limits with an execution's keys; see ``Limit.key_of``."""
    return [(limit, limit.key_of(fn, args, kwargs)) for limit in limits]


def _check_name(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidArgumentType(f"the name of a limit must be str, got {type(name).__name__}")
    if not 1 <= len(name) <= NAME_LENGTH or name != name.strip() or not name.isprintable():
        raise InvalidArgument(
            f"the name of a limit must have 1–{NAME_LENGTH} printable characters without spaces at its ends, got "
            f"{shown(name)}"
        )
    return name


def _check_count(number: object, what: str, is_rate: bool) -> int:
    name = "burst" if is_rate else "the number"
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidArgumentType(f"{what}: {name} must be int, got {type(number).__name__}")
    if number < 1:
        raise InvalidArgument(f"{what}: {name} must be ≥ 1, got {number}.")
    return number


def _interval(rate: object, what: str) -> float:
    if not isinstance(rate, str):
        raise InvalidArgumentType(f'{what}: rate must be str such as "100/m", got {type(rate).__name__}')
    found = _RATE.fullmatch(rate)
    if found is None or not float(found[1]):
        raise InvalidArgument(
            f'{what}: rate must be a number above 0 per s, m, h or d, such as "100/m", got {shown(rate)}'
        )
    return _UNITS[found[2]] / float(found[1])


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(fn).parameters.values())[1:]


def _check_argument(fn: Callable[..., Any], limit: Limit) -> None:
    parameters = _parameters(fn)
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if limit.per not in names and not takes_any:
        raise InvalidArgument(
            f'limit "{limit.name}" is per {limit.per!r}, and {fn.__qualname__} has no such argument: it has '
            f"{', '.join(names) or 'none'}"
        )


def _argument(fn: Callable[..., Any], name: str, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    signature = inspect.Signature(_parameters(fn))
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    if name in bound.arguments:
        return bound.arguments[name]
    more = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    if name not in bound.arguments.get(more, {}):
        raise InvalidArgument(f'the payload has no "{name}", which is the key of a limit')
    return bound.arguments[more][name]


def _name_of(fn: Any) -> str:
    return str(getattr(fn, "__qualname__", None) or shown(fn))
