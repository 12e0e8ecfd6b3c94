"""What a declaration means, in each form that is made of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.db.models import Case, F, Q, Value, When
from django.test.utils import CaptureQueriesContext

from conductor_app.models import Execution, Step, database
from conductor_app.states import StepKind, StepStatus
from conductor_app.store import clock, moves
from conductor_app.store.moves import Insert, Lock, Move, Update
from conductor_app.store.slots import NOW, Found, column, each, given
from conductor_app.transitions import parts
from tests.support.executions import fresh, queued, running

pytestmark = pytest.mark.django_db
FORMS: dict[str, Callable[[], Any]] = {"as the database likes it": nullcontext, "as a script": moves.as_scripts}
BY_ID = Q(id=given(Execution, "id"))


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    with FORMS[request.param]():
        yield


def make(move: Move, **given: Any) -> list[Any]:
    return [list(row) for row in move.make(database(), **given)]


def test_a_write_whose_guard_lets_nothing_through_ends_the_move() -> None:
    row = queued()
    priority = Update("priority", Execution, BY_ID & Q(priority=given(Execution, "priority")), {"priority": 9})
    reason = Update("reason", Execution, Q(id=Found("locked", "id", column(Execution, "id"))), {"cancel_reason": "x"})
    move = Move(priority, Lock("locked", Execution, Q(id=given(Execution, "id", "other")), finds=["id"]), reason)
    assert make(move, id=row.pk, priority=1, other=row.pk) == []
    assert (fresh(row).priority, fresh(row).cancel_reason) == (None, "")


def test_what_was_written_before_stays_when_a_later_write_finds_nothing() -> None:
    row, nobody = queued(), running()
    Execution.objects.filter(pk=nobody.pk).delete()
    move = Move(
        Update("priority", Execution, BY_ID, {"priority": 9}, returning=["priority"]),
        Lock("other", Execution, Q(id=given(Execution, "id", "other")), finds=["task"]),
        Update("reason", Execution, Q(), {"cancel_reason": "x"}, of="other", returning=["cancel_reason"]),
        tells=["priority", "other", "reason"],
    )
    assert make(move, id=row.pk, other=nobody.pk) == [[9, None, None]]
    assert fresh(row).priority == 9


def test_a_lock_tells_how_its_row_stood_and_an_update_how_it_stands() -> None:
    row = queued(priority=3)
    high = Found("row", "is_high")
    move = Move(
        Lock("row", Execution, BY_ID, finds=["priority", ("is_high", parts.flag(Q(priority__gte=3)))]),
        Update(
            "changed",
            Execution,
            Q(high),
            {"priority": Case(When(high, then=F("priority") + 1), default=Value(0))},
            of="row",
            returning=["priority", "root_id", "created_at"],
        ),
        tells=["row", "changed"],
    )
    assert make(move, id=row.pk) == [[3, True, 4, row.pk, fresh(row).created_at]]
    Execution.objects.update(priority=1)
    assert make(move, id=row.pk) == [[1, False, None, None, None]]


STORE = Move(
    Lock("parent", Execution, BY_ID),
    Insert(
        "steps",
        Step,
        {
            **{name: each(Step, name) for name in ("name", "result")},
            "execution_id": given(Step, "execution_id", "id"),
            "kind": StepKind.STEP,
            "status": StepStatus.SUCCEEDED,
            "created_at": NOW,
            "finished_at": NOW,
        },
        rows="rows",
    ),
)


@pytest.mark.parametrize("count", [1, 2, 1_203])
def test_many_rows_are_stored_in_their_order(count: int) -> None:
    run = running()
    rows = [{"name": f"step {number}", "result": None if number % 2 else '"%s \'"'} for number in range(count)]
    assert len(STORE.make(database(), id=run.pk, rows=rows)) == 1
    stored = Step.objects.filter(execution=run).order_by("id")
    assert [{"name": step.name, "result": step.result} for step in stored] == rows
    assert set(stored.values_list("fails_fast", "on_timeout")) == {(True, "cancel")}, "the model's defaults"


def test_many_rows_are_stored_together_or_not_at_all() -> None:
    run = running()
    with pytest.raises(IntegrityError):
        STORE.make(database(), id=run.pk, rows=[{"name": name, "result": None} for name in ("a", "b", "a")])
    assert not Step.objects.filter(execution=run).exists(), "and the transaction of the test goes on"


def test_constants_of_all_kinds_are_what_they_are() -> None:
    row = queued()
    text = "100 % of 'quotes', \\ and \"these\"; %s {rows} {keys} %(id)s"
    move = Move(
        Update(
            "row", Execution, BY_ID, {"cancel_reason": text, "priority": None, "depth": 0}, returning=["cancel_reason"]
        )
    )
    assert make(move, id=row.pk) == [[text]]
    assert fresh(row).cancel_reason == text


def test_a_move_follows_the_clock_of_the_test_kit() -> None:
    row = queued()
    move = Move(Update("row", Execution, BY_ID, {"due_at": NOW}, returning=["due_at"]))
    ((now,),) = make(move, id=row.pk)
    clock.shift(dt.timedelta(days=3))
    ((later,),) = make(move, id=row.pk)
    assert dt.timedelta(days=3) <= later - now < dt.timedelta(days=3, minutes=1)


@pytest.mark.parametrize(
    "make_it",
    [
        lambda: Move(Update("row", Execution, BY_ID, {}), Update("row", Execution, BY_ID, {})),
        lambda: Move(Update("row", Execution, BY_ID, {}), tells=["rows"]),
        lambda: Move(Update("row", Execution, BY_ID, {}, of="nobody")),
    ],
    ids=["one name twice", "tells of nobody", "of nobody"],
)
def test_a_declaration_that_names_what_is_not_there_is_refused(make_it: Callable[[], Move]) -> None:
    with pytest.raises(ValueError, match="stands twice, or is not there"):
        make_it()


def test_inside_of_a_transaction_that_is_the_callers_to_undo_there_is_no_savepoint() -> None:
    row = queued()
    move = Move(Lock("row", Execution, BY_ID), Update("changed", Execution, Q(), {"priority": 1}, of="row"))
    for savepoint in (True, False):
        with transaction.atomic(), CaptureQueriesContext(connection) as captured:
            move.make(database(), savepoint=savepoint, id=row.pk)
        assert any(query["sql"].startswith("SAVEPOINT") for query in captured) == savepoint
