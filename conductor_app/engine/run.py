"""A run that is at work, and how one ends without a final outcome."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from celery import Task
from celery.exceptions import Ignore

from conductor_app.body import left_open
from conductor_app.exceptions import NewerFormat
from conductor_app.models import Execution
from conductor_app.store.soft_limits import SoftLimit
from conductor_app.transitions.leases import Lease
from conductor_app.values.payloads import loads

logger = logging.getLogger("conductor_app.execution")


class RunEnded(Ignore):
    """A run has ended without a final outcome; Celery acknowledges the message and records nothing.

    It travels from the pool process to the worker's main process, which words the event and knows when to sweep next.

    Args:
        what: ``suspended``, ``retrying``, ``cancelled``, ``released``, ``postponed``, ``dropped`` or ``abandoned``.
        detail: The rest of the log line.
        due_in: Seconds until the sweeper has something to do for this execution, if that is known.
        step: The awaited step of a suspension.
    """

    def __init__(self, what: str, detail: str = "", due_in: float | None = None, step: str = "") -> None:
        super().__init__(what, detail, due_in, step)
        self.what = what
        self.detail = detail
        self.due_in = due_in
        self.step = step

    def __str__(self) -> str:
        return f"{self.what}{': ' if self.detail else ''}{self.detail}"

    def __repr__(self) -> str:
        return f"<run {self}>"

    def event(self) -> tuple[str, dict[str, Any]] | None:
        """Return the type and the fields of the event by which Celery's monitors hear of it; ``None`` if of none."""
        if self.what == "suspended":
            return "task-suspended", {"step": self.step}
        if self.what == "retrying":
            return "task-retried", {"exception": self.detail, "traceback": ""}
        if self.what == "cancelled":
            return "task-revoked", {"terminated": False, "signum": None, "expired": False}
        return None

    @staticmethod
    def describe(shown: str) -> str:
        """Return what ``repr()`` of a ``RunEnded`` says, or an empty string for another exception's."""
        return shown[5:-1] if shown.startswith("<run ") and shown.endswith(">") else ""


class Run:
    """A claimed execution in this process's hands, until it is stored what has become of it."""

    def __init__(
        self, task: Task[Any, Any], execution: Execution, lease: Lease, limit: SoftLimit, hostname: str | None
    ) -> None:
        self.task = task
        self.execution = execution
        self.lease = lease
        self.limit = limit
        self.hostname = hostname
        #: Whether the task's body, or what is in its place, has been called.
        self.has_begun = False
        #: Whether nothing is left to be stored: it is, or it is another run's.
        self.is_over = False
        #: How it ended, if the body was called: the result, or what was raised.
        self.result: Any = None
        self.error: BaseException | None = None
        #: What is open when it begins is not its own: a caller's, in eager mode and in tests.
        self.watch = left_open.Watch()
        #: How its arguments do not fit its body, if that was looked at; an empty text if they do.
        self.misfit: str | None = None
        #: Whether the body has told the result backend itself how it stands, by ``update_state``.
        self.reports_state = False
        self._arguments: tuple[list[Any], dict[str, Any]] | None = None
        #: Why the arguments are another worker's to read.
        self.newer: NewerFormat | None = None

    def arguments(self) -> tuple[list[Any], dict[str, Any]] | None:
        """Return the row's arguments for a look; the first call of the body gets the same.

        ``None`` if they cannot be read: that is the body's error.
        """
        if self._arguments is None:
            try:
                self._arguments = loads(self.execution.payload)
            except NewerFormat as error:
                self.newer = error
            except Exception:
                logger.debug("The payload of %s cannot be read.", self.execution.pk, exc_info=True)
        return self._arguments

    def take_arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the row's arguments for one call of the body, which may change them."""
        given, self._arguments = self._arguments, None
        return loads(self.execution.payload) if given is None else given


#: The run that is at work in this thread.
current_run: ContextVar[Run | None] = ContextVar("conductor_app_run", default=None)
