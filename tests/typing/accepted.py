"""What users write, and the types that it has. Read by mypy, never run."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping
from typing import Any, assert_type

from celery import shared_task
from celery.canvas import Signature
from celery.result import EagerResult
from django.test import TransactionTestCase

from conductor_app import (
    ChildCancelled,
    ChildError,
    ChildFailed,
    ChildHandle,
    ChildTimedOut,
    ConductorError,
    DurableTask,
    EventHandle,
    ExecutionContext,
    Handle,
    LeaseLost,
    TimerHandle,
    api,
    durable_task,
)
from conductor_app.models import Execution
from conductor_app.tasks.result import DurableResult
from conductor_app.testing import Conductor, ConductorMixin, ConductorTestCase, StepCall, run


@durable_task
def charge(ctx: ExecutionContext, order_id: int, note: str = "") -> dict[str, int]:
    return {"receipt": order_id}


async def fetch(order_id: int, *, fresh: bool = False) -> bytes:
    return b""


@durable_task
def fetches(ctx: ExecutionContext, order_id: int) -> None:
    assert_type(ctx.step("fetch", fetch, order_id, fresh=True), bytes)
    assert_type(ctx.atomic_step("store", fetch, order_id), bytes)


def many() -> None:
    results = charge.start_many([{"order_id": 1}, 2], idempotency_keys=["a", None], tags={"a": "b"}, countdown=5)
    assert_type(results, list[DurableResult[dict[str, int]]])
    assert_type(results[0].is_new, bool | None)
    charge.start_many({"order_id": n} for n in range(3))
    charge.start_many([], countdown=dt.timedelta(minutes=1))
    charge.start_many([], deadline=dt.datetime.now(dt.UTC))
    charge.start_many([7, 8], unique_keys=["a", None])
    charge.start_many(iter([7]), unique_keys=("a",), idempotency_keys=None)


async def in_an_event_loop(execution: Execution) -> None:
    assert_type(await charge.adelay(7, note="n"), DurableResult[dict[str, int]])
    assert_type(await api.astate("id"), api.ExecutionState)
    result = await charge.aapply_async((7,), countdown=5, idempotency_key="k", tags={"a": "b"})
    assert_type(result, DurableResult[dict[str, int]])
    assert_type(await charge.astart_many([7], unique_keys=["a"]), list[DurableResult[dict[str, int]]])
    await api.aget_result(result, timeout=dt.timedelta(seconds=5))
    assert_type(await api.asend_event(execution, "go", {"by": "ana"}, id="1"), bool)
    assert_type(await api.acancel(execution.pk, "no more", actor="ana"), bool)
    assert_type(await api.afind(result), Execution)
    await api.aretry(execution)


@durable_task(max_retries=5, retry_backoff=True, queue="payments", autoretry_for=(OSError,))
def refund(ctx: ExecutionContext, order_id: int) -> str:
    return "refunded"


@durable_task(
    name="shop.settle", time_limit=60, soft_time_limit=50.5, rate_limit="5/m", ignore_result=True, throws=KeyError
)
def settle(ctx: ExecutionContext) -> None: ...


@durable_task(tags={"kind": "refund"})
def tagged(ctx: ExecutionContext, order_id: int) -> None:
    ctx.tag("order", str(order_id))
    ctx.progress(1, 2.5, "half")
    ctx.progress(1, note="begun")
    ctx.publish("receipt", {"id": 7})


@durable_task(tags=lambda order_id: {"order": str(order_id)})
def tagged_by_arguments(ctx: ExecutionContext, order_id: int) -> None: ...


@shared_task
def mail(order_id: int) -> bytes:
    return b""


class Tracked(DurableTask[..., Any]):
    """A base class of the user's own."""

    tracker = ""


@durable_task(base=Tracked, tracker="a", max_retries=1)
def tracked(ctx: ExecutionContext) -> None: ...


def save(order_id: int, *, receipt: str) -> list[str]:
    return [receipt]


@durable_task
def fulfil(ctx: ExecutionContext, order_id: int) -> str:
    assert_type(ctx.invoke("charge", charge, {"order_id": order_id}), dict[str, int])
    assert_type(ctx.invoke("refund", refund, {"order_id": order_id}, timeout=30), str)
    assert_type(ctx.invoke("again", refund, timeout=dt.timedelta(seconds=30), on_timeout="abandon"), str)
    assert_type(ctx.invoke("signature", charge.s(1)), dict[str, int])
    assert_type(ctx.invoke("plain", mail, {"order_id": order_id}, queue="mail", priority=5), bytes)
    named: dict[str, str] = ctx.invoke("by-name", "shop.tasks.send_mail", {"order_id": order_id})
    assert_type(ctx.step("step", int, "5"), int)
    assert_type(ctx.step("keywords", save, order_id, receipt="R-1"), list[str])
    assert_type(ctx.atomic_step("atomic", save, 1, receipt=named["id"]), list[str])
    assert_type(ctx.step("lambda", lambda: {"a": 1}), dict[str, int])
    assert_type(ctx.map("map", charge, [{"order_id": 1}]), list[dict[str, int]])
    quote = ctx.start("quote", charge, {"order_id": 1})
    assert_type(quote, ChildHandle[dict[str, int]])
    assert_type(quote.result(), dict[str, int])
    assert_type(quote.peek(), bool)
    answer, late = ctx.event("answer", "approved"), ctx.timer("late", dt.timedelta(days=3))
    assert_type(answer, EventHandle)
    assert_type(late, TimerHandle)
    assert_type(ctx.first("quotes", quote, quote), tuple[Handle[dict[str, int]], dict[str, int]])
    winner, value = ctx.first("decision", quote, answer, late, until="succeeded", losers="cancel")
    if winner is late:
        print(value)
    for handle in ctx.as_completed("arrivals", quote):
        assert_type(handle.result(), dict[str, int])
    assert_type(ctx.gather(quote, ctx.start("refunded", refund), need=1), list[Any])
    assert_type(ctx.map("some", charge, [{"order_id": 1}], max_failures=2), list[Any])
    assert_type(ctx.map("signatures", refund.s().set(queue="bulk"), [1, 2]), list[str])
    ctx.sleep("nap", 60)
    approval: dict[str, str] = ctx.wait_for("approval", "approved", timeout=dt.timedelta(days=3))
    print(approval)
    ctx.sleep("nap-too", dt.timedelta(minutes=1))
    ctx.sleep_until("then", dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
    ctx.checkpoint()
    ctx.logger.info("order %s", order_id)
    assert_type(ctx.execution_id, uuid.UUID)
    assert_type(ctx.root_id, uuid.UUID)
    assert_type(ctx.parent_id, uuid.UUID | None)
    assert_type(ctx.attempt, int)
    assert_type(ctx.is_replaying, bool)
    assert_type(ctx.idempotency_key("charge"), str)
    try:
        ctx.invoke("late", charge, {"order_id": 1}, timeout=0.5)
    except ChildTimedOut as late:
        assert_type(late.step, str)
        error: TimeoutError = late
        raise ctx.retry(exc=error, countdown=5) from late
    except (ChildFailed, ChildCancelled) as failed:
        assert_type(failed.child_id, uuid.UUID | None)
        child_error: ChildError = failed
        raise child_error from None
    except LeaseLost as lost:
        any_error: ConductorError = lost
        raise any_error from None
    return "done"


def outside() -> None:
    assert_type(charge.delay(1, note="x"), DurableResult[dict[str, int]])
    assert_type(charge.delay(order_id=1), DurableResult[dict[str, int]])
    assert_type(charge.apply_async((1,), countdown=5, idempotency_key="order-7").get(timeout=60), dict[str, int])
    assert_type(charge.apply_async(kwargs={"order_id": 1}, queue="other", expires=dt.timedelta(hours=1)).id, str)
    assert_type(charge.apply_async((1,), unique_key="order-7", on_conflict="replace", debounce=5).is_new, bool | None)
    assert_type(charge.apply(kwargs={"order_id": 1}), EagerResult[dict[str, int]])
    assert_type(charge.s(1), Signature[dict[str, int]])
    charge.delay_on_commit(1)
    charge.apply_async((1,), headers={"tenant": "a"}, time_limit=5, soft_time_limit=4, eta=dt.datetime.now(dt.UTC))
    charge.apply_async((1,), tags={"tenant": "a"})
    charge.apply_async((1,), deadline=dt.timedelta(hours=1))
    api.tag("id", {"tenant": "a", "order": None})
    assert_type(api.get_tags("id"), dict[str, str])
    state = api.state("id")
    assert_type(state, api.ExecutionState)
    assert_type(state.done, int | float | None)
    assert_type(state.fraction, float | None)
    assert_type(state.published, Mapping[str, Any])
    assert_type(state.as_dict(), dict[str, Any])
    result = refund.delay(1)
    assert_type(api.cancel(result, reason="no stock"), bool)
    api.cancel(result.id)
    api.retry(uuid.UUID(result.id))
    api.get_result(Execution.objects.get(), timeout=5)
    assert_type(api.find(result), Execution)


class OrderTest(ConductorTestCase):
    def test_an_order(self) -> None:
        calls: list[StepCall] = []
        assert_type(run(charge, {"order_id": 1}, {"child": None, charge: ChildTimedOut}, calls=calls), dict[str, int])
        assert_type(self.conductor.run(charge, 1, steps={"ask": lambda: 1}, attempt=2), dict[str, int])
        assert_type(self.conductor.drain(), int)
        assert_type(self.conductor.advance(dt.timedelta(days=1)), int)
        assert_type(self.conductor.assert_succeeded(charge.delay(1), result=None), Execution)
        self.conductor.assert_failed(str(uuid.uuid4()), error_class=ValueError)
        self.conductor.assert_invoked(uuid.uuid4(), "child", task=charge, payload={"order_id": 1})


class MixedTest(ConductorMixin, TransactionTestCase):
    def test_an_order(self) -> None:
        assert_type(self.conductor, Conductor)
