"""What users write by mistake: each ``E`` comment names the error that mypy finds in its line. Never run."""

from __future__ import annotations

from celery import shared_task

from conductor_app import ExecutionContext, api, durable_task


@durable_task
def charge(ctx: ExecutionContext, order_id: int, note: str = "") -> dict[str, int]:
    return {"receipt": order_id}


@durable_task  # E: arg-type
def without_context(order_id: int) -> None: ...


@durable_task(max_retries=1)  # E: arg-type
def without_anything() -> None: ...


@shared_task
def mail(order_id: int) -> bytes:
    return b""


def save(order_id: int, *, receipt: str) -> str:
    return receipt


@durable_task
def fulfil(ctx: ExecutionContext, order_id: int) -> None:
    receipt: str = ctx.invoke("charge", charge, {"order_id": 1})  # E: assignment
    sent: str = ctx.invoke("mail", mail)  # E: assignment
    signed: str = ctx.invoke("signed", charge.s(1))  # E: assignment
    ctx.invoke("charge", charge, timeout="30")  # E: call-overload
    ctx.invoke(charge)  # E: call-overload
    ctx.invoke(charge, {"order_id": 1})  # E: call-overload
    ctx.invoke("charge", charge, on_timeout="ignore")  # E: call-overload
    ctx.map("charges", charge, [], on_timeout="ignore")  # E: call-overload
    ctx.start("start", charge, on_timeout="ignore")  # E: arg-type
    ctx.invoke("lambda", lambda: 1)  # E: call-overload
    ctx.invoke("charge", charge, {}, 30)  # E: call-overload
    ctx.step("save", save, order_id)  # E: call-overload
    ctx.step("save", save, "7", receipt="R")  # E: arg-type
    ctx.step("save", save(1, receipt="R"))  # E: call-overload
    number: int = ctx.atomic_step("save", save, 1, receipt="R")  # E: assignment
    ctx.sleep("nap", "60")  # E: arg-type
    ctx.sleep_until("nap", 60)  # E: arg-type
    ctx.retry(exc="no")  # E: arg-type
    ctx.attempt = 2  # E: misc
    ctx.invoice("charge", charge)  # E: attr-defined
    print(receipt, sent, signed, number)


async def fetch(order_id: int) -> bytes:
    return b""


@durable_task
def fetches(ctx: ExecutionContext, order_id: int) -> None:
    text: str = ctx.step("fetch", fetch, order_id)  # E: assignment
    ctx.step("fetch", fetch, "7")  # E: call-overload
    ctx.atomic_step("fetch", fetch)  # E: call-overload
    print(text)


async def in_an_event_loop() -> None:
    await charge.adelay()  # E: call-arg
    await charge.adelay("7")  # E: arg-type
    await charge.aapply_async((7,), countdwon=5)  # E: call-arg
    text: str = await api.asend_event("id", "go")  # E: assignment
    await api.acancel()  # E: call-arg
    await api.aget_result("id", timeout="5")  # E: arg-type
    print(text)


def many() -> None:
    charge.start_many(7)  # E: arg-type
    charge.start_many([7], idempotency_keys=[7])  # E: list-item
    charge.start_many([7], unique_keys=[7])  # E: list-item
    charge.start_many([7], tags={"a": 7})  # E: dict-item
    charge.start_many([7], eta="now")  # E: call-arg


def outside() -> None:
    durable_task(timeout=5)  # E: call-overload
    durable_task(max_retries="3")  # E: call-overload
    charge.delay()  # E: call-arg
    charge.delay("7")  # E: arg-type
    charge.delay(1, notes="x")  # E: call-arg
    charge.delay(ctx=None, order_id=1)  # E: call-arg
    charge.apply_async((1,), idempotency_key=7)  # E: arg-type
    charge.apply_async((1,), idempotencykey="7")  # E: call-arg
    charge.apply_async((1,), timeout=5)  # E: call-arg
    charge.apply_async((1,), countdown="5")  # E: arg-type
    charge.apply_async((1,), deadline=[5])  # E: arg-type
    charge.start_many([7], deadline=[5])  # E: arg-type
    charge.apply_async((1,), tags={"order": 7})  # E: dict-item
    durable_task(tags="order")  # E: call-overload
    api.tag("id", {"order": 7})  # E: dict-item
    api.state(7)  # E: arg-type
    wrong: int = charge.delay(1).get()  # E: assignment
    api.cancel(7)  # E: arg-type
    api.cancel("id", reason=5)  # E: arg-type
    print(wrong)
