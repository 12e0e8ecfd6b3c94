"""Old trees go whole, or not at all."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from conductor_app import transitions
from conductor_app.engine import pruner
from conductor_app.engine.pruner import prune
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.store import clock
from tests.support.executions import FAILURE, claimed, family, fresh, invoke, queued, running, step_of

pytestmark = pytest.mark.django_db

DAY = dt.timedelta(days=1)


def age(execution: Execution, days: float) -> Execution:
    """Let it have ended that long ago."""
    Execution.objects.filter(pk=execution.pk).update(finished_at=clock.after(-days * 86_400))
    return execution


def finished(days: float = 2, **fields: Any) -> Execution:
    run = running(**fields)
    transitions.succeed(run, "1")
    return age(run, days)


def finished_tree(days: float = 2) -> list[Execution]:
    """Root, child and grandchild; the child failed, and the root caught it."""
    root = running()
    child = claimed(invoke(root))
    grandchild = claimed(invoke(child))
    transitions.record_step(grandchild, "charge", result="1")
    transitions.succeed(grandchild, "1")
    child = claimed(child)
    transitions.fail(child, FAILURE, step="child", child_id=grandchild.pk)
    transitions.succeed(claimed(root), "1")
    return [age(execution, days) for execution in (root, child, grandchild)]


def test_a_tree_goes_with_its_steps_and_failures() -> None:
    finished_tree()
    young = finished_tree(days=0.5)
    assert prune(DAY) == 3
    assert set(Execution.objects.values_list("pk", flat=True)) == {execution.pk for execution in young}
    assert set(Step.objects.values_list("execution_id", flat=True)) == {execution.pk for execution in young}
    assert FailedExecution.objects.get().pk == young[1].pk
    assert prune(DAY) == 0


def test_the_end_of_the_root_counts() -> None:
    root, child = family()
    transitions.succeed(child, "1")
    age(child, 100)
    assert prune(DAY) == 0, "the root waits"
    transitions.succeed(claimed(root), "1")
    assert prune(DAY) == 0, "the root has just ended"
    age(root, 2)
    assert prune(DAY) == 2


def test_a_tree_with_an_open_descendant_stays() -> None:
    root, child = family(timeout=60, on_timeout="abandon")
    Step.objects.update(deadline_at=clock.after(-1))
    transitions.decide_overdue(step_of(root))
    transitions.succeed(claimed(root), "1")
    age(root, 100)
    assert prune(DAY) == 0
    transitions.succeed(child, "1")
    assert prune(DAY) == 2


def test_what_is_open_stays_however_old() -> None:
    queued(), running(), family()
    Execution.objects.update(created_at=clock.after(-1_000 * 86_400))
    assert prune(DAY) == 0
    assert Execution.objects.count() == 4


def test_failed_trees_can_be_kept() -> None:
    failed = running()
    transitions.fail(failed, FAILURE)
    age(failed, 100)
    finished()
    assert prune(DAY, keep_failed=True) == 1
    assert fresh(failed).status == "failed"
    assert prune(DAY) == 1


def test_a_dry_run_counts_whole_trees_and_deletes_nothing() -> None:
    finished_tree()
    finished_tree(days=0)
    assert prune(DAY, dry_run=True) == 3
    assert Execution.objects.count() == 6


def test_many_trees_go_batch_by_batch() -> None:
    for _ in range(5):
        finished()
    finished(days=0)
    assert prune(DAY, batch=2) == 5
    assert Execution.objects.count() == 1


def test_a_root_that_is_retried_between_the_look_and_the_deletion_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    retried, other = running(), finished()
    transitions.fail(retried, FAILURE)
    age(retried, 100)
    locked = pruner.locked

    def retry_first(*args: Any, **kwargs: Any) -> Any:
        if fresh(retried).status == "failed":
            transitions.reopen(retried.pk)
        return locked(*args, **kwargs)

    monkeypatch.setattr(pruner, "locked", retry_first)
    assert prune(DAY) == 1
    assert fresh(retried).status == "queued"
    assert not Execution.objects.filter(pk=other.pk).exists()


def test_the_size_of_a_tree_does_not_change_the_number_of_statements() -> None:
    def statements(children: int) -> int:
        root = running()
        for number in range(children):
            transitions.succeed(claimed(invoke(root, f"child-{number}")), "1")
            root = claimed(root)
        transitions.succeed(root, "1")
        age(root, 2)
        with CaptureQueriesContext(connection) as captured:
            assert prune(DAY) == children + 1
        assert all(len(query["sql"]) < 2_000 for query in captured), "ids of members are not listed"
        return len(captured)

    assert statements(1) == statements(10)
