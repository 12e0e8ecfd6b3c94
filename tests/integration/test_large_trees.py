"""What an operator asks of a large tree is answered soon; the rest is done in the background."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from conductor_app import ExecutionContext, api, transitions
from conductor_app.engine import sweeper
from conductor_app.models import Execution, FailedExecution, Operation, Step
from conductor_app.store.ids import derive_child_id
from conductor_app.transitions import AwaitEvent, cancelling, reopening
from tests.support.bodies import durable, start
from tests.support.executions import (
    FAILURE,
    OWNER,
    claimed,
    family,
    fresh,
    invocation,
    mapping,
    starting,
    step_of,
)
from tests.support.process import note_published

pytestmark = pytest.mark.django_db


def failed_map(count: int, **options: int) -> Execution:
    """A parent that failed on the first child of a map; the children that had not begun were cancelled."""
    parent, children = mapping(count, **options)
    transitions.fail(claimed(children[0]), FAILURE)
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=children[0].pk)
    return parent


def statuses(parent: Execution) -> Counter[str]:
    return Counter(Execution.objects.filter(parent=parent).values_list("status", flat=True))


@pytest.mark.parametrize("max_parallel", [None, 3])
def test_a_retry_of_a_map_takes_no_more_statements_for_more_children(max_parallel: int | None) -> None:
    def statements(count: int) -> int:
        parent = failed_map(count, max_parallel=max_parallel)
        with CaptureQueriesContext(connection) as captured:
            api.retry(parent)
        assert statuses(parent) == {"queued": count}
        due = Execution.objects.filter(parent=parent, due_at__isnull=False)
        assert due.count() == (count if max_parallel is None else max_parallel)
        assert (fresh(parent).status, step_of(parent).remaining) == ("waiting", count)
        assert not FailedExecution.objects.exists()
        return len(captured)

    assert statements(5) == statements(50)


def test_children_that_failed_on_their_own_children_are_reopened_down_to_those() -> None:
    parent, children = mapping(3)
    middle = claimed(children[0])
    leaf = Execution.objects.get(pk=transitions.start_child(middle, invocation(middle, "leaf")).child_id)
    transitions.fail(claimed(leaf), FAILURE)
    transitions.fail(middle, FAILURE, step="leaf", child_id=leaf.pk)
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=middle.pk)
    api.retry(parent)
    assert fresh(leaf).status == "queued"
    assert statuses(parent) == {"queued": 3}


def test_a_retry_publishes_some_and_leaves_the_others_to_a_sweeper(
    monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: object
) -> None:
    published = note_published()
    monkeypatch.setattr(reopening, "_PUBLISHED_AT_ONCE", 3)
    parent = failed_map(8)
    with django_capture_on_commit_callbacks(execute=True):  # type: ignore[operator]
        api.retry(parent)
    children = list(Execution.objects.filter(parent=parent).order_by("position"))
    assert published == [child.pk for child in children[:3]]
    assert set(Execution.objects.to_dispatch()) == set(children[3:])
    assert {child.attempt for child in children} == {1}


def test_a_tree_deeper_than_pythons_stack_is_reopened() -> None:
    root, child = family()
    transitions.fail(child, FAILURE)
    transitions.fail(claimed(root), FAILURE, step="child", child_id=child.pk)
    step, above, leaf = step_of(root), FailedExecution.objects.get(pk=root.pk), fresh(child)
    rows: list[Execution] = []
    steps: list[Step] = []
    parent = leaf
    for _ in range(400):
        row = leaf.copied(pk=derive_child_id(parent.pk, "child"), parent_id=parent.pk, depth=parent.depth + 1)
        row.id = derive_child_id(parent.pk, "child")
        rows.append(row)
        steps.append(copy.copy(step))
        steps[-1].pk, steps[-1].execution_id, steps[-1].child_id = None, parent.pk, row.pk
        parent = row
    Execution.objects.bulk_create(rows)
    Step.objects.bulk_create(steps)
    FailedExecution.objects.filter(pk=leaf.pk).update(step="child")
    failures = [copy.copy(above) for _ in rows]
    for failure, row in zip(failures, rows, strict=True):
        failure.pk = failure.execution_id = row.pk
    failures[-1].step = ""
    FailedExecution.objects.bulk_create(failures)

    api.retry(root)
    found = Counter(Execution.objects.values_list("status", flat=True))
    assert found == {"waiting": 401, "queued": 1}
    assert fresh(rows[-1]).status == "queued"


@durable(max_retries=0)
def parent_of_many(ctx: ExecutionContext, count: int) -> None:
    ctx.map("many", waits, [{}] * count)


@durable(max_retries=0)
def waits(ctx: ExecutionContext) -> None:
    ctx.wait_for("approval", "approved")


def test_a_cancel_ends_some_and_leaves_the_others_to_a_sweeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_CANCELLED_AT_ONCE", 3)

    def statements(count: int) -> int:
        root = start(parent_of_many, count=count)
        assert statuses(root) == {"waiting": count}
        with CaptureQueriesContext(connection) as captured:
            assert api.cancel(root, "enough")
        assert fresh(root).status == "cancelled"
        assert statuses(root) == {"cancelled": 2, "waiting": count - 2}
        sweeper.sweep()
        assert statuses(root) == {"cancelled": count}
        return len(captured)

    assert statements(4) == statements(9)


@pytest.mark.parametrize("kind", ["map", "invocations"])
def test_a_cancel_of_very_many_stops_them_and_leaves_every_end_to_a_sweeper(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cancelling, "MANY_CHILDREN", 3)

    def statements(count: int) -> int:
        if kind == "map":
            parent, children = mapping(count)
        else:
            parent, children = starting(count)
            for child in children:
                transitions.release(child)
            assert transitions.suspend(parent, AwaitEvent("approval", "approved", None))
        with CaptureQueriesContext(connection) as captured:
            assert api.cancel(parent, "enough", actor="ana")
        assert fresh(parent).cancel_requested_at is not None
        assert fresh(parent).cancel_reason == "enough"
        assert not any(transitions.claim(child.pk, OWNER) for child in children), "none of them starts"
        assert fresh(parent).status == "waiting"
        assert statuses(parent) == {"queued": count}
        operation = Operation.objects.get(items__execution=parent)
        assert (operation.kind, operation.actor, operation.reason) == ("cancel", "ana", "enough")
        assert api.cancel(parent, "again")
        sweeper.sweep()
        assert fresh(parent).status == "cancelled"
        assert statuses(parent) == {"cancelled": count}
        return len(captured)

    assert statements(4) == statements(9)


def test_a_cancel_of_very_many_leaves_the_children_of_a_running_body_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancelling, "MANY_CHILDREN", 3)
    parent, children = starting(5)
    assert api.cancel(parent, "enough")
    assert not Execution.objects.filter(parent=parent, cancel_requested_at__isnull=False).exists()
    assert len(children) == 5
