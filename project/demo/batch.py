"""The orders of one run, and what the database says of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from uuid import UUID

from django.db import transaction
from django.db.models import Count, Max, Q, QuerySet

from conductor_app.models import Execution
from conductor_app.states import FINAL_STATUSES
from project.shop.bank import DECLINED_TOKEN
from project.shop.models import BankCall, Order, Payment, Receipt
from project.shop.tasks import fulfil

ORDERS_FILE = Path(__file__).resolve().parents[1] / "shop" / "orders.json"


@dataclass(frozen=True)
class Progress:
    """How far the orders are, at one moment."""

    orders_done: int
    executions_done: int
    #: Executions by status.
    executions: dict[str, int]


@dataclass
class Batch:
    """Orders by the id of the execution that fulfils them."""

    orders: dict[UUID, Order] = field(default_factory=dict)

    def place(self, count: int) -> Iterator[Order]:
        """Place ``count`` orders, one by one, as customers would."""
        last_number = Order.objects.aggregate(last=Max("number"))["last"] or 1_000
        wanted = itertools.islice(itertools.cycle(json.loads(ORDERS_FILE.read_text())), count)
        for number, values in enumerate(wanted, start=last_number + 1):
            # The order and its execution: both are accepted, or neither is.
            with transaction.atomic():
                order = Order.objects.create(number=number, **{**values, "total": Decimal(values["total"])})
                result = fulfil.delay(order_id=order.pk)
            self.orders[UUID(result.id)] = order
            yield order

    @property
    def executions(self) -> QuerySet[Execution]:
        """Every execution of these orders: the parents and their children."""
        return Execution.objects.filter(root_id__in=self.orders)

    @property
    def parents(self) -> QuerySet[Execution]:
        """The executions of ``fulfil``."""
        return Execution.objects.filter(pk__in=self.orders)

    @property
    def good_orders(self) -> list[Order]:
        """The orders whose cards the bank does not decline."""
        return [order for order in self.orders.values() if not order.card.startswith(DECLINED_TOKEN)]

    @property
    def expected_executions(self) -> int:
        """How many executions there will be: five for an order, three if the card is declined."""
        return 3 * len(self.orders) + 2 * len(self.good_orders)

    @property
    def numbers(self) -> list[int]:
        """The orders' numbers."""
        return [order.number for order in self.orders.values()]

    @property
    def payments(self) -> QuerySet[Payment]:
        """What the bank has charged for these orders."""
        return Payment.objects.filter(order_number__in=self.numbers)

    @property
    def bank_calls(self) -> QuerySet[BankCall]:
        """What the bank was asked for these orders."""
        return BankCall.objects.filter(order_number__in=self.numbers)

    @property
    def receipts(self) -> QuerySet[Receipt]:
        """The receipts of these orders."""
        return Receipt.objects.filter(order__number__in=self.numbers)

    def progress(self) -> Progress:
        """Look how far the orders are."""
        counts = self.executions.values("status").order_by("status")
        rows = list(counts.annotate(all=Count("pk"), parents=Count("pk", filter=Q(parent=None))))
        final = [row for row in rows if row["status"] in FINAL_STATUSES]
        return Progress(
            orders_done=sum(row["parents"] for row in final),
            executions_done=sum(row["all"] for row in final),
            executions={row["status"]: row["all"] for row in rows},
        )
