"""What ``AsyncResult`` shows of an execution, with each kind of result backend."""

from __future__ import annotations

from typing import Any

import pytest
from celery import states
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from django_celery_results.models import TaskResult

from conductor_app import ChildFailed, api
from conductor_app.engine import announcements
from conductor_app.exceptions import ExecutionCancelled, ExecutionFailed
from conductor_app.host.inline import run_until_idle
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from project.celery import app
from tests.app import canvas, origin, scenarios
from tests.app.ledger import count, note
from tests.support import results
from tests.support.polling import wait_until

PATIENCE = 60


@results.backends
def test_async_result_follows_an_execution_through_its_suspensions(worker: Any, result_backend: str) -> None:
    with results.using(result_backend) as env:
        waiting = scenarios.parent_of_the_go.delay()
        cancelled = scenarios.naps.delay(86_400)
        assert (waiting.state, cancelled.state) == (states.PENDING, states.PENDING)
        with pytest.raises(CeleryTimeoutError):
            waiting.get(timeout=0.05)

        worker(env=env)
        failed = scenarios.grandparent_of_boom.delay()
        own_error = scenarios.boom.delay(message="no such card")
        none = scenarios.pass_through.delay(value=None)
        ignored = scenarios.pass_through.apply_async((1,), ignore_result=True)
        wait_until(lambda: waiting.state == cancelled.state == "SUSPENDED")
        # A backend outside of the database shows it before the suspension's commit.
        child = wait_until(Execution.objects.filter(parent_id=waiting.id).first)
        assert waiting.info == {"waiting_for": "go", "child": str(child.pk)}
        assert cancelled.info == {"waiting_for": "nap", "child": None}
        assert not waiting.ready()

        api.cancel(cancelled, reason="not today")
        with pytest.raises(TaskRevokedError, match="Cancelled: not today"):
            cancelled.get(timeout=PATIENCE)
        with pytest.raises(ChildFailed, match=r"^Child execution failed: Child execution failed: card declined$"):
            failed.get(timeout=PATIENCE)
        with pytest.raises(ValueError, match=r"^no such card$"):
            own_error.get(timeout=PATIENCE)
        note(None, "go")
        assert waiting.get(timeout=PATIENCE) == {"attempt": 1}
        assert none.get(timeout=PATIENCE) is None
        results.settled()

        roots = [waiting, cancelled, failed, own_error, none, ignored]
        assert [result.state for result in roots] == ["SUCCESS", "REVOKED", "FAILURE", "FAILURE", "SUCCESS", "PENDING"]
        assert api.get_result(ignored) == 1
        children = Execution.objects.filter(parent__isnull=False)
        assert children.count() >= 4
        assert {app.AsyncResult(str(pk)).state for pk in children.values_list("pk", flat=True)} == {states.PENDING}
        if result_backend == "django-db":
            stored = TaskResult.objects.values_list("task_id", flat=True)
            assert sorted(stored) == sorted(result.id for result in roots if result is not ignored)
        else:  # django-celery-results keeps tracebacks with CELERY_RESULT_EXTENDED alone
            assert "ValueError: no such card" in own_error.traceback


def test_an_operators_retry_makes_the_result_pending_again(db: None) -> None:
    result = canvas.fail_until_told.delay()
    run_until_idle(app)
    with pytest.raises(ValueError, match="nobody said go"):
        result.get(timeout=PATIENCE)
    assert result.state == states.FAILURE
    api.retry(result)
    result = app.AsyncResult(result.id)  # an AsyncResult keeps what it has seen
    assert result.state == states.PENDING
    note(None, "go")
    run_until_idle(app)
    assert (result.state, result.get(timeout=PATIENCE)) == (states.SUCCESS, "gone")
    assert TaskResult.objects.filter(task_id=result.id).count() == results.IN_DATABASE


def test_a_result_backend_that_is_away_does_not_stop_executions(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        calls.append(1)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(app.backend, "store_result", refuse)
    monkeypatch.setattr(announcements, "SLOW_SECONDS", 0)
    process.results_rest_until = 0.0
    running = [scenarios.pass_through.delay(value=value) for value in range(3)]
    run_until_idle(app)
    assert [api.get_result(result, timeout=0) for result in running] == [0, 1, 2]
    assert len(calls) == 1  # and then it was left alone
    monkeypatch.undo()
    process.results_rest_until = 0.0
    Execution.objects.filter(announce_at__isnull=False).update(announce_at=clock.now())
    run_until_idle(app)
    assert [result.get(timeout=PATIENCE) for result in running] == [0, 1, 2]


def test_without_a_result_backend_the_database_has_the_result(worker: Any) -> None:
    with results.using(results.DISABLED) as env:
        worker(env=env)
        succeeded = origin.quadruple.delay(value=5)
        failed = scenarios.parent_of_boom.delay()
        linked = canvas.pass_on.apply_async((1,), link=canvas.collect.s(key="linked"))
        cancelled = scenarios.naps.delay(86_400)
        wait_until(lambda: Execution.objects.get(pk=cancelled.id).status == "waiting")
        api.cancel(cancelled, reason="not today")
        assert api.get_result(succeeded, timeout=PATIENCE) == {"result": 20}
        assert api.get_result(linked, timeout=PATIENCE) == 1
        with pytest.raises(ExecutionFailed, match=r"^Child execution failed: card declined$"):
            api.get_result(failed, timeout=PATIENCE)
        with pytest.raises(ExecutionCancelled, match=r"^Cancelled: not today$"):
            api.get_result(cancelled, timeout=PATIENCE)
        results.settled()
    assert count("linked") == 1
    assert not TaskResult.objects.exists()
