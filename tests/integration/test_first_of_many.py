"""Waits that not all of their members decide: ``need``, ``max_failures``, ``first``, ``as_completed``; looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import (
    ChildCancelled,
    ChildFailed,
    ChildHandle,
    ChildTimedOut,
    ExecutionContext,
    NoneSucceeded,
    api,
)
from conductor_app.engine import sweeper
from conductor_app.exceptions import NewerFormat
from conductor_app.models import Event, Execution, Step
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.transitions import steps
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


# -------------------------------------------------------------------------------------------------------------- first


def decision(root: Execution, name: str = "decision") -> Step:
    return Step.objects.get(execution=root, name=name)


def naming(ctx: ExecutionContext, *members: Any, **options: Any) -> list[Any]:
    """The first of some handles: the name of its step, and its value."""
    winner, value = ctx.first("decision", *members, **options)
    return [winner.step, value]


def test_the_first_that_is_decided_wins_and_every_replay_takes_it() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, 3, 1, 2)
        found = naming(ctx, *handles, ctx.timer("late", 900))
        ctx.sleep("long", 500)
        return [*found, ctx.gather(*handles)]

    root = start(parent)
    assert (reload(root).status, decision(root).status) == (ExecutionStatus.WAITING, StepStatus.PENDING)
    assert pass_time(root, 7).get_result() == ["n1", 1, [3, 1, 2]]
    assert (decision(root).counted, decision(root).status) == ("n1,", StepStatus.SUCCEEDED)
    assert invariants.violations() == []


def test_a_timer_that_wins_is_none_and_the_children_go_on() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 5, 6), ctx.timer("late", 100))))
    assert pass_time(root, 1).get_result() == ["late", None]
    assert children(root) == ["waiting", "waiting"]


def test_an_event_that_wins_is_taken() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 5), ctx.event("answer", "approved"))))
    assert api.send_event(root, "approved", {"by": "ana"})
    go_on()
    assert reload(root).get_result() == ["answer", {"by": "ana"}]
    assert Event.objects.get().step == Step.objects.get(name="answer")


def test_an_event_that_was_sent_before_wins_at_once() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        ctx.sleep("long", 100)
        return naming(ctx, *started(ctx, 5), ctx.event("answer", "approved"), ctx.event("other", "approved"))

    root = start(parent)
    api.send_event(root, "approved", 1)
    api.send_event(root, "approved", 2)
    assert pass_time(root, 1).get_result() == ["answer", 1]
    assert [event.taken_at is not None for event in Event.objects.order_by("id")] == [True, False]
    assert not Step.objects.filter(name="other").exists()


def test_a_losing_event_stays_in_the_mailbox_for_a_later_wait() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        answer = ctx.event("answer", "approved")
        found = naming(ctx, *started(ctx, 1), answer)
        ctx.sleep("long", 300)
        return [
            *found,
            ctx.wait_for("later", "approved", timeout=0),
            *ctx.first("again", answer, ctx.timer("t", 900))[1:],
        ]

    root = start(parent)
    pass_time(root, 2)
    assert decision(root).counted == "n0,"
    api.send_event(root, "approved", 1)
    assert Event.objects.get().taken_at is None
    pass_time(root, 3)
    assert (reload(root).status, decision(root, "answer").status) == (ExecutionStatus.WAITING, StepStatus.PENDING)
    api.send_event(root, "approved", 2)
    go_on()
    assert reload(root).get_result() == ["n0", 1, 1, 2]


def test_of_several_that_are_decided_the_first_argument_wins() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        handles = started(ctx, 2, 1)
        ctx.sleep("long", 300)
        return naming(ctx, ctx.event("never", "x"), *handles, ctx.timer("zero", 0))

    assert pass_time(start(parent), 4).get_result() == ["n0", 2]


def test_a_timer_of_zero_or_in_the_past_is_decided_at_once() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        passed = ctx.timer("passed", 100)
        zero = ctx.first("zeroth", *started(ctx, 9), ctx.timer("zero", 0))[0].step
        Step.objects.filter(name="passed").update(deadline_at=clock.after(-1))
        return [zero, *naming(ctx, *started_again(ctx), passed)]

    def started_again(ctx: ExecutionContext) -> list[Any]:
        return [ctx.start("other", nap, {"seconds": 9})]

    assert run(parent).get_result() == ["zero", "passed", None]


def test_a_failed_winner_raises_its_error() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 9, -1)), max_retries=0))
    assert pass_time(root, 1).error_message == "Child execution failed: refused after 1s"
    assert (failure(root).step, decision(root).status, children(root)) == ("n1", "failed", ["waiting", "failed"])


def test_until_succeeded_lets_failures_pass() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 3, -1, 2), until="succeeded")))
    assert pass_time(root, 1).status == ExecutionStatus.WAITING
    assert pass_time(root, 1).get_result() == ["n2", 2]


def test_none_has_succeeded() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        try:
            naming(ctx, *started(ctx, -2, -1), until="succeeded")
        except NoneSucceeded as error:
            ctx.sleep("long", 100)
            return [str(error), error.step, [each.step for each in error.errors]]
        return []

    told = (
        "None of 2 has succeeded (step 'decision'): n0: Child execution failed: refused after 2s; "
        "n1: Child execution failed: refused after 1s"
    )
    assert pass_time(start(parent), 4).get_result() == [told, "decision", ["n0", "n1"]]


def test_losers_are_asked_to_stop_in_the_decision_and_a_late_result_changes_nothing() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        later = ctx.start("later", nap.s(1).set(countdown=6000))
        found = naming(ctx, *started(ctx, 1, 9), later, losers="cancel")
        ctx.sleep("long", 300)
        return found

    root = start(parent)
    assert pass_time(root, 2).status == ExecutionStatus.WAITING
    assert children(root) == ["cancelled", "succeeded", "cancelled"]
    loser = Execution.objects.get(parent=root, step="n1")
    assert loser.cancel_reason == 'it was not the first in step "decision" of its parent'
    assert pass_time(root, 3).get_result() == ["n0", 1]


def test_a_loser_that_was_locked_is_asked_to_stop_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from conductor_app.transitions.waits.first import FirstKind

    monkeypatch.setattr(FirstKind, "decided", lambda *_, **__: None)
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 1, 9), losers="cancel")))
    assert pass_time(root, 2).get_result() == ["n0", 1]
    assert children(root) == ["succeeded", "cancelled"]


def test_the_rest_may_be_awaited_later() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        left: list[Any] = [*started(ctx, 3, 1, 2), ctx.timer("t", 150)]
        order = []
        while left:
            winner, _ = ctx.first(f"round-{len(order)}", *left)
            order.append(winner.step)
            left.remove(winner)
        return order

    assert pass_time(start(parent), 4).get_result() == ["n1", "t", "n2", "n0"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ctx: ctx.first("d"), "got no handles"),
        (lambda ctx: ctx.first("d", *[ctx.event("e", "x")] * 2), 'got the handle of step "e" twice'),
        (lambda ctx: ctx.first("d", *(ctx.event(f"e{n}", "x") for n in range(1_001))), "the limit is 1000"),
        (lambda ctx: ctx.first("d", "e"), "takes the handles that ctx.start, ctx.event and ctx.timer return, got str"),
        (lambda ctx: ctx.first("d", ChildHandle("e", None, object())), "is of another run or execution"),
        (lambda ctx: ctx.first("d", ctx.event("e", "x"), until="done"), 'until must be "decided" or "succeeded"'),
        (lambda ctx: ctx.first("d", ctx.event("e", "x"), losers="kill"), 'losers must be "cancel" or "abandon"'),
        (lambda ctx: ctx.first(lambda: 1, ctx.event("e", "x")), "step name must be str"),
        (lambda ctx: ctx.timer("t", -1), "seconds of ctx.timer"),
        (lambda ctx: ctx.event("e", ""), "event name must be 1"),
    ],
)
def test_what_is_wrong_with_a_first_is_said_at_the_call(call: Any, text: str) -> None:
    root = run(durable(call, max_retries=0))
    assert text in failure(root).message
    assert Step.objects.count() == 0


def test_a_cancel_of_the_parent_ends_what_nobody_else_will() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 9), ctx.event("answer", "yes"), ctx.timer("late", 900))))
    api.cancel(root)
    go_on()
    assert reload(root).status == ExecutionStatus.CANCELLED
    assert {name: decision(root, name).status for name in ("answer", "late", "n0")} == dict.fromkeys(
        ("answer", "late", "n0"), StepStatus.CANCELLED
    )
    api.retry(root)
    go_on()
    assert reload(root).status == ExecutionStatus.WAITING
    api.send_event(root, "yes", 7)
    go_on()
    assert reload(root).get_result() == ["answer", 7]
    assert invariants.violations() == []


def test_a_retry_of_a_failed_first_runs_what_has_failed() -> None:
    refusals = iter([True, False, False, False])

    @durable(max_retries=0)
    def refused(ctx: ExecutionContext) -> str:
        if next(refusals):
            raise ValueError("no")
        return "now"

    root = start(durable(lambda ctx: naming(ctx, ctx.start("bad", refused), ctx.timer("t", 900)), max_retries=0))
    go_on()
    assert reload(root).status == ExecutionStatus.FAILED
    api.retry(root)
    go_on()
    assert reload(root).get_result() == ["bad", "now"]


def test_a_retry_after_none_has_succeeded_runs_all_again() -> None:
    refusals = iter([True, True, False, True])

    @durable(max_retries=0)
    def refused(ctx: ExecutionContext) -> str:
        ctx.sleep("nap", 50)
        if next(refusals):
            raise ValueError("no")
        return "now"

    parent = durable(
        lambda ctx: naming(ctx, ctx.start("a", refused), ctx.start("b", refused), until="succeeded"), max_retries=0
    )
    root = start(parent)
    assert pass_time(root, 2).status == ExecutionStatus.FAILED
    assert failure(root).step == "decision"
    api.retry(root)
    go_on()
    assert pass_time(root, 1).get_result()[1] == "now"


def test_a_fork_keeps_what_was_decided() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        found = naming(ctx, *started(ctx, 1, 2), ctx.event("answer", "yes"))
        ctx.sleep("long", 300)
        return [*found, ctx.step("last", lambda: 1)]

    root = start(parent)
    assert pass_time(root, 5).get_result() == ["n0", 1, 1]
    copy = api.fork(root, before="last")
    go_on()
    assert reload(copy).get_result() == ["n0", 1, 1]
    assert not Execution.objects.filter(parent=copy).exists()


def test_a_timeout_of_a_started_child_is_its_end() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> str:
        late = ctx.start("late", nap, {"seconds": 9}, timeout=100)
        try:
            ctx.first("decision", late, *started(ctx, 5))
        except ChildTimedOut as error:
            return error.step
        return ""

    assert pass_time(start(parent), 2).get_result() == "late"


def test_a_held_execution_hears_of_its_first_when_it_is_released() -> None:
    root = start(durable(lambda ctx: naming(ctx, *started(ctx, 1, 5))))
    api.hold(root, "bank incident", tree=False)
    assert pass_time(root, 2).status == ExecutionStatus.QUEUED
    assert decision(root).counted == "n0,"
    api.release(root)
    go_on()
    assert reload(root).get_result() == ["n0", 1]


def test_events_and_timers_are_gathered_and_looked_at_too() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        answer, late = ctx.event("answer", "yes"), ctx.timer("late", 100)
        seen = [answer.peek(), late.peek()]
        ctx.sleep("long", 200)
        seen += [late.peek(), answer.peek()]
        return [*seen, ctx.gather(answer, late, *started(ctx, 1)), ctx.event("more", "yes").result()]

    root = start(parent)
    pass_time(root, 1)
    api.send_event(root, "yes", 7)
    pass_time(root, 3)
    api.send_event(root, "yes", 8)
    go_on()
    assert reload(root).get_result() == [False, False, True, True, [7, None, 1], 8]


def test_the_sweepers_audit_leaves_what_waits_alone_and_decides_what_has_missed_its_end() -> None:
    root = start(durable(lambda ctx: naming(ctx, ctx.event("answer", "yes"), ctx.timer("t", 900))))
    assert sweeper.sweep(audit=True)["stranded"] == 0
    Step.objects.filter(execution=root, name="t").update(status="succeeded", finished_at=clock.now())
    Step.objects.filter(execution=root, name="answer").delete()
    assert sweeper.sweep(audit=True)["stranded"] == 1
    go_on()
    assert reload(root).get_result() == ["t", None]


# ------------------------------------------------------------------------------------------------------- as_completed


def test_handles_come_in_the_recorded_order_of_their_ends() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[Any]:
        order = []
        for handle in ctx.as_completed("arrivals", *started(ctx, 3, 1, 2), ctx.timer("t", 250)):
            order.append([handle.step, handle.result()])
            ctx.step(f"note-{handle.step}", lambda: None)
        ctx.sleep("long", 100)
        return order

    root = start(parent)
    assert pass_time(root, 5).get_result() == [["n1", 1], ["n2", 2], ["t", None], ["n0", 3]]
    assert invariants.violations() == []


def test_what_has_ended_meanwhile_comes_without_another_wait() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        order = []
        for handle in ctx.as_completed("arrivals", *started(ctx, 4, 1, 3, 2)):
            order.append(handle.step)
            if len(order) == 1:
                ctx.sleep("long", 600)
        return order

    root = pass_time(start(parent), 8)
    assert root.get_result() == ["n1", "n3", "n2", "n0"]
    batches = Step.objects.filter(execution=root, kind=StepKind.AS_COMPLETED).order_by("id")
    assert [(step.name, step.counted) for step in batches] == [("arrivals", "n1,"), ("arrivals#2", "n3,n2,n0,")]
    assert root.fence == 3


def test_a_failure_is_yielded_and_raised_by_its_result() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> list[str]:
        order = []
        for handle in ctx.as_completed("arrivals", *started(ctx, -1, 2), ctx.event("answer", "yes")):
            try:
                handle.result()
            except ChildFailed:
                order.append("failed")
            order.append(handle.step)
        return order

    root = start(parent)
    pass_time(root, 3)
    api.send_event(root, "yes")
    go_on()
    assert reload(root).get_result() == ["failed", "n0", "n1", "answer"]


def test_as_completed_of_nothing_yields_nothing_and_wrong_handles_are_refused_at_the_call() -> None:
    assert run(durable(lambda ctx: list(ctx.as_completed("none")))).get_result() == []
    root = run(durable(lambda ctx: ctx.as_completed("a", *[ctx.event("e", "x")] * 2), max_retries=0))
    assert 'got the handle of step "e" twice' in failure(root).message


def test_a_kind_that_this_version_does_not_know_is_left_to_newer_ones() -> None:
    root = start(durable(lambda ctx: ctx.sleep("long", 100)))
    Step.objects.filter(execution=root).update(kind="novel")
    with pytest.raises(NewerFormat, match="step 'long' is of the kind 'novel'"):
        steps.recall(root.pk)
