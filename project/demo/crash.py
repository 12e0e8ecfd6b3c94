"""The crash: one pool process, killed in the middle of an execution, at the worst moment that can be found."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.utils import timezone

from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from project.demo.batch import Batch
from project.demo.worker import Worker
from project.shop.models import BankCall, Order
from project.shop.tasks import charge


@dataclass(frozen=True)
class Crash:
    """Which process was killed, when, and what it was doing."""

    pid: int
    at: datetime
    execution_id: UUID
    root_id: UUID
    task: str
    order: Order
    #: The bank had charged the card, and nobody had noted it.
    bank_had_charged: bool


def kill_a_process(batch: Batch, worker: Worker, *, patience: float = 5) -> Crash | None:
    """Kill a pool process of ``worker`` with SIGKILL, while it runs an execution.

    For ``patience`` seconds, look for one that has charged a card and not noted it yet, for an order of several items:
    it will be drawn. After that any will do.

    Returns:
        What was killed; ``None`` if no execution was running, which the caller may try again.
    """
    give_up_at = time.monotonic() + patience
    while True:
        is_patient = time.monotonic() < give_up_at
        for execution in _running(batch, worker):
            order = batch.orders[execution.root_id]
            if is_patient and not (_has_charged_unnoted(execution, order) and order.items.count() > 1):
                continue
            if crash := _kill_if_still_running(execution, order, must_have_charged=is_patient):
                return crash
        if not is_patient:
            return None
        time.sleep(0.002)


def _running(batch: Batch, worker: Worker) -> list[Execution]:
    owned = batch.executions.filter(status=ExecutionStatus.RUNNING, lease_owner__startswith=f"{worker.name}@")
    return [execution for execution in owned if _pid(execution) != worker.pid]


def _kill_if_still_running(execution: Execution, order: Order, *, must_have_charged: bool) -> Crash | None:
    pid = _pid(execution)
    try:
        # Stop it, then look again: what was true when the row was read may be over.
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return None
    has_charged = _has_charged_unnoted(execution, order)
    held = Execution.objects.held_by(execution)
    if not held.exists() or (must_have_charged and not has_charged):
        os.kill(pid, signal.SIGCONT)
        return None
    os.kill(pid, signal.SIGKILL)
    return Crash(pid, timezone.now(), execution.pk, execution.root_id, execution.task, order, has_charged)


def _has_charged_unnoted(execution: Execution, order: Order) -> bool:
    return (
        execution.task == charge.name
        and BankCall.objects.filter(order_number=order.number, answer=BankCall.Answer.CHARGED).exists()
        and not execution.steps.filter(name="call-bank").exists()
    )


def _pid(execution: Execution) -> int:
    return int(execution.lease_owner.rpartition("/")[2])
