"""Callers in event loops: each call has a twin to await, and the others are refused before anything is done."""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from celery.exceptions import SoftTimeLimitExceeded
from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError, connection, connections, transaction

from conductor_app import api, transitions
from conductor_app.engine import awaiting
from conductor_app.exceptions import (
    BlockingCallInEventLoop,
    BlockingCallInTask,
    ExecutionCancelled,
    ExecutionFailed,
    ExecutionFinished,
    IdempotencyConflict,
    ProgrammingError,
    WaitInsideTransaction,
)
from conductor_app.models import Event, Execution
from conductor_app.store.ids import new_root_id
from conductor_app.store.process import process
from tests.app.models import Ledger
from tests.app.scenarios import add, echo
from tests.support import executions
from tests.support.bodies import durable, go_on, reload, run
from tests.support.polling import wait_until
from tests.support.process import note_published

pytestmark = pytest.mark.django_db


def in_loop(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run it in an event loop, whose synchronous calls are made in this thread, on the test's connection."""

    async def in_it() -> Any:
        return await work()

    return async_to_sync(in_it)()


def succeed(execution: Execution, result: str = "7") -> None:
    transitions.succeed(executions.claimed(execution), result)


# ---------------------------------------------------------------------------------------------------------- refusals


def calls() -> dict[str, tuple[Callable[[], Any], str]]:
    known = executions.queued()
    return {
        "delay": (lambda: add.delay(1, y=2), "`await tests.app.scenarios.add.aapply_async(…)`, or `adelay`"),
        "apply_async": (
            lambda: add.apply_async((1, 2)),
            "`await tests.app.scenarios.add.aapply_async(…)`, or `adelay`",
        ),
        "signature": (lambda: add.s(1, 2).delay(), "`await tests.app.scenarios.add.aapply_async(…)`, or `adelay`"),
        "start_many": (lambda: add.start_many([{"x": 1, "y": 2}]), "`await tests.app.scenarios.add.astart_many(…)`"),
        "apply": (lambda: add.apply((1, 2)), "`await sync_to_async(tests.app.scenarios.add.apply)(…)`"),
        "get": (lambda: add.AsyncResult(str(known.pk)).get(timeout=0), "`await api.aget_result(…)`"),
        "get_result": (lambda: api.get_result(known, timeout=0), "`await api.aget_result(…)`"),
        "cancel": (lambda: api.cancel(known), "`await api.acancel(…)`"),
        "retry": (lambda: api.retry(known), "`await api.aretry(…)`"),
        "send_event": (lambda: api.send_event(known, "go"), "`await api.asend_event(…)`"),
        "find": (lambda: api.find(known), "`await api.afind(…)`"),
        "rerun": (lambda: api.rerun(known), "`await sync_to_async(api.rerun)(…)`"),
        "wake": (lambda: api.wake(known), "`await sync_to_async(api.wake)(…)`"),
        "publish_again": (lambda: api.publish_again(known), "`await sync_to_async(api.publish_again)(…)`"),
        "tag": (lambda: api.tag(known, {"a": "b"}), "`await sync_to_async(api.tag)(…)`"),
        "get_tags": (lambda: api.get_tags(known), "`await sync_to_async(api.get_tags)(…)`"),
    }


NAMES = [
    *("delay", "apply_async", "signature", "start_many", "apply", "get", "get_result", "cancel", "retry"),
    *("send_event", "find", "rerun", "wake", "publish_again", "tag", "get_tags"),
]


@pytest.mark.parametrize("name", NAMES)
def test_what_would_block_an_event_loop_is_refused_and_names_its_twin(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, instead = calls()[name]
    before = list(Execution.objects.values())
    asked = []
    monkeypatch.setattr("conductor_app.body.headers.collect", lambda new, *_: asked.append(new) or new)

    async def block() -> None:
        call()

    with pytest.raises(BlockingCallInEventLoop) as caught:
        in_loop(block)
    assert f"Use {instead}. Nothing was done." in str(caught.value)
    assert isinstance(caught.value, SynchronousOnlyOperation)
    assert list(Execution.objects.values()) == before
    assert (asked, Event.objects.count()) == ([], 0)


def test_django_allow_async_unsafe_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")

    async def block() -> Any:
        return await sync_to_async(api.get_tags)(known), api.get_result.__name__, _refused()

    def _refused() -> bool:
        try:
            api.find("no id")
        except BlockingCallInEventLoop:
            return True
        except ValueError:
            return False
        return False

    known = executions.queued()
    assert in_loop(block) == ({}, "get_result", False)


def test_a_thread_beside_an_event_loop_is_not_concerned() -> None:
    async def work() -> Any:
        return await sync_to_async(add.delay)(1, y=2), await sync_to_async(api.find)(known)

    known = executions.queued()
    result, found = in_loop(work)
    assert reload(result).kwargs == {"y": 2}
    assert found == known


# ------------------------------------------------------------------------------------------------------------- twins


def test_tasks_are_called_from_an_event_loop() -> None:
    async def work() -> Any:
        first = await add.adelay(1, y=2)
        second = await add.aapply_async((3,), {"y": 4}, idempotency_key="k", tags={"a": "b"}, countdown=0)
        many = await add.astart_many([{"x": 5, "y": n} for n in range(2)], idempotency_keys=["m", "n"])
        keyed = await add.astart_many([{"x": 5, "y": n} for n in range(3)], unique_keys=["u", None, "u"])
        assert [result.is_new for result in keyed] == [True, True, False]
        return first, second, many, await add.aapply_async((3,), {"y": 4}, idempotency_key="k")

    first, second, many, again = in_loop(work)
    assert again.id == second.id
    go_on()
    assert [api.get_result(result) for result in (first, second, *many)] == [3, 7, 5, 6]
    assert api.get_tags(second) == {"a": "b"}


def test_errors_of_a_twin_are_those_of_its_call() -> None:
    async def work() -> None:
        await add.aapply_async((1, 1), idempotency_key="k")
        with pytest.raises(TypeError, match="missing a required argument: 'y'"):
            await add.adelay(1)
        with pytest.raises(TypeError, match='has no option "tag"'):
            await add.aapply_async((1, 1), tag="x")  # type: ignore[call-arg]
        with pytest.raises(IdempotencyConflict):
            await add.astart_many([{"x": 9, "y": 9}], idempotency_keys=["k"])
        with pytest.raises(Execution.DoesNotExist):
            await api.acancel(new_root_id())

    in_loop(work)
    assert Execution.objects.count() == 1


def test_executions_are_acted_on_from_an_event_loop() -> None:
    waiting, failed, ended = executions.queued(), executions.running(), executions.running()
    transitions.fail(failed, executions.FAILURE)
    transitions.succeed(ended, "1")

    async def work() -> None:
        assert (await api.afind(str(waiting.pk))).status == "queued"
        assert await api.asend_event(waiting, "go", {"by": "ana"}, id="1") is True
        assert await api.asend_event(waiting, "go", {"by": "ana"}, id="1") is False
        with pytest.raises(ExecutionFinished):
            await api.asend_event(ended, "go")
        assert await api.acancel(waiting, "no more", actor="ana") is True
        await api.aretry(failed, actor="ana")

    in_loop(work)
    assert [reload(execution.pk).status for execution in (waiting, failed)] == ["cancelled", "queued"]


def test_a_call_joins_the_transaction_that_a_function_opens_for_it() -> None:
    def order() -> None:
        with transaction.atomic():
            add.delay(1, y=2)
            transaction.set_rollback(True)

    in_loop(sync_to_async(order))
    assert not Execution.objects.exists()


def test_twins_are_coroutine_functions_with_names_of_their_own() -> None:
    for name in ("aget_result", "asend_event", "acancel", "aretry", "afind"):
        assert getattr(api, name).__name__ == name
        assert asyncio.iscoroutinefunction(getattr(api, name))


# ----------------------------------------------------------------------------------------------------------- results


def test_a_result_is_awaited() -> None:
    execution = executions.queued()

    async def work() -> Any:
        waits = asyncio.gather(*[api.aget_result(execution, timeout=20) for _ in range(3)])
        await asyncio.sleep(0.05)
        await sync_to_async(succeed)(execution, "[1,2]")
        return await waits

    assert in_loop(work) == [[1, 2]] * 3
    assert not process.pollers


def test_errors_are_those_of_get_result() -> None:
    failed, cancelled, open_ = executions.running(), executions.queued(), executions.queued()
    transitions.fail(failed, executions.FAILURE)
    api.cancel(cancelled, "no more")

    async def work() -> None:
        with pytest.raises(ExecutionFailed, match="card declined"):
            await api.aget_result(failed)
        with pytest.raises(ExecutionCancelled, match="no more"):
            await api.aget_result(cancelled.pk)
        with pytest.raises(TimeoutError, match=r"is still queued after 0s. It goes on; wait again."):
            await api.aget_result(open_, timeout=0)
        with pytest.raises(TimeoutError, match=r"is still queued after 0.03s"):
            await api.aget_result(open_, timeout=0.03)
        with pytest.raises(Execution.DoesNotExist, match="Was its transaction rolled back"):
            await api.aget_result(new_root_id())
        with pytest.raises(ValueError, match="an execution is named by a UUID"):
            await api.aget_result("7")
        with pytest.raises(ValueError, match="timeout must be ≥ 0 seconds"):
            await api.aget_result(open_, timeout=-1)

    in_loop(work)


def test_waiting_for_what_this_transaction_has_created_is_refused() -> None:
    execution = executions.queued()
    with transaction.atomic(), pytest.raises(WaitInsideTransaction):
        created = add.delay(1, y=2)
        in_loop(lambda: api.aget_result(created))
    if connection.vendor == "sqlite":
        with pytest.raises(WaitInsideTransaction):
            in_loop(lambda: api.aget_result(execution))


def test_a_thousand_wait_in_one_thread_and_share_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [executions.queued() for _ in range(50)]
    threads: list[int] = []
    asked: list[int] = []
    read = awaiting._read

    def noting(ids: Any, first: Any) -> Any:
        asked.append(len(ids))
        return read(ids, first)

    async def work() -> Any:
        waits = [asyncio.create_task(api.aget_result(known[n % 50], timeout=60)) for n in range(1_000)]
        while not asked:
            await asyncio.sleep(0.01)
        threads.append(threading.active_count())
        for execution in known:
            await sync_to_async(succeed)(execution)
        return await asyncio.gather(*waits)

    monkeypatch.setattr(awaiting, "_read", noting)
    before = threading.active_count()
    assert in_loop(work) == [7] * 1_000
    assert asked[0] == 50
    # The loop's own thread is one; nobody who waits has another.
    assert threads[0] <= before + 1


def test_who_waits_for_long_looks_seldom_and_together() -> None:
    waiters = []
    for began in (50.0, 70.0, 99.9):
        waiter = awaiting._Waiter(new_root_id(), None, None)  # type: ignore[arg-type]
        waiter.due = began
        for _ in range(6):
            waiter.note_look(began)
        waiters.append(waiter)
    for waiter, now in zip(waiters, (100.0, 100.2, 100.49), strict=True):
        waiter.note_look(now)
    assert [waiter.due for waiter in waiters] == [100.5] * 3


def test_a_look_is_the_last_one_at_the_end_of_the_timeout() -> None:
    waiter = awaiting._Waiter(new_root_id(), 3, None)  # type: ignore[arg-type]
    waiter.last = 100.1
    for _ in range(10):
        waiter.note_look(100.0)
    assert waiter.due == 100.1


def test_a_cancelled_awaiter_leaves_nothing_behind() -> None:
    execution = executions.queued()
    left = []

    async def work() -> None:
        wait = asyncio.create_task(api.aget_result(execution, timeout=60))
        other = asyncio.create_task(api.aget_result(execution, timeout=60))
        await asyncio.sleep(0.05)
        (poller,) = process.pollers.values()
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        assert len(poller._waiters) == 1
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        for _ in range(100):
            if len(asyncio.all_tasks()) == 1 and not process.pollers:
                break
            await asyncio.sleep(0.05)
        left.append((len(asyncio.all_tasks()), len(process.pollers), len(poller._waiters)))

    in_loop(work)
    assert left == [(1, 0, 0)]


def test_a_loop_that_ends_while_somebody_waits_is_forgotten() -> None:
    execution = executions.queued()

    async def work() -> None:
        task = asyncio.create_task(api.aget_result(execution, timeout=60))
        await asyncio.sleep(0.05)
        assert not task.done()

    in_loop(work)
    gc.collect()
    assert not process.pollers


def test_a_database_that_is_away_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    execution, tries = executions.queued(), []
    read = awaiting._read

    def failing(*args: Any) -> Any:
        tries.append(1)
        if len(tries) < 4:
            raise OperationalError(2006, "MySQL server has gone away")
        return read(*args)

    succeed(execution)
    monkeypatch.setattr(awaiting, "_read", failing)
    assert in_loop(lambda: api.aget_result(execution, timeout=30)) == 7
    assert len(tries) == 4


def test_a_database_that_stays_away_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any) -> Any:
        raise OperationalError(2006, "MySQL server has gone away")

    monkeypatch.setattr(awaiting, "_read", failing)
    with pytest.raises(OperationalError, match="gone away"):
        in_loop(lambda: api.aget_result(new_root_id(), timeout=0.1))


def test_another_error_of_a_look_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any) -> Any:
        raise ArithmeticError("a bug")

    async def work() -> Any:
        waits = [api.aget_result(new_root_id()) for _ in range(2)]
        return await asyncio.gather(*waits, return_exceptions=True)

    monkeypatch.setattr(awaiting, "_read", failing)
    assert [type(error) for error in in_loop(work)] == [ArithmeticError] * 2


@pytest.mark.django_db(transaction=True)
def test_outside_of_a_request_it_waits_by_the_thread_of_djangos_own_calls() -> None:
    note_published()

    async def work() -> Any:
        result = await echo.adelay(7)
        wait = asyncio.create_task(api.aget_result(result, timeout=30))
        await asyncio.sleep(0.02)
        row = await Execution.objects.aget(pk=result.id)
        await sync_to_async(succeed)(row)
        try:
            return await wait
        finally:
            await sync_to_async(connections.close_all)()

    assert asyncio.run(work()) == 7
    assert not process.pollers


# ------------------------------------------------------------------------------------------------- coroutine functions


async def fetched(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


class Fetcher:
    async def __call__(self, value: Any) -> Any:
        return await fetched(value)


@pytest.mark.parametrize("kind", ["step", "atomic_step"])
@pytest.mark.parametrize("form", ["function", "lambda", "callable", "partial"])
def test_a_coroutine_function_is_a_step(kind: str, form: str) -> None:
    fn: Any = {
        "function": fetched,
        "lambda": lambda value: fetched({**value}),
        "callable": Fetcher(),
        "partial": functools.partial(fetched),
    }[form]

    @durable
    def body(ctx: Any) -> Any:
        value = getattr(ctx, kind)("fetch", fn, {"a": (1, 2)})
        return [value, ctx.invoke("echo", echo, 1)]

    assert run(body).get_result() == [{"a": [1, 2]}, 1]


def test_it_is_run_once_and_its_error_is_remembered() -> None:
    ran = []

    async def fails() -> None:
        ran.append(1)
        raise LookupError("no such order")

    @durable
    def body(ctx: Any) -> Any:
        try:
            ctx.step("fetch", fails)
        except LookupError as error:
            return [str(error), ctx.invoke("echo", echo, 1)]

    assert run(body).get_result() == ["no such order", 1]
    assert ran == [1]


def test_what_it_writes_by_async_methods_is_in_the_transaction_of_an_atomic_step() -> None:
    tries = []

    async def write(fail: bool) -> int:
        await Ledger.objects.acreate(key="async", value="1", pid=0)
        tries.append(await sync_to_async(lambda: connection.in_atomic_block)())
        if fail:
            raise ValueError("undo it")
        return await Ledger.objects.filter(key="async").acount()

    @durable(max_retries=0)
    def body(ctx: Any, fail: bool) -> Any:
        return ctx.atomic_step("write", write, fail)

    assert run(body, fail=True).status == "failed"
    assert Ledger.objects.filter(key="async").count() == 0
    assert run(body, fail=False).get_result() == 1
    assert tries == [True, True]


def test_it_must_not_call_the_context_nor_wait_for_results() -> None:
    seen = []

    @durable(max_retries=0)
    def body(ctx: Any) -> Any:
        async def calls_ctx() -> None:
            try:
                ctx.step("inner", int)
            except ProgrammingError as error:
                seen.append(type(error).__name__)
            try:
                await api.aget_result(ctx.execution_id)
            except BlockingCallInTask as error:
                seen.append(str(error).split(" inside")[0])

        return ctx.step("outer", calls_ctx)

    assert run(body).status == "succeeded"
    assert seen == ["WrongThread", "api.aget_result"]


def test_it_may_start_others_by_their_twins() -> None:
    @durable
    def body(ctx: Any) -> Any:
        async def start() -> str:
            return (await echo.adelay(1)).id

        return ctx.step("start", start)

    started = run(body).get_result()
    assert reload(started).args == [1]


def test_what_a_body_calls_synchronously_in_a_coroutine_is_refused() -> None:
    @durable(max_retries=0)
    def body(ctx: Any) -> Any:
        async def start() -> str:
            return echo.delay(1).id

        return ctx.step("start", start)

    assert "`await tests.app.scenarios.echo.aapply_async(…)`" in run(body).error_message
    assert Execution.objects.count() == 1


def test_time_passes_while_others_wait() -> None:
    """Several coroutines of one step go on side by side."""

    @durable
    def body(ctx: Any) -> Any:
        async def both() -> list[int]:
            order: list[int] = []

            async def first() -> None:
                await asyncio.sleep(0.01)
                order.append(1)

            async def second() -> None:
                order.append(2)

            await asyncio.gather(first(), second())
            return order

        return ctx.step("both", both)

    began = time.monotonic()
    assert run(body).get_result() == [2, 1]
    assert time.monotonic() - began < 60


def test_a_soft_time_limit_ends_the_coroutine_too() -> None:
    ended: list[str] = []

    async def naps() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    def late(*_args: Any) -> None:
        raise SoftTimeLimitExceeded

    @durable(max_retries=0)
    def body(ctx: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return ctx.step("nap", naps)

    before = signal.signal(signal.SIGALRM, late)
    try:
        execution = run(body)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "SoftTimeLimitExceeded" in str(execution.error)
    wait_until(lambda: ended == ["cancelled"])


def test_bodies_that_are_greenlets_take_no_coroutine_function() -> None:
    process.worker.runs_greenlets = True
    for kind in ("step", "atomic_step"):

        @durable(max_retries=0)
        def body(ctx: Any, kind: str) -> Any:
            return getattr(ctx, kind)("fetch", fetched, 1)

        message = run(body, kind=kind).error_message
        assert f'ctx.{kind}("fetch") got a coroutine function, which cannot run where bodies are greenlets.' in message
