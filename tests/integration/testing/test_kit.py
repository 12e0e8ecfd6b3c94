"""The test kit, as a project's own tests use it."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import current_app
from django.core.management import call_command
from django.db import connection
from django.test import SimpleTestCase, TestCase, TransactionTestCase

from conductor_app import ExecutionContext, api, testing
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, UnknownTask
from conductor_app.models import Execution, Step, database
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.testing import Conductor, ConductorMixin, ConductorTestCase
from conductor_app.transitions import dispatch
from conductor_app.transitions.leases import LeaseKeeper
from tests.app import scenarios
from tests.support.bodies import child, durable, reload
from tests.support.executions import new, queued
from tests.support.process import note_published

pytestmark = pytest.mark.django_db


@durable(max_retries=2, retry_backoff=False, default_retry_delay=10)
def fails_twice(ctx: ExecutionContext) -> Any:
    if ctx.attempt < 3:
        raise ValueError(f"attempt {ctx.attempt}")
    return ctx.attempt


@durable
def waits_for_it(ctx: ExecutionContext, timeout: float | None = None) -> Any:
    try:
        return ctx.invoke("child", fails_twice, timeout=timeout)
    except TimeoutError:
        return "too late"


@durable(max_retries=0)
def fails(ctx: ExecutionContext) -> Any:
    raise LookupError("card declined")


@durable
def parent_of_failure(ctx: ExecutionContext) -> Any:
    return ctx.invoke("charge", fails)


# --------------------------------------------------------------------------------------------------- drain and advance


def test_drain_runs_what_is_due_and_counts_the_runs(conductor: Conductor) -> None:
    result = scenarios.pass_through.delay(value=1)
    assert conductor.drain() == 3  # the parent, its child, the parent again
    assert api.get_result(result, timeout=0) == 1
    assert conductor.drain() == 0


def test_drain_leaves_what_is_not_due(conductor: Conductor) -> None:
    later = scenarios.echo.apply_async(kwargs={"value": 1}, countdown=60)
    sleeping = scenarios.naps.delay(seconds=60)
    assert conductor.drain() == 1
    assert reload(later).status == "queued"
    conductor.assert_waiting(sleeping)


def test_drain_takes_an_app(conductor: Conductor) -> None:
    scenarios.echo.delay(value=1)
    assert conductor.drain(current_app._get_current_object()) == 1


def test_an_endless_loop_is_an_error_that_names_the_task(conductor: Conductor) -> None:
    @durable(max_retries=None, retry_backoff=False, default_retry_delay=0)
    def for_ever(ctx: ExecutionContext) -> None:
        raise ValueError("again")

    for_ever.delay()
    with pytest.raises(RuntimeError, match=rf"^20 runs, 20 of them of {for_ever.name}, and still not idle"):
        conductor.drain(max_runs=20)
    with pytest.raises(RuntimeError, match="still not idle"):
        conductor.advance(3_600, max_runs=20)


def test_a_task_that_is_not_registered_is_an_error(conductor: Conductor) -> None:
    queued(task="shop.tasks.gone")
    with pytest.raises(UnknownTask, match=r"is of shop\.tasks\.gone, which is not registered"):
        conductor.drain()


def test_advance_runs_what_becomes_due_and_nothing_later(conductor: Conductor) -> None:
    result = waits_for_it.delay()
    assert conductor.advance(9.5) == 2
    conductor.assert_waiting(result, step="child")
    assert conductor.advance(dt.timedelta(seconds=9)) == 1
    assert child(reload(result), "child").attempt == 3
    conductor.advance(10)
    conductor.assert_succeeded(result, result=3)


@pytest.mark.parametrize(("timeout", "expected"), [(15, "too late"), (30, 3), (5, "too late")])
def test_advance_goes_from_instant_to_instant_and_not_in_one_jump(
    timeout: float, expected: object, conductor: Conductor
) -> None:
    # The child needs 20 s of pauses. In one jump of an hour its timeout would win whatever its length.
    result = waits_for_it.delay(timeout=timeout)
    conductor.advance(3_600)
    conductor.assert_succeeded(result, result=expected)


def test_advance_ends_where_it_was_told_to(conductor: Conductor) -> None:
    before = clock.read(database())
    scenarios.naps.delay(seconds=30)
    conductor.advance(100)
    assert 100 <= (clock.read(database()) - before).total_seconds() < 110


def test_an_execution_that_expires_is_cancelled_on_the_way(conductor: Conductor) -> None:
    started = clock.read(database())
    result = scenarios.echo.apply_async(kwargs={"value": 1}, countdown=20, expires=10)
    conductor.advance(3_600)
    finished = conductor.assert_cancelled(result, reason="expired").finished_at
    assert finished is not None
    assert 10 <= (finished - started).total_seconds() < 15


def test_an_event_is_taken_by_the_next_drain_and_its_timeout_is_an_instant_too(conductor: Conductor) -> None:
    @durable
    def asks(ctx: ExecutionContext) -> Any:
        return ctx.wait_for("approval", "approved", timeout=60)

    answered, forgotten = asks.delay(), asks.delay()
    conductor.drain()
    conductor.assert_waiting(answered, step="approval")
    api.send_event(answered, "approved", {"by": "ann"})
    conductor.drain()
    conductor.assert_succeeded(answered, result={"by": "ann"})
    conductor.advance(59)
    conductor.assert_waiting(forgotten)
    conductor.advance(2)
    conductor.assert_failed(forgotten, error_class=TimeoutError, step="approval")


@pytest.mark.parametrize(("seconds", "error"), [(-1, InvalidArgument), ("5", InvalidArgumentType)])
def test_advance_takes_a_duration(seconds: Any, error: type[Exception], conductor: Conductor) -> None:
    with pytest.raises(error, match=r"^seconds of advance\(\) must be"):
        conductor.advance(seconds)


def test_a_run_in_a_tests_transaction_has_no_heartbeat_that_would_not_find_its_row(conductor: Conductor) -> None:
    @durable
    def lingers(ctx: ExecutionContext) -> bool:
        return bool(process.keeper._held)

    result = lingers.delay()
    conductor.drain()
    conductor.assert_succeeded(result, result=False)


# ----------------------------------------------------------------------------------------------------------- assertions


def test_the_assertions_accept_what_the_api_accepts_and_return_the_row(conductor: Conductor) -> None:
    result = scenarios.echo.delay(value=7)
    conductor.drain()
    row = Execution.objects.get()
    for reference in (result, row, row.pk, str(row.pk)):
        assert conductor.assert_succeeded(reference, result=7) == row
    with pytest.raises(Execution.DoesNotExist):
        conductor.assert_succeeded("01890000-0000-7000-8000-000000000000")


def test_a_result_is_compared_as_json_has_it(conductor: Conductor) -> None:
    result = scenarios.echo.delay(value={"a": (1, 2)})
    conductor.drain()
    conductor.assert_succeeded(result, result={"a": (1, 2)})
    conductor.assert_succeeded(result)
    with pytest.raises(AssertionError, match=r"succeeded with the result \{'a': \[1, 2\]\}, expected None"):
        conductor.assert_succeeded(result, result=None)


def test_a_failure_is_asserted_by_message_class_and_step(conductor: Conductor) -> None:
    result = parent_of_failure.delay()
    conductor.drain()
    conductor.assert_failed(result)
    conductor.assert_failed(result, message="card declined", error_class="ChildFailed", step="charge")
    failed = conductor.assert_invoked(result, "charge")
    for error_class in (LookupError, Exception, "LookupError", "builtins.LookupError"):
        conductor.assert_failed(failed, message="card declined", error_class=error_class)
    for wrong, text in [
        ({"message": "no money"}, "failed with the message 'card declined', expected 'no money' in it"),
        ({"error_class": KeyError}, "failed with builtins.LookupError, expected KeyError"),
        ({"error_class": "Error"}, "failed with builtins.LookupError, expected Error"),
        ({"step": "charge"}, 'failed by itself, not at a step, expected step "charge"'),
    ]:
        with pytest.raises(AssertionError, match=text):
            conductor.assert_failed(failed, **wrong)
    with pytest.raises(AssertionError, match='failed at step "charge", expected step "ship"'):
        conductor.assert_failed(result, step="ship")


def test_a_failed_assertion_says_what_the_execution_is_and_where_it_failed(conductor: Conductor) -> None:
    result = parent_of_failure.delay()
    conductor.drain()
    with pytest.raises(AssertionError) as caught:
        conductor.assert_succeeded(result)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{parent_of_failure.name} {result.id} is failed, expected succeeded."
    assert lines[1].startswith('✕ Failed at step "charge": Child execution failed: card declined → root cause Lookup')
    assert 'raise LookupError("card declined")' in str(caught.value)


def test_a_failed_assertion_about_an_open_execution_says_what_it_does(conductor: Conductor) -> None:
    result = waits_for_it.delay()
    with pytest.raises(AssertionError, match=r"(?s) is queued, expected waiting\.\n○ Queued"):
        conductor.assert_waiting(result)
    conductor.drain()
    with pytest.raises(
        AssertionError, match=r'(?s) is waiting, expected succeeded\.\n◐ Waiting for .*\(step "child"\)'
    ):
        conductor.assert_succeeded(result)
    with pytest.raises(AssertionError, match='waits for "child", expected step "other"'):
        conductor.assert_waiting(result, step="other")
    with pytest.raises(AssertionError, match="is waiting, expected cancelled"):
        conductor.assert_cancelled(result)
    api.cancel(result, "no stock")
    conductor.assert_cancelled(result, reason="no stock")
    with pytest.raises(AssertionError, match="was cancelled with 'Cancelled: no stock', expected 'late' in it"):
        conductor.assert_cancelled(result, reason="late")


@pytest.mark.parametrize(
    ("given", "same"),
    [({"value": (1,)}, {"value": [1]}), (5, 5), (scenarios.echo.s(value=3), {"value": 3}), (scenarios.echo.s(3), 3)],
)
def test_an_invocation_is_asserted_by_step_task_and_payload(given: Any, same: Any, conductor: Conductor) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        args = (given,) if hasattr(given, "task") else (scenarios.echo, given)
        return ctx.invoke("child", *args)

    result = body.delay()
    conductor.drain()
    for task in (scenarios.echo, scenarios.echo.name, None):
        assert conductor.assert_invoked(result, "child", task=task, payload=same).status == "succeeded"
    with pytest.raises(AssertionError, match='has invoked "child", not "other"'):
        conductor.assert_invoked(result, "other")
    with pytest.raises(
        AssertionError, match=rf'has invoked {scenarios.echo.name} as step "child", expected {fails.name}'
    ):
        conductor.assert_invoked(result, "child", task=fails)
    for wrong in ({"value": 99}, 99, None, {}):
        with pytest.raises(AssertionError, match=r'has invoked step "child" with \(.*\), expected'):
            conductor.assert_invoked(result, "child", payload=wrong)


def test_children_of_a_map_and_started_ones_are_asserted_too(conductor: Conductor) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        handle = ctx.start("aside", scenarios.echo, {"value": "x"})
        ctx.map("all", scenarios.echo, [{"value": number} for number in range(7)])
        ctx.gather(handle)

    result = body.delay()
    conductor.drain()
    conductor.assert_succeeded(result)
    assert conductor.assert_invoked(result, "aside", payload={"value": "x"}).position is None
    assert conductor.assert_invoked(result, "all", payload={"value": 5}).position == 5
    with pytest.raises(AssertionError, match=r"with \(value=0\), .*\(value=4\) and 2 more, expected \{'value': 9\}"):
        conductor.assert_invoked(result, "all", payload={"value": 9})
    with pytest.raises(AssertionError, match='has invoked "aside", "all", not "other"'):
        conductor.assert_invoked(result, "other")


def test_a_child_without_payload_has_none(conductor: Conductor) -> None:
    result = parent_of_failure.delay()
    conductor.drain()
    conductor.assert_invoked(result, "charge", payload=None)
    conductor.assert_invoked(result, "charge", payload={})


# ------------------------------------------------------------------------------------------------------ what is around


@pytest.fixture
def sent() -> list[Any]:
    """What is published, with a broker that others could hear."""
    return note_published()


def test_nothing_is_published_while_the_kit_is_in_use(
    sent: list[Any], conductor: Conductor, django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        result = scenarios.pass_through.delay(value=1)
        conductor.drain()
        conductor.advance(60)
        scenarios.echo.delay(value=1)
        conductor.advance(0.1)
        call_command("conductor", "sweep")
    assert sent == []
    conductor.assert_succeeded(result)


def test_it_is_published_without_the_kit(
    sent: list[Any], django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    with Conductor():
        pass
    with django_capture_on_commit_callbacks(execute=True):
        result = scenarios.echo.delay(value=1)
    assert [str(key) for key in sent] == [result.id]


def test_other_threads_publish_nothing_either(conductor: Conductor) -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(dispatch.is_inline()))
    thread.start()
    thread.join()
    assert seen == [True]


def test_the_clock_is_set_right_after_the_test() -> None:
    with Conductor() as conductor:
        conductor.advance(3_600)
        assert process.clock_offset > dt.timedelta(minutes=59)
    assert process.clock_offset == dt.timedelta()
    assert not dispatch.is_inline()


def test_no_thread_is_started(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread.name} was started")

    process.keeper = LeaseKeeper()
    monkeypatch.setattr(threading.Thread, "start", start)
    result = waits_for_it.delay(timeout=60)
    conductor.advance(120)
    conductor.assert_succeeded(result, result=3)


def test_a_rollback_takes_the_execution_with_it(conductor: Conductor) -> None:
    from django.db import transaction

    with pytest.raises(ValueError, match="no"), transaction.atomic():
        scenarios.echo.delay(value=1)
        raise ValueError("no")
    assert conductor.drain() == 0


def test_every_public_name_can_be_imported_and_is_a_method_of_the_kit_if_it_is_a_function() -> None:
    for name in testing.__all__:
        value = getattr(testing, name)
        if not isinstance(value, type):
            assert getattr(Conductor, name) is value, name
    with pytest.raises(AttributeError, match="no attribute 'drian'"):
        testing.drian  # noqa: B018


# ---------------------------------------------------------------------------------------------------------- test cases


class InTestCase(ConductorTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.result = waits_for_it.delay(timeout=60)

    def test_a_tree_runs_in_the_test_cases_transaction(self) -> None:
        assert connection.in_atomic_block
        self.conductor.advance(30)
        self.conductor.assert_succeeded(self.result, result=3)

    def test_nothing_is_left_of_the_other_test(self) -> None:
        assert Execution.objects.count() == 1
        assert process.clock_offset == dt.timedelta()

    def test_rows_of_this_test_are_visible_to_its_bodies(self) -> None:
        self.conductor.drain()
        assert Step.objects.get(execution_id=self.result.id).name == "child"


class InTransactionTestCase(ConductorMixin, TransactionTestCase):
    def test_a_tree_runs_with_real_commits(self) -> None:
        result = waits_for_it.delay(timeout=60)
        self.conductor.advance(30)
        self.conductor.assert_succeeded(result, result=3)


class InSimpleTestCase(ConductorMixin, SimpleTestCase):
    def test_a_body_needs_no_database(self) -> None:
        assert self.conductor.run(waits_for_it, children={"child": 5}) == 5


class InMixedTestCase(ConductorMixin, TestCase):
    def test_an_atomic_step_that_fails_undoes_its_writes_within_the_tests_transaction(self) -> None:
        def write() -> None:
            queued(**vars(new(task="shop.tasks.other")))
            raise ValueError("no")

        @durable
        def body(ctx: ExecutionContext) -> Any:
            ctx.atomic_step("write", write)

        with pytest.raises(ValueError, match="no"):
            self.conductor.run(body)
        assert not Execution.objects.exists()


@pytest.fixture
def eager() -> Iterator[None]:
    conf = current_app.conf
    before = conf.task_always_eager
    conf.task_always_eager = True
    yield
    conf.task_always_eager = before


def test_eager_mode_runs_the_same_tree_to_the_same_rows(eager: None, conductor: Conductor) -> None:
    result = waits_for_it.delay(timeout=15)
    conductor.assert_succeeded(result, result="too late")
    conductor.assert_cancelled(conductor.assert_invoked(result, "child"))
    failed = parent_of_failure.delay()
    conductor.assert_failed(failed, message="Child execution failed: card declined", step="charge")
    assert conductor.drain() == 0
