"""Where a run remembers what its body has done: in the database, or for the test kit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.transitions import steps


class Journal(Protocol):
    """What a context asks for while its body runs. What ends a run (a suspension, an outcome) is the executor's."""

    @property
    def is_strict(self) -> bool:
        """Whether a step that is called with another payload than the recorded one is a mismatch, and not a warning."""

    def check_held(self) -> None:
        """Return if the run may go on.

        Raises:
            LeaseLost: Another run has taken over.
            CancelExecution: The execution is to be cancelled.
        """

    def record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> steps.Memory:
        """Remember what a function has returned, as stored text, or that it failed; return what is remembered."""

    def record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> transitions.Together:
        """Call ``work`` and remember the text that it returns, both or neither."""

    def start_child(self, wait: transitions.Invocation) -> steps.Memory:
        """Start a child that the body does not wait for yet, and return what is remembered of it."""

    def outcomes_of_map(self, step: str) -> list[steps.ChildOutcome]:
        """Return what has become of the children of a map, in their order."""


class DatabaseJournal:
    """The journal of an execution: its steps in the database.

    Args:
        execution: As the run has claimed it.
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    @property
    def is_strict(self) -> bool:
        """``CONDUCTOR["STRICT_REPLAY"]``."""
        return conductor_settings().STRICT_REPLAY

    def check_held(self) -> None:
        """Ask the database whether the run may go on."""
        transitions.check_held(self._execution)

    def record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> steps.Memory:
        """Insert a step."""
        return transitions.record_step(self._execution, step, result=result, failure=failure)

    def record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> transitions.Together:
        """Call ``work`` and insert the step, in one transaction."""
        return transitions.record_together(self._execution, step, work)

    def start_child(self, wait: transitions.Invocation) -> steps.Memory:
        """Insert the child and its step."""
        return transitions.start_child(self._execution, wait)

    def outcomes_of_map(self, step: str) -> list[steps.ChildOutcome]:
        """Read the children's rows."""
        return transitions.patiently(lambda: steps.recall_map(self._execution.pk, step))
