"""Who counts ends by Celery's signals hears of each execution's end once, whoever has brought it about."""

from __future__ import annotations

from typing import Any

from conductor_app.models import Execution
from project.celery import app
from tests.app import plain, scenarios
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import invariants, results
from tests.support.polling import wait_until

TRACKING = "tests.support.tracking_app"
SIGNALS = ("task_success", "task_failure", "task_revoked")


def told() -> dict[str, list[str]]:
    """What was told of each execution, by its task's name."""
    lines = Ledger.objects.filter(key__in=SIGNALS).values_list("execution_id", "key")
    tasks = {str(pk): task for pk, task in Execution.objects.values_list("pk", "task")}
    found: dict[str, list[str]] = {task: [] for task in tasks.values()}
    for execution_id, signal in lines:
        found[tasks[str(execution_id)]].append(signal)
    return found


def ended(execution: Any) -> bool:
    return bool(Execution.objects.get(pk=execution.id).is_final)


def test_a_killed_process_and_a_timeout_are_told_of_once(worker: Any) -> None:
    started = worker(app=TRACKING, concurrency=2)
    killed = plain.invokes.delay(child=plain.kills_its_process.name, payload={"times": 9})
    late = plain.catches.delay(child=scenarios.naps.name, payload={"seconds": 90}, timeout=1)
    wait_until(lambda: ended(killed) and ended(late), 60)
    invariants.check()
    wait_until(lambda: all(len(signals) == 1 for signals in told().values()), message=lambda: f"Told: {told()}")
    assert told() == {
        plain.invokes.name: ["task_failure"],
        plain.kills_its_process.name: ["task_failure"],
        plain.catches.name: ["task_success"],
        scenarios.naps.name: ["task_revoked"],
    }
    assert started.is_alive


@results.needs_broker
def test_what_is_terminated_is_told_of_once(worker: Any) -> None:
    worker(app=TRACKING, concurrency=3)
    durable = scenarios.slow.delay(seconds=90)
    parent = plain.invokes.delay(child=plain.slow.name, payload={"seconds": 90})
    wait_until(lambda: count("body", durable.id) and count("plain"), 40)
    child = Execution.objects.get(parent_id=parent.id)
    app.control.revoke([durable.id, str(child.pk)], terminate=True)
    wait_until(lambda: ended(durable) and ended(parent), 60)
    invariants.check()
    wait_until(lambda: all(told().values()), message=lambda: f"Told: {told()}")
    assert told() == {
        scenarios.slow.name: ["task_revoked"],
        plain.slow.name: ["task_revoked"],
        plain.invokes.name: ["task_failure"],
    }
