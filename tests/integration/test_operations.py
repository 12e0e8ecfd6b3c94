"""``RenameStep``: executions go on under a step's new name."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import connection, migrations
from django.db.migrations.state import ProjectState
from django.db.migrations.writer import MigrationWriter, OperationWriter

from conductor_app import ChildFailed, ExecutionContext, api, operations
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, RenameRefused
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.operations import RenameStep
from conductor_app.testing import Conductor
from conductor_app.transitions import lose
from tests.app import scenarios
from tests.support.bodies import child, durable, failure, redeploy, reload
from tests.support.executions import claimed, fresh, invoke, running, snapshot
from tests.support.migrations import migrate, state

pytestmark = pytest.mark.django_db


@durable(max_retries=0)
def fulfil(ctx: ExecutionContext, then: str = "sleep") -> Any:
    first = ctx.step("charge", effects.append, "charged")
    ctx.invoke("notify", scenarios.echo, {"value": 1})
    if then == "sleep":
        ctx.sleep("pause", 60)
    elif then == "fail":
        raise ValueError("no")
    return first


def renamed(ctx: ExecutionContext, then: str = "sleep") -> Any:
    first = ctx.step("pay", effects.append, "paid")
    ctx.invoke("tell", scenarios.echo, {"value": 1})
    ctx.sleep("rest", 60)
    return first


@durable(max_retries=0)
def waits_for_a_failure(ctx: ExecutionContext) -> Any:
    return ctx.invoke("charge", scenarios.boom)


effects: list[str] = []


@pytest.fixture(autouse=True)
def body() -> Iterator[None]:
    before = fulfil.run
    effects.clear()
    yield
    redeploy(fulfil, before)


def rename(old: str, new: str, *, task: Any = fulfil, backwards: bool = False) -> None:
    """Run the operation in the test's transaction, where SQLite has no schema editor."""
    operation = RenameStep(task.name, old=old, new=new)
    direction = operation.database_backwards if backwards else operation.database_forwards
    direction("shop", SimpleNamespace(connection=connection), state(), state())  # type: ignore[arg-type]


def names(execution: Any) -> list[str]:
    return list(Step.objects.filter(execution_id=execution.id).order_by("id").values_list("name", flat=True))


# --------------------------------------------------------------------------------------------------- what is renamed


def test_an_execution_goes_on_under_the_new_names_and_runs_nothing_twice(conductor: Conductor) -> None:
    result = fulfil.delay()
    conductor.drain()
    for old, new in (("charge", "pay"), ("notify", "tell"), ("pause", "rest")):
        rename(old, new)
    redeploy(fulfil, renamed)
    conductor.advance(60)
    conductor.assert_succeeded(result)
    assert effects == ["charged"]
    assert names(result) == ["pay", "tell", "rest"]
    assert Execution.objects.count() == 2


def test_a_child_that_is_open_comes_along_and_wakes_its_parent(conductor: Conductor) -> None:
    parent = running(task=fulfil.name)
    opened = invoke(parent, "notify")
    rename("notify", "tell")
    assert fresh(opened).step == "tell"
    conductor.drain()
    assert Step.objects.get(execution=parent, name="tell").status == "succeeded"


def test_a_failed_execution_can_be_retried_under_the_new_name(conductor: Conductor) -> None:
    result = waits_for_a_failure.delay()
    conductor.drain()
    conductor.assert_failed(result, error_class=ChildFailed, step="charge")
    rename("charge", "pay", task=waits_for_a_failure)
    assert failure(reload(result)).step == "pay"
    conductor.assert_failed(result, step="pay")
    before = waits_for_a_failure.run
    redeploy(waits_for_a_failure, lambda ctx: ctx.invoke("pay", scenarios.boom))
    try:
        api.retry(result)
        conductor.drain()
    finally:
        redeploy(waits_for_a_failure, before)
    conductor.assert_failed(result, step="pay")
    assert child(reload(result), "pay").fence == 2


def test_a_map_and_a_gathered_child_go_on_under_their_new_names(conductor: Conductor) -> None:
    def body(old: bool) -> Any:
        def run(ctx: ExecutionContext) -> Any:
            handle = ctx.start("start" if old else "begin", scenarios.echo, {"value": 1})
            other = ctx.start("other", scenarios.echo, {"value": 2})
            found = ctx.gather(handle, other, return_exceptions=True)
            found += ctx.map("all" if old else "each", scenarios.echo, [{"value": 3}, {"value": 4}])
            ctx.sleep("pause", 60)
            return [*found, *ctx.gather(handle, other, return_exceptions=True)]

        return run

    task = durable(body(old=True))
    result = task.delay()
    conductor.drain()
    for old, new in (("start", "begin"), ("all", "each")):
        rename(old, new, task=task)
    redeploy(task, body(old=False))
    assert names(result) == ["begin", "other", "gather(begin,other,return_exceptions)", "each", "pause"]
    conductor.advance(60)
    conductor.assert_succeeded(result, result=[1, 2, 3, 4, 1, 2])
    assert Execution.objects.count() == 5


def test_what_has_succeeded_keeps_its_history(conductor: Conductor) -> None:
    result = fulfil.delay(then="end")
    conductor.drain()
    conductor.assert_succeeded(result)
    before = snapshot()
    rename("charge", "pay")
    assert snapshot() == before


def test_other_tasks_and_other_steps_are_left_alone(conductor: Conductor) -> None:
    mine, others = fulfil.delay(), waits_for_a_failure.delay()
    conductor.drain()
    rename("charge", "pay")
    assert names(mine) == ["pay", "notify", "pause"]
    assert names(others) == ["charge"]
    assert FailedExecution.objects.get(execution_id=others.id).step == "charge"


def test_it_is_reversible(conductor: Conductor) -> None:
    fulfil.delay()
    waits_for_a_failure.delay()
    conductor.drain()
    before = snapshot()
    for task in (fulfil, waits_for_a_failure):
        rename("charge", "pay", task=task)
    assert snapshot() != before
    for task in (fulfil, waits_for_a_failure):
        rename("charge", "pay", task=task, backwards=True)
    assert snapshot() == before


def test_many_are_renamed_in_batches(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BATCH", 2)
    results = [fulfil.delay() for _ in range(5)]
    conductor.drain()
    rename("notify", "tell")
    assert all("tell" in names(result) for result in results)
    assert not Step.objects.filter(name="notify").exists()
    assert Execution.objects.filter(step="tell").count() == 5
    assert not Execution.objects.filter(step="notify").exists()


def test_without_executions_there_is_nothing_to_do() -> None:
    rename("charge", "pay")


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_name_that_is_taken_is_refused_and_nothing_is_changed(conductor: Conductor) -> None:
    fulfil.delay()
    result = fulfil.delay()
    conductor.drain()
    Step.objects.filter(execution_id=result.id, name="pause").update(name="pay")
    before = snapshot()
    with pytest.raises(RenameRefused) as caught:
        rename("charge", "pay")
    assert str(caught.value) == (
        f'Step "charge" of {fulfil.name} cannot become "pay": {result.id} has both. Choose another name, or wait until '
        "they have ended."
    )
    assert snapshot() == before


@pytest.mark.parametrize("who", ["the execution", "its child"])
def test_it_is_refused_while_a_worker_runs_it(who: str) -> None:
    execution = running(task=fulfil.name)
    if who == "its child":
        execution = claimed(invoke(execution, "charge"))
    with pytest.raises(
        RenameRefused, match=rf"while a worker runs it: {execution.pk} on test@host/1\. Stop the workers"
    ):
        rename("charge", "pay")
    Execution.objects.filter(pk=execution.pk).update(lease_expires_at="2020-01-01T00:00:00Z")
    rename("charge", "pay")  # its worker is dead
    assert lose(execution.pk)


def test_a_worker_that_runs_something_else_is_no_obstacle() -> None:
    running(task=scenarios.echo.name)
    rename("charge", "pay")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("shop.tasks.fulfil", "a", "a"), InvalidArgument, 'The old and the new name of the step are both "a"'),
        (("shop.tasks.fulfil", "a", "b c"), InvalidArgument, "new step name 'b c' must match"),
        (("shop.tasks.fulfil", "", "b"), InvalidArgument, "old step name must be 1–128 characters"),
        (("shop.tasks.fulfil", 5, "b"), InvalidArgumentType, "old step name must be str, got int"),
        (("", "a", "b"), InvalidArgument, "task must be a task's name, got an empty one"),
        ((fulfil, "a", "b"), InvalidArgumentType, "task must be a task's name, got"),
    ],
)
def test_impossible_arguments_are_refused_when_the_migration_is_loaded(
    arguments: Any, error: type[Exception], text: str
) -> None:
    task, old, new = arguments
    with pytest.raises(error, match=text):
        RenameStep(task, old=old, new=new)


def test_a_migration_that_does_not_depend_on_conductor_app_is_told_so() -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r'add \("conductor_app", "0002_children_and_events"\) to the depend'
    ):
        RenameStep("shop.tasks.fulfil", old="a", new="b").database_forwards(
            "shop",
            SimpleNamespace(connection=connection),  # type: ignore[arg-type]
            ProjectState(),
            ProjectState(),
        )


# -------------------------------------------------------------------------------------------------- as Django's own


class Elsewhere:
    """A router that keeps our tables in another database."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return False if app_label == "conductor_app" else None


def test_a_database_that_has_not_our_tables_is_left_alone(conductor: Conductor, settings: Any) -> None:
    fulfil.delay()
    conductor.drain()
    settings.DATABASE_ROUTERS = [Elsewhere()]
    before = snapshot()
    rename("charge", "pay")
    assert snapshot() == before


def test_it_is_written_into_a_migration_file_and_described_in_the_plan() -> None:
    operation = RenameStep("shop.tasks.fulfil", old="charge", new="pay")
    text, imports = OperationWriter(operation, indentation=0).serialize()
    scope: dict[str, Any] = {}
    exec("\n".join([*imports, f"operation = [{text}][0]"]), scope)
    assert scope["operation"].describe() == operation.describe()
    assert operation.describe() == "Rename step charge of shop.tasks.fulfil to pay"
    assert operation.migration_name_fragment == "rename_step_charge_pay"
    migration = migrations.Migration("0002_operations", "shop")
    migration.operations = [operation]
    assert "RenameStep(" in MigrationWriter(migration).as_string()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("atomic", [True, False])
def test_it_runs_in_a_migration_forwards_and_backwards(atomic: bool, conductor: Conductor) -> None:
    result = fulfil.delay()
    conductor.drain()
    operation = RenameStep(fulfil.name, old="charge", new="pay")
    migrate(operation, atomic=atomic)
    assert names(result) == ["pay", "notify", "pause"]
    migrate(operation, backwards=True, atomic=atomic)
    assert names(result) == ["charge", "notify", "pause"]


def test_no_migration_is_missing() -> None:
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)
