"""Where a run remembers what its body has done: in the database, or for the test kit in memory."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from conductor_app import transitions
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import DuplicateExecution, Failure
from conductor_app.models import Execution, database
from conductor_app.transitions import limiting, stating, steps, uniqueness
from conductor_app.transitions.waits.members import end_timers
from conductor_app.values.limits import Limit
from conductor_app.values.state import Told


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

    def begin(self, step: str) -> None:
        """Note that the function of a step is called now."""

    def record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> steps.Memory:
        """Remember what a function has returned, as stored text, or that it failed; return what is remembered."""

    def record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> transitions.Together:
        """Call ``work`` and remember the text that it returns, both or neither."""

    def start_child(self, wait: transitions.Invocation) -> steps.Memory:
        """Start a child that the body does not wait for yet, and return what is remembered of it."""

    def start_timer(self, step: str, seconds: float) -> steps.Memory:
        """Start a timer that the body does not wait for yet, and return what is remembered of it."""

    def look(self, step: str, name: str, event: str | None = None) -> steps.Memory | None:
        """Return what has become of a step by now.

        Args:
            step: Which one.
            name: That of the look itself.
            event: Of an event: its name. It is taken if it is there; ``None`` is returned if it is not.
        """

    def cancel_losers(self, step: str) -> None:
        """Ask those children to stop that have lost a ``ctx.first``."""

    def find_deadlock(self, wanted: Sequence[tuple[Limit, str]]) -> tuple[Limit, str, uuid.UUID] | None:
        """Return for which place of a limit a new child would wait for ever, since this execution or one above has it.

        Args:
            wanted: The limits of the child's task, with its keys.

        Returns:
            The limit, the key, and who has a place until it ends.
        """

    def duplicate_of(self, children: Sequence[transitions.NewExecution]) -> DuplicateExecution | None:
        """Return the error to raise if an open execution has the unique key of one of the children."""

    def deadline(self) -> dt.datetime | None:
        """Return when the tree is cancelled."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the tree.

        Raises:
            TooManyTags: It would have too many. Nothing is stored.
        """

    def told(self) -> Told | None:
        """Return what the execution has told before this run; ``None`` if nothing is kept.

        Raises:
            DatabaseError: The database is away.
        """

    def tell(self, told: Told, *, is_new: bool, waits: bool) -> bool:
        """Keep what the execution tells, in the place of what it told before.

        Args:
            is_new: Whether nothing was kept before.
            waits: Whether to wait for somebody who is at the execution's row.

        Returns:
            ``False`` if it is not kept for now.

        Raises:
            LeaseLost: Another run has taken over.
            DatabaseError: The database is away.
        """

    def outcomes_of_map(self, remembered: steps.Memory) -> list[steps.ChildOutcome]:
        """Return what has become of the children of a map, in their order."""


class DatabaseJournal:
    """The journal of an execution: its steps in the database.

    Args:
        execution: As the run has claimed it.
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        #: When the function of a step that is not recorded yet was called, by this process's clock.
        self._began: dict[str, float] = {}

    @property
    def is_strict(self) -> bool:
        """``CONDUCTOR["STRICT_REPLAY"]``."""
        return conductor_settings().STRICT_REPLAY

    def check_held(self) -> None:
        """Ask the database whether the run may go on."""
        transitions.check_held(self._execution)

    def begin(self, step: str) -> None:
        """Keep when it was."""
        self._began[step] = time.monotonic()

    def record(self, step: str, *, result: str | None = None, failure: Failure | None = None) -> steps.Memory:
        """Insert a step."""
        now = time.monotonic()
        seconds = now - self._began.pop(step, now)
        return transitions.record_step(self._execution, step, result=result, failure=failure, seconds=seconds)

    def record_together(self, step: str, work: Callable[[], tuple[str, Any]]) -> transitions.Together:
        """Call ``work`` and insert the step, in one transaction."""
        return transitions.record_together(self._execution, step, work)

    def find_deadlock(self, wanted: Sequence[tuple[Limit, str]]) -> tuple[Limit, str, uuid.UUID] | None:
        """Ask the places of the tree."""
        return limiting.deadlock(self._execution, wanted)

    def start_timer(self, step: str, seconds: float) -> steps.Memory:
        """Insert its step."""
        return transitions.start_timer(self._execution, step, seconds)

    def cancel_losers(self, step: str) -> None:
        """Flag them."""
        transitions.cancel_losers(self._execution, step)

    def look(self, step: str, name: str, event: str | None = None) -> steps.Memory | None:
        """Read it, after what may decide it now."""
        del name
        if event is not None:
            transitions.take_if_there(self._execution, step, event)
        else:
            transitions.patiently(lambda: end_timers(steps.of(self._execution.pk, step)))
        return transitions.patiently(lambda: steps.recall(self._execution.pk, step)).get(step)

    def start_child(self, wait: transitions.Invocation) -> steps.Memory:
        """Insert the child and its step."""
        return transitions.start_child(self._execution, wait)

    def duplicate_of(self, children: Sequence[transitions.NewExecution]) -> DuplicateExecution | None:
        """Look for one."""
        keyed = {child.unique.key: child for child in children if child.unique is not None}
        if not keyed:
            return None
        task = next(iter(keyed.values())).task
        holder = transitions.patiently(lambda: uniqueness.first_holder(task, keyed))
        if holder is None or holder.unique_key not in keyed:
            return None
        return uniqueness.duplicate(task, holder.unique_key, holder, keyed[holder.unique_key].unique)

    def deadline(self) -> dt.datetime | None:
        """Read the root's row; an operator's retry changes it only between two runs."""
        root = Execution.objects.using(database()).filter(pk=self._execution.root_id)
        return transitions.patiently(lambda: root.values_list("tree_deadline_at", flat=True).first())

    def tag(self, tags: Mapping[str, str]) -> None:
        """Write them with the root."""
        transitions.tag(self._execution.root_id, tags, waits_for_database=True)

    def told(self) -> Told | None:
        """Read its row. A first run finds none, and does not ask."""
        return None if self._execution.fence == 1 else stating.told_by(self._execution.pk)

    def tell(self, told: Told, *, is_new: bool, waits: bool) -> bool:
        """Write its row."""
        return stating.state(self._execution, told, is_new=is_new, waits=waits)

    def outcomes_of_map(self, remembered: steps.Memory) -> list[steps.ChildOutcome]:
        """Read the children's rows, or what was copied of them."""
        return transitions.patiently(lambda: steps.recall_map(self._execution.pk, remembered))
