"""A payment provider, as far as a shop can tell.

It takes its time, it declines cards, and like the real ones it charges once for each idempotency key. Its books are
tables in the same database; its writes are its own, committed before it answers, whatever becomes of the caller.
"""

from __future__ import annotations

import hashlib
import random
import time
from decimal import Decimal

from django.db import transaction

from project.shop.models import BankCall, Payment

#: How long a request travels, and how long its answer, in seconds.
LATENCY = (0.005, 0.015)

#: What a card's token begins with if the bank declines it.
DECLINED_TOKEN = "tok_declined_"  # noqa: S105 - not a password


class CardDeclined(Exception):
    """The bank refuses the card. Asking again does not help."""


def charge(card: str, amount: Decimal, *, order_number: int, idempotency_key: str) -> dict[str, str]:
    """Take ``amount`` from ``card``, once for each idempotency key.

    Returns:
        The payment: its ``reference`` and its ``amount``.

    Raises:
        CardDeclined: The bank refuses the card.
    """
    time.sleep(random.uniform(*LATENCY))
    payment = _book(card, amount, order_number, idempotency_key)
    time.sleep(random.uniform(*LATENCY))
    if payment is None:
        raise CardDeclined(f"card declined: {card.removeprefix(DECLINED_TOKEN).replace('_', ' ')}")
    return {"reference": payment.reference, "amount": str(payment.amount)}


def _book(card: str, amount: Decimal, order_number: int, idempotency_key: str) -> Payment | None:
    # durable=True: refuses to be a part of the caller's transaction, which could undo what the bank has done.
    with transaction.atomic(durable=True):
        if card.startswith(DECLINED_TOKEN):
            payment, answer = None, BankCall.Answer.DECLINED
        else:
            reference = "BNK-" + hashlib.sha256(idempotency_key.encode()).hexdigest()[:10].upper()
            payment, is_new = Payment.objects.get_or_create(
                idempotency_key=idempotency_key,
                defaults={"reference": reference, "card": card, "amount": amount, "order_number": order_number},
            )
            answer = BankCall.Answer.CHARGED if is_new else BankCall.Answer.REPEATED
        BankCall.objects.create(order_number=order_number, idempotency_key=idempotency_key, answer=answer)
    return payment
