"""Trees that other models refer to: their ``on_delete`` is honoured."""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import connection, models
from django.test.utils import CaptureQueriesContext

from conductor_app import transitions
from conductor_app.engine.pruner import Held, prune
from conductor_app.models import Execution, Step
from conductor_app.store import clock
from tests.support.executions import claimed, invoke, running, step_of

pytestmark = pytest.mark.django_db(transaction=True)

DAY = dt.timedelta(days=1)

MakeModel = Callable[..., type[models.Model]]


@pytest.fixture
def make_model() -> Iterator[MakeModel]:
    """Make models with tables, which are gone after the test."""
    made: list[type[models.Model]] = []

    def make(name: str, **fields: Any) -> type[models.Model]:
        meta = type("Meta", (), {"app_label": "testapp"})
        model = type(name, (models.Model,), {"__module__": __name__, "Meta": meta, **fields})
        with connection.schema_editor() as editor:
            editor.create_model(model)
        made.append(model)
        return model

    try:
        yield make
    finally:
        for model in reversed(made):
            with connection.schema_editor() as editor:
                editor.delete_model(model)
            del apps.all_models["testapp"][model._meta.model_name]
        apps.clear_cache()


def key(to: Any, on_delete: Any, **options: Any) -> Any:
    return models.ForeignKey(to, on_delete, related_name="+", **{"null": True, **options})


def old_tree() -> tuple[Execution, Execution, Step]:
    root = running()
    child = claimed(invoke(root))
    transitions.succeed(child, "1")
    transitions.succeed(claimed(root), "1")
    Execution.objects.filter(root_id=root.pk).update(finished_at=clock.after(-2 * 86_400))
    return root, child, step_of(root)


def held_by(**options: Any) -> tuple[int, list[Held]]:
    held: list[Held] = []
    return prune(DAY, on_held=held.append, **options), held


def test_a_key_with_set_null_is_emptied_for_each_member_of_a_tree(make_model: MakeModel) -> None:
    order = make_model(
        "Order", execution=key(Execution, models.SET_NULL), step=key(Step, models.SET_NULL), note=models.TextField()
    )
    root, child, step = old_tree()
    for execution in (root, child):
        order.objects.create(execution=execution, step=step, note="kept")
    assert held_by() == (2, [])
    assert list(order.objects.values_list("execution", "step", "note")) == [(None, None, "kept")] * 2
    assert not Execution.objects.exists()


def test_a_key_with_a_default_gets_it(make_model: MakeModel) -> None:
    kept = running()
    order = make_model("Order", execution=key(Execution, models.SET(lambda: kept.pk)))
    order.objects.create(execution=old_tree()[1])
    assert held_by() == (2, [])
    assert order.objects.values_list("execution", flat=True).get() == kept.pk


def test_a_key_with_cascade_takes_its_row_with_it_and_what_refers_to_that(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.CASCADE))
    line = make_model("Line", order=key(order, models.CASCADE))
    other = order.objects.create()
    line.objects.create(order=order.objects.create(execution=old_tree()[1]))
    assert held_by() == (2, [])
    assert list(order.objects.values_list("pk", flat=True)) == [other.pk]
    assert not line.objects.exists()


@pytest.mark.parametrize("on_delete", [models.PROTECT, models.RESTRICT])
def test_a_tree_that_is_protected_stays_and_is_reported(make_model: MakeModel, on_delete: Any) -> None:
    order = make_model("Order", execution=key(Execution, on_delete))
    trees = [old_tree() for _ in range(5)]
    order.objects.create(execution=trees[2][1])
    counted = held_by(dry_run=True)
    assert counted == (8, [Held(trees[2][0].pk, "testapp.Order")])
    assert Execution.objects.count() == 10
    assert held_by() == counted
    assert {row.root_id for row in Execution.objects.all()} == {trees[2][0].pk}
    assert Step.objects.get().pk == trees[2][2].pk
    order.objects.all().delete()
    assert held_by() == (2, [])


def test_a_tree_is_held_by_what_protects_a_row_that_would_go_with_it(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.CASCADE))
    invoice = make_model("Invoice", order=key(order, models.PROTECT))
    trees = [old_tree() for _ in range(3)]
    invoice.objects.create(order=order.objects.create(execution=trees[0][0]))
    assert held_by() == (4, [Held(trees[0][0].pk, "testapp.Invoice")])
    assert order.objects.exists()


def test_a_restricting_row_that_goes_with_the_tree_does_not_hold_it(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.CASCADE), last=key(Execution, models.RESTRICT))
    root, child, _step = old_tree()
    order.objects.create(execution=root, last=child)
    assert held_by() == (2, [])
    assert not order.objects.exists()


def test_a_key_of_which_the_database_alone_knows_holds_its_tree_and_no_other(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.DO_NOTHING))
    trees = [old_tree() for _ in range(3)]
    order.objects.create(execution=trees[1][1])
    number, held = held_by()
    assert (number, [tree.root_id for tree in held]) == (4, [trees[1][0].pk])
    assert "foreign key" in held[0].by.lower()


def test_many_protected_trees_are_found_in_one_query(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.PROTECT))

    def statements(trees: int) -> int:
        order.objects.all().delete()
        prune(DAY)
        for _ in range(trees):
            order.objects.create(execution=old_tree()[0])
        with CaptureQueriesContext(connection) as captured:
            number, held = held_by()
        assert (number, len(held)) == (0, trees)
        return len(captured)

    assert statements(1) == statements(10)


def test_the_command_tells_of_trees_that_are_held(make_model: MakeModel) -> None:
    order = make_model("Order", execution=key(Execution, models.PROTECT))
    root = old_tree()[0]
    order.objects.create(execution=root)
    old_tree()
    out = io.StringIO()
    call_command("conductor", "prune", "--older-than=1d", "--dry-run", "--json", stdout=out)
    assert json.loads(out.getvalue())["held"] == [{"by": "testapp.Order", "example": str(root.pk), "trees": 1}]
    out = io.StringIO()
    call_command("conductor", "prune", "--older-than=1d", stdout=out)
    assert out.getvalue().splitlines() == [
        "Deleted 2 executions in trees whose root ended more than 24 h ago.",
        f"Left 1 tree that something refers to: testapp.Order (for example {root.pk}).",
    ]
