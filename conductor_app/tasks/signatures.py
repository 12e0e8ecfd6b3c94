"""How arguments fit the signature of a durable body."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

#: Of a call with more keyword arguments it is not remembered whether they fit.
_MOST_NAMES = 32


def body_signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a durable body without its context."""
    signature = _signature(inspect.unwrap(fn))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def misfit_of_call(fn: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]) -> str:
    """Return how arguments do not fit a body, by their number and names; an empty text if they do."""
    find = _misfit if len(kwargs) <= _MOST_NAMES else _misfit.__wrapped__
    return find(fn, len(args), tuple(kwargs))


@functools.lru_cache(maxsize=4_096)
def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)


@functools.lru_cache(maxsize=4_096)
def _misfit(fn: Callable[..., Any], positional: int, names: tuple[str, ...]) -> str:
    """Return how so many arguments, and arguments of these names, do not fit a body; each run asks."""
    try:
        _signature(fn).bind(None, *[None] * positional, **dict.fromkeys(names))
    except TypeError as error:
        return str(error)
    return ""
