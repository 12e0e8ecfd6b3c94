"""Who did what: operations on one execution and on many, worked off by sweepers."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest

from conductor_app import api, transitions
from conductor_app.engine import acting, pruner, sweeper
from conductor_app.exceptions import ActionRefused, InvalidArgument, InvalidArgumentType, RetryRefused
from conductor_app.models import Execution, Operation, OperationItem
from conductor_app.states import ExecutionStatus, ItemState, OperationKind, OperationSource
from conductor_app.store.process import process
from conductor_app.telling.history import history
from conductor_app.telling.operations import progress, read_deeds
from conductor_app.telling.story import read
from conductor_app.transitions import operating
from conductor_app.transitions.operating import By
from tests.support.executions import FAILURE, claimed, family, fresh, napping, queued, running
from tests.support.instants import ago
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _broker() -> None:
    process.broker = NotingBroker()


def failed() -> Execution:
    run = running()
    transitions.fail(run, FAILURE)
    return fresh(run)


def only_item() -> OperationItem:
    return OperationItem.objects.select_related("operation").get()


def began(kind: OperationKind, rows: Any = None, **by: str) -> Operation:
    chosen = Execution.objects.all() if rows is None else Execution.objects.filter(pk__in=[row.pk for row in rows])
    return operating.start(kind, chosen, By(**by), filters="status failed")


def states_of(operation: Operation) -> dict[str, int]:
    return dict(operating.count([operation.pk])[operation.pk])


# ------------------------------------------------------------------------------------------------------ one execution


@pytest.mark.parametrize(
    ("kind", "arrange", "act"),
    [
        ("retry", failed, api.retry),
        ("rerun", failed, api.rerun),
        ("cancel", queued, api.cancel),
        ("wake", lambda: napping(3_600), api.wake),
        ("publish", queued, api.publish_again),
    ],
)
@pytest.mark.parametrize("actor", ["ana", ""])
def test_what_somebody_does_is_kept_with_the_reason(kind: str, arrange: Any, act: Any, actor: str) -> None:
    execution = arrange()
    result = act(execution, actor=actor, reason="stock is back")
    item = only_item()
    operation = item.operation
    assert (operation.kind, operation.actor, operation.reason, operation.source) == (
        kind,
        actor,
        "stock is back",
        OperationSource.API,
    )
    assert (item.execution_id, item.state, operation.total, operation.done) == (execution.pk, ItemState.DONE, 1, 1)
    assert operation.finished_at is not None
    assert item.created_id == (result.pk if kind == "rerun" else None)


def test_an_event_is_noted_if_a_person_has_sent_it() -> None:
    execution = queued()
    assert api.send_event(execution, "paid")
    assert not Operation.objects.exists()
    assert api.send_event(execution, "approved", actor="ana")
    assert only_item().operation.kind == OperationKind.SEND


def test_what_was_refused_or_changed_nothing_is_not_noted() -> None:
    done = failed()
    with pytest.raises(ActionRefused):
        api.wake(done, actor="ana")
    with pytest.raises(RetryRefused):
        api.retry(queued(), actor="ana")
    assert not api.cancel(done, actor="ana")
    assert not Operation.objects.exists()


def test_of_two_who_cancel_one_is_noted() -> None:
    run = running()
    assert api.cancel(run, reason="first", actor="ana")
    assert api.cancel(run, reason="second", actor="bob")
    assert only_item().operation.actor == "ana"
    assert fresh(run).cancel_reason == "first"


def test_a_rerun_with_a_key_is_noted_once() -> None:
    done = failed()
    first = api.rerun(done, idempotency_key="again", actor="ana")
    assert api.rerun(done, idempotency_key="again", actor="bob") == first
    assert only_item().operation.actor == "ana"


@pytest.mark.parametrize(
    ("actor", "error"), [(7, InvalidArgumentType), ("a" * 151, InvalidArgument), ("a\nb", InvalidArgument)]
)
def test_an_actor_that_cannot_be_stored_is_refused_and_nothing_is_done(actor: Any, error: type[Exception]) -> None:
    execution = queued()
    with pytest.raises(error, match="actor must"):
        api.cancel(execution, actor=actor)
    assert fresh(execution).cancel_requested_at is None


def test_a_reason_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidArgumentType, match="reason must be str, got int"):
        api.retry(failed(), reason=7)  # type: ignore[arg-type]


def test_the_move_and_its_note_are_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = failed()

    def broken(*_args: Any, **_values: Any) -> int:
        raise RuntimeError("killed here")

    monkeypatch.setattr(operating, "_add", broken)
    with pytest.raises(RuntimeError):
        api.retry(execution, actor="ana")
    assert fresh(execution).status == ExecutionStatus.FAILED


def test_the_engine_notes_nothing() -> None:
    run = running()
    transitions.request_cancel(run.pk, "by the engine")
    sweeper.sweep()
    assert not Operation.objects.exists()


# ------------------------------------------------------------------------------------------------------------- of many


def test_an_operation_is_stored_and_worked_off_by_the_sweeper() -> None:
    rows = [failed() for _ in range(5)]
    operation = began(OperationKind.RETRY, rows, actor="ana", reason="stock is back")
    assert (operation.total, operation.finished_at) == (5, None)
    assert {fresh(row).status for row in rows} == {ExecutionStatus.FAILED}
    found = sweeper.sweep()
    assert found["operations"] == 5
    assert {fresh(row).status for row in rows} == {ExecutionStatus.QUEUED}
    operation.refresh_from_db()
    assert (operation.done, operation.refused) == (5, 0)
    assert operation.finished_at is not None
    assert sweeper.sweep()["operations"] == 0


def test_what_matches_later_is_not_of_it() -> None:
    began(OperationKind.CANCEL, [queued()])
    later = queued()
    sweeper.sweep()
    assert fresh(later).status == ExecutionStatus.QUEUED


def test_an_operation_on_nothing_has_ended() -> None:
    assert operating.start(OperationKind.CANCEL, Execution.objects.none(), By()).finished_at is not None
    assert operating.start(OperationKind.CANCEL, Execution.objects.filter(task="no"), By()).finished_at is not None


@pytest.mark.parametrize("batch", [2])
def test_it_is_worked_off_in_batches(batch: int, settings: Any) -> None:
    settings.CONDUCTOR = {**getattr(settings, "CONDUCTOR", {}), "SWEEP_BATCH": batch}
    rows = [queued() for _ in range(5)]
    operation = began(OperationKind.CANCEL, rows)
    assert len(acting.pending_items([])) == batch
    sweeper.sweep()
    operation.refresh_from_db()
    assert operation.done == 5
    assert {fresh(row).status for row in rows} == {ExecutionStatus.CANCELLED}


def test_a_sweep_gives_operations_a_turn_and_no_more() -> None:
    rows = [queued() for _ in range(3)]
    operation = began(OperationKind.CANCEL, rows)
    found = sweeper.sweep(turn=0.0)
    assert found.has_more
    assert states_of(operation) == {"pending": 3}


def test_a_small_operation_does_not_wait_for_a_long_one() -> None:
    began(OperationKind.CANCEL, [queued() for _ in range(6)])
    small = began(OperationKind.CANCEL, [queued()])
    item = OperationItem.objects.get(operation=small)
    assert acting.pending_items([]).index(item) < 2


def test_each_kind_does_what_it_is_for() -> None:
    done, asleep = failed(), napping(3_600)
    began(OperationKind.RERUN, [done], actor="ana")
    began(OperationKind.WAKE, [asleep])
    sweeper.sweep()
    assert fresh(asleep).status == ExecutionStatus.QUEUED
    item = OperationItem.objects.get(operation__kind="rerun")
    assert item.created_id is not None
    assert Execution.objects.get(pk=item.created_id).status == ExecutionStatus.QUEUED
    assert fresh(done).status == ExecutionStatus.FAILED


def test_each_that_is_refused_is_told_with_the_reason_of_the_api() -> None:
    changed, ended, asked, gone = failed(), failed(), running(), failed()
    retried = began(OperationKind.RETRY, [changed, gone])
    cancelled = began(OperationKind.CANCEL, [ended, asked])
    api.retry(changed, actor="bob")
    api.cancel(asked, actor="bob")
    gone_id = gone.pk
    gone.delete()
    sweeper.sweep()
    told = dict(OperationItem.objects.filter(operation__in=[retried, cancelled]).values_list("execution_id", "message"))
    assert told == {
        changed.pk: "not failed or cancelled",
        gone_id: "",
        ended.pk: "ended already",
        asked.pk: "to be cancelled already",
    }
    retried.refresh_from_db()
    assert (retried.done, retried.refused, retried.gone) == (0, 1, 1)


def test_two_operators_on_the_same_rows_have_one_winner_for_each() -> None:
    rows = [failed() for _ in range(3)]
    first, second = began(OperationKind.RETRY, rows, actor="ana"), began(OperationKind.RETRY, rows, actor="bob")
    sweeper.sweep()
    states = [sorted(OperationItem.objects.filter(execution=row).values_list("state", flat=True)) for row in rows]
    assert states == [["done", "refused"]] * 3
    assert sum(states_of(first).values()) == sum(states_of(second).values()) == 3


def test_one_that_breaks_is_told_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = failed(), failed()
    operation = began(OperationKind.RETRY, [bad, good])
    reopen = transitions.reopen

    def breaking(execution_id: uuid.UUID, **hooks: Any) -> None:
        if execution_id == bad.pk:
            raise LookupError("a secret")
        reopen(execution_id, **hooks)

    monkeypatch.setattr(transitions, "reopen", breaking)
    sweeper.sweep()
    assert states_of(operation) == {"failed": 1, "done": 1}
    assert OperationItem.objects.get(execution=bad).message == "LookupError"


def test_a_crash_between_the_move_and_the_note_leaves_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    row = failed()
    operation = began(OperationKind.RERUN, [row])

    class Killed(BaseException):
        pass

    def killed(*_args: Any) -> Any:
        act(*_args)
        raise Killed

    act = acting._act
    monkeypatch.setattr(acting, "_act", killed)
    with pytest.raises(Killed):
        sweeper.sweep()
    assert states_of(operation) == {"pending": 1}
    assert Execution.objects.count() == 1
    monkeypatch.undo()
    process.broker = NotingBroker()
    sweeper.sweep()
    assert states_of(operation) == {"done": 1}
    assert Execution.objects.count() == 2


def test_a_stopped_operation_leaves_the_rest_alone() -> None:
    rows = [failed() for _ in range(3)]
    operation = began(OperationKind.RETRY, rows)
    first = acting.pending_items([])[0]
    assert acting.decide(first)
    assert operating.stop(operation.pk)
    assert not operating.stop(operation.pk)
    sweeper.sweep()
    operation.refresh_from_db()
    assert (operation.done, operation.stopped) == (1, 2)
    assert operation.stop_requested_at is not None
    assert operation.finished_at is not None
    assert [fresh(row).status for row in rows].count(ExecutionStatus.FAILED) == 2
    assert not acting.decide(OperationItem.objects.filter(state="stopped")[0])


# ------------------------------------------------------------------------------------------------------------- history


def lines(execution: Execution) -> list[str]:
    story = read(execution.pk, preview=100)
    assert story is not None
    return [moment.text for moment in history(story)]


def test_the_history_tells_who_did_what_and_why() -> None:
    execution = failed()
    api.retry(execution, actor="ana", reason="stock is back")
    api.cancel(execution, "wrong order", actor="bob")
    api.wake(napping(60))
    told = lines(execution)
    assert "retried by ana: stock is back" in told
    assert "cancelled by bob: wrong order" in told
    assert told.index("retried by ana: stock is back") < told.index("cancelled by bob: wrong order")


def test_the_history_tells_of_a_rerun_on_both_sides() -> None:
    execution = failed()
    created = api.rerun(execution)
    assert f"run again as new, {created.pk}, by the API" in lines(execution)
    assert f"started as a rerun of {execution.pk} by the API" in lines(created)


def test_a_rerun_tells_no_id_of_what_somebody_may_not_see() -> None:
    execution = failed()
    created = api.rerun(execution, actor="ana")
    (deed,) = read_deeds(execution, Execution.objects.filter(pk=execution.pk))
    assert deed.text(execution) == "run again as new by ana"
    assert read_deeds(created, Execution.objects.filter(pk=created.pk)) == []
    assert len(read_deeds(created, Execution.objects.all())) == 1


def test_the_history_of_a_child_tells_what_was_done_to_its_root() -> None:
    parent, child = family()
    api.cancel(parent, actor="ana")
    assert "its root cancelled by ana" in lines(child)


def test_an_operation_is_followed_to_the_ends_of_what_it_let_go_on() -> None:
    rows = [failed() for _ in range(3)]
    late = failed()
    operation = began(OperationKind.RETRY, [*rows, late], actor="ana")
    api.retry(late)
    assert progress(operation).sentence == "0 retried; 4 to come."
    sweeper.sweep()
    operation.refresh_from_db()
    assert progress(operation).sentence == "3 retried: 3 go on; 1 refused: not failed or cancelled."
    assert not progress(operation).is_settled
    transitions.succeed(claimed(rows[0]), "7")
    transitions.fail(claimed(rows[1]), FAILURE)
    fresh(rows[2]).delete()
    told = progress(operation)
    assert told.sentence == ("3 retried: 1 succeeded, 1 failed, 1 pruned; 1 refused: not failed or cancelled.")
    assert told.is_settled


def test_a_rerun_is_followed_by_what_it_has_started() -> None:
    operation = began(OperationKind.RERUN, [failed()])
    sweeper.sweep()
    transitions.succeed(claimed(Execution.objects.order_by("-pk")[0]), "7")
    assert progress(operation).sentence == "1 run again as new: 1 succeeded."


# --------------------------------------------------------------------------------------------------------------- prune


def test_operations_that_ended_long_ago_are_pruned_with_their_items() -> None:
    operation, goes_on = began(OperationKind.CANCEL, [queued()]), began(OperationKind.CANCEL, [queued()])
    acting.decide(OperationItem.objects.get(operation=operation))
    acting.pending_items([])
    api.cancel(queued(), actor="ana")
    Operation.objects.filter(pk__in=[operation.pk, goes_on.pk]).update(created_at=ago(7_200))
    Operation.objects.filter(pk=operation.pk).update(finished_at=ago(7_200))
    hour = dt.timedelta(hours=1)
    assert pruner.prune_operations(hour, dry_run=True) == 1
    assert pruner.prune_operations(hour) == 1
    assert not OperationItem.objects.filter(operation_id=operation.pk).exists()
    assert Operation.objects.filter(pk=goes_on.pk).exists()
    assert OperationItem.objects.count() == Operation.objects.count() == 2
    assert pruner.prune_operations(hour) == 0


def test_an_item_outlives_its_execution() -> None:
    execution = failed()
    api.retry(execution, actor="ana")
    Execution.objects.all().update(status="succeeded", finished_at=ago(7_200), due_at=None, dispatch_at=None)
    assert pruner.prune(dt.timedelta(hours=1)) == 1
    assert only_item().execution_id == execution.pk
