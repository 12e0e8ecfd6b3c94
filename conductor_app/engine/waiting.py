"""Waiting for an end: how often to look, what it means, and where it can never be seen.

That is in the transaction that created the execution, or in a snapshot.
"""

from __future__ import annotations

import uuid
from typing import Any

from celery.result import AsyncResult
from django.db import router

from conductor_app.exceptions import ExecutionCancelled, ExecutionFailed, WaitInsideTransaction
from conductor_app.models import Execution, database
from conductor_app.states import FINAL_STATUSES, ExecutionStatus
from conductor_app.store.ids import of_task_id
from conductor_app.store.opened import is_in_test_alone, is_transaction, snapshot_level, was_created_here

#: Whoever waits for an end asks the database after these pauses, in seconds; the last one repeats.
PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def result_of(execution: Execution) -> Any:
    """Return the result of an execution that is final.

    Raises:
        ExecutionFailed, ExecutionCancelled, OutcomeLost: It has none.
    """
    if execution.status == ExecutionStatus.FAILED:
        raise ExecutionFailed(execution.error_message)
    if execution.status == ExecutionStatus.CANCELLED:
        raise ExecutionCancelled(execution.error_message)
    return execution.get_result()


def late(execution: Execution, timeout: float) -> TimeoutError:
    """Return the error of whoever has waited for so many seconds."""
    return TimeoutError(
        f"Execution {execution.pk} is still {execution.status} after {timeout:g}s. It goes on; wait again."
    )


def missing(execution_id: uuid.UUID) -> Exception:
    """Return the error of an id that no execution has."""
    return Execution.DoesNotExist(
        f"There is no execution {execution_id}. Was its transaction rolled back, or has it been pruned?"
    )


def check_wait(execution: Execution, timeout: float | None) -> None:
    """Raise if the current transaction can never see the end of an execution that has not ended.

    Args:
        execution: It is not final.
        timeout: Seconds to wait for it. In the transaction of a ``TestCase`` alone, they may pass.

    Raises:
        WaitInsideTransaction: It cannot.
    """
    if timeout == 0 or (timeout is not None and is_in_test_alone(database())):
        return
    if was_created_here(database(), execution.pk):
        raise WaitInsideTransaction(
            f"Execution {execution.pk} was created in this transaction: nobody runs it before the commit, so waiting "
            "for it here can never succeed. Wait after the commit, outside of transaction.atomic()."
        )
    level = snapshot_level(database())
    if level:
        raise WaitInsideTransaction(
            f"This transaction ({level}) sees the database as it was at its beginning, so it can never see the end of "
            f"execution {execution.pk}. Wait outside of transaction.atomic()."
        )


def check_wait_for_result(result: AsyncResult[Any], timeout: float | None) -> None:
    """Raise if a result, or what it comes after in its chain, can never come in the current transaction.

    Raises:
        WaitInsideTransaction: It cannot.
    """
    if timeout == 0 or is_transaction(database()):
        return
    model = getattr(result.backend, "TaskModel", None)
    reads_database = model is not None and router.db_for_read(model) == database()
    ids = [key for key in _ids(result) if reads_database or was_created_here(database(), key)]
    rows = Execution.objects.using(database()).filter(pk__in=ids).exclude(status__in=sorted(FINAL_STATUSES))
    for execution in rows.only("id"):
        check_wait(execution, timeout)


def _ids(result: Any) -> list[uuid.UUID]:
    """Return the ids of the executions on which a result depends."""
    found: list[uuid.UUID] = []
    while result is not None:
        members = getattr(result, "results", None) or [result]
        found += [getattr(one, "execution_id", None) or of_task_id(one.id) for one in members]
        result = result.parent
    return found
