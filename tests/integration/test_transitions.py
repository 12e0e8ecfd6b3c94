"""Every move states what it expects; a move that comes too late changes nothing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction
from django.test.utils import CaptureQueriesContext

from conductor_app import api, transitions
from conductor_app.exceptions import CancelExecution, Failure, LeaseLost, RetryRefused
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ALLOWED_MOVES, ExecutionStatus, StepStatus
from conductor_app.store import clock, moves
from conductor_app.store.ids import created_at
from conductor_app.store.process import process
from conductor_app.transitions import Invocation, Pending, Sleep, dispatch, steps
from tests.support.executions import (
    FAILURE,
    OWNER,
    TASK,
    claimed,
    family,
    fresh,
    invocation,
    invoke,
    map_of,
    mapping,
    napping,
    queued,
    running,
    snapshot,
    step_of,
    unsaved,
)
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db


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


# Executions in every state


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


def cancelled_with_result() -> Execution:
    """It was to be cancelled, and returned a result all the same."""
    run = flag(running())
    assert transitions.cancel_running(run, result='"done"')
    return run


def succeeded(**fields: Any) -> Execution:
    run = running(**fields)
    transitions.succeed(run, '"done"')
    return run


def failed(**fields: Any) -> Execution:
    run = running(**fields)
    transitions.fail(run, FAILURE)
    return run


def cancelled(**fields: Any) -> Execution:
    execution = flag(queued(**fields))
    assert transitions.cancel_flagged(execution.pk)
    return execution


def stranded() -> Execution:
    """Waiting for nothing, as only a bug or a hand-written UPDATE leaves it."""
    execution = napping()
    Step.objects.filter(execution=execution.pk).update(status=StepStatus.SUCCEEDED, finished_at=clock.now())
    return execution


STATES: dict[str, Callable[[], Execution]] = {
    "queued": queued,
    "queued for later": lambda: queued(countdown=60),
    "queued and flagged": lambda: flag(queued()),
    "queued and expired": lambda: make_overdue(queued()),
    "running": running,
    "running and flagged": lambda: flag(running()),
    "running and lapsed": lambda: lapse(running()),
    "waiting": napping,
    "waiting and flagged": lambda: flag(napping()),
    "waiting and overdue": lambda: make_overdue(napping()),
    "waiting for nothing": stranded,
    "succeeded": succeeded,
    "failed": failed,
    "cancelled": cancelled,
}


def decide_nap(execution: Execution) -> bool:
    """Decide the overdue step, as the sweeper does; ``False`` too if there is none."""
    nap = Step.objects.filter(execution=execution.pk).first()
    return nap is not None and transitions.decide_overdue(nap)


#: What a sweeper, an operator or a message may ask for, and the only states in which it does something.
ASKED: dict[str, tuple[Callable[[Execution], object], set[str]]] = {
    "claim": (
        lambda execution: transitions.claim(execution.pk, OWNER),
        {"queued"},
    ),
    "claim for its task": (lambda execution: transitions.claim(execution.pk, OWNER, TASK), {"queued"}),
    "claim for another task": (lambda execution: transitions.claim(execution.pk, OWNER, "another.task"), set()),
    "lose a lapsed lease": (lambda execution: transitions.lose(execution.pk), {"running and lapsed"}),
    "lose a dead process": (
        lambda execution: transitions.lose(execution.pk, owner=OWNER),
        {"running", "running and flagged", "running and lapsed"},
    ),
    "lose another process": (lambda execution: transitions.lose(execution.pk, owner="test@host/2"), set()),
    "decide an overdue step": (decide_nap, {"waiting and overdue"}),
    "wake a stranded one": (lambda execution: transitions.wake_stranded(execution.pk), {"waiting for nothing"}),
    "request a cancel": (
        lambda execution: transitions.request_cancel(execution.pk, "stop") and fresh(execution).cancel_reason == "stop",
        {state for state in STATES if state.startswith(("queued", "running", "waiting")) and "flagged" not in state},
    ),
    "cancel a flagged one": (
        lambda execution: transitions.cancel_flagged(execution.pk),
        {"queued and flagged", "waiting and flagged"},
    ),
    "expire": (lambda execution: transitions.expire(execution.pk), {"queued and expired"}),
    "announce": (lambda execution: transitions.announced(execution, ExecutionStatus(execution.status)), set()),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_happens_in_its_states_alone(asked: str) -> None:
    act, effective = ASKED[asked]
    for state, make in STATES.items():
        execution = make()
        before = snapshot()
        done = bool(act(execution))
        assert done == (state in effective), state
        assert (snapshot() != before) == done, state


@pytest.mark.parametrize("state", STATES)
def test_only_a_failed_or_cancelled_execution_is_reopened(state: str) -> None:
    execution = STATES[state]()
    before = snapshot()
    if state in ("failed", "cancelled"):
        transitions.reopen(execution.pk)
        assert fresh(execution).status == ExecutionStatus.QUEUED
    else:
        with pytest.raises(
            RetryRefused, match=f"is {state.split(maxsplit=1)[0]}. Only a failed or cancelled one can be retried"
        ):
            transitions.reopen(execution.pk)
        assert snapshot() == before


#: What a run may write, each with the fence that it got when it claimed.
WRITES: dict[str, Callable[[Execution], object]] = {
    "record a step": lambda run: transitions.record_step(run, "charge", result="1"),
    "ask whether it holds": transitions.check_held,
    "invoke": lambda run: transitions.suspend(run, invocation(run)),
    "map": lambda run: transitions.suspend(run, map_of(run, 2)),
    "sleep": lambda run: transitions.suspend(run, Sleep("nap", seconds=1)),
    "wait on": lambda run: transitions.suspend(run, Pending("nap")),
    "succeed": lambda run: transitions.succeed(run, "1"),
    "fail": lambda run: transitions.fail(run, FAILURE),
    "retry later": lambda run: transitions.retry_later(run, FAILURE, 1),
    "release": transitions.release,
    "cancel": transitions.cancel_running,
}


def taken_over(run: Execution, owner: str = "test@host/2") -> None:
    transitions.lose(run.pk, owner=OWNER)
    claimed(run, owner)


LOSSES: dict[str, Callable[[Execution], object]] = {
    "reclaimed": lambda run: transitions.lose(run.pk, owner=OWNER),
    "taken over": taken_over,
    "taken over by the same process": lambda run: taken_over(run, OWNER),
    "suspended": lambda run: transitions.suspend(run, Sleep("a-nap", seconds=60)),
    "succeeded": lambda run: transitions.succeed(run, '"another result"'),
    "failed": lambda run: transitions.fail(run, Failure("Another", "another failure")),
    "cancelled": lambda run: transitions.cancel_running(flag(run)),
    # An operator has put it back in SQL, and left the owner of the lease.
    "queued by hand": lambda run: Execution.objects.filter(pk=run.pk).update(
        status="queued", lease_expires_at=None, dispatch_at=clock.now()
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_run_that_has_lost_its_execution_writes_nothing(write: str) -> None:
    for loss, lose in LOSSES.items():
        run = running()
        lose(run)
        before = snapshot()
        with pytest.raises(LeaseLost, match=r"fence 1\) is lost"):
            WRITES[write](run)
        assert snapshot() == before, loss
        assert not FailedExecution.objects.filter(pk=run.pk).exclude(message="another failure").exists()


@pytest.mark.parametrize("write", ["invoke", "map", "sleep", "wait on", "retry later", "succeed", "fail"])
def test_a_run_that_is_to_be_cancelled_neither_waits_nor_ends_otherwise(write: str) -> None:
    run = flag(running())
    before = snapshot()
    with pytest.raises(CancelExecution):
        WRITES[write](run)
    assert snapshot() == before


@pytest.mark.parametrize(("write", "status"), [("release", "queued"), ("cancel", "cancelled")])
def test_a_run_that_is_to_be_cancelled_may_be_released(write: str, status: str) -> None:
    run = flag(running())
    WRITES[write](run)
    assert fresh(run).status == status


def test_a_cancelled_run_keeps_its_result_and_a_retry_adopts_it() -> None:
    run = cancelled_with_result()
    row = fresh(run)
    assert (row.status, row.get_result(), row.error_message) == ("cancelled", "done", "Cancelled: enough")
    transitions.reopen(run.pk)
    adopted = fresh(run)
    assert (adopted.status, adopted.get_result(), adopted.error, adopted.cancel_reason) == (
        "succeeded",
        "done",
        None,
        "",
    )
    assert (adopted.cancel_requested_at, adopted.finished_at, adopted.attempt) == (None, row.finished_at, 1)
    with pytest.raises(RetryRefused, match="is succeeded"):
        transitions.reopen(run.pk)


def test_a_retry_adopts_the_result_of_a_cancelled_child_and_queues_its_parent() -> None:
    parent, child = family()
    api.cancel(parent)
    assert transitions.cancel_running(child, result='"late"')
    assert (fresh(parent).status, step_of(parent).status) == ("cancelled", "cancelled")
    transitions.reopen(parent.pk)
    assert [fresh(row).status for row in (parent, child)] == ["queued", "succeeded"]
    assert steps.recall(parent.pk)["child"].get_result() == "late"


def test_a_retry_adopts_the_results_of_cancelled_children_of_a_map_and_runs_the_others() -> None:
    parent = running()
    assert transitions.suspend(parent, map_of(parent, 3))
    first, second, third = [claimed(row) for row in Execution.objects.filter(parent=parent).order_by("position")]
    api.cancel(parent)
    assert transitions.cancel_running(first, result="1")
    assert transitions.cancel_running(second)
    assert transitions.cancel_running(third, result="3")
    transitions.reopen(parent.pk)
    assert [fresh(row).status for row in (parent, first, second, third)] == [
        *("waiting", "succeeded", "queued", "succeeded"),
    ]
    assert step_of(parent).remaining == 1
    transitions.succeed(claimed(second), "2")
    assert fresh(parent).status == "queued"


def test_a_map_of_which_all_cancelled_children_had_results_goes_on_at_once() -> None:
    parent = running()
    assert transitions.suspend(parent, map_of(parent, 2))
    children = [claimed(row) for row in Execution.objects.filter(parent=parent)]
    api.cancel(parent)
    for child in children:
        assert transitions.cancel_running(child, result="1")
    transitions.reopen(parent.pk)
    assert (fresh(parent).status, step_of(parent).status) == ("queued", "succeeded")


def test_what_a_cancelled_root_with_a_result_had_started_goes_on_with_a_retry() -> None:
    root = running()
    transitions.start_child(root, invocation(root))
    api.cancel(root)
    assert transitions.cancel_running(root, result="1")
    child = Execution.objects.get(parent=root)
    api.cancel(root)
    transitions.cancel_flagged(child.pk)
    assert fresh(child).status == "cancelled"
    transitions.reopen(root.pk)
    assert [fresh(row).status for row in (root, child)] == ["succeeded", "queued"]


def test_who_asks_for_the_end_of_a_late_child_is_obeyed() -> None:
    """For its parent's timeout alone it would keep a success."""
    parent, child = family(timeout=60)
    make_overdue(parent)
    assert transitions.decide_overdue(step_of(parent))
    assert api.cancel(child, reason="enough")
    assert fresh(child).cancel_reason == "enough"
    with pytest.raises(CancelExecution):
        transitions.succeed(child, '"late"')


def test_a_late_child_that_fails_is_cancelled_as_the_timeout_wanted() -> None:
    parent, child = family(timeout=60, max_attempts=1)
    make_overdue(parent)
    assert transitions.decide_overdue(step_of(parent))
    with pytest.raises(CancelExecution):
        transitions.fail(child, FAILURE)


def test_a_step_of_a_run_that_is_to_be_cancelled_is_remembered_all_the_same() -> None:
    run = flag(running())
    with pytest.raises(CancelExecution):
        transitions.record_step(run, "charge", result="1")
    assert steps.recall(run.pk)["charge"].get_result() == 1


# The moves


def hand_off_to(parent: Execution) -> None:
    """Let its child succeed in a process that goes on with it."""
    child = Execution.objects.get(parent=parent)
    transitions.succeed(child, "1", transitions.HandOff(OWNER, lambda following: True, lambda pk: parent))


MOVES: list[tuple[str, str, Callable[[], Execution], Callable[[Execution], object]]] = [
    ("queued", "running", queued, claimed),
    ("queued", "cancelled", lambda: flag(queued()), lambda row: transitions.cancel_flagged(row.pk)),
    ("queued", "cancelled", lambda: make_overdue(queued()), lambda row: transitions.expire(row.pk)),
    ("running", "queued", running, transitions.release),
    ("running", "queued", running, lambda row: transitions.give_back(row.pk, OWNER)),
    ("running", "queued", running, WRITES["retry later"]),
    ("running", "queued", running, LOSSES["reclaimed"]),
    ("running", "waiting", running, WRITES["invoke"]),
    ("running", "waiting", running, WRITES["sleep"]),
    ("running", "succeeded", running, WRITES["succeed"]),
    ("running", "failed", running, WRITES["fail"]),
    ("running", "failed", lambda: running(max_attempts=1), LOSSES["reclaimed"]),
    ("running", "cancelled", lambda: flag(running()), transitions.cancel_running),
    ("running", "cancelled", lambda: flag(running()), LOSSES["reclaimed"]),
    ("waiting", "queued", lambda: make_overdue(napping()), decide_nap),
    ("waiting", "queued", stranded, lambda row: transitions.wake_stranded(row.pk)),
    ("waiting", "running", lambda: family()[0], hand_off_to),
    ("waiting", "cancelled", lambda: flag(napping()), lambda row: transitions.cancel_flagged(row.pk)),
    ("failed", "queued", failed, lambda row: transitions.reopen(row.pk)),
    ("failed", "waiting", lambda: failed_by_child()[0], lambda row: transitions.reopen(row.pk)),
    ("cancelled", "queued", cancelled, lambda row: transitions.reopen(row.pk)),
    ("cancelled", "waiting", lambda: cancelled_with_child()[0], lambda row: transitions.reopen(row.pk)),
    ("cancelled", "succeeded", cancelled_with_result, lambda row: transitions.reopen(row.pk)),
]


def failed_by_child() -> tuple[Execution, Execution]:
    """A parent that failed because its child failed."""
    parent, child = family()
    transitions.fail(child, FAILURE)
    parent = claimed(parent)
    transitions.fail(
        parent, Failure("ChildFailed", "Child execution failed: card declined"), step="child", child_id=child.pk
    )
    return parent, child


def cancelled_with_child() -> tuple[Execution, Execution]:
    """A parent that was cancelled while it waited for its child, which still runs."""
    parent, child = family()
    assert transitions.cancel_flagged(flag(parent).pk)
    return parent, child


@pytest.mark.parametrize(
    ("before", "after", "make", "act"), MOVES, ids=[f"{before} to {after}" for before, after, *_ in MOVES]
)
def test_a_move(before: str, after: str, make: Callable[[], Execution], act: Callable[[Execution], object]) -> None:
    execution = make()
    assert fresh(execution).status == before
    act(execution)
    row = fresh(execution)
    assert row.status == after
    assert ExecutionStatus(after) in ALLOWED_MOVES[ExecutionStatus(before)]
    assert (row.lease_owner, row.lease_expires_at is None) == ((OWNER, False) if after == "running" else ("", True))
    assert (row.dispatch_at is not None) == (after == "queued")
    assert (row.finished_at is not None) == row.is_final
    assert (row.error is not None) == (after in ("failed", "cancelled") or (before, row.attempt) == ("running", 2))
    assert FailedExecution.objects.filter(pk=row.pk).exists() == (after == "failed")
    assert row.fence == (execution.fence or 0) + (after == "running")


def test_every_allowed_move_is_made_by_some_transition() -> None:
    made = {(before, after) for before, after, *_ in MOVES}
    assert made == {(before.value, after.value) for before, targets in ALLOWED_MOVES.items() for after in targets}


def test_a_claim_counts_the_fence_and_keeps_the_first_start() -> None:
    first = running()
    started_at = fresh(first).started_at
    transitions.release(first)
    second = claimed(first, "test@host/2")
    assert (first.fence, second.fence) == (1, 2)
    assert (second.lease_owner, second.attempt) == ("test@host/2", 1)
    assert fresh(second).started_at == started_at


def test_a_started_execution_does_not_expire() -> None:
    run = running(expires=60)
    make_overdue(run)
    transitions.release(run)
    assert not transitions.expire(run.pk)
    assert transitions.claim(run.pk, OWNER) is not None


# A parent and its child


def test_suspending_stores_child_and_step_together() -> None:
    parent = running()
    child = invoke(parent, timeout=30, on_timeout="abandon", queue="slow", priority=3)
    step = step_of(parent)
    assert (child.parent_id, child.root_id, child.depth, child.step) == (parent.pk, parent.pk, 1, "child")
    assert (child.status, child.attempt, child.queue, child.priority) == ("queued", 1, "slow", 3)
    assert (step.kind, step.status, step.child_id, step.fence) == ("invoke", "pending", child.pk, 1)
    assert (step.timeout_seconds, step.on_timeout) == (30, "abandon")
    assert step.deadline_at is not None
    assert step.deadline_at - step.created_at == dt.timedelta(seconds=30)


def test_a_suspension_whose_child_cannot_be_stored_leaves_the_parent_running() -> None:
    parent = running()
    before = snapshot()
    with pytest.raises(IntegrityError), transaction.atomic():
        transitions.suspend(parent, invocation(parent, idempotency_key=None, task=None))
    assert snapshot() == before


def test_a_step_decided_meanwhile_lets_the_body_go_on() -> None:
    parent, child = family()
    transitions.succeed(child, "1")
    parent = claimed(parent)
    before = snapshot()
    assert transitions.suspend(parent, Pending("child")) is False
    assert snapshot() == before


def test_before_commit_runs_while_the_row_is_written_and_its_error_undoes_everything() -> None:
    parent = running()
    before = snapshot()

    def refuse() -> None:
        assert fresh(parent).status == ExecutionStatus.WAITING
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        transitions.suspend(parent, invocation(parent), before_commit=refuse)
    assert snapshot() == before


ENDS: dict[str, tuple[Callable[[Execution], object], StepStatus]] = {
    "succeeds": (WRITES["succeed"], StepStatus.SUCCEEDED),
    "fails": (WRITES["fail"], StepStatus.FAILED),
    "is cancelled": (lambda child: transitions.cancel_running(flag(child)), StepStatus.CANCELLED),
    "dies for the last time": (LOSSES["reclaimed"], StepStatus.FAILED),
    "is cancelled when its process dies": (lambda child: LOSSES["reclaimed"](flag(child)), StepStatus.CANCELLED),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_child_that_ends_wakes_its_parent_once(end: str) -> None:
    act, outcome = ENDS[end]
    parent, child = family(max_attempts=1)
    act(child)
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert step_of(parent).status == outcome
    assert transitions.claim(parent.pk, OWNER) is not None


@pytest.mark.parametrize("end", ENDS)
def test_a_child_that_ends_after_its_parent_changes_only_itself_and_the_step(end: str) -> None:
    act, _outcome = ENDS[end]
    parent, child = family(max_attempts=1)
    assert transitions.cancel_flagged(flag(parent).pk)
    before = Execution.objects.filter(pk=parent.pk).values().get()
    try:
        act(child)
    except CancelExecution:
        assert transitions.cancel_running(child)
    assert Execution.objects.filter(pk=parent.pk).values().get() == before
    assert step_of(parent).status == StepStatus.CANCELLED, "as its parent was, and it with it"


def test_a_timed_out_step_keeps_its_outcome_and_the_late_child_keeps_its_result() -> None:
    parent, child = family(timeout=60)
    make_overdue(parent)
    assert transitions.decide_overdue(step_of(parent))
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert fresh(child).cancel_requested_at is not None
    transitions.succeed(child, '"late"')
    assert (fresh(child).status, fresh(child).get_result()) == ("succeeded", "late")
    assert step_of(parent).status == StepStatus.TIMED_OUT
    assert not transitions.decide_overdue(step_of(parent))


def test_a_late_child_does_not_wake_a_parent_that_waits_for_another() -> None:
    parent, late = family(timeout=60, on_timeout="abandon")
    make_overdue(parent)
    assert transitions.decide_overdue(step_of(parent))
    invoke(claimed(parent), "another")
    transitions.succeed(late, '"late"')
    assert fresh(parent).status == ExecutionStatus.WAITING


def test_an_abandoned_child_is_not_cancelled() -> None:
    parent, child = family(timeout=60, on_timeout="abandon")
    make_overdue(parent)
    assert transitions.decide_overdue(step_of(parent))
    assert fresh(child).cancel_requested_at is None


def test_a_step_is_not_decided_before_its_deadline() -> None:
    parent, _child = family(timeout=60)
    before = snapshot()
    assert not transitions.decide_overdue(step_of(parent))
    assert snapshot() == before


def test_a_cancelled_parent_flags_its_open_children_alone() -> None:
    parent = running()
    done = claimed(invoke(parent, "done"))
    transitions.succeed(done, "1")
    late = claimed(invoke(claimed(parent), "late", timeout=60, on_timeout="abandon"))
    Step.objects.filter(execution=parent.pk, name="late").update(deadline_at=clock.after(-1))
    assert transitions.decide_overdue(step_of(parent, "late"))
    pending = invoke(claimed(parent), "pending")
    assert transitions.cancel_flagged(flag(parent).pk)
    assert [fresh(child).cancel_reason for child in (done, late, pending)] == ["", *["its parent was cancelled"] * 2]


def test_the_root_cause_is_the_deepest_failure() -> None:
    root = running()
    parent = claimed(invoke(root))
    child = claimed(invoke(parent))
    transitions.fail(child, FAILURE)
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=child.pk)
    transitions.fail(claimed(root), FAILURE, step="child", child_id=parent.pk)
    causes = {failure.pk: failure.root_cause_id for failure in FailedExecution.objects.all()}
    assert causes == {child.pk: None, parent.pk: child.pk, root.pk: child.pk}


# Failures, attempts, leases


def test_a_failure_and_its_failed_execution_are_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    for act in (WRITES["fail"], LOSSES["reclaimed"]):
        parent, child = family(max_attempts=1)
        before = snapshot()

        def refuse(*_args: Any, **_kwargs: Any) -> bool:
            raise RuntimeError("no")

        with monkeypatch.context() as patched:
            patched.setattr(steps, "settle", refuse)
            with pytest.raises(RuntimeError, match="no"):
                act(child)
        assert snapshot() == before
        assert not FailedExecution.objects.filter(pk__in=[parent.pk, child.pk]).exists()


def test_a_failed_execution_tells_why() -> None:
    run = running()
    transitions.fail(run, FAILURE)
    failure = FailedExecution.objects.get(pk=run.pk)
    assert (failure.task, failure.attempts, failure.step) == (TASK, 1, "")
    assert (failure.error_class, failure.message) == (FAILURE.type, FAILURE.message)
    assert fresh(run).error_message == FAILURE.message


def test_a_lost_worker_uses_up_an_attempt_and_the_pause_grows() -> None:
    execution = queued(max_attempts=4)
    for delay in (0, 1, 2):
        Execution.objects.filter(pk=execution.pk).update(due_at=clock.now())
        run = claimed(execution)
        before = clock.read("default")
        assert transitions.lose(run.pk, owner=OWNER)
        row = fresh(execution)
        assert before <= row.due_at - dt.timedelta(seconds=delay) <= clock.read("default")
        assert row.error_message == f"Worker died: {OWNER} stopped while running attempt {row.attempt - 1} of 4."
    Execution.objects.filter(pk=execution.pk).update(due_at=clock.now())
    assert transitions.lose(claimed(execution).pk, owner=OWNER)
    row = fresh(execution)
    assert (row.status, row.attempt) == ("failed", 4)
    assert FailedExecution.objects.get(pk=row.pk).error_class == "conductor_app.exceptions.WorkerLost"


def test_an_execution_without_a_limit_is_lost_as_often_as_it_takes() -> None:
    execution = queued(max_attempts=None)
    Execution.objects.filter(pk=execution.pk).update(attempt=1_000)
    assert transitions.lose(claimed(execution).pk, owner=OWNER)
    row = fresh(execution)
    assert (row.status, row.attempt) == ("queued", 1_001)
    assert (row.due_at - clock.read("default")).total_seconds() <= 60


# An operator's retry


def test_a_retry_runs_the_failed_child_again_and_lets_its_ancestors_wait() -> None:
    parent, child = failed_by_child()
    transitions.reopen(parent.pk)
    assert (fresh(parent).status, fresh(parent).attempt) == ("waiting", 1)
    assert (fresh(child).status, fresh(child).attempt) == ("queued", 1)
    assert step_of(parent).status == StepStatus.PENDING
    assert not FailedExecution.objects.exists()
    transitions.succeed(claimed(child), "1")
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert steps.recall(parent.pk)["child"].get_result() == 1


def test_a_retry_keeps_a_failure_that_the_body_had_caught() -> None:
    parent, child = family()
    transitions.fail(child, FAILURE)
    run = claimed(parent)
    transitions.fail(run, FAILURE)
    transitions.reopen(parent.pk)
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert fresh(child).status == ExecutionStatus.FAILED
    assert step_of(parent).status == StepStatus.FAILED


def test_a_retry_adopts_the_result_of_a_child_that_was_late() -> None:
    parent, child = family(timeout=60, on_timeout="abandon")
    make_overdue(parent)
    transitions.decide_overdue(step_of(parent))
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=child.pk)
    transitions.succeed(child, '"late"')
    transitions.reopen(parent.pk)
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert steps.recall(parent.pk)["child"].get_result() == "late"


def test_a_retry_lets_a_late_child_go_on_with_a_new_deadline() -> None:
    parent, child = family(timeout=60)
    make_overdue(parent)
    transitions.decide_overdue(step_of(parent))
    transitions.fail(claimed(parent), FAILURE, step="child", child_id=child.pk)
    transitions.reopen(parent.pk)
    assert fresh(parent).status == ExecutionStatus.WAITING
    assert fresh(child).cancel_requested_at is None
    step = step_of(parent)
    assert step.status == StepStatus.PENDING
    assert step.deadline_at is not None
    assert 50 < (step.deadline_at - clock.read("default")).total_seconds() <= 60


def test_a_retry_of_a_cancelled_tree_reopens_what_the_cancel_had_ended() -> None:
    parent, child = family()
    transitions.cancel_flagged(flag(parent).pk)
    transitions.cancel_running(child)
    transitions.reopen(parent.pk)
    assert [fresh(row).status for row in (parent, child)] == ["waiting", "queued"]
    assert [fresh(row).cancel_requested_at for row in (parent, child)] == [None, None]


def test_a_retry_of_an_expired_execution_does_not_expire_again() -> None:
    execution = make_overdue(queued())
    assert transitions.expire(execution.pk)
    transitions.reopen(execution.pk)
    assert not transitions.expire(execution.pk)
    assert transitions.claim(execution.pk, OWNER) is not None


def test_a_withdrawn_cancel_queues_the_execution_again() -> None:
    run = flag(running())
    Execution.objects.filter(pk=run.pk).update(cancel_requested_at=None)
    assert transitions.cancel_running(run) is None
    row = fresh(run)
    assert (row.status, row.attempt) == ("queued", 1)


def test_a_child_is_not_retried_alone() -> None:
    parent, child = failed_by_child()
    with pytest.raises(RetryRefused, match=f"Retry the root {parent.pk} instead"):
        transitions.reopen(child.pk)


# When the sweeper publishes, and when a message follows the commit


def instants(execution: Execution) -> tuple[float, float]:
    """Seconds from now until an execution is due, and until the sweeper publishes it."""
    row, moment = fresh(execution), clock.read("default")
    assert row.dispatch_at is not None
    return (row.due_at - moment).total_seconds(), (row.dispatch_at - moment).total_seconds()


def woken() -> Execution:
    execution = make_overdue(napping())
    decide_nap(execution)
    return execution


def released() -> Execution:
    run = running()
    transitions.release(run)
    return run


def retried_at_once() -> Execution:
    run = running()
    transitions.retry_later(run, FAILURE, 0)
    return run


def lost() -> Execution:
    run = running()
    transitions.lose(run.pk, owner=OWNER)
    return run


def reopened() -> Execution:
    execution = failed()
    transitions.reopen(execution.pk)
    return execution


@pytest.mark.parametrize(
    "make",
    [queued, lambda: invoke(running()), woken, released, retried_at_once, lost, reopened],
    ids=["created", "invoked", "woken", "released", "retried at once", "lost", "reopened"],
)
def test_what_is_due_is_published_after_the_commit_and_again_by_the_sweeper(
    make: Callable[[], Execution],
    embedded: bool,
    published: list[Any],
    django_capture_on_commit_callbacks: Any,
    settings: Any,
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "REDISPATCH_SECONDS": 1_000}
    with django_capture_on_commit_callbacks(execute=True):
        execution = make()
    due, next_dispatch = instants(execution)
    assert -30 < due <= 0
    assert fresh(execution).dispatches == 0
    if embedded:
        # The worker's feed takes it at once, and nobody else publishes.
        assert next_dispatch <= 0
        assert published == []
    else:
        assert 900 < next_dispatch <= 1_000
        assert published[-1] == execution.pk


@pytest.mark.parametrize("how", ["countdown", "eta", "retried later"])
def test_what_is_due_later_is_left_to_the_sweeper(
    how: str, embedded: bool, published: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    run = running()
    with django_capture_on_commit_callbacks(execute=True):
        if how == "countdown":
            execution = queued(countdown=500)
        elif how == "eta":
            execution = queued(eta=clock.read("default") + dt.timedelta(seconds=500))
        else:
            execution = run
            transitions.retry_later(run, FAILURE, 500)
    due, next_dispatch = instants(execution)
    assert 400 < due <= 500
    assert next_dispatch == due
    assert published == []
    assert transitions.claim(execution.pk, OWNER) is None


# What the database itself refuses

INVALID: dict[str, tuple[Callable[[], Execution], dict[str, Any]]] = {
    "an unknown status": (queued, {"status": "ready"}),
    "running without a lease": (running, {"lease_expires_at": None}),
    "a lease of one that does not run": (queued, {"lease_expires_at": clock.now()}),
    "final and not finished": (succeeded, {"finished_at": None}),
    "open and finished": (queued, {"finished_at": clock.now()}),
    "queued and never published": (queued, {"dispatch_at": None}),
    "waiting and to be published": (napping, {"dispatch_at": clock.now()}),
    "a root below something": (queued, {"depth": 1}),
    "a negative fence": (queued, {"fence": -1}),
    "attempt 0": (queued, {"attempt": 0}),
}


@pytest.mark.parametrize("what", INVALID)
def test_the_database_refuses(what: str) -> None:
    make, values = INVALID[what]
    execution = make()
    with pytest.raises((IntegrityError, OperationalError)), transaction.atomic():
        Execution.objects.filter(pk=execution.pk).update(**values)


def test_the_database_refuses_a_second_step_of_one_name_and_half_decided_ones() -> None:
    run = running()
    transitions.record_step(run, "charge", result="1")
    transitions.record_step(run, "Charge", result="2")  # names are compared byte for byte
    for values in ({"status": "pending"}, {"finished_at": None}, {"status": "lost"}):
        with pytest.raises((IntegrityError, OperationalError)), transaction.atomic():
            Step.objects.filter(execution=run.pk, name="charge").update(**values)


def test_the_database_refuses_a_second_execution_of_one_idempotency_key() -> None:
    queued(idempotency_key="order-7")
    queued(idempotency_key="Order-7")
    queued(task="another.task", idempotency_key="order-7")
    second = unsaved(idempotency_key="order-7")
    with pytest.raises(IntegrityError), transaction.atomic():
        second.save(force_insert=True)


# How it is written


def stored_for(parent: Execution) -> list[dict[str, Any]]:
    """The rows of a parent, its steps and its children, without what differs between two parents."""
    rows: list[Any] = [fresh(parent), *Step.objects.filter(execution=parent)]
    rows += Execution.objects.filter(parent=parent).order_by("position")
    names = {row.pk: f"row {number}" for number, row in enumerate(rows)}
    stored = []
    for row in rows:
        values = {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}
        for name, value in values.items():
            if name == "dispatch_at" and value == created_at(parent.pk):
                values[name] = "when the tree began"
            elif isinstance(value, dt.datetime):
                # The parent was there before, and statements follow each other, by as long as the machine takes.
                seconds = (value - row.created_at).total_seconds()
                values[name] = round(seconds, -1) if row == parent else int(seconds)
        # By the column: a step's number may be that of its seconds.
        stored.append({name: names.get(value) if name.endswith("id") else value for name, value in values.items()})
    return stored


@pytest.mark.skipif(connection.vendor != "postgresql", reason="has one form of each move")
@pytest.mark.parametrize(
    "wait",
    [
        invocation,
        lambda run: invocation(run, timeout=60, on_timeout="abandon", priority=3, payload='[[1],{"a":"b"}]'),
        lambda run: map_of(run, 3),
        lambda run: map_of(run, 3, max_parallel=2, timeout=60, fails_fast=False, on_timeout="abandon"),
        lambda run: map_of(run, 2, max_parallel=5),
    ],
    ids=["invoke", "invoke with everything", "map", "map with everything", "map with room"],
)
def test_one_statement_stores_what_several_do(wait: Any, embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    to_publish: list[Any] = []
    monkeypatch.setattr(dispatch, "on_commit", lambda *executions: to_publish.extend(executions))
    forms: list[list[dict[str, Any]]] = []
    published: list[list[int | None]] = []
    for form in (nullcontext(), moves.as_scripts()):
        parent = running()
        to_publish.clear()
        with form:
            assert transitions.suspend(parent, wait(parent))
        forms.append(stored_for(parent))
        published.append([row.position for row in to_publish])
    for at_once, in_several in zip(*forms, strict=True):
        assert at_once == in_several
    assert published[0] == published[1]


def full_of_steps() -> Execution:
    """A queued execution that remembers a step of each kind, and one that its claim has to leave pending."""
    run = running()
    transitions.record_step(run, "zeta", result='"Grüße, \\"Zoë\\" \\u2028"')
    transitions.record_step(run, "alpha", failure=FAILURE)
    for name in ("started", "pending"):
        transitions.start_child(run, invocation(run, name, timeout=2.5))
    transitions.succeed(claimed(run.children.get(step="started")), "[1]")

    def suspended_on(wait: Any) -> Execution:
        assert transitions.suspend(run, wait)
        return claimed(run.children.get(step=wait.step)) if isinstance(wait, Invocation) else run

    transitions.fail(suspended_on(invocation(run, "failed", timeout=60)), FAILURE)
    run = claimed(run)
    transitions.cancel_running(flag(suspended_on(invocation(run, "cancelled"))))
    run = claimed(run)
    suspended_on(invocation(run, "late", timeout=0.001))
    transitions.decide_overdue(step_of(run, "late"))
    run = claimed(run)
    suspended_on(map_of(run, 2))
    for child in run.children.filter(step="child"):
        transitions.succeed(claimed(child), "2")
    return fresh(run)


def test_a_claim_brings_what_the_execution_remembers() -> None:
    napping()  # this one's step is nobody else's
    run = claimed(full_of_steps())
    remembered = steps.recall(run.pk)
    assert list(remembered) == ["zeta", "alpha", "started", "pending", "failed", "cancelled", "late", "child"]
    if connection.vendor != "postgresql":
        assert run.claimed_steps is None, "the executor would not look"
        return
    assert run.claimed_steps is not None
    brought = steps.memory_of(run.claimed_steps)
    assert list(brought.items()) == list(remembered.items())


@pytest.mark.skipif(connection.vendor != "postgresql", reason="its claim brings none")
@pytest.mark.parametrize(
    ("count", "length", "is_brought"), [(2, 16_382, True), (2, 16_383, False), (1_000, 1, True), (1_001, 1, False)]
)
def test_a_claim_brings_no_more_than_fits(count: int, length: int, is_brought: bool) -> None:
    run = running()
    finished: dict[str, Any] = {"kind": "step", "status": "succeeded", "created_at": clock.now()}
    finished |= {"result": f'"{"x" * length}"', "finished_at": clock.now()}
    Step.objects.bulk_create([Step(execution=run, name=f"step-{number}", **finished) for number in range(count)])
    transitions.release(run)
    run = claimed(run)
    assert (run.claimed_steps is not None) == is_brought
    if run.claimed_steps is not None:
        assert steps.memory_of(run.claimed_steps) == steps.recall(run.pk)


@pytest.mark.skipif(connection.vendor != "postgresql", reason="its claim brings none")
def test_a_claim_does_not_look_for_steps_where_there_can_be_none() -> None:
    first = running()
    assert first.claimed_steps is None
    transitions.lose(first.pk, owner=OWNER)
    assert claimed(first).claimed_steps == []


# What it costs


def statements(act: Callable[[], object]) -> int:
    with CaptureQueriesContext(connection) as captured:
        act()
    ours = [query["sql"] for query in captured if not query["sql"].startswith(("SAVEPOINT", "RELEASE", "BEGIN"))]
    return len(ours)


@pytest.mark.skipif(connection.vendor == "mysql", reason="has no UPDATE … RETURNING, and needs three statements for it")
def test_each_transition_costs_no_more_statements_than_it_needs() -> None:
    at_once = connection.vendor == "postgresql"
    parent = running()
    created = invocation(parent)
    child = queued()
    assert statements(lambda: claimed(child)) == 1
    assert statements(lambda: transitions.suspend(parent, created)) == (1 if at_once else 4)
    child = claimed(Execution(pk=created.child.id))
    assert statements(lambda: transitions.record_step(child, "charge", result="1")) == (1 if at_once else 2)
    # The child and its run, and its parent's step and the parent, each looked at before it is written.
    assert statements(lambda: transitions.succeed(child, "1")) == (1 if at_once else 6)
    parent = claimed(parent)
    assert statements(lambda: steps.recall(parent.pk)) == 1
    assert statements(lambda: transitions.succeed(parent, "1")) == (1 if at_once else 2)
    assert statements(lambda: transitions.suspend(running(), Sleep("nap", seconds=1))) == 3 + statements(running)
    assert statements(lambda: transitions.take_for_dispatch(100)) <= 2


@pytest.mark.parametrize("put_back", [lambda run: transitions.lose(run.pk, owner=OWNER), transitions.release])
def test_what_had_begun_goes_before_younger_trees_when_it_is_queued_again(put_back: Any) -> None:
    """In the order in which the feed of ``memory://`` serves them."""
    process.worker.is_embedded = True
    run = running()
    put_back(run)
    assert fresh(run).dispatch_at == created_at(run.pk)


# Started children and cancellation


def test_what_is_to_be_cancelled_starts_no_child() -> None:
    run = flag(running())
    with pytest.raises(CancelExecution):
        transitions.start_child(run, invocation(run))
    assert not Execution.objects.filter(parent=run).exists()
    assert not Step.objects.filter(execution=run.pk).exists()


def test_a_run_that_is_cancelled_takes_its_started_children_with_it() -> None:
    run = running()
    started = transitions.start_child(run, invocation(run))
    transitions.cancel_running(flag(run))
    child = Execution.objects.get(pk=started.child_id)
    assert child.cancel_requested_at is not None
    assert child.cancel_reason == "its parent was cancelled"


def test_a_place_in_a_map_goes_to_a_sibling_that_is_not_to_be_cancelled() -> None:
    _, children = mapping(3, max_parallel=1, fails_fast=False)
    flag(children[1])
    transitions.succeed(claimed(children[0]), "1")
    assert fresh(children[1]).due_at is None
    assert fresh(children[2]).due_at is not None


def test_what_has_been_queued_anew_is_not_put_back() -> None:
    execution = queued()
    Execution.objects.update(dispatch_at=clock.after(-1))
    taken = transitions.take_for_dispatch(1)
    assert taken == [execution]
    transitions.release(claimed(execution))
    before = fresh(execution)
    transitions.put_back(taken, 60)
    assert (fresh(execution).dispatch_at, fresh(execution).dispatches) == (before.dispatch_at, 0)
