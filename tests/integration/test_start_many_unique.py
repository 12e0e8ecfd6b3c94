"""``task.start_many`` with unique keys: of each key one open execution, whoever has stored it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

from conductor_app import DuplicateExecution, api
from conductor_app.exceptions import IdempotencyConflict, InvalidArgument, InvalidArgumentType
from conductor_app.models import Execution, Tag
from conductor_app.transitions import creating_many, uniqueness
from tests.app.scenarios import add
from tests.support.bodies import durable, go_on

pytestmark = pytest.mark.django_db


def sync_task(**options: Any) -> Any:
    return durable(unique="customer", **options)(lambda ctx, customer, n=0: f"{customer}{n}")


def keys() -> list[str | None]:
    return list(Execution.objects.order_by("unique_key").values_list("unique_key", flat=True))


# ---------------------------------------------------------------------------------------------------------- "return"


def test_each_payload_has_the_key_that_the_decorator_makes_of_it() -> None:
    sync = sync_task()
    open_one = sync.delay(customer="b")
    results = sync.start_many([{"customer": customer, "n": 7} for customer in ("a", "b", "c")])
    assert [result.is_new for result in results] == [True, False, True]
    assert results[1].id == open_one.id
    assert keys() == ["a", "b", "c"]
    go_on()
    assert [api.get_result(result) for result in results] == ["a7", "b0", "c7"], "Other arguments are dropped"
    assert keys() == [None] * 3


def test_of_payloads_with_one_key_the_first_is_stored() -> None:
    sync = sync_task()
    results = sync.start_many([{"customer": "b", "n": n} if n else {"customer": "a"} for n in (0, 1, 2)])
    assert [result.is_new for result in results] == [True, True, False]
    assert results[2].id == results[1].id
    assert Execution.objects.count() == 2
    go_on()
    assert api.get_result(results[2]) == "b1"


def test_a_call_may_bring_keys_for_a_task_that_has_none() -> None:
    first = add.start_many([{"x": n, "y": 0} for n in range(3)], unique_keys=["a", None, "b"])
    second = add.start_many([{"x": n, "y": 0} for n in range(4)], unique_keys=["b", None, "c", "a"])
    assert [result.is_new for result in first] == [True] * 3
    assert [result.is_new for result in second] == [False, True, True, False]
    assert (second[0].id, second[3].id) == (first[2].id, first[0].id)
    assert add.apply_async((1, 2), unique_key="c").id == second[2].id, "A single call has other keys"


def test_a_key_of_the_call_wins_over_the_decorators_and_none_leaves_that() -> None:
    sync = sync_task()
    sync.start_many([{"customer": "a"}, {"customer": "b"}], unique_keys=["k", None])
    assert keys() == ["b", "k"]


def test_a_row_is_like_that_of_a_single_call() -> None:
    add.apply_async(kwargs={"x": 1, "y": 2}, unique_key="one", tags={"a": "b"})
    add.start_many([{"x": 1, "y": 2}], unique_keys=["two"], tags={"a": "b"})
    own = {"id", "root_id", "unique_key", "created_at", "due_at", "dispatch_at", "options"}
    one, other = Execution.objects.order_by("id").values()
    assert {key: value for key, value in one.items() if key not in own} == {
        key: value for key, value in other.items() if key not in own
    }
    assert one["options"].replace("one", "two") == other["options"], "A retry would not take the key again"


def test_payloads_without_a_key_may_be_many() -> None:
    sync = sync_task()
    results = sync.start_many([{"customer": None}] * 3)
    assert [result.is_new for result in results] == [True] * 3


def test_a_call_where_all_are_there_stores_nothing() -> None:
    sync = sync_task()
    first = sync.start_many([{"customer": "a"}, {"customer": "b"}])
    again = sync.start_many([{"customer": "b"}, {"customer": "a"}])
    assert [(result.id, result.is_new) for result in again] == [(first[1].id, False), (first[0].id, False)]


def test_keys_cost_one_look_more() -> None:
    with CaptureQueriesContext(connection) as captured:
        add.start_many([{"x": n, "y": 0} for n in range(3)], unique_keys=["a", "b", "c"])
    words = [query["sql"].split()[0] for query in captured.captured_queries]
    assert [word for word in words if word not in ("SAVEPOINT", "RELEASE")] == ["SELECT", "INSERT", "SELECT"]


# ---------------------------------------------------------------------------------------------------------- "refuse"


def test_a_key_that_is_taken_is_refused_and_nothing_is_stored() -> None:
    sync = sync_task(on_conflict="refuse")
    holder = sync.delay(customer="b")
    with transaction.atomic():
        with pytest.raises(DuplicateExecution) as caught:
            sync.start_many([{"customer": customer} for customer in ("a", "b", "c")], tags={"a": "b"})
        assert Execution.objects.count() == 1, "The caller's transaction is not usable any more"
        assert not Tag.objects.exists()
    assert f"Execution {holder.id} of {sync.name} has the unique key 'b' of payloads[1], and is queued." in str(
        caught.value
    )
    assert "leave that payload out" in str(caught.value)
    assert (str(caught.value.execution_id), caught.value.status) == (holder.id, "queued")


def test_two_payloads_with_one_key_are_refused() -> None:
    sync = sync_task(on_conflict="refuse")
    with pytest.raises(DuplicateExecution, match=r"payloads\[0\] and payloads\[2\] have one unique key, 'a', and"):
        sync.start_many([{"customer": customer} for customer in ("a", "b", "a")])
    assert not Execution.objects.exists()


def test_an_idempotency_key_is_looked_at_first() -> None:
    sync = sync_task(on_conflict="refuse")
    payloads = [{"customer": "a"}, {"customer": "b"}]
    first = sync.start_many(payloads, idempotency_keys=["1", "2"])
    again = sync.start_many([*payloads, payloads[1]], idempotency_keys=["1", "2", "2"])
    assert [result.id for result in again] == [first[0].id, first[1].id, first[1].id]
    assert not any(result.is_new for result in again)
    with pytest.raises(DuplicateExecution, match=r"the unique key 'a' of payloads\[0\]"):
        sync.start_many(payloads, idempotency_keys=["3", "2"])
    with pytest.raises(IdempotencyConflict, match=r"'1' of payloads\[0\]"):
        sync.start_many([{"customer": "c"}], idempotency_keys=["1"])


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unique_keys": ["a"]}, InvalidArgument, "got 1 unique_keys for 2 payloads. Each payload needs a key, or N"),
        ({"unique_keys": "ab"}, InvalidArgumentType, "unique_keys of tests.app.scenarios.add.start_many() must be a l"),
        ({"unique_keys": {"a", "b"}}, InvalidArgumentType, "must be a list, with a key or None for each payload, got"),
        ({"unique_keys": ["a", 7]}, InvalidArgumentType, "unique_keys[1] must be str, got int 7"),
        ({"unique_keys": ["a", ""]}, InvalidArgument, "unique_keys[1] must have 1–255 bytes, got 0"),
        ({"unique_keys": ["a", "b "]}, InvalidArgument, "unique_keys[1] must be printable text without spaces at"),
        (
            {"unique_keys": [None, "b"], "idempotency_keys": [None, "i"]},
            InvalidArgument,
            "payloads[1]: idempotency_key and a unique key",
        ),
    ],
)
def test_bad_keys_are_refused_and_nothing_is_stored(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        add.start_many([{"x": 1, "y": 1}, {"x": 2, "y": 2}], **options)
    assert message in str(caught.value)
    assert not Execution.objects.exists()


def test_a_bad_key_of_the_decorators_names_its_payload() -> None:
    sync = sync_task()
    with pytest.raises(InvalidArgumentType, match=r'^payloads\[1\]: argument "customer" of '):
        sync.start_many([{"customer": "a"}, {"customer": 1.5}])
    assert not Execution.objects.exists()


def test_replace_is_for_single_calls() -> None:
    build = sync_task(on_conflict="replace")
    with pytest.raises(
        InvalidArgument, match=r'^payloads\[1\] has a unique key, and on_conflict="replace" would cancel'
    ):
        build.start_many([{"customer": None}, {"customer": "a"}])
    assert not Execution.objects.exists()


# ------------------------------------------------------------------------------------- what changes between two looks


def looking(monkeypatch: pytest.MonkeyPatch, *meanwhile: Callable[[], object]) -> None:
    """Do something after the first look, the second, and so on."""
    look, each = creating_many._existing, list(meanwhile)

    def looked(*args: Any) -> Any:
        found = look(*args)
        if each:
            each.pop(0)()
        return found

    monkeypatch.setattr(creating_many, "_existing", looked)


def test_a_key_that_is_taken_between_the_look_and_the_insert_is_no_integrity_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync = sync_task()
    taken: list[Any] = []
    looking(monkeypatch, lambda: taken.append(sync.delay(customer="b")))
    with transaction.atomic():
        results = sync.start_many([{"customer": customer} for customer in ("a", "b", "c", "b")])
        assert Execution.objects.count() == 3
    assert [result.is_new for result in results] == [True, False, True, False]
    assert results[1].id == results[3].id == taken[0].id


def test_a_key_that_is_taken_between_the_look_and_the_insert_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = sync_task(on_conflict="refuse")
    looking(monkeypatch, lambda: sync.delay(customer="b"))
    with transaction.atomic():
        with pytest.raises(DuplicateExecution, match=r"'b' of payloads\[1\]"):
            sync.start_many([{"customer": "a"}, {"customer": "b"}])
        assert keys() == [], "What came meanwhile stood in the same savepoint here"


def test_a_holder_that_ends_between_the_violation_and_the_look_is_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync = sync_task()
    look, answers, holders = creating_many._existing, [0, 0], []

    def looked(*args: Any) -> Any:
        if len(answers) == 2:
            holders.append(sync.delay(customer="b"))
        elif len(answers) == 1:
            api.cancel(holders[0])
        return look(*args) if not answers else answers.pop() or {}

    monkeypatch.setattr(creating_many, "_existing", looked)
    monkeypatch.setattr(creating_many, "snapshot_level", lambda _using: "")
    results = sync.start_many([{"customer": "a"}, {"customer": "b"}])
    assert [result.is_new for result in results] == [True, True]
    assert Execution.objects.get(pk=holders[0].id).is_final
    assert results[1].id != holders[0].id


def test_a_holder_that_a_snapshot_does_not_show_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = sync_task()
    sync.delay(customer="b")
    monkeypatch.setattr(creating_many, "_existing", lambda *_: {})
    monkeypatch.setattr(creating_many, "snapshot_level", lambda _using: "repeatable read")
    with transaction.atomic():
        with pytest.raises(
            DuplicateExecution, match="has one of the unique keys of this call, and this transaction re"
        ):
            sync.start_many([{"customer": "a"}, {"customer": "b"}])
        assert keys() == ["b"]


def test_another_violation_is_no_key_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def insert(_tags: Any) -> None:
        raise IntegrityError("another one")

    monkeypatch.setattr(creating_many.tagging, "insert_all", insert)
    with pytest.raises(IntegrityError, match="another one"):
        add.start_many([{"x": 1, "y": 1}], unique_keys=["a"])
    assert not Execution.objects.exists()


def test_the_violation_of_a_unique_key_is_known_by_its_text() -> None:
    add.apply_async((1, 1), unique_key="k", idempotency_key=None)
    add.apply_async((1, 1), idempotency_key="i")
    with pytest.raises(IntegrityError) as of_unique_key, transaction.atomic():
        Execution.objects.filter(idempotency_key="i").update(unique_key="k")
    with pytest.raises(IntegrityError) as of_another, transaction.atomic():
        Execution.objects.filter(unique_key="k").update(idempotency_key="i")
    assert uniqueness.is_violated(of_unique_key.value)
    assert not uniqueness.is_violated(of_another.value)


def test_a_commit_whose_answer_was_lost_is_no_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stood for one by its unique key may have ended by then."""
    sync = sync_task()
    holder = sync.delay(customer="b")
    persist_briefly = creating_many.guards.persist_briefly

    def twice(work: Callable[[], Any], **options: Any) -> Any:
        monkeypatch.undo()
        work()
        api.cancel(holder)
        return persist_briefly(work, **options)

    monkeypatch.setattr(creating_many.guards, "persist_briefly", twice)
    results = sync.start_many([{"customer": "a"}, {"customer": "b"}])
    assert [result.is_new for result in results] == [True, False]
    assert results[1].id == holder.id
    assert Execution.objects.count() == 2
