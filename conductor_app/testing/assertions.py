"""Say what has to have become of an execution. A failure says what it really is, and why."""

from __future__ import annotations

from typing import Any

from celery import Task

from conductor_app.api import ExecutionRef, find
from conductor_app.exceptions import class_path
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.telling.headlines import headline
from conductor_app.telling.situation import Situation
from conductor_app.transitions import kinds
from conductor_app.values.failures import load_failure, revive
from conductor_app.values.payloads import round_trip
from conductor_app.values.texts import shown

#: How many children of a map a failure shows.
_SHOWN_CHILDREN = 5


class _Anything:
    """Stands for an argument that was not given."""

    def __repr__(self) -> str:
        return "..."


ANYTHING: Any = _Anything()


def assert_succeeded(execution: ExecutionRef, *, result: object = ANYTHING) -> Execution:
    """Assert that an execution has succeeded.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        result: Its result, as JSON has it: a tuple equals a list.

    Returns:
        The execution as it is stored now.

    Raises:
        AssertionError: It has not, or its result is another one.
        Execution.DoesNotExist: There is none.
    """
    row = _with_status(execution, ExecutionStatus.SUCCEEDED)
    if result is not ANYTHING and row.get_result() != _stored(result, "result"):
        raise _error(row, f"succeeded with the result {shown(row.get_result(), 500)}, expected {shown(result, 500)}")
    return row


def assert_failed(
    execution: ExecutionRef,
    *,
    message: str | None = None,
    error_class: type[Exception] | str | None = None,
    step: str | None = None,
) -> Execution:
    """Assert that an execution has failed for good.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        message: Text that its error message contains.
        error_class: The class of its error (or a base class of it), or the class's dotted or short name.
        step: The step at which it failed, if the failure is a child's.

    Returns:
        The execution as it is stored now.

    Raises:
        AssertionError: It has not, or it failed in another way.
        Execution.DoesNotExist: There is none.
    """
    row = _with_status(execution, ExecutionStatus.FAILED)
    failure = load_failure(row.error)
    if message is not None and message not in failure.message:
        raise _error(
            row, f"failed with the message {shown(failure.message, 500)}, expected {shown(message, 500)} in it"
        )
    if error_class is not None and not _is_class(failure.type, row, error_class):
        expected = error_class if isinstance(error_class, str) else error_class.__qualname__
        raise _error(row, f"failed with {failure.type}, expected {expected}")
    if step is not None:
        own = FailedExecution.objects.using(database()).get(pk=row.pk)
        if own.step != step:
            at = f'at step "{own.step}"' if own.step else "by itself, not at a step"
            raise _error(row, f'failed {at}, expected step "{step}"')
    return row


def assert_cancelled(execution: ExecutionRef, *, reason: str | None = None) -> Execution:
    """Assert that an execution was cancelled.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        reason: Text that the stored reason contains.

    Returns:
        The execution as it is stored now.

    Raises:
        AssertionError: It was not, or for another reason.
        Execution.DoesNotExist: There is none.
    """
    row = _with_status(execution, ExecutionStatus.CANCELLED)
    if reason is not None and reason not in row.error_message:
        raise _error(row, f"was cancelled with {shown(row.error_message, 500)}, expected {shown(reason, 500)} in it")
    return row


def assert_waiting(execution: ExecutionRef, *, step: str | None = None) -> Execution:
    """Assert that an execution is suspended.

    Args:
        execution: The execution, its id, or its ``AsyncResult``.
        step: The step that it waits for.

    Returns:
        The execution as it is stored now.

    Raises:
        AssertionError: It is not, or it waits for another step.
        Execution.DoesNotExist: There is none.
    """
    row = _with_status(execution, ExecutionStatus.WAITING)
    pending = Step.objects.using(database()).filter(execution_id=row.pk, status=StepStatus.PENDING)
    names = list(pending.order_by("id").values_list("name", flat=True))
    if step is not None and step not in names:
        raise _error(row, f'waits for {_quoted(names)}, expected step "{step}"')
    return row


def assert_invoked(
    execution: ExecutionRef, step: str, *, task: Task[Any, Any] | str | None = None, payload: object = ANYTHING
) -> Execution:
    """Assert that an execution has invoked a child, whatever became of it.

    Args:
        execution: The parent, its id, or its ``AsyncResult``.
        step: Name of the step of ``ctx.invoke``, ``ctx.map`` or ``ctx.start``.
        task: The child's task, or its name.
        payload: The child's payload, in the form in which ``ctx.invoke`` takes it; of a map, that of any of its
            children.

    Returns:
        The child as it is stored now; of a map, the first one that fits.

    Raises:
        AssertionError: It has not, or with another task or payload.
        Execution.DoesNotExist: There is no such parent.
    """
    row = find(execution)
    children = list(Execution.objects.using(database()).filter(parent_id=row.pk, step=step).order_by("position"))
    if not children:
        with_children = kinds.those(lambda kind: kind.has_child or kind.has_children)
        invoked = Step.objects.using(database()).filter(execution_id=row.pk, kind__in=with_children)
        raise _error(
            row, f'has invoked {_quoted(list(invoked.order_by("id").values_list("name", flat=True)))}, not "{step}"'
        )
    if task is not None:
        name = task if isinstance(task, str) else task.name
        if children[0].task != name:
            raise _error(row, f'has invoked {children[0].task} as step "{step}", expected {name}')
    if payload is ANYTHING:
        return children[0]
    for child in children:
        if _is_payload(child, payload):
            return child
    given = ", ".join(_arguments(child) for child in children[:_SHOWN_CHILDREN])
    more = f" and {len(children) - _SHOWN_CHILDREN} more" if len(children) > _SHOWN_CHILDREN else ""
    raise _error(row, f'has invoked step "{step}" with {given}{more}, expected {shown(payload, 500)}')


# ------------------------------------------------------------------------------------------------------------- insides


def _with_status(execution: ExecutionRef, status: ExecutionStatus) -> Execution:
    row = find(execution)
    if row.status != status:
        raise _error(row, f"is {row.status}, expected {status}")
    return row


def _error(execution: Execution, what: str) -> AssertionError:
    using = database()
    tree = Execution.objects.using(using).filter(root_id=execution.root_id).in_bulk()
    steps = list(Step.objects.using(using).filter(execution_id=execution.pk).order_by("id"))
    failures = FailedExecution.objects.using(using).filter(execution__root_id=execution.root_id).in_bulk()
    now = clock.read(using)
    told = headline(Situation(execution, now, steps, tree, failures))
    lines = [f"{execution.task} {execution.pk} {what}.", *str(told).splitlines()]
    own = failures.get(execution.pk)
    if own is not None:
        cause = failures.get(own.root_cause_id, own) if own.root_cause_id else own
        lines += ["", cause.traceback.rstrip()]
    return AssertionError("\n".join(lines))


def _stored(value: object, what: str) -> Any:
    return round_trip(value, what)[1]


def _is_class(name: str, execution: Execution, expected: type[Exception] | str) -> bool:
    if isinstance(expected, str):
        return expected in (name, name.rpartition(".")[2])
    return name == class_path(expected) or isinstance(revive(load_failure(execution.error)), expected)


def _is_payload(child: Execution, payload: object) -> bool:
    stored = _stored(payload, "payload")
    if stored is None:
        return (child.args, child.kwargs) == ([], {})
    if isinstance(stored, dict) and not child.args:
        return child.kwargs == stored
    return (child.args, child.kwargs) == ([stored], {})


def _arguments(child: Execution) -> str:
    given = [shown(value, 200) for value in child.args]
    given += [f"{name}={shown(value, 200)}" for name, value in child.kwargs.items()]
    return f"({', '.join(given)})"


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "nothing"
