"""Two or more connections that want one unique key at once, in an order of steps, on each database."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from conductor_app import DuplicateExecution, api, transitions
from conductor_app.engine import calls, sweeper
from conductor_app.exceptions import RetryRefused
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus, OnConflict
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.values.uniqueness import Unique
from tests.support.executions import FAILURE, OWNER, claimed, committing, fresh, invocation, new, running
from tests.support.locks import locked
from tests.support.process import NotingBroker
from tests.support.sessions import OPTIONS, PATIENCE_SECONDS, Actor, in_turn


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test."""
    process.broker = NotingBroker()
    with committing(django_db_blocker):
        yield


@pytest.fixture(params=range(2))
def options(request: pytest.FixtureRequest, transactional_db: None) -> dict[str, Any]:
    """The options of the connections of each actor."""
    each = OPTIONS[connection.vendor]
    if request.param >= len(each):
        pytest.skip("no other isolation level")
    return each[request.param]


def create(how: str = "return", payload: str = "[[],{}]", **unique: Any) -> Callable[[], tuple[Execution, bool]]:
    """Return a call with the key ``k``."""
    countdown = unique.get("debounce", 0)

    def call() -> tuple[Execution, bool]:
        wanted = Unique("k", OnConflict(how), **unique)
        row = new(unique=wanted, options='{"unique": "k"}', payload=payload, countdown=countdown)
        return calls.create(row, None)

    return call


def keys() -> list[Any]:
    """Return who has the key."""
    return list(Execution.objects.filter(unique_key="k").values_list("pk", flat=True))


# -------------------------------------------------------------------------------------------------------- two creators


def test_a_second_caller_gets_the_first_ones_execution_when_that_is_committed(options: Any) -> None:
    first, second = in_turn(options, create(), create())

    assert first[1]
    assert (second[0].pk, second[1]) == (first[0].pk, False)


def test_a_second_caller_is_refused_when_the_first_one_has_committed(options: Any) -> None:
    first, second = in_turn(options, create(), create("refuse"))

    assert isinstance(second, DuplicateExecution)
    assert second.execution_id == first[0].pk


@pytest.mark.parametrize("how", ["return", "refuse", "replace"])
def test_a_second_caller_stores_its_own_when_the_first_one_rolls_back(options: Any, how: str) -> None:
    first, second = in_turn(options, create(), create(how), rolls_back=True)

    assert second[1]
    assert keys() == [second[0].pk]
    assert not Execution.objects.filter(pk=first[0].pk).exists()


def test_a_second_caller_in_a_transaction_of_its_own_goes_on_in_it(options: Any) -> None:
    if "isolation_level" in options:
        pytest.skip("such a transaction cannot see it")

    def in_a_transaction() -> Any:
        with transaction.atomic():
            Execution.objects.count()
            found = create()()
            return found, Execution.objects.filter(pk=found[0].pk).count()

    first, (second, seen) = in_turn(options, create(), in_a_transaction)

    assert (second[0].pk, second[1], seen) == (first[0].pk, False, 1)


def test_of_two_that_replace_one_the_second_replaces_the_first(options: Any) -> None:
    old = claimed(create()()[0])
    first, second = in_turn(options, create("replace"), create("replace"))

    assert keys() == [second[0].pk]
    assert fresh(second[0]).predecessor == old.pk
    assert fresh(first[0]).cancel_reason == f"replaced by {second[0].pk}"
    assert fresh(old).cancel_reason == f"replaced by {first[0].pk}"
    transitions.cancel_running(old)
    assert fresh(second[0]).due_at is not None


@pytest.mark.parametrize("how", ["return", "refuse", "replace"])
def test_twenty_callers_of_one_key_at_once(options: Any, how: str) -> None:
    gate = threading.Barrier(20)

    def call() -> Any:
        gate.wait(PATIENCE_SECONDS)
        return create(how)()

    outcomes = [actor.outcome() for actor in [Actor(options, call) for _ in range(20)]]
    sweeper.sweep()

    if how == "replace":
        assert all(not isinstance(outcome, BaseException) and outcome[1] for outcome in outcomes), outcomes
        queued = Execution.objects.get(status=ExecutionStatus.QUEUED)
        assert keys() == [queued.pk]
        assert queued.predecessor is None
        assert Execution.objects.filter(status=ExecutionStatus.CANCELLED).count() == 19
        return
    assert Execution.objects.count() == 1
    others = [outcome for outcome in outcomes if isinstance(outcome, BaseException) or not outcome[1]]
    assert len(others) == 19
    if how == "refuse":
        assert {type(outcome) for outcome in others} == {DuplicateExecution}
    else:
        assert {outcome[0].pk for outcome in others} == set(keys())


# --------------------------------------------------------------------------------------------- an end and its successor


def end_of(run: Execution, how: str) -> Callable[[], Any]:
    """Return the end of a run."""
    if how == "succeeds":
        return lambda: transitions.succeed(run, "1")
    if how == "fails":
        return lambda: transitions.fail(run, FAILURE)
    return lambda: transitions.cancel_running(run)


ENDS = [("succeeds", {"debounce": 5.0}), ("fails", {"debounce": 5.0}), ("is cancelled", {"how": "replace"})]


@pytest.mark.parametrize(("how", "call"), ENDS, ids=[how for how, _ in ENDS])
def test_an_end_that_waits_for_a_new_successor_lets_it_go(options: Any, how: str, call: dict[str, Any]) -> None:
    old = claimed(create()()[0])
    if how == "is cancelled":
        transitions.request_cancel(old.pk, "enough")
    successor, _ = in_turn(options, create(**call), end_of(old, how))

    after = fresh(successor[0])
    assert fresh(old).is_final
    assert (after.predecessor, after.unique_key) == (None, "k")
    assert after.due_at is not None
    assert not sweeper.sweep(audit=True)["stranded"]


@pytest.mark.parametrize(("how", "call"), ENDS, ids=[how for how, _ in ENDS])
def test_a_call_that_waits_for_an_end_stores_one_that_waits_for_nothing(
    options: Any, how: str, call: dict[str, Any]
) -> None:
    old = claimed(create()()[0])
    if how == "is cancelled":
        transitions.request_cancel(old.pk, "enough")
    _, successor = in_turn(options, end_of(old, how), create(**call))

    after = fresh(successor[0])
    assert after.predecessor is None
    assert after.due_at is not None
    assert keys() == [after.pk]


def test_an_end_lets_the_last_of_a_chain_go(options: Any) -> None:
    old = claimed(create()()[0])
    second = create("replace")()[0]
    third, _ = in_turn(options, create("replace"), end_of(old, "is cancelled"))

    assert fresh(third[0]).due_at is not None
    assert fresh(second).cancel_requested_at is not None
    assert transitions.claim(second.pk, OWNER) is None
    assert not sweeper.sweep(audit=True)["stranded"]


def test_one_that_comes_to_a_chain_while_that_ends_waits_for_the_one_that_was_let_go(options: Any) -> None:
    old = claimed(create()()[0])
    second = create("replace")()[0]
    _, third = in_turn(options, end_of(old, "is cancelled"), create("replace"))
    sweeper.sweep()

    assert fresh(second).status == ExecutionStatus.CANCELLED
    assert fresh(third[0]).predecessor is None
    assert keys() == [third[0].pk]


def test_a_cancel_of_one_that_waits_and_the_end_of_its_predecessor(options: Any) -> None:
    old = claimed(create()()[0])
    second = create("replace")()[0]
    transitions.request_cancel(second.pk, "enough")
    is_cancelled, _ = in_turn(options, lambda: transitions.cancel_flagged(second.pk), end_of(old, "is cancelled"))

    assert is_cancelled
    assert fresh(second).status == fresh(old).status == ExecutionStatus.CANCELLED
    assert keys() == []


def test_the_end_of_a_predecessor_and_a_cancel_of_one_that_waits(options: Any) -> None:
    old = claimed(create()()[0])
    second = create("replace")()[0]
    transitions.request_cancel(second.pk, "enough")
    _, is_cancelled = in_turn(options, end_of(old, "is cancelled"), lambda: transitions.cancel_flagged(second.pk))
    if not is_cancelled:
        sweeper.sweep()

    assert fresh(second).status == fresh(old).status == ExecutionStatus.CANCELLED
    assert keys() == []


@pytest.mark.usefixtures("transactional_db")
def test_a_cancel_of_one_that_waits_does_not_wait_for_its_predecessors_row() -> None:
    """That is locked by an end, which may ask for the row of the one that waits next."""
    old = claimed(create()()[0])
    second = create("replace")()[0]
    transitions.request_cancel(second.pk, "enough")
    with locked(old):
        assert transitions.cancel_flagged(second.pk) is False

    assert transitions.cancel_flagged(second.pk) is True
    assert keys() == [old.pk]


# -------------------------------------------------------------------------------------------------- debounce and claim


def test_a_claim_that_waits_for_a_debounced_call_comes_too_early(options: Any) -> None:
    first = create(debounce=5.0)()[0]
    clock.shift(dt.timedelta(seconds=6))
    merged, run = in_turn(options, create(payload="[[2],{}]", debounce=5.0), lambda: transitions.claim(first.pk, OWNER))

    assert (merged[0].pk, merged[1], run) == (first.pk, False, None)
    assert fresh(first).args == [2]


def test_a_debounced_call_that_waits_for_a_claim_is_run_after_it(options: Any) -> None:
    first = create(debounce=5.0)()[0]
    clock.shift(dt.timedelta(seconds=6))
    run, second = in_turn(options, lambda: transitions.claim(first.pk, OWNER), create(payload="[[2],{}]", debounce=5.0))

    assert second[1]
    assert fresh(second[0]).predecessor == first.pk
    assert (run.args, fresh(first).args) == ([], [])
    transitions.succeed(run, "1")
    assert fresh(second[0]).args == [2]
    assert fresh(second[0]).predecessor is None


# ----------------------------------------------------------------------------------------------------- retry; a child


def test_a_call_that_waits_for_a_retry_gets_what_runs_again(options: Any) -> None:
    failed = claimed(create()()[0])
    transitions.fail(failed, FAILURE)
    _, found = in_turn(options, lambda: api.retry(failed), create())

    assert (found[0].pk, found[1]) == (failed.pk, False)


def test_a_retry_that_waits_for_a_call_is_refused(options: Any) -> None:
    failed = claimed(create()()[0])
    transitions.fail(failed, FAILURE)
    created, refused = in_turn(options, create(), lambda: api.retry(failed))

    assert isinstance(refused, RetryRefused), refused
    # Of a snapshot that is older, nothing else can be said.
    assert refused.reason == "its unique key belongs to another execution"
    assert refused.holder_id in (created[0].pk, None if "isolation_level" in options else created[0].pk)
    assert fresh(failed).status == ExecutionStatus.FAILED


def test_a_parent_that_waits_for_a_call_goes_on_without_its_child(options: Any) -> None:
    parent = running()
    wait = invocation(parent, unique=Unique("k", OnConflict.REFUSE))
    created, suspended = in_turn(options, create(), lambda: transitions.suspend(parent, wait))

    assert suspended is False
    assert keys() == [created[0].pk]
    assert fresh(parent).status == ExecutionStatus.RUNNING
    assert not Execution.objects.filter(parent_id=parent.pk).exists()


# ----------------------------------------------------------------------------------------------- many by one call


def start(keys: str) -> Callable[[], list[tuple[Any, bool]]]:
    """Return a call that starts one execution for each key."""

    def call() -> list[tuple[Any, bool]]:
        news = [new(unique=Unique(key), options=f'{{"unique": "{key}"}}') for key in keys]
        return [(row.pk, is_new) for row, is_new in transitions.create_many(news, lambda *_: None)]

    return call


def start_or_refuse(keys: str) -> Callable[[], list[tuple[Any, bool]]]:
    """Return the same for keys that refuse."""

    def call() -> list[tuple[Any, bool]]:
        news = [new(unique=Unique(key, OnConflict.REFUSE)) for key in keys]
        return [(row.pk, is_new) for row, is_new in transitions.create_many(news, lambda *_: None)]

    return call


def test_many_wait_for_a_single_call_and_get_its_execution(options: Any) -> None:
    first, many = in_turn(options, create(), start("akz"))

    assert [is_new for _, is_new in many] == [True, False, True]
    assert many[1][0] == first[0].pk
    assert Execution.objects.count() == 3


def test_many_store_what_a_single_call_rolls_back(options: Any) -> None:
    first, many = in_turn(options, create(), start("akz"), rolls_back=True)

    assert [is_new for _, is_new in many] == [True] * 3
    assert not Execution.objects.filter(pk=first[0].pk).exists()


def test_many_that_refuse_are_refused_by_a_single_call_that_commits(options: Any) -> None:
    first, many = in_turn(options, create(), start_or_refuse("akz"))

    assert isinstance(many, DuplicateExecution)
    assert (many.execution_id, "'k' of payloads[1]" in str(many)) == (first[0].pk, True)
    assert Execution.objects.count() == 1


def test_a_single_call_waits_for_many_and_gets_one_of_theirs(options: Any) -> None:
    many, single = in_turn(options, start("akz"), create())

    assert (single[0].pk, single[1]) == (many[1][0], False)


def test_many_in_the_callers_transaction_go_on_in_it(options: Any) -> None:
    if "isolation_level" in options:
        pytest.skip("such a transaction cannot see it")

    def in_a_transaction() -> Any:
        with transaction.atomic():
            Execution.objects.count()
            found = start("akz")()
            return found, Execution.objects.count()

    if connection.vendor == "sqlite":
        pytest.skip("a transaction that has read waits for nobody there")
    first, (many, seen) = in_turn(options, create(), in_a_transaction)

    assert [is_new for _, is_new in many] == [True, False, True]
    assert (many[1][0], seen) == (first[0].pk, 3)


def test_many_in_a_snapshot_that_shows_no_holder_are_refused_and_go_on(options: Any) -> None:
    if "isolation_level" not in options:
        pytest.skip("it sees the holder")

    def in_a_transaction() -> Any:
        with transaction.atomic():
            Execution.objects.count()
            with pytest.raises(DuplicateExecution, match="reads a snapshot"):
                start("akz")()
            return Execution.objects.count()

    _, seen = in_turn(options, create(), in_a_transaction)

    assert seen == 0


def test_many_store_their_own_when_what_was_in_the_way_has_ended_before_they_look(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("elsewhere what was in the way stays locked until they have looked")
    look, looks, ended = transitions.creating_many._existing, [], []
    holding = Actor(options, create(), holds=True)

    def end() -> bool:
        holder = holding.outcome()[0]
        transitions.request_cancel(holder.pk, "enough")
        return bool(transitions.cancel_flagged(holder.pk))

    def looking(*args: Any) -> Any:
        looks.append(args)
        if len(looks) == 2:
            ended.append(Actor(options, end).outcome())  # after the violation
        return look(*args)

    monkeypatch.setattr(transitions.creating_many, "_existing", looking)
    holding.held()
    waiting = Actor(options, start("akz")).wait_blocked()
    holding.go_on()
    many = waiting.outcome()

    assert ended == [True]
    assert [is_new for _, is_new in many] == [True] * 3
    assert keys() == [many[1][0]]


@pytest.mark.parametrize("keys", [("abcd", "dcba"), ("acbd", "dbxa")])
def test_two_calls_with_keys_in_opposite_order_do_not_wait_for_each_other(
    options: Any, keys: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("one writes at a time there")
    monkeypatch.setattr(transitions.creating_many, "_BATCH_BYTES", 1)
    make = transitions.creating_many._CREATE.make
    stopped, go_on, firsts = threading.Event(), threading.Event(), []

    def stopping(*args: Any, **given: Any) -> Any:
        made = make(*args, **given)
        if not firsts:
            firsts.append(threading.current_thread())
            stopped.set()
            assert go_on.wait(PATIENCE_SECONDS)
        return made

    def in_a_transaction(keys: str) -> Callable[[], Any]:
        # The caller's, which nobody runs again after a deadlock.
        def call() -> Any:
            with transaction.atomic():
                return start(keys)()

        return call

    monkeypatch.setattr(transitions.creating_many._CREATE, "make", stopping)
    first = Actor({}, in_a_transaction(keys[0]))
    assert stopped.wait(PATIENCE_SECONDS)
    second = Actor({}, in_a_transaction(keys[1]))
    try:
        second.wait_blocked()
    finally:
        go_on.set()
    stored, found = dict(zip(keys[0], first.outcome(), strict=True)), second.outcome()

    assert all(is_new for _, is_new in stored.values())
    assert found == [(*stored[key][:1], False) if key in stored else (found[2][0], True) for key in keys[1]]


def test_ten_calls_at_once_with_the_same_keys_in_any_order(options: Any) -> None:
    gate = threading.Barrier(10)

    def call(number: int) -> Callable[[], Any]:
        def started() -> Any:
            gate.wait(PATIENCE_SECONDS)
            return start("abcdefgh"[number % 8 :] + "abcdefgh"[: number % 8])()

        return started

    outcomes = [actor.outcome() for actor in [Actor(options, call(number)) for number in range(10)]]

    assert not any(isinstance(outcome, BaseException) for outcome in outcomes), outcomes
    assert sum(is_new for outcome in outcomes for _, is_new in outcome) == 8
    assert Execution.objects.count() == 8
