"""How failures travel: from an attempt to the next one, from a child to its parent, and what is remembered of them."""

from __future__ import annotations

import copy
import datetime as dt
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import ChildCancelled, ChildError, ChildFailed, ChildTimedOut, ConductorError, ExecutionContext
from conductor_app.exceptions import InvalidArgument, NotSerializable, ProgrammingError, RetryExecution
from conductor_app.models import Execution, FailedExecution
from conductor_app.states import StepStatus
from conductor_app.store import clock
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support.bodies import advance, child, class_name, durable, failure, reload, run, start

pytestmark = pytest.mark.django_db

LIMIT = 65_536


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


# ---------------------------------------------------------------------------------------------------- a child's failure


@pytest.mark.parametrize(
    ("message", "stored"),
    [
        ("card declined", "card declined"),
        ("", "ValueError"),
        (" ", " "),
        ("\n", "\n"),
        ("first line\nsecond line\r\n\tthird", "first line\nsecond line\r\n\tthird"),
        ("größe 🎉 \u2028", "größe 🎉 \u2028"),
        ("a\\x00b", "a\\x00b"),
        ("%s {} {0} <b>", "%s {} {0} <b>"),
        ("x" * 1_000_000, "x" * (LIMIT - 3) + "..."),
        ("ü" * 40_000, "ü" * ((LIMIT - 3) // 2) + "..."),
    ],
)
def test_a_childs_failure_reaches_every_ancestor_verbatim(message: str, stored: str) -> None:
    root = run(scenarios.grandparent_of_boom, message=message)
    middle = child(root, "sub")
    leaf = child(middle, "charge")

    def cut(text: str) -> str:
        raw = text.encode()
        return text if len(raw) <= LIMIT else raw[: LIMIT - 3].decode(errors="ignore") + "..."

    assert failure(leaf).message == leaf.error_message == stored
    assert failure(middle).message == middle.error_message == cut(f"Child execution failed: {stored}")
    assert failure(root).message == root.error_message == cut(f"Child execution failed: {failure(middle).message}")
    assert [row.status for row in (root, middle, leaf)] == ["failed"] * 3
    assert [failure(row).error_class for row in (root, middle, leaf)] == [
        class_name(ChildFailed),
        class_name(ChildFailed),
        "builtins.ValueError",
    ]
    assert [(failure(row).step, failure(row).root_cause_id) for row in (root, middle, leaf)] == [
        ("sub", leaf.pk),
        ("charge", leaf.pk),
        ("", None),
    ]


@pytest.mark.parametrize(
    ("make", "stored"),
    [
        (lambda: ValueError("a\x00b"), "a\\x00b"),
        (lambda: ValueError("\ud800"), "\\ud800"),
        (lambda: KeyError("order"), "'order'"),
        (lambda: ConnectionRefusedError(111, "Connection refused"), "[Errno 111] Connection refused"),
        (lambda: ExceptionGroup("both", [ValueError(1), KeyError(2)]), "both (2 sub-exceptions)"),
        (lambda: StopIteration("early"), "early"),
        (lambda: RecursionError("too deep"), "too deep"),
        (lambda: ValueError(object), "<class 'object'>"),
        (Unprintable, "Unprintable (its own text cannot be shown: str() of it fails)"),
    ],
)
def test_any_exception_of_a_child_can_be_stored(make: Any, stored: str) -> None:
    @durable(max_retries=0)
    def failing(ctx: ExecutionContext) -> None:
        raise make()

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("child", failing)

    root = run(parent)
    assert root.error_message == f"Child execution failed: {stored}"
    assert failure(child(root, "child")).error_class == class_name(type(make()))


def test_what_is_stored_of_a_failure() -> None:
    @durable(max_retries=1)
    def failing(ctx: ExecutionContext, password: str) -> None:
        ctx.step("fine", int)
        try:
            int(password)
        except ValueError:
            raise ConnectionError("the bank is away") from None

    execution = run(failing, password="s3cret")
    stored = failure(execution)
    assert (stored.task, stored.attempts, stored.error_class) == (failing.name, 2, "builtins.ConnectionError")
    assert (stored.message, stored.step, stored.root_cause) == ("the bank is away", "", None)
    assert stored.traceback.startswith("Traceback (most recent call last):\n")
    assert 'raise ConnectionError("the bank is away")' in stored.traceback
    assert stored.traceback.endswith("ConnectionError: the bank is away\n")
    assert "conductor_app/engine/" not in stored.traceback
    assert "s3cret" not in stored.traceback


def test_a_traceback_longer_than_its_limit_is_cut() -> None:
    @durable(max_retries=0)
    def failing(ctx: ExecutionContext) -> None:
        raise ValueError("x" * 1_000_000)

    assert len(failure(run(failing)).traceback) == LIMIT


def test_a_childs_failure_can_be_caught_and_is_the_same_on_every_replay() -> None:
    seen: list[tuple[Any, ...]] = []

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> str:
        try:
            ctx.invoke("charge", scenarios.boom, {"message": "card declined"})
        except ChildFailed as error:
            seen.append((type(error), str(error), error.step, error.child_id, error.error_class))
            ctx.step("compensate", note, None, "compensate")
        ctx.sleep("nap", 60)
        return ctx.invoke("after", scenarios.echo, {"value": "compensated"})

    root = run(parent)
    text = "Child execution failed: card declined"
    assert root.get_result() == "compensated"
    assert seen == [(ChildFailed, text, "charge", child(root, "charge").pk, "builtins.ValueError")] * 3
    assert count("compensate") == 1
    assert FailedExecution.objects.count() == 1


def test_a_childs_failure_fails_its_parent_at_once_however_many_retries_that_has() -> None:
    @durable(max_retries=5)
    def parent(ctx: ExecutionContext) -> None:
        note(ctx, "parent")
        ctx.invoke("charge", scenarios.boom)

    root = run(parent)
    assert (root.status, root.attempt, count("parent")) == ("failed", 1, 2)


def test_a_childs_failure_that_the_parent_turns_into_its_own_is_retried_like_any_other() -> None:
    @durable(max_retries=2)
    def parent(ctx: ExecutionContext) -> None:
        try:
            ctx.invoke("charge", scenarios.boom)
        except ChildFailed as error:
            raise RuntimeError("cannot charge") from error

    root = run(parent)
    assert (root.status, root.attempt, failure(root).message) == ("failed", 3, "cannot charge")
    assert child(root, "charge").fence == 1


def test_the_errors_of_a_child_are_told_apart_and_survive_pickling() -> None:
    assert issubclass(ChildTimedOut, TimeoutError)
    for cls in (ChildFailed, ChildTimedOut, ChildCancelled):
        assert issubclass(cls, ChildError)
        assert issubclass(cls, ConductorError)
        error = cls("Child execution …", step="charge", child_id=None, error_class="builtins.ValueError")
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert (type(twin), str(twin), twin.step, twin.error_class) == (
                cls,
                "Child execution …",
                "charge",
                "builtins.ValueError",
            )
    assert not issubclass(ChildFailed, TimeoutError)


# ------------------------------------------------------------------------------------------------------------ timeouts


@durable
def slow_child(ctx: ExecutionContext, seconds: float) -> str:
    ctx.sleep("work", seconds)
    return "done"


@pytest.mark.parametrize(
    ("timeout", "shown"), [(30, "30s"), (0.5, "0.5s"), (dt.timedelta(minutes=2), "120s"), (90_000, "90000s")]
)
def test_a_late_child_fails_its_parent_with_a_timeout_error(timeout: Any, shown: str) -> None:
    @durable(max_retries=3)
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("charge", slow_child, {"seconds": 10**6}, timeout=timeout)

    root = run(parent)
    text = f"Child execution timed out after {shown} (step 'charge')"
    assert (root.status, root.attempt, root.error_message) == ("failed", 1, text)
    assert (failure(root).error_class, failure(root).step) == (class_name(ChildTimedOut), "charge")
    late = child(root, "charge")
    assert (late.status, late.error_message) == ("cancelled", f"Cancelled: its parent's timeout of {shown} ended")
    assert not FailedExecution.objects.filter(execution=late).exists()


def test_a_timeout_can_be_caught_and_is_the_same_on_every_replay() -> None:
    seen = []

    @durable
    def parent(ctx: ExecutionContext) -> str:
        try:
            ctx.invoke("charge", slow_child, {"seconds": 100}, timeout=30)
        except TimeoutError as error:
            seen.append((type(error), str(error)))
        ctx.sleep("nap", 1_000)
        return "payment pending"

    root = run(parent)
    assert root.get_result() == "payment pending"
    assert seen == [(ChildTimedOut, "Child execution timed out after 30s (step 'charge')")] * 2


def test_a_timeout_counts_from_the_childs_creation_and_replays_do_not_extend_it() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        return ctx.invoke("charge", slow_child, {"seconds": 100}, timeout=30)

    root = start(parent)
    deadline = root.steps.get().deadline_at
    for _ in range(2):
        advance(10)
        # Wake the parent for nothing; it suspends again.
        Execution.objects.filter(pk=root.pk, status="waiting").update(
            status="queued", due_at=clock.now(), dispatch_at=clock.now()
        )
        advance(0)
        assert reload(root).status == "waiting"
        assert root.steps.get().deadline_at == deadline
    advance(11)
    assert reload(root).error_message == "Child execution timed out after 30s (step 'charge')"


def test_a_child_that_is_abandoned_goes_on_and_keeps_its_own_result() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        try:
            return ctx.invoke("charge", slow_child, {"seconds": 100}, timeout=30, on_timeout="abandon")
        except ChildTimedOut:
            return "gave up"

    root = start(parent)
    advance(31)
    assert reload(root).get_result() == "gave up"
    assert child(root, "charge").status == "waiting"
    advance(70)
    assert child(root, "charge").get_result() == "done"
    assert root.steps.get().status == StepStatus.TIMED_OUT
    assert reload(root).get_result() == "gave up"


def test_a_child_that_is_in_time_is_not_timed_out_later() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        result = ctx.invoke("charge", slow_child, {"seconds": 10}, timeout=30)
        ctx.sleep("nap", 100)
        return result

    root = run(parent)
    assert root.get_result() == "done"


def test_the_retries_of_a_child_count_towards_the_timeout() -> None:
    @durable(max_retries=None, retry_backoff=False, default_retry_delay=10)
    def failing(ctx: ExecutionContext) -> None:
        raise ConnectionError("down")

    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("charge", failing, timeout=35)

    root = run(parent)
    assert root.error_message == "Child execution timed out after 35s (step 'charge')"
    assert child(root, "charge").attempt == 5


# ------------------------------------------------------------------------------------------------- attempts and retries


def test_a_body_is_tried_four_times_by_default() -> None:
    @durable
    def failing(ctx: ExecutionContext) -> None:
        note(ctx, "body")
        raise ConnectionError(f"attempt {ctx.attempt}")

    execution = run(failing)
    assert (execution.status, execution.attempt, execution.max_attempts, count("body")) == ("failed", 4, 4, 4)
    assert (failure(execution).attempts, failure(execution).message) == (4, "attempt 4")


@pytest.mark.parametrize(
    ("options", "raised", "attempts"),
    [
        ({"max_retries": 0}, ConnectionError, 1),
        ({"max_retries": 1}, ConnectionError, 2),
        ({"autoretry_for": (ConnectionError,)}, ConnectionError, 4),
        ({"autoretry_for": (ConnectionError,)}, ConnectionResetError, 4),
        ({"autoretry_for": (ConnectionError,)}, ValueError, 1),
        ({"autoretry_for": ()}, ConnectionError, 1),
        ({"autoretry_for": [KeyError, ConnectionError]}, ConnectionError, 4),
        ({"dont_autoretry_for": (ValueError,)}, UnicodeError, 1),
        ({"dont_autoretry_for": (ValueError,)}, ConnectionError, 4),
        ({"autoretry_for": (OSError,), "dont_autoretry_for": (ConnectionError,)}, ConnectionResetError, 1),
        # An error that tells that the code has to change is never tried again, even if it is asked for.
        ({"autoretry_for": (ProgrammingError,)}, InvalidArgument, 1),
        ({"autoretry_for": (ChildFailed,)}, ChildFailed, 1),
        ({"autoretry_for": (Exception,)}, NotSerializable, 1),
    ],
)
def test_the_retry_options_decide_who_is_tried_again(options: Any, raised: type, attempts: int) -> None:
    @durable(**options)
    def failing(ctx: ExecutionContext) -> None:
        raise raised("no")

    execution = run(failing)
    assert (execution.status, execution.attempt) == ("failed", attempts)


def test_without_a_limit_a_body_is_tried_until_it_succeeds() -> None:
    @durable(max_retries=None)
    def failing(ctx: ExecutionContext) -> int:
        if ctx.attempt < 12:
            raise ConnectionError
        return ctx.attempt

    execution = run(failing)
    assert (execution.get_result(), execution.max_attempts, execution.error) == (12, None, None)


def delay_of(execution: Execution) -> float:
    return (reload(execution).due_at - clock.read("default")).total_seconds()


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({"retry_jitter": False}, [1, 2, 4]),
        ({"retry_jitter": False, "retry_backoff": 60}, [60, 120, 240]),
        ({"retry_jitter": False, "retry_backoff": 60, "retry_backoff_max": 100}, [60, 100, 100]),
        ({"retry_backoff": False}, [180, 180, 180]),
        ({"retry_backoff": False, "default_retry_delay": 5}, [5, 5, 5]),
    ],
)
def test_the_next_attempt_is_due_after_the_delay(options: Any, delays: list[float]) -> None:
    @durable(**options)
    def failing(ctx: ExecutionContext) -> None:
        raise ConnectionError("down")

    execution = start(failing)
    for attempt, delay in enumerate(delays, 1):
        execution = reload(execution)
        assert (execution.status, execution.attempt, execution.error_message) == ("queued", attempt + 1, "down")
        assert delay - 5 < delay_of(execution) <= delay
        advance(delay + 0.001)
    assert reload(execution).status == "failed"


def test_jitter_spreads_the_delay_from_nothing_to_the_whole() -> None:
    @durable(retry_backoff=600, max_retries=1)
    def failing(ctx: ExecutionContext) -> None:
        raise ConnectionError("down")

    delays = [delay_of(start(failing)) for _ in range(10)]
    assert all(-5 < delay <= 600 for delay in delays)
    assert len({round(delay) for delay in delays}) > 3


def test_a_body_may_ask_for_a_retry() -> None:
    @durable(autoretry_for=(), max_retries=2, retry_backoff=30, retry_jitter=False)
    def failing(ctx: ExecutionContext, how: str) -> Any:
        if ctx.attempt == 3:
            return "done"
        if how == "plain":
            raise ctx.retry()
        if how == "countdown":
            raise ctx.retry(countdown=3_600)
        if how == "timedelta":
            raise ctx.retry(countdown=dt.timedelta(days=1))
        if how == "exc":
            raise ctx.retry(exc=ConnectionError("asked"), countdown=0)
        try:
            raise KeyError("handled")
        except KeyError:
            raise ctx.retry(countdown=50) from None

    for how, delay, message in [
        ("plain", 60, "retry requested"),  # 30 s, and twice as long before the last attempt
        ("countdown", 3_600, "retry requested"),
        ("timedelta", 86_400, "retry requested"),
        ("handled", 50, "'handled'"),
    ]:
        execution = start(failing, how=how)
        assert (execution.status, execution.attempt, execution.error_message) == ("queued", 2, message)
        assert delay - 5 < delay_of(execution) <= delay or how == "plain"
        advance(delay)
        advance(delay)
        assert (reload(execution).get_result(), reload(execution).attempt) == ("done", 3)
    assert start(failing, how="exc").get_result() == "done"


@pytest.mark.parametrize(
    ("exc", "cls", "message"),
    [
        (ConnectionError("the bank is away"), ConnectionError, "the bank is away"),
        (None, RetryExecution, "ctx.retry() asked for another attempt, but attempt 2 was the last one."),
        (KeyboardInterrupt(), RetryExecution, "ctx.retry() asked for another attempt, but attempt 2 was the last one."),
    ],
)
def test_a_retry_that_no_attempt_is_left_for_fails_with_its_reason(exc: Any, cls: type, message: str) -> None:
    @durable(max_retries=1)
    def failing(ctx: ExecutionContext) -> None:
        raise ctx.retry(exc=exc, countdown=1)

    execution = run(failing)
    assert (execution.status, execution.attempt) == ("failed", 2)
    assert (failure(execution).error_class, failure(execution).message) == (class_name(cls), message)


def test_a_retry_may_be_asked_for_after_a_childs_failure() -> None:
    @durable(max_retries=1)
    def parent(ctx: ExecutionContext) -> None:
        try:
            ctx.invoke("charge", scenarios.boom)
        except ChildFailed as error:
            raise ctx.retry(exc=error, countdown=1) from error

    root = run(parent)
    assert (root.status, root.attempt, failure(root).step) == ("failed", 2, "charge")
    assert root.error_message == "Child execution failed: card declined"


def test_suspensions_use_up_no_attempt() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[int]:
        ctx.sleep("nap", 60)
        return [ctx.invoke(f"child-{index}", scenarios.echo, {"value": index}) for index in range(3)]

    root = run(parent)
    assert (root.get_result(), root.attempt, root.fence) == ([0, 1, 2], 1, 5)


def test_finished_children_are_not_run_again_by_the_next_attempt() -> None:
    @durable(max_retries=2)
    def parent(ctx: ExecutionContext) -> int:
        value = ctx.invoke("echo", scenarios.echo, {"value": 7})
        if ctx.attempt < 3:
            raise ConnectionError
        return value

    root = run(parent)
    assert (root.get_result(), root.attempt) == (7, 3)
    assert (root.children.count(), child(root, "echo").fence) == (1, 1)


# ----------------------------------------------------------------------------------------- results of the eager variant


def test_apply_returns_what_celery_would() -> None:
    succeeded = scenarios.echo.apply((5,))
    assert (succeeded.state, succeeded.get(), succeeded.successful()) == ("SUCCESS", 5, True)
    failed = scenarios.boom.apply(kwargs={"message": "card declined"})
    assert (failed.state, failed.failed()) == ("FAILURE", True)
    with pytest.raises(ValueError, match=r"^card declined$"):
        failed.get()
    parent = scenarios.parent_of_boom.apply()
    with pytest.raises(ChildFailed, match=r"^Child execution failed: card declined$"):
        parent.get()


@pytest.fixture
def eager() -> Iterator[Any]:
    from project.celery import app

    before = app.conf.task_always_eager, app.conf.task_eager_propagates
    app.conf.task_always_eager = True
    yield app.conf
    app.conf.task_always_eager, app.conf.task_eager_propagates = before


@pytest.mark.parametrize("propagates", [False, True])
def test_always_eager_runs_the_whole_tree_in_this_process(propagates: bool, eager: Any) -> None:
    eager.task_eager_propagates = propagates
    assert scenarios.pass_through.delay(value={"a": (1,)}).get() == {"a": [1]}
    assert scenarios.naps.delay(seconds=3_600).get() == "rested"
    assert scenarios.flaky.delay(failures=2).get() == 3
    if propagates:
        with pytest.raises(ChildFailed):
            scenarios.parent_of_boom.delay()
    else:
        assert scenarios.parent_of_boom.delay().state == "FAILURE"
    assert Execution.objects.count() == 6

    @durable
    def starts_another(ctx: ExecutionContext) -> Any:
        return ctx.step("other", lambda: scenarios.pass_through.delay(value=1).get())

    assert starts_another.delay().get() == 1
