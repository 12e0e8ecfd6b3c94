"""What a newer version has stored is left to newer workers, and no attempt is used up."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from celery import current_app
from celery.app.trace import build_tracer

from conductor_app import ExecutionContext
from conductor_app.engine import sweeper
from conductor_app.host import durable_runs
from conductor_app.models import Execution, Step
from conductor_app.store import clock
from conductor_app.transitions import dispatch
from tests.app.scenarios import echo
from tests.support.bodies import durable, go_on, reload

pytestmark = pytest.mark.django_db

#: A mark of a later format, and a type of a later kombu.
NEWER = ["#2:[[],{}]", '{"__type__":"timedelta","__value__":3}']


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


def deliver(task: Any, execution: Execution) -> None:
    """Run one delivery as a worker does."""
    app: Any = current_app._get_current_object()  # type: ignore[attr-defined]
    tracer = durable_runs.guard(task, build_tracer(task.name, task, app=app))
    headers = {dispatch.HEADER: dispatch.DOORBELL, "is_eager": False}
    tracer(str(execution.pk), [], {}, {"id": str(execution.pk), "hostname": "w1@host", "delivery_info": {}, **headers})


@pytest.mark.parametrize("text", NEWER)
def test_an_execution_whose_payload_is_newer_is_put_off(text: str) -> None:
    result = echo.delay(1)
    payload = reload(result).payload
    Execution.objects.filter(pk=result.id).update(payload=text)
    deliver(echo, reload(result))
    row = reload(result)
    assert (row.status, row.attempt) == ("queued", 1)
    assert "unknown here) on worker w1@host" in row.put_off_because
    # A newer worker, which reads it.
    Execution.objects.filter(pk=result.id).update(payload=payload)
    clock.shift(dt.timedelta(seconds=2))
    go_on()
    assert (reload(result).status, reload(result).attempt) == ("succeeded", 1)


@pytest.mark.parametrize("text", NEWER)
@pytest.mark.parametrize("column", ["result", "error"])
def test_a_run_that_comes_upon_a_newer_outcome_is_put_off(text: str, column: str) -> None:
    caught: list[BaseException] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        try:
            ctx.step("one", int)
        except BaseException as error:
            caught.append(error)
            raise
        ctx.sleep("nap", 1)
        return "done"

    result = body.delay()
    deliver(body, reload(result))
    before = Step.objects.values().get(name="one")
    newer: dict[str, Any] = {column: text, "status": "failed" if column == "error" else "succeeded"}
    Step.objects.filter(name="one").update(**newer)
    clock.shift(dt.timedelta(seconds=2))
    sweeper.sweep(publish=False)
    assert reload(result).status == "queued"
    deliver(body, reload(result))
    row = reload(result)
    assert (row.status, row.attempt) == ("queued", 1), row.error_message
    assert "recorded outcomes cannot all be read" in row.put_off_because
    assert not any(isinstance(error, Exception) for error in caught), "out of the body's reach"
    Step.objects.filter(name="one").update(**{name: before[name] for name in newer})
    clock.shift(dt.timedelta(seconds=5))
    go_on()
    assert (reload(result).status, reload(result).attempt) == ("succeeded", 1)


def test_where_there_is_no_other_worker_it_fails() -> None:
    result = echo.delay(1)
    Execution.objects.filter(pk=result.id).update(payload=NEWER[0])
    go_on()
    row = reload(result)
    assert (row.status, row.attempt) == ("failed", 1)
    assert "format '#2:[[],{'" in row.error_message
