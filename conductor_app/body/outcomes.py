"""What the remembered outcomes of children are in their parent: results, and exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conductor_app.exceptions import ChildCancelled, ChildError, ChildFailed, ChildTimedOut
from conductor_app.states import StepStatus
from conductor_app.transitions import steps
from conductor_app.values.payloads import read_result


def outcome_of(remembered: steps.Memory) -> tuple[Any, ChildError | None]:
    """Return the result of a child, or the exception that its outcome raises in its parent."""
    if remembered.is_pending:  # although it was awaited
        raise remembered.lost("outcome")
    if remembered.status == StepStatus.SUCCEEDED:
        return remembered.get_result(), None
    return None, child_error(remembered)


def outcomes_of_map(
    remembered: steps.Memory, children: Sequence[steps.ChildOutcome]
) -> list[tuple[Any, ChildError | None]]:
    """Return what ``outcome_of`` does for each child of a map, in the order of its payloads."""
    is_timed_out = remembered.status == StepStatus.TIMED_OUT
    late = set(read_result(remembered.result, lambda: remembered.lost("outcome"))) if is_timed_out else set()
    by_position = {child.position: child for child in children}
    if remembered.total is None:
        raise remembered.lost("outcome")
    outcomes: list[tuple[Any, ChildError | None]] = []
    for position in range(remembered.total):
        child = by_position.get(position)
        known = remembered._replace(child_id=None if child is None else child.child_id)
        if position in late or (is_timed_out and child is not None and child.is_open):
            outcomes.append((None, child_error(known)))
        elif child is None and remembered.status == StepStatus.CANCELLED:
            # Deleted while the map waited for it; that was recorded, with this reason.
            outcomes.append((None, child_error(known)))
        elif child is not None and child.is_open and remembered.status != StepStatus.SUCCEEDED:
            # The first failure decided the map, and now the code asks for all outcomes.
            outcomes.append((None, child_error(remembered)))
        elif child is None or child.is_open:
            raise remembered.lost("outcome")
        else:
            known = known._replace(status=StepStatus(child.status), result=child.result, error=child.error)
            outcomes.append(outcome_of(known))
    return outcomes


def child_error(remembered: steps.Memory) -> ChildError:
    """Return the exception that a child's remembered outcome raises in its parent."""
    where: dict[str, Any] = {"step": remembered.name, "child_id": remembered.child_id}
    if remembered.status == StepStatus.TIMED_OUT:
        return ChildTimedOut(
            f"Child execution timed out after {remembered.timeout_seconds:g}s (step '{remembered.name}')", **where
        )
    failure = remembered.get_failure()
    if remembered.status == StepStatus.CANCELLED:
        reason = failure.message if remembered.error else "Cancelled"
        return ChildCancelled(f"Child execution was cancelled (step '{remembered.name}'): {reason}", **where)
    return ChildFailed(f"Child execution failed: {failure.message}", error_class=failure.type, **where)
