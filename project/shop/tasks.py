"""How an order is fulfilled: a parent, ``fulfil``, and the children that it waits for without a worker."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery import shared_task
from django.conf import settings
from django.core.mail import send_mail
from django.db.models import F

from conductor_app import ChildFailed, ChildTimedOut, EventTimedOut, ExecutionContext, durable_task
from project.shop import bank
from project.shop.models import Order, OrderItem, Receipt, Stock

#: What costs more than this needs somebody's approval.
APPROVAL_LIMIT = 200


class OutOfStock(Exception):
    """There is not enough of an item on the shelf."""


@durable_task
def fulfil(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Take one order from the click to the parcel.

    At each ``ctx.invoke``, ``ctx.map`` and ``ctx.wait_for`` the worker is free for others until the children are done,
    or somebody has answered. Then this body runs again from the top, and every call that has an outcome returns it at
    once.
    """
    order = ctx.invoke("validate", validate, {"order_id": order_id})
    if order["total"] > APPROVAL_LIMIT and not is_approved(ctx, order_id):
        return {"status": "refused"}
    try:
        paid = ctx.invoke(
            "charge", charge, {"order_id": order_id, "total": order["total"]}, timeout=timedelta(minutes=10)
        )
    except ChildFailed as error:
        if not error.error_class.endswith(".CardDeclined"):
            raise
        ctx.atomic_step("decline", set_status, order_id, Order.Status.DECLINED, note=str(error))
        return {"status": "declined"}
    except ChildTimedOut as error:
        # The bank may or may not have charged: a person has to look.
        ctx.atomic_step("hold", set_status, order_id, Order.Status.PAYMENT_PENDING, note=str(error))
        return {"status": "payment pending"}
    ctx.map("pick", pick_item, [{"item_id": item_id} for item_id in order["items"]], max_parallel=2)
    parcel = ctx.invoke("ship", ship, {"order_id": order_id})
    ctx.invoke("announce", announce, {"order_id": order_id, "parcel": parcel["number"]})
    return {"status": "shipped", "reference": paid["reference"], "parcel": parcel["number"]}


def is_approved(ctx: ExecutionContext, order_id: int) -> bool:
    """Ask for an approval, and wait until somebody answers with ``project.shop.approvals``."""
    ctx.atomic_step("ask", ask_for_approval, order_id, ctx.execution_id)
    try:
        answer = ctx.wait_for("approval", "approved", timeout=timedelta(days=3))
    except EventTimedOut:
        answer = {"yes": False, "by": "the deadline"}
    ctx.atomic_step("note-answer", note_answer, order_id, answer)
    return bool(answer["yes"])


@durable_task
def validate(ctx: ExecutionContext, order_id: int) -> dict[str, Any]:
    """Check that the order can be fulfilled, and return what it costs and what is in it."""
    order = Order.objects.get(pk=order_id)
    if order.total <= 0:
        raise ValueError(f"{order} has a total of {order.total}.")
    return {"total": order.total, "items": list(order.items.values_list("pk", flat=True))}


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
def pick_item(ctx: ExecutionContext, item_id: int) -> int:
    """Take an item from the shelf, and return how many are left.

    If there are too few, it is tried again, and fails at last. The order then waits among the failed executions, with
    all that it has done, for somebody who fills the shelf and retries it.
    """
    return ctx.atomic_step("take-from-shelf", take_from_shelf, item_id)


@durable_task
def ship(ctx: ExecutionContext, order_id: int) -> dict[str, str]:
    """Hand the order to the carrier."""
    order = Order.objects.get(pk=order_id)
    ctx.atomic_step("book-parcel", set_status, order_id, Order.Status.SHIPPED)
    return {"number": f"PKG-{order.number}"}


@shared_task(acks_late=True)
def announce(order_id: int, parcel: str) -> None:
    """Tell the customer: a plain Celery task.

    Celery itself would lose it with its worker; ``acks_late`` makes it run again. Better two mails than none.
    """
    order = Order.objects.get(pk=order_id)
    send_mail(
        f"{order} is on its way",
        f"Dear {order.customer},\n\nyour parcel has the number {parcel}.\n",
        settings.DEFAULT_FROM_EMAIL,
        [order.email],
    )


# What the steps do. Each runs inside ``ctx.atomic_step``: its writes and the memory of it are one transaction.


def ask_for_approval(order_id: int, execution_id: UUID) -> None:
    """Put the order on the list of what waits for an approval, with the execution that is to be told."""
    Order.objects.filter(pk=order_id).update(execution_id=execution_id)
    set_status(order_id, Order.Status.AWAITING_APPROVAL)


def note_answer(order_id: int, answer: dict[str, Any]) -> None:
    """Take the order from that list, and note who has decided."""
    Order.objects.filter(pk=order_id).update(answered_by=answer["by"])
    set_status(order_id, Order.Status.APPROVED if answer["yes"] else Order.Status.REFUSED)


def take_from_shelf(item_id: int) -> int:
    """Lower the stock by what the item needs, and note that it is picked."""
    item = OrderItem.objects.get(pk=item_id)
    # Asked and lowered in one statement: nobody can take the same piece in between.
    shelf = Stock.objects.filter(name=item.name)
    if not shelf.filter(quantity__gte=item.quantity).update(quantity=F("quantity") - item.quantity):
        raise OutOfStock(f"{item} ordered, {shelf.values_list('quantity', flat=True).first() or 0} on the shelf")
    OrderItem.objects.filter(pk=item_id).update(picked=F("picked") + item.quantity)
    return shelf.get().quantity


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
