"""What a run ends for."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

from conductor_app.models import Execution
from conductor_app.states import StepKind
from conductor_app.transitions import claiming, steps


@dataclass(frozen=True)
class Wait:
    """What a body waits for; ``suspending.suspend`` opens it."""

    step: str

    #: The kind of its step.
    kind: ClassVar[StepKind]

    @property
    def opens_first(self) -> bool:
        """Whether ``is_there`` inserts the step, so that a repetition after a lost ``COMMIT`` finds it there."""
        return False

    @property
    def is_one_move(self) -> bool:
        """Whether ``suspend`` does it all; else ``is_there`` and ``open`` do."""
        return False

    @property
    def has_keys(self) -> bool:
        """Whether it stores children with unique keys, so that another execution may have one of them."""
        return False

    def suspend(self, execution: Execution, hand_off: claiming.HandOff | None, *, is_alone: bool) -> None:
        """End the run and open the step in one move.

        Args:
            hand_off: Gets the child that is waited for.
            is_alone: Whether the transaction holds nothing but that.

        Raises:
            LeaseLost, CancelExecution: Nothing is stored.
        """
        raise NotImplementedError

    def is_there(self, execution: Execution) -> bool:
        """Tell, before the execution is written, whether there is nothing to wait for; then that is recorded."""
        return False

    def open(self, execution: Execution) -> bool:
        """Open the step of an execution that waits from now on; ``False``, and all is undone, if it goes on instead."""
        return True

    # What is said of it.

    @property
    def named(self) -> str:
        """What the step's column ``task`` will hold, for the test kit."""
        return ""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What it was called with, for the test kit."""
        return ()

    @property
    def due_in(self) -> float | None:
        """In how many seconds it ends at the latest."""
        return None

    @property
    def child_id(self) -> uuid.UUID | None:
        """The child that is waited for, if it is a single one."""
        return None

    @property
    def detail(self) -> str:
        """What the log says beside the step's name."""
        return ""


@dataclass(frozen=True)
class Pending(Wait):
    """A step that an earlier run opened and that was undecided when this one read it."""

    def open(self, execution: Execution) -> bool:
        """Open nothing; look again."""
        # A new statement, after this row was written: whoever settles the step writes this row too, so either
        # that commit is visible here, or it will find this execution waiting.
        return steps.is_pending(execution.pk, self.step)
