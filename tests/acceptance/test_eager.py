"""``.apply()`` on a database on which a worker lives: what the worker holds is nobody else's to decide."""

from __future__ import annotations

from typing import Any

from conductor_app import api
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.transitions.dispatch import is_embedded
from project.celery import app
from tests.app import plain, scenarios
from tests.support.polling import wait_until

DAY = 86_400


def rows() -> list[Any]:
    return [list(model.objects.order_by("pk").values()) for model in (Execution, Step, FailedExecution, Event)]


def test_apply_beside_a_worker_and_inside_of_it_decides_nothing_of_others(worker: Any) -> None:
    worker(pool="threads", concurrency=2)
    scenarios.waits_for_events.delay(1, timeout=3 * DAY)
    scenarios.naps.delay(DAY / 2)
    scenarios.echo.apply_async((1,), countdown=DAY, expires=DAY / 2)
    wait_until(lambda: Execution.objects.filter(status="waiting").count() == 2)
    before = rows()

    # In a process of its own, such as `manage.py shell`.
    assert scenarios.naps.apply((2 * DAY,)).get() == "rested"
    # In a plain task that a worker runs.
    if not is_embedded(app):
        assert plain.applies.delay(2 * DAY).get(timeout=60) == "rested"
    parent = plain.invokes.delay(child=plain.applies.name, payload={"seconds": 2 * DAY})
    assert api.get_result(parent, timeout=60) == {"child": "rested"}

    after = rows()
    for earlier, later in zip(before, after, strict=True):
        assert [row for row in later if row["id"] in {row["id"] for row in earlier}] == earlier
