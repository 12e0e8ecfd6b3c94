"""An operation outlives every process that works it off, and acts on each execution once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conductor_app import transitions
from conductor_app.models import Execution, Operation, OperationItem
from conductor_app.states import OperationKind
from conductor_app.transitions import operating
from conductor_app.transitions.operating import By
from tests.support.executions import FAILURE, claimed, queued
from tests.support.polling import wait_until
from tests.support.worker import Worker

pytestmark = pytest.mark.usefixtures("recorded")

MANY = 150


@pytest.mark.parametrize("kind", [OperationKind.RERUN, OperationKind.RETRY])
def test_an_operation_goes_on_once_after_everything_was_killed(worker: Callable[..., Worker], kind: Any) -> None:
    for _ in range(MANY):
        transitions.fail(claimed(queued()), FAILURE)
    operation = operating.start(kind, Execution.objects.all(), By("ana"))
    decided = OperationItem.objects.filter(operation=operation).exclude(state="pending")
    first = worker()
    wait_until(lambda: decided.count() >= 5, timeout=20)
    first.kill()
    assert decided.count() < MANY
    worker()
    wait_until(lambda: Operation.objects.filter(finished_at__isnull=False).exists(), timeout=40)
    operation.refresh_from_db()
    assert (operation.done, operation.refused, operation.failed) == (MANY, 0, 0)
    wait_until(lambda: not Execution.objects.open().exists(), timeout=40)
    number = {OperationKind.RERUN: 2 * MANY, OperationKind.RETRY: MANY}[kind]
    assert Execution.objects.count() == number
    assert Execution.objects.filter(status="succeeded").count() == MANY
