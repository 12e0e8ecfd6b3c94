"""What follows a commit, what a roll-back undoes, and what happens when the answer to a COMMIT is lost."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction

from conductor_app import signals, transitions
from conductor_app.conf import conductor_settings
from conductor_app.engine import claims, pruner
from conductor_app.exceptions import AbandonRun, LeaseLost
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, OnTimeout
from conductor_app.store import clock, transactions
from conductor_app.store.ids import new_root_id
from conductor_app.store.process import process
from conductor_app.transitions import AwaitEvent, Gather, HandOff, Map, Sleep, Wait, dispatch, waking
from tests.app.scenarios import echo
from tests.support.executions import (
    FAILURE,
    OWNER,
    TASK,
    claimed,
    committing,
    family,
    fresh,
    invocation,
    invoke,
    map_of,
    mapping,
    napping,
    new,
    queued,
    running,
    starting,
    step_of,
)
from tests.support.process import NotingBroker


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test, and takes a second for that."""
    with committing(django_db_blocker):
        yield


@pytest.fixture(autouse=True)
def published() -> list[Any]:
    """The ids of executions whose messages were published, in the place of a broker."""
    process.broker = broker = NotingBroker()
    return broker.ids


@pytest.fixture(params=[True, False], ids=["embedded", "broker"])
def embedded(request: pytest.FixtureRequest) -> bool:
    """Once as with ``memory://``, once as with a broker server."""
    process.worker.is_embedded = request.param
    return bool(request.param)


def lapse(execution: Execution) -> Execution:
    """Let its lease have lapsed."""
    Execution.objects.filter(pk=execution.pk).update(lease_expires_at=clock.after(-1))
    return execution


def make_overdue(execution: Execution) -> Execution:
    """Let the deadlines of its steps, and its own, have passed."""
    Step.objects.filter(execution=execution.pk).update(deadline_at=clock.after(-1))
    Execution.objects.filter(pk=execution.pk).update(deadline_at=clock.after(-1))
    return execution


def flag(execution: Execution) -> Execution:
    """Ask for it to be cancelled."""
    assert transitions.request_cancel(execution.pk, "enough")
    return execution


# Commits, roll-backs, signals


def test_what_a_callers_transaction_undoes_never_was(published: list[Any], embedded: bool) -> None:
    with heard() as events, transaction.atomic():
        queued()
        assert (published, events) == ([], [])
        transaction.set_rollback(True)
    assert not Execution.objects.exists()
    assert (published, events) == ([], [])


def test_a_message_and_a_signal_follow_the_callers_commit(published: list[Any]) -> None:
    with heard() as events:
        with transaction.atomic():
            execution = queued()
            assert events == []
        assert events == [("created", execution.pk, {})]
    assert published == ([] if dispatch.is_embedded() else [execution.pk])


def test_an_id_that_exists_leaves_the_callers_transaction_usable() -> None:
    execution = queued(idempotency_key="order-7")
    with transaction.atomic():
        same_key, created = transitions.create(new(idempotency_key="order-7"))
        assert (same_key.pk, created) == (execution.pk, False)
        same_id, created = transitions.create(new(id=execution.pk))
        assert (same_id.pk, created) == (execution.pk, False)
        other = queued()
    assert set(Execution.objects.values_list("pk", flat=True)) == {execution.pk, other.pk}


def test_a_row_that_the_database_refuses_raises_and_leaves_the_callers_transaction_usable() -> None:
    with transaction.atomic():
        with pytest.raises(IntegrityError):
            transitions.create(new(task=None))
        execution = queued()
    assert Execution.objects.get().pk == execution.pk


@contextmanager
def heard() -> Iterator[list[Any]]:
    """What our signals say: their short names, the execution's id, and the details."""
    events: list[Any] = []
    receivers = []
    for name in ("created", "started", "suspended", "retrying", "finished"):

        def receive(execution: Execution, signal: Any, sender: Any, name: str = name, **details: Any) -> None:
            assert sender == execution.task
            assert not connection.in_atomic_block
            events.append((name, execution.pk, details))

        signal = getattr(signals, f"execution_{name}")
        signal.connect(receive, weak=False)
        receivers.append((signal, receive))
    try:
        yield events
    finally:
        for signal, receive in receivers:
            signal.disconnect(receive)


def test_each_move_is_told_once_after_its_commit() -> None:
    with heard() as events:
        parent = running()
        child = invoke(parent)
        transitions.retry_later(claimed(child), FAILURE, 0)
        transitions.lose(claimed(child).pk, owner=OWNER)
        Execution.objects.update(due_at=clock.now())
        transitions.succeed(claimed(child), "1")
        transitions.fail(claimed(parent), FAILURE)
        other = flag(queued())
        transitions.cancel_flagged(other.pk)
    assert [(name, key) for name, key, _ in events if key == child.pk] == [
        (name, child.pk) for name in ("created", "started", "retrying", "started", "retrying", "started", "finished")
    ]
    assert [name for name, key, _ in events if key == parent.pk] == [
        "created",
        "started",
        "suspended",
        "started",
        "finished",
    ]
    assert [name for name, key, _ in events if key == other.pk] == ["created", "finished"]
    retrying = [details for name, _, details in events if name == "retrying"]
    assert [details["delay"] for details in retrying] == [0, 1]
    assert [details["failure"].type for details in retrying] == [FAILURE.type, "conductor_app.exceptions.WorkerLost"]
    finished = [details["status"] for name, _, details in events if name == "finished"]
    assert finished == ["succeeded", "failed", "cancelled"]
    assert [details["step"] for name, _, details in events if name == "suspended"] == ["child"]


def test_a_receivers_error_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(**_kwargs: Any) -> None:
        raise RuntimeError("no")

    signals.execution_created.connect(refuse)
    try:
        execution = queued()
    finally:
        signals.execution_created.disconnect(refuse)
    assert transitions.claim(execution.pk, OWNER) is not None


# What a run goes on with


def handing_off(*known: Execution, accepts: bool = True) -> HandOff:
    """What a process hands a run's successor to: ``known`` are the parents that it remembers."""
    parents = {parent.pk: parent for parent in known}
    return HandOff(OWNER, lambda following: accepts, parents.get)


def standing(execution: Execution) -> tuple[str, int, str]:
    row = fresh(execution)
    assert (row.lease_expires_at is not None) == (row.status == "running")
    assert (row.dispatch_at is not None) == (row.status == "queued")
    return row.status, row.fence, row.lease_owner


def test_a_child_is_claimed_by_the_commit_that_stores_it(published: list[Any]) -> None:
    parent = running()
    published.clear()
    hand_off = handing_off()
    assert transitions.suspend(parent, invocation(parent, timeout=5), hand_off=hand_off)
    (child,) = Execution.objects.filter(parent=parent)
    assert (standing(parent), standing(child)) == (("waiting", 1, ""), ("running", 1, OWNER))
    taken = hand_off.claimed
    assert taken is not None
    assert taken == hand_off.wanted == child
    for field in (field.attname for field in Execution._meta.concrete_fields):
        if field not in ("lease_expires_at", "dispatch_at"):
            assert getattr(taken, field) == getattr(child, field), field
    assert child.started_at is not None
    assert published == []
    # It is the run of it that writes.
    transitions.succeed(taken, "1")
    assert step_of(parent).status == "succeeded"


def test_a_child_that_this_process_may_not_run_is_queued(published: list[Any], embedded: bool) -> None:
    parent = running()
    published.clear()
    hand_off = handing_off(accepts=False)
    assert transitions.suspend(parent, invocation(parent), hand_off=hand_off)
    (child,) = Execution.objects.filter(parent=parent)
    assert standing(child) == ("queued", 0, "")
    assert (child.started_at, hand_off.claimed, hand_off.wanted) == (None, None, None)
    assert published == ([] if embedded else [child.pk])


def test_a_child_that_is_due_later_is_queued() -> None:
    parent = running()
    hand_off = handing_off()
    assert transitions.suspend(parent, invocation(parent, countdown=60), hand_off=hand_off)
    assert standing(Execution.objects.get(parent=parent)) == ("queued", 0, "")
    assert hand_off.claimed is None


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_a_parent_is_claimed_when_its_child_succeeds(published: list[Any], is_known: bool) -> None:
    parent, child = family()
    published.clear()
    hand_off = handing_off(*[parent] if is_known else [])
    transitions.succeed(child, "1", hand_off)
    assert (standing(child), standing(parent)) == (("succeeded", 1, ""), ("running", 2, OWNER))
    taken = hand_off.claimed
    assert taken is not None
    assert taken == hand_off.wanted == parent
    assert (taken.fence, taken.payload, taken.status) == (2, parent.payload, "running")
    assert published == []


def test_a_parent_that_another_run_has_had_meanwhile_is_read_anew() -> None:
    """As after an operator's retry, which opens the step again for which it waited in this process."""
    parent, child = family()
    outdated = parent.copied(fence=parent.fence - 1, payload='[["as it was"],{}]', attempt=7)
    hand_off = handing_off(outdated)
    transitions.succeed(child, "1", hand_off)
    taken = hand_off.claimed
    assert taken is not None
    assert (taken.fence, taken.payload, taken.attempt) == (parent.fence + 1, parent.payload, parent.attempt)


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
def test_a_parent_that_is_to_be_cancelled_is_not_claimed(published: list[Any], is_known: bool) -> None:
    parent, child = family()
    flag(parent)
    hand_off = handing_off(*[parent] if is_known else [])
    transitions.succeed(child, "1", hand_off)
    assert standing(parent) == ("queued", 1, "")
    assert hand_off.claimed is None


def test_a_parent_that_this_process_may_not_run_is_queued(published: list[Any], embedded: bool) -> None:
    parent, child = family()
    published.clear()
    hand_off = handing_off(parent, accepts=False)
    transitions.succeed(child, "1", hand_off)
    assert standing(parent) == ("queued", 1, "")
    assert hand_off.claimed is None
    assert published == ([] if embedded else [parent.pk])


def test_a_parent_that_runs_is_left_alone(published: list[Any]) -> None:
    """As the first run of an operator's retry may find its child at work."""
    parent, child = family()
    waking.wake(parent.pk)
    parent = claimed(parent, "test@host/2")
    published.clear()
    hand_off = handing_off(parent)
    transitions.succeed(child, "1", hand_off)
    assert standing(parent) == ("running", 2, "test@host/2")
    assert step_of(parent).status == "succeeded"
    assert (hand_off.claimed, published) == (None, [])


@pytest.mark.parametrize("decided", ["timed out", "cancelled"])
def test_a_parent_that_no_longer_waits_for_a_child_is_left_alone(published: list[Any], decided: str) -> None:
    parent, child = family(timeout=5, on_timeout="abandon")
    if decided == "timed out":
        assert transitions.decide_overdue(step_of(make_overdue(parent)))
        parent = claimed(parent, "test@host/2")
    else:
        assert transitions.cancel_flagged(flag(parent).pk)
    before = standing(parent)
    published.clear()
    hand_off = handing_off(parent)
    if decided == "timed out":
        transitions.succeed(child, "1", hand_off)
    else:
        assert transitions.cancel_running(child, hand_off, result="1")
    assert standing(parent) == before
    assert step_of(parent).status == ("timed_out" if decided == "timed out" else "cancelled")
    assert (hand_off.claimed, published) == (None, [])


@pytest.mark.parametrize("max_parallel", [None, 1])
def test_the_last_child_of_a_map_hands_its_parent_on(max_parallel: int | None) -> None:
    parent, children = mapping(2, max_parallel=max_parallel)
    first = handing_off(parent)
    transitions.succeed(claimed(children[0]), "1", first)
    assert standing(parent) == ("waiting", 1, "")
    assert (step_of(parent).status, step_of(parent).remaining) == ("pending", 1)
    assert first.claimed is None
    hand_off = handing_off(parent)
    transitions.succeed(claimed(children[1]), "2", hand_off)
    assert standing(parent) == ("running", 2, OWNER)
    assert hand_off.claimed == parent
    assert (step_of(parent).status, step_of(parent).remaining) == ("succeeded", 0)


def test_the_last_member_of_a_gather_hands_its_parent_on() -> None:
    parent, (first, last) = starting(2)
    assert transitions.suspend(parent, Gather("both", ["child-0", "child-1"], fails_fast=True))
    for child in (first, last):
        assert standing(parent) == ("waiting", 1, "")
        hand_off = handing_off(parent)
        transitions.succeed(child, "1", hand_off)
    assert hand_off.claimed == parent
    assert standing(parent) == ("running", 2, OWNER)


def test_a_claim_inside_a_transaction_that_is_rolled_back_hands_nothing_on() -> None:
    parent, child = family()
    hand_off = handing_off(parent)
    with transaction.atomic():
        transitions.succeed(child, "1", hand_off)
        transaction.set_rollback(True)
    assert hand_off.claimed is None
    assert (standing(parent)[0], standing(child)[0]) == ("waiting", "running")


# A COMMIT whose answer is lost: the transaction is run again, and finds its own traces


@contextmanager
def answers_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the next COMMIT, or the next statement outside of a transaction, succeed and its answer get lost."""
    lost: list[bool] = []

    def lose_the_answer() -> None:
        if not lost:
            lost.append(True)
            raise OperationalError(2013, "Lost connection to server during query")

    commit = connection.commit

    def commit_and_lose() -> None:
        commit()
        lose_the_answer()

    def execute_and_lose(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        result = execute(sql, params, many, context)
        if not connection.in_atomic_block and not sql.startswith(("SELECT", "BEGIN")):
            lose_the_answer()
        return result

    with monkeypatch.context() as patched, connection.execute_wrapper(execute_and_lose):
        patched.setattr(connection, "commit", commit_and_lose)
        yield
    assert lost, "nothing was committed"


def test_a_success_whose_commit_got_no_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = family()
    with answers_lost(monkeypatch):
        transitions.succeed(child, "1")
    assert (fresh(child).status, fresh(parent).status) == ("succeeded", "queued")


def test_a_failure_whose_commit_got_no_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = family()
    with answers_lost(monkeypatch):
        transitions.fail(child, FAILURE)
    assert (fresh(child).status, fresh(parent).status) == ("failed", "queued")
    assert FailedExecution.objects.count() == 1


def test_a_step_whose_commit_got_no_answer_is_remembered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    with answers_lost(monkeypatch):
        memory = transitions.record_step(run, "charge", result='"R-1"')
    assert memory.get_result() == "R-1"
    assert Step.objects.count() == 1


#: Other ends of a run: what is tried again finds that the run has ended, and reports a lost lease.
OTHER_ENDS: dict[str, tuple[Callable[[Execution], object], str]] = {
    "invoke": (lambda run: transitions.suspend(run, invocation(run)), "waiting"),
    "sleep": (lambda run: transitions.suspend(run, Sleep("nap", seconds=60)), "waiting"),
    "retry later": (lambda run: transitions.retry_later(run, FAILURE, 1), "queued"),
    "release": (transitions.release, "queued"),
    "cancel": (transitions.cancel_running, "cancelled"),
}


@pytest.mark.parametrize("end", OTHER_ENDS)
def test_another_end_whose_commit_got_no_answer_is_made_once(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, status = OTHER_ENDS[end]
    run = flag(running()) if end == "cancel" else running()
    with answers_lost(monkeypatch), pytest.raises(LeaseLost):
        act(run)
    row = fresh(run)
    assert row.status == status
    assert row.attempt == (2 if end == "retry later" else 1)
    assert Step.objects.count() == (status == "waiting")
    # The sweeper publishes what no message was sent for.
    assert all(child.dispatch_at for child in Execution.objects.filter(parent=run.pk))


def _gather_of_ended_children() -> tuple[Execution, Wait]:
    parent, children = starting(2)
    for child in children:
        transitions.succeed(child, "1")
    return parent, Gather("both", ["child-0", "child-1"], fails_fast=True)


def _map_of_nothing() -> tuple[Execution, Wait]:
    wait = Map("all", TASK, [], "", timeout=None, on_timeout=OnTimeout.CANCEL, max_parallel=None, fails_fast=True)
    return running(), wait


#: What is decided when it is recorded, so that the body goes on.
DECIDED: dict[str, Callable[[], tuple[Execution, Wait]]] = {
    "gather": _gather_of_ended_children,
    "map": _map_of_nothing,
}


@pytest.mark.parametrize("kind", DECIDED)
def test_what_is_decided_at_once_is_recorded_once_when_the_commit_got_no_answer(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wait = DECIDED[kind]()
    with answers_lost(monkeypatch):
        assert transitions.suspend(run, wait) is False
    assert fresh(run).status == "running"
    assert step_of(run, wait.step).status == "succeeded"


#: A sweeper's acts: what is tried again finds nothing to do.
SWEPT: dict[str, tuple[Callable[[], Execution], Callable[[Execution], object], str]] = {
    "lose": (lambda: lapse(running()), lambda row: transitions.lose(row.pk), "queued"),
    "decide": (lambda: make_overdue(napping()), lambda row: transitions.decide_overdue(step_of(row, "nap")), "queued"),
    "cancel": (lambda: flag(napping()), lambda row: transitions.cancel_flagged(row.pk), "cancelled"),
    "expire": (lambda: make_overdue(queued()), lambda row: transitions.expire(row.pk), "cancelled"),
}


@pytest.mark.parametrize("swept", SWEPT)
def test_a_sweepers_act_whose_commit_got_no_answer_is_done_once(swept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, act, status = SWEPT[swept]
    execution = make()
    with answers_lost(monkeypatch):
        assert not act(execution)
    row = fresh(execution)
    assert (row.status, row.attempt) == (status, 2 if swept == "lose" else 1)


def test_a_cancel_whose_commit_got_no_answer_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    with answers_lost(monkeypatch):
        assert transitions.request_cancel(run.pk, "enough")
    assert fresh(run).cancel_reason == "enough"


def test_a_claim_whose_commit_got_no_answer_is_taken_back_with_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = queued()
    with answers_lost(monkeypatch), pytest.raises(OperationalError):
        transitions.claim(execution.pk, OWNER)
    assert fresh(execution).status == "running"
    assert transitions.lose(lapse(execution).pk)
    assert claimed(execution).fence == 2


def test_a_run_takes_its_own_claim_when_the_commit_got_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be nobody's until the lease ends, and cost an attempt: the only one, with ``max_retries=0``."""
    execution = queued()
    with answers_lost(monkeypatch):
        run = claims.claim(execution.pk, OWNER, execution.task)
    assert run is not None
    assert (run.fence, run.attempt) == (2, 1)
    transitions.succeed(run, "1")
    assert fresh(execution).status == "succeeded"


def fails_once(act: Callable[..., Any]) -> Callable[..., Any]:
    failures = [OperationalError(2013, "Lost connection to server during query")]

    def fail_first(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return act(*args)

    return fail_first


def test_a_lost_answer_takes_no_lease_from_a_run_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, others = running(), running()
    Execution.objects.filter(pk=others.pk).update(lease_owner="another@host/1")
    with process.keeper.hold(mine):
        for execution in (mine, others):
            with monkeypatch.context() as patched:
                patched.setattr(transitions, "claim", fails_once(transitions.claim))
                assert claims.claim(execution.pk, OWNER, execution.task) is None
    assert (fresh(mine).fence, fresh(others).fence) == (1, 1)


def test_messages_that_were_taken_without_an_answer_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = queued()
    Execution.objects.update(dispatch_at=clock.after(-1))
    with answers_lost(monkeypatch):
        assert transitions.take_for_dispatch(10) == []
    row = fresh(execution)
    assert row.dispatches == 1
    assert row.dispatch_at is not None
    assert row.dispatch_at - clock.read("default") <= dt.timedelta(seconds=conductor_settings().REDISPATCH_SECONDS)


# A database that stays away


def test_an_outage_longer_than_a_lease_abandons_a_run_and_is_an_error_to_everybody_else(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """Only a run can be abandoned: in the sweeper's thread, or in a web process, it would end what serves others."""
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 0.03, "HEARTBEAT_SECONDS": 0.01, "SWEEP_SECONDS": 0.01}
    monkeypatch.setattr(transactions, "_BRIEF_SECONDS", 0)
    run, waiting = running(), napping()

    def refuse(*_args: Any) -> Any:
        raise OperationalError(2013, "Lost connection to server during query")

    with connection.execute_wrapper(refuse):
        with pytest.raises(AbandonRun):
            transitions.succeed(run, "1")
        for act in (
            lambda: transitions.lose(run.pk),
            lambda: transitions.decide_overdue(Step(execution_id=waiting.pk, name="nap", kind="sleep")),
            lambda: transitions.take_for_dispatch(10),
            lambda: transitions.put_back([run], 1),
            lambda: transitions.take_for_announcement(10),
            lambda: transitions.announced(run, ExecutionStatus.SUCCEEDED),
            lambda: transitions.wake_stranded(waiting.pk),
            lambda: transitions.request_cancel(run.pk, ""),
            lambda: transitions.cancel_flagged(run.pk),
            lambda: transitions.expire(run.pk),
            lambda: transitions.reopen(run.pk),
            lambda: pruner.prune(dt.timedelta()),
        ):
            with pytest.raises(OperationalError):
                act()


def test_a_message_of_others_that_cannot_be_stored_fails_as_any_tasks(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 0.03, "HEARTBEAT_SECONDS": 0.01, "SWEEP_SECONDS": 0.01}

    def refuse(*_args: Any) -> Any:
        raise OperationalError(2013, "Lost connection to server during query")

    echo.push_request(id=str(new_root_id()), called_directly=False, args=(), kwargs={})
    try:
        with connection.execute_wrapper(refuse), pytest.raises(OperationalError):
            echo(value=1)
    finally:
        echo.pop_request()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "wait_for",
    [
        lambda run: Sleep("nap", seconds=60),
        lambda run: AwaitEvent("event", "approved", None),
        invocation,
        lambda run: map_of(run, 2),
    ],
    ids=["a sleep", "an event", "a child", "a map"],
)
def test_a_suspension_that_is_shown_is_one_transaction(
    wait_for: Callable[[Execution], Wait], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may die after each commit: with one before that, an attempt would be lost."""
    run = running()
    commits: list[str] = []
    commit = connection._commit

    def noted() -> None:
        commits.append(fresh(run).status)
        commit()

    monkeypatch.setattr(connection, "_commit", noted)
    assert transitions.suspend(run, wait_for(run), before_commit=lambda: None)
    assert commits == ["waiting"]
