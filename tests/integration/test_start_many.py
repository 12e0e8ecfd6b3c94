"""``task.start_many``: many executions by one call, all of them or none."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

from conductor_app import api, signals, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import (
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    NotSerializable,
    PayloadTooLarge,
    TooManyTags,
)
from conductor_app.models import Execution, Tag
from conductor_app.store.process import process
from conductor_app.transitions import creating_many
from project.celery import app
from tests.app.scenarios import add, echo, pass_through
from tests.support.bodies import durable, go_on
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db


class Broker(NotingBroker):
    """It notes also which messages were waited for, and may refuse all after so many."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []
        self.takes = 100_000

    def send(self, execution: Execution, *, waits: bool) -> None:
        self.is_away = len(self.ids) >= self.takes
        super().send(execution, waits=waits)
        self.waited.append(waits)


@pytest.fixture
def broker() -> Broker:
    """A broker that notes what is published, on whatever the suite runs."""
    process.worker.is_embedded = False
    process.broker = broker = Broker()
    return broker


def statements(act: Callable[[], Any]) -> list[str]:
    with CaptureQueriesContext(connection) as captured:
        act()
    return [query["sql"] for query in captured.captured_queries]


def test_each_payload_is_an_execution_and_its_result_stands_in_its_place() -> None:
    results = add.start_many({"x": n, "y": 1} for n in range(3))
    assert [result.is_new for result in results] == [True] * 3
    go_on()
    assert [api.get_result(result) for result in results] == [1, 2, 3]
    rows = list(Execution.objects.filter(parent=None).order_by("id"))
    assert [str(row.pk) for row in rows] == [result.id for result in results], "Not in the order of the payloads"
    assert {(row.root_id == row.pk, row.depth, row.parent_id, row.attempt) for row in rows} == {(True, 0, None, 1)}


def test_a_payload_is_as_that_of_a_child() -> None:
    results = pass_through.start_many([{"value": 1}, 2, [3]])
    go_on()
    assert [api.get_result(result) for result in results] == [1, 2, [3]]


def test_a_row_is_like_that_of_a_single_call() -> None:
    add.apply_async(kwargs={"x": 1, "y": 2}, countdown=60, tags={"a": "b"}, idempotency_key="one")
    add.start_many([{"x": 1, "y": 2}], countdown=60, tags={"a": "b"}, idempotency_keys=["many"])
    own = {"id", "root_id", "idempotency_key", "created_at", "due_at", "dispatch_at"}
    one, other = Execution.objects.order_by("id").values()
    assert {key: value for key, value in one.items() if key not in own} == {
        key: value for key, value in other.items() if key not in own
    }
    assert other["due_at"] - other["created_at"] == dt.timedelta(seconds=60) == one["due_at"] - one["created_at"]
    assert other["dispatch_at"] == other["due_at"]
    assert list(Tag.objects.values_list("root_id", "key", "value")) == [
        (one["id"], "a", "b"),
        (other["id"], "a", "b"),
    ]


def test_no_payloads_start_nothing() -> None:
    assert statements(lambda: add.start_many([])) == []
    assert add.start_many(iter(())) == []


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("payloads", "error", "message"),
    [
        ([{"x": 1, "y": 1}] * 17 + [{"x": {1}, "y": 1}], NotSerializable, 'payloads[17]["x"] is a set. Pass a'),
        ([{"x": 1, "y": float("nan")}], NotSerializable, 'NaN at payloads[0]["y"] is not JSON'),
        ([{"x": 1, "y": "\x00"}], NotSerializable, 'payloads[0]["y"] contains a NUL character'),
        ([{"x": 1, "y": "a" * 2_000_000}], PayloadTooLarge, "The encoded payloads[0] is too large: 2000019 >"),
        ([{"x": 1, "y": 1}, {"x": 1}], InvalidArgumentType, "payloads[1] does not fit tests.app.scenarios.add"),
        ([{"x": 1, "y": 1}, {"x": 1, 7: 1}], InvalidArgumentType, "payloads[1] of tests.app.scenarios.add.start_ma"),
        ("abc", InvalidArgumentType, "needs a list of payloads, one per execution, got str"),
        ({"x": 1}, InvalidArgumentType, "needs a list of payloads, one per execution, got dict"),
        (7, InvalidArgumentType, "needs a list of payloads, one per execution, got int"),
        (({"x": 1, "y": n} for n in range(10_001)), InvalidArgument, "got more than 10,000 payloads. Call it once for"),
    ],
)
def test_of_bad_payloads_the_place_is_told_and_nothing_is_stored(payloads: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        add.start_many(payloads)
    assert message in str(caught.value)
    assert not Execution.objects.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"idempotency_keys": ["a"]}, InvalidArgument, "got 1 idempotency_keys for 2 payloads. Each payload needs"),
        ({"idempotency_keys": "ab"}, InvalidArgumentType, "idempotency_keys of tests.app.scenarios.add.start_many()"),
        ({"idempotency_keys": ["a", 7]}, InvalidArgumentType, "idempotency_keys[1] must be str, got int"),
        ({"idempotency_keys": ["a", ""]}, InvalidArgument, "idempotency_keys[1] must have 1–255 characters, got 0"),
        ({"tags": [{"a": "b"}, {"a": "c"}]}, InvalidArgumentType, "must be a mapping, of all the executions, got list"),
        ({"tags": {"a": 7}}, InvalidArgumentType, 'payloads[0]: tag "a" must be str, got int 7'),
        ({"tags": {f"k{n}": "v" for n in range(11)}}, TooManyTags, "payloads[0]: tags would make 11 tags"),
        ({"countdown": "soon"}, InvalidArgumentType, "countdown must be a number of seconds or a timedelta, got str"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_stored(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        add.start_many([{"x": 1, "y": 1}, {"x": 2, "y": 2}], **options)
    assert message in str(caught.value)
    assert not Execution.objects.exists()


def test_the_error_of_a_function_that_says_tags_names_the_payload() -> None:
    task = durable(tags=lambda n: {"n": n if n == 2 else str(n)})(lambda ctx, n: n)
    with pytest.raises(InvalidArgumentType, match=r'^payloads\[2\]: tag "n" must be str, got int 2'):
        task.start_many([{"n": n} for n in range(3)])
    assert not Execution.objects.exists()


# ----------------------------------------------------------------------------------------------- idempotency keys


def test_a_key_that_is_known_gives_the_existing_execution() -> None:
    known = [add.apply_async(kwargs={"x": n, "y": 0}, idempotency_key=f"k{n}") for n in range(0, 10, 2)]
    results = add.start_many([{"x": n, "y": 0} for n in range(10)], idempotency_keys=[f"k{n}" for n in range(10)])
    assert [result.is_new for result in results] == [False, True] * 5
    assert [result.id for result in results[::2]] == [result.id for result in known]
    again = add.start_many([{"y": 0, "x": n} for n in range(10)], idempotency_keys=[f"k{n}" for n in range(10)])
    assert [(result.id, result.is_new) for result in again] == [(result.id, False) for result in results]
    assert Execution.objects.count() == 10


def test_of_payloads_with_one_key_the_first_is_stored() -> None:
    payloads = [{"x": 1, "y": 2}, {"x": 0, "y": 0}, {"y": 2, "x": 1}, {"x": 0, "y": 0}]
    results = add.start_many(payloads, idempotency_keys=["b", None, "b", None])
    assert [result.is_new for result in results] == [True, True, False, True]
    assert results[2].id == results[0].id
    assert Execution.objects.count() == 3


def test_a_key_of_another_payload_is_refused_and_nothing_is_stored() -> None:
    add.apply_async(kwargs={"x": 1, "y": 2}, idempotency_key="taken")
    with transaction.atomic():
        with pytest.raises(IdempotencyConflict) as caught:
            add.start_many([{"x": 0, "y": 0}, {"x": 9, "y": 9}], idempotency_keys=["a", "taken"])
        assert Execution.objects.count() == 1, "The caller's transaction is not usable any more"
    assert "The idempotency key 'taken' of payloads[1] belongs to execution" in str(caught.value)
    with pytest.raises(IdempotencyConflict, match=r"The idempotency key 'a' of payloads\[1\] belongs to"):
        add.start_many([{"x": 0, "y": 0}, {"x": 9, "y": 9}], idempotency_keys=["a", "a"])
    assert Execution.objects.count() == 1


def test_keys_are_told_apart_by_their_case_and_by_their_task() -> None:
    first = add.start_many([{"x": 1, "y": 1}] * 2, idempotency_keys=["K", "k"])
    other = echo.start_many([1], idempotency_keys=["k"])
    assert [result.is_new for result in [*first, *other]] == [True] * 3


def test_what_somebody_stores_between_the_look_and_the_insert_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    look = creating_many._existing
    known = []

    def looked(*args: Any) -> Any:
        found = look(*args)
        if not known:
            known.append(add.apply_async(kwargs={"x": 1, "y": 0}, idempotency_key="k1"))
        return found

    monkeypatch.setattr(creating_many, "_existing", looked)
    results = add.start_many([{"x": n, "y": 0} for n in range(3)], idempotency_keys=["k0", "k1", "k2"])
    assert [result.is_new for result in results] == [True, False, True]
    assert results[1].id == known[0].id
    assert Execution.objects.count() == 3


def test_another_violation_is_no_existing_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    def insert(_tags: Any) -> None:
        raise IntegrityError("another one")

    monkeypatch.setattr(transitions.creating_many.tagging, "insert_all", insert)
    with pytest.raises(IntegrityError, match="another one"):
        add.start_many([{"x": 1, "y": 1}], idempotency_keys=["a"])
    assert not Execution.objects.exists()


@pytest.mark.parametrize("keys", [["a", "b"], None])
def test_a_commit_whose_answer_was_lost_is_no_second_call(keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    persist_briefly = creating_many.guards.persist_briefly

    def twice(work: Callable[[], Any], **options: Any) -> Any:
        work()
        return persist_briefly(work, **options)

    monkeypatch.setattr(creating_many.guards, "persist_briefly", twice)
    results = add.start_many([{"x": 1, "y": 1}, {"x": 2, "y": 2}], idempotency_keys=keys, tags={"a": "b"})
    assert [result.is_new for result in results] == [True, True]
    assert (Execution.objects.count(), Tag.objects.count()) == (2, 2)


# ---------------------------------------------------------------------------------------------------- transactions


@pytest.mark.django_db(transaction=True)
def test_it_joins_the_callers_transaction(broker: Broker) -> None:
    created = []
    signals.execution_created.connect(receiver := lambda execution, **_: created.append(execution.pk))
    try:
        with transaction.atomic():
            results = add.start_many([{"x": n, "y": 0} for n in range(3)], tags={"a": "b"})
            assert not broker.ids
            assert not created
            transaction.set_rollback(True)
        assert (Execution.objects.count(), Tag.objects.count(), broker.ids, created) == (0, 0, [], [])
        with transaction.atomic():
            results = add.start_many([{"x": n, "y": 0} for n in range(3)])
            assert not broker.ids
        ids = [result.execution_id for result in results]
        assert broker.ids == ids == created
    finally:
        signals.execution_created.disconnect(receiver)


def test_thousands_take_few_statements() -> None:
    keys = [f"k{n}" for n in range(2_000)]
    taken = statements(
        lambda: add.start_many([{"x": n, "y": 0} for n in range(2_000)], idempotency_keys=keys, tags={"a": "b"})
    )
    assert (Execution.objects.count(), Tag.objects.count()) == (2_000, 2_000)
    inserts = [sql for sql in taken if "INSERT INTO" in sql and "conductor_app_execution" in sql]
    # As many as a script's batches, where there is no one statement.
    assert len(inserts) == (1 if connection.vendor == "postgresql" else 4)
    reads = [sql for sql in taken if sql.startswith("SELECT")]
    assert len(reads) <= (3 if connection.vendor == "postgresql" else 6)


def test_large_payloads_are_divided_among_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creating_many, "_BATCH_BYTES", 1_000)
    results = pass_through.start_many([{"value": "v" * 300} for _ in range(7)])
    assert Execution.objects.filter(pk__in=[result.id for result in results]).count() == 7


def test_without_keys_and_tags_it_asks_for_nothing_but_its_instants() -> None:
    taken = statements(lambda: add.start_many([{"x": n, "y": 0} for n in range(3)]))
    words = [sql.split()[0] for sql in taken if sql.split()[0] not in ("SAVEPOINT", "RELEASE")]
    assert words == ["INSERT", "SELECT"]


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.django_db(transaction=True)
def test_the_first_thousand_are_published_and_the_others_are_the_sweepers_at_once(
    broker: Broker, settings: Any
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "REDISPATCH_SECONDS": 600}  # on a slow machine, too
    results = add.start_many([{"x": n, "y": 0} for n in range(1_200)])
    ids = [result.execution_id for result in results]
    assert broker.ids == ids[:1_000]
    # One of a hundred waits for RabbitMQ's confirmation.
    assert [number for number, waits in enumerate(broker.waited, 1) if waits] == list(range(100, 1_001, 100))
    broker.ids.clear()
    assert sweeper.publish_due(limit=500) == 200
    assert set(broker.ids) == set(ids[1_000:])
    assert sweeper.publish_due(limit=500) == 0, "The first thousand are published twice"


@pytest.mark.django_db(transaction=True)
def test_when_the_broker_refuses_the_rest_is_left_to_the_sweeper(broker: Broker) -> None:
    broker.takes = 150
    results = add.start_many([{"x": n, "y": 0} for n in range(300)])
    assert len(broker.ids) == 150
    assert Execution.objects.filter(pk__in=[result.id for result in results], status="queued").count() == 300


def test_what_is_due_later_has_no_message(broker: Broker, django_capture_on_commit_callbacks: Any) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        add.start_many([{"x": 1, "y": 0}], countdown=dt.timedelta(hours=1))
    assert not broker.ids


def test_eager_mode_runs_them() -> None:
    app.conf.task_always_eager = True
    try:
        results = add.start_many([{"x": n, "y": 1} for n in range(3)], idempotency_keys=["a", "b", None])
    finally:
        app.conf.task_always_eager = False
    assert [result.get() for result in results] == [1, 2, 3]
    assert [result.is_new for result in results] == [True] * 3


def test_single_calls_tell_too_whether_they_are_new() -> None:
    first = add.apply_async(kwargs={"x": 1, "y": 2}, idempotency_key="one")
    again = add.apply_async(kwargs={"x": 1, "y": 2}, idempotency_key="one")
    assert (first.is_new, again.is_new, add.AsyncResult(first.id).is_new) == (True, False, None)
