"""Hooks around what the engine does, for those who watch it: ``metrics`` and ``tracing``.

Django's signals (``signals``) say what has happened; these say what is going on, so that a hook can measure it, and
make something current meanwhile. Nobody hooks in unless a setting asks for it. Without a hook, each place costs a look
at an empty tuple.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from django.dispatch import Signal

logger = logging.getLogger(__name__)

Hook = Callable[..., AbstractContextManager[object]]
Carrier = Callable[[str, dict[str, Any]], None]

_NOTHING = nullcontext()


class Around:
    """One place in the engine: ``with around(…):`` enters a context manager of each hook.

    A hook's own exception is logged and changes nothing; nor can a hook swallow one that passes through.
    """

    def __init__(self) -> None:
        self._hooks: tuple[Hook, ...] = ()

    def add(self, hook: Hook) -> None:
        """Call ``hook`` from now on, with the arguments of the place."""
        if hook not in self._hooks:
            self._hooks = (*self._hooks, hook)

    def remove(self, hook: Hook) -> None:
        """Call ``hook`` no more."""
        self._hooks = tuple(other for other in self._hooks if other != hook)

    def __call__(self, *args: Any) -> AbstractContextManager[object]:
        """Return what is to be entered at this place."""
        return _Entered(self._hooks, args) if self._hooks else _NOTHING


class _Entered(AbstractContextManager[None]):
    def __init__(self, hooks: tuple[Hook, ...], args: tuple[Any, ...]) -> None:
        self._hooks = hooks
        self._args = args
        self._entered: list[AbstractContextManager[object]] = []

    def __enter__(self) -> None:
        for hook in self._hooks:
            try:
                manager = hook(*self._args)
                manager.__enter__()
            except Exception:
                logger.exception("A hook around the engine's work failed.")
            else:
                self._entered.append(manager)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for manager in reversed(self._entered):
            try:
                manager.__exit__(exc_type, exc, traceback)
            except Exception:
                logger.exception("A hook around the engine's work failed.")


#: A run, from its claim to its end; called with the execution. What ends the run passes through: ``RunEnded``, or the
#: exception that fails a durable task for good.
running = Around()
#: The function of a step, when it is called and not remembered; called with the execution and the step's name.
stepping = Around()
#: The writing of tags by a body; called with the execution and the tags.
tagging = Around()
#: What is done for an execution outside of its runs, such as the publishing of its message; called with the execution.
acting_for = Around()

#: Where each move of an execution has its line.
logger_of_moves = logging.getLogger("conductor_app.execution")
#: What writes the line of a move at DEBUG, by the move's signal. A receiver would cost each run its time, always.
lines: dict[Signal, Callable[..., None]] = {}


#: What has to follow the moves of a task's executions, by the task's name: called with the signal, the execution and
#: the signal's details. A receiver would cost the moves of every task its time.
followers: dict[str, Callable[..., None]] = {}


def is_noticed(signal: Signal, task: str) -> bool:
    """Tell whether anybody hears a move's signal, sees its line, or follows the moves of the task."""
    return (
        signal.has_listeners(task)
        or task in followers
        or (signal in lines and logger_of_moves.isEnabledFor(logging.DEBUG))
    )


def tell(signal: Signal, execution: Any, **details: Any) -> None:
    """Write the line of a move that has been made, and send its signal."""
    if signal in lines and logger_of_moves.isEnabledFor(logging.DEBUG):
        try:
            lines[signal](execution=execution, **details)
        except Exception:
            logger.exception("The line of a move failed.")
    follower = followers.get(execution.task)
    if follower is not None:
        try:
            follower(signal, execution, **details)
        except Exception:
            logger.exception("What follows a move failed; a sweep does it.")
    signal.send_robust(sender=execution.task, execution=execution, **details)


_carriers: list[Carrier] = []


def add_carrier(carrier: Carrier) -> None:
    """Call ``carrier(task, headers)`` for each new execution; what it puts into the headers is kept with it."""
    if carrier not in _carriers:
        _carriers.append(carrier)


def remove_carrier(carrier: Carrier) -> None:
    """Call ``carrier`` no more."""
    if carrier in _carriers:
        _carriers.remove(carrier)


def carried(task: str, headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the headers that a new execution of ``task`` keeps: those of its caller, and what the carriers add."""
    kept = dict(headers or {})
    for carrier in tuple(_carriers):
        try:
            carrier(task, kept)
        except Exception:
            logger.exception("A carrier of headers failed.")
    return kept
