"""Celery's soft time limit can end a body, and never what the engine does before and after it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from django.db import connection

from conductor_app.models import Execution
from tests.app import scenarios
from tests.app.ledger import count
from tests.support import history
from tests.support.messages import deliver, doorbell

pytestmark = pytest.mark.usefixtures("recorded")


Statement = Callable[[str, tuple[Any, ...]], bool]


@pytest.fixture
def limit_at(transactional_db: None) -> Iterator[Callable[[Statement], Any]]:
    """A function that lets the limit come with a statement that it recognizes, as a context manager."""

    def come(_number: int, _frame: Any) -> None:
        raise SoftTimeLimitExceeded

    @contextmanager
    def at(is_the_one: Statement) -> Iterator[None]:
        found: list[str] = []

        def execute(run: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            result = run(sql, params, many, context)
            if is_the_one(sql, tuple(params.values() if isinstance(params, dict) else params or ())):
                found.append(sql)
                os.kill(os.getpid(), signal.SIGUSR1)
            return result

        with connection.execute_wrapper(execute):
            yield
        assert found, "no such statement"

    before = signal.signal(signal.SIGUSR1, come)
    yield at
    signal.signal(signal.SIGUSR1, before)


def sets(status: str) -> Statement:
    """Recognize the statement that gives an execution this status."""

    def is_the_one(sql: str, params: tuple[Any, ...]) -> bool:
        assignments, where, _condition = sql.partition(" WHERE ")
        if re.search(rf"\bstatus\W? = '{status}'", assignments):
            return True
        return bool(where) and sql.startswith("UPDATE") and status in params[: assignments.count("%s")]

    return is_the_one


@pytest.mark.parametrize(
    ("task", "kwargs", "status", "states"),
    [
        (scenarios.echo, {"value": 1}, "succeeded", ["SUCCESS"]),
        (scenarios.boom, {}, "failed", ["FAILURE"]),
        (scenarios.pass_through, {"value": 1}, "waiting", ["SUSPENDED"]),
        (scenarios.flaky, {"failures": 1}, "queued", []),
    ],
)
def test_a_limit_that_comes_while_an_outcome_is_stored_does_not_undo_it(
    limit_at: Callable[[Statement], Any], task: Any, kwargs: dict[str, Any], status: str, states: list[str]
) -> None:
    result = task.delay(**kwargs)
    with limit_at(sets(status)):
        deliver(task, result.id, **doorbell())
    assert Execution.objects.get(pk=result.id).status == status
    assert history.celery_states().get(result.id, []) == states
    assert count("body", result.id) == 1


def test_a_limit_that_comes_while_an_execution_is_claimed_ends_its_body(limit_at: Callable[[Statement], Any]) -> None:
    result = scenarios.flaky.delay(failures=0)
    with limit_at(sets("running")):
        deliver(scenarios.flaky, result.id, **doorbell())
    execution = Execution.objects.get(pk=result.id)
    assert (execution.status, execution.attempt, count("body", result.id)) == ("queued", 2, 0)
    assert "SoftTimeLimitExceeded" in (execution.error or "")
    assert history.celery_states() == {}


def test_a_limit_that_comes_while_a_step_is_recorded_is_raised_after_it(
    limit_at: Callable[[Statement], Any],
) -> None:
    result = scenarios.step_by_step.delay(steps=3, pause=0)
    with limit_at(lambda sql, params: "INSERT" in sql and "step-0" in params):
        deliver(scenarios.step_by_step, result.id, **doorbell())
    execution = Execution.objects.get(pk=result.id)
    assert (execution.status, execution.attempt) == ("queued", 2)
    assert "SoftTimeLimitExceeded" in (execution.error or "")
    assert [step.name for step in execution.steps.all()] == ["step-0"]
