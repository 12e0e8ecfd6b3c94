"""One open execution of a task per key: return, refuse, replace, debounce; children, retries, reruns, adoption."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, group, shared_task
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.beat import ScheduleEntry, Scheduler
from celery.schedules import schedule
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import DuplicateExecution, ExecutionContext, api, testing, transitions
from conductor_app.body.journal import DatabaseJournal
from conductor_app.engine import sweeper
from conductor_app.exceptions import ActionRefused, CancelExecution, InvalidArgument, InvalidArgumentType, RetryRefused
from conductor_app.host import inline
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import uniqueness
from conductor_app.values.uniqueness import Unique
from project.celery import app
from tests.support.bodies import advance, durable, failure, go_on, reload, run, start
from tests.support.command import told
from tests.support.deliveries import deliver, stranger, take
from tests.support.executions import FAILURE, claimed, fresh, new, queued

pytestmark = pytest.mark.django_db


@durable
def plainly(ctx: ExecutionContext, value: Any = 0) -> Any:
    return value


@durable(unique="customer")
def returning(ctx: ExecutionContext, customer: Any, value: int = 0) -> Any:
    return [customer, value]


@durable(unique="customer", on_conflict="refuse")
def refusing(ctx: ExecutionContext, customer: Any) -> Any:
    return customer


@durable(unique="customer", on_conflict="replace")
def replacing(ctx: ExecutionContext, customer: Any, value: int = 0) -> Any:
    return value


@durable(unique=lambda customer, region="eu": f"{region}/{customer}" if customer else None)
def computed(ctx: ExecutionContext, customer: str, region: str = "eu") -> None:
    pass


@durable(unique="customer", max_retries=0)
def waiting(ctx: ExecutionContext, customer: str, value: int = 0) -> Any:
    return [value, ctx.wait_for("answer", "answered")]


@durable(unique="customer", max_retries=3, retry_backoff=60, retry_jitter=False)
def failing(ctx: ExecutionContext, customer: str) -> None:
    raise ValueError("no")


@shared_task
def plain(value: int) -> int:
    return value


def keyed(key: str = "k", **fields: Any) -> Any:
    unique = Unique(key, **fields.pop("how", {}))
    fields.setdefault("options", f'{{"unique": "{key}"}}')
    return queued(unique=unique, **fields)


# -------------------------------------------------------------------------------------------------------------- return


def test_a_second_call_returns_the_open_execution() -> None:
    first = returning.delay(customer="c-7")
    second = returning.delay(customer="c-7", value=2)

    assert first.is_new
    assert not second.is_new
    assert second.id == first.id
    assert Execution.objects.count() == 1


@pytest.mark.parametrize("status", ["queued", "running", "waiting", "in a retry pause", "flagged"])
def test_open_is_whatever_is_not_final(status: str) -> None:
    if status == "waiting":
        first, task = start(waiting, customer="c"), waiting
    elif status == "in a retry pause":
        first, task = start(failing, customer="c"), failing
        assert first.status == ExecutionStatus.QUEUED
        assert first.attempt == 2
    else:
        first, task = reload(returning.delay(customer="c")), returning
        if status == "running":
            claimed(first)
        if status == "flagged":
            transitions.request_cancel(first.pk, "enough")

    assert task.delay(customer="c").id == str(first.pk)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "cancelled while it ran", "expired", "lost"])
def test_each_end_frees_the_key(end: str) -> None:
    if end in ("cancelled", "expired"):
        execution = keyed(expires=60)
        if end == "cancelled":
            api.cancel(execution)
        else:
            clock.shift(dt.timedelta(seconds=61))
            assert transitions.expire(execution.pk)
    else:
        row = keyed(max_attempts=1)
        execution = claimed(row)
        if end == "succeeded":
            transitions.succeed(execution, "1")
        elif end == "failed":
            transitions.fail(execution, FAILURE)
        elif end == "lost":
            assert transitions.lose(execution.pk, owner=execution.lease_owner)
        else:
            transitions.request_cancel(execution.pk, "enough")
            transitions.cancel_running(execution)

    ended = fresh(execution)
    assert ended.is_final
    assert ended.unique_key is None
    assert ended.own_key == "k"
    assert keyed().unique_key == "k"


def test_the_children_of_a_map_free_their_keys_when_they_are_cancelled() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.map("m", returning, [{"customer": "a"}, {"customer": "b"}], timeout=30)

    execution = reload(parent.delay())
    inline.run_once(execution, app)
    assert sorted(Execution.objects.filter(parent=execution).values_list("unique_key", flat=True)) == ["a", "b"]
    clock.shift(dt.timedelta(seconds=31))
    sweeper.sweep()

    assert not Execution.objects.filter(parent=execution).exclude(unique_key=None).exists()
    assert set(Execution.objects.filter(parent=execution).values_list("status", flat=True)) == {"cancelled"}


def test_keys_are_of_a_task() -> None:
    assert returning.delay(customer="c").is_new
    assert waiting.delay(customer="c").is_new
    assert returning.delay(customer="d").is_new


@pytest.mark.parametrize(
    ("value", "key"),
    [("c-7", "c-7"), (7, "7"), (uuid.UUID(int=7), str(uuid.UUID(int=7))), ("é" * 127, "é" * 127), (None, None)],
    ids=["text", "number", "uuid", "bytes", "none"],
)
def test_the_key_is_the_argument(value: Any, key: str | None) -> None:
    assert reload(returning.delay(value)).unique_key == key
    assert returning.delay(customer=value).is_new is (key is None)


def test_a_default_is_an_argument_too() -> None:
    @durable(unique="region")
    def imported(ctx: ExecutionContext, region: str = "eu") -> None:
        pass

    assert reload(imported.delay()).unique_key == "eu"


def test_keyword_arguments_are_arguments_too() -> None:
    @durable(unique="region")
    def imported(ctx: ExecutionContext, **rest: Any) -> None:
        pass

    assert reload(imported.delay(region="eu")).unique_key == "eu"


def test_a_function_makes_the_key() -> None:
    assert reload(computed.delay("c")).unique_key == "eu/c"
    assert not computed.delay(customer="c").is_new
    assert computed.delay("c", region="us").is_new
    assert reload(computed.delay("")).unique_key is None


def test_a_call_may_have_a_key_of_its_own() -> None:
    first = plainly.apply_async(unique_key="k")
    assert not plainly.apply_async(args=[3], unique_key="k").is_new
    assert plainly.delay().is_new
    assert reload(first).unique_key == "k"
    assert reload(returning.apply_async(kwargs={"customer": "c"}, unique_key="other")).unique_key == "other"


def test_a_call_decides_about_a_conflict() -> None:
    first = returning.delay(customer="c")

    with pytest.raises(DuplicateExecution):
        returning.apply_async(kwargs={"customer": "c"}, on_conflict="refuse")
    assert not refusing.apply_async(kwargs={"customer": refusing.delay("c") and "c"}, on_conflict="return").is_new
    assert reload(first).status == ExecutionStatus.QUEUED


def test_a_signature_has_a_key() -> None:
    first = plainly.s(1).set(unique_key="k").delay()
    assert first.is_new
    assert not plainly.s(2).set(unique_key="k").delay().is_new


def test_a_call_whose_end_something_waits_for_is_not_answered_with_another_one() -> None:
    returning.delay(customer="c")

    for call in (
        lambda: returning.apply_async(kwargs={"customer": "c"}, link=plainly.s()),
        lambda: chain(returning.s("c"), plainly.s()).apply_async(),
        lambda: group([returning.s("c")]).apply_async(),
    ):
        with pytest.raises(DuplicateExecution, match="callbacks or is a part of a canvas"):
            call()
    assert Execution.objects.count() == 1


def test_two_calls_in_one_transaction_are_one_and_are_undone_together() -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        first = returning.delay(customer="c")
        assert returning.delay(customer="c").id == first.id
        raise ZeroDivisionError

    assert returning.delay(customer="c").is_new


def test_a_task_without_a_key_costs_no_statement_more() -> None:
    with CaptureQueriesContext(
        connection,
    ) as unkeyed:
        execution = claimed(queued())
        transitions.succeed(execution, "1")
    with CaptureQueriesContext(connection) as with_key:
        execution = claimed(keyed())
        transitions.succeed(execution, "1")

    def statements(queries: CaptureQueriesContext) -> int:
        return len([query for query in queries if "SAVEPOINT" not in query["sql"]])

    assert statements(with_key) == statements(unkeyed) + 2  # who has it; whom the end lets go


# -------------------------------------------------------------------------------------------------------------- refuse


def test_a_second_call_is_refused() -> None:
    first = refusing.delay(customer="c-7")
    with pytest.raises(DuplicateExecution) as caught:
        refusing.delay(customer="c-7")

    assert str(caught.value) == (
        f"Execution {first.id} of {refusing.name} has the unique key 'c-7', and is queued. Wait for its end, "
        'cancel it, or call with on_conflict="return" or "replace".'
    )
    assert (caught.value.execution_id, caught.value.status) == (uuid.UUID(first.id), "queued")
    assert Execution.objects.count() == 1


def test_a_refused_call_leaves_the_callers_transaction_usable() -> None:
    with transaction.atomic():
        refusing.delay(customer="c")
        with pytest.raises(DuplicateExecution):
            refusing.delay(customer="c")
        plainly.delay()

    assert Execution.objects.count() == 2


def test_a_key_that_is_taken_between_the_look_and_the_insert_is_no_integrity_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = keyed()
    looks = [None]
    look = uniqueness.holder_of
    monkeypatch.setattr(uniqueness, "holder_of", lambda *key: looks.pop() if looks else look(*key))

    with transaction.atomic():
        found, is_new = transitions.create(_new())
        assert Execution.objects.count() == 1
    assert (found.pk, is_new) == (holder.pk, False)


def test_a_holder_that_ends_between_the_violation_and_the_look_is_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder = keyed()
    answers: list[Any] = [None, None]
    look = uniqueness.holder_of

    def looked(*key: Any) -> Any:
        if len(answers) == 1:
            api.cancel(holder)
        return answers.pop() if answers else look(*key)

    monkeypatch.setattr(uniqueness, "holder_of", looked)
    monkeypatch.setattr(uniqueness, "snapshot_level", lambda _using: "")

    created, is_new = transitions.create(_new())

    assert is_new
    assert fresh(created).unique_key == "k"


def test_a_holder_that_a_snapshot_does_not_show_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    keyed()
    monkeypatch.setattr(uniqueness, "holder_of", lambda *_key: None)
    monkeypatch.setattr(uniqueness, "snapshot_level", lambda _using: "repeatable read")

    with pytest.raises(DuplicateExecution, match="reads a snapshot"), transaction.atomic():
        transitions.create(_new())


def _new(**how: Any) -> Any:
    return new(unique=Unique("k", **how), options='{"unique": "k"}')


# ------------------------------------------------------------------------------------------------------------- replace


def test_a_queued_one_is_replaced_at_once(django_capture_on_commit_callbacks: Any) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        first = replacing.delay(customer="c", value=1)
        second = replacing.delay(customer="c", value=2)

    assert second.is_new
    old, new = reload(first), reload(second)
    assert (old.status, old.cancel_reason) == (ExecutionStatus.CANCELLED, f"replaced by {new.pk}")
    assert (new.unique_key, new.predecessor) == ("c", None)
    go_on()
    assert reload(second).get_result() == 2


def test_the_new_one_waits_for_the_end_of_a_running_one() -> None:
    old = claimed(reload(replacing.delay(customer="c", value=1)))
    successor = reload(replacing.delay(customer="c", value=2))

    assert (successor.status, successor.due_at, successor.dispatch_at, successor.predecessor) == (
        ExecutionStatus.QUEUED,
        None,
        None,
        old.pk,
    )
    assert successor.unique_key == "c"
    asked = fresh(old)
    assert asked.unique_key is None
    assert asked.cancel_requested_at is not None
    sweeper.sweep(audit=True)
    assert transitions.claim(successor.pk, "w@h/1") is None
    assert transitions.claim(successor.pk, "w@h/1", attempt=1) is None

    transitions.cancel_running(old)

    released = fresh(successor)
    assert released.predecessor is None
    assert released.due_at is not None
    assert transitions.claim(successor.pk, "w@h/1") is not None


def test_the_old_one_ends_cancelled_whatever_its_body_does(django_capture_on_commit_callbacks: Any) -> None:
    old = claimed(reload(replacing.delay(customer="c", value=1)))
    new = replacing.delay(customer="c", value=2)
    with pytest.raises(CancelExecution):
        transitions.succeed(old, "1")
    with pytest.raises(CancelExecution):
        transitions.fail(old, FAILURE)
    transitions.cancel_running(old, result="1")

    assert fresh(old).status == ExecutionStatus.CANCELLED
    go_on()
    assert reload(new).get_result() == 2


def test_one_in_a_retry_pause_never_runs_again() -> None:
    old = start(failing, customer="c")
    new = failing.apply_async(kwargs={"customer": "c"}, on_conflict="replace")
    assert reload(new).predecessor == old.pk
    runs = fresh(old).fence
    clock.shift(dt.timedelta(hours=1))
    go_on()

    assert fresh(old).status == ExecutionStatus.CANCELLED
    assert fresh(old).fence == runs
    assert reload(new).started_at is not None


def test_one_that_waits_is_replaced(django_capture_on_commit_callbacks: Any) -> None:
    old = start(waiting, customer="c")
    with django_capture_on_commit_callbacks(execute=True):
        new = waiting.apply_async(kwargs={"customer": "c"}, on_conflict="replace")

    assert fresh(old).status == ExecutionStatus.CANCELLED
    assert reload(new).predecessor is None


def test_of_ten_in_a_row_exactly_the_last_one_runs() -> None:
    first = claimed(reload(replacing.delay(customer="c", value=0)))
    results = [replacing.delay(customer="c", value=value) for value in range(1, 11)]
    go_on()
    assert reload(results[-1]).predecessor == first.pk
    assert [reload(result).status for result in results[:-1]] == ["cancelled"] * 9
    assert not Execution.objects.filter(started_at__isnull=False).exclude(pk=first.pk).exists()

    transitions.cancel_running(first)
    go_on()

    assert reload(results[-1]).get_result() == 10
    assert list(Execution.objects.filter(started_at__isnull=False).order_by("id")) == [first, reload(results[-1])]


def test_one_that_is_cancelled_while_it_waits_gives_the_key_back() -> None:
    """Else the next one would find it free, and run beside the first one, which is not over."""
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.delay(customer="c"))
    api.cancel(second)

    assert fresh(second).status == ExecutionStatus.CANCELLED
    assert fresh(second).unique_key is None
    assert fresh(first).unique_key == "c"
    third = reload(replacing.delay(customer="c"))
    assert third.predecessor == first.pk
    transitions.cancel_running(first)
    assert fresh(third).predecessor is None


def test_one_that_expires_while_it_waits_gives_the_key_back() -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.apply_async(kwargs={"customer": "c"}, expires=60))
    clock.shift(dt.timedelta(seconds=61))
    assert transitions.expire(second.pk)

    assert fresh(first).unique_key == "c"
    assert fresh(second).predecessor is None


def test_a_replaced_one_does_not_get_the_key_back() -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.delay(customer="c"))
    third = reload(replacing.delay(customer="c"))
    sweeper.sweep()

    assert fresh(second).status == ExecutionStatus.CANCELLED
    assert fresh(first).unique_key is None
    assert fresh(third).unique_key == "c"


def test_the_due_time_of_one_that_waits_counts_from_its_call() -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.apply_async(kwargs={"customer": "c"}, countdown=3600))
    third_due = second.due_then
    assert second.due_at is None
    assert third_due is not None
    transitions.cancel_running(first)

    released = fresh(second)
    assert released.due_at == released.dispatch_at == third_due
    assert released.due_then is None
    assert transitions.claim(second.pk, "w@h/1") is None


def test_a_due_time_that_has_passed_when_the_old_one_ends_is_now() -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.apply_async(kwargs={"customer": "c"}, countdown=60))
    clock.shift(dt.timedelta(seconds=90))
    transitions.cancel_running(first)

    released = fresh(second)
    assert released.due_at is not None
    assert second.due_then is not None
    assert released.due_at > second.due_then
    assert transitions.claim(second.pk, "w@h/1") is not None


def test_one_that_waits_is_not_woken_and_not_published() -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = replacing.delay(customer="c")

    with pytest.raises(ActionRefused, match=f"waits until execution {first.pk}"):
        api.wake(second)
    with pytest.raises(ActionRefused):
        api.publish_again(second)


def test_an_end_that_was_missed_is_mended(caplog: pytest.LogCaptureFixture) -> None:
    first = claimed(reload(replacing.delay(customer="c")))
    second = reload(replacing.delay(customer="c"))
    sweeper.sweep(audit=True)
    assert fresh(second).predecessor == first.pk
    # By hand: no transition leaves it so.
    Execution.objects.filter(pk=first.pk).delete()

    found = sweeper.sweep(audit=True)

    assert found["stranded"] == 1
    assert "waiting for nothing" in caplog.text
    assert fresh(second).predecessor is None
    assert transitions.claim(second.pk, "w@h/1") is not None


def test_an_operator_lets_a_replaced_child_go_on_and_its_successor_waits() -> None:
    """A retry of its root withdraws the child's cancellation; whatever its end is, it lets the successor go."""

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("c", waiting, {"customer": "c"}, timeout=60, on_timeout="abandon")

    root = start(parent)
    old = Execution.objects.get(parent=root)
    clock.shift(dt.timedelta(seconds=61))
    go_on()
    assert fresh(root).status == ExecutionStatus.FAILED
    run_of_child = fresh(old)
    assert run_of_child.status == ExecutionStatus.WAITING
    new = reload(waiting.apply_async(kwargs={"customer": "c"}, on_conflict="replace"))
    assert new.predecessor == old.pk
    api.retry(root)
    assert fresh(old).cancel_requested_at is None

    api.send_event(old, "answered", "yes")
    go_on()

    assert fresh(old).status == ExecutionStatus.SUCCEEDED
    assert fresh(root).status == ExecutionStatus.SUCCEEDED
    assert fresh(new).predecessor is None


# ------------------------------------------------------------------------------------------------------------ debounce


def test_a_debounced_call_waits_for_the_next_one() -> None:
    first = plainly.apply_async(args=[1], unique_key="k", debounce=300)
    row = reload(first)
    assert row.due_at is not None
    assert row.due_at - row.created_at == dt.timedelta(seconds=300)
    clock.shift(dt.timedelta(seconds=240))
    second = plainly.apply_async(args=[2], unique_key="k", debounce=300)

    assert (first.is_new, second.is_new, second.id) == (True, False, first.id)
    moved = reload(first)
    assert moved.args == [2]
    assert moved.due_at == moved.dispatch_at
    assert dt.timedelta(seconds=540) <= moved.due_at - moved.created_at < dt.timedelta(seconds=600)  # type: ignore[operator]
    assert advance(270) == 0
    assert advance(60) == 1
    assert reload(first).get_result() == 2


def test_a_debounced_one_begins_at_the_latest_after_debounce_max() -> None:
    first = plainly.apply_async(args=[0], unique_key="k", debounce=300, debounce_max=720)
    for value in range(1, 5):
        clock.shift(dt.timedelta(seconds=174))
        plainly.apply_async(args=[value], unique_key="k", debounce=300, debounce_max=720)

    row = reload(first)
    assert row.due_at == row.created_at + dt.timedelta(seconds=720)
    assert row.args == [4]


def test_a_debounced_call_is_run_after_one_that_has_begun() -> None:
    first = claimed(reload(plainly.apply_async(args=[1], unique_key="k")))
    second = reload(plainly.apply_async(args=[2], unique_key="k", debounce=5))
    assert second.pk != first.pk
    assert (second.predecessor, second.due_at, second.unique_key) == (first.pk, None, "k")
    assert second.due_then is not None
    assert fresh(first).cancel_requested_at is None
    third = plainly.apply_async(args=[3], unique_key="k", debounce=60)
    assert third.id == str(second.pk)
    merged = fresh(second)
    assert (merged.args, merged.due_at, merged.dispatch_at) == ([3], None, None)
    assert merged.due_then > second.due_then  # type: ignore[operator]

    transitions.succeed(first, "1")

    assert fresh(second).due_at == merged.due_then
    assert advance(61) == 1
    assert fresh(second).get_result() == 3


@pytest.mark.parametrize("end", ["failed", "lost", "child"])
def test_each_end_of_one_that_has_begun_lets_the_debounced_one_go(end: str) -> None:
    if end == "child":

        @durable(max_retries=0)
        def parent(ctx: ExecutionContext) -> Any:
            return ctx.invoke("c", waiting, {"customer": "c"})

        root = start(parent)
        first = Execution.objects.get(parent=root)
        second = reload(waiting.apply_async(kwargs={"customer": "c"}, debounce=5))
        api.send_event(first, "answered", "yes")
        go_on()
        assert fresh(root).status == ExecutionStatus.SUCCEEDED
    else:
        first = claimed(reload(plainly.apply_async(unique_key="k")))
        second = reload(plainly.apply_async(unique_key="k", debounce=5))
        if end == "failed":
            transitions.fail(first, FAILURE)
        else:
            Execution.objects.filter(pk=first.pk).update(max_attempts=1)
            transitions.lose(first.pk, owner=first.lease_owner)

    assert second.predecessor == first.pk
    assert fresh(second).predecessor is None
    assert fresh(second).due_at is not None


def test_a_debounced_call_may_replace_one_that_has_begun() -> None:
    first = claimed(reload(plainly.apply_async(unique_key="k")))
    second = reload(plainly.apply_async(unique_key="k", debounce=5, on_conflict="replace"))

    assert fresh(first).cancel_reason == f"replaced by {second.pk}"
    assert second.predecessor == first.pk


def test_a_debounced_call_does_not_write_into_one_that_pauses_before_a_retry() -> None:
    first = start(failing, customer="c")
    assert first.status == ExecutionStatus.QUEUED
    second = reload(failing.apply_async(kwargs={"customer": "c"}, debounce=5))

    assert (second.predecessor, fresh(first).due_at) == (first.pk, first.due_at)


def test_a_debounced_call_does_not_write_into_one_that_is_to_be_cancelled() -> None:
    first = reload(plainly.apply_async(args=[1], unique_key="k", debounce=5))
    transitions.request_cancel(first.pk, "enough")
    second = plainly.apply_async(args=[2], unique_key="k", debounce=5)

    assert second.is_new
    go_on()
    assert fresh(first).args == [1]
    assert advance(6) == 1
    assert reload(second).get_result() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"debounce": 5, "countdown": 3}, "so does countdown"),
        ({"debounce": 5, "eta": dt.datetime(2030, 1, 1, tzinfo=dt.UTC)}, "so does eta"),
        ({"debounce_max": 5}, "Pass debounce="),
        ({"debounce": 5, "debounce_max": 4}, "≥ debounce, got 4 and 5"),
        ({"debounce": 0}, "debounce must be > 0"),
        ({"debounce": 5, "on_conflict": "return"}, "never lost"),
        ({"debounce": 5, "on_conflict": "refuse"}, "never lost"),
        ({"debounce": 5, "idempotency_key": "i"}, "for ever"),
        ({"debounce": 5, "link": plainly.s()}, "called with link"),
        ({"on_conflict": "drop"}, 'must be "return", "refuse" or "replace"'),
        ({"idempotency_key": "i"}, "contradict each other"),
        ({"unique_key": ""}, "1–255 bytes, got 0"),
        ({"unique_key": "é" * 128}, "1–255 bytes, got 256"),
        ({"unique_key": " k"}, "Strip it"),
        ({"unique_key": 7}, "must be str, got int 7"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgument, InvalidArgumentType), match=message):
        plainly.apply_async(**{"unique_key": "k", **options})
    assert not Execution.objects.exists()


@pytest.mark.parametrize("options", [{"on_conflict": "refuse"}, {"debounce": 5}])
def test_what_is_about_a_key_needs_one(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="Pass unique_key="):
        plainly.apply_async(**options)


@pytest.mark.parametrize("value", [True, 1.5, ["c"], "c" * 256, "c "])
def test_an_argument_that_is_no_key_is_refused_at_the_call(value: Any) -> None:
    with pytest.raises((InvalidArgument, InvalidArgumentType), match='argument "customer" of'):
        returning.delay(customer=value)
    assert not Execution.objects.exists()


def test_what_a_function_returns_is_checked() -> None:
    @durable(unique=lambda: 7)
    def numbered(ctx: ExecutionContext) -> None:
        pass

    with pytest.raises(InvalidArgumentType, match=r"what unique of .* returns must be str, got int"):
        numbered.delay()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unique": "customr"}, TypeError, "names no argument of body; it has customer, value"),
        ({"unique": 7}, TypeError, "must be the name of an argument, or a function"),
        ({"unique": "customer", "on_conflict": "drop"}, ValueError, 'must be "return", "refuse" or "replace"'),
        ({"on_conflict": "refuse"}, TypeError, "Pass unique="),
        ({"unique_key": "k"}, TypeError, 'Did you mean "unique"'),
    ],
)
def test_what_cannot_be_is_refused_at_the_decorator(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def body(ctx: ExecutionContext, customer: str, value: int = 0) -> None:
        pass

    with pytest.raises(error, match=message):
        durable(**options)(body)


# ------------------------------------------------------------------------------------------------------ idempotency key


def test_an_idempotency_key_is_looked_at_first() -> None:
    call: Callable[..., Any] = lambda: refusing.apply_async(kwargs={"customer": "c"}, idempotency_key="i")  # noqa: E731
    first = call()
    assert call().id == first.id
    go_on()
    assert reload(first).is_final
    again = call()

    assert (again.id, again.is_new) == (first.id, False)
    assert Execution.objects.count() == 1


def test_a_new_idempotency_key_does_not_help_against_a_taken_key() -> None:
    refusing.apply_async(kwargs={"customer": "c"}, idempotency_key="i")
    with pytest.raises(DuplicateExecution):
        refusing.apply_async(kwargs={"customer": "c"}, idempotency_key="j")


def test_a_call_with_the_idempotency_key_of_a_replaced_one_replaces_nothing() -> None:
    call: Callable[..., Any] = lambda key: replacing.apply_async(kwargs={"customer": "c"}, idempotency_key=key)  # noqa: E731
    first, second = call("i"), call("j")

    assert call("i").id == first.id
    assert reload(second).unique_key == "c"


# ------------------------------------------------------------------------------------------------------------ children


@durable(max_retries=0)
def parent(ctx: ExecutionContext, call: str, catches: bool = True) -> Any:
    try:
        if call == "invoke":
            done = ctx.invoke("a", returning, {"customer": "c"})
        elif call == "start":
            done = ctx.gather(ctx.start("a", returning, {"customer": "c"}))
        elif call == "map":
            done = ctx.map("a", returning, [{"customer": "b"}, {"customer": "c"}])
        else:
            done = ctx.invoke("a", plainly.s(1).set(unique_key="c"))
    except DuplicateExecution as error:
        if not catches:
            raise
        refused = [str(error.execution_id), error.status]
        ctx.sleep("pause", 60)
        return ["refused", *refused]
    return ["done", done]


@pytest.mark.parametrize("call", ["invoke", "start", "map", "signature"])
def test_a_child_whose_key_is_taken_is_refused_in_its_parent_and_on_each_replay(call: str) -> None:
    other = plainly.apply_async(unique_key="c") if call == "signature" else returning.delay(customer="c")
    holder = claimed(reload(other))
    root = start(parent, call=call)
    assert root.status == ExecutionStatus.WAITING
    assert not Execution.objects.filter(parent=root).exists()
    assert Step.objects.get(execution=root, name="a").status == StepStatus.FAILED
    transitions.succeed(holder, "1")  # the key is free when the parent runs again

    advance(61)

    assert fresh(root).get_result() == ["refused", other.id, "running"]
    assert not Execution.objects.filter(parent=root).exists()


@pytest.mark.parametrize("call", ["invoke", "start", "map", "signature"])
def test_a_child_has_the_key_while_it_is_open(call: str) -> None:
    root = reload(parent.delay(call=call))
    inline.run_once(root, app)

    child = Execution.objects.get(parent=root, unique_key="c")
    task = plainly if call == "signature" else returning
    options: dict[str, Any] = {"args": [1]} if call == "signature" else {"kwargs": {"customer": "c"}}
    if call == "signature":
        options["unique_key"] = "c"
    assert task.apply_async(**options).id == str(child.pk)
    go_on()
    assert fresh(root).get_result()[0] == "done"
    assert fresh(child).unique_key is None


def test_an_uncaught_refusal_is_a_failed_attempt_and_the_next_one_asks_again() -> None:
    @durable(max_retries=1, default_retry_delay=30, retry_backoff=False)
    def trying(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", returning, {"customer": "c"})

    holder = claimed(reload(returning.delay(customer="c")))
    root = start(trying)
    assert (root.status, root.attempt) == (ExecutionStatus.QUEUED, 2)
    transitions.succeed(holder, "1")

    advance(31)

    assert fresh(root).get_result() == ["c", 0]


def test_an_uncaught_refusal_fails_the_last_attempt_and_is_asked_again_by_a_retry() -> None:
    holder = claimed(reload(returning.delay(customer="c")))
    root = start(parent, call="invoke", catches=False)
    assert failure(root).error_class == "conductor_app.exceptions.DuplicateExecution"
    transitions.succeed(holder, "1")
    api.retry(root)
    go_on()

    assert fresh(root).get_result() == ["done", ["c", 0]]


@pytest.mark.parametrize("call", ["invoke", "start", "map"])
def test_a_key_that_is_taken_after_the_look_is_refused_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = claimed(reload(returning.delay(customer="c")))
    looked: list[Any] = []
    look = DatabaseJournal.duplicate_of

    def blind_once(self: Any, children: Any) -> Any:
        looked.append(children)
        return None if len(looked) == 1 else look(self, children)

    monkeypatch.setattr(DatabaseJournal, "duplicate_of", blind_once)
    root = start(parent, call=call)

    assert len(looked) == (1 if call == "start" else 2)
    assert root.status == ExecutionStatus.WAITING
    advance(61)
    assert fresh(root).get_result() == ["refused", str(holder.pk), "running"]
    assert fresh(root).attempt == 1


def test_two_children_of_a_map_with_one_key_are_refused() -> None:
    @durable(max_retries=0)
    def mapping(ctx: ExecutionContext) -> Any:
        return ctx.map("m", returning, [{"customer": "c"}, {"customer": "d"}, {"customer": "c"}])

    execution = start(mapping)
    assert failure(execution).message.startswith('payloads[0] and payloads[2] of ctx.map("m") have one unique key')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_conflict": "replace"}, 'on_conflict="replace" is not for a child'),
        ({"on_conflict": "return"}, 'on_conflict="return" is not for a child'),
        ({"debounce": 5}, "debounce is not for a child"),
    ],
)
def test_children_are_refused_and_nothing_else(options: dict[str, Any], message: str) -> None:
    @durable(max_retries=0)
    def asking(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", returning.s("c").set(**options))

    assert failure(start(asking)).message.startswith(message)


def test_a_decorators_replace_is_no_childs() -> None:
    @durable(max_retries=0)
    def invoking(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", replacing, {"customer": "c"})

    holder = claimed(reload(replacing.delay(customer="c")))

    assert failure(start(invoking)).error_class == "conductor_app.exceptions.DuplicateExecution"
    assert fresh(holder).cancel_requested_at is None


def test_a_plain_child_has_no_key() -> None:
    @durable(max_retries=0)
    def invoking(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", plain.s(1).set(unique_key="k"))

    assert "a plain Celery task has none" in failure(start(invoking)).message


def test_a_bodys_kit_knows_no_keys() -> None:
    returning.delay(customer="c")

    assert testing.run(parent, {"call": "invoke"}, {returning: 7}) == ["done", 7]
    assert testing.run(parent, {"call": "map"}, {returning: 7}) == ["done", [7, 7]]


# --------------------------------------------------------------------------------------------- operators; other callers


def test_a_retry_takes_the_key_again() -> None:
    execution = claimed(keyed())
    transitions.fail(execution, FAILURE)
    api.retry(execution)

    assert fresh(execution).unique_key == "k"


def test_a_retry_is_refused_if_the_key_is_taken() -> None:
    execution = claimed(keyed())
    transitions.fail(execution, FAILURE)
    holder = keyed()

    with pytest.raises(RetryRefused, match=f"belongs to execution {holder.pk} by now, which is queued") as caught:
        api.retry(execution)

    assert caught.value.holder_id == holder.pk
    assert fresh(execution).status == ExecutionStatus.FAILED


@pytest.mark.parametrize("call", ["invoke", "map"])
def test_a_retry_of_a_tree_takes_the_keys_of_its_children_again(call: str) -> None:
    @durable(max_retries=0)
    def invoking(ctx: ExecutionContext) -> Any:
        if call == "invoke":
            return ctx.invoke("a", waiting, {"customer": "a"})
        return ctx.map("m", waiting, [{"customer": "a"}, {"customer": "b"}])

    root = start(invoking)
    api.cancel(root)
    go_on()
    assert not Execution.objects.exclude(unique_key=None).exists()
    holder = waiting.delay(customer="a")
    with pytest.raises(RetryRefused, match=f"belongs to execution {holder.id}"):
        api.retry(root)
    assert fresh(root).status == ExecutionStatus.CANCELLED
    api.cancel(holder)
    api.retry(root)

    keys = Execution.objects.filter(parent=root).order_by("position").values_list("unique_key", flat=True)
    assert list(keys) == (["a"] if call == "invoke" else ["a", "b"])


def test_a_result_is_adopted_whoever_has_the_key() -> None:
    execution = claimed(keyed())
    transitions.request_cancel(execution.pk, "enough")
    transitions.cancel_running(execution, result="7")
    holder = keyed()
    api.retry(execution)

    assert fresh(execution).status == ExecutionStatus.SUCCEEDED
    assert fresh(execution).unique_key is None
    assert fresh(holder).unique_key == "k"


def test_a_rerun_has_the_key_and_is_refused_if_it_is_taken() -> None:
    execution = claimed(keyed())
    transitions.fail(execution, FAILURE)
    again = api.rerun(execution)
    assert again.unique_key == "k"
    assert again.own_key == "k"

    with pytest.raises(ActionRefused, match=f"is not run again as new. Execution {again.pk}") as caught:
        api.rerun(execution)
    assert caught.value.reason == "its unique key belongs to another execution"


@pytest.mark.parametrize("task", [returning, refusing, replacing])
def test_a_message_of_somebody_else_has_the_key_of_its_arguments(task: Any) -> None:
    """Such as a tick of Beat's that comes twice, or while the last one's execution is open."""
    first = stranger().send_task(task.name, kwargs={"customer": "c"})
    message = take(is_wanted=lambda message: message.headers["id"] == first.id)
    adopted = task.identify(Context(id=first.id), (), {"customer": "c"})
    assert reload(adopted).unique_key == "c"
    second = stranger().send_task(task.name, kwargs={"customer": "c"})
    deliver(take(is_wanted=lambda message: message.headers["id"] == second.id))

    assert message is not None
    if task is replacing:
        assert reload(adopted).cancel_reason == f"replaced by {second.id}"
        assert reload(second).predecessor == adopted
        return
    assert not Execution.objects.filter(pk=second.id).exists()
    assert reload(adopted).status == ExecutionStatus.QUEUED
    if not isinstance(app.backend, DisabledBackend):
        assert app.AsyncResult(second.id).state == ("FAILURE" if task is refusing else "PENDING")


def test_apply_refuses_a_key_that_is_taken() -> None:
    replacing.delay(customer="c")

    with pytest.raises(DuplicateExecution):
        replacing.apply(kwargs={"customer": "c"})
    assert run(replacing, customer="d", value=3).get_result() == 3


def test_eager_mode_replaces_what_no_worker_runs(settings: Any) -> None:
    old = start(waiting, customer="c")
    before = app.conf.task_always_eager
    app.conf.task_always_eager = True
    try:
        new = replacing.apply_async(kwargs={"customer": "c", "value": 1})
        assert new.is_new
        assert new.get() == 1
        result = waiting.apply_async(kwargs={"customer": "c"})
        assert (result.id, result.is_new) == (str(old.pk), False)
        with pytest.raises(RuntimeError, match="Does it wait for an event"):
            waiting.apply_async(kwargs={"customer": "c"}, on_conflict="replace")
    finally:
        app.conf.task_always_eager = before
    assert fresh(old).status == ExecutionStatus.CANCELLED


def test_eager_mode_says_so_if_nothing_ends_the_old_one() -> None:
    held = claimed(reload(replacing.delay(customer="c")))
    second = replacing.delay(customer="c")
    Execution.objects.filter(pk=held.pk).update(status="waiting", lease_expires_at=None, cancel_requested_at=None)
    with pytest.raises(RuntimeError, match="nothing ends that here"):
        inline.run_eagerly(reload(second), app)


def test_drain_runs_the_new_one_after_the_old_one() -> None:
    first = reload(waiting.delay(customer="c"))
    testing.drain()
    second = waiting.apply_async(kwargs={"customer": "c", "value": 2}, on_conflict="replace")
    testing.drain()

    assert fresh(first).status == ExecutionStatus.CANCELLED
    assert reload(second).status == ExecutionStatus.WAITING


# -------------------------------------------------------------------------------------------------- what is told of it


def test_the_headline_and_show_tell_whose_end_is_waited_for() -> None:
    first = claimed(reload(replacing.delay(customer="c-7")))
    second = reload(replacing.delay(customer="c-7"))
    document = told("show", second.pk, "--json").json

    assert document["headline"].endswith(f'Waits until execution {first.pk} of the unique key "c-7" has ended.')
    row = document["execution"]
    assert (row["unique_key"], row["unique_key_holder"]) == ("c-7", str(second.pk))
    assert row["waits_for_end_of"] == str(first.pk)
    before = told("show", first.pk, "--json").json["execution"]
    assert (before["unique_key"], before["unique_key_holder"]) == ("c-7", str(second.pk))
    text = told("show", first.pk).out
    assert f"c-7, by now of {second.pk}" in " ".join(text.split())
    assert f"waits for the end of {first.pk}" in " ".join(told("show", second.pk).out.split())


def test_the_open_one_of_a_key_is_found() -> None:
    first = returning.delay(customer="c-7")
    returning.delay(customer="c-8")
    found = told("ls", "--unique", "c-7", "--json").json

    assert [row["id"] for row in found["executions"]] == [first.id]


def test_the_admin_shows_the_key_with_its_holder(admin_client: Any) -> None:
    first = claimed(reload(replacing.delay(customer="c-7")))
    second = reload(replacing.delay(customer="c-7"))
    change = "admin:conductor_app_execution_change"
    page = admin_client.get(reverse(change, args=[first.pk])).content.decode()
    assert reverse(change, args=[second.pk]) in page
    assert "by now of" in page
    page = admin_client.get(reverse(change, args=[second.pk])).content.decode()
    assert "Waits until execution" in page
    assert reverse(change, args=[first.pk]) in page
    found = admin_client.get(f"{reverse('admin:conductor_app_execution_changelist')}?q=unique:c-7").content.decode()
    assert str(second.pk) in found
    assert str(first.pk) not in found


# --------------------------------------------------------------------------------------------------------- chains; Beat


def test_the_next_of_a_chain_is_called_again_when_the_key_is_free() -> None:
    holder = claimed(reload(refusing.delay(customer="c")))
    chain(plainly.si(1), refusing.si(customer="c")).apply_async()
    go_on()
    assert Execution.objects.filter(task=refusing.name).count() == 1
    transitions.succeed(holder, "1")
    advance(120)

    assert Execution.objects.filter(task=refusing.name, status=ExecutionStatus.SUCCEEDED).count() == 2


def test_a_tick_of_beats_that_comes_twice_starts_one() -> None:
    """By the task's own key, or by that of the schedule's entry."""
    ours, theirs = (Scheduler(app=app, schedule={}, lazy=True) for _ in range(2))
    entries = [
        ScheduleEntry(name="own", task=returning.name, kwargs={"customer": "c"}, schedule=schedule(60), app=app),
        ScheduleEntry(
            name="nightly", task=plainly.name, options={"unique_key": "nightly"}, schedule=schedule(60), app=app
        ),
    ]
    for entry in entries:
        first = ours.apply_async(entry, advance=False)
        second = theirs.apply_async(entry, advance=False)
        assert (first.is_new, second.is_new, second.id) == (True, False, first.id)
    assert Execution.objects.count() == 2
