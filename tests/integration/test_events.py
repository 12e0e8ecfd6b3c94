"""``ctx.wait_for`` and ``api.send_event``."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from django.db import transaction

from conductor_app import EventTimedOut, ExecutionContext, api, transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import (
    ExecutionFinished,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    InvokeInsideTransaction,
    NotSerializable,
    PayloadTooLarge,
    StepMismatch,
    StepNameReused,
)
from conductor_app.models import Event, Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock, transactions
from conductor_app.transitions import AwaitEvent, Pending
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support import executions
from tests.support.bodies import advance, class_name, durable, failure, go_on, redeploy, reload, run, start
from tests.support.executions import step_of
from tests.support.invariants import violations

pytestmark = pytest.mark.django_db

NOBODY = uuid.UUID("01a204e4-550f-76ed-ae8b-b0cbcb0a4470")
LATE = "Event 'approved' did not come within 30s (step 'approval')"


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@durable
def approve(ctx: ExecutionContext, timeout: float | None = None) -> Any:
    note(ctx, "body")
    return ctx.wait_for("approval", "approved", timeout=timeout)


@durable
def patient(ctx: ExecutionContext) -> dict[str, Any]:
    """Wait twice for events of one name, the first time not for long."""
    note(ctx, "body")
    try:
        return {"in time": ctx.wait_for("approval", "approved", timeout=30)}
    except EventTimedOut as error:
        return {"caught": str(error), "second": ctx.wait_for("second", "approved")}


@durable
def three(ctx: ExecutionContext) -> list[Any]:
    """Wait for three events of one name, with another in between."""
    note(ctx, "body")
    return [
        ctx.wait_for("first", "item"),
        ctx.wait_for("second", "item"),
        ctx.wait_for("other", "done"),
        ctx.wait_for("third", "item"),
    ]


# -------------------------------------------------------------------------------------------------------------- waiting


def test_a_waiting_execution_holds_no_worker_and_goes_on_with_the_payload() -> None:
    execution = start(approve)
    assert (execution.status, execution.lease_owner) == ("waiting", "")
    step = step_of(execution, "approval")
    assert (step.kind, step.status, step.task) == (StepKind.EVENT, StepStatus.PENDING, "approved")
    assert (step.deadline_at, step.timeout_seconds) == (None, None)
    assert api.send_event(execution, "approved", {"by": "ana"}) is True
    assert reload(execution).status == "queued"
    assert go_on() == 1
    execution = reload(execution)
    assert (execution.status, execution.get_result()) == ("succeeded", {"by": "ana"})
    assert (execution.attempt, count("body", execution.pk)) == (1, 2)
    event = Event.objects.get()
    assert (event.step_id, event.get_payload()) == (step.pk, {"by": "ana"})
    assert event.taken_at is not None
    assert not violations()


def test_an_event_that_was_sent_before_anyone_waits_is_kept_and_taken_at_once() -> None:
    execution = approve.delay()
    assert api.send_event(execution.id, "approved", {"by": "ana"}) is True
    assert reload(execution).status == "queued"
    assert Event.objects.get().taken_at is None
    # In one run: the body finds the event while it suspends, and is replayed in its process.
    assert go_on() == 1
    assert reload(execution).get_result() == {"by": "ana"}
    assert (count("body", execution.id), reload(execution).fence) == (2, 1)
    step = step_of(reload(execution), "approval")
    assert (step.status, step.get_result()) == (StepStatus.SUCCEEDED, {"by": "ana"})
    assert Event.objects.get().step_id == step.pk
    assert not violations()


def test_an_event_that_is_sent_while_the_body_runs_is_taken() -> None:
    @durable
    def sends_itself(ctx: ExecutionContext) -> Any:
        ctx.step("send", api.send_event, ctx.execution_id, "approved", 1)
        return ctx.wait_for("approval", "approved")

    assert run(sends_itself).get_result() == 1


def test_events_of_one_name_are_taken_in_the_order_of_sending_each_once() -> None:
    execution = start(three)
    for number in range(1, 5):
        assert api.send_event(execution, "item", number)
    go_on()
    assert reload(execution).status == "waiting"
    assert list(Event.objects.filter(taken_at__isnull=True).values_list("payload", flat=True)) == ["3", "4"]
    api.send_event(execution, "done", "x")
    go_on()
    assert reload(execution).get_result() == [1, 2, "x", 3]
    taken = Event.objects.filter(taken_at__isnull=False).order_by("id")
    assert [event.step and event.step.name for event in taken] == ["first", "second", "third", "other"]
    assert Event.objects.get(taken_at__isnull=True).get_payload() == 4


def test_an_event_of_another_name_changes_nothing() -> None:
    execution = start(approve)
    assert api.send_event(execution, "Approved") is True
    assert reload(execution).status == "waiting"
    assert go_on() == 0


@pytest.mark.parametrize(
    "payload", [None, 0, False, "", [], {}, "é", Decimal("1.10"), dt.date(2026, 11, 22), uuid.UUID(int=7), b"\x00"]
)
@pytest.mark.parametrize("is_early", [True, False], ids=["sent before", "sent while waiting"])
def test_a_payload_arrives_as_it_was_sent(payload: Any, is_early: bool) -> None:
    execution = approve.delay() if is_early else start(approve)
    api.send_event(execution.pk if not is_early else execution.id, "approved", payload)
    go_on()
    result = reload(execution).get_result()
    assert result == payload
    assert type(result) is type(payload)


def test_a_replay_sees_the_same_event_and_takes_no_other() -> None:
    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def fails_once(ctx: ExecutionContext) -> list[Any]:
        value = ctx.wait_for("approval", "approved")
        if ctx.attempt == 1:
            raise ConnectionError
        return [value, ctx.attempt]

    execution = start(fails_once)
    api.send_event(execution, "approved", 1)
    api.send_event(execution, "approved", 2)
    go_on()
    assert reload(execution).get_result() == [1, 2]
    assert Event.objects.filter(taken_at__isnull=True).count() == 1


def test_a_run_that_replays_while_the_step_is_pending_waits_again() -> None:
    execution = start(approve, timeout=30)
    deadline = step_of(execution, "approval").deadline_at
    transitions.waking.wake(execution.pk)
    go_on()
    assert reload(execution).status == "waiting"
    assert step_of(execution, "approval").deadline_at == deadline
    assert count("body", execution.pk) == 2


def test_a_child_waits_for_events_too() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("approve", approve, {"timeout": None})

    root = start(parent)
    child = Execution.objects.get(parent=root.pk)
    api.send_event(child, "approved", "yes")
    go_on()
    assert reload(root).get_result() == "yes"


def test_a_run_of_a_whole_tree_says_that_an_event_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"nothing in its tree is due\. Does it wait for an event\?"):
        run(approve)


# -------------------------------------------------------------------------------------------------------------- sending


@pytest.mark.parametrize(
    "named", [lambda e: e, lambda e: e.pk, lambda e: str(e.pk), lambda e: approve.AsyncResult(str(e.pk))]
)
def test_an_execution_is_named_as_everywhere(named: Callable[[Execution], Any]) -> None:
    execution = start(approve)
    assert api.send_event(named(execution), "approved") is True


def test_the_same_id_sent_twice_is_one_event() -> None:
    execution = start(three)
    assert api.send_event(execution, "item", {"a": 1, "b": 2}, id="mail-7") is True
    assert api.send_event(execution, "item", {"b": 2, "a": 1}, id="mail-7") is False
    go_on()
    assert api.send_event(execution, "item", {"a": 1, "b": 2}, id="mail-7") is False
    assert reload(execution).status == "waiting"
    with pytest.raises(IdempotencyConflict) as error:
        api.send_event(execution, "item", {"a": 2}, id="mail-7")
    assert str(error.value) == (
        f"The id 'mail-7' belongs to an event 'item' of execution {execution.pk} with another payload. Use another id."
    )
    # The id belongs to one execution and one name.
    assert api.send_event(execution, "done", 3, id="mail-7") is True
    assert api.send_event(start(three), "item", 4, id="mail-7") is True
    assert Event.objects.filter(execution=execution.pk).count() == 2


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_finished_execution_takes_no_events(end: str) -> None:
    execution = start(approve, timeout=30)
    if end == "succeeded":
        api.send_event(execution, "approved", id="first")
        go_on()
    elif end == "failed":
        advance(31)
    else:
        api.cancel(execution)
    words = {"succeeded": "has succeeded", "failed": "has failed", "cancelled": "was cancelled"}[end]
    before = Event.objects.count()
    steps = list(Step.objects.values())
    with pytest.raises(ExecutionFinished) as error:
        api.send_event(execution, "approved", "late")
    assert str(error.value) == f"Execution {execution.pk} {words} and takes no more events: 'approved' was not stored."
    assert Event.objects.count() == before
    assert list(Step.objects.values()) == steps
    assert reload(execution).status == end
    if end == "succeeded":
        # A webhook that is delivered again is no error.
        assert api.send_event(execution, "approved", id="first") is False


def test_an_unknown_execution_takes_no_events() -> None:
    with pytest.raises(Execution.DoesNotExist, match=f"There is no execution {NOBODY}"):
        api.send_event(NOBODY, "approved")
    with pytest.raises(Execution.DoesNotExist, match="It has been pruned"):
        transitions.send(NOBODY, "approved", "null")


def test_a_transaction_that_is_rolled_back_has_sent_nothing() -> None:
    execution = start(approve)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        api.send_event(execution, "approved", 1)
        assert reload(execution).status == "queued"
        1 / 0  # noqa: B018
    assert (reload(execution).status, Event.objects.count()) == ("waiting", 0)
    assert step_of(execution, "approval").status == StepStatus.PENDING
    with transaction.atomic():
        api.send_event(execution, "approved", 2)
    go_on()
    assert reload(execution).get_result() == 2


def test_a_refusal_leaves_the_callers_transaction_usable() -> None:
    execution = start(approve)
    with transaction.atomic():
        api.send_event(execution, "item", 1, id="a")
        with pytest.raises(IdempotencyConflict):
            api.send_event(execution, "item", 2, id="a")
        with pytest.raises(Execution.DoesNotExist):
            api.send_event(NOBODY, "item")
        assert api.send_event(execution, "item", 3) is True
    assert Event.objects.count() == 2


def test_an_event_sent_in_an_atomic_step_is_sent_once_with_its_other_writes() -> None:
    target = start(approve)

    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def sender(ctx: ExecutionContext) -> Any:
        if ctx.attempt == 1:
            ctx.atomic_step("send", send_and_fail)
        return ctx.atomic_step("again", api.send_event, target.pk, "approved", "second")

    def send_and_fail() -> None:
        api.send_event(target.pk, "approved", "first")
        raise ConnectionError

    assert run(sender).get_result() is True
    go_on()
    assert reload(target).get_result() == "second"
    assert Event.objects.count() == 1


def test_a_repetition_after_a_lost_commit_finds_its_own_event(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = start(three)
    repeated: list[Any] = []

    def twice(using: str, work: Callable[[], Any], **_options: Any) -> Any:
        repeated.append(work())
        return work()

    monkeypatch.setattr(transactions, "persist_briefly", twice)
    assert api.send_event(execution, "item", 1) is True
    assert api.send_event(execution, "item", 2, id="mail-7") is True
    assert repeated == [True, True]
    assert [event.get_payload() for event in Event.objects.all()] == [1, 2]


def test_a_suspension_that_is_repeated_after_a_lost_commit_takes_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = executions.running()
    for number in (1, 2):
        api.send_event(execution, "item", number)
    wait = AwaitEvent("first", "item", None)

    def twice(using: str, work: Callable[[], Any], *, patience: float) -> Any:
        work()
        return work()

    monkeypatch.setattr(transactions, "persist", twice)
    assert transitions.suspend(execution, wait) is False
    assert step_of(execution, "first").get_result() == 1
    assert [event.get_payload() for event in Event.objects.filter(taken_at__isnull=True)] == [2]
    assert executions.fresh(execution).status == ExecutionStatus.RUNNING


def test_a_run_that_has_lost_its_lease_takes_nothing() -> None:
    execution = executions.running()
    api.send_event(execution, "item", 1)
    Execution.objects.filter(pk=execution.pk).update(fence=9)
    with pytest.raises(transitions.guards.LeaseLost):
        transitions.suspend(execution, AwaitEvent("first", "item", None))
    assert Event.objects.filter(taken_at__isnull=True).count() == 1
    assert not Step.objects.exists()


def test_a_run_that_is_to_be_cancelled_takes_nothing() -> None:
    execution = executions.running()
    api.send_event(execution, "item", 1)
    api.cancel(execution)
    with pytest.raises(transitions.guards.CancelExecution):
        transitions.suspend(execution, AwaitEvent("first", "item", None))
    assert Event.objects.filter(taken_at__isnull=True).count() == 1


def test_a_pruned_tree_takes_its_events_with_it() -> None:
    execution = start(approve)
    api.send_event(execution, "approved")
    api.send_event(execution, "other")
    go_on()
    assert pruner.prune(dt.timedelta(seconds=-1)) == 1
    assert not Event.objects.exists()


# ------------------------------------------------------------------------------------------------------------- timeouts


def test_an_event_that_does_not_come_fails_the_execution_at_once() -> None:
    execution = start(approve, timeout=300)
    step = step_of(execution, "approval")
    assert step.timeout_seconds == 300
    assert (step.deadline_at - step.created_at).total_seconds() == pytest.approx(300, abs=1)
    advance(240)
    assert reload(execution).status == "waiting"
    advance(61)
    execution = reload(execution)
    assert (execution.status, execution.attempt, execution.error_message) == ("failed", 1, LATE.replace("30s", "300s"))
    stored = failure(execution)
    assert (stored.error_class, stored.step, stored.root_cause_id) == (class_name(EventTimedOut), "approval", None)
    assert not violations()


def test_a_timeout_can_be_caught_and_a_late_event_is_for_the_next_wait() -> None:
    execution = start(patient)
    advance(31)
    assert reload(execution).status == "waiting"
    assert api.send_event(execution, "approved", "late") is True
    go_on()
    assert reload(execution).get_result() == {"caught": LATE, "second": "late"}
    assert step_of(execution, "approval").status == StepStatus.TIMED_OUT


def test_an_event_that_comes_after_the_decision_waits_in_the_mailbox() -> None:
    execution = start(patient)
    clock.shift(dt.timedelta(seconds=31))
    assert transitions.decide_overdue(step_of(execution, "approval"))
    assert api.send_event(execution, "approved", "late") is True
    assert Event.objects.get().taken_at is None
    go_on()
    assert reload(execution).get_result() == {"caught": LATE, "second": "late"}


def test_an_event_that_is_late_and_comes_before_the_decision_wins() -> None:
    execution = start(patient)
    clock.shift(dt.timedelta(seconds=31))
    assert api.send_event(execution, "approved", "just") is True
    assert not transitions.decide_overdue(step_of(execution, "approval"))
    go_on()
    assert reload(execution).get_result() == {"in time": "just"}


def test_the_error_knows_its_step_and_its_event() -> None:
    seen: list[EventTimedOut] = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        try:
            ctx.wait_for("approval", "approved", timeout=dt.timedelta(seconds=30))
        except TimeoutError as error:
            seen.append(error)  # type: ignore[arg-type]

    run(body)
    assert isinstance(seen[0], EventTimedOut)
    assert (str(seen[0]), seen[0].step, seen[0].event) == (LATE, "approval", "approved")


def test_a_timeout_of_a_child_comes_up_to_the_root() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("approve", approve, {"timeout": 30})

    root = run(parent)
    assert root.error_message == f"Child execution failed: {LATE}"
    assert failure(root).root_cause_id == Execution.objects.get(parent=root.pk).pk


# ----------------------------------------------------------------------------------------------------- operator's retry


def test_an_operators_retry_waits_again_with_a_new_deadline() -> None:
    execution = start(approve, timeout=30)
    advance(31)
    api.retry(execution)
    assert reload(execution).status == "waiting"
    step = step_of(execution, "approval")
    assert (step.status, step.finished_at) == (StepStatus.PENDING, None)
    advance(29)
    assert reload(execution).status == "waiting"
    api.send_event(execution, "approved", "at last")
    go_on()
    assert reload(execution).get_result() == "at last"
    assert not violations()


def test_an_operators_retry_takes_an_event_that_came_meanwhile() -> None:
    execution = start(approve, timeout=30)
    clock.shift(dt.timedelta(seconds=31))
    assert transitions.decide_overdue(step_of(execution, "approval"))
    api.send_event(execution, "approved", "late")
    go_on()
    assert reload(execution).status == "failed"
    api.retry(execution)
    assert reload(execution).status == "queued"
    go_on()
    assert reload(execution).get_result() == "late"
    assert Event.objects.get().step_id == step_of(execution, "approval").pk
    assert not violations()


def test_an_operators_retry_of_a_child_that_waited_in_vain_reaches_the_root() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("approve", approve, {"timeout": 30})

    root = run(parent)
    api.retry(root)
    child = Execution.objects.get(parent=root.pk)
    assert [reload(root).status, child.status] == ["waiting", "waiting"]
    api.send_event(child, "approved", "yes")
    go_on()
    assert reload(root).get_result() == "yes"


@pytest.mark.parametrize("is_overdue", [False, True])
def test_a_cancelled_execution_that_is_retried_waits_again(is_overdue: bool) -> None:
    execution = start(approve, timeout=30)
    api.cancel(execution)
    if is_overdue:
        advance(31)  # the sweeper decides a step of an execution that has ended
    api.retry(execution)
    assert reload(execution).status == "waiting"
    advance(29)
    api.send_event(execution, "approved", "yes")
    go_on()
    assert reload(execution).get_result() == "yes"


# ------------------------------------------------------------------------------------------------------- changed code


def test_another_event_under_a_recorded_step_is_a_mismatch() -> None:
    execution = start(three)
    api.send_event(execution, "item", 1)
    redeploy(three, lambda ctx: ctx.wait_for("first", "done"))
    try:
        go_on()
    finally:
        redeploy(three, three.__wrapped__)
    execution = reload(execution)
    assert execution.status == "failed"
    assert failure(execution).error_class == class_name(StepMismatch)
    assert execution.error_message == (
        'Step "first" recorded event item and the code now waits for done. Give the new call its own step name.'
    )


def test_another_kind_under_a_recorded_step_is_a_mismatch() -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.sleep("approval", 60)

    execution = start(body)
    redeploy(body, lambda ctx: [ctx.wait_for("approval", "approved")])
    transitions.waking.wake(execution.pk)
    go_on()
    assert reload(execution).error_message.startswith('Step "approval" was recorded as sleep and the code now calls')


# ------------------------------------------------------------------------------------------------------------ bad input


BAD_NAMES: list[tuple[Any, type[Exception], str]] = [
    (None, InvalidArgumentType, "event name must be str, got NoneType"),
    (7, InvalidArgumentType, "event name must be str, got int"),
    ("", InvalidArgument, "event name must be 1–128 characters"),
    ("a" * 129, InvalidArgument, "event name must be 1–128 characters: 129 > 128"),
    (
        "a b",
        InvalidArgument,
        "event name 'a b' must match [A-Za-z0-9][A-Za-z0-9_.:-]*: ASCII letters, digits and _ . : -",
    ),
]


@pytest.mark.parametrize(("name", "error", "message"), BAD_NAMES)
def test_an_event_needs_a_name(name: Any, error: type[Exception], message: str) -> None:
    execution = start(approve)
    with pytest.raises(error) as raised:
        api.send_event(execution, name)
    assert str(raised.value) == message

    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.wait_for("approval", name)

    waiting = run(body)
    assert (waiting.error_message, waiting.attempt) == (message, 1)
    assert failure(waiting).error_class == class_name(error)
    assert not Event.objects.exists()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (7, InvalidArgumentType, "id must be str, got int"),
        ("", InvalidArgument, "id must have 1–255 characters, got 0"),
        ("a" * 256, InvalidArgument, "id must have 1–255 characters, got 256"),
        ("a ", InvalidArgument, "id must be printable text without spaces at its ends, got 'a '. Strip it."),
        ("a\x00", InvalidArgument, "id must be printable text without spaces at its ends, got 'a\\x00'. Strip it."),
    ],
)
def test_an_id_is_short_printable_text(key: Any, error: type[Exception], message: str) -> None:
    execution = start(approve)
    with pytest.raises(error) as raised:
        api.send_event(execution, "approved", id=key)
    assert str(raised.value) == message
    assert not Event.objects.exists()


@pytest.mark.parametrize(
    ("payload", "error", "message"),
    [
        ({"items": [1, {2}]}, NotSerializable, 'payload["items"][1] is a set. Pass a sorted list.'),
        (float("nan"), NotSerializable, "NaN at payload is not JSON. Pass None or a string."),
        ("\x00", NotSerializable, "payload contains a NUL character"),
        ("x" * 1_048_576, PayloadTooLarge, "The encoded payload is too large: 1048578 > 1048576 bytes"),
    ],
)
def test_a_payload_has_to_be_json_of_limited_size(payload: Any, error: type[Exception], message: str) -> None:
    execution = start(approve)
    with pytest.raises(error) as raised:
        api.send_event(execution, "approved", payload)
    assert str(raised.value).startswith(message)
    assert (reload(execution).status, Event.objects.count()) == ("waiting", 0)


@pytest.mark.parametrize(
    ("timeout", "message"),
    [
        (-1, "timeout must be ≥ 0 seconds, got -1"),
        (float("nan"), "timeout must be ≥ 0 seconds, got nan"),
        ("30", "timeout must be a number of seconds or a timedelta, got str"),
        (True, "timeout must be a number of seconds or a timedelta, got bool"),
    ],
)
def test_a_timeout_is_a_positive_number_of_seconds(timeout: Any, message: str) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.wait_for("approval", "approved", timeout=timeout)

    assert run(body).error_message == message


def test_a_timeout_that_looks_like_milliseconds_draws_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    start(approve, timeout=30_000)
    assert "timeout=30000 of step approval means 8:20:00 (timeouts are seconds). Did you mean 30?" in caplog.text


def test_misuse_of_the_call_is_told_as_everywhere() -> None:
    @durable
    def twice(ctx: ExecutionContext) -> None:
        ctx.step("approval", int)
        ctx.wait_for("approval", "approved")

    @durable
    def inside(ctx: ExecutionContext) -> None:
        with transaction.atomic():
            ctx.wait_for("approval", "approved")

    assert failure(run(twice)).error_class == class_name(StepNameReused)
    assert failure(run(inside)).error_class == class_name(InvokeInsideTransaction)
    assert not Event.objects.exists()


def test_a_pending_step_that_is_settled_while_the_body_unwinds_lets_it_go_on() -> None:
    execution = start(approve)
    transitions.waking.wake(execution.pk)
    running = executions.claimed(execution)
    api.send_event(execution, "approved", 1)
    assert executions.fresh(execution).status == ExecutionStatus.RUNNING
    assert transitions.suspend(running, Pending("approval")) is False


# ----------------------------------------------------------------------------------------- beside children in parallel


@durable
def both(ctx: ExecutionContext) -> list[Any]:
    """Wait for an event while a started child runs, then for the child."""
    note(ctx, "body")
    child = ctx.start("echo", scenarios.echo, {"value": "child"})
    approval = ctx.wait_for("approval", "approved")
    return [approval, *ctx.gather(child)]


def test_a_started_child_that_ends_does_not_end_the_wait_for_an_event() -> None:
    execution = start(both)
    assert Execution.objects.get(parent=execution.pk).status == "succeeded"
    assert (execution.status, step_of(execution, "approval").status) == ("waiting", StepStatus.PENDING)
    api.send_event(execution, "approved", "yes")
    go_on()
    assert reload(execution).get_result() == ["yes", "child"]
    assert not violations()


def test_each_child_of_a_map_has_a_mailbox_of_its_own() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        return ctx.map("approvals", approve, [{"timeout": None}, {"timeout": None}])

    root = start(parent)
    first, second = Execution.objects.filter(parent=root.pk).order_by("position")
    api.send_event(second, "approved", 2)
    api.send_event(first, "approved", 1)
    go_on()
    assert reload(root).get_result() == [1, 2]
    assert not violations()


def test_an_operators_retry_runs_what_waited_for_an_event_beside_a_failed_child() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        return ctx.map("approvals", approve, [{"timeout": 30}, {"timeout": None}])

    root = run_failing(parent)
    api.retry(root)
    for number, child in enumerate(Execution.objects.filter(parent=root.pk).order_by("position")):
        api.send_event(child, "approved", number)
    go_on()
    assert reload(root).get_result() == [0, 1]
    assert not violations()


def run_failing(task: Any) -> Execution:
    """Start it, and let the first timeout end it."""
    execution = start(task)
    advance(31)
    execution = reload(execution)
    assert execution.status == "failed"
    return execution
