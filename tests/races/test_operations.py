"""Operations: sweepers share one, and each of its executions is acted on once."""

from __future__ import annotations

from collections import Counter

import pytest
from django.db import connection

from conductor_app import api, transitions
from conductor_app.engine import acting, sweeper
from conductor_app.models import Execution, Operation, OperationItem
from conductor_app.states import ItemState, OperationKind
from conductor_app.transitions import operating
from conductor_app.transitions.operating import By
from tests.races.harness import Race
from tests.support.executions import FAILURE, fresh, queued, running
from tests.support.locks import locked
from tests.support.polling import wait_until

pytestmark = pytest.mark.races


def failed() -> Execution:
    run = running()
    transitions.fail(run, FAILURE)
    return fresh(run)


def began(kind: OperationKind, rows: list[Execution], actor: str = "ana") -> Operation:
    return operating.start(kind, Execution.objects.filter(pk__in=[row.pk for row in rows]), By(actor))


def test_sweepers_share_an_operation_and_each_execution_is_acted_on_once(race: Race) -> None:
    rows = [failed() for _ in range(40)]
    operation = began(OperationKind.RERUN, rows)
    with race.rounds(*[lambda _: sweeper.sweep()["operations"]] * 4) as play:
        shares = play(None)
    assert sum(shares) == 40
    assert Execution.objects.count() == 80
    operation.refresh_from_db()
    assert (operation.done, operation.finished_at is None) == (40, False)


def test_an_item_in_another_sweepers_hands_is_left_to_it(race: Race) -> None:
    operation = began(OperationKind.RERUN, [failed()])
    (item,) = acting.pending_items([])
    first = race.hold("first", acting.decide, item)
    assert race.start("second", acting.decide, item).result() is False
    assert first.go_on().result() is True
    assert Execution.objects.count() == 2
    assert operating.count([operation.pk])[operation.pk] == {"done": 1}


def test_an_item_whose_sweeper_was_killed_is_decided_by_another(race: Race) -> None:
    began(OperationKind.RERUN, [failed()])
    (item,) = acting.pending_items([])
    first = race.hold("first", acting.decide, item)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [first.pid])
    wait_until(lambda: acting.decide(item))
    first.go_on()
    # The first tries again on a new connection, and finds it decided.
    assert first.result() is False
    assert Execution.objects.count() == 2


def test_a_stop_waits_for_what_is_just_being_decided(race: Race) -> None:
    rows = [failed(), failed()]
    operation = began(OperationKind.RETRY, rows)
    deciding = race.hold("sweeper", acting.decide, acting.pending_items([])[0])
    stopping = race.start("operator", operating.stop, operation.pk).wait_blocked(by=deciding)
    assert deciding.go_on().result()
    assert stopping.result()
    operation.refresh_from_db()
    assert (operation.done, operation.stopped) == (1, 1)


def test_nothing_is_decided_after_a_stop(race: Race) -> None:
    row = failed()
    operation = began(OperationKind.RETRY, [row])
    (item,) = acting.pending_items([])
    stopping = race.hold("operator", operating.stop, operation.pk)
    assert race.start("sweeper", acting.decide, item).result() is False
    stopping.go_on().result()
    assert fresh(row).status == "failed"


def test_two_operators_on_one_row_have_one_winner_and_both_are_told(race: Race) -> None:
    row = failed()
    operation = began(OperationKind.RETRY, [row], actor="bob")
    (item,) = acting.pending_items([])
    ana = race.hold("ana", lambda: api.retry(row, actor="ana"))
    sweeping = race.start("sweeper", acting.decide, item).wait_blocked(by=ana)
    ana.go_on().result()
    assert sweeping.result()
    told = OperationItem.objects.get(operation=operation)
    assert (told.state, told.message) == (ItemState.REFUSED, "not failed or cancelled")
    assert Operation.objects.get(actor="ana").done == 1


def test_a_row_that_somebody_has_locked_is_left_and_delays_no_other(race: Race) -> None:
    rows = [queued(), queued()]
    operation = began(OperationKind.CANCEL, rows)
    with locked(rows[0]):
        found = sweeper.sweep()
        assert (found["operations"], found["locked"]) == (1, 1)
        assert Counter(operating.count([operation.pk])[operation.pk]) == {"pending": 1, "done": 1}
    sweeper.sweep()
    assert operating.count([operation.pk])[operation.pk] == {"done": 2}
