"""Two calls of ``start_many`` that share idempotency keys: one after the other, and never in a ring."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection, connections, transaction

from conductor_app import api
from conductor_app.exceptions import IdempotencyConflict
from conductor_app.models import Execution, Tag
from conductor_app.store.process import process
from conductor_app.transitions import creating_many
from tests.app.scenarios import add
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race
from tests.support.polling import wait_until
from tests.support.process import NotingBroker

races = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store each execution by a statement of its own, so that a call can stop between two of them."""
    monkeypatch.setattr(creating_many, "_BATCH_BYTES", 1)


def start(keys: str, x: int = 0) -> list[tuple[Any, bool]]:
    """Start an execution for each key, in a transaction of the caller's, which nobody runs again."""
    with transaction.atomic():
        return _results(keys, x)


def start_alone(keys: str, x: int = 0) -> list[tuple[Any, bool]]:
    """Start an execution for each key."""
    return _results(keys, x)


def _results(keys: str, x: int) -> list[tuple[Any, bool]]:
    results = add.start_many([{"x": x, "y": 0}] * len(keys), idempotency_keys=list(keys), tags={"a": "b"})
    return [(result.id, bool(result.is_new)) for result in results]


@races
def test_two_calls_with_keys_in_opposite_order_do_not_wait_for_each_other(race: Race, row_by_row: None) -> None:
    first = race.hold("first", start, "abc", stop="after created")
    second = race.start("second", start, "cba").wait_blocked(by=first)
    stored = first.go_on().result()
    found = second.result()
    assert [is_new for _, is_new in stored] == [True] * 3
    assert found == [(key, False) for key, _ in reversed(stored)]
    assert (Execution.objects.count(), Tag.objects.count()) == (3, 3)
    assert race.conflicts() == []


@races
@isolations
def test_of_two_calls_with_one_key_the_second_gets_the_firsts_execution(race: Race, isolation: Any) -> None:
    first = race.hold("first", start_alone, "ab", stop=BEFORE_COMMIT, isolation=isolation)
    second = race.start("second", start_alone, "bc", isolation=isolation).wait_blocked(by=first)
    stored = first.go_on().result()
    found = second.result()
    assert [is_new for _, is_new in found] == [False, True]
    assert found[0][0] == stored[1][0]
    assert Execution.objects.count() == 3


@races
def test_a_second_call_stores_what_the_first_has_rolled_back(race: Race) -> None:
    def start_and_fail() -> None:
        with transaction.atomic():
            _results("ab", 0)
            transaction.set_rollback(True)

    first = race.hold("first", start_and_fail, stop="after transitions.creating_many._note_instants")
    second = race.start("second", start_alone, "ab").wait_blocked(by=first)
    first.go_on().result()
    assert [is_new for _, is_new in second.result()] == [True, True]
    assert Execution.objects.count() == 2


@races
def test_a_key_that_somebody_takes_for_another_payload_is_a_conflict_and_all_is_undone(race: Race) -> None:
    first = race.hold("first", start_alone, "b")
    second = race.start("second", start_alone, "abc", 7).wait_blocked(by=first)
    first.go_on().result()
    assert second.outcome() is IdempotencyConflict
    assert Execution.objects.count() == 1


@races
def test_a_single_call_and_one_of_many_get_one_execution(race: Race) -> None:
    def single() -> Any:
        return add.apply_async(kwargs={"x": 0, "y": 0}, idempotency_key="b").id

    first = race.hold("first", single)
    second = race.start("second", start_alone, "abc").wait_blocked(by=first)
    key = first.go_on().result()
    assert [is_new for _, is_new in second.result()] == [True, False, True]
    assert second.result()[1][0] == key
    assert api.find(key)


@pytest.mark.django_db(transaction=True)
def test_on_mariadb_they_do_not_wait_for_each_other_either(monkeypatch: pytest.MonkeyPatch, row_by_row: None) -> None:
    if connection.vendor != "mysql":
        pytest.skip("the fixture race is PostgreSQL's")
    process.broker = NotingBroker()
    make = creating_many._CREATE.make
    stopped, go_on = threading.Event(), threading.Event()
    outcomes: dict[str, Any] = {}

    def stopping(*args: Any, **given: Any) -> Any:
        made = make(*args, **given)
        if threading.current_thread().name == "first" and not stopped.is_set():
            stopped.set()
            assert go_on.wait(20)
        return made

    def act(keys: str) -> None:
        try:
            outcomes[keys] = start(keys)
        except BaseException as error:  # noqa: BLE001 - looked at in the test's thread
            outcomes[keys] = error
        finally:
            connections.close_all()

    monkeypatch.setattr(creating_many._CREATE, "make", stopping)
    first = threading.Thread(target=act, args=("abc",), name="first", daemon=True)
    second = threading.Thread(target=act, args=("cba",), name="second", daemon=True)
    first.start()
    assert stopped.wait(20)
    second.start()
    try:
        wait_until(_somebody_waits_for_a_lock)
    finally:
        go_on.set()
    first.join(20)
    second.join(20)
    stored = outcomes["abc"]
    assert [is_new for _, is_new in stored] == [True] * 3
    assert outcomes["cba"] == [(key, False) for key, _ in reversed(stored)]


def _somebody_waits_for_a_lock() -> bool:
    # innodb_trx tells of it late, or not at all.
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT COUNT(*) FROM information_schema.processlist "
            "WHERE db = DATABASE() AND time_ms > 300 AND info LIKE 'INSERT INTO `conductor_app_execution`%%'"
        )
        return bool(cursor.fetchone()[0])
