"""What the result backend shows of an execution that has not ended: ``REPORTED_STATE``, and what its body says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult

from conductor_app import ExecutionContext
from conductor_app.store import clock
from tests.support.bodies import advance, durable, go_on, reload
from tests.support.results import using

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def result_backend() -> Iterator[None]:
    with using("django-db"):
        yield
    clock.reset()


@durable
def naps(ctx: ExecutionContext) -> str:
    ctx.sleep("nap", 60)
    return "rested"


@durable(max_retries=1, retry_backoff=False, default_retry_delay=1)
def tells(ctx: ExecutionContext) -> str:
    ctx.sleep("first", 60)
    ctx.task.update_state(state="PROGRESS", meta={"done": 1})
    ctx.sleep("second", 60)
    ctx.task.update_state(ctx.task.request.id, "PROGRESS", {"done": 2})
    if ctx.attempt == 1:
        raise ValueError("again")
    ctx.sleep("third", 60)
    return "done"


def shown(result: Any) -> tuple[str, Any]:
    """What a fresh look at the result backend says."""
    seen = AsyncResult(result.id)
    return seen.state, seen.info


@pytest.mark.parametrize("state", ["SUSPENDED", "STARTED"])
def test_an_execution_that_waits_is_shown_in_the_projects_word_for_it(settings: Any, state: str) -> None:
    if state != "SUSPENDED":
        settings.CONDUCTOR = {**settings.CONDUCTOR, "REPORTED_STATE": state}
    result = naps.delay()
    go_on()
    assert shown(result) == (state, {"waiting_for": "nap", "child": None})
    advance(61)
    assert shown(result) == ("SUCCESS", "rested")


def test_what_a_body_says_stays_while_it_waits_and_does_not_go_backwards(monkeypatch: Any) -> None:
    told: list[tuple[str, Any]] = []
    backend = tells.backend
    store = backend.store_result

    def note(task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        told.append((state, result))
        return store(task_id, result, state, *args, **kwargs)

    monkeypatch.setattr(backend, "store_result", note)
    result = tells.delay()
    go_on()
    assert shown(result)[0] == "SUSPENDED"
    advance(61)
    assert shown(result) == ("PROGRESS", {"done": 1})
    advance(61)
    assert shown(result) == ("PROGRESS", {"done": 2})
    advance(2)
    assert (reload(result).attempt, reload(result).status) == (2, "waiting")
    assert shown(result) == ("PROGRESS", {"done": 2})
    advance(61)
    assert shown(result) == ("SUCCESS", "done")
    assert [info["done"] for state, info in told if state == "PROGRESS"] == [1, 2, 2]


def test_a_body_may_say_something_of_another_task() -> None:
    @durable
    def tells_of_another(ctx: ExecutionContext, other: str) -> None:
        ctx.task.update_state(other, "PROGRESS", {"done": 1})
        ctx.sleep("nap", 60)

    other = naps.delay()
    result = tells_of_another.delay(other=other.id)
    assert shown(other)[0] == "PENDING"
    go_on()
    assert shown(result)[0] == "SUSPENDED"
