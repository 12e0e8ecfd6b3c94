"""Keep what a body makes current from the executions that follow it in the process.

Language, time zone and much else of "what is current" are context variables. A pool process runs one body after the
other in one context, so what a body activates and does not end would be there for all later ones, and for its own
replay in another process it would not.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def run(fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Return ``fn(*args, **kwargs)``, called in a copy of the current context: what it sets ends with it.

    What a context variable *holds* is not copied. Only the context of ``decimal`` is, since code changes that in place.
    """
    context = copy_context()
    context.run(_own_decimals)
    return context.run(fn, *args, **kwargs)


def _own_decimals() -> None:
    decimal.setcontext(decimal.getcontext().copy())
