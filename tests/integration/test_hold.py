"""Hold and pause: nothing begins, nothing is lost, and all goes on after the release."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from conductor_app import ExecutionContext, api, durable_task, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import (
    ActionRefused,
    InvalidArgument,
    InvalidArgumentType,
    ReleaseExecution,
    RetryRefused,
    UnknownTask,
)
from conductor_app.models import Attempt, Execution, OperationItem, PausedTask, Step
from conductor_app.states import ExecutionStatus, OperationKind, RunOutcome, StepStatus
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.testing import advance, drain
from conductor_app.transitions import HandOff, Sleep
from conductor_app.transitions.leases import Lease, renew
from tests.app import scenarios  # noqa: F401 - its tasks are paused
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
    step_of,
)
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db

WHY = "bank incident"


@pytest.fixture(autouse=True)
def broker(settings: Any) -> NotingBroker:
    process.worker.is_embedded = False
    process.broker = noting = NotingBroker()
    return noting


def hold(execution: Execution, **more: Any) -> bool:
    return api.hold(execution, WHY, actor="ana", **more)


def is_parked(execution: Execution) -> bool:
    at = fresh(execution).dispatch_at
    return at is not None and at.year == 9000


def taken() -> list[Any]:
    """What a sweep would publish, as long as nothing is due later."""
    Execution.objects.filter(dispatch_at__lt=clock.Never()).update(dispatch_at=clock.after(-1))
    return [execution.pk for execution in transitions.take_for_dispatch(100)]


# ------------------------------------------------------------------------------------------------------- what is held


def test_a_queued_one_is_not_claimed_nor_published_and_goes_on_after_the_release(
    broker: NotingBroker, django_capture_on_commit_callbacks: Any
) -> None:
    execution = queued()
    assert hold(execution)
    row = fresh(execution)
    assert (row.status, row.is_held, row.held_by, row.hold_reason) == ("queued", True, "ana", WHY)
    assert is_parked(execution)
    assert transitions.claim(execution.pk, OWNER) is None
    assert transitions.claim(execution.pk, OWNER, attempt=1) is None
    assert taken() == []
    with django_capture_on_commit_callbacks(execute=True):
        assert api.release(execution)
    assert broker.ids == [execution.pk]
    assert not fresh(execution).is_held
    assert claimed(execution).attempt == 1


def test_a_second_hold_changes_nothing_and_a_second_release_neither() -> None:
    execution = queued()
    assert hold(execution)
    since = fresh(execution).held_at
    assert not api.hold(execution, "another")
    assert (fresh(execution).held_at, fresh(execution).hold_reason) == (since, WHY)
    assert api.release(execution)
    assert not api.release(execution)


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_hold_needs_a_reason(reason: str) -> None:
    with pytest.raises(InvalidArgument, match=r"reason is empty"):
        api.hold(queued(), reason)
    with pytest.raises(InvalidArgument, match=r"reason is empty"):
        api.pause(TASK, reason)


def test_a_final_one_is_refused() -> None:
    run = running()
    transitions.succeed(run, "1")
    with pytest.raises(ActionRefused, match=r"is succeeded. Only one that has not ended is held"):
        hold(run)


def test_a_later_one_is_due_at_its_time_if_it_is_released_before() -> None:
    execution = queued(countdown=100)
    due = fresh(execution).due_at
    hold(execution)
    api.release(execution)
    assert (fresh(execution).due_at, fresh(execution).dispatch_at) == (due, due)


def test_the_time_of_a_hold_is_no_time_in_the_queue() -> None:
    execution = queued()
    Execution.objects.update(due_at=clock.after(-3_600))
    hold(execution)
    before = clock.read("default")
    api.release(execution)
    due = fresh(execution).due_at
    assert due is not None
    assert due >= before - dt.timedelta(seconds=1)


def test_who_held_and_released_it_is_kept() -> None:
    execution = queued()
    hold(execution)
    api.release(execution, actor="ben", reason="bank is back")
    items = OperationItem.objects.order_by("pk").select_related("operation")
    told = [(item.operation.kind, item.operation.actor, item.operation.reason) for item in items]
    assert told == [(OperationKind.HOLD, "ana", WHY), (OperationKind.RELEASE, "ben", "bank is back")]


# -------------------------------------------------------------------------------------------------------------- trees


def test_a_tree_is_held_and_released_as_one() -> None:
    parent, child = family()
    transitions.release(child)
    hold(parent)
    assert fresh(child).is_held
    assert transitions.claim(child.pk, OWNER) is None
    api.release(parent)
    assert not fresh(child).is_held
    assert transitions.claim(child.pk, OWNER) is not None


def test_without_the_tree_a_child_goes_on() -> None:
    parent, child = family()
    hold(parent, tree=False)
    assert fresh(parent).is_held
    assert not fresh(child).is_held


def test_a_child_that_was_held_alone_stays_held_when_its_tree_is_released() -> None:
    parent, child = family()
    api.hold(child, "this one first")
    hold(parent)
    assert fresh(child).hold_reason == "this one first"
    api.release(parent)
    assert fresh(child).is_held


def test_one_below_is_held_without_its_siblings() -> None:
    parent, children = mapping(3)
    api.hold(children[1], WHY)
    assert [fresh(child).is_held for child in children] == [False, True, False]
    assert not fresh(parent).is_held


def test_a_hold_of_a_tree_below_a_child_goes_all_the_way_down() -> None:
    root, middle = family()
    leaf = invoke(middle, "leaf")
    hold(middle)
    assert [fresh(one).is_held for one in (root, middle, leaf)] == [False, True, True]
    api.release(middle)
    assert not fresh(leaf).is_held


# ----------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("ends", ["succeeds", "fails"])
def test_a_waiting_one_is_told_of_its_child_and_goes_on_after_the_release(
    ends: str, broker: NotingBroker, django_capture_on_commit_callbacks: Any
) -> None:
    parent, child = family()
    hold(parent, tree=False)
    with django_capture_on_commit_callbacks(execute=True):
        if ends == "succeeds":
            transitions.succeed(child, "1")
        else:
            transitions.fail(child, FAILURE)
    assert step_of(parent).status == {"succeeds": StepStatus.SUCCEEDED, "fails": StepStatus.FAILED}[ends]
    assert fresh(parent).status == ExecutionStatus.QUEUED
    assert broker.ids == []
    assert transitions.claim(parent.pk, OWNER) is None
    assert taken() == []
    assert is_parked(parent)
    with django_capture_on_commit_callbacks(execute=True):
        api.release(parent)
    assert broker.ids == [parent.pk]
    assert claimed(parent).attempt == 1


def test_nobody_goes_on_with_a_held_parent(broker: NotingBroker) -> None:
    parent, child = family()
    hold(parent, tree=False)
    offer = HandOff(OWNER, lambda _: True, {parent.pk: parent}.get)
    transitions.succeed(child, "1", offer)
    assert offer.claimed is None
    assert fresh(parent).status == ExecutionStatus.QUEUED


def test_a_timeout_is_decided_while_its_parent_is_held() -> None:
    parent, child = family(timeout=10)
    hold(parent)
    Step.objects.update(deadline_at=clock.after(-1))
    assert transitions.decide_overdue(step_of(parent))
    assert step_of(parent).status == StepStatus.TIMED_OUT
    assert (fresh(parent).status, fresh(parent).is_held) == (ExecutionStatus.QUEUED, True)
    assert fresh(child).cancel_requested_at is not None


def test_an_event_is_taken_while_it_is_held() -> None:
    asleep = running()
    transitions.suspend(asleep, transitions.AwaitEvent("approval", "approved", timeout=None))
    hold(asleep)
    assert api.send_event(asleep, "approved", 7)
    assert Step.objects.get().status == StepStatus.SUCCEEDED
    assert transitions.claim(asleep.pk, OWNER) is None
    api.release(asleep)
    assert transitions.claim(asleep.pk, OWNER) is not None


def test_expires_goes_on_while_it_is_held() -> None:
    execution = queued(expires=10)
    hold(execution)
    Execution.objects.update(deadline_at=clock.after(-1))
    sweeper.sweep(publish=False)
    assert fresh(execution).status == ExecutionStatus.CANCELLED
    assert not fresh(execution).is_held


@pytest.mark.parametrize("make", [queued, napping], ids=["queued", "waiting"])
def test_a_held_one_is_cancelled_and_its_retry_is_not_held(make: Any) -> None:
    execution = make()
    hold(execution)
    assert api.cancel(execution)
    assert fresh(execution).status == ExecutionStatus.CANCELLED
    api.retry(execution)
    assert not fresh(execution).is_held
    assert fresh(execution).status in (ExecutionStatus.QUEUED, ExecutionStatus.WAITING)
    assert fresh(execution).held_at is None


# ------------------------------------------------------------------------------------------------------------ running


@pytest.mark.parametrize("how", ["invoke", "map", "start"])
def test_a_held_run_starts_no_children(how: str) -> None:
    run = running()
    hold(run)
    with pytest.raises(ReleaseExecution):
        if how == "start":
            transitions.start_child(run, invocation(run))
        else:
            transitions.suspend(run, invocation(run) if how == "invoke" else map_of(run, 2))
    assert Execution.objects.count() == 1
    assert fresh(run).status == ExecutionStatus.RUNNING


def test_a_run_that_is_to_be_cancelled_and_held_is_cancelled() -> None:
    run = running()
    hold(run)
    transitions.request_cancel(run.pk, "enough")
    with pytest.raises(transitions.running.CancelExecution):
        transitions.suspend(run, invocation(run))


def test_what_a_held_run_has_done_is_recorded() -> None:
    run = running()
    hold(run)
    with pytest.raises(ReleaseExecution):
        transitions.record_step(run, "charge", result="1")
    assert step_of(run, "charge").status == StepStatus.SUCCEEDED


def test_a_held_run_may_wait_for_what_starts_nothing() -> None:
    run = running()
    hold(run)
    assert transitions.suspend(run, Sleep("nap", seconds=60))
    assert fresh(run).status == ExecutionStatus.WAITING


@durable_task(name="tests.hold.charges")
def charges(ctx: ExecutionContext) -> str:
    ctx.step("look", lambda: api.hold(ctx.execution_id, WHY))
    ctx.step("pay", paid.append, 1)
    return "paid"


paid: list[int] = []


def test_a_running_body_ends_at_its_next_call_without_using_an_attempt() -> None:
    paid.clear()
    result = charges.delay()
    drain()
    row = Execution.objects.get(pk=result.id)
    assert (row.status, row.attempt, paid) == ("queued", 1, [])
    assert Attempt.objects.get().outcome == RunOutcome.RELEASED
    assert list(Step.objects.values_list("name", flat=True)) == ["look"]
    assert drain() == 0
    api.release(result)
    drain()
    assert (api.get_result(result, timeout=0), paid) == ("paid", [1])


def test_the_heartbeat_tells_a_run_that_it_is_held_and_released() -> None:
    run = running()
    lease = Lease(run)
    hold(run)
    renew([lease])
    assert (lease.on_hold, lease.cancel_requested, lease.lost) == (True, False, False)
    api.release(run)
    renew([lease])
    assert not lease.on_hold


told: list[int] = []


@durable_task(name="tests.hold.hears")
def hears(ctx: ExecutionContext) -> int:
    told.append(ctx.attempt)
    ctx._lease.on_hold = len(told) == 1  # as the heartbeat says
    ctx.checkpoint()
    return len(told)


def test_a_run_that_has_heard_of_a_hold_ends_at_a_checkpoint_and_again_begins_if_that_is_over() -> None:
    told.clear()
    result = hears.delay()
    assert drain() == 2
    assert (api.get_result(result, timeout=0), told) == (2, [1, 1])


def test_in_a_retry_pause_the_next_attempt_begins_after_the_release() -> None:
    run = running()
    transitions.retry_later(run, FAILURE, 60)
    hold(run)
    Execution.objects.update(due_at=clock.after(-1))
    assert transitions.claim(run.pk, OWNER) is None
    with pytest.raises(ActionRefused, match=rf"held since .* by ana: {WHY}"):
        api.wake(run)
    api.release(run)
    assert claimed(run).attempt == 2


# ------------------------------------------------------------------------------------------------- what is refused


def test_wake_publish_and_retry_of_a_held_one_are_refused_with_the_reason() -> None:
    asleep, later, due = napping(), queued(countdown=60), queued()
    for execution in (asleep, later, due):
        hold(execution)
    for act, execution in ((api.wake, asleep), (api.wake, later), (api.publish_again, due)):
        with pytest.raises(ActionRefused, match=rf"is held since .*, by ana: {WHY}. Release it first"):
            act(execution)  # type: ignore[operator]
    with pytest.raises(RetryRefused, match=rf"is held since .*, by ana: {WHY}. Release it"):
        api.retry(due)
    assert step_of(asleep, "nap").status == StepStatus.PENDING


# --------------------------------------------------------------------------------------------------- maps, hand-off


def test_a_held_child_of_a_map_keeps_its_place() -> None:
    _parent, children = mapping(3, max_parallel=1)
    api.hold(children[0], WHY)
    assert transitions.claim(children[0].pk, OWNER) is None
    assert fresh(children[1]).due_at is None
    api.release(children[0])
    transitions.succeed(claimed(children[0]), "1")
    assert fresh(children[1]).due_at is not None


def test_a_child_that_its_map_lets_go_while_it_is_held_starts_after_the_release() -> None:
    _parent, children = mapping(2, max_parallel=1)
    first = claimed(children[0])
    api.hold(children[1], WHY)
    assert fresh(children[1]).dispatch_at is None
    transitions.succeed(first, "1")
    assert transitions.claim(children[1].pk, OWNER) is None
    assert taken() == []
    api.release(children[1])
    assert transitions.claim(children[1].pk, OWNER) is not None


# -------------------------------------------------------------------------------------------------------------- pause


def test_no_run_of_a_paused_task_begins_until_it_is_unpaused() -> None:
    first, second = queued(), queued(countdown=60)
    assert api.pause(TASK, WHY, actor="ana")
    assert not api.pause(TASK, "another")
    third = queued()
    Execution.objects.update(due_at=clock.after(-1))
    for execution in (first, second, third):
        assert transitions.claim(execution.pk, OWNER) is None
    row = PausedTask.objects.get()
    assert (row.name, row.paused_by, row.reason) == (TASK, "ana", WHY)
    assert api.unpause(TASK)
    assert not api.unpause(TASK)
    for execution in (first, second, third):
        assert transitions.claim(execution.pk, OWNER) is not None


def test_what_runs_of_a_paused_task_goes_on_to_its_end_and_what_waits_does_not() -> None:
    run, (parent, child) = running(), family()
    api.pause(TASK, WHY)
    transitions.succeed(run, "1")
    offer = HandOff(OWNER, lambda _: True, {parent.pk: parent}.get)
    transitions.succeed(child, "1", offer)
    assert offer.claimed is None
    assert (fresh(run).status, fresh(parent).status) == (ExecutionStatus.SUCCEEDED, ExecutionStatus.QUEUED)
    assert transitions.claim(parent.pk, OWNER) is None


def test_a_child_of_a_paused_task_is_stored_and_not_gone_on_with() -> None:
    run = queued(task="tests.app.scenarios.pass_through")
    run = claimed(run)
    api.pause(TASK, WHY)
    offer = HandOff(OWNER, lambda _: True)
    assert transitions.suspend(run, invocation(run), None, offer)
    child = Execution.objects.get(parent=run)
    assert (child.status, offer.claimed) == (ExecutionStatus.QUEUED, None)
    assert fresh(run).status == ExecutionStatus.WAITING
    api.unpause(TASK)
    assert transitions.claim(child.pk, OWNER) is not None


def test_what_is_due_of_a_paused_task_is_parked_and_given_back_in_its_order() -> None:
    executions = [queued() for _ in range(3)]
    other = queued(task="tests.app.scenarios.boom")
    api.pause(TASK, WHY)
    assert taken() == [other.pk]
    assert [is_parked(execution) for execution in executions] == [True] * 3
    assert taken() == [other.pk]
    api.unpause(TASK)
    rows = Execution.objects.filter(task=TASK).order_by("dispatch_at")
    assert [row.pk for row in rows] == [execution.pk for execution in executions]
    assert {row.dispatches for row in rows} == {0}
    published = [one.pk for one in transitions.take_for_dispatch(10)]
    assert [key for key in published if key != other.pk] == [execution.pk for execution in executions]


def test_a_message_that_was_refused_while_the_task_was_paused_is_published_at_once() -> None:
    execution = queued()
    api.pause(TASK, WHY)
    assert transitions.claim(execution.pk, OWNER) is None
    assert transitions.take_for_dispatch(10) == [], "not before REDISPATCH_SECONDS"
    api.unpause(TASK)
    assert [one.pk for one in transitions.take_for_dispatch(10)] == [execution.pk]


def test_what_is_parked_for_a_task_that_is_not_paused_any_more_is_published() -> None:
    execution = queued()
    api.pause(TASK, WHY)
    PausedTask.objects.all().delete()  # by a sweeper that does not know of it yet
    transitions.pausing.park(TASK, [execution.pk])
    assert taken() == [execution.pk]


def test_the_audit_gives_back_what_a_dead_process_has_left_parked() -> None:
    execution = queued()
    Execution.objects.update(dispatch_at=clock.Never())
    held = queued()
    hold(held)
    assert sweeper.sweep(publish=False)["unparked"] == 0
    assert sweeper.sweep(publish=False, audit=True)["unparked"] == 1
    assert not is_parked(execution)
    assert is_parked(held)


def test_a_held_one_of_a_paused_task_needs_both_ends() -> None:
    execution = queued()
    hold(execution)
    api.pause(TASK, WHY)
    api.unpause(TASK)
    assert transitions.claim(execution.pk, OWNER) is None
    api.pause(TASK, WHY)
    api.release(execution)
    assert transitions.claim(execution.pk, OWNER) is None
    assert taken() == []
    api.unpause(TASK)
    assert transitions.claim(execution.pk, OWNER) is not None


def test_publish_again_of_a_paused_task_is_refused_with_the_reason() -> None:
    execution = queued()
    api.pause(TASK, WHY, actor="ana")
    with pytest.raises(ActionRefused, match=rf"paused since .*, by ana: {WHY}. Unpause it first"):
        api.publish_again(execution)


def test_a_task_is_named_by_itself_or_by_its_name() -> None:
    assert api.pause(charges, WHY)
    assert PausedTask.objects.get().name == "tests.hold.charges"
    assert api.unpause("tests.hold.charges")


def test_a_task_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnknownTask, match=r"There is no task 'shop.tasks.chareg' to pause"):
        api.pause("shop.tasks.chareg", WHY)
    with pytest.raises(InvalidArgumentType, match=r"task must be a task or its name, got int"):
        api.pause(7, WHY)  # type: ignore[arg-type]
    elsewhere = queued(task="another.language")
    assert api.pause(elsewhere.task, WHY)


# ------------------------------------------------------------------------------------------------------- the test kit


def test_drain_and_advance_leave_what_is_held_or_paused_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    held, _later = charges.delay(), queued(countdown=5)
    api.hold(held, WHY)
    api.pause(TASK, WHY)
    assert drain() == 0
    assert "Not run: 1 executions are held, and 1 are of paused tasks." in caplog.text
    assert advance(10) == 0
    api.unpause(TASK)
    assert drain() == 1


def test_eager_mode_does_not_wait_for_a_release() -> None:
    paid.clear()
    with pytest.raises(RuntimeError, match=r"is held, and eager mode does not wait for that to end"):
        charges.apply()
    api.pause(charges, WHY)
    with pytest.raises(RuntimeError, match=r"is of tests.hold.charges, which is paused"):
        charges.apply()
