"""Children side by side: ``ctx.map``, ``ctx.start``, ``ctx.gather``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from django.test.utils import CaptureQueriesContext, override_settings

from conductor_app import ChildCancelled, ChildFailed, ChildTimedOut, ExecutionContext, api
from conductor_app.engine import sweeper
from conductor_app.exceptions import (
    InvalidArgument,
    InvalidArgumentType,
    NotSerializable,
    RetryRefused,
    StepMismatch,
    StepNameReused,
    TooManyChildren,
    UnknownTask,
)
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import dispatch
from tests.app import parallel
from tests.app.ledger import count
from tests.app.scenarios import echo, flaky
from tests.support import executions, invariants
from tests.support.bodies import advance, child, durable, failure, go_on, redeploy, reload, run, start
from tests.support.process import note_published

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@durable(max_retries=0)
def nap(ctx: ExecutionContext, seconds: float, fails: bool = False) -> float:
    """Sleep, then return the seconds or fail."""
    ctx.sleep("nap", seconds)
    if fails:
        raise ValueError(f"refused after {seconds:g}s")
    return seconds


def naps(*seconds: float, **options: Any) -> list[dict[str, Any]]:
    return [{"seconds": each, **options} for each in seconds]


def children(parent: Execution) -> list[str]:
    """The statuses of a parent's children, in the order of their payloads or names."""
    return list(Execution.objects.filter(parent=parent).order_by("position", "step").values_list("status", flat=True))


def step(execution: Execution, kind: StepKind = StepKind.MAP) -> Step:
    return Step.objects.get(execution=execution, kind=kind)


# ---------------------------------------------------------------------------------------------------------------- map


def test_results_come_in_the_order_of_the_payloads_whatever_the_order_of_the_ends() -> None:
    parent = durable(lambda ctx: ctx.map("naps", nap, naps(3, 1, 2)))
    assert run(parent).get_result() == [3, 1, 2]


def test_the_parent_is_woken_once() -> None:
    root = run(parallel.sum_of_squares, n=20)
    assert root.get_result() == {"sum": sum(n * n for n in range(20)), "runs": 2}
    assert count("body", root.pk) == 2
    assert (step(root).total, step(root).remaining) == (20, 0)
    assert invariants.violations() == []


def test_each_child_is_an_execution_with_its_place() -> None:
    root = run(parallel.sum_of_squares, n=3)
    rows = Execution.objects.filter(parent=root).order_by("position")
    assert [(row.step, row.position, row.depth, row.kwargs) for row in rows] == [
        ("squares", number, 1, {"n": number}) for number in range(3)
    ]
    assert len({row.pk for row in rows}) == 3
    assert all(row.pk.version == 8 for row in rows)


def test_every_value_comes_back_as_it_went_in() -> None:
    values = [None, 0, False, "", [], {}, Decimal("1.50"), dt.date(2026, 1, 2), (1, 2)]
    parent = durable(
        lambda ctx: [type(value).__name__ for value in ctx.map("echo", echo, [{"value": v} for v in values])]
    )
    assert run(parent).get_result() == ["NoneType", "int", "bool", "str", "list", "dict", "Decimal", "date", "list"]


def test_a_payload_that_is_no_mapping_is_the_only_argument() -> None:
    assert run(durable(lambda ctx: ctx.map("echo", echo, [1, "two", None]))).get_result() == [1, "two", None]


def test_a_generator_of_payloads_and_a_tasks_name() -> None:
    parent = durable(lambda ctx: ctx.map("echo", "tests.app.scenarios.echo", ({"value": n} for n in range(3))))
    assert run(parent).get_result() == [0, 1, 2]


def test_a_signature_gives_each_child_its_options_and_arguments() -> None:
    sig = echo.s(value="the signature's").set(headers={"x-tenant": "acme"}, queue="bulk", priority=3)
    root = run(durable(lambda ctx: ctx.map("echo", sig, [{"value": 1}, {}, None])))
    assert root.get_result() == [1, "the signature's", "the signature's"]
    rows = Execution.objects.filter(parent=root)
    assert {(row.queue, row.priority, row.get_options()["headers"]["x-tenant"]) for row in rows} == {
        ("bulk", 3, "acme")
    }
    # The call's own options win.
    other = run(durable(lambda ctx: ctx.map("echo", sig, [{}], queue="other")))
    assert [row.queue for row in Execution.objects.filter(parent=other)] == ["other"]
    assert run(durable(lambda ctx: ctx.map("nothing", sig, []))).get_result() == []


def test_a_payload_that_is_no_mapping_comes_before_a_signatures_arguments() -> None:
    pair = durable(lambda ctx, first, second: f"{first} {second}")
    assert run(durable(lambda ctx: ctx.map("pairs", pair.s("b"), ["a", "c"]))).get_result() == ["a b", "c b"]


@pytest.mark.parametrize(
    ("signature", "text"),
    [
        (echo.si(1), "got an immutable signature, which takes no payloads. Make it with .s()"),
        (echo.s() | echo.s(), "runs one task at a time"),
        (echo.s().set(task_id="01890000-0000-7000-8000-000000000000"), "has a task_id"),
        (echo.s().set(expire=5), "expire"),
    ],
)
def test_a_signature_that_cannot_be_mapped_is_refused_and_nothing_is_stored(signature: Any, text: str) -> None:
    root = run(durable(lambda ctx: ctx.map("echo", signature, [{"value": 1}]), max_retries=0))
    assert text in failure(root).message
    assert not Execution.objects.filter(parent=root).exists()


def test_no_payloads_give_no_results_and_the_step_is_remembered() -> None:
    root = run(parallel.sum_of_squares, n=0)
    assert root.get_result() == {"sum": 0, "runs": 1}
    assert (step(root).status, step(root).total) == (StepStatus.SUCCEEDED, 0)


def test_a_child_that_retries_is_waited_for() -> None:
    parent = durable(lambda ctx: ctx.map("flaky", flaky, [{"failures": 0}, {"failures": 2}]))
    assert run(parent).get_result() == [1, 3]


def test_maps_of_maps() -> None:
    root = run(parallel.tree, depth=3, width=3)
    assert root.get_result() == 27
    assert Execution.objects.count() == 1 + 3 + 9 + 27
    assert invariants.violations() == []


def test_two_maps_one_after_the_other() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[list[int]]:
        first = ctx.map("first", parallel.square, [{"n": 1}, {"n": 2}])
        return [first, ctx.map("second", parallel.square, [{"n": n} for n in first])]

    assert run(parent).get_result() == [[1, 4], [1, 16]]


# What fails


def test_the_first_failure_fails_the_parent_and_cancels_what_has_not_started() -> None:
    root = start(parallel.maps, payloads=[{"n": 1}, {"n": 2, "fails": True}, {"n": 3}, {"n": 4}])
    assert root.error_message == "Child execution failed: 2 is refused"
    assert children(root) == ["succeeded", "failed", "cancelled", "cancelled"]
    cancelled = Execution.objects.get(parent=root, position=2)
    assert cancelled.error_message == "Cancelled: its sibling squares[1] failed"
    found = failure(root)
    assert (found.step, found.root_cause) == ("squares", Execution.objects.get(parent=root, position=1))
    assert count("body", root.pk) == 2
    assert invariants.violations() == []


def test_siblings_that_have_started_go_on() -> None:
    parent = durable(lambda ctx: ctx.map("naps", nap, [*naps(5, 50), *naps(1, fails=True)]))
    root = start(parent)
    advance(2)
    assert reload(root).status == ExecutionStatus.FAILED
    assert children(root) == ["waiting", "waiting", "failed"]
    advance(60)
    assert children(root) == ["succeeded", "succeeded", "failed"]
    assert reload(root).error_message == "Child execution failed: refused after 1s"


def test_a_caught_failure_is_remembered() -> None:
    root = run(parallel.compensating_map, payloads=[{"n": 1}, {"n": 2, "fails": True}, {"n": 3}])
    assert root.get_result() == {"caught": "Child execution failed: 2 is refused", "after": 49}
    assert count("body", root.pk) == 3


def test_a_later_failure_does_not_change_what_was_caught() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        seen = []
        for name in ("a", "b"):
            try:
                ctx.map("naps", nap, [*naps(9, fails=True), *naps(1, fails=True)]) if name == "a" else ctx.sleep(
                    "s", 20
                )
            except ChildFailed as error:
                seen.append(str(error))
        return seen

    assert run(parent).get_result() == ["Child execution failed: refused after 1s"]


def test_exceptions_take_the_places_of_results() -> None:
    root = run(parallel.maps, payloads=[{"n": 1}, {"n": 2, "fails": True}, {"n": 3}], return_exceptions=True)
    assert root.get_result() == [1, "ChildFailed: Child execution failed: 2 is refused", 9]
    assert children(root) == ["succeeded", "failed", "succeeded"]
    assert step(root).status == StepStatus.SUCCEEDED


def test_an_exception_in_the_list_names_step_child_and_class() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        (error,) = ctx.map("boom", parallel.square, [{"n": 2, "fails": True}], return_exceptions=True)
        return [type(error).__name__, error.step, str(error.child_id), error.error_class]

    root = run(parent)
    assert root.get_result() == ["ChildFailed", "boom", str(child(root, "boom").pk), "builtins.ValueError"]


def test_a_cancelled_child_raises_child_cancelled_in_its_parent() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 9))))
    api.cancel(Execution.objects.get(parent=root, position=1), "not wanted")
    go_on()
    assert "was cancelled (step 'naps'): Cancelled: not wanted" in reload(root).error_message
    assert failure(root).error_class.endswith(".ChildCancelled")
    assert children(root) == ["waiting", "cancelled"]


def test_a_cancelled_child_among_returned_exceptions() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        return [type(value).__name__ for value in ctx.map("naps", nap, naps(5, 9), return_exceptions=True)]

    root = start(parent)
    api.cancel(Execution.objects.get(parent=root, position=1))
    advance(10)
    assert reload(root).get_result() == ["int", "ChildCancelled"]


def test_cancelling_the_parent_cancels_all_children() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 9), max_parallel=1)))
    assert children(root) == ["waiting", "queued"]
    api.cancel(root)
    assert reload(root).status == ExecutionStatus.CANCELLED
    assert children(root) == ["cancelled", "cancelled"]
    assert invariants.violations() == []


# Timeouts


def test_a_timeout_is_for_all_children_together() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 50, 60), timeout=10)))
    advance(6)
    advance(5)
    assert reload(root).error_message == "Child execution timed out after 10s (step 'naps')"
    assert failure(root).error_class.endswith(".ChildTimedOut")
    assert children(root) == ["succeeded", "cancelled", "cancelled"]
    assert invariants.violations() == []


def test_a_timeout_that_abandons_lets_the_children_go_on() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 50), timeout=10, on_timeout="abandon")))
    advance(11)
    assert reload(root).status == ExecutionStatus.FAILED
    assert children(root) == ["succeeded", "waiting"]
    advance(50)
    assert children(root) == ["succeeded", "succeeded"]


def test_a_late_child_stays_late_for_ever() -> None:
    """What is late is recorded with the timeout: an abandoned child's later success changes no replay."""

    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        values = ctx.map("naps", nap, naps(5, 50), timeout=10, on_timeout="abandon", return_exceptions=True)
        ctx.sleep("later", 100)
        return [str(value) for value in values]

    root = start(parent)
    advance(6)
    advance(5)
    advance(60)
    assert children(root) == ["succeeded", "succeeded"]
    advance(100)
    assert reload(root).get_result() == ["5", "Child execution timed out after 10s (step 'naps')"]


def test_the_timeout_counts_held_back_children_too() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 5, 5), timeout=7, max_parallel=1)))
    advance(6)
    advance(2)
    assert reload(root).status == ExecutionStatus.FAILED
    assert children(root) == ["succeeded", "cancelled", "cancelled"]


# In parallel


def test_no_more_than_max_parallel_are_in_flight_and_the_parent_is_not_woken_for_them() -> None:
    # Longer than the test takes by itself.
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(*[100] * 5), max_parallel=2)))
    seen = []
    while reload(root).status == ExecutionStatus.WAITING:
        seen.append(children(root).count("waiting"))
        assert children(root).count("queued") == Execution.objects.filter(parent=root, due_at=None).count()
        assert invariants.violations() == []
        advance(101)
    assert seen == [2, 2, 1]
    assert reload(root).get_result() == [100] * 5
    assert reload(root).fence == 2


@pytest.mark.parametrize("max_parallel", [3, 4])
def test_max_parallel_that_is_not_exceeded_holds_nothing_back(max_parallel: int) -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(60, 60, 60), max_parallel=max_parallel)))
    assert children(root) == ["waiting"] * 3


def test_a_held_back_child_that_is_cancelled_lets_nothing_go() -> None:
    body = durable(lambda ctx: len(ctx.map("naps", nap, naps(60, 60, 60), max_parallel=1, return_exceptions=True)))
    root = start(body)
    assert api.cancel(Execution.objects.get(parent=root, position=1))
    assert children(root) == ["waiting", "cancelled", "queued"]
    assert Execution.objects.get(parent=root, position=2).due_at is None
    advance(61)
    assert children(root) == ["succeeded", "cancelled", "waiting"]
    advance(61)
    assert reload(root).get_result() == 3


def test_a_failed_child_lets_the_next_one_go_if_exceptions_are_returned() -> None:
    root = run(
        parallel.maps,
        payloads=[{"n": n, "fails": n % 2 == 0} for n in range(5)],
        max_parallel=2,
        return_exceptions=True,
    )
    assert [isinstance(value, int) for value in root.get_result()] == [False, True, False, True, False]
    assert children(root) == ["failed", "succeeded", "failed", "succeeded", "failed"]


# -------------------------------------------------------------------------------------------------- start and gather


def test_different_children_run_side_by_side() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        one = ctx.start("one", parallel.square, {"n": 3})
        two = ctx.start("two", echo, {"value": "x"})
        three = ctx.start("three", "tests.app.scenarios.echo", {"value": None})
        assert one.execution_id is not None
        return ctx.gather(one, two, three)

    root = run(parent)
    assert root.get_result() == [9, "x", None]
    assert root.fence == 2
    assert invariants.violations() == []


def test_the_body_goes_on_while_started_children_run() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        slow = ctx.start("slow", nap, {"seconds": 10})
        quick = ctx.invoke("quick", echo, {"value": "meanwhile"})
        return [quick, *ctx.gather(slow)]

    root = start(parent)
    assert reload(child(root, "quick")).status == ExecutionStatus.SUCCEEDED
    assert reload(root).fence == 2
    advance(11)
    assert reload(root).get_result() == ["meanwhile", 10]
    assert reload(root).fence == 3


def test_a_started_child_does_not_wake_a_parent_that_waits_for_something_else() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        quick = ctx.start("quick", nap, {"seconds": 1})
        slow = ctx.invoke("slow", nap, {"seconds": 10})
        return [slow, *ctx.gather(quick)]

    root = start(parent)
    advance(2)
    assert (reload(root).status, reload(root).fence) == (ExecutionStatus.WAITING, 1)
    advance(10)
    assert reload(root).get_result() == [10, 1]
    assert reload(root).fence == 2


def test_what_is_gathered_is_remembered_on_replays() -> None:
    root = run(parallel.starts, payloads=[{"n": n} for n in range(4)])
    assert root.get_result() == [0, 1, 4, 9]
    assert Execution.objects.filter(parent=root).count() == 4
    assert count("body", root.pk) == 2


def test_handles_may_be_gathered_in_parts_in_any_order_and_twice() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        a, b, c = (ctx.start(name, nap, {"seconds": n}) for n, name in enumerate("abc", start=1))
        return [ctx.gather(c, a), ctx.gather(b), ctx.gather(c, a), ctx.gather(a, a), ctx.gather()]

    assert run(parent).get_result() == [[3, 1], [2], [3, 1], [1, 1], []]


def test_a_started_child_that_nobody_gathers_lives_on_when_its_parent_succeeds() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        ctx.start("slow", nap, {"seconds": 10})
        return "done"

    root = start(parent)
    assert reload(root).get_result() == "done"
    assert children(root) == ["waiting"]
    advance(11)
    assert children(root) == ["succeeded"]
    assert Step.objects.get(execution=root).status == StepStatus.SUCCEEDED
    assert reload(root).fence == 1


def test_a_started_child_is_cancelled_with_its_parent() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.start("slow", nap, {"seconds": 10})
        ctx.sleep("long", 100)

    root = start(parent)
    api.cancel(root)
    assert children(root) == ["cancelled"]


def test_the_first_failure_ends_the_wait_and_cancels_what_has_not_started() -> None:
    root = start(parallel.starts, payloads=[{"n": 1, "fails": True}, {"n": 2}, {"n": 3}], gathered=2)
    assert reload(root).error_message == "Child execution failed: 1 is refused"
    # The third child is not gathered, so it lives on.
    assert children(root) == ["failed", "cancelled", "succeeded"]
    assert failure(root).step == "child-0"
    assert invariants.violations() == []


def test_the_failure_of_the_only_child_that_is_left() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> None:
        quick = ctx.start("quick", nap, {"seconds": 1})
        slow = ctx.start("slow", nap, {"seconds": 5, "fails": True})
        ctx.gather(quick, slow)

    root = start(parent)
    advance(2)
    advance(4)
    assert (reload(root).error_message, children(root)) == (
        "Child execution failed: refused after 5s",
        ["succeeded", "failed"],
    )


def test_a_caught_failure_of_a_gather_is_the_same_on_every_replay() -> None:
    """When the wait ends only the second has failed; when the body runs again, the first has failed too."""

    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        handles = [ctx.start(f"n{n}", nap, {"seconds": n, "fails": True}) for n in (9, 1)]
        try:
            ctx.gather(*handles)
        except ChildFailed as error:
            caught = str(error)
        ctx.sleep("later", 20)
        return [caught, *map(str, ctx.gather(*handles, return_exceptions=True))]

    root = start(parent)
    advance(2)
    advance(10)
    advance(20)
    assert reload(root).get_result() == [
        "Child execution failed: refused after 1s",
        "Child execution failed: refused after 9s",
        "Child execution failed: refused after 1s",
    ]


def test_a_failure_before_the_gather_is_raised_at_the_gather() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        slow = ctx.start("slow", nap, {"seconds": 50})
        bad = ctx.start("bad", parallel.square, {"n": 2, "fails": True})
        ctx.sleep("a-while", 5)
        try:
            ctx.gather(slow, bad)
        except ChildFailed as error:
            caught = str(error)
        ctx.sleep("more", 5)
        return [caught]

    root = start(parent)
    advance(6)
    assert reload(root).fence == 2
    advance(6)
    assert reload(root).get_result() == ["Child execution failed: 2 is refused"]


def test_each_started_child_has_its_own_timeout() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        a = ctx.start("a", nap, {"seconds": 50}, timeout=5)
        b = ctx.start("b", nap, {"seconds": 8})
        return [str(value) for value in ctx.gather(a, b, return_exceptions=True)]

    root = start(parent)
    advance(6)
    assert (reload(root).status, children(root)) == (ExecutionStatus.WAITING, ["cancelled", "waiting"])
    advance(3)
    assert reload(root).get_result() == ["Child execution timed out after 5s (step 'a')", "8"]


def test_a_timeout_of_a_started_child_fails_the_gather() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.gather(ctx.start("a", nap, {"seconds": 50}, timeout=5), ctx.start("b", nap, {"seconds": 8}))

    root = start(parent)
    advance(6)
    assert failure(root).error_class.endswith(".ChildTimedOut")
    assert failure(root).step == "a"


# ----------------------------------------------------------------------------------------------- an operator's retry


def heal(task: Any) -> None:
    redeploy(task, lambda ctx, n, seconds=0.0, fails=False: n * n)


@pytest.fixture
def square() -> Any:
    """As ``parallel.square``, the test's own."""
    return durable(max_retries=0)(parallel.square.run)


def test_a_retry_runs_only_the_children_without_a_result(square: Any) -> None:
    payloads = [{"n": 1}, {"n": 2, "fails": True}, {"n": 3}, {"n": 4}]
    root = start(durable(lambda ctx: ctx.map("squares", square, payloads)))
    assert children(root) == ["succeeded", "failed", "cancelled", "cancelled"]
    heal(square)
    api.retry(root)
    assert reload(root).status == ExecutionStatus.WAITING
    go_on()
    assert reload(root).get_result() == [1, 4, 9, 16]
    fences = Execution.objects.filter(parent=root).order_by("position").values_list("fence", flat=True)
    assert list(fences) == [1, 2, 1, 1]
    assert not FailedExecution.objects.exists()
    assert invariants.violations() == []


def test_a_retry_keeps_to_max_parallel(square: Any) -> None:
    payloads = [{"n": n, "fails": n == 0} for n in range(5)]
    root = start(durable(lambda ctx: ctx.map("squares", square, payloads, max_parallel=2)))
    heal(square)
    api.retry(root)
    assert Execution.objects.filter(parent=root, status="queued", due_at=None).count() == 3
    go_on()
    assert reload(root).get_result() == [0, 1, 4, 9, 16]


def test_a_retry_takes_the_result_of_a_late_child() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 50), timeout=10, on_timeout="abandon")))
    advance(11)
    advance(60)
    api.retry(root)
    go_on()
    assert reload(root).get_result() == [5, 50]


def test_a_retry_waits_on_for_a_late_child_that_still_runs() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 15), timeout=10, on_timeout="abandon")))
    advance(11)
    api.retry(root)
    assert step(root).remaining == 1
    advance(5)
    assert reload(root).get_result() == [5, 15]


def test_a_retry_of_a_gather_runs_all_that_failed(square: Any) -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[int]:
        handles = [ctx.start(f"n{n}", square, {"n": n, "fails": n > 1}) for n in (1, 2, 3)]
        return ctx.gather(*handles)

    root = start(parent)
    assert children(root) == ["succeeded", "failed", "cancelled"]
    heal(square)
    api.retry(root)
    go_on()
    assert reload(root).get_result() == [1, 4, 9]
    assert invariants.violations() == []


def test_a_retry_of_a_cancelled_parent_goes_on_with_its_map() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(1, 2, 3), max_parallel=2)))
    api.cancel(root)
    api.retry(root)
    for _ in range(4):
        advance(3.1)
    assert reload(root).get_result() == [1, 2, 3]


def test_a_retry_is_refused_if_a_child_was_deleted(square: Any) -> None:
    root = start(durable(lambda ctx: ctx.map("squares", square, [{"n": 1}, {"n": 2, "fails": True}])))
    Execution.objects.filter(parent=root, position=0).delete()
    with pytest.raises(RetryRefused, match=r"A child of step 'squares' .* has been deleted"):
        api.retry(root)


# ------------------------------------------------------------------------------------------------------- bad input


def refused(call: Callable[[ExecutionContext], Any]) -> tuple[str, str]:
    """The class and the message with which a call fails its execution; nothing but the root is stored."""
    root = run(durable(call, max_retries=0))
    assert Execution.objects.count() == 1
    assert Step.objects.count() == 0
    found = failure(root)
    return found.error_class.rpartition(".")[2], found.message


@pytest.mark.parametrize(
    ("payloads", "error", "text"),
    [
        ({"n": 1}, InvalidArgumentType, 'ctx.map("m") needs a list of payloads, one per child, got dict'),
        ("abc", InvalidArgumentType, "got str"),
        (5, InvalidArgumentType, "got int. For one child use ctx.invoke."),
        (None, InvalidArgumentType, "got NoneType"),
        ([{"n": 1}, {"m": 2}], InvalidArgumentType, 'payloads[1] of ctx.map("m") does not fit'),
        ([{"n": 1}, {3: 2}], InvalidArgumentType, 'payloads[1] of ctx.map("m") has the key 3'),
        ([{"n": {1, 2}}], NotSerializable, 'payload["n"] is a set'),
    ],
)
def test_payloads_that_do_not_fit(payloads: Any, error: type, text: str) -> None:
    name, message = refused(lambda ctx: ctx.map("m", parallel.square, payloads))
    assert name == error.__name__
    assert text in message


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_parallel": 0}, InvalidArgument, "max_parallel must be ≥ 1, got 0; None is without limit"),
        ({"max_parallel": True}, InvalidArgumentType, "max_parallel must be int, got bool"),
        ({"max_parallel": 2.5}, InvalidArgumentType, "max_parallel must be int, got float"),
        ({"timeout": 0}, InvalidArgument, "timeout must be > 0 seconds, got 0"),
        ({"timeout": "30"}, InvalidArgumentType, "timeout must be a number of seconds or a timedelta, got str"),
        ({"on_timeout": "explode"}, InvalidArgument, 'on_timeout must be "cancel" or "abandon"'),
        ({"queue": 5}, InvalidArgumentType, "queue must be str, got int"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], error: type, text: str) -> None:
    name, message = refused(lambda ctx: ctx.map("m", parallel.square, [{"n": 1}], **options))
    assert name == error.__name__
    assert text in message


def test_too_many_payloads() -> None:
    with override_settings(CONDUCTOR={**settings.CONDUCTOR, "MAX_CHILDREN": 3}):
        assert run(parallel.sum_of_squares, n=3).get_result()["sum"] == 5
        Step.objects.all().delete()
        Execution.objects.filter(parent__isnull=False).delete()
        Execution.objects.all().delete()
        name, message = refused(lambda ctx: ctx.map("m", parallel.square, ({"n": n} for n in range(10**9))))
    assert name == TooManyChildren.__name__
    assert "got more than 3 payloads" in message


def test_a_child_that_is_none() -> None:
    assert refused(lambda ctx: ctx.map("m", "no.such.task", [1]))[0] == UnknownTask.__name__
    Execution.objects.all().delete()
    assert refused(lambda ctx: ctx.map("m", lambda: None, []))[0] == UnknownTask.__name__
    Execution.objects.all().delete()
    name, message = refused(lambda ctx: ctx.map("m", parallel.square.s(n=1), [1]))
    assert (name, "multiple values for argument 'n'" in message) == (InvalidArgumentType.__name__, True)


def test_handles_that_are_none() -> None:
    name, message = refused(lambda ctx: ctx.gather([]))
    assert name == InvalidArgumentType.__name__
    told = "takes the handles that ctx.start, ctx.event and ctx.timer return, got list. A list of them is passed as"
    assert f"{told} ctx.gather(*handles)." in message


def test_a_handle_of_another_run() -> None:
    kept: list[Any] = []

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        handle = ctx.start("a", nap, {"seconds": 1})
        kept.append(handle)
        ctx.sleep("s", 2)
        return ctx.gather(kept[0])

    root = start(parent)
    advance(3)
    assert 'The handle of step "a" is of another run or execution' in reload(root).error_message


def test_a_step_name_is_used_once() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        handle = ctx.start("a", echo, {"value": 1})
        return ctx.map("a", echo, [1]) if handle else None

    assert failure(run(parent)).error_class.endswith(StepNameReused.__name__)


@pytest.mark.parametrize(
    "changed",
    [
        lambda ctx: ctx.map("x", parallel.square, [{"n": 1}]),
        lambda ctx: ctx.invoke("x", echo, {"value": 1}),
        lambda ctx: ctx.gather(ctx.start("x", echo, {"value": 1})),
        lambda ctx: ctx.step("x", int),
    ],
)
def test_a_map_whose_code_has_changed(changed: Callable[[ExecutionContext], Any]) -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        ctx.map("x", nap, naps(5))

    root = start(parent)
    redeploy(parent, changed)
    advance(6)
    assert failure(root).error_class.endswith(StepMismatch.__name__)


def test_other_payloads_on_a_replay_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.map("x", nap, naps(5))

    root = start(parent)
    redeploy(parent, lambda ctx: ctx.map("x", nap, naps(5, 6)))
    advance(6)
    assert reload(root).get_result() == [5]
    assert 'Step "x" was recorded with another payload' in caplog.text


# ------------------------------------------------------------------------------------------------ what should not be


def test_a_deleted_child_does_not_leave_its_parent_waiting() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 50))))
    Execution.objects.filter(parent=root, position=1).delete()
    advance(6)
    assert reload(root).status == ExecutionStatus.WAITING
    assert sweeper.sweep(audit=True)["stranded"] == 1
    go_on()
    assert failure(root).error_class.endswith(ChildCancelled.__name__)


def test_children_that_are_held_back_for_nothing_are_let_go() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 5, 5), max_parallel=1)))
    Execution.objects.filter(parent=root, position=0).update(status="cancelled", finished_at=clock.now())
    assert sweeper.sweep(audit=True)["stranded"] == 1
    assert reload(root).status == ExecutionStatus.WAITING
    assert Execution.objects.filter(parent=root, due_at=None).count() == 1


def test_a_gather_of_ended_children_does_not_leave_its_parent_waiting() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        return [type(v).__name__ for v in ctx.gather(ctx.start("a", nap, {"seconds": 5}), return_exceptions=True)]

    root = start(parent)
    Execution.objects.filter(parent=root).delete()
    assert sweeper.sweep(audit=True)["stranded"] == 1
    go_on()
    assert reload(root).get_result() == [ChildCancelled.__name__]


def test_waiting_for_a_map_or_gather_is_not_stranded() -> None:
    start(durable(lambda ctx: ctx.map("naps", nap, naps(5, 50), max_parallel=1)))
    start(durable(lambda ctx: ctx.gather(ctx.start("a", nap, {"seconds": 5}))))
    assert "stranded" not in sweeper.sweep(audit=True)


# ------------------------------------------------------------------------------------------------------------- cost


def test_the_statements_of_a_child_do_not_depend_on_the_size_of_its_map() -> None:
    # Long naps, so that on a slow machine none ends before its time.
    cost: dict[int, int] = {}
    for size in (10, 20, 40):
        start(durable(lambda ctx, size=size: ctx.map("naps", nap, naps(*[600] * size))))
        clock.shift(dt.timedelta(seconds=601))
        with CaptureQueriesContext(connection) as queries:
            go_on()
        cost[size] = len(queries)
    assert cost[40] - cost[20] == 2 * (cost[20] - cost[10]), cost


def test_timed_out_children_are_cancelled_in_one_statement() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(*[5] * 40), timeout=3, max_parallel=1)))
    clock.shift(dt.timedelta(seconds=4))
    with CaptureQueriesContext(connection) as queries:
        sweeper.sweep(reclaim=False, publish=False)
    assert children(root).count("cancelled") >= 39
    assert len(queries) < 40
    with pytest.raises(ChildTimedOut):
        go_on()
        raise ChildTimedOut(reload(root).error_message)


def test_the_message_of_a_child_behind_many_others_is_not_taken_for_lost_so_soon(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """Published again while the queue is worked off, the copies would take as long as the work."""
    note_published()
    monkeypatch.setattr(dispatch, "REDISPATCH_CROWD", 10)
    _, children = executions.mapping(21)
    pauses = [(child.dispatch_at - child.created_at).total_seconds() for child in children if child.dispatch_at]
    pause = settings.CONDUCTOR["REDISPATCH_SECONDS"]
    assert [round(pauses[position] / pause, 1) for position in (0, 5, 10, 20)] == [1.0, 1.5, 2.0, 3.0]
