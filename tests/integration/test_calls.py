"""Ids that canvas messages bring: what is one call, and what is another."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from celery import chain, current_app
from django_celery_results.models import TaskResult

from conductor_app import ExecutionContext, api
from conductor_app.engine import calls
from conductor_app.exceptions import IdempotencyConflict
from conductor_app.host.news import Revocation
from conductor_app.host.revocations import Revoker
from conductor_app.models import Execution
from conductor_app.store.ids import derive_namesake_id, namesakes_range
from tests.app.scenarios import echo
from tests.support.bodies import durable, go_on, reload
from tests.support.deliveries import deliver, stranger, take

pytestmark = pytest.mark.django_db

X = str(uuid.uuid4())


@durable
def callback(ctx: ExecutionContext, value: Any) -> Any:
    return [value, "called back"]


def executions(task: Any) -> list[Execution]:
    return list(Execution.objects.filter(task=task.name).order_by("created_at"))


@pytest.mark.parametrize("value", [1, {"a": [1]}])
def test_a_link_with_one_id_is_called_after_each_of_its_callers(value: Any) -> None:
    link = callback.s().set(task_id=X)
    for _ in range(3):
        echo.apply_async((value,), link=[link])
    go_on()
    found = executions(callback)
    assert [execution.get_result() for execution in found] == [[value, "called back"]] * 3
    assert [str(execution.pk) == X for execution in found] == [True, False, False]
    # Celery knows all of them by the id that they were given.
    assert TaskResult.objects.get(task_id=X).status == "SUCCESS"
    assert not TaskResult.objects.filter(task_id__in=[str(execution.pk) for execution in found[1:]]).exists()


def test_what_is_announced_again_is_the_same_call() -> None:
    callers = [echo.apply_async((n,), link=[callback.s().set(task_id=X)]) for n in range(3)]
    go_on()
    assert len(executions(callback)) == 3
    Execution.objects.filter(pk__in=[caller.id for caller in callers]).update(announce_at="2020-01-01T00:00Z")
    go_on()
    assert len(executions(callback)) == 3


def test_an_id_that_a_caller_of_apply_async_chooses_is_taken_literally() -> None:
    first = echo.apply_async((1,), task_id=X)
    assert echo.apply_async((1,), task_id=X).id == first.id == X
    with pytest.raises(IdempotencyConflict):
        echo.apply_async((2,), task_id=X)
    assert len(executions(echo)) == 1


def test_each_result_of_a_frozen_signature_knows_its_own_execution() -> None:
    frozen = echo.s(1)
    frozen.freeze()
    first, second = frozen.delay(), frozen.delay()
    assert first.id == second.id == frozen.id
    go_on()
    assert api.find(first) != api.find(second)
    assert {api.find(first).pk, api.find(second).pk} == {execution.pk for execution in executions(echo)}
    assert api.get_result(second, timeout=0) == 1


def test_a_revoked_id_cancels_all_that_was_called_by_it() -> None:
    frozen = echo.s(1).set(countdown=60)
    frozen.freeze()
    for _ in range(3):
        frozen.delay()
    other = echo.apply_async((1,), countdown=60)
    assert sorted(calls.named(frozen.id)) == sorted(execution.pk for execution in executions(echo)[:3])
    Revoker().cancel(Revocation(frozen.id))
    assert [execution.status for execution in executions(echo)] == ["cancelled"] * 3 + ["queued"]
    assert calls.named(other.id) == [uuid.UUID(other.id)]


def test_ids_of_other_calls_lie_together_and_are_such_as_every_database_takes() -> None:
    for given in (uuid.uuid4(), uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)):
        first, last = namesakes_range(given)
        ids = {derive_namesake_id(given, str(n)) for n in range(500)}
        assert len(ids) == 500
        assert all(first <= derived <= last and derived.version == 8 for derived in ids)


def test_a_canvas_that_keeps_an_id_runs_eagerly_as_often_as_it_is_called() -> None:
    canvas = chain(echo.s(1), callback.s())
    canvas.set(task_id=X)
    for _ in range(2):
        assert canvas.apply().get() == [1, "called back"]
    assert (len(executions(echo)), len(executions(callback))) == (2, 2)
    current_app.conf.task_always_eager = True
    try:
        for _ in range(2):
            assert canvas.apply_async().get() == [1, "called back"]
    finally:
        current_app.conf.task_always_eager = False
    assert (len(executions(echo)), len(executions(callback))) == (4, 4)


# ------------------------------------------------------------------------------------------------- messages of others


def send(value: Any, parent_id: str | None) -> None:
    stranger().send_task(callback.name, args=[value], task_id=X, parent_id=parent_id)
    deliver(take(is_wanted=lambda message: message.headers["id"] == X))


def test_a_message_of_others_is_one_call_for_each_parent() -> None:
    parents = [str(uuid.uuid4()) for _ in range(2)]
    for parent_id in [*parents, *parents, None]:  # redelivered; and somebody who does not say
        send(1, parent_id)
    found = executions(callback)
    assert [execution.get_options()["parent_id"] for execution in found] == parents
    assert [execution.status for execution in found] == ["succeeded"] * 2
    assert str(found[0].pk) == X
    assert found[1].get_options()["celery_id"] == X


def test_a_message_whose_arguments_do_not_fit_fails_no_execution_that_has_its_id() -> None:
    send(1, None)
    stranger().send_task(callback.name, args=[1, 2, 3], task_id=X, parent_id=str(uuid.uuid4()))
    deliver(take(is_wanted=lambda message: message.headers["id"] == X))
    assert TaskResult.objects.filter(task_id=X).values_list("status", flat=True).first() in (None, "SUCCESS")
    assert reload(uuid.UUID(X)).status == "succeeded"


# ------------------------------------------------------------------------------------------- callbacks that cannot be


def test_a_callback_that_cannot_be_called_writes_over_no_result_of_another_call() -> None:
    ok, bad = callback.s().set(task_id=X), callback.s(2, 3).set(task_id=X)
    echo.apply_async((1,), link=[ok])
    go_on()
    assert TaskResult.objects.get(task_id=X).status == "SUCCESS"
    echo.apply_async((2,), link=[bad])
    go_on()
    assert TaskResult.objects.get(task_id=X).status == "SUCCESS"
    assert len(executions(callback)) == 1


def test_nor_over_what_is_going_on_and_fails_what_is_its_own() -> None:
    last = echo.apply_async((1,), task_id=X, countdown=60)
    canvas = chain(echo.s(1), callback.s(2, 3), echo.s())
    canvas.set(task_id=X)
    result = canvas.apply_async()
    go_on()
    assert reload(last).status == "queued"
    assert not TaskResult.objects.filter(task_id=X, status="FAILURE").exists()
    assert TaskResult.objects.get(task_id=result.parent.id).status == "FAILURE"


def test_a_link_on_the_signature_that_is_invoked_is_called_besides() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", echo.s(value=1).set(link=callback.s()))

    parent.delay()
    go_on()
    root = Execution.objects.get(task=parent.name)
    assert (root.status, root.get_result()) == ("succeeded", 1)
    linked = Execution.objects.get(task=callback.name)
    assert (linked.parent_id, linked.status) == (None, "succeeded")
