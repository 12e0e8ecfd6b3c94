"""What a program must have returned, computed from the program and from what its execution remembers."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from conductor_app.exceptions import WorkerLost
from conductor_app.models import CopiedOutcome, Event, Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.values.failures import load_failure
from conductor_app.values.payloads import loads
from tests.app.programs import TICKING, Flaky, Instruction, Refused, name_of

_ERRORS = {StepStatus.TIMED_OUT: "ChildTimedOut", StepStatus.CANCELLED: "ChildCancelled"}


class Raised(Exception):
    """The program raises this error, in the words of ``tests.app.programs.shown``."""


class Undecided(Exception):
    """The program has not got past this step."""


class Oracle:
    """All that is stored now."""

    def __init__(self) -> None:
        self._executions = {row.pk: row for row in Execution.objects.all()}
        self._steps = {(row.execution_id, row.name): row for row in Step.objects.all()}
        self._events = {row.step_id: row for row in Event.objects.exclude(step=None)}
        self._mapped: dict[Any, list[Execution]] = defaultdict(list)
        for row in sorted(self._executions.values(), key=lambda row: row.position or 0):
            if row.position is not None:
                self._mapped[row.parent_id, row.step].append(row)

    def mistakes(self) -> Iterator[str]:
        """Say which executions have ended in another way than they had to."""
        for execution in self._executions.values():
            wrong = self._mistake(execution)
            if wrong:
                yield f"{execution} ({execution.status}) {wrong}; its program is {_program_of(execution)}"

    def _mistake(self, execution: Execution) -> str:
        if execution.status not in (ExecutionStatus.SUCCEEDED, ExecutionStatus.FAILED):
            return ""
        try:
            value = self._run(execution)
        except Undecided as step:
            reason = self._failure_of_its_own(execution)
            return "" if reason else f"has ended before the step {step}"
        except Raised as error:
            value = error
        if execution.status == ExecutionStatus.SUCCEEDED:
            got = execution.get_result()
            return "" if got == value else f"returned {got}, not {value!r}"
        if self._failure_of_its_own(execution):
            return ""
        failure = load_failure(execution.error)
        name = failure.type.rpartition(".")[2]
        got = f"{name}: {failure.message}" if name == "ChildFailed" else name
        return "" if isinstance(value, Raised) and str(value) == got else f"failed with {got}, not {value!r}"

    def _failure_of_its_own(self, execution: Execution) -> bool:
        """Whether it has used all its attempts for crashes, or for errors that come and go."""
        kind = load_failure(execution.error).type.rpartition(".")[2] if execution.error else ""
        is_last = execution.attempt == execution.max_attempts
        return is_last and kind in (WorkerLost.__name__, Flaky.__name__)

    def _run(self, execution: Execution) -> list[Any]:
        values = []
        for number, instruction in enumerate(_program_of(execution)):
            try:
                values.append(self._follow(execution, name_of(number, instruction), instruction))
            except Raised as error:
                if not instruction.get("catch"):
                    raise
                values.append(str(error))
        return values

    def _follow(self, execution: Execution, name: str, instruction: Instruction) -> Any:
        match instruction["do"]:
            case "fail":
                raise Raised(Refused.__name__)
            case "failing_step":
                return "refused"
            case "flaky" | "checkpoint":
                return None
            case "step" | "atomic":
                return loads(self._decided(execution, name).result)
            case "sleep":
                if self._decided(execution, name).status != StepStatus.SUCCEEDED:
                    raise Undecided(name)
                return None
            case "event":
                return self._event(self._decided(execution, name))
            case "start":
                self._step(execution, name)
                return None
            case "invoke":
                return self._outcome(self._decided(execution, name))
            case "map":
                return self._map(self._decided(execution, name), instruction)
            case "first":
                return self._first(self._decided(execution, name), execution)
            case "gather":
                return self._gather(execution, name, instruction)
        raise AssertionError(instruction)

    def _step(self, execution: Execution, name: str) -> Step:
        step = self._steps.get((execution.pk, name))
        if step is None:
            raise Undecided(name)
        return step

    def _decided(self, execution: Execution, name: str) -> Step:
        step = self._step(execution, name)
        if step.status == StepStatus.PENDING:
            raise Undecided(name)
        return step

    def _event(self, step: Step) -> Any:
        if step.status == StepStatus.TIMED_OUT:
            raise Raised("EventTimedOut")
        if step.is_copied:
            return loads(step.result)
        event = self._events[step.pk]
        assert event.payload == step.result, f"{step} took {step.result}, and the event was {event.payload}"
        return event.get_payload()

    def _outcome(self, step: Step) -> Any:
        """What a step that stands for one child gives."""
        if step.status == StepStatus.SUCCEEDED:
            return loads(step.result) if step.is_copied else self._run(self._executions[step.child_id])
        raise Raised(self._error_of(step))

    def _error_of(self, step: Step) -> str:
        """What a child's end raises; that of the source of a fork may have been another one since."""
        if step.is_copied:
            return _copied_error(StepStatus(step.status), step.error)
        return self._error(StepStatus(step.status), step.child_id)

    def _error(self, status: StepStatus, child_id: uuid.UUID | None) -> str:
        if status == StepStatus.FAILED:
            assert child_id is not None
            return f"ChildFailed: Child execution failed: {self._executions[child_id].error_message}"
        return _ERRORS[status]

    def _map(self, step: Step, instruction: Instruction) -> list[Any]:
        if step.status != StepStatus.SUCCEEDED and not instruction["return_exceptions"]:
            raise Raised(self._error_of(step))
        late = set(loads(step.result)) if step.status == StepStatus.TIMED_OUT else set()
        values = []
        for outcome in CopiedOutcome.objects.filter(step=step).order_by("position"):
            if outcome.position in late:
                values.append("ChildTimedOut")
            elif outcome.status == ExecutionStatus.SUCCEEDED:
                values.append(loads(outcome.result))
            else:
                values.append(_copied_error(StepStatus(outcome.status), outcome.error))
        for child in self._mapped[step.execution_id, step.name]:
            if child.position in late:
                values.append("ChildTimedOut")
            elif child.status == ExecutionStatus.SUCCEEDED:
                values.append(self._run(child))
            else:
                values.append(self._error(StepStatus(child.status), child.pk))
        return values

    def _first(self, step: Step, execution: Execution) -> list[Any]:
        if not step.counted_names:
            raise Raised("NoneSucceeded")
        (name,) = step.counted_names
        winner = self._decided(execution, name)
        if winner.kind == StepKind.TIMER:
            return [name, None]
        return [name, self._event(winner) if winner.kind == StepKind.MESSAGE else self._outcome(winner)]

    def _gather(self, execution: Execution, name: str, instruction: Instruction) -> list[Any]:
        members = [self._step(execution, f"{name}-{number}") for number, _ in enumerate(instruction["programs"])]
        gathers = [
            step
            for (owner, _), step in self._steps.items()
            if owner == execution.pk
            and step.kind == StepKind.GATHER
            and loads(step.result) == [m.name for m in members]
        ]
        for gather in gathers:
            if gather.status == StepStatus.PENDING:
                raise Undecided(gather.name)
            if gather.child_id is not None:
                self._outcome(next(member for member in members if member.child_id == gather.child_id))
        if any(member.status == StepStatus.PENDING for member in members):
            raise Undecided(name)
        values: list[Any] = []
        for member in members:
            try:
                values.append(self._outcome(member))
            except Raised as error:
                if not instruction["return_exceptions"]:
                    raise
                values.append(str(error))
        return values


def _program_of(execution: Execution) -> list[Instruction]:
    program: list[Instruction] = execution.kwargs.get("program", TICKING)
    return program


def _copied_error(status: StepStatus, error: str | None) -> str:
    if status == StepStatus.FAILED:
        return f"ChildFailed: Child execution failed: {load_failure(error).message}"
    return _ERRORS[status]
