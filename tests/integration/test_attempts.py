"""Runs that have ended are kept: who ran them, when, how they ended, whatever became of the execution later."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client, override_settings
from django.urls import reverse

from conductor_app import ExecutionContext, api, transitions
from conductor_app.engine import pruner
from conductor_app.exceptions import Failure
from conductor_app.models import Attempt, Execution
from conductor_app.states import RunOutcome
from conductor_app.store import clock
from conductor_app.telling import runs, story
from conductor_app.telling.history import history
from conductor_app.transitions import attempts
from tests.support.bodies import advance, child, durable, go_on, reload, start
from tests.support.command import told
from tests.support.executions import OWNER, claimed, family, fresh, queued, running, starting

pytestmark = pytest.mark.django_db

FAILURE = Failure(type="shop.NoStock", message="none left", traceback="Traceback: no stock")


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


def rows(execution: Any) -> list[Attempt]:
    return list(Attempt.objects.filter(execution=reload(execution)).order_by("run"))


def outcomes(execution: Any) -> list[tuple[int, int, str]]:
    return [(row.run, row.attempt, row.outcome) for row in rows(execution)]


# ------------------------------------------------------------------------------------------------------ what is kept


ENDS: dict[str, tuple[Any, RunOutcome]] = {
    "succeeded": (lambda run: transitions.succeed(run, "1"), RunOutcome.SUCCEEDED),
    "failed": (lambda run: transitions.fail(run, FAILURE), RunOutcome.FAILED),
    "retried": (lambda run: transitions.retry_later(run, FAILURE, 5), RunOutcome.RETRIED),
    "released": (transitions.release, RunOutcome.RELEASED),
    "put off": (lambda run: transitions.put_off(run, FAILURE), RunOutcome.RELEASED),
    "given back": (lambda run: transitions.give_back(run.pk, OWNER), RunOutcome.RELEASED),
    "lost": (lambda run: transitions.lose(run.pk, owner=OWNER), RunOutcome.LOST),
    "killed by a hard limit": (lambda run: transitions.lose(run.pk, owner=OWNER, failure=FAILURE), RunOutcome.FAILED),
    "suspended": (
        lambda run: transitions.suspend(run, transitions.Sleep("nap", seconds=60)),
        RunOutcome.SUSPENDED,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_each_end_of_a_run_keeps_it_once(end: str) -> None:
    act, outcome = ENDS[end]
    run = running()
    act(run)
    (row,) = rows(run)
    assert (row.run, row.attempt, row.outcome, row.worker) == (1, 1, outcome, OWNER)
    assert run.due_at <= row.due_at <= row.started_at <= row.finished_at
    assert row.step == ("nap" if outcome == RunOutcome.SUSPENDED else "")


@pytest.mark.parametrize("end", ["failed", "retried", "killed by a hard limit"])
def test_a_run_that_failed_keeps_its_error(end: str) -> None:
    run = running()
    ENDS[end][0](run)
    (row,) = rows(run)
    assert (row.error_class, row.message, row.traceback) == ("shop.NoStock", "none left", "Traceback: no stock")


def test_a_lost_run_says_who_was_lost() -> None:
    run = running()
    transitions.lose(run.pk, owner=OWNER)
    (row,) = rows(run)
    assert row.error_class.endswith("WorkerLost")
    assert "stopped while running attempt 1" in row.message


def test_a_cancelled_run_is_kept() -> None:
    run = running()
    transitions.request_cancel(run.pk, "no stock")
    transitions.cancel_running(run)
    assert outcomes(run) == [(1, 1, "cancelled")]


def test_a_run_whose_lease_is_taken_over_keeps_nothing() -> None:
    run = running()
    transitions.lose(run.pk, owner=OWNER)
    with pytest.raises(transitions.guards.LeaseLost):
        transitions.succeed(run, "1")
    assert outcomes(run) == [(1, 1, "lost")]


def test_the_time_in_the_queue_is_told_apart_from_the_run() -> None:
    execution = queued()
    clock.shift(dt.timedelta(seconds=40))
    run = claimed(execution)
    clock.shift(dt.timedelta(seconds=7))
    transitions.retry_later(run, FAILURE, 20)
    clock.shift(dt.timedelta(seconds=25))
    transitions.succeed(claimed(execution), "1")
    first, second = rows(execution)
    times = [
        (row.started_at - row.due_at, row.finished_at - row.started_at, row.due_at - first.finished_at)
        for row in (first, second)
    ]
    assert [tuple(round(span.total_seconds()) for span in one) for one in times] == [(40, 7, -47), (5, 0, 20)]


def test_a_parent_and_its_children_keep_each_run() -> None:
    @durable
    def below(ctx: ExecutionContext) -> int:
        ctx.sleep("nap", 60)
        return 7

    @durable
    def above(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("one", below), ctx.map("many", below, [{}, {}])]

    root = start(above)
    advance(61)
    advance(61)
    assert outcomes(root) == [(1, 1, "suspended"), (2, 1, "suspended"), (3, 1, "succeeded")]
    assert [row.step for row in rows(root)] == ["one", "many", ""]
    for execution in Execution.objects.filter(parent=root):
        assert outcomes(execution) == [(1, 1, "suspended"), (2, 1, "succeeded")]


def test_old_runs_are_forgotten_and_failures_are_not() -> None:
    @durable(max_retries=1, retry_backoff=0.01, retry_jitter=False)
    def wakes(ctx: ExecutionContext) -> None:
        ctx.sleep("0", 1)
        if ctx.attempt == 1:
            raise ConnectionError("once")
        for number in range(1, 40):
            ctx.sleep(str(number), 1)

    with override_settings(CONDUCTOR={"KEEP_ATTEMPTS": 5}):
        root = start(wakes)
        for _ in range(45):
            advance(1.1)
    assert reload(root).status == "succeeded"
    kept = outcomes(root)
    assert [outcome for _, _, outcome in kept].count("retried") == 1
    assert kept[0][2] == "retried"
    last = reload(root).fence
    assert [run for run, _, _ in kept[1:]] == list(range(last - len(kept) + 2, last + 1))
    assert 5 <= len(kept) - 1 < 5 + 10


def test_a_failure_to_forget_does_not_harm_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise attempts.DatabaseError("away")

    monkeypatch.setattr(attempts, "transactions", SimpleNamespace(persist_briefly=refuse))
    run = running()
    Execution.objects.filter(pk=run.pk).update(fence=100)
    run.fence = 100
    assert transitions.suspend(run, transitions.Sleep("nap", seconds=60))
    assert outcomes(run) == [(100, 1, "suspended")]


def test_runs_go_with_their_execution() -> None:
    run = running()
    transitions.succeed(run, "1")
    other = running()
    transitions.succeed(other, "1")
    Execution.objects.filter(pk=run.pk).update(finished_at=clock.after(-1_000))
    assert pruner.prune(dt.timedelta(seconds=500)) == 1
    assert [row.execution_id for row in Attempt.objects.filter(execution_id__in=[run.pk, other.pk])] == [other.pk]


def test_a_run_of_an_older_version_is_kept_all_the_same() -> None:
    """Two versions run side by side during a deployment; the older one does not note when a run began."""
    run = running()
    Execution.objects.filter(pk=run.pk).update(run_started_at=None)
    transitions.lose(run.pk, owner=OWNER)
    (row,) = rows(run)
    assert row.started_at == reload(run).started_at


# -------------------------------------------------------------------------------------------- what is told of them


@durable(max_retries=1, retry_backoff=5, retry_jitter=False)
def third_time(ctx: ExecutionContext) -> str:
    """Fail twice."""
    if ctx.step("count", Attempt.objects.count) < 0 or Attempt.objects.filter(execution=ctx.execution_id).count() < 2:
        raise ConnectionError(f"no line in attempt {ctx.attempt}")
    return "through"


@pytest.fixture
def retried_by_hand() -> Execution:
    """An execution that failed twice, was retried an hour later, and succeeded."""
    result = third_time.delay()
    go_on()
    advance(6)
    assert reload(result).status == "failed"
    clock.shift(dt.timedelta(hours=1))
    api.retry(result, actor="ana", reason="stock is back")
    go_on()
    assert reload(result).status == "succeeded"
    return reload(result)


def test_an_operators_retry_keeps_what_failed_before(retried_by_hand: Execution) -> None:
    assert outcomes(retried_by_hand) == [(1, 1, "retried"), (2, 2, "failed"), (3, 1, "succeeded")]
    assert [row.message for row in rows(retried_by_hand)] == ["no line in attempt 1", "no line in attempt 2", ""]
    for row in rows(retried_by_hand)[:2]:
        assert "in third_time" in row.traceback


def test_the_command_tells_of_each_run(retried_by_hand: Execution) -> None:
    plain = told("show", retried_by_hand.pk)
    assert "no line in attempt 1" in plain.out, "the timeline names it"
    whole = told("show", "--attempts", retried_by_hand.pk)
    assert whole.out.count("in third_time") == 2
    assert whole.out.count("retried by ana: stock is back") == 2, "in the history, and of the run"
    document = told("show", "--json", retried_by_hand.pk).json["attempts"]
    assert [(row["run"], row["outcome"], row["class"]) for row in document] == [
        (1, "retried", "builtins.ConnectionError"),
        (2, "failed", "builtins.ConnectionError"),
        (3, "succeeded", None),
    ]
    assert all("in third_time" in row["traceback"] for row in document[:2])
    asked = [[(deed["kind"], deed["actor"], deed["reason"]) for deed in row["asked_for"]] for row in document]
    assert asked == [[], [], [("retry", "ana", "stock is back")]]


def test_the_page_tells_of_each_run(retried_by_hand: Execution, client: Client) -> None:
    client.force_login(User.objects.create_superuser("ana"))
    page = client.get(reverse("admin:conductor_app_execution_change", args=[retried_by_hand.pk])).content.decode()
    assert page.count("no line in attempt 1") >= 2, "in the table and in the history"
    assert page.count('<pre class="cd-traceback"') == 2
    assert page.count("cd-bar--failed") == 2
    assert page.count('<div class="cd-asked"><bdi>retried by ana: stock is back</bdi></div>') == 1


def test_a_child_that_a_retry_of_its_root_reopens_says_whose_retry_that_was() -> None:
    root, child = family()
    transitions.fail(child, FAILURE)
    transitions.fail(claimed(fresh(root)), FAILURE, step="child", child_id=child.pk)
    clock.shift(dt.timedelta(hours=1))
    api.retry(root, actor="ana")
    transitions.succeed(claimed(fresh(child)), "1")
    transitions.succeed(claimed(fresh(root)), "1")
    assert asked(child) == {2: ["its root retried by ana"]}
    assert asked(root) == {3: ["retried by ana"]}


def test_a_child_that_had_not_ended_was_reopened_by_nobody() -> None:
    root, (child,) = starting(1)
    transitions.retry_later(child, FAILURE, 0)
    transitions.fail(root, FAILURE)
    api.retry(root, actor="ana")
    transitions.succeed(claimed(fresh(child)), "1")
    transitions.succeed(claimed(fresh(root)), "1")
    assert (asked(child), asked(root)) == ({}, {2: ["retried by ana"]})


def test_a_rerun_says_of_its_first_run_who_has_asked_for_it(retried_by_hand: Execution) -> None:
    again = api.rerun(retried_by_hand, actor="ben", reason="to be sure")
    go_on()
    advance(6)
    assert reload(again).is_final
    assert list(asked(again)) == [1]
    assert asked(again)[1] == [f"started as a rerun of {retried_by_hand.pk} by ben: to be sure"]


def test_nobody_is_named_for_a_run_that_may_not_have_been_the_first(retried_by_hand: Execution) -> None:
    Attempt.objects.filter(execution=retried_by_hand, run=2).delete()
    assert asked(retried_by_hand) == {}


def asked(execution: Execution) -> dict[int, list[str]]:
    told_of = story.read(execution.pk, preview=None)
    assert told_of is not None
    return {run: [deed.text(told_of.execution) for deed in deeds] for run, deeds in told_of.asked_for.items()}


def test_who_may_not_see_payloads_sees_classes_alone(retried_by_hand: Execution, client: Client) -> None:
    ben = User.objects.create_user("ben", is_staff=True)
    ben.user_permissions.add(Permission.objects.get(codename="view_execution"))
    client.force_login(ben)
    page = client.get(reverse("admin:conductor_app_execution_change", args=[retried_by_hand.pk])).content.decode()
    assert "ConnectionError" in page
    assert "no line" not in page
    assert "in third_time" not in page


def test_the_timeline_draws_runs_and_what_is_between_them(retried_by_hand: Execution) -> None:
    told_of = story.read(retried_by_hand.pk, preview=None)
    assert told_of is not None
    drawn = runs.spans(told_of.execution, told_of.attempts, told_of.steps, told_of.now)
    states = [(one.state, one.has_failed) for one in drawn.segments if one.seconds > 0.5 or one.state == runs.RUNNING]
    assert states[0] == (runs.RUNNING, True)
    assert [state for state, _ in states].count(runs.RUNNING) == 3
    assert sum(one.seconds for one in drawn.segments if one.state == runs.RUNNING) < 3
    assert 4 < sum(one.seconds for one in drawn.segments if one.state == runs.WAITING) < 8, "the pause"
    assert sum(one.seconds for one in drawn.segments) < 60, "the hour after it had failed is nobody's"


def test_the_history_tells_when_each_run_began_and_why_it_ended(retried_by_hand: Execution) -> None:
    told_of = story.read(retried_by_hand.pk, preview=None)
    assert told_of is not None
    texts = [moment.text for moment in history(told_of)]
    assert [text for text in texts if "failed" in text] == [
        next(text for text in texts if "ConnectionError: no line in attempt 1" in text),
        next(text for text in texts if "attempt 2 failed for good" in text),
    ]
    assert sum("a run began" in text for text in texts) == 2


def test_runs_of_children_are_read_in_the_same_query(client: Client) -> None:
    @durable(max_retries=2, retry_backoff=0.01, retry_jitter=False)
    def unsteady(ctx: ExecutionContext) -> int:
        if ctx.attempt < 3:
            raise ConnectionError("no line")
        return 1

    @durable
    def parent(ctx: ExecutionContext) -> int:
        return ctx.invoke("one", unsteady)

    root = start(parent)
    advance(1)
    advance(1)
    told_of = story.read(root.pk, preview=60)
    assert told_of is not None
    below = child(root, "one")
    assert [row.outcome for row in told_of.attempts_of[below.pk]] == ["retried", "retried", "succeeded"]
    assert len(runs.spans(below, told_of.attempts_of[below.pk], [], told_of.now).attempts) == 2


# ----------------------------------------------------------------------------------------------- the length of steps


def test_a_step_has_the_time_that_its_function_took() -> None:
    def naps() -> int:
        time.sleep(0.2)
        return 1

    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.step("plain", naps)
        ctx.atomic_step("atomic", naps)
        ctx.step("quick", int)

    root = start(body)
    assert root.status == "succeeded"
    took = {step.name: (step.finished_at - step.created_at).total_seconds() for step in root.steps.all()}
    assert 0.15 < took["plain"] < 5
    assert 0.15 < took["atomic"] < 5
    assert took["quick"] < took["plain"]
