"""Waits that not all of their members decide: ``need``, ``max_failures``; looks at handles without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import ChildCancelled, ChildFailed, ExecutionContext, api
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from tests.support import invariants
from tests.support.bodies import advance, durable, failure, go_on, reload, run, start

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@durable(max_retries=0)
def nap(ctx: ExecutionContext, seconds: float, fails: bool = False) -> float:
    """Sleep, then return the seconds or fail."""
    ctx.sleep("nap", 100 * seconds)
    if fails:
        raise ValueError(f"refused after {seconds:g}s")
    return seconds


def naps(*seconds: float) -> list[dict[str, Any]]:
    """Payloads of naps, in hundreds of seconds; a negative number is one that fails."""
    return [{"seconds": abs(each), "fails": each < 0} for each in seconds]


def started(ctx: ExecutionContext, *seconds: float) -> list[Any]:
    return [ctx.start(f"n{number}", nap, payload) for number, payload in enumerate(naps(*seconds))]


def children(parent: Execution) -> list[str]:
    return list(Execution.objects.filter(parent=parent).order_by("position", "step").values_list("status", flat=True))


def pass_time(root: Execution, seconds: int) -> Execution:
    """Let so many times 100 seconds pass, one after another; return the root as it is then."""
    for _ in range(seconds):
        advance(101)
    return reload(root)


# --------------------------------------------------------------------------------------------------------------- need


def test_so_many_results_are_enough_and_the_rest_goes_on() -> None:
    root = start(durable(lambda ctx: ctx.gather(*started(ctx, 9, 2, 1), need=2)))
    assert pass_time(root, 1).status == ExecutionStatus.WAITING
    assert pass_time(root, 1).get_result() == [2, 1]
    assert children(root) == ["waiting", "succeeded", "succeeded"]
    assert Step.objects.get(execution=root, kind=StepKind.GATHER).counted == "n2,n1,"
    pass_time(root, 8)
    assert children(root) == ["succeeded"] * 3
    assert invariants.violations() == []


def test_every_replay_gets_the_same_results_although_others_have_come() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, 3, 1, 2)
        best = ctx.gather(*handles, need=1)
        ctx.sleep("long", 1000)
        return [best, ctx.gather(*handles, need=1), ctx.gather(*handles, need=2)]

    assert pass_time(start(parent), 13).get_result() == [[1], [1], [3, 1]]


def test_it_fails_as_soon_as_there_cannot_be_enough() -> None:
    root = start(durable(lambda ctx: ctx.gather(*started(ctx, 9, -1, -2, 3), need=3), max_retries=0))
    assert pass_time(root, 1).status == ExecutionStatus.WAITING
    assert pass_time(root, 1).status == ExecutionStatus.FAILED
    assert (failure(root).step, reload(root).error_message) == ("n2", "Child execution failed: refused after 2s")
    assert children(root) == ["waiting", "failed", "failed", "waiting"]


def test_what_no_worker_has_started_is_cancelled_when_there_cannot_be_enough() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, -0.1, -0.1)
        handles += [ctx.start("later", nap.s(1).set(countdown=6000))]
        return ctx.gather(*handles, need=2)

    root = start(parent)
    assert pass_time(root, 1).status == ExecutionStatus.FAILED
    assert children(root) == ["cancelled", "failed", "failed"]
    assert Step.objects.get(execution=root, name="later").status == StepStatus.CANCELLED


def test_results_that_are_there_already_are_enough() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, 5, -1, 2, 1)
        ctx.sleep("long", 300)
        return ctx.gather(*handles, need=2)

    root = pass_time(start(parent), 3)
    assert root.get_result() == [2, 1]
    assert pass_time(root, 3).fence == 2


def test_failures_before_it_count_too() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, 9, -1, -2)
        ctx.sleep("long", 300)
        return ctx.gather(*handles, need=2)

    assert pass_time(start(parent), 4).error_message == "Child execution failed: refused after 2s"


def test_a_retry_of_one_that_could_not_have_enough_runs_what_failed() -> None:
    runs: list[float] = []

    @durable(max_retries=0)
    def once_refused(ctx: ExecutionContext, seconds: float) -> float:
        ctx.sleep("nap", 100 * seconds)
        runs.append(seconds)
        if len(runs) < 3:
            raise ValueError("refused")
        return seconds

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = [ctx.start(f"n{n}", once_refused, {"seconds": n}) for n in (1, 2, 3)]
        return ctx.gather(*handles, need=2)

    root = start(parent)
    assert pass_time(root, 4).status == ExecutionStatus.FAILED
    api.retry(root)
    go_on()
    assert pass_time(root, 3).get_result() == [1, 2]


def test_a_retry_after_a_failure_that_came_before_the_gather() -> None:
    attempts: list[int] = []

    @durable(max_retries=0)
    def once_refused(ctx: ExecutionContext) -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("refused")
        return 7

    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> list[Any]:
        bad = ctx.start("bad", once_refused)
        ctx.sleep("long", 100)
        return ctx.gather(bad, *started(ctx, 3))

    root = start(parent)
    assert pass_time(root, 2).status == ExecutionStatus.FAILED
    api.retry(root)
    go_on()
    assert pass_time(root, 4).get_result() == [7, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"need": 0}, "need must be between 1 and the number of handles, 2; got 0"),
        ({"need": 3}, "got 3"),
        ({"need": True}, "need must be int, got bool"),
        ({"need": 1, "return_exceptions": True}, "got need and return_exceptions"),
    ],
)
def test_a_wrong_need_is_refused(options: Any, text: str) -> None:
    root = run(durable(lambda ctx: ctx.gather(*started(ctx, 1, 1), **options), max_retries=0))
    assert text in failure(root).message


# ------------------------------------------------------------------------------------------------------- max_failures


def test_a_map_lets_so_many_failures_pass() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        return [str(each) for each in ctx.map("naps", nap, naps(1, -2, 3, -1), max_failures=2)]

    refused = "Child execution failed: refused after {}s"
    assert pass_time(start(parent), 4).get_result() == ["1", refused.format(2), "3", refused.format(1)]
    assert invariants.violations() == []


def test_the_next_failure_is_raised_and_what_has_not_started_is_cancelled() -> None:
    parent = durable(
        lambda ctx: ctx.map("naps", nap, naps(-1, 9, -2, 9), max_failures=1, max_parallel=3), max_retries=0
    )
    root = start(parent)
    assert pass_time(root, 1).status == ExecutionStatus.WAITING
    assert pass_time(root, 1).error_message == "Child execution failed: refused after 2s"
    assert children(root) == ["failed", "waiting", "failed", "waiting"]
    step = Step.objects.get(execution=root, kind=StepKind.MAP)
    assert (step.max_failures, step.failures, step.status) == (1, 1, StepStatus.FAILED)


def test_a_failure_lets_a_held_sibling_go() -> None:
    parent = durable(lambda ctx: len(ctx.map("naps", nap, naps(-1, -1, 1), max_failures=2, max_parallel=1)))
    assert pass_time(start(parent), 5).get_result() == 3


def test_no_failure_may_pass_with_zero() -> None:
    root = start(durable(lambda ctx: ctx.map("naps", nap, naps(-1, 9), max_failures=0), max_retries=0))
    assert pass_time(root, 1).status == ExecutionStatus.FAILED


def test_a_cancelled_child_counts_as_a_failure() -> None:
    root = start(durable(lambda ctx: [type(e).__name__ for e in ctx.map("n", nap, naps(5, 1), max_failures=1)]))
    api.cancel(Execution.objects.get(parent=root, position=0))
    assert pass_time(root, 2).get_result() == [ChildCancelled.__name__, "int"]


def test_a_retry_lets_as_many_pass_again() -> None:
    refusals = iter([True] * 3 + [True] + [False] * 9)

    @durable(max_retries=0)
    def refused(ctx: ExecutionContext) -> int:
        if next(refusals):
            raise ValueError("no")
        return 1

    parent = durable(lambda ctx: [str(e) for e in ctx.map("n", refused, [{}, {}, {}], max_failures=2)], max_retries=0)
    root = start(parent)
    assert reload(root).status == ExecutionStatus.FAILED
    api.retry(root)
    go_on()
    assert reload(root).get_result() == ["Child execution failed: no", "1", "1"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_failures": -1}, "max_failures must be ≥ 0, got -1"),
        ({"max_failures": "2"}, "max_failures must be int, got str"),
        ({"max_failures": 1, "return_exceptions": True}, "got max_failures and return_exceptions"),
    ],
)
def test_wrong_max_failures_are_refused(options: Any, text: str) -> None:
    root = run(durable(lambda ctx: ctx.map("naps", nap, naps(1), **options), max_retries=0))
    assert text in failure(root).message
    assert Execution.objects.count() == 1


# ------------------------------------------------------------------------------------------------------------ handles


def test_a_look_does_not_wait_and_what_it_saw_is_remembered() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        (handle,) = started(ctx, 1)
        seen = [handle.peek(), handle.peek()]
        ctx.sleep("long", 300)
        seen += [handle.peek(), handle.peek()]
        ctx.sleep("longer", 100)
        return [*seen, handle.result(), handle.peek()]

    root = pass_time(start(parent), 6)
    assert root.get_result() == [False, False, True, True, 1, True]
    names = list(Step.objects.filter(execution=root, kind=StepKind.STEP).values_list("name", flat=True))
    assert names == ["peek(n0)", "peek(n0,2)"]


def test_a_look_sees_what_has_ended_since_the_run_began() -> None:
    seen: list[bool] = []

    @durable
    def parent(ctx: ExecutionContext) -> None:
        handle = ctx.start("n0", nap, {"seconds": 0})
        Step.objects.filter(name="n0").update(status="succeeded", finished_at=clock.now())
        Execution.objects.filter(step="n0").update(result="5")
        seen.append(handle.peek())

    run(parent)
    assert seen == [True]


def test_a_handles_result_is_waited_for_and_its_failure_raised() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        good, bad = started(ctx, 2, -1)
        try:
            bad.result()
        except ChildFailed as error:
            return [str(error), good.result(), good.result()]
        return []

    assert pass_time(start(parent), 3).get_result() == ["Child execution failed: refused after 1s", 2, 2]
