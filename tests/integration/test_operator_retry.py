"""``api.retry``: run again from what failed, and keep what is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import ChildFailed, ChildTimedOut, ExecutionContext, api
from conductor_app.exceptions import RetryRefused
from conductor_app.models import Execution, FailedExecution
from conductor_app.store import clock
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support.bodies import advance, child, durable, failure, go_on, redeploy, reload, run, start

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


class Bank:
    """Something outside that can be repaired."""

    is_open = False


@pytest.fixture
def bank() -> Iterator[Bank]:
    bank = Bank()
    Bank.is_open = False
    yield bank
    Bank.is_open = False


@durable(max_retries=1, retry_backoff=False, default_retry_delay=1)
def charge(ctx: ExecutionContext) -> str:
    note(None, "charge")
    ctx.step("prepare", note, None, "prepare")
    if not Bank.is_open:
        raise ConnectionError("the bank is closed")
    return "paid"


@durable
def fulfil(ctx: ExecutionContext) -> list[Any]:
    note(None, "fulfil")
    before = ctx.invoke("before", scenarios.echo, {"value": "before"})
    paid = ctx.invoke("charge", charge)
    return [before, paid, ctx.step("after", str, "after")]


@durable
def shop(ctx: ExecutionContext) -> list[Any]:
    note(None, "shop")
    ctx.atomic_step("open", note, None, "open")
    return [*ctx.invoke("fulfil", fulfil), ctx.invoke("mail", scenarios.echo, {"value": "sent"})]


# ---------------------------------------------------------------------------------------------------------- what is run


def test_a_retry_walks_down_to_the_failed_leaf_and_its_result_flows_back_up(bank: Bank) -> None:
    root = run(shop)
    middle = child(root, "fulfil")
    leaf = child(middle, "charge")
    assert [row.status for row in (root, middle, leaf)] == ["failed"] * 3
    assert (leaf.attempt, FailedExecution.objects.count()) == (2, 3)
    assert failure(root).root_cause_id == leaf.pk
    bodies = {name: count(name) for name in ("shop", "fulfil", "charge")}

    Bank.is_open = True
    api.retry(root)
    root, middle, leaf = reload(root), reload(middle), reload(leaf)
    assert [row.status for row in (root, middle, leaf)] == ["waiting", "waiting", "queued"]
    assert [(row.attempt, row.error, row.finished_at) for row in (root, middle, leaf)] == [(1, None, None)] * 3
    assert FailedExecution.objects.count() == 0

    go_on()
    assert reload(root).get_result() == ["before", "paid", "after", "sent"]
    assert reload(leaf).get_result() == "paid"
    # One more run of the leaf, and one more of each ancestor for each child that ended since.
    assert {name: count(name) - before for name, before in bodies.items()} == {"shop": 2, "fulfil": 1, "charge": 1}
    assert (count("open"), count("prepare")) == (1, 1)
    assert child(middle, "before").fence == 1
    assert Execution.objects.filter(root=root).count() == 5


def test_a_retry_counts_attempts_anew_and_may_fail_again(bank: Bank) -> None:
    root = run(shop)
    first = failure(root).failed_at
    for _ in range(2):
        api.retry(root)
        go_on()
        advance(2)
        assert reload(root).status == "failed"
    leaf = child(child(root, "fulfil"), "charge")
    assert (leaf.attempt, count("charge"), FailedExecution.objects.count()) == (2, 6, 3)
    assert failure(root).failed_at > first
    Bank.is_open = True
    api.retry(root.pk)
    go_on()
    assert reload(root).status == "succeeded"


def test_a_failure_of_its_own_is_run_again_behind_its_finished_steps() -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        ctx.step("first", note, None, "first")
        ctx.invoke("child", scenarios.echo, {"value": "x"})
        raise ValueError("a bug")

    execution = run(body)

    def fixed(ctx: ExecutionContext) -> str:
        ctx.step("first", note, None, "first")
        return ctx.invoke("child", scenarios.echo, {"value": "x"})

    redeploy(body, fixed)
    api.retry(execution)
    go_on()
    assert reload(execution).get_result() == "x"
    assert (count("first"), child(execution, "child").fence) == (1, 1)


def test_a_childs_failure_that_was_caught_stays_as_it_is_remembered(bank: Bank) -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> str:
        try:
            ctx.invoke("charge", charge)
        except ChildFailed:
            ctx.step("compensate", note, None, "compensate")
        if not Bank.is_open:
            raise RuntimeError("not yet")
        return "compensated"

    root = run(parent)
    assert failure(root).message == "not yet"
    Bank.is_open = True
    api.retry(root)
    go_on()
    assert reload(root).get_result() == "compensated"
    assert (count("compensate"), child(root, "charge").status, child(root, "charge").fence) == (1, "failed", 2)
    assert FailedExecution.objects.get().execution_id == child(root, "charge").pk


def test_a_mended_mismatch_goes_on() -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        ctx.sleep("pause", 60)
        return ctx.step("work", int, "5")

    execution = start(body)
    original = body.run
    redeploy(body, lambda ctx: ctx.step("pause", int))
    advance(61)
    assert reload(execution).status == "failed"
    redeploy(body, original)
    api.retry(execution)
    go_on()
    assert reload(execution).get_result() == 5


# ------------------------------------------------------------------------------------------------------ cancelled trees


@durable
def naps_below(ctx: ExecutionContext, levels: int) -> str:
    if levels:
        return ctx.invoke("below", naps_below, {"levels": levels - 1})
    ctx.step("awake", note, None, "awake")
    ctx.sleep("nap", 60)
    return "rested"


def test_a_cancelled_tree_goes_on_where_it_was() -> None:
    root = start(naps_below, levels=2)
    api.cancel(root)
    tree = Execution.objects.filter(root=root).order_by("depth")
    assert {row.status for row in tree} == {"cancelled"}
    api.retry(root)
    assert {row.cancel_requested_at for row in tree.all()} == {None}
    go_on()
    assert [row.status for row in tree.all()] == ["waiting"] * 3
    advance(61)
    assert reload(root).get_result() == "rested"
    assert count("awake") == 1


def test_a_cancelled_execution_that_never_ran_runs() -> None:
    result = scenarios.echo.apply_async((5,), expires=30)
    advance(31)
    assert reload(result).status == "cancelled"
    api.retry(result)
    go_on()
    assert reload(result).get_result() == 5


def test_a_child_that_somebody_cancelled_is_run_again() -> None:
    root = start(naps_below, levels=1)
    api.cancel(child(root, "below"))
    go_on()
    assert reload(root).status == "failed"
    api.retry(root)
    go_on()
    assert [reload(root).status, child(root, "below").status] == ["waiting", "waiting"]
    advance(61)
    assert reload(root).get_result() == "rested"


# ------------------------------------------------------------------------------------------------------------- timeouts


@durable
def impatient(ctx: ExecutionContext, on_timeout: str = "cancel") -> str:
    return ctx.invoke("nap", naps_below, {"levels": 0}, timeout=40, on_timeout=on_timeout)


def test_a_child_that_was_late_gets_its_whole_time_again() -> None:
    root = start(impatient)
    advance(41)
    assert (reload(root).status, child(root, "nap").status) == ("failed", "cancelled")
    api.retry(root)
    go_on()
    assert (reload(root).status, child(root, "nap").status) == ("waiting", "waiting")
    assert root.steps.get().status == "pending"
    advance(10)
    assert reload(root).status == "waiting"
    advance(10)  # the child's sleep began 61 seconds ago
    assert reload(root).get_result() == "rested"


def test_a_child_that_is_late_again_times_out_again() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        return ctx.invoke("nap", scenarios.naps, {"seconds": 10**6}, timeout=30)

    root = start(parent)
    for _ in range(3):
        advance(31)
        assert reload(root).error_message == "Child execution timed out after 30s (step 'nap')"
        api.retry(root)
        go_on()
        assert reload(root).status == "waiting"


def test_the_result_of_a_late_child_is_adopted() -> None:
    root = start(impatient, on_timeout="abandon")
    advance(41)
    advance(20)
    late = child(root, "nap")
    assert (reload(root).status, late.status, late.fence) == ("failed", "succeeded", 2)
    api.retry(root)
    assert reload(root).status == "queued"
    go_on()
    assert reload(root).get_result() == "rested"
    assert child(root, "nap").fence == 2


def test_a_late_child_that_still_runs_is_waited_for_again() -> None:
    root = start(impatient, on_timeout="abandon")
    advance(41)
    assert (reload(root).status, child(root, "nap").status) == ("failed", "waiting")
    api.retry(root)
    assert (reload(root).status, child(root, "nap").status) == ("waiting", "waiting")
    advance(10)
    assert reload(root).status == "waiting"
    advance(10)
    assert reload(root).get_result() == "rested"


def test_a_caught_timeout_stays_as_it_is_remembered() -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> str:
        try:
            ctx.invoke("nap", naps_below, {"levels": 0}, timeout=30, on_timeout="abandon")
        except ChildTimedOut:
            if ctx.step("tries", note, None, "caught") is None and not Bank.is_open:
                raise RuntimeError("not yet") from None
        return "gave up"

    root = start(parent)
    advance(31)
    advance(31)
    assert (reload(root).status, child(root, "nap").status) == ("failed", "succeeded")
    Bank.is_open = True
    api.retry(root)
    go_on()
    Bank.is_open = False
    assert reload(root).get_result() == "gave up"


# -------------------------------------------------------------------------------------------------------------- refused


def test_a_child_is_refused_with_the_id_of_the_root_to_retry() -> None:
    root = run(scenarios.grandparent_of_boom)
    for descendant in Execution.objects.filter(root=root).exclude(pk=root.pk):
        with pytest.raises(RetryRefused) as refusal:
            api.retry(descendant)
        assert str(refusal.value) == (
            f"Execution {descendant.pk} is a child, and its parent has already seen its outcome. "
            f"Retry the root {root.pk} instead: it runs again from what failed."
        )
    assert FailedExecution.objects.count() == 3


def test_only_failed_and_cancelled_executions_can_be_retried() -> None:
    waiting = start(scenarios.naps, seconds=60)
    queued = reload(scenarios.echo.delay())
    succeeded = run(scenarios.echo)
    for execution, status in ((queued, "queued"), (waiting, "waiting"), (succeeded, "succeeded")):
        before = Execution.objects.filter(pk=execution.pk).values().get()
        with pytest.raises(RetryRefused) as refusal:
            api.retry(execution)
        assert str(refusal.value) == (
            f"Execution {execution.pk} is {status}. Only a failed or cancelled one can be retried."
        )
        assert Execution.objects.filter(pk=execution.pk).values().get() == before


def test_of_two_retries_the_second_is_refused(bank: Bank) -> None:
    root = run(shop)
    api.retry(root)
    with pytest.raises(RetryRefused, match=rf"^Execution {root.pk} is waiting\. Only a failed or cancelled one"):
        api.retry(root)
    alone = run(scenarios.boom)
    api.retry(alone)
    with pytest.raises(RetryRefused, match=rf"^Execution {alone.pk} is queued\. Only a failed or cancelled one"):
        api.retry(alone)


def test_a_tree_whose_failed_child_was_deleted_is_refused_unchanged() -> None:
    root = run(scenarios.parent_of_boom)
    child(root, "charge").delete()
    before = Execution.objects.filter(pk=root.pk).values().get()
    with pytest.raises(RetryRefused) as refusal:
        api.retry(root)
    assert str(refusal.value) == (
        f"The child of step 'charge' of execution {root.pk} has been deleted, and its outcome with it. "
        "Start a new execution instead."
    )
    assert Execution.objects.filter(pk=root.pk).values().get() == before
    assert failure(root).message == "Child execution failed: card declined"
