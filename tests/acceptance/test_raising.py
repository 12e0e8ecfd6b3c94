"""Whatever a body, its base class or a receiver raises is stored at once, with its traceback."""

from __future__ import annotations

from typing import Any

import pytest
from django.utils import timezone

from conductor_app import api, transitions
from conductor_app.exceptions import InvokeInsideTransaction, StepFailed, WorkerLost
from conductor_app.models import Execution, FailedExecution
from tests.app import endings, scenarios
from tests.app.ledger import count
from tests.support import invariants
from tests.support.bodies import class_name
from tests.support.messages import needs_a_broker, ring
from tests.support.polling import wait_until
from tests.support.watching import wait_for_body, wait_for_status
from tests.support.worker import pools

#: Far longer than a test: no lease that lapses, and no message that is published again, may bring an end about.
PATIENT = {"LEASE_SECONDS": 600, "REDISPATCH_SECONDS": 600}
#: So many seconds after a body has begun for the last time its error is stored, and its parent has heard of it.
AT_ONCE = 2.0

#: What stands in the stored traceback of each kind.
SHOWN = {
    "BaseException": "tests.app.endings.Panic: out of range",
    "CancelledError": "asyncio.exceptions.CancelledError",
    "GeneratorExit": "GeneratorExit",
    "SystemExit": "SystemExit: 3",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "args": "tests.app.endings.BadArgs",
    "text": "tests.app.endings.BadText",
    "pickle": "tests.app.endings.BadPickle: x",
    "notes": "tests.app.endings.BadNotes: x",
    "MemoryError": "MemoryError: an array of 1 TiB",
}


def failed(execution_id: Any) -> FailedExecution:
    row = wait_until(lambda: FailedExecution.objects.filter(pk=execution_id).first(), 30)
    assert row is not None
    return row


def seconds_since(key: str, execution_id: Any, failure: FailedExecution) -> float:
    from tests.app.models import Ledger

    begun = Ledger.objects.filter(key=key, execution_id=execution_id).latest("id").created_at
    return float((failure.failed_at - begun).total_seconds())


def alive() -> None:
    assert api.get_result(scenarios.pass_through.delay(value="alive"), timeout=30) == "alive"


@pools
def test_whatever_a_body_raises_is_its_attempts_error(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1, conductor=PATIENT)
    for kind in endings.RAISED:
        root = endings.raises.delay(kind=kind)
        failure = failed(root.id)
        assert SHOWN[kind] in failure.traceback, kind
        assert "raise RAISED[kind]()" in failure.traceback
        assert (failure.attempts, count("body", root.id)) == (2, 2), kind
        assert seconds_since("body", root.id, failure) < AT_ONCE
        if kind == "KeyboardInterrupt":
            assert failure.error_class == class_name(WorkerLost)
        else:
            assert failure.error_class == class_name(type(endings.RAISED[kind]()))
        wait_until(lambda root=root: root.state == "FAILURE")
        caught = api.get_result(endings.catches.delay(child=endings.raises.name, payload={"kind": kind}), timeout=30)
        assert caught["error_class"] == failure.error_class
        alive()
    assert started.is_alive
    invariants.check()


@pools
def test_whatever_a_plain_child_raises_reaches_its_parent(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1, conductor=PATIENT)
    # Celery itself logs the error of a plain task, and cannot if its notes misbehave. A MemoryError ends a solo worker.
    for kind in [kind for kind in endings.RAISED if kind not in ("notes", "MemoryError")]:
        caught = endings.catches.delay(child=endings.plain_raises.name, payload={"kind": kind})
        assert api.get_result(caught, timeout=30)["failed"].startswith("Child execution failed: "), kind
        child = Execution.objects.get(parent=caught.id)
        assert SHOWN[kind] in failed(child.pk).traceback, kind
        assert child.attempt == 1
        alive()
    invariants.check()


@pools
def test_what_stands_around_the_body_raises_for_the_attempt(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1, conductor=PATIENT)
    for task, key, shown in (
        (endings.call_raises, "call", "KeyError: 'tenant of __call__'"),
        (endings.before_start_raises, "before_start", "KeyError: 'tenant of before_start'"),
        (endings.receiver_raises, "", "tests.app.endings.Panic: of the receiver"),
    ):
        before, began = count(key) if key else 0, timezone.now()
        root = task.delay()
        failure = failed(root.id)
        assert shown in failure.traceback
        assert failure.attempts == 2
        assert key == "" or count(key) == before + 2
        assert (failure.failed_at - began).total_seconds() < 2 * AT_ONCE
        assert count("body", root.id) == 0
        caught = api.get_result(endings.catches.delay(child=task.name), timeout=30)
        assert caught["error_class"] == failure.error_class
        wait_until(lambda root=root: root.state == "FAILURE")
        alive()
    assert api.get_result(endings.call_returns.delay(), timeout=30) == {"cached": True}
    assert (
        api.get_result(endings.call_checks.apply_async(kwargs={"value": 1}, headers={"tenant": "a"}), timeout=30) == 1
    )
    invariants.check()


@pools
def test_a_transaction_around_the_body_is_refused_before_anything_is_lost_in_it(worker: Any, pool: str) -> None:
    worker(pool=pool, concurrency=1, conductor=PATIENT)
    for task in (endings.call_in_block, endings.before_start_in_block):
        root = task.delay()
        failure = failed(root.id)
        assert (failure.error_class, failure.attempts) == (class_name(InvokeInsideTransaction), 1)
        assert "an open transaction.atomic() block" in failure.message
        caught = api.get_result(endings.catches.delay(child=task.name), timeout=30)
        assert caught["error_class"] == failure.error_class
        alive()
        assert (count("body", root.id), count("lost")) == (0, 0)
    invariants.check()


def test_an_error_in_a_runs_own_last_write_is_the_attempts_error(worker: Any) -> None:
    worker(pool="prefork", concurrency=1, conductor=PATIENT)
    parent = endings.catches.delay(child=endings.finds_its_step_deleted.name)
    waiting = wait_for_body(endings.finds_its_step_deleted)
    wait_for_status(waiting.execution_id, "waiting")
    row = Execution.objects.get(pk=waiting.execution_id)
    row.steps.all().delete()
    assert transitions.wake_stranded(row.pk)
    caught = api.get_result(parent, timeout=30)
    assert caught["error_class"].endswith("OutcomeLost")
    assert "OutcomeLost" in failed(row.pk).traceback
    assert (failed(row.pk).attempts, count("body", row.pk)) == (1, 2)
    alive()


@needs_a_broker
def test_a_forged_message_uses_up_no_attempt(worker: Any) -> None:
    """What it says of arguments and headers is not what hooks and base classes see, and another task's does nothing."""
    due = endings.call_checks.apply_async(kwargs={"value": 1}, headers={"tenant": "a"}, countdown=4)
    started = worker(pool="prefork", concurrency=1, conductor={**PATIENT, "REDISPATCH_SECONDS": 2})
    ring(due.id, endings.before_start_raises)
    ring(due.id, endings.call_checks, headers={"tenant": "b"}, args=[7], kwargs={"nonsense": 1})
    wait_until(lambda: started.log.count("not queued, not due, held, of a paused task, or another run has it") >= 2)
    now = endings.call_checks.apply_async(kwargs={"value": 1}, headers={"tenant": "a"})
    ring(now.id, endings.call_checks, headers={"tenant": "b"}, args=[7], kwargs={"nonsense": 1})
    for result in (due, now):
        assert api.get_result(result, timeout=30) == 1
        assert (Execution.objects.get(pk=result.id).attempt, count("body", result.id)) == (1, 1)
    assert count("before_start") == 0
    invariants.check()


def test_eager_mode_ends_when_a_base_raises(transactional_db: None) -> None:
    for task in (endings.call_raises, endings.before_start_raises, endings.receiver_raises):
        result = task.apply()
        with pytest.raises((KeyError, StepFailed), match=r"tenant|receiver"):
            result.get()
        assert Execution.objects.get(pk=result.id).attempt == 2
