"""Tags: set by callers, decorators, bodies and ``api.tag``, kept with the root, copied by a rerun, pruned with it."""

from __future__ import annotations

import datetime as dt
from contextlib import suppress
from typing import Any

import pytest
from celery import chain, shared_task
from django.db import connection, transaction
from django.db.utils import DatabaseError
from django.test.utils import CaptureQueriesContext

from conductor_app import ExecutionContext, api, testing, transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import ContextClosed, InvalidArgument, InvalidArgumentType, NestedDurableCall, TooManyTags
from conductor_app.models import Execution, Tag
from conductor_app.states import ExecutionStatus
from tests.support.bodies import child, class_name, durable, failure, go_on, reload, run, start
from tests.support.deliveries import deliver, stranger, take
from tests.support.executions import queued

pytestmark = pytest.mark.django_db

TEN = {f"k{number}": "v" for number in range(10)}


@durable
def plainly(ctx: ExecutionContext, order: int = 0) -> int:
    return order


@durable(tags=lambda order, tenant="none": {"order": str(order), "tenant": tenant})
def ordered(ctx: ExecutionContext, order: int, tenant: str = "none") -> int:
    return order


@durable(tags={"kind": "fixed", "tenant": "decorator"})
def fixed(ctx: ExecutionContext) -> None:
    pass


@durable(max_retries=0)
def tagging(ctx: ExecutionContext, tags: list[list[Any]]) -> None:
    for key, value in tags:
        ctx.tag(key, value)


@durable(max_retries=0)
def parent(ctx: ExecutionContext, call: str) -> Any:
    signature = plainly.s(order=1).set(tags={"child": "yes", "tenant": "child"})
    ctx.tag("began", "yes")
    if call == "invoke":
        return ctx.invoke("a", signature)
    if call == "start":
        return ctx.gather(ctx.start("a", signature))
    if call == "map":
        return ctx.map("a", ordered.s(tenant="mapped"), [{"order": 1}, {"order": 2}])
    if call == "plain":
        return ctx.invoke("a", plain.s(1).set(tags={"child": "yes"}))
    return ctx.invoke("a", tagging, {"tags": [["child", "yes"]]})


@shared_task
def plain(order: int) -> int:
    return order


# ------------------------------------------------------------------------------------------------------------ creating


def test_a_call_tags_its_root() -> None:
    result = plainly.apply_async(kwargs={"order": 7}, tags={"tenant": "acme", "order": "7"})

    assert api.get_tags(result) == {"tenant": "acme", "order": "7"}


def test_a_signature_tags_its_root() -> None:
    result = plainly.s(order=7).set(tags={"order": "7"}).delay()

    assert api.get_tags(result) == {"order": "7"}


def test_a_part_of_a_canvas_tags_its_root() -> None:
    chain(plainly.si(order=1), plainly.si(order=2).set(tags={"part": "2"})).delay()
    go_on()

    assert [(tag.root.kwargs, tag.value) for tag in Tag.objects.all()] == [({"order": 2}, "2")]


def test_a_decorator_tags_each_root_by_its_arguments() -> None:
    assert api.get_tags(ordered.delay(7, tenant="acme")) == {"order": "7", "tenant": "acme"}
    assert api.get_tags(fixed.apply_async(tags={"tenant": "call"})) == {"kind": "fixed", "tenant": "call"}


def test_a_message_of_others_has_the_decorators_tags() -> None:
    result = stranger().send_task(ordered.name, kwargs={"order": 7})
    deliver(take(is_wanted=lambda message: message.headers["id"] == result.id))

    assert api.get_tags(result) == {"order": "7", "tenant": "none"}


def test_a_bad_tag_of_a_callback_is_refused_before_anything_is_stored() -> None:
    with pytest.raises(InvalidArgumentType, match='tag "order" must be str, got int 7'):
        plainly.apply_async(link=plainly.si(order=2).set(tags={"order": 7}))
    with pytest.raises(InvalidArgument, match=f"a key of tags of the signature of {plainly.name} is reserved"):
        plainly.apply_async(link=[plainly.si(order=2).set(tags={"celery": "7"})])

    assert not Execution.objects.exists()


def test_an_eager_call_tags_its_root() -> None:
    assert api.get_tags(plainly.apply(kwargs={"order": 7}, tags={"order": "7"})) == {"order": "7"}


@pytest.mark.parametrize(
    ("tags", "error"),
    [({"order": 7}, InvalidArgumentType), ({"": "7"}, InvalidArgument), ({**TEN, "more": "v"}, TooManyTags)],
)
def test_a_call_with_a_bad_tag_stores_nothing(tags: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        plainly.apply_async(tags=tags)

    assert not Execution.objects.exists()
    assert not Tag.objects.exists()


def test_an_execution_is_not_stored_without_its_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise DatabaseError("full")

    monkeypatch.setattr(transitions.tagging, "insert", fail)

    with pytest.raises(DatabaseError, match="full"):
        plainly.apply_async(tags={"order": "7"})

    assert not Execution.objects.exists()


def test_a_second_call_with_the_same_key_changes_no_tag() -> None:
    first = plainly.apply_async(tags={"order": "7"}, idempotency_key="order-7")
    second = plainly.apply_async(tags={"order": "8", "more": "x"}, idempotency_key="order-7")

    assert first.id == second.id
    assert api.get_tags(second) == {"order": "7"}


def test_a_creation_without_tags_costs_no_statement_more() -> None:
    with CaptureQueriesContext(connection) as without:
        queued()
    with CaptureQueriesContext(connection) as with_tags:
        queued(tags={"order": "7", "tenant": "acme"})

    assert not [query for query in without.captured_queries if "_tag" in query["sql"]]
    assert sum("INSERT" in query["sql"] for query in with_tags.captured_queries) == 2


def test_a_decorator_refuses_bad_tags_at_once() -> None:
    with pytest.raises(InvalidArgumentType, match='tag "order" must be str, got int 7'):
        durable(tags={"order": 7})(lambda ctx: None)


def test_a_decorators_function_that_returns_a_bad_tag_is_named() -> None:
    wrong = durable(tags=lambda order: {"order": order})(lambda ctx, order: order)

    with pytest.raises(InvalidArgumentType, match='tag "order" must be str, got int 7'):
        wrong.delay(7)
    with pytest.raises(InvalidArgumentType, match="tags of @durable_task must be a mapping"):
        durable(tags=lambda: ["order"])(lambda ctx: None).delay()


# --------------------------------------------------------------------------------------------------------- in a body


def test_a_body_tags_its_tree() -> None:
    execution = run(tagging, tags=[["order", "7"], ["order", "8"], ["tenant", "acme"]])

    assert api.get_tags(execution) == {"order": "8", "tenant": "acme"}
    assert not execution.steps.exists()


@pytest.mark.parametrize(
    ("call", "tags"),
    [
        ("invoke", {"child": "yes", "tenant": "child"}),
        ("start", {"child": "yes", "tenant": "child"}),
        ("map", {"order": "2", "tenant": "mapped"}),
        ("plain", {"child": "yes"}),
        ("tagging", {"child": "yes"}),
    ],
)
def test_a_childs_tags_go_to_the_root(call: str, tags: dict[str, str]) -> None:
    execution = run(parent, call=call)

    assert execution.status == ExecutionStatus.SUCCEEDED
    assert api.get_tags(execution) == {"began": "yes", **tags}
    assert set(Tag.objects.values_list("root", flat=True)) == {execution.pk}


def test_a_replay_says_again_what_was_changed_meanwhile() -> None:
    @durable
    def sleeper(ctx: ExecutionContext) -> None:
        ctx.tag("order", "7")
        ctx.sleep("a", 60)

    execution = start(sleeper)
    api.tag(execution, {"order": "8"})
    api.wake(execution)
    go_on()

    assert reload(execution).status == ExecutionStatus.SUCCEEDED
    assert api.get_tags(execution) == {"order": "7"}


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([["order", 7]], 'tag "order" must be str, got int 7'),
        ([["celery.order", "7"]], "a key of tags is reserved"),
        ([[*pair] for pair in {**TEN, "more": "v"}.items()], "these tags would make 11 tags"),
    ],
)
def test_a_bad_tag_is_a_bodys_error(tags: list[list[Any]], message: str) -> None:
    execution = run(tagging, tags=tags)

    assert execution.status == ExecutionStatus.FAILED
    assert message in failure(execution).message
    assert len(api.get_tags(execution)) == len(tags) - 1


def test_a_body_tags_with_its_transaction() -> None:
    @durable
    def careful(ctx: ExecutionContext) -> None:
        with suppress(ZeroDivisionError), transaction.atomic():
            ctx.tag("order", "7")
            raise ZeroDivisionError
        with transaction.atomic():
            ctx.tag("tenant", "acme")

    assert api.get_tags(run(careful)) == {"tenant": "acme"}


@pytest.mark.parametrize("where", ["inside", "after"])
def test_a_tag_is_set_by_a_body_that_runs(where: str) -> None:
    kept: list[ExecutionContext] = []

    @durable(max_retries=0)
    def keeping(ctx: ExecutionContext) -> None:
        kept.append(ctx)
        if where == "inside":
            ctx.step("a", lambda: ctx.tag("order", "7"))

    execution = run(keeping)

    if where == "inside":
        assert failure(execution).error_class == class_name(NestedDurableCall)
    else:
        with pytest.raises(ContextClosed):
            kept[0].tag("order", "7")
    assert api.get_tags(execution) == {}


# ------------------------------------------------------------------------------------------------------- from outside


def test_any_execution_of_a_tree_names_its_tags() -> None:
    execution = run(parent, call="invoke")

    api.tag(child(execution, "a"), {"child": "no", "began": None, "more": "x"})

    assert api.get_tags(child(execution, "a")) == {"child": "no", "tenant": "child", "more": "x"}
    assert api.get_tags(execution) == api.get_tags(str(execution.pk))


def test_ten_tags_are_replaced_and_an_eleventh_is_refused_whole() -> None:
    execution = queued(tags=TEN)

    api.tag(execution, dict.fromkeys(TEN, "w"))
    with pytest.raises(TooManyTags, match="these tags would make 11 tags"):
        api.tag(execution, {"k0": "x", "more": "x"})
    assert api.get_tags(execution) == dict.fromkeys(TEN, "w")

    api.tag(execution, {"k0": None, "more": "x"})
    assert len(api.get_tags(execution)) == 10


def test_nothing_is_written_for_what_is_so_already(django_assert_num_queries: Any) -> None:
    execution = queued(tags={"order": "7"})

    with django_assert_num_queries(1):
        transitions.tag(execution.pk, {"order": "7", "gone": None})


def test_an_execution_that_is_not_there_is_not_tagged() -> None:
    execution = queued()
    Execution.objects.filter(pk=execution.pk)._raw_delete("default")

    with pytest.raises(Execution.DoesNotExist, match="There is no execution"):
        api.tag(execution, {"order": "7"})
    with pytest.raises(Execution.DoesNotExist, match="It has been pruned"):
        transitions.tag(execution.pk, {"order": "7"})
    with pytest.raises(Execution.DoesNotExist):
        api.get_tags(execution)


def test_a_tag_is_rolled_back_with_its_transaction() -> None:
    execution = queued()

    with transaction.atomic():
        api.tag(execution, {"order": "7"})
        transaction.set_rollback(True)

    assert api.get_tags(execution) == {}


# --------------------------------------------------------------------------------------------------------- life cycle


def test_a_retry_keeps_tags_and_a_rerun_copies_them() -> None:
    execution = run(tagging, tags=[["order", "7"], ["wrong", 7]])

    api.retry(execution)
    created = api.rerun(run(tagging, tags=[["order", "8"]]))

    assert api.get_tags(execution) == {"order": "7"}
    assert api.get_tags(created) == {"order": "8"}


def test_tags_are_pruned_with_their_tree() -> None:
    kept = queued(tags={"order": "8"})
    run(tagging, tags=[["order", "7"]])

    assert pruner.prune(dt.timedelta(0)) == 1

    assert [tag.root_id for tag in Tag.objects.all()] == [kept.pk]


def test_rows_that_are_deleted_by_hand_take_their_tags_along() -> None:
    queued(tags={"order": "8"}).delete()

    assert not Tag.objects.exists()


# ----------------------------------------------------------------------------------------------------------- test kit


def test_the_test_kit_tells_of_tags() -> None:
    tags = {"given": "x"}

    testing.run(parent, {"call": "invoke"}, {"a": 1}, tags=tags)

    assert tags == {"given": "x", "began": "yes", "child": "yes", "tenant": "child"}
    with pytest.raises(TooManyTags):
        testing.run(tagging, {"tags": [["more", "x"]]}, tags=dict(TEN))
