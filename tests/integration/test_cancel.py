"""Cancelling, from each status, downwards to the children and upwards to the parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from django.test import Client

from conductor_app import ChildCancelled, ExecutionContext, api
from conductor_app.admin import figures
from conductor_app.exceptions import ExecutionCancelled
from conductor_app.models import Execution, FailedExecution
from conductor_app.store import clock
from conductor_app.telling import story
from conductor_app.telling.headlines import headline
from conductor_app.telling.history import history
from conductor_app.values.failures import load_failure
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support import executions
from tests.support.bodies import advance, child, class_name, durable, failure, go_on, reload, run, start

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


@durable
def naps_below(ctx: ExecutionContext, levels: int) -> str:
    """Have a chain of descendants, the last of which sleeps."""
    note(ctx, "body")
    if levels:
        return ctx.invoke("below", naps_below, {"levels": levels - 1})
    ctx.sleep("nap", 3_600)
    return "rested"


# ----------------------------------------------------------------------------------------------------- from each status


@pytest.mark.parametrize(
    "how", [lambda result: result, lambda result: result.id, lambda result: UUID(result.id), reload]
)
def test_a_queued_execution_is_cancelled_at_once_and_never_runs(how: Callable[[Any], Any]) -> None:
    result = scenarios.echo.delay(1)
    assert api.cancel(how(result), reason="no stock") is True
    execution = reload(result)
    assert (execution.status, execution.error_message) == ("cancelled", "Cancelled: no stock")
    assert execution.finished_at is not None
    assert (execution.attempt, execution.fence) == (1, 0)
    assert go_on() == 0
    assert count("body") == 0
    assert FailedExecution.objects.count() == 0


def test_a_cancel_needs_no_reason() -> None:
    result = scenarios.echo.apply_async(countdown=3_600)
    assert api.cancel(result)
    assert reload(result).error_message == "Cancelled"


def test_cancelling_a_waiting_execution_cancels_all_its_descendants() -> None:
    root = start(naps_below, levels=3)
    tree = Execution.objects.filter(root=root).order_by("depth")
    assert [row.status for row in tree] == ["waiting"] * 4
    assert api.cancel(root, reason="no stock")
    assert [(row.status, row.error_message) for row in tree.all()] == [
        ("cancelled", "Cancelled: no stock"),
        *[("cancelled", "Cancelled: its parent was cancelled")] * 3,
    ]
    assert advance(3_601) == 0
    assert FailedExecution.objects.count() == 0


def test_cancelling_leaves_finished_children_and_other_trees_alone() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("done", scenarios.echo, {"value": 1})
        ctx.invoke("nap", scenarios.naps, {"seconds": 60})

    root, other = start(parent), start(parent)
    api.cancel(root)
    assert (child(root, "done").status, child(root, "nap").status) == ("succeeded", "cancelled")
    assert (reload(other).status, child(other, "nap").status) == ("waiting", "waiting")


RUNNING: list[tuple[str, Callable[[ExecutionContext], Any]]] = [
    ("step", lambda ctx: ctx.step("step", note, ctx, "effect")),
    ("atomic_step", lambda ctx: ctx.atomic_step("step", note, ctx, "effect")),
    ("invoke", lambda ctx: ctx.invoke("child", scenarios.echo)),
    ("sleep", lambda ctx: ctx.sleep("nap", 60)),
    ("raise", lambda ctx: int("x")),
    ("retry", lambda ctx: (_ for _ in ()).throw(ctx.retry(countdown=1))),
]


@pytest.mark.parametrize("call", [call for _, call in RUNNING], ids=[name for name, _ in RUNNING])
def test_a_running_body_notices_at_its_next_call_or_at_the_end_of_its_attempt(call: Callable[..., Any]) -> None:
    reached = []

    @durable
    def body(ctx: ExecutionContext) -> str:
        assert api.cancel(ctx.execution_id, reason="no stock")
        assert reload(ctx.execution_id).status == "running"
        try:
            call(ctx)
            ctx.step("next", int)
        except Exception:
            raise
        reached.append("end")
        return "done"

    execution = start(body)
    assert (execution.status, execution.error_message) == ("cancelled", "Cancelled: no stock")
    assert reached == []
    assert (execution.children.count(), FailedExecution.objects.count()) == (0, 0)
    # What had been done is remembered: an operator's retry goes on behind it.
    recorded = [step.name for step in execution.steps.all()]
    assert recorded == (["step"] if count("effect") else [])


@pytest.mark.parametrize("max_retries", [0, 3])
@pytest.mark.parametrize("how", ["returns", "raises", "asks for a retry", "returns what is no JSON", "swallows it"])
def test_a_body_that_ends_before_it_notices_is_cancelled_whatever_it_does(how: str, max_retries: int) -> None:
    runs = []

    @durable(max_retries=max_retries)
    def body(ctx: ExecutionContext) -> Any:
        runs.append(ctx.attempt)
        if len(runs) > 1:
            return "again"
        api.cancel(ctx.execution_id, reason="no stock")
        if how == "raises":
            raise ValueError("no")
        if how == "asks for a retry":
            raise ctx.retry(countdown=0)
        if how == "swallows it":
            try:
                ctx.sleep("nap", 60)
            except BaseException:  # noqa: BLE001
                return "half of it"
        return object() if how == "returns what is no JSON" else "done"

    execution = start(body)
    assert (execution.status, execution.error_message) == ("cancelled", "Cancelled: no stock")
    assert execution.get_result() == ("done" if how == "returns" else None)
    assert not FailedExecution.objects.exists()
    # A retry adopts what the body has returned, and runs it again otherwise.
    api.retry(execution)
    go_on()
    assert reload(execution).get_result() == ("done" if how == "returns" else "again")
    assert len(runs) == (1 if how == "returns" else 2)


def test_a_cancelled_result_that_a_retry_adopts_reaches_the_parent() -> None:
    @durable
    def child_body(ctx: ExecutionContext) -> str:
        note(ctx, "child")
        api.cancel(ctx.root_id)
        api.cancel(ctx.execution_id)
        return "done"

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", child_body)

    root = start(parent)
    go_on()
    assert [reload(root).status, child(root, "child").status] == ["cancelled", "cancelled"]
    api.retry(root)
    go_on()
    assert (reload(root).get_result(), child(root, "child").status, count("child")) == ("done", "succeeded", 1)


def test_a_body_that_swallows_its_cancellation_gets_no_further() -> None:
    reached = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        api.cancel(ctx.execution_id)
        for number in range(5):
            try:
                ctx.step(f"step-{number}", reached.append, number)
            except BaseException as error:  # noqa: BLE001
                reached.append(type(error).__name__)

    assert start(body).status == "cancelled"
    # Inside of a TestCase's transaction nobody can have seen the cancellation before the first step is recorded.
    assert reached[-4:] == ["CancelExecution"] * 4
    assert sum(isinstance(entry, int) for entry in reached) <= 1


def test_a_checkpoint_notices_a_cancel(monkeypatch: Any) -> None:
    monkeypatch.setattr("conductor_app.body.context.CHECKPOINT_INTERVAL_SECONDS", 0)

    @durable
    def body(ctx: ExecutionContext) -> str:
        ctx.checkpoint()
        note(ctx, "before")
        api.cancel(ctx.execution_id)
        ctx.checkpoint()
        note(ctx, "after")
        return "done"

    assert start(body).status == "cancelled"
    assert (count("before"), count("after")) == (1, 0)


# ----------------------------------------------------------------------------------------------------------- the parent


def test_a_cancelled_child_raises_in_its_parent() -> None:
    seen = []

    @durable
    def parent(ctx: ExecutionContext) -> str:
        try:
            ctx.invoke("nap", scenarios.naps, {"seconds": 3_600})
        except ChildCancelled as error:
            seen.append((str(error), error.step, error.child_id))
        ctx.sleep("nap-too", 60)
        return "went on"

    root = start(parent)
    napping = child(root, "nap")
    assert api.cancel(napping, reason="no stock")
    go_on()
    advance(61)
    assert reload(root).get_result() == "went on"
    text = "Child execution was cancelled (step 'nap'): Cancelled: no stock"
    assert seen == [(text, "nap", napping.pk)] * 2


def test_a_cancelled_child_fails_a_parent_that_does_not_catch_it_without_its_retries() -> None:
    root = start(naps_below, levels=2)
    middle = child(root, "below")
    api.cancel(child(middle, "below"))
    go_on()
    text = "Child execution was cancelled (step 'below'): Cancelled"
    assert (reload(middle).status, reload(middle).attempt, failure(middle).message) == ("failed", 1, text)
    assert failure(middle).error_class == class_name(ChildCancelled)
    assert failure(root).message == f"Child execution failed: {text}"
    assert FailedExecution.objects.count() == 2


# ------------------------------------------------------------------------------------------------------------- too late


@pytest.mark.parametrize("task", [scenarios.echo, scenarios.boom])
def test_cancelling_a_finished_execution_changes_nothing(task: Any) -> None:
    execution = run(task)
    before = Execution.objects.filter(pk=execution.pk).values().get()
    assert api.cancel(execution, reason="too late") is False
    assert Execution.objects.filter(pk=execution.pk).values().get() == before


def test_cancelling_twice_keeps_the_first_reason() -> None:
    root = start(naps_below, levels=0)
    assert api.cancel(root, reason="first") is True
    assert api.cancel(root, reason="second") is False
    assert reload(root).error_message == "Cancelled: first"


def test_the_result_of_a_cancelled_execution_is_an_error() -> None:
    result = scenarios.echo.delay()
    api.cancel(result, reason="no stock")
    with pytest.raises(ExecutionCancelled, match=r"^Cancelled: no stock$"):
        api.get_result(result)


# -------------------------------------------------------------------------------------------------------------- expires


@pytest.mark.parametrize("expires", [30, 29.5, clock.dt.timedelta(seconds=30), "datetime", "text"])
def test_an_execution_that_expires_before_it_starts_is_cancelled(expires: Any) -> None:
    if expires in ("datetime", "text"):
        instant = clock.read("default") + clock.dt.timedelta(seconds=30)
        expires = instant if expires == "datetime" else instant.isoformat()
    result = scenarios.echo.apply_async(expires=expires)
    advance(31)
    assert reload(result).error_message == "Cancelled: it expired before it started"
    assert count("body") == 0


@pytest.mark.parametrize("expires", [0, -5, clock.dt.timedelta(seconds=-1)])
def test_an_execution_that_is_expired_from_the_beginning_never_starts(expires: Any) -> None:
    result = scenarios.echo.apply_async(expires=expires)
    go_on()
    assert (reload(result).status, count("body")) == ("cancelled", 0)


def test_an_execution_that_has_started_does_not_expire() -> None:
    # An hour: no machine stands still for so long between the creation and the first run.
    result = scenarios.naps.apply_async(kwargs={"seconds": 7_200}, expires=3_600)
    assert go_on() == 1
    advance(7_201)
    assert api.get_result(result, timeout=0) == "rested"
    result = scenarios.flaky.apply_async(kwargs={"failures": 1}, expires=3_600)
    assert go_on() >= 1, vars(reload(result))
    assert reload(result).started_at is not None
    advance(7_200)
    assert api.get_result(result, timeout=0) == 2


def test_an_expired_child_is_a_cancelled_child() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("late", scenarios.echo.s(1).set(countdown=60, expires=30))

    root = run(parent)
    assert root.error_message == (
        "Child execution was cancelled (step 'late'): Cancelled: it expired before it started"
    )


# ------------------------------------------------------------------------------------- what a cancelled one waited for


@durable
def sleeps_and_waits(ctx: ExecutionContext, what: str) -> Any:
    """Wait for an instant or for an event."""
    return ctx.sleep("nap", 100) if what == "nap" else ctx.wait_for("approval", "approved", timeout=100)


@pytest.mark.parametrize("what", ["nap", "approval"])
def test_the_wait_of_a_cancelled_execution_is_cancelled_and_no_deadline_decides_it(what: str) -> None:
    result = start(sleeps_and_waits, what=what)
    assert api.cancel(result, reason="wrong order")
    step = reload(result).steps.get(name=what)
    assert (step.status, load_failure(step.error).message) == ("cancelled", "Cancelled: wrong order")
    advance(200)
    assert reload(result).steps.get(name=what).status == "cancelled"
    told = story.read(result.pk, preview=10)
    assert told is not None
    said = [moment.text for moment in history(told)]
    assert any(text.startswith(f'step "{what}" cancelled after ') for text in said)
    assert not any("times out" in text or text.endswith(" ends") for text in said)
    assert headline(told.situation).text.startswith("Cancelled ")
    assert f'while waiting for "{what}": wrong order' in headline(told.situation).text


@pytest.mark.parametrize("what", ["nap", "approval"])
def test_a_retry_takes_up_the_wait_that_a_cancel_has_ended(what: str) -> None:
    result = start(sleeps_and_waits, what=what)
    before = reload(result).steps.get(name=what).deadline_at
    advance(40)
    api.cancel(result)
    advance(10)
    api.retry(result)
    execution = reload(result)
    step = execution.steps.get(name=what)
    assert (execution.status, step.status, step.finished_at) == ("waiting", "pending", None)
    # A sleep ends when it was to end; somebody who answers has as much time as before.
    assert (step.deadline_at == before) is (what == "nap")
    if what == "approval":
        api.send_event(result, "approved", 7)
        go_on()
        assert reload(result).get_result() == 7
        return
    advance(30)
    assert reload(result).status == "waiting"
    advance(21)
    assert (reload(result).status, count("body")) == ("succeeded", 0)


def test_what_a_cancelled_execution_waited_for_is_counted_nowhere(client: Client) -> None:
    """Its child may still run; the step is undecided until that has ended."""
    parent, child = executions.family()
    assert api.cancel(parent)
    assert parent.steps.get().status == "pending"
    assert reload(child).status == "running"
    found = figures.read(figures.Sight())
    assert found["open"] == {"queued": 0, "running": 1, "waiting": 0}
    client.force_login(User.objects.create_superuser("ana"))
    rows = client.get("/admin/conductor_app/execution/json/").json()["rows"]
    assert {row["id"]: row["waiting_for"] for row in rows} == {str(parent.pk): [], str(child.pk): []}
