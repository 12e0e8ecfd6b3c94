"""Eager runs: ``.apply()`` and Celery's eager mode run one tree, and nothing that they do reaches another."""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import current_app, shared_task
from django.core.management import call_command
from django.db import connection, transaction
from django.db.models import F

from conductor_app import ExecutionContext, api, testing, transitions
from conductor_app.exceptions import BlockingCallInTask, NotATestDatabase
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store import clock, eager
from conductor_app.store.ids import new_root_id
from conductor_app.testing import driving
from conductor_app.transitions import AwaitEvent, dispatch
from tests.app import scenarios
from tests.support.bodies import class_name, durable, failure, reload, start
from tests.support.deliveries import deliver, doorbell
from tests.support.executions import (
    FAILURE,
    claimed,
    family,
    fresh,
    invoke,
    mapping,
    napping,
    queued,
    running,
    starting,
)
from tests.support.process import note_published

pytestmark = pytest.mark.django_db

HOUR = dt.timedelta(hours=1)


def rows() -> dict[str, list[dict[str, Any]]]:
    """All rows of all four tables."""
    return {
        model.__name__: list(model.objects.order_by("pk").values())
        for model in (Execution, Step, FailedExecution, Event)
    }


def others(count: int) -> None:
    """Executions of others, as many as asked for: all that is due now or within an hour, and more."""
    for in_seconds in (0, 3_000):
        napping(in_seconds)  # a sleep
        waiting = running()
        assert transitions.suspend(waiting, AwaitEvent("approved", "approval", timeout=in_seconds or 1e-6))
        transitions.send(waiting.pk, "another", '"early"')
        family(timeout=in_seconds)
        queued(countdown=in_seconds)
        queued(countdown=3_600, expires=in_seconds)
        transitions.retry_later(running(), FAILURE, in_seconds)
        invoke(running(), timeout=in_seconds)
    mapping(5, max_parallel=2, timeout=3_000)
    starting(2)
    for execution in (queued(), napping()):
        transitions.request_cancel(execution.pk, "flagged")
    told = queued(options='{"announce":true,"ignore_result":false}')
    transitions.succeed(claimed(told), "1")
    Execution.objects.filter(pk=told.pk).update(announce_at=F("finished_at"))
    transitions.fail(running(), FAILURE)
    Execution.objects.filter(pk=running().pk).update(lease_expires_at=clock.after(-60))
    _multiply(count)


def _multiply(count: int) -> None:
    """Copy trees until there are so many executions."""
    trees = [
        list(Execution.objects.filter(root_id=pk).order_by("depth"))
        for pk in Execution.objects.filter(parent=None).values_list("pk", flat=True)
    ]
    while Execution.objects.count() < count:
        for tree in trees:
            ids = {execution.pk: new_root_id() for execution in tree}
            events = list(Event.objects.filter(execution_id__in=ids))
            steps = list(Step.objects.filter(execution_id__in=ids))
            for execution in tree:
                copy = fresh(execution)
                copy.pk, copy.root_id, copy.parent_id = ids[copy.pk], ids[copy.root_id], ids.get(copy.parent_id)
                copy.save(force_insert=True)
            for step in steps:
                step.pk, step.execution_id, step.child_id = None, ids[step.execution_id], ids.get(step.child_id)
                step.save(force_insert=True)
            for event in events:
                event.pk, event.execution_id = None, ids[event.execution_id]
                event.save(force_insert=True)


@durable(max_retries=2, default_retry_delay=600, retry_backoff=False)
def takes_hours(ctx: ExecutionContext) -> Any:
    """Sleep, be late for an event and for a child, and fail once."""
    ctx.sleep("nap", 7_200)
    if ctx.attempt == 1:
        raise ConnectionError("once")
    with contextlib.suppress(TimeoutError):
        ctx.wait_for("approval", "approved", timeout=7_200)
    return ctx.map("three", scenarios.echo, [{"value": n} for n in range(3)], max_parallel=1)


@pytest.fixture
def always_eager() -> Iterator[None]:
    current_app.conf.task_always_eager = True
    yield
    current_app.conf.task_always_eager = False


def _by_apply() -> Any:
    return takes_hours.apply()


def _by_delay() -> Any:
    current_app.conf.task_always_eager = True
    try:
        return takes_hours.delay()
    finally:
        current_app.conf.task_always_eager = False


@pytest.mark.parametrize("run", [_by_apply, _by_delay])
def test_an_eager_run_changes_no_row_of_another_tree(run: Any) -> None:
    others(1_000)
    before = rows()
    assert len(before["Execution"]) >= 1_000
    result = run()
    assert result.get() == [0, 1, 2]
    tree = list(Execution.objects.filter(root_id=result.id).values_list("pk", flat=True))
    assert len(tree) == 4
    Step.objects.filter(execution_id__in=tree).delete()
    Execution.objects.filter(pk__in=tree, parent__isnull=False).delete()
    Execution.objects.filter(pk=result.id).delete()
    assert rows() == before


def test_an_eager_run_that_fails_or_waits_for_ever_changes_no_other_row_either() -> None:
    others(30)
    before = rows()

    @durable
    def waits(ctx: ExecutionContext) -> Any:
        ctx.sleep("nap", 7_200)
        ctx.wait_for("approval", "approved")

    with pytest.raises(RuntimeError, match="nothing in its tree is due"):
        waits.apply()
    assert clock.interval(0) == dt.timedelta()
    Step.objects.filter(execution__task=waits.name).delete()
    Execution.objects.filter(task=waits.name).delete()
    assert rows() == before


def seconds_ahead(instant: dt.datetime) -> float:
    return (instant - clock.read("default")).total_seconds()


def ahead(act: Any) -> Any:
    """Call a function in a body whose clock is two hours ahead, and return what it returned."""
    found: list[Any] = []

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> None:
        ctx.sleep("nap", 7_200)
        found.append(act())

    body.apply(throw=True)
    return found[0]


def test_what_a_body_does_to_other_trees_gets_the_databases_own_time() -> None:
    waits, nap, later = napping(), napping(3_600), queued(countdown=3_600)

    def act() -> list[Any]:
        api.cancel(waits)
        api.wake(nap)
        api.wake(later)
        new = scenarios.echo.apply_async((1,), countdown=60, expires=120)
        return [fresh(waits), fresh(nap), fresh(later), reload(new)]

    cancelled, woken, hastened, new = ahead(act)
    assert abs(seconds_ahead(cancelled.finished_at)) < 60
    assert abs(seconds_ahead(woken.due_at)) < 60
    assert abs(seconds_ahead(hastened.due_at)) < 60
    assert abs(seconds_ahead(new.created_at)) < 60
    assert abs(seconds_ahead(new.due_at) - 60) < 60
    assert abs(seconds_ahead(new.deadline_at) - 120) < 60
    assert reload(new).status == "queued"


def test_what_a_body_sweeps_or_drains_is_by_the_databases_own_time() -> None:
    nap, expires = napping(3_600), queued(countdown=7_200, expires=3_600)

    def act() -> None:
        call_command("conductor", "sweep", verbosity=0)
        testing.drain()
        call_command("conductor", "prune", "--older-than=1h")

    done = queued()
    transitions.succeed(claimed(done), "1")
    ahead(act)
    assert (fresh(nap).status, fresh(expires).status) == ("waiting", "queued")
    assert Execution.objects.filter(pk=done.pk).exists()


def test_what_a_body_starts_is_published_and_its_own_tree_is_not(django_capture_on_commit_callbacks: Any) -> None:
    published = note_published()
    other = napping()

    @durable
    def body(ctx: ExecutionContext) -> Any:
        started = ctx.step("start", lambda: scenarios.echo.delay(1).id)
        ctx.step("wake", lambda: api.wake(other))
        ctx.invoke("child", scenarios.echo)
        return started

    with django_capture_on_commit_callbacks(execute=True):
        result = body.apply()
    assert [str(pk) for pk in published] == [result.get(), str(other.pk)]
    assert reload(result.get()).status == "queued"


def test_a_tree_that_an_eager_tree_runs_eagerly_has_a_clock_of_its_own() -> None:
    @durable
    def inner(ctx: ExecutionContext) -> Any:
        before = ctx.step("before", lambda: clock.interval(0).total_seconds())
        ctx.sleep("nap", 3_600)
        return [before, clock.interval(0).total_seconds()]

    @durable
    def outer(ctx: ExecutionContext) -> Any:
        ctx.sleep("nap", 7_200)
        return [*inner.apply().get(), clock.interval(0).total_seconds()]

    before, inside, after = outer.apply().get()
    assert before == 0
    assert 3_590 < inside < 3_601 < 7_190 < after < 7_201
    assert clock.interval(0) == dt.timedelta()


def test_no_other_thread_sees_what_an_eager_run_has_skipped() -> None:
    def act() -> Any:
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append((clock.interval(0), dispatch.is_inline())))
        thread.start()
        thread.join()
        return [*seen, (clock.interval(0) > HOUR, dispatch.is_inline())]

    assert ahead(act) == [(dt.timedelta(), False), (True, True)]


def test_a_lease_ends_by_the_clock_of_those_who_judge_it() -> None:
    """A shell that is killed in the middle is found out after a lease, and not after what it has skipped."""
    ends_at = ahead(lambda: Execution.objects.get(status="running").lease_expires_at)
    assert abs(seconds_ahead(ends_at)) < 60


# ----------------------------------------------------------------------------------------------------- inside of bodies


def test_apply_inside_a_body_that_a_worker_runs_is_refused() -> None:
    @durable
    def outer(ctx: ExecutionContext) -> Any:
        return scenarios.echo.apply((1,)).get()

    @durable
    def in_a_step(ctx: ExecutionContext) -> Any:
        return ctx.step("inner", lambda: scenarios.echo.apply((1,)).get())

    for task in (outer, in_a_step):
        result = task.delay()
        deliver(doorbell(reload(result)))
        found = failure(reload(result))
        assert found.error_class == class_name(BlockingCallInTask)
        assert found.message.endswith("Use ctx.invoke.")
    assert not Execution.objects.filter(task=scenarios.echo.name).exists()


def test_apply_inside_a_plain_task_runs_that_tree_alone() -> None:
    @shared_task(name="tests.plain_that_applies", shared=False)
    def plain() -> Any:
        return takes_hours.apply().get()

    others(30)
    waiting = set(Execution.objects.values_list("pk", "status", "due_at"))
    assert current_app.tasks["tests.plain_that_applies"].apply().get() == [0, 1, 2]
    assert waiting <= set(Execution.objects.values_list("pk", "status", "due_at"))


def test_the_kit_still_runs_bodies_that_apply() -> None:
    @durable
    def outer(ctx: ExecutionContext) -> Any:
        return scenarios.naps.apply((3_600,)).get()

    assert start(outer).get_result() == "rested"


# ------------------------------------------------------------------------------------------------- whose database is it


@pytest.fixture
def database_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "NAME", "shop")


@pytest.mark.parametrize("call", [testing.drain, lambda **options: testing.advance(7_200, **options)])
def test_the_kit_refuses_a_database_that_no_test_runner_has_made(call: Any, database_of_others: None) -> None:
    result = scenarios.echo.delay(1)
    nap = napping(3_600)
    before = rows()
    with pytest.raises(NotATestDatabase, match=r"any_database=True"):
        call()
    assert rows() == before
    assert clock.interval(0) == dt.timedelta()
    call(any_database=True)
    assert reload(result).status == "succeeded"
    clock.reset()
    assert fresh(nap).task == scenarios.echo.name


@pytest.mark.parametrize(
    ("name", "chosen", "is_one"),
    [
        ("shop", None, False),
        ("test_shop", None, True),
        ("test_shop_2", None, True),
        ("/srv/test_shop.sqlite3", None, True),
        ("/srv/shop.sqlite3", None, False),
        ("/tmp/x/mine.sqlite3", "/tmp/x/mine.sqlite3", True),
        ("/tmp/x/mine_1.sqlite3", "/tmp/x/mine.sqlite3", True),
        ("mine_gw0", "mine", True),
        ("shop", "mine", False),
        (":memory:", None, True),
        ("file:memorydb_default?mode=memory&cache=shared", None, True),
    ],
)
def test_test_databases_are_known_by_their_names(
    name: str, chosen: str | None, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.settings_dict, "NAME", name)
    monkeypatch.setitem(connection.settings_dict, "TEST", {**connection.settings_dict["TEST"], "NAME": chosen})
    assert driving._is_test_database() == is_one


def test_outside_of_a_test_run_only_a_database_in_memory_is_a_test_database(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.test.utils import _TestState

    saved = _TestState.saved_data
    monkeypatch.delattr(_TestState, "saved_data")
    try:
        assert not driving._is_test_database()
        monkeypatch.setitem(connection.settings_dict, "NAME", ":memory:")
        assert driving._is_test_database()
    finally:
        _TestState.saved_data = saved


def test_outside_ends_where_it_began() -> None:
    root_id = new_root_id()
    assert (eager.runs(None), eager.runs(root_id)) == (False, False)
    with eager.running(root_id) as tree:
        tree.skipped = HOUR
        assert (eager.skipped(), eager.runs(None), eager.runs(root_id)) == (HOUR, True, True)
        with eager.outside():
            assert (eager.skipped(), eager.runs(None), eager.runs(root_id)) == (dt.timedelta(), False, True)
            with transaction.atomic(), eager.running(new_root_id()):
                assert (eager.skipped(), eager.runs(None), eager.runs(root_id)) == (dt.timedelta(), True, True)
        assert eager.skipped() == HOUR
    assert eager.skipped() == dt.timedelta()
