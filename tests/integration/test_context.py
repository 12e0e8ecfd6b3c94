"""What a body may ask of its context, and what it may not."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chain
from django.db import IntegrityError, connection, connections, transaction

from conductor_app import ExecutionContext, LeaseLost, api, transitions
from conductor_app.exceptions import (
    BlockingCallInTask,
    CancelExecution,
    ContextClosed,
    InvokeInsideTransaction,
    NestedDurableCall,
    ProgrammingError,
    ReleaseExecution,
    SuspendExecution,
    WrongThread,
)
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import steps
from conductor_app.transitions.leases import Lease
from tests.app import scenarios
from tests.app.ledger import count, note
from tests.support.bodies import advance, class_name, counts, durable, failure, redeploy, reload, run, start
from tests.support.executions import running

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


def noted(key: str, value: Any = None) -> Any:
    note(None, key)
    return value


# --------------------------------------------------------------------------------------------------------------- facts


def test_the_context_knows_its_execution() -> None:
    seen = []

    @durable
    def inner(ctx: ExecutionContext) -> str:
        seen.append(ctx)
        return ctx.idempotency_key("charge")

    @durable
    def outer(ctx: ExecutionContext) -> str:
        seen.append(ctx)
        return ctx.invoke("inner", inner)

    root = run(outer)
    child = root.children.get()
    assert [ctx.execution_id for ctx in seen] == [root.pk, child.pk, root.pk]
    assert {ctx.root_id for ctx in seen} == {root.pk}
    assert [ctx.parent_id for ctx in seen] == [None, root.pk, None]
    assert [ctx.task and ctx.task.name for ctx in seen] == [outer.name, inner.name, outer.name]
    assert root.get_result() == f"{child.pk}:charge"


def test_an_idempotency_key_is_the_same_on_every_attempt() -> None:
    keys = []

    @durable(max_retries=2, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> None:
        keys.append((ctx.attempt, ctx.idempotency_key("charge"), ctx.idempotency_key("refund")))
        raise ConnectionError

    execution = run(body)
    assert keys == [(attempt, f"{execution.pk}:charge", f"{execution.pk}:refund") for attempt in (1, 2, 3)]


# ---------------------------------------------------------------------------------------------------------- ctx.step


def test_a_step_runs_once_and_its_result_is_the_stored_one_from_the_first_run_on() -> None:
    seen: list[Any] = []

    @durable
    def body(ctx: ExecutionContext) -> Any:
        seen.append(ctx.step("a", noted, "a", (1, {2: "x"})))
        seen.append(ctx.atomic_step("b", noted, "b", (3,)))
        ctx.sleep("nap", 60)
        seen.append(ctx.step("c", noted, "c"))
        return ctx.invoke("echo", scenarios.echo, {"value": None})

    run(body)
    stored: list[Any] = [[1, {"2": "x"}], [3]]
    assert seen == [*stored, *stored, None, *stored, None]
    assert [count(key) for key in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("call", ["step", "atomic_step"])
@pytest.mark.parametrize("value", [None, 0, False, "", [], {}])
def test_an_empty_result_is_a_result(call: str, value: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        result = getattr(ctx, call)("a", noted, "a", value)
        return [result, ctx.invoke("echo", scenarios.echo, {"value": result})]

    (first, second) = run(body).get_result()
    assert (first, type(first)) == (second, type(second)) == (value, type(value))
    assert count("a") == 1


@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_step_passes_arguments_on_whatever_they_are_called(call: str) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        return getattr(ctx, call)("a", dict, step=1, fn=2, self=3)

    assert run(body).get_result() == {"step": 1, "fn": 2, "self": 3}


def test_every_value_that_a_step_returns_is_a_fresh_one() -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        mine = [1]
        first = ctx.step("a", lambda: mine)
        first.append(2)
        ctx.sleep("nap", 60)
        return [first, mine]

    # On the replay, the list of the record is there again, without what the body did to it.
    assert run(body).get_result() == [[1, 2], [1]]


def test_a_step_that_fails_uncaught_runs_again_on_the_next_attempt_and_finished_steps_do_not() -> None:
    @durable(max_retries=2)
    def body(ctx: ExecutionContext) -> Any:
        ctx.step("before", noted, "before")

        def work() -> int:
            note(None, "work")
            if ctx_attempt < 3:
                raise ConnectionError("down")
            return ctx_attempt

        ctx_attempt = ctx.attempt
        return ctx.step("work", work)

    execution = run(body)
    assert (execution.get_result(), execution.attempt) == (3, 3)
    assert (count("before"), count("work")) == (1, 3)


# --------------------------------------------------------------------------------------------------------- atomic_step


def test_the_writes_of_an_atomic_step_are_undone_with_its_failure() -> None:
    @durable(max_retries=1)
    def body(ctx: ExecutionContext) -> None:
        def work() -> None:
            note(ctx, "atomic")
            if ctx.attempt == 1:
                raise ValueError("no")

        ctx.atomic_step("work", work)

    execution = run(body)
    assert (execution.status, execution.attempt, count("atomic")) == ("succeeded", 2, 1)


def test_the_writes_of_an_atomic_step_are_undone_if_its_result_cannot_be_stored() -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.atomic_step("work", lambda: note(ctx, "atomic") or object())

    execution = run(body)
    assert (execution.status, execution.attempt, count("atomic")) == ("failed", 1, 0)


def test_the_writes_of_an_atomic_step_are_undone_if_another_run_has_taken_over() -> None:
    caught = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        Execution.objects.filter(pk=ctx.execution_id).update(fence=7)
        try:
            ctx.atomic_step("work", note, ctx, "atomic")
        except LeaseLost as error:
            caught.append(str(error))
            raise

    execution = start(body)
    assert caught == [
        f"The lease of execution {execution.pk} (fence 1) is lost: another run took over, or it was ended from "
        "outside. This run can write no more; side effects need ctx.idempotency_key() to be safe."
    ]
    assert (execution.status, execution.fence, execution.steps.count(), count("atomic")) == ("running", 7, 0, 0)


def test_a_run_that_was_taken_over_records_no_step_and_no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise a slow run asks before its step, and has no effect at all.
    monkeypatch.setattr("conductor_app.body.context.STEP_FRESH_SECONDS", 600)

    @durable
    def body(ctx: ExecutionContext, how: str) -> str:
        Execution.objects.filter(pk=ctx.execution_id).update(fence=7)
        if how == "step":
            ctx.step("work", note, ctx, "step")
        if how == "invoke":
            ctx.invoke("child", scenarios.echo)
        if how == "fail":
            raise ValueError("too late")
        return "too late"

    for how in ("step", "invoke", "fail", "succeed"):
        execution = start(body, how=how)
        assert (execution.status, execution.fence, execution.attempt, execution.result) == ("running", 7, 1, None)
        assert (execution.steps.count(), execution.children.count()) == (0, 0)
    assert count("step") == 1  # at least once: the effect was there before the record was refused


@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_database_error_in_a_step_leaves_the_connection_usable(call: str) -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> str:
        def twice() -> None:
            with transaction.atomic():
                note(ctx, "twice")
                row = Execution.objects.get(pk=ctx.execution_id)
                row.save(force_insert=True)

        try:
            getattr(ctx, call)("twice", twice)
        except IntegrityError:
            ctx.step("after", note, ctx, "after")
            ctx.invoke("child", scenarios.echo)
            return "compensated"
        return ""

    assert run(body).get_result() == "compensated"
    assert (count("twice"), count("after")) == (0, 1)


# -------------------------------------------------------------------------------------------------------------- sleeps


def test_a_sleep_lasts_as_long_as_it_is_told_and_once() -> None:
    @durable
    def body(ctx: ExecutionContext) -> str:
        ctx.sleep("minute", 60)
        ctx.sleep("hour", dt.timedelta(hours=1))
        ctx.sleep_until("past", dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
        return "rested"

    execution = start(body)
    assert execution.status == "waiting"
    advance(50)
    assert reload(execution).status == "waiting"
    advance(11)
    assert [step.status for step in execution.steps.all()] == ["succeeded", "pending"]
    advance(3_500)
    assert reload(execution).status == "waiting"
    advance(101)
    assert reload(execution).get_result() == "rested"
    assert reload(execution).attempt == 1


def test_a_sleep_until_an_instant_ends_at_that_instant() -> None:
    when = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    if connection.vendor == "mysql":
        when = when.replace(microsecond=0)

    @durable
    def body(ctx: ExecutionContext) -> str:
        ctx.sleep_until("tomorrow", when.astimezone(dt.timezone(dt.timedelta(hours=-8))))
        return "rested"

    execution = start(body)
    assert execution.steps.get().deadline_at == when
    advance(86_000)
    assert reload(execution).status == "waiting"
    advance(401)
    assert reload(execution).get_result() == "rested"


# ------------------------------------------------------------------------------------------------ where calls may stand


CALLS: dict[str, Callable[[ExecutionContext], Any]] = {
    'ctx.invoke("a")': lambda ctx: ctx.invoke("a", scenarios.echo),
    'ctx.step("a")': lambda ctx: ctx.step("a", int),
    'ctx.atomic_step("a")': lambda ctx: ctx.atomic_step("a", int),
    'ctx.sleep("a")': lambda ctx: ctx.sleep("a", 1),
    'ctx.sleep_until("a")': lambda ctx: ctx.sleep_until("a", dt.datetime.now(dt.UTC)),
    "ctx.checkpoint()": lambda ctx: ctx.checkpoint(),
    "ctx.retry()": lambda ctx: ctx.retry(),
}


def uncaught(task: Any, cls: type[Exception], text: str) -> None:
    """The execution fails with this error at once, without its retries, and nothing else is stored."""
    before = counts()
    execution = run(task)
    assert (failure(execution).error_class, failure(execution).message) == (class_name(cls), text)
    assert execution.attempt == 1
    assert counts() == (before[0] + 1, before[1], before[2] + 1)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("ctx.checkpoint()", "ctx.retry()")])
def test_a_durable_call_inside_a_transaction_is_refused_before_anything_is_done(name: str) -> None:
    text = (
        f"{name} was called inside transaction.atomic(), which would undo the memory of it. Call it outside, or put "
        "the writes into ctx.atomic_step()."
    )

    @durable
    def body(ctx: ExecutionContext) -> None:
        with transaction.atomic():
            note(ctx, "mine")
            CALLS[name](ctx)

    uncaught(body, InvokeInsideTransaction, text)
    assert count("mine") == 0

    @durable
    def stepped(ctx: ExecutionContext) -> None:
        with transaction.atomic():
            transaction.on_commit(lambda: None)
            with transaction.atomic(savepoint=False):
                CALLS[name](ctx)

    uncaught(stepped, InvokeInsideTransaction, text)


def test_a_transaction_on_another_database_that_the_body_opens_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    late = {**connections.settings["default"], "ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    monkeypatch.setitem(connections.settings, "late", {**late, "OPTIONS": {}})

    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.step("before", noted, "before")
        opened = connections["late"]
        opened.in_atomic_block, opened.atomic_blocks = True, [transaction.atomic(using="late")]
        ctx.step("inside", noted, "inside")

    try:
        execution = run(body)
    finally:
        del connections["late"]
    assert failure(execution).error_class == class_name(InvokeInsideTransaction)
    assert (count("before"), count("inside")) == (1, 0)


@pytest.mark.parametrize("outer", ["step", "atomic_step"])
@pytest.mark.parametrize("name", CALLS)
def test_a_durable_call_inside_a_steps_function_is_refused(name: str, outer: str) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        getattr(ctx, outer)("outer", lambda: note(ctx, "inside") or CALLS[name](ctx))

    uncaught(
        body,
        NestedDurableCall,
        f'{name} was called inside ctx.{outer}("outer"). A step\'s function must not call ctx; call it from the body.',
    )


@pytest.mark.parametrize("name", CALLS)
def test_a_context_is_good_for_one_run(name: str) -> None:
    kept: list[ExecutionContext] = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        kept.append(ctx)

    execution = run(body)
    with pytest.raises(ContextClosed) as refusal:
        CALLS[name](kept[0])
    assert str(refusal.value) == (
        f"{name} was called after the run had ended. A context is good for one run of the body."
    )
    assert kept[0].execution_id == execution.pk
    assert counts() == (1, 0, 0)


@pytest.mark.parametrize("name", CALLS)
def test_a_context_is_good_for_one_thread(name: str) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        errors: list[Exception] = []

        def work() -> None:
            try:
                CALLS[name](ctx)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        raise errors[0]

    uncaught(body, WrongThread, f"{name} was called in another thread than the one that runs the body.")


def test_waiting_for_a_result_inside_a_body_is_refused() -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext, how: str) -> None:
        other = scenarios.echo.delay()
        if how == "get":
            other.get()
        if how == "get_result":
            api.get_result(other)

    execution = run(body, how="get")
    other = Execution.objects.exclude(pk=execution.pk).get()
    assert failure(execution).error_class == class_name(BlockingCallInTask)
    assert failure(execution).message == (
        f"Waiting for {other.pk} inside a durable body would hold the worker. Use ctx.invoke instead of "
        ".delay(…).get()."
    )
    execution = run(body, how="get_result")
    assert failure(execution).error_class == class_name(BlockingCallInTask)
    assert failure(execution).message == (
        "api.get_result inside a durable body would hold the worker. Use ctx.invoke to wait for a child."
    )


@pytest.fixture
def told(caplog: Any) -> Callable[[], list[str]]:
    process.told_of_calls = set()
    return lambda: [text for record in caplog.records if "outside of a step" in (text := record.getMessage())]


@pytest.mark.parametrize(
    "call",
    [
        lambda: scenarios.echo.delay(value=1),
        lambda: scenarios.echo.apply_async(kwargs={"value": 1}, countdown=3_600),
        lambda: scenarios.echo.s(value=1).delay(),
        lambda: chain(scenarios.echo.s(value=1), scenarios.echo.s()).delay(),
    ],
    ids=["delay", "apply_async", "signature", "chain"],
)
def test_a_durable_task_that_a_body_calls_on_each_run_is_told_of_once(
    call: Callable[[], Any], told: Callable[[], list[str]]
) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        call()
        ctx.invoke("one", scenarios.echo)
        ctx.invoke("two", scenarios.echo)

    execution = run(body)
    run(body)
    place = f"test_context.py:{call.__code__.co_firstlineno}"
    assert told() == [
        f"{body.name} calls {scenarios.echo.name} at {place} with .delay() or .apply_async(), outside of a step. Each "
        "run of the body calls it again, and a body runs again whenever it has waited. Use ctx.start("
        '"name", task, payload), or call it inside of ctx.step, or with an idempotency_key.'
    ]
    assert execution.status == "succeeded"


def test_a_durable_task_that_is_called_once_is_not_worth_a_word(told: Callable[[], list[str]]) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.step("one", lambda: str(scenarios.echo.delay(value=1)))
        ctx.atomic_step("two", lambda: str(scenarios.echo.delay(value=1)))
        scenarios.echo.apply_async(kwargs={"value": 1}, idempotency_key="three")
        scenarios.echo.apply_async(kwargs={"value": 1}, task_id="5f0c5d1e-3b6e-4b58-9f0e-0d5f7c0f4a11")
        ctx.invoke("four", scenarios.echo)
        ctx.gather(ctx.start("five", scenarios.echo))

    scenarios.echo.delay(value=1)
    assert run(body).status == "succeeded"
    assert told() == []
    # The body, twice two children of its own, and what was called once each.
    assert Execution.objects.filter(parent=None, task=scenarios.echo.name).count() == 5


def test_a_body_that_calls_itself_like_a_function_is_told_how_to_invoke() -> None:
    @durable(name="tests.calls_itself")
    def body(ctx: ExecutionContext, levels: int) -> Any:
        return body(levels - 1) if levels else 0

    execution = run(body, levels=1)
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert failure(execution).message == (
        "tests.calls_itself is durable and cannot be called like a function. In a durable body use "
        'ctx.invoke("name", calls_itself, payload).'
    )


def test_celerys_own_retry_is_refused() -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        assert ctx.task is not None
        ctx.task.retry()

    uncaught(body, ProgrammingError, f"{body.name} is durable: use `raise ctx.retry(countdown=…)`.")


# ------------------------------------------------------------------------------------------------ replaying and logging


def test_the_body_knows_when_it_replays_and_its_logger_is_silent_then(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "conductor_app.execution")
    replaying = []

    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> None:
        def tell(line: str) -> None:
            replaying.append((line, ctx.is_replaying))
            ctx.logger.info(line)

        tell("begin")
        ctx.step("one", int)
        tell("one")
        ctx.invoke("two", scenarios.echo)
        tell("two")
        ctx.sleep("three", 60)
        tell("three")
        if ctx.attempt == 1:
            raise ConnectionError
        tell("four")

    execution = run(body)
    assert replaying == [
        *[("begin", False), ("one", False)],
        *[("begin", True), ("one", True), ("two", False)],
        *[("begin", True), ("one", True), ("two", True), ("three", False)],
        *[("begin", True), ("one", True), ("two", True), ("three", False), ("four", False)],
    ]
    lines = [record for record in caplog.records if record.getMessage() in ("begin", "one", "two", "three", "four")]
    assert [record.getMessage() for record in lines] == ["begin", "one", "two", "three", "three", "four"]
    assert {(record.execution_id, record.root_id, record.task) for record in lines} == {
        (str(execution.pk), str(execution.pk), body.name)
    }
    assert [record.attempt for record in lines] == [1, 1, 1, 1, 2, 2]


def test_a_line_of_the_users_own_keeps_its_extra_fields(caplog: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.logger.warning("with %s", "arguments", extra={"order": 7})

    execution = run(body)
    (record,) = [record for record in caplog.records if record.getMessage() == "with arguments"]
    assert (record.order, record.execution_id) == (7, str(execution.pk))


# ---------------------------------------------------------------------------------------------- a swallowed suspension


def swallow_bare(ctx: ExecutionContext) -> Any:
    try:
        return ctx.invoke("child", scenarios.echo, {"value": 1})
    except:  # noqa: E722
        return "swallowed"


def swallow_base_exception(ctx: ExecutionContext) -> Any:
    try:
        return ctx.invoke("child", scenarios.echo, {"value": 1})
    except BaseException:  # noqa: BLE001
        pass
    return "swallowed"


def swallow_in_finally(ctx: ExecutionContext) -> Any:
    value = "swallowed"
    try:
        value = ctx.invoke("child", scenarios.echo, {"value": 1})
    finally:
        return value  # noqa: B012


def swallow_by_raising(ctx: ExecutionContext) -> Any:
    try:
        return ctx.invoke("child", scenarios.echo, {"value": 1})
    except BaseException:  # noqa: BLE001
        raise ValueError("instead") from None


def swallow_and_call_on(ctx: ExecutionContext) -> Any:
    value = None
    for name in ("child", "other", "third"):
        try:
            value = ctx.invoke(name, scenarios.echo, {"value": 1})
        except BaseException:  # noqa: BLE001
            continue
    return value


@pytest.mark.parametrize(
    ("fn", "how"),
    [
        (swallow_bare, "returned"),
        (swallow_base_exception, "returned"),
        (swallow_in_finally, "returned"),
        (swallow_by_raising, "raised ValueError"),
    ],
)
def test_a_swallowed_suspension_takes_place_and_is_reported_with_its_line(
    fn: Callable[..., Any], how: str, caplog: Any
) -> None:
    task = durable(fn)
    execution = run(task)
    assert (execution.get_result(), execution.attempt) == (1, 1)
    reports = [record.getMessage() for record in caplog.records if "swallowed the suspension" in record.getMessage()]
    line = next(
        number
        for number, text in enumerate(open(__file__), 1)  # noqa: SIM115
        if number > fn.__code__.co_firstlineno and "ctx.invoke" in text
    )
    assert reports == [
        f"{task.name} swallowed the suspension at test_context.py:{line} (step 'child') and {how}. It is suspended all "
        "the same. Use `except Exception`, or re-raise conductor_app.SuspendExecution; do not return from `finally`."
    ]


def test_a_body_that_swallows_a_suspension_and_calls_on_gets_no_further() -> None:
    execution = run(durable(swallow_and_call_on))
    assert execution.get_result() == 1
    assert [step.name for step in execution.steps.all()] == ["child", "other", "third"]


def test_a_body_that_does_not_stop_calling_is_told_of_at_once_and_where_it_cannot_be_ended(caplog: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        for number in range(30):
            try:
                return ctx.invoke("child", scenarios.echo, {"value": number})
            except BaseException:  # noqa: BLE001
                continue
        return None

    execution = run(body)
    assert execution.get_result() == 0
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if "swallow" in record.getMessage()]
    line = body.run.__code__.co_firstlineno + 4
    what = (
        f"{body.name} swallowed the suspension at test_context.py:{line} (step 'child') and called on at "
        f"test_context.py:{line}"
    )
    advice = "Use `except Exception`, or re-raise conductor_app.SuspendExecution; do not return from `finally`."
    assert lines[:2] == [
        ("ERROR", f"{what}. It gets no further. {advice}"),
        (
            "CRITICAL",
            f"{what}, 10 times. In this pool it cannot be ended: it holds a slot until it returns or the worker is "
            f"restarted. {advice}",
        ),
    ]
    assert len(lines) == 3


def test_a_call_while_the_suspension_passes_is_not_worth_a_word(caplog: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return ctx.invoke("child", scenarios.echo, {"value": 1})
        finally:
            ctx.step("clean-up", int)

    execution = run(body)
    assert (execution.get_result(), [step.name for step in execution.steps.all()]) == (1, ["child", "clean-up"])
    assert [record for record in caplog.records if "swallow" in record.getMessage()] == []


def test_an_except_exception_does_not_catch_a_suspension() -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return ctx.invoke("child", scenarios.echo, {"value": 1})
        except Exception:  # noqa: BLE001
            return "caught"

    assert run(body).get_result() == 1


def test_the_parent_is_suspended_after_its_body_has_unwound() -> None:
    seen = []

    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return ctx.invoke("child", scenarios.echo, {"value": 1})
        finally:
            seen.append((reload(ctx.execution_id).status, Execution.objects.count()))

    run(body)
    assert seen == [("running", 1), ("running", 2)]


def test_a_body_may_change_while_it_waits() -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        ctx.sleep("pause", 60)
        return "old"

    execution = start(body)

    def changed(ctx: ExecutionContext) -> Any:
        ctx.sleep("pause", 60)
        return "new"

    redeploy(body, changed)
    advance(61)
    assert reload(execution).get_result() == "new"


# ------------------------------------------------------------------------------------------- shutdown, and cancellation


UNRECORDED: dict[str, Callable[[ExecutionContext], Any]] = {
    "step": lambda ctx: ctx.step("new", note, ctx, "effect"),
    "atomic_step": lambda ctx: ctx.atomic_step("new", note, ctx, "effect"),
    "start": lambda ctx: ctx.start("new", scenarios.echo),
    "checkpoint": lambda ctx: ctx.checkpoint(),
}


def context_of(run: Execution, *, draining: bool = False) -> ExecutionContext:
    return ExecutionContext(run, steps.recall(run.pk), Lease(run), draining=lambda: draining)


@pytest.mark.parametrize("call", UNRECORDED)
def test_a_call_that_is_not_recorded_gives_way_to_a_shutdown_again_and_again(call: str) -> None:
    run = running()
    ctx = context_of(run, draining=True)
    for _ in range(2):
        with pytest.raises(ReleaseExecution):
            UNRECORDED[call](ctx)
    with pytest.raises(ReleaseExecution):
        ctx.invoke("another", scenarios.echo)
    assert (count("effect"), run.children.count(), run.steps.count()) == (0, 0, 0)


def test_recorded_calls_are_replayed_during_a_shutdown_and_what_suspends_suspends() -> None:
    run = running()
    transitions.record_step(run, "known", result="7")
    ctx = context_of(run, draining=True)
    assert ctx.step("known", note, None, "effect") == 7
    with pytest.raises(SuspendExecution):
        ctx.invoke("child", scenarios.echo)


@pytest.mark.parametrize("call", ["step", "atomic_step", "checkpoint"])
def test_no_function_begins_after_a_cancel_that_is_older_than_the_last_word_of_the_database(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("conductor_app.body.context.STEP_FRESH_SECONDS", 0)
    monkeypatch.setattr("conductor_app.body.context.CHECKPOINT_INTERVAL_SECONDS", 0)
    run = running()
    ctx = context_of(run)
    assert transitions.request_cancel(run.pk, "enough")
    for _ in range(2):
        with pytest.raises(CancelExecution):
            UNRECORDED[call](ctx)
    assert count("effect") == 0


def test_steps_in_quick_succession_do_not_ask_whether_they_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conductor_app.body.context.STEP_FRESH_SECONDS", 600)
    monkeypatch.setattr(transitions, "check_held", lambda run: pytest.fail("asked"))
    ctx = context_of(running())
    for number in range(3):
        ctx.step(f"step-{number}", int)
        ctx.atomic_step(f"atomic-{number}", int)
