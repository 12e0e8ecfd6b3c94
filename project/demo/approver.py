"""The person who approves large orders, as far as the shop can tell."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from django.utils import timezone

from project.demo.batch import Batch, is_refused
from project.shop import approvals
from project.shop.models import Order

#: How long an order waits for the answer.
THINKING_TIME = timedelta(seconds=1)
NAME = "demo"


class Approver:
    """Looks now and then at the orders that wait for an approval, and answers, each once."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._answered: set[int] = set()

    def answer(self) -> Iterator[Order]:
        """Answer to the orders that have waited for some time, and return them."""
        waiting = Order.objects.filter(status=Order.Status.AWAITING_APPROVAL, number__in=self._batch.numbers)
        for order in waiting.filter(updated_at__lte=timezone.now() - THINKING_TIME).exclude(pk__in=self._answered):
            approvals.answer(order, yes=not is_refused(order), by=NAME)
            self._answered.add(order.pk)
            yield order
