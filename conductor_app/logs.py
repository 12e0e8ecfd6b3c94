"""``ExecutionFilter``: which execution is at work, on each line that is logged meanwhile.

Django reads ``LOGGING`` before it loads the apps, so this module imports nothing that needs them.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

#: What ``ExecutionFilter`` puts on a record outside of a run.
NOTHING: dict[str, Any] = {"execution_id": "", "root_id": "", "task": "", "step": "", "attempt": None, "run": None}

_current: ContextVar[dict[str, Any]] = ContextVar("conductor_app_logged", default=NOTHING)


class ExecutionFilter(logging.Filter):
    """For a handler: gives each record ``execution_id``, ``root_id``, ``task``, ``attempt``, ``run`` and ``step``.

    They tell of the run at work in the record's context, whichever library logs: of a durable task, or of a plain one
    that is an execution. ``step`` is the one whose function is being called. Elsewhere they are empty texts, and
    ``None`` for the two numbers, so that a format can name them always. What a record has already stays.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields; never drop the record."""
        fields, known = _current.get(), vars(record)
        if str(known.get("execution_id", fields["execution_id"])) != fields["execution_id"]:
            fields = NOTHING  # a line about another one, such as a new child: nothing of this run's belongs on it
        for name, value in fields.items():
            known.setdefault(name, value)
        return True


class _Current:
    """Makes fields current in a block; much of a short run's time would go into a generator's."""

    __slots__ = ("_fields", "_token")

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self._token: Token[dict[str, Any]] | None = None

    def __enter__(self) -> None:
        self._token = _current.set(self._fields)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)


def about(execution: Any) -> _Current:
    """Return a block in which a run of ``execution`` is at work."""
    return _Current(fields_of(execution))


def in_step(step: str) -> _Current:
    """Return a block in which the function of a step is called."""
    return _Current({**_current.get(), "step": step})


def fields_of(execution: Any) -> dict[str, Any]:
    """Return the fields of a line about an execution; of what is not loaded, nothing is read."""
    known = vars(execution)
    return {
        "execution_id": str(execution.pk),
        "root_id": str(known.get("root_id", "")),
        "task": execution.task,
        "step": "",
        "attempt": known.get("attempt"),
        "run": known.get("fence"),
    }
