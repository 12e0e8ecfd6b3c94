"""What a sweep finds, what it does about it, and that nothing stops it."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from celery import current_app
from django.db import OperationalError

from conductor_app import signals, transitions
from conductor_app.engine import announcements, outage, sweeper, turns
from conductor_app.exceptions import Failure
from conductor_app.host import news, sweeper_thread
from conductor_app.host.feed import Feed
from conductor_app.host.gate import Shutdown
from conductor_app.host.sweeper_thread import SweeperThread
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import dispatch, steps
from tests.support.executions import (
    FAILURE,
    OWNER,
    claimed,
    family,
    fresh,
    invoke,
    mapping,
    napping,
    queued,
    running,
    step_of,
)
from tests.support.process import NotingBroker, given_back, note_published

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def time(settings: Any) -> Iterator[None]:
    """Tests shift the clock; everything lasts so long that it does not matter how long the test itself takes."""
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 1_000, "REDISPATCH_SECONDS": 1_000}
    yield
    clock.reset()


def of_a_broker() -> SimpleNamespace:
    """A worker with a broker server, which does not exist."""
    # No app of Celery's: in its settings the environment's CELERY_BROKER_URL wins.
    conf = SimpleNamespace(broker_write_url="amqp://nowhere", broker_url="amqp://nowhere")
    return SimpleNamespace(app=SimpleNamespace(conf=conf))


@pytest.fixture(autouse=True)
def published() -> list[Any]:
    """The ids of executions whose messages were published to a broker server, which does not exist."""
    return note_published()


def pass_seconds(seconds: float) -> None:
    clock.shift(dt.timedelta(seconds=seconds))


def test_a_sweep_that_finds_nothing_does_nothing() -> None:
    queued()
    running()
    napping()
    invoke(running(), timeout=60)
    assert sweeper.sweep(audit=True) == {}


# Messages


def test_an_unanswered_message_is_published_again_after_twice_as_long_each_time(published: list[Any]) -> None:
    execution = queued()
    pauses = [1_000, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 32_000]
    for number, pause in enumerate(pauses):
        pass_seconds(pause - 100)
        assert sweeper.sweep() == {}
        pass_seconds(101)
        assert sweeper.sweep() == {"published": 1}
        assert sweeper.sweep() == {}
        assert fresh(execution).dispatches == number + 1
    assert published == [execution.pk] * len(pauses)


def test_a_message_that_is_published_again_is_told_of_and_a_first_one_is_not(published: list[Any]) -> None:
    told: list[Any] = []

    def note(execution: Execution, **_kwargs: Any) -> None:
        told.append((execution.pk, execution.dispatches))

    signals.execution_redispatched.connect(note)
    try:
        later = queued(countdown=100)
        pass_seconds(101)
        assert sweeper.sweep() == {"published": 1}
        assert told == []
        pass_seconds(1_001)
        assert sweeper.sweep() == {"published": 1}
        assert told == [(later.pk, 1)]
        lost = queued()
        pass_seconds(1_001)
        assert sweeper.sweep()["published"] == 1
        assert told[1:] == [(lost.pk, 0)]
    finally:
        signals.execution_redispatched.disconnect(note)


def test_children_that_a_map_holds_back_are_not_published(published: list[Any]) -> None:
    _parent, children = mapping(3, max_parallel=1)
    pass_seconds(1_100)
    assert sweeper.sweep() == {"published": 1}
    assert published == [children[0].pk]
    transitions.succeed(claimed(children[0]), "1")
    pass_seconds(1_100)
    assert sweeper.sweep() == {"published": 1}
    assert published[1:] == [children[1].pk]


def test_a_claim_forgets_how_often_the_message_was_published(published: list[Any]) -> None:
    execution = queued()
    pass_seconds(1_100)
    assert sweeper.sweep() == {"published": 1}
    run = claimed(execution)
    assert fresh(run).dispatches == 0
    transitions.release(run)
    pass_seconds(1_100)
    assert sweeper.sweep() == {"published": 1}


def test_what_is_due_later_is_published_when_it_is_due(published: list[Any]) -> None:
    execution = queued(countdown=600)
    pass_seconds(500)
    assert sweeper.sweep() == {}
    pass_seconds(101)
    assert sweeper.sweep() == {"published": 1}
    assert published == [execution.pk]


def test_a_sweep_publishes_a_batch_and_the_next_one_goes_on_with_the_rest(published: list[Any], settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "SWEEP_BATCH": 2}
    executions = [queued(countdown=seconds) for seconds in (3, 1, 2, 4, 5)]
    pass_seconds(1_100)
    counts = [sweeper.sweep() for _ in range(4)]
    assert counts == [{"published": 2}, {"published": 2}, {"published": 1}, {}]
    by_due_time = [executions[number].pk for number in (1, 2, 0, 3, 4)]
    assert published == by_due_time


def test_only_the_wanted_queues_are_served(published: list[Any]) -> None:
    queued(queue="slow")
    wanted = queued(queue="fast")
    pass_seconds(1_100)
    assert sweeper.publish_due(limit=10, queues=["fast", "other"]) == 1
    assert published == [wanted.pk]


def test_a_broker_outage_makes_nobody_wait_longer(published: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    executions = [queued(), queued(), queued()]

    for _ in range(10):
        pass_seconds(1_100)
        with given_back():
            process.broker = NotingBroker(is_away=True)
            assert sweeper.sweep() == {}
            assert sweeper.sweep() == {}, "while the broker rests, nothing is taken"
    assert caplog.text.count("did not take the message") == 10, "one message in each sweep finds out"
    assert {fresh(execution).dispatches for execution in executions} == {0}
    pass_seconds(dispatch.BREAKER_SECONDS + 1)
    assert sweeper.sweep() == {"published": 3}
    assert set(published) == {execution.pk for execution in executions}


def test_a_message_that_the_broker_refuses_does_not_stop_the_others(published: list[Any]) -> None:
    executions = [queued(countdown=seconds) for seconds in (1, 2, 3)]

    class Refusing(NotingBroker):
        def send(self, execution: Execution, *, waits: bool) -> None:
            if execution.pk == executions[0].pk:
                raise ValueError("the queue's name is too long")
            super().send(execution, waits=waits)

    process.broker = broker = Refusing()
    pass_seconds(1_100)
    assert sweeper.sweep() == {"published": 2}
    assert broker.ids == [execution.pk for execution in executions[1:]]
    assert fresh(executions[0]).dispatches == 1, "its own pause grows"


def test_a_refused_message_is_noted_once_and_not_over_a_failure() -> None:
    refusal = Failure(type="kombu.exceptions.ContentDisallowed", message="Worker w could not read its message: no")
    execution, retried, begun = queued(), running(), running()
    failure = Failure(type="builtins.ValueError", message="boom")
    transitions.retry_later(retried, failure, 0)
    assert transitions.note_refusal(execution.pk, refusal)
    assert not transitions.note_refusal(execution.pk, refusal)
    assert not transitions.note_refusal(retried.pk, refusal)
    assert not transitions.note_refusal(begun.pk, refusal)
    assert fresh(execution).error_message == refusal.message
    assert (fresh(retried).error_message, fresh(begun).error) == ("boom", None)


# Deadlines


def test_a_sleep_ends_well_and_an_invocation_times_out() -> None:
    asleep = napping(seconds=300)
    parent, child = family(timeout=300)
    pass_seconds(200)
    assert sweeper.sweep() == {}
    pass_seconds(101)
    assert sweeper.sweep() == {"overdue_steps": 2}
    assert (step_of(asleep, "nap").status, fresh(asleep).status) == (StepStatus.SUCCEEDED, ExecutionStatus.QUEUED)
    assert (step_of(parent).status, fresh(parent).status) == (StepStatus.TIMED_OUT, ExecutionStatus.QUEUED)
    flagged = fresh(child)
    assert (flagged.status, flagged.cancel_reason) == ("running", "its parent's timeout of 300s ended")
    assert sweeper.sweep() == {}


def test_a_child_in_the_queue_is_cancelled_with_its_timeout() -> None:
    parent = running()
    child = invoke(parent, timeout=30)
    pass_seconds(31)
    assert sweeper.sweep(publish=False) == {"overdue_steps": 1, "cancelled": 1}
    assert fresh(child).error_message == "Cancelled: its parent's timeout of 30s ended"
    assert step_of(parent).status == StepStatus.TIMED_OUT
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_the_step_of_a_parent_that_has_ended_is_decided_and_wakes_nobody() -> None:
    parent, child = family(timeout=30)
    transitions.request_cancel(parent.pk, "")
    transitions.cancel_flagged(parent.pk)
    pass_seconds(31)
    assert sweeper.sweep() == {"overdue_steps": 1}
    assert fresh(parent).status == ExecutionStatus.CANCELLED
    transitions.cancel_running(child)
    assert fresh(parent).status == ExecutionStatus.CANCELLED


def test_an_expired_execution_is_cancelled_before_it_is_published(published: list[Any]) -> None:
    execution = queued(expires=300)
    started = running(expires=300)
    transitions.release(started)
    pass_seconds(1_100)
    assert sweeper.sweep() == {"expired": 1, "published": 1}
    assert fresh(execution).error_message == "Cancelled: it expired before it started"
    assert published == [started.pk]


# Leases


def test_a_lapsed_lease_is_reclaimed_if_that_is_allowed() -> None:
    run = running()
    pass_seconds(900)
    assert sweeper.sweep() == {}
    pass_seconds(101)
    assert sweeper.sweep(reclaim=False) == {}
    assert sweeper.sweep() == {"lapsed_leases": 1}
    row = fresh(run)
    assert (row.status, row.attempt, row.fence) == ("queued", 2, 1)


def test_the_last_attempt_that_is_lost_fails_the_execution_and_its_parent_goes_on() -> None:
    parent, child = family(max_attempts=1)
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"lapsed_leases": 1}
    failure = FailedExecution.objects.get(pk=child.pk)
    assert failure.message == f"Worker died: {OWNER} stopped while running attempt 1 of 1."
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_dead_workers_execution_that_was_to_be_cancelled_is_cancelled() -> None:
    parent, child = family()
    transitions.request_cancel(child.pk, "enough")
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"lapsed_leases": 1}
    row = fresh(child)
    assert (row.status, row.attempt, row.error_message) == ("cancelled", 1, "Cancelled: enough")
    assert step_of(parent).status == StepStatus.CANCELLED


# Cancels


def test_a_cancel_goes_down_to_the_last_descendant_in_one_sweep() -> None:
    root = running()
    parent = claimed(invoke(root))
    child = claimed(invoke(parent))
    leaf = invoke(child)
    transitions.request_cancel(root.pk, "enough")
    assert sweeper.sweep(publish=False) == {"cancelled": 4}
    rows = [fresh(execution) for execution in (root, parent, child, leaf)]
    assert {row.status for row in rows} == {ExecutionStatus.CANCELLED}
    assert [row.cancel_reason for row in rows] == ["enough", *["its parent was cancelled"] * 3]


def test_a_running_execution_is_left_to_its_body() -> None:
    run = running()
    transitions.request_cancel(run.pk, "enough")
    assert sweeper.sweep() == {}
    assert fresh(run).status == ExecutionStatus.RUNNING


# Announcements


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ids of executions of which Celery was told."""
    ids: list[Any] = []
    monkeypatch.setattr(announcements, "deliver", lambda execution: ids.append(execution.pk))
    return ids


def announced_root(**fields: Any) -> Execution:
    return queued(options='{"announce":true,"ignore_result":false}', **fields)


def test_celery_is_told_of_an_end_without_a_run(told: list[Any]) -> None:
    execution = announced_root()
    transitions.request_cancel(execution.pk, "")
    queued_only = queued()
    transitions.request_cancel(queued_only.pk, "")
    assert sweeper.sweep(publish=False) == {"cancelled": 2, "announced": 1}
    assert told == [execution.pk]


def test_celery_is_told_again_after_a_lease_if_it_could_not_be_told(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    execution = announced_root()
    transitions.request_cancel(execution.pk, "")

    def refuse(execution: Execution) -> None:
        raise ConnectionRefusedError("no result backend")

    with monkeypatch.context() as patched:
        patched.setattr(announcements, "deliver", refuse)
        assert sweeper.sweep(publish=False) == {"cancelled": 1}
    assert sweeper.sweep(publish=False) == {}
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"announced": 1}
    assert told == [execution.pk]


def test_a_run_that_ends_has_a_lease_to_tell_celery_itself(told: list[Any]) -> None:
    run = claimed(announced_root())
    transitions.succeed(run, "1")
    assert sweeper.sweep(publish=False) == {}
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"announced": 1}
    assert transitions.announced(run, ExecutionStatus.SUCCEEDED)
    pass_seconds(100_000)
    assert sweeper.sweep(publish=False) == {}


# The audit


def test_an_execution_that_waits_for_nothing_is_woken_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    fine, stranded = napping(), napping()
    Step.objects.filter(execution=stranded.pk).update(status=StepStatus.SUCCEEDED, finished_at=clock.now())
    assert sweeper.sweep(publish=False) == {}, "only the audit looks for it"
    with caplog.at_level(logging.ERROR):
        assert sweeper.sweep(audit=True, publish=False) == {"stranded": 1}
    assert f"Execution {stranded.pk} was waiting for nothing: a lost wake-up is healed." in caplog.text
    assert (fresh(stranded).status, fresh(fine).status) == ("queued", "waiting")
    caplog.clear()
    assert sweeper.sweep(audit=True, publish=False) == {}
    assert not caplog.records


@pytest.mark.parametrize("how", ["failed", "succeeded", "deleted"])
def test_a_child_that_somebody_has_ended_by_hand_does_not_strand_its_parent(how: str) -> None:
    parent, child = family()
    fine, _its_child = family()
    rows = Execution.objects.filter(pk=child.pk)
    if how == "deleted":
        rows.delete()
        Step.objects.filter(execution=parent.pk).update(child=None)
    else:
        rows.update(status=how, finished_at=clock.now(), lease_owner="", lease_expires_at=None)
    assert sweeper.sweep(audit=True, publish=False) == {"stranded": 1}
    assert (fresh(parent).status, fresh(fine).status) == ("queued", "waiting")
    memory = steps.recall(parent.pk)["child"]
    assert memory.status == ("cancelled" if how == "deleted" else how)
    if how == "deleted":
        assert memory.get_failure().message == "Cancelled: its row was deleted"


# Trouble


def test_one_finding_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [running() for _ in range(3)]
    asleep = napping(seconds=1)
    lose = transitions.lose

    def refuse_one(execution_id: Any) -> bool:
        if execution_id == runs[1].pk:
            raise RuntimeError("no")
        return lose(execution_id)

    monkeypatch.setattr(transitions, "lose", refuse_one)
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"lapsed_leases": 2, "overdue_steps": 1}
    assert f"Sweeping {runs[1].pk} failed; it will be tried again." in caplog.text
    assert [fresh(execution).status for execution in (*runs, asleep)] == ["queued", "running", "queued", "queued"]


def test_an_error_of_the_database_about_one_finding_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    naps = [napping(seconds=1) for _ in range(2)]
    decide = transitions.decide_overdue

    def refuse_one(step: Step) -> bool:
        if step.execution_id == naps[0].pk:
            raise OperationalError(2013, "Lost connection to server during query")
        return decide(step)

    def refuse_all(overdue: list[Step]) -> set[int]:
        raise OperationalError(2013, "Lost connection to server during query")

    monkeypatch.setattr(transitions, "decide_overdue", refuse_one)
    monkeypatch.setattr(transitions, "decide_overdue_together", refuse_all)
    pass_seconds(1_100)
    assert sweeper.sweep(publish=False) == {"overdue_steps": 1}
    (line,) = [record for record in caplog.records if "Sweeping" in record.message]
    assert line.message.startswith(f"Sweeping step 'nap' of execution {naps[0].pk} failed (")
    assert (line.levelname, line.exc_info) == ("WARNING", None), "An ended session is no error of ours"


def test_a_database_that_is_away_ends_the_sweep_with_its_error_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        running()

    def refuse(execution_id: Any) -> bool:
        raise OperationalError(2013, "Lost connection to server during query")

    monkeypatch.setattr(transitions, "lose", refuse)
    monkeypatch.setattr(outage, "database_answers", lambda: False)
    pass_seconds(1_100)
    with pytest.raises(OperationalError):
        sweeper.sweep()
    assert "Sweeping" not in caplog.text, "the caller reports it"


def test_sweeping_twice_at_the_same_time_finds_everything_once() -> None:
    """Whatever another sweeper has taken between the look and the act is left alone."""
    run, asleep = running(), napping(seconds=1)
    expired = queued(expires=1)
    flagged = queued()
    transitions.request_cancel(flagged.pk, "")
    pass_seconds(1_100)
    overdue = steps.overdue(10)
    assert sweeper.sweep(publish=False) == {"lapsed_leases": 1, "overdue_steps": 1, "expired": 1, "cancelled": 1}
    acts = [
        transitions.lose(run.pk),
        transitions.decide_overdue(overdue[0]),
        transitions.expire(expired.pk),
        transitions.cancel_flagged(flagged.pk),
        transitions.wake_stranded(asleep.pk),
    ]
    assert acts == [False] * 5


def test_a_failed_execution_is_left_alone_by_every_sweep() -> None:
    run = running()
    transitions.fail(run, FAILURE)
    pass_seconds(100_000)
    assert sweeper.sweep(audit=True) == {}


# The worker's thread


def test_a_worker_reclaims_only_after_it_has_looked_on_for_half_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage of the database, or a laptop's sleep, live workers first get the chance to renew their leases."""
    elapsed, asleep = 0.0, 0.0
    allowed: list[bool] = []
    clocks = SimpleNamespace(monotonic=lambda: 500 + elapsed, time=lambda: 1_000_000 + elapsed + asleep)
    monkeypatch.setattr(sweeper_thread, "time", clocks)
    falls_asleep_for = 0.0

    def sweep(*, reclaim: bool, **_options: Any) -> Any:
        nonlocal asleep, falls_asleep_for
        allowed.append(reclaim)
        asleep, falls_asleep_for = asleep + falls_asleep_for, 0.0
        return turns.Found()

    monkeypatch.setattr(sweeper, "sweep", sweep)
    thread = SweeperThread(of_a_broker(), Shutdown())

    def sweep_for(seconds: float) -> list[bool]:
        nonlocal elapsed
        allowed.clear()
        for _ in range(int(seconds / 100)):
            thread._sweep()
            elapsed += 100
        return list(allowed)

    assert sweep_for(700) == [False] * 5 + [True] * 2
    elapsed += 600  # no sweep came to its end
    assert sweep_for(700) == [False] * 5 + [True] * 2
    asleep += 600
    assert sweep_for(700) == [False] * 5 + [True] * 2
    falls_asleep_for = 600  # in the middle of a sweep
    assert sweep_for(800) == [True] + [False] * 5 + [True] * 2


def test_a_worker_sweeps_again_at_once_when_there_was_more_than_a_batch(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "SWEEP_BATCH": 2, "SWEEP_SECONDS": 100}
    naps = [napping(seconds=1) for _ in range(5)]
    pass_seconds(1_100)
    thread = SweeperThread(of_a_broker(), Shutdown())
    sweeps = 0
    while thread._next_sweep <= monotonic():
        thread._sweep()
        sweeps += 1
    assert sweeps == 3
    assert {fresh(execution).status for execution in naps} == {ExecutionStatus.QUEUED}


def test_a_sweep_that_fails_is_repeated_at_once_and_then_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most often its connection was at fault; leases that have lapsed wait for it."""

    def refuse(**_options: Any) -> Any:
        raise OperationalError("terminating connection due to administrator command")

    monkeypatch.setattr(sweeper, "sweep", refuse)
    monkeypatch.setattr(sweeper_thread, "RETRY_PAUSE_SECONDS", 0)
    # The thread's own; that of the test is not to be closed.
    monkeypatch.setattr(SweeperThread, "_close", lambda thread: None)
    thread = SweeperThread(of_a_broker(), Shutdown())
    pauses = []
    for _ in range(3):
        thread._next_sweep = 0.0
        thread._tick()
        pauses.append(thread._next_sweep > monotonic())
    assert pauses == [False, True, True]
    monkeypatch.setattr(sweeper, "sweep", lambda **_options: turns.Found())
    thread._next_sweep = 0.0
    thread._tick()
    monkeypatch.setattr(sweeper, "sweep", refuse)
    thread._next_sweep = 0.0
    thread._tick()
    assert thread._next_sweep <= monotonic()


def test_a_worker_is_fed_with_what_it_works_off_meanwhile() -> None:
    told = news.News()
    assert told.room == 1, "nothing is known of the runs"
    told.run_ended(seconds=0.1)
    assert told.room == news.SHORT_RUN_ROOM
    for _ in range(50):
        told.run_ended(seconds=0.004)
    assert 9 <= told.room <= 10
    for _ in range(50):
        told.run_ended(seconds=0.0)
    assert told.room == news.MAX_ROOM
    told.run_ended(seconds=1.0)
    assert told.room == 1, "a long run may follow, and others are free for the next"


def test_the_feed_is_woken_when_its_stock_is_low_and_not_for_each_run() -> None:
    told = news.News()
    told.run_ended()
    assert not told._wake.is_set(), "a broker server feeds this worker"
    told.feeds = True
    told.run_ended()
    assert told._wake.is_set()
    told._wake.clear()
    told.spare = 3
    told.run_ended()
    told.run_ended()
    assert not told._wake.is_set()
    told.run_ended(due_in=0)
    assert told._wake.is_set(), "the sweeper has something to do"
    told._wake.clear()
    told.run_ended()
    assert told._wake.is_set()


@pytest.mark.parametrize(("waiting", "fetched", "spare"), [(0, [6], 3), (3, [3], 3), (4, [], 1), (6, [], 3)], ids=repr)
def test_a_worker_is_fed_when_half_of_that_is_worked_off(
    monkeypatch: pytest.MonkeyPatch, waiting: int, fetched: list[int], spare: int
) -> None:
    process.news = news.News()
    monkeypatch.setattr(news.News, "room", news.SHORT_RUN_ROOM)
    monkeypatch.setattr(Feed, "_pool_size", lambda feed: 2)
    monkeypatch.setattr(Feed, "_unread", lambda feed: waiting)
    asked: list[int] = []

    def publish(room: int, _queues: list[str]) -> int:
        asked.append(room)
        return room

    monkeypatch.setattr(sweeper, "publish_due", publish)
    Feed(SimpleNamespace(app=current_app)).fill()
    assert asked == fetched
    assert news.news().spare == spare


# ---------------------------------------------------------------------------------------------------- what is due next


def _asleep(seconds: float) -> None:
    run = running()
    assert transitions.suspend(run, transitions.Sleep("nap", seconds=seconds))


def test_the_next_deadline_is_known_before_it_has_passed() -> None:
    assert sweeper.due_in(60) is None
    _asleep(50)
    _asleep(20)
    assert sweeper.due_in(60) == pytest.approx(20, abs=5)
    assert sweeper.due_in(1) is None


def test_so_is_the_next_execution_that_becomes_due_but_not_the_next_repetition_of_a_message() -> None:
    queued()
    assert sweeper.due_in(60) is None
    queued(countdown=30)
    assert sweeper.due_in(60) == pytest.approx(30, abs=5)
    assert sweeper.due_in(60, publish=False) is None


def test_what_has_passed_is_the_sweeps_and_not_the_nexts() -> None:
    _asleep(-1)
    assert sweeper.due_in(60) is None


def test_what_becomes_due_while_a_sweep_lasts_is_not_left_to_the_regular_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep has looked before, and the look ahead comes after."""
    sweep = sweeper.sweep

    def slow(**options: Any) -> Any:
        found = sweep(**options)
        _asleep(0.002)
        return found

    monkeypatch.setattr(sweeper, "sweep", slow)
    process.news = news.News()
    thread = SweeperThread(of_a_broker(), Shutdown())
    thread._sweep()
    thread._look_ahead()
    assert news.news()._next_due - monotonic() < 1
