"""The orders of one run, and what the database says of them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Count, F, Max, Q, QuerySet, Sum

from conductor_app.models import Execution
from conductor_app.states import FINAL_STATUSES
from project.shop.bank import DECLINED_TOKEN
from project.shop.models import BankCall, Order, OrderItem, Payment, Receipt, Stock
from project.shop.tasks import APPROVAL_LIMIT, fulfil

ORDERS_FILE = Path(__file__).resolve().parents[1] / "shop" / "orders.json"
#: Orders that cost more than this are not approved.
REFUSAL_LIMIT = 300


@dataclass(frozen=True)
class Progress:
    """How far the orders are, at one moment."""

    orders_done: int
    executions_done: int
    #: Executions by status.
    executions: dict[str, int]


def is_refused(order: Order) -> bool:
    """Whether the order is too large to be approved."""
    return order.total > REFUSAL_LIMIT


def is_declined(order: Order) -> bool:
    """Whether the bank declines the order's card."""
    return order.card.startswith(DECLINED_TOKEN)


def count_picked() -> Counter[str]:
    """Return how many pieces of each thing have been picked, for whichever order."""
    rows = OrderItem.objects.values_list("name").order_by("name").annotate(Sum("picked"))
    return Counter(dict(rows))


@dataclass
class Batch:
    """Orders by the id of the execution that fulfils them."""

    orders: dict[UUID, Order] = field(default_factory=dict)
    #: How many pieces there were of each thing, on the shelf or picked, before the first of these orders.
    pieces: Counter[str] = field(default_factory=Counter)
    #: How many executions there will be.
    expected_executions: int = 0

    def place(self, count: int) -> Iterator[Order]:
        """Fill the shelves and place ``count`` orders, one by one, as customers would."""
        last_number = Order.objects.aggregate(last=Max("number"))["last"] or 1_000
        wanted = list(itertools.islice(itertools.cycle(json.loads(ORDERS_FILE.read_text())), count))
        self._fill_shelves(wanted)
        for number, values in enumerate(wanted, start=last_number + 1):
            items = [OrderItem(**{**item, "price": Decimal(item["price"])}) for item in values.pop("items")]
            # The order and its execution: both are accepted, or neither is.
            with transaction.atomic():
                order = Order.objects.create(
                    number=number, total=sum(item.quantity * item.price for item in items), **values
                )
                order.items.set(items, bulk=False)
                result = fulfil.delay(order_id=order.pk)
            self.orders[UUID(result.id)] = order
            self.expected_executions += self._count_executions(order, len(items))
            yield order

    def _fill_shelves(self, wanted: list[dict[str, Any]]) -> None:
        needed: Counter[str] = Counter()
        for item in itertools.chain.from_iterable(values["items"] for values in wanted):
            needed[item["name"]] += item["quantity"]
        for name, quantity in needed.items():
            Stock.objects.get_or_create(name=name)
            Stock.objects.filter(name=name).update(quantity=F("quantity") + quantity)
        with transaction.atomic():
            # Who picks takes the shelf first, so nothing is between the shelf and its order while these are locked.
            on_shelf = Counter({shelf.name: shelf.quantity for shelf in Stock.objects.select_for_update()})
            self.pieces = on_shelf + count_picked()

    @staticmethod
    def _count_executions(order: Order, items: int) -> int:
        """Return how many executions an order has: ``fulfil``, ``validate``, and what it gets as far as."""
        if is_refused(order):
            return 2
        return 3 if is_declined(order) else 5 + items

    @property
    def executions(self) -> QuerySet[Execution]:
        """Every execution of these orders: the parents and their children."""
        return Execution.objects.filter(root_id__in=self.orders)

    @property
    def parents(self) -> QuerySet[Execution]:
        """The executions of ``fulfil``."""
        return Execution.objects.filter(pk__in=self.orders)

    @property
    def large_orders(self) -> list[Order]:
        """The orders that need an approval."""
        return [order for order in self.orders.values() if order.total > APPROVAL_LIMIT]

    @property
    def good_orders(self) -> list[Order]:
        """The orders that are approved, if they need it, and whose cards the bank does not decline."""
        return [order for order in self.orders.values() if not is_refused(order) and not is_declined(order)]

    @property
    def declined_orders(self) -> list[Order]:
        """The orders whose cards the bank declines."""
        return [order for order in self.orders.values() if is_declined(order) and not is_refused(order)]

    @property
    def refused_orders(self) -> list[Order]:
        """The orders that are not approved."""
        return [order for order in self.orders.values() if is_refused(order)]

    @property
    def numbers(self) -> list[int]:
        """The orders' numbers."""
        return [order.number for order in self.orders.values()]

    @property
    def items(self) -> QuerySet[OrderItem]:
        """What these orders are for."""
        return OrderItem.objects.filter(order__number__in=self.numbers)

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
