"""How an order is fulfilled: a parent, ``fulfil``, and the four children that it waits for without a worker."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.conf import settings
from django.core.mail import send_mail

from conductor_app import ChildFailed, ChildTimedOut, ExecutionContext, durable_task
from project.shop import bank
from project.shop.models import Order, Receipt


@durable_task
def fulfil(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Take one order from the click to the parcel.

    At each ``ctx.invoke`` the worker is free for others until the child is done. Then this body runs again from the
    top, and every call that has an outcome returns it at once.
    """
    order = ctx.invoke("validate", validate, {"order_id": order_id})
    try:
        paid = ctx.invoke("charge", charge, {"order_id": order_id, "total": order["total"]}, timeout=30)
    except ChildFailed as error:
        if not error.error_class.endswith(".CardDeclined"):
            raise
        ctx.atomic_step("decline", set_status, order_id, Order.Status.DECLINED, note=str(error))
        return {"status": "declined"}
    except ChildTimedOut as error:
        # The bank may or may not have charged: a person has to look.
        ctx.atomic_step("hold", set_status, order_id, Order.Status.PAYMENT_PENDING, note=str(error))
        return {"status": "payment pending"}
    parcel = ctx.invoke("ship", ship, {"order_id": order_id})
    ctx.invoke("announce", announce, {"order_id": order_id, "parcel": parcel["number"]})
    return {"status": "shipped", "reference": paid["reference"], "parcel": parcel["number"]}


@durable_task
def validate(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Check that the order can be fulfilled, and return what it costs."""
    order = Order.objects.get(pk=order_id)
    if order.total <= 0:
        raise ValueError(f"{order} has a total of {order.total}.")
    return {"number": order.number, "total": order.total}


@durable_task(max_retries=5, dont_autoretry_for=(bank.CardDeclined,))
def charge(ctx: ExecutionContext, order_id: int, total: Decimal) -> dict[str, str]:
    """Charge the card and keep the receipt.

    If the worker dies between the bank's answer and the memory of it, the bank is asked again. It then finds the same
    idempotency key, and charges nothing.
    """
    order = Order.objects.get(pk=order_id)
    payment = ctx.step(
        "call-bank",
        bank.charge,
        order.card,
        total,
        order_number=order.number,
        idempotency_key=ctx.idempotency_key("call-bank"),
    )
    ctx.atomic_step("save-receipt", save_receipt, order_id, payment)
    return {"reference": payment["reference"]}


@durable_task
def ship(ctx: ExecutionContext, order_id: int) -> dict[str, str]:
    """Hand the order to the carrier."""
    order = Order.objects.get(pk=order_id)
    ctx.atomic_step("book-parcel", set_status, order_id, Order.Status.SHIPPED)
    return {"number": f"PKG-{order.number}"}


@durable_task
def announce(ctx: ExecutionContext, order_id: int, parcel: str) -> None:
    """Tell the customer. If the worker dies at the wrong moment, twice."""
    order = Order.objects.get(pk=order_id)
    ctx.step(
        "send-mail",
        send_mail,
        f"{order} is on its way",
        f"Dear {order.customer},\n\nyour parcel has the number {parcel}.\n",
        settings.DEFAULT_FROM_EMAIL,
        [order.email],
    )


# What the steps do. Each runs inside ``ctx.atomic_step``: its writes and the memory of it are one transaction.


def save_receipt(order_id: int, payment: dict[str, str]) -> None:
    """Write the receipt and note that the order is paid."""
    Receipt.objects.create(order_id=order_id, amount=Decimal(payment["amount"]), bank_reference=payment["reference"])
    set_status(order_id, Order.Status.PAID)


def set_status(order_id: int, status: str, *, note: str = "") -> None:
    """Note how far the order is."""
    order = Order.objects.get(pk=order_id)
    order.status = status
    order.note = note[:200]
    order.save(update_fields=["status", "note", "updated_at"])
