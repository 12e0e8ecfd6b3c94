"""An event that is sent while the execution suspends, times out, ends, or takes another one, is delivered once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.exceptions import ExecutionFinished, IdempotencyConflict
from conductor_app.models import Event, Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import AwaitEvent
from conductor_app.transitions.waits import event as events
from tests.races.harness import BEFORE_COMMIT, IsolationLevel, Race, in_several_statements
from tests.support.executions import FAILURE, claimed, fresh, queued, running, snapshot, step_of
from tests.support.invariants import violations

pytestmark = pytest.mark.races

isolations = pytest.mark.parametrize(
    "isolation", [None, IsolationLevel.REPEATABLE_READ], ids=["read committed", "repeatable read"]
)


def send(execution: Execution, value: int = 1, key: str | None = None) -> bool:
    return api.send_event(execution.pk, "approved", value, id=key)


def suspend(execution: Execution, step: str = "approval", timeout: float | None = None) -> bool:
    return transitions.suspend(execution, AwaitEvent(step, "approved", timeout))


def waiting(timeout: float | None = None) -> Execution:
    """A run that has suspended on the event; the row as that run saw it."""
    execution = running()
    assert suspend(execution, timeout=timeout)
    return execution


def overdue() -> tuple[Execution, Step]:
    """A waiting execution whose timeout nobody has decided."""
    execution = waiting(timeout=60)
    Step.objects.filter(execution=execution.pk).update(deadline_at=clock.after(-1))
    return execution, step_of(execution, "approval")


def untaken() -> list[Any]:
    return [event.get_payload() for event in Event.objects.filter(taken_at__isnull=True)]


def is_stuck(execution: Execution) -> bool:
    """Whether the execution waits for an event that lies in its mailbox."""
    pending = Step.objects.filter(execution=execution.pk, status=StepStatus.PENDING)
    return any(untaken_for.exists() for untaken_for in (_mailbox(step) for step in pending))


def _mailbox(step: Step) -> Any:
    return Event.objects.filter(execution=step.execution_id, name=step.task, taken_at__isnull=True)


def check(execution: Execution) -> None:
    """One event at most for each step, and nobody waits for what is there."""
    assert not is_stuck(execution)
    assert not violations()
    for step in Step.objects.filter(execution=execution.pk):
        assert step.events.count() == (step.status == StepStatus.SUCCEEDED)
        assert step.status != StepStatus.SUCCEEDED or step.get_result() == step.events.get().get_payload()


# --------------------------------------------------------------------------------------------------- send and suspend


@isolations
def test_a_run_that_suspends_after_an_event_was_sent_takes_it(race: Race, isolation: Any) -> None:
    execution = running()
    sender = race.hold("sender", send, execution, isolation=isolation)
    suspending = race.start("run", suspend, execution, isolation=isolation).wait_blocked(by=sender)
    assert sender.go_on().result() is True
    assert suspending.result() is False
    # At the stricter level the run's snapshot is older than the event: its transaction is run again.
    assert suspending.conflicts == ([] if isolation is None else ["40001"])
    assert fresh(execution).status == ExecutionStatus.RUNNING
    assert step_of(execution, "approval").get_result() == 1
    check(execution)


@isolations
def test_an_event_that_is_sent_while_a_run_suspends_wakes_it(race: Race, isolation: Any) -> None:
    execution = running()
    suspending = race.hold("run", suspend, execution, isolation=isolation)
    sender = race.start("sender", send, execution, isolation=isolation).wait_blocked(by=suspending)
    assert suspending.go_on().result() is True
    assert sender.result() is True
    assert sender.conflicts == ([] if isolation is None else ["40001"])
    assert fresh(execution).status == ExecutionStatus.QUEUED
    assert step_of(execution, "approval").get_result() == 1
    check(execution)


@isolations
@pytest.mark.parametrize(
    "stop", ["after transitions.running.lock_held", "after transitions.mailbox.take", BEFORE_COMMIT]
)
def test_wherever_the_run_stands_the_event_is_delivered(race: Race, stop: str, isolation: Any) -> None:
    execution = running()
    suspending = race.hold("run", suspend, execution, stop=stop, isolation=isolation)
    sender = race.start("sender", send, execution, isolation=isolation).wait_blocked(by=suspending)
    assert suspending.go_on().result() is True
    assert sender.result() is True
    assert fresh(execution).status == ExecutionStatus.QUEUED
    check(execution)


@isolations
@pytest.mark.parametrize(
    "stop",
    [
        "after transitions.mailbox.find",
        "after transitions.waits.event.awaiting",
        "before transitions.mailbox.put",
        BEFORE_COMMIT,
    ],
)
def test_wherever_the_sender_stands_the_event_is_delivered(race: Race, stop: str, isolation: Any) -> None:
    execution = running()
    sender = race.hold("sender", send, execution, stop=stop, isolation=isolation)
    suspending = race.start("run", suspend, execution, isolation=isolation)
    is_blocked = suspending.is_blocked(by=sender)
    assert is_blocked == (stop in ("before transitions.mailbox.put", BEFORE_COMMIT))
    if not is_blocked:
        suspending.result()
    assert sender.go_on().result() is True
    has_suspended = suspending.result()
    assert has_suspended is not is_blocked
    assert fresh(execution).status == (ExecutionStatus.QUEUED if has_suspended else ExecutionStatus.RUNNING)
    check(execution)


def test_an_event_in_a_callers_transaction_is_taken_when_that_is_committed(race: Race) -> None:
    execution = running()

    def send_with_more() -> None:
        with transaction.atomic():
            send(execution)
            queued()

    sender = race.hold("view", send_with_more)
    suspending = race.start("run", suspend, execution).wait_blocked(by=sender)
    sender.go_on().result()
    assert suspending.result() is False
    check(execution)


def test_an_event_of_a_transaction_that_is_rolled_back_is_not_taken(race: Race) -> None:
    execution = running()

    def send_in_vain() -> None:
        with suppress(ZeroDivisionError), transaction.atomic():
            send(execution)
            events.send(execution.pk, "other", "1")
            raise ZeroDivisionError

    sender = race.hold("view", send_in_vain, stop="after transitions.waits.event.send")
    suspending = race.start("run", suspend, execution).wait_blocked(by=sender)
    sender.go_on().result()
    assert suspending.result() is True
    assert not Event.objects.exists()


# --------------------------------------------------------------------------------------------------- send and timeout


@isolations
def test_an_event_that_is_committed_before_the_timeout_is_decided_wins(race: Race, isolation: Any) -> None:
    execution, step = overdue()
    sender = race.hold("sender", send, execution, isolation=isolation)
    timing_out = race.start("sweeper", transitions.decide_overdue, step, isolation=isolation).wait_blocked(by=sender)
    assert sender.go_on().result() is True
    assert timing_out.result() is False
    assert step_of(execution, "approval").status == StepStatus.SUCCEEDED
    assert (fresh(execution).status, untaken()) == (ExecutionStatus.QUEUED, [])
    check(execution)


@isolations
def test_a_timeout_that_is_decided_first_leaves_the_event_in_the_mailbox(race: Race, isolation: Any) -> None:
    execution, step = overdue()
    timing_out = race.hold("sweeper", transitions.decide_overdue, step, isolation=isolation)
    sender = race.start("sender", send, execution, isolation=isolation).wait_blocked(by=timing_out)
    assert timing_out.go_on().result() is True
    assert sender.result() is True
    assert step_of(execution, "approval").status == StepStatus.TIMED_OUT
    assert (fresh(execution).status, untaken()) == (ExecutionStatus.QUEUED, [1])
    check(execution)
    # The next wait takes it.
    assert suspend(claimed(execution), "second") is False
    assert (step_of(execution, "second").get_result(), untaken()) == (1, [])
    check(execution)


@pytest.mark.parametrize("first", ["sender", "sweeper"])
def test_a_sender_and_a_timeout_never_wait_for_each_other(race: Race, first: str) -> None:
    """The step before the execution, everywhere: PostgreSQL finds no deadlock."""
    execution, step = overdue()
    acts = {"sender": (send, execution), "sweeper": (transitions.decide_overdue, step)}
    leader = race.hold(first, *acts.pop(first), stop="after transitions.steps.settle")
    ((second, act),) = acts.items()
    follower = race.start(second, *act).wait_blocked(by=leader)
    assert leader.go_on().result() is True
    assert follower.result() is (second == "sender")
    assert not race.conflicts()
    check(execution)


# ------------------------------------------------------------------------------------------------------- two senders


@isolations
@pytest.mark.parametrize("is_waiting", [True, False], ids=["waiting", "running"])
def test_two_senders_are_put_in_order(race: Race, is_waiting: bool, isolation: Any) -> None:
    execution = waiting() if is_waiting else running()
    first = race.hold("first", send, execution, 1, isolation=isolation)
    second = race.start("second", send, execution, 2, isolation=isolation).wait_blocked(by=first)
    assert first.go_on().result() is True
    assert second.result() is True
    assert [event.get_payload() for event in Event.objects.order_by("id")] == [1, 2]
    assert untaken() == ([2] if is_waiting else [1, 2])
    check(execution)


@isolations
@pytest.mark.parametrize("is_waiting", [True, False], ids=["waiting", "running"])
@pytest.mark.parametrize("value", [1, 2], ids=["same payload", "another payload"])
def test_of_two_senders_with_one_id_one_sends(race: Race, value: int, is_waiting: bool, isolation: Any) -> None:
    execution = waiting() if is_waiting else running()
    first = race.hold("first", send, execution, 1, "mail-7", isolation=isolation)
    second = race.start("second", send, execution, value, "mail-7", isolation=isolation).wait_blocked(by=first)
    assert first.go_on().result() is True
    assert second.outcome() in ((False,) if value == 1 else (IdempotencyConflict,))
    assert Event.objects.get().get_payload() == 1
    check(execution)


def test_a_sender_that_settles_a_step_with_an_id_that_is_known_by_then_takes_it_back(race: Race) -> None:
    """The event was sent, and taken by an earlier step, while this sender was on its way."""
    execution = running()
    late = race.hold("late", send, execution, 1, "mail-7", stop="after transitions.mailbox.find")
    send(execution, 1, "mail-7")
    assert suspend(execution) is False
    assert suspend(execution, "second") is True
    assert late.go_on().result() is False
    assert step_of(execution, "second").status == StepStatus.PENDING
    assert fresh(execution).status == ExecutionStatus.WAITING
    check(execution)


@pytest.mark.parametrize("act", ["suspend", "decide"])
def test_many_senders_lose_nothing(race: Race, act: str) -> None:
    """Senders and a run, or the sweeper, all at once: each event is in the mailbox or with one step."""
    others: dict[str, Callable[[Any], Any]] = {
        "suspend": lambda subject: suspend(subject[0]),
        "decide": lambda subject: transitions.decide_overdue(subject[1]),
    }
    with race.rounds(lambda s: send(s[0], 1), lambda s: send(s[0], 2), others[act]) as play:
        for _ in range(40):
            subject = (running(), None) if act == "suspend" else overdue()
            outcomes = play(subject)
            assert outcomes[:2] == [True, True]
            assert outcomes[2] in (True, False)
            check(subject[0])
            assert Event.objects.filter(execution=subject[0].pk).count() == 2
            taken = Event.objects.filter(execution=subject[0].pk, taken_at__isnull=False).count()
            decided = step_of(subject[0], "approval").status == StepStatus.SUCCEEDED
            assert taken == decided
    assert not race.conflicts()


# ----------------------------------------------------------------------------------------------------- send and the end

ENDS: dict[str, Callable[[Execution], object]] = {
    "succeed": lambda execution: transitions.succeed(execution, "1"),
    "fail": lambda execution: transitions.fail(execution, FAILURE),
}


@isolations
@pytest.mark.parametrize("end", ENDS)
def test_an_event_that_is_sent_while_the_execution_ends_is_refused(race: Race, end: str, isolation: Any) -> None:
    execution = running()
    ending = race.hold("run", ENDS[end], execution, isolation=isolation)
    sender = race.start("sender", send, execution, isolation=isolation).wait_blocked(by=ending)
    ending.go_on().result()
    assert sender.outcome() is ExecutionFinished
    assert not Event.objects.exists()


@isolations
@pytest.mark.parametrize("end", ENDS)
def test_an_execution_that_ends_while_an_event_is_sent_keeps_it_untaken(race: Race, end: str, isolation: Any) -> None:
    execution = running()
    sender = race.hold("sender", send, execution, isolation=isolation)
    ending = race.start("run", ENDS[end], execution, isolation=isolation).wait_blocked(by=sender)
    assert sender.go_on().result() is True
    ending.result()
    assert (fresh(execution).is_final, untaken()) == (True, [1])


@isolations
def test_an_event_that_is_sent_while_the_execution_is_cancelled_is_refused(race: Race, isolation: Any) -> None:
    execution = waiting()
    assert transitions.request_cancel(execution.pk, "")
    cancelling = race.hold("operator", transitions.cancel_flagged, execution.pk, isolation=isolation)
    sender = race.start("sender", send, execution, isolation=isolation).wait_blocked(by=cancelling)
    before = snapshot()
    assert cancelling.go_on().result() is True
    assert sender.outcome() is ExecutionFinished
    assert not Event.objects.exists()
    # The step that the sender had settled was decided by the cancellation instead.
    assert step_of(execution, "approval").status == StepStatus.CANCELLED
    assert len(snapshot()) == len(before)


@isolations
def test_a_cancellation_that_comes_while_an_event_is_sent_finds_it_delivered(race: Race, isolation: Any) -> None:
    execution = waiting()
    sender = race.hold("sender", send, execution, isolation=isolation)
    cancelling = race.start("operator", api.cancel, execution.pk, isolation=isolation).wait_blocked(by=sender)
    assert sender.go_on().result() is True
    assert cancelling.result() is True
    assert fresh(execution).status == ExecutionStatus.CANCELLED
    check(execution)


# ------------------------------------------------------------------------------------------- send and operator's retry


def timed_out() -> Execution:
    """An execution that failed because its event did not come."""
    execution, step = overdue()
    assert transitions.decide_overdue(step)
    transitions.fail(claimed(execution), FAILURE, step="approval")
    return execution


@isolations
def test_an_event_is_refused_until_an_operators_retry_is_committed(race: Race, isolation: Any) -> None:
    execution = timed_out()
    retrying = race.hold("operator", api.retry, execution.pk, isolation=isolation)
    assert race.start("early", send, execution, isolation=isolation).outcome() is ExecutionFinished
    retrying.go_on().result()
    assert send(execution, 2) is True
    assert fresh(execution).status == ExecutionStatus.QUEUED
    check(execution)


# Canaries: with a weaker guard the same races lose the event, and this harness sees it.


@in_several_statements
def test_canary_a_sender_that_does_not_look_again_loses_the_event(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    execution = running()
    looks: list[Any] = []
    original = events.awaiting

    def look_once(execution_id: Any, event: str) -> Any:
        looks.append(original(execution_id, event))
        return looks[0]

    monkeypatch.setattr(events, "awaiting", look_once)
    suspending = race.hold("run", suspend, execution)
    sender = race.start("sender", send, execution).wait_blocked(by=suspending)
    assert suspending.go_on().result() is True
    sender.result()
    assert is_stuck(execution)


@in_several_statements
def test_canary_a_lock_without_a_write_loses_the_event_at_repeatable_read(
    race: Race, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = running()

    def only_lock(rows: Any, **values: Any) -> int:
        return len(list(locked(rows)))

    monkeypatch.setattr(type(Execution.objects.all()), "update", only_lock)
    sender = race.hold("sender", send, execution, isolation=IsolationLevel.REPEATABLE_READ)
    monkeypatch.undo()
    suspending = race.start("run", suspend, execution, isolation=IsolationLevel.REPEATABLE_READ)
    suspending.wait_blocked(by=sender)
    sender.go_on().result()
    assert suspending.result() is True
    assert is_stuck(execution)


@in_several_statements
def test_canary_a_run_that_does_not_lock_first_loses_the_event(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    from conductor_app.transitions import running as runs

    execution = running()
    monkeypatch.setattr(runs, "lock_held", lambda execution: False)
    suspending = race.hold("run", suspend, execution, stop="after transitions.mailbox.take")
    assert race.start("sender", send, execution).result() is True
    assert suspending.go_on().result() is True
    assert is_stuck(execution)
