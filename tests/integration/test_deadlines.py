"""The deadline of a tree: ``max_duration`` of a root's task, and ``deadline`` of a call."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from conductor_app import ExecutionContext, Limit, api, durable_task, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import ExecutionCancelled, InvalidArgument, InvalidArgumentType
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.telling import story
from conductor_app.telling.headlines import headline
from conductor_app.telling.history import history
from conductor_app.testing import advance
from conductor_app.testing import run as run_body
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support.bodies import child, durable, go_on, reload, run
from tests.support.command import told
from tests.support.executions import claimed, fresh, invoke, queued, running
from tests.support.schedules import schedules as scheduling

pytestmark = pytest.mark.django_db

HOUR = dt.timedelta(hours=1)


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@durable(max_duration=60)
def bounded(ctx: ExecutionContext, seconds: float = 3_600) -> str:
    note(ctx, "body")
    ctx.sleep("nap", seconds)
    return "rested"


@durable
def parent_of_bounded(ctx: ExecutionContext) -> Any:
    return ctx.invoke("child", bounded, {"seconds": 100})


def over(execution: Execution) -> str:
    """The reason of a cancel by a deadline."""
    assert execution.tree_deadline_at is not None
    return f"its deadline of {execution.tree_deadline_at.isoformat(sep=' ', timespec='seconds')} is over"


def seconds_after_creation(execution: Execution) -> float:
    assert execution.tree_deadline_at is not None
    return (execution.tree_deadline_at - execution.created_at).total_seconds()


def in_seconds(seconds: float) -> dt.datetime:
    return clock.read("default") + dt.timedelta(seconds=seconds)


# ------------------------------------------------------------------------------------------------------------ the call


@pytest.mark.parametrize(
    "deadline", [30, 29.5, dt.timedelta(seconds=30), lambda: in_seconds(30), lambda: in_seconds(30).isoformat()]
)
def test_a_call_may_give_a_deadline_as_it_gives_expires(deadline: Any) -> None:
    result = scenarios.naps.apply_async(
        kwargs={"seconds": 100}, deadline=deadline() if callable(deadline) else deadline
    )
    assert 15 < seconds_after_creation(reload(result)) < 31
    advance(31)
    row = reload(result)
    assert (row.status, row.cancel_reason) == ("cancelled", over(row))
    with pytest.raises(ExecutionCancelled, match=r"Cancelled: its deadline of .* is over"):
        api.get_result(result, timeout=0)


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [(30, 30), (90, 60), (lambda: in_seconds(30), 30), (lambda: in_seconds(90), 60), (None, 60)],
)
@pytest.mark.parametrize("how", ["apply_async", "start_many", "unique"])
def test_the_earlier_of_the_tasks_and_the_calls_counts(deadline: Any, expected: float, how: str) -> None:
    given = deadline() if callable(deadline) else deadline
    if how == "start_many":
        (result,) = bounded.start_many([{}], deadline=given)
    else:
        key = {"unique_key": "k"} if how == "unique" else {}
        result = bounded.apply_async(deadline=given, **key)
    row = reload(result)
    assert expected - 15 < seconds_after_creation(row) < expected + 1
    assert row.deadline_at == row.tree_deadline_at


@pytest.mark.parametrize(("expires", "expected"), [(30, 30), (90, 60), (None, 60)])
def test_a_root_does_not_start_after_the_earlier_of_expires_and_the_deadline(expires: Any, expected: float) -> None:
    row = reload(bounded.apply_async(expires=expires))
    assert row.deadline_at is not None
    assert abs((row.deadline_at - row.created_at).total_seconds() - expected) < 0.01
    assert abs(seconds_after_creation(row) - 60) < 0.01
    advance(expected + 1)
    row = reload(row)
    assert row.cancel_reason == ("it expired before it started" if expires == 30 else over(row)) or row.fence


def test_each_of_many_has_the_deadline() -> None:
    results = scenarios.naps.start_many([{"seconds": 100}, {"seconds": 1}], deadline=30)
    assert all(29 < seconds_after_creation(reload(result)) < 31 for result in results)
    advance(31)
    assert [reload(result).status for result in results] == ["cancelled", "succeeded"]


@pytest.mark.parametrize("deadline", [0, -5, dt.timedelta(seconds=-1), lambda: in_seconds(-60)])
def test_a_deadline_in_the_past_is_as_expires_in_the_past_and_nothing_starts(deadline: Any) -> None:
    result = scenarios.echo.apply_async(deadline=deadline() if callable(deadline) else deadline)
    go_on()
    row = reload(result)
    assert (row.status, row.cancel_reason, count("body")) == ("cancelled", over(row), 0)


BAD = [
    (math.nan, InvalidArgument, "deadline must be a finite number of seconds"),
    (math.inf, InvalidArgument, "deadline must be a finite number of seconds"),
    (1e12, InvalidArgument, "deadline must be at most"),
    (True, InvalidArgumentType, "deadline must be a number of seconds or a timedelta, got bool"),
    ([], InvalidArgumentType, "deadline must be a number of seconds or a timedelta, got list"),
    ("soon", InvalidArgument, "deadline must be a datetime or its ISO 8601 text"),
    (dt.datetime(9999, 1, 1, tzinfo=dt.UTC), InvalidArgument, "deadline must lie between"),
]


@pytest.mark.parametrize(("deadline", "error", "text"), BAD)
@pytest.mark.parametrize("call", ["apply_async", "start_many"])
def test_a_deadline_that_is_none_is_refused_and_nothing_is_stored(
    deadline: Any, error: type[Exception], text: str, call: str
) -> None:
    with pytest.raises(error, match=text):
        if call == "apply_async":
            scenarios.echo.apply_async((1,), deadline=deadline)
        else:
            scenarios.echo.start_many([1], deadline=deadline)
    assert not Execution.objects.exists()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "max_duration must be > 0 seconds, got 0"),
        (-1, ValueError, "max_duration must be > 0 seconds, got -1"),
        (dt.timedelta(), ValueError, "max_duration must be > 0 seconds"),
        (math.inf, ValueError, "max_duration must be > 0 seconds, got inf"),
        (math.nan, ValueError, "max_duration must be > 0 seconds, got nan"),
        (1e12, ValueError, "max_duration must be at most"),
        ("60", TypeError, "max_duration must be a number of seconds or a timedelta, got str"),
        (True, TypeError, "max_duration must be a number of seconds or a timedelta, got bool"),
    ],
)
def test_a_task_with_a_duration_that_is_none_is_refused(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):

        @durable_task(name="refused", max_duration=value)
        def body(ctx: ExecutionContext) -> None: ...


def test_the_words_of_others_lead_to_these() -> None:
    with pytest.raises(TypeError, match=r'no option "deadline"\. Did you mean "max_duration"\?'):
        durable_task(deadline=60)(lambda ctx: None)
    with pytest.raises(InvalidArgumentType, match="It is an option of @durable_task; one call has deadline="):
        scenarios.echo.apply_async((1,), max_duration=60)  # type: ignore[call-arg]
    with pytest.raises(InvalidArgumentType, match="It always runs the task; use apply_async"):
        scenarios.echo.apply((1,), deadline=60)


def test_a_child_can_be_given_no_deadline() -> None:
    @durable
    def parent(ctx: ExecutionContext, how: str) -> Any:
        signature = scenarios.echo.s(1).set(deadline=5)
        return ctx.invoke("a", signature) if how == "invoke" else ctx.start("a", signature)

    for how in ("invoke", "start"):
        row = run(parent, how=how)
        assert row.status == "failed"
        assert 'has no option "deadline". It bounds a whole tree' in row.error_message
        assert not row.children.exists()


def test_a_task_of_a_canvas_has_the_deadline_of_its_signature() -> None:
    chain(scenarios.echo.s(value=1), scenarios.echo.si(value=2).set(deadline=30))()
    go_on()
    second = Execution.objects.get(payload__contains="2")
    assert 29 < seconds_after_creation(second) < 31


def test_a_second_call_with_the_key_changes_nothing() -> None:
    first = scenarios.echo.apply_async((1,), idempotency_key="k", deadline=100)
    before = reload(first).tree_deadline_at
    assert scenarios.echo.apply_async((1,), idempotency_key="k", deadline=5).id == first.id
    assert reload(first).tree_deadline_at == before


def test_a_debounced_call_begins_the_time_anew() -> None:
    first = bounded.apply_async(unique_key="k", debounce=40)
    advance(30)
    assert bounded.apply_async(unique_key="k", debounce=40, deadline=100).id == first.id
    row = reload(first)
    assert 89 < seconds_after_creation(row) < 110
    assert row.deadline_at == row.tree_deadline_at
    advance(41)
    assert reload(first).status == "waiting"
    advance(20)
    assert reload(first).status == "cancelled"


def test_a_schedules_executions_have_the_tasks_time() -> None:
    def tick(ctx: ExecutionContext) -> None:
        ctx.sleep("nap", 30)

    with scheduling() as scheduled:
        task = scheduled(tick, cron="0 * * * *", max_duration=10)
        sweeper.sweep(publish=False)
        clock.shift(HOUR)
        assert sweeper.sweep(publish=False) == {"schedules": 1}
        row = Execution.objects.get(task=task.name)
    assert abs(seconds_after_creation(row) - 10) < 0.01


# ---------------------------------------------------------------------------------------------- wherever the tree is


def test_a_tree_that_is_in_time_keeps_its_result_and_is_left_alone() -> None:
    result = bounded.apply_async(kwargs={"seconds": 30})
    advance(31)
    advance(100)
    row = reload(result)
    assert (row.status, row.cancel_reason) == ("succeeded", "")
    assert not transitions.end_late(row.pk)


def test_a_queued_root_ends_at_its_deadline_and_never_starts() -> None:
    result = scenarios.echo.apply_async((1,), countdown=100, deadline=30)
    advance(31)
    row = reload(result)
    assert (row.status, row.cancel_reason, row.fence, count("body")) == ("cancelled", over(row), 0, 0)


def test_a_root_past_its_deadline_is_not_claimed_before_a_sweeper_has_looked() -> None:
    late = queued(deadline=-1)
    assert transitions.claim(late.pk, "test@host/1") is None


def test_waiting_roots_end_with_all_below_them() -> None:
    @durable
    def middle(ctx: ExecutionContext) -> None:
        ctx.sleep("nap", 3_600)

    @durable
    def top(ctx: ExecutionContext) -> None:
        ctx.map("each", middle, [{}] * 3)

    result = top.apply_async(deadline=30)
    advance(31)
    rows = Execution.objects.order_by("depth")
    assert [row.status for row in rows] == ["cancelled"] * 4
    assert rows[0].cancel_reason == over(reload(result))
    assert {row.cancel_reason for row in rows[1:]} == {"its parent was cancelled"}


def test_a_root_in_a_retry_pause_ends() -> None:
    @durable(max_retries=3, retry_backoff=False, default_retry_delay=1_000)
    def fails(ctx: ExecutionContext) -> None:
        raise ValueError

    result = fails.apply_async(deadline=30)
    go_on()
    assert (reload(result).status, reload(result).attempt) == ("queued", 2)
    advance(31)
    row = reload(result)
    assert (row.status, row.cancel_reason) == ("cancelled", over(row))


def test_a_held_root_ends() -> None:
    result = scenarios.echo.apply_async((1,), deadline=30)
    api.hold(result, reason="bank incident")
    advance(31)
    assert reload(result).status == "cancelled"


def test_a_parked_root_ends() -> None:
    @durable(limits=[Limit("deadline-limit", 1, holds="open")])
    def limited(ctx: ExecutionContext, seconds: float) -> None:
        ctx.sleep("nap", seconds)

    first = limited.delay(seconds=3_600)
    go_on()
    second = limited.apply_async(kwargs={"seconds": 1}, deadline=30)
    go_on()
    assert reload(second).is_parked
    advance(31)
    assert [reload(result).status for result in (first, second)] == ["waiting", "cancelled"]


def test_one_that_waits_for_the_end_of_another_one_with_its_key_ends() -> None:
    first = scenarios.naps.apply_async(kwargs={"seconds": 3_600}, unique_key="k")
    go_on()
    later = scenarios.naps.apply_async(kwargs={"seconds": 1}, unique_key="k", debounce=5, deadline=30)
    advance(31)
    assert [reload(result).status for result in (first, later)] == ["waiting", "cancelled"]


def test_a_running_root_is_flagged_and_its_body_meets_it() -> None:
    run = running(deadline=30)
    assert sweeper.sweep(publish=False) == {}
    clock.shift(dt.timedelta(seconds=31))
    assert sweeper.sweep(publish=False, reclaim=False) == {"deadlines": 1}
    assert sweeper.sweep(publish=False, reclaim=False) == {}
    row = fresh(run)
    assert (row.status, row.cancel_reason) == (ExecutionStatus.RUNNING, over(row))
    transitions.cancel_running(run)
    assert fresh(run).status == ExecutionStatus.CANCELLED


def test_a_result_that_a_body_returns_too_late_is_kept_for_a_retry() -> None:
    late = running(deadline=30)
    clock.shift(dt.timedelta(seconds=31))
    sweeper.sweep(publish=False, reclaim=False)
    transitions.cancel_running(late, result='"done"')
    api.retry(late)
    assert (fresh(late).status, fresh(late).get_result()) == ("succeeded", "done")


def test_what_was_asked_to_end_before_keeps_its_reason() -> None:
    run = running(deadline=30)
    api.cancel(run, reason="no stock")
    clock.shift(dt.timedelta(seconds=31))
    assert sweeper.sweep(publish=False, reclaim=False) == {}
    assert fresh(run).cancel_reason == "no stock"


def test_the_deadline_is_the_roots_and_a_childs_task_has_none_of_its_own() -> None:
    result = parent_of_bounded.apply_async(deadline=90)
    go_on()
    below = child(reload(result), "child")
    assert (below.tree_deadline_at, below.max_duration) == (None, None)
    advance(61)
    assert fresh(below).status == "waiting"
    advance(30)
    assert (reload(result).status, fresh(below).status) == ("cancelled", "cancelled")


def test_an_eager_run_ends_at_its_deadline() -> None:
    result = bounded.apply()
    assert result.state == "REVOKED"
    assert bounded.apply(kwargs={"seconds": 30}).get() == "rested"


def test_an_eager_run_leaves_other_trees_to_the_workers() -> None:
    other = running(deadline=30)
    Execution.objects.filter(pk=other.pk).update(tree_deadline_at=in_seconds(-1))
    assert bounded.apply().state == "REVOKED"
    assert fresh(other).cancel_requested_at is None


# ----------------------------------------------------------------------------------------------------------- run again


def test_an_operators_retry_has_the_tasks_time_again() -> None:
    result = bounded.apply_async(deadline=10)
    advance(11)
    api.retry(result)
    row = reload(result)
    assert row.tree_deadline_at is not None
    assert 40 < (row.tree_deadline_at - clock.read("default")).total_seconds() <= 60
    advance(50)
    assert reload(result).status == "waiting"
    advance(11)
    row = reload(result)
    assert (row.status, row.cancel_reason) == ("cancelled", over(row))


def test_an_operators_retry_forgets_a_deadline_of_the_calls_own() -> None:
    result = scenarios.naps.apply_async(kwargs={"seconds": 100}, deadline=30)
    advance(31)
    api.retry(result)
    assert reload(result).tree_deadline_at is None
    advance(200)
    assert api.get_result(result, timeout=0) == "rested"


def test_a_retry_before_the_deadline_has_the_tasks_time_as_well() -> None:
    @durable(max_duration=60, max_retries=0)
    def fails(ctx: ExecutionContext) -> None:
        raise ValueError

    result = fails.delay()
    advance(30)
    assert reload(result).status == "failed"
    before = reload(result).tree_deadline_at
    api.retry(result)
    after = reload(result).tree_deadline_at
    assert before is not None
    assert after is not None
    assert 29 < (after - before).total_seconds() < 60


@pytest.mark.parametrize("how", ["rerun", "fork"])
def test_what_is_run_again_as_new_has_the_tasks_time_and_not_the_calls(how: str) -> None:
    result = bounded.apply_async(deadline=10)
    advance(11)
    created = api.rerun(result) if how == "rerun" else api.fork(result, before="nap")
    assert abs(seconds_after_creation(reload(created)) - 60) < 1
    assert reload(created).max_duration == 60
    alone = scenarios.naps.apply_async(kwargs={"seconds": 100}, deadline=10)
    advance(11)
    assert reload(api.rerun(alone)).tree_deadline_at is None


# ------------------------------------------------------------------------------------------------------------ the body


def test_a_body_is_told_of_the_deadline_of_its_tree() -> None:
    @durable
    def tells(ctx: ExecutionContext) -> str:
        return str(ctx.deadline)

    @durable
    def asks(ctx: ExecutionContext) -> list[str]:
        return [str(ctx.deadline), ctx.invoke("below", tells)]

    result = asks.apply_async(deadline=30)
    go_on()
    assert api.get_result(result, timeout=0) == [str(reload(result).tree_deadline_at)] * 2
    result = asks.delay()
    go_on()
    assert api.get_result(result, timeout=0) == ["None", "None"]
    at = dt.datetime(2026, 12, 1, tzinfo=dt.UTC)
    assert run_body(tells, deadline=at) == str(at)
    assert run_body(tells) == "None"


def test_without_a_deadline_no_statement_of_a_call_and_a_run_computes_or_changes_one() -> None:
    with CaptureQueriesContext(connection) as queries:
        execution = queued()
        transitions.succeed(claimed(execution), "1")
    writes = [query["sql"] for query in queries if query["sql"].startswith(("UPDATE", "WITH"))]
    assert writes
    assert not [sql for sql in writes if "tree_deadline_at" in sql]


# -------------------------------------------------------------------------------------------------------------- shown


def test_pages_and_commands_tell_of_it(admin_user: User, client: Client) -> None:
    result = parent_of_bounded.apply_async(deadline=dt.timedelta(hours=2))
    go_on()
    client.force_login(admin_user)
    for row in (reload(result), child(reload(result), "child")):
        found = story.read(row.pk, preview=None)
        assert found is not None
        assert "It will be cancelled at " in str(headline(found.situation))
        assert "the deadline of its tree: it is cancelled" in [moment.text for moment in history(found)]
        assert "deadline of its tree" in told("show", row.pk).out
        assert told("show", row.pk, "--json").json["execution"]["tree_deadline_at"] is not None
        page = client.get(f"/admin/conductor_app/execution/{row.pk}/change/", follow=True).content.decode()
        assert "deadline of its tree" in page
    clock.shift(dt.timedelta(hours=2, seconds=1))
    found = story.read(reload(result).pk, preview=None)
    assert found is not None
    assert "it is cancelled at the next sweep." in str(headline(found.situation))
    go_on()
    assert "will be cancelled" not in told("show", result.id).out


def test_a_deadline_on_which_no_sweeper_has_acted_is_stuck() -> None:
    running(deadline=30)
    clock.shift(dt.timedelta(hours=1))
    assert "1 open past the deadline of their tree" in told("doctor").out


def test_a_worker_wakes_for_the_next_deadline() -> None:
    assert sweeper.due_in(60) is None
    running(deadline=30)
    found = sweeper.due_in(60)
    assert found is not None
    assert 28 < found <= 30
    assert sweeper.due_in(10) is None


def test_what_a_sweeper_that_died_has_left_half_done_the_next_one_ends() -> None:
    root = running(deadline=30)
    below = invoke(root)
    clock.shift(dt.timedelta(seconds=31))
    assert transitions.end_late(root.pk)
    assert not transitions.end_late(root.pk)
    assert sweeper.sweep(publish=False, reclaim=False) == {"cancelled": 2}
    assert [fresh(row).status for row in (root, below)] == ["cancelled"] * 2
