"""``delay`` and its relatives: inside transactions, after commits, and in Celery's eager mode."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group, states
from celery.result import EagerResult
from django.db import transaction
from django_celery_results.models import TaskResult

from conductor_app import ChildFailed, api
from conductor_app.models import Execution
from project.celery import app
from tests.app import canvas, origin, scenarios
from tests.app.ledger import count


@pytest.fixture
def eager(db: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    assert not app.conf.task_always_eager  # and reading it loads the settings
    monkeypatch.setitem(app.conf.changes, "task_always_eager", True)
    return monkeypatch


@pytest.mark.django_db(transaction=True)
def test_an_execution_is_part_of_the_callers_transaction() -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        scenarios.echo.delay(1)
        assert Execution.objects.count() == 1
        raise RuntimeError("roll back")
    assert Execution.objects.count() == 0

    with transaction.atomic():
        kept = scenarios.echo.delay(1)
        with pytest.raises(RuntimeError), transaction.atomic():
            scenarios.echo.delay(2)
            raise RuntimeError("roll back to the savepoint")
    assert str(Execution.objects.get().pk) == kept.id


@pytest.mark.django_db(transaction=True)
def test_on_commit_variants_store_the_execution_after_the_commit() -> None:
    with transaction.atomic():
        scenarios.echo.delay_on_commit(1)
        scenarios.echo.apply_async_on_commit((2,), countdown=60)
        assert Execution.objects.count() == 0
    assert sorted(row.args for row in Execution.objects.all()) == [[1], [2]]

    with pytest.raises(RuntimeError), transaction.atomic():
        scenarios.echo.delay_on_commit(3)
        raise RuntimeError("roll back")
    assert Execution.objects.count() == 2

    scenarios.echo.delay_on_commit(4)  # outside of a transaction: now
    assert Execution.objects.count() == 3


def test_eager_mode_runs_the_whole_tree_in_the_call(eager: pytest.MonkeyPatch) -> None:
    result = origin.process_order.delay(order_id=7)
    assert isinstance(result, EagerResult)
    assert (result.state, result.get()) == (states.SUCCESS, {"success": True})
    assert count("body", result.id) == 4
    assert api.get_result(result.id) == {"success": True}
    assert scenarios.naps.delay(3_600).get() == "rested"  # without waiting
    assert scenarios.flaky.delay(failures=2).get() == 3

    failed = scenarios.parent_of_boom.delay()
    assert failed.state == states.FAILURE
    with pytest.raises(ChildFailed, match=r"^Child execution failed: card declined$"):
        failed.get()
    assert TaskResult.objects.count() == 0  # as in Celery's own eager mode


def test_eager_mode_raises_what_fails_if_told_to(eager: pytest.MonkeyPatch) -> None:
    eager.setitem(app.conf.changes, "task_eager_propagates", True)
    with pytest.raises(ChildFailed, match="card declined"):
        scenarios.parent_of_boom.delay()
    with pytest.raises(ValueError, match="card declined"):
        scenarios.boom.delay()
    assert scenarios.compensates.delay().get() == {"caught": "Child execution failed: card declined"}


def test_eager_mode_can_store_results(eager: pytest.MonkeyPatch) -> None:
    eager.setitem(app.conf.changes, "task_store_eager_result", True)
    result = scenarios.pass_through.delay(value=1)
    assert app.AsyncResult(result.id).get(timeout=1) == 1
    assert TaskResult.objects.count() == 1


def test_eager_mode_knows_canvases_and_callbacks(eager: pytest.MonkeyPatch) -> None:
    assert chain(canvas.pass_on.s(1), canvas.plain_add.s(2), canvas.pass_on.s()).apply_async().get() == 3
    assert group(canvas.pass_on.s(1), canvas.pass_on.s(2)).apply_async().get() == [1, 2]
    assert chord([canvas.pass_on.s(1), canvas.plain_add.s(1, 1)], canvas.add_up.s()).apply_async().get() == 3
    canvas.pass_on.apply_async((5,), link=[canvas.collect.s(key="linked"), canvas.plain_collect.s(key="linked plain")])
    canvas.fail_late.apply_async((5,), link_error=[canvas.collect_error.s(key="error"), canvas.plain_error.s(key="p")])
    assert [count(key) for key in ("linked", "linked plain", "error", "p")] == [1, 1, 1, 1]


def test_apply_runs_the_whole_tree_in_this_process(db: None) -> None:
    result: Any = origin.process_order.apply(kwargs={"order_id": 7})
    assert (result.state, result.get()) == (states.SUCCESS, {"success": True})
    failed = scenarios.grandparent_of_boom.apply()
    assert failed.state == states.FAILURE
    with pytest.raises(ChildFailed):
        failed.get()
    with pytest.raises(ValueError, match="card declined"):
        scenarios.boom.apply(throw=True)
    assert chain(canvas.pass_on.s(1), canvas.pass_on.s()).apply().get() == 1
