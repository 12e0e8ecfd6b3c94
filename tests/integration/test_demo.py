"""The demo's checks: they hold when all went well, and each of them notices what it is there for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from django.db import transaction
from django.db.models import F
from rich.console import Console

from conductor_app.host.inline import run_until_idle
from conductor_app.models import Event, Execution
from project.celery import app
from project.demo import approver
from project.demo.approver import Approver
from project.demo.batch import Batch
from project.demo.checks import check_all
from project.demo.report import draw_time_line, draw_tree
from project.shop import bank
from project.shop.models import Order, OrderItem, Payment, Receipt, Stock

pytestmark = pytest.mark.django_db

#: Enough for an approved order, a refused one, and a declined card.
ORDERS = 8
#: Nothing is killed here.
RECOVERY = "what the killed process ran was recovered"


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Orders that have been fulfilled."""
    monkeypatch.setattr(bank, "LATENCY", (0, 0))
    monkeypatch.setattr(approver, "THINKING_TIME", approver.THINKING_TIME * 0)
    batch = Batch()
    list(batch.place(ORDERS))
    run_until_idle(app)
    answered = list(Approver(batch).answer())
    assert {order.number for order in answered} == {order.number for order in batch.large_orders}
    run_until_idle(app)
    return batch


def broken(batch: Batch) -> set[str]:
    return {check.promise for check in check_all(batch, None) if not check.holds} - {RECOVERY}


def test_every_check_holds_after_a_good_run(batch: Batch) -> None:
    assert broken(batch) == set()
    assert (len(batch.large_orders), len(batch.refused_orders), len(batch.declined_orders)) == (2, 1, 1)
    progress = batch.progress()
    assert (progress.orders_done, progress.executions_done) == (ORDERS, batch.expected_executions)


def first(rows: Any) -> Any:
    """The first row, as a queryset that can be changed."""
    return rows.model.objects.filter(pk=rows.order_by("pk").first().pk)


#: What could go wrong, and the promise that it breaks.
DAMAGE: list[tuple[Callable[[Batch], object], str]] = [
    (lambda batch: first(Order.objects.filter(status="shipped")).update(status="paid"), "every order finished once"),
    (
        lambda batch: first(batch.executions.filter(depth=1)).update(status="waiting", finished_at=None),
        "every execution is final",
    ),
    (lambda batch: first(Event.objects.all()).update(step=None), "every approval was used once"),
    (lambda batch: first(Event.objects.all()).delete(), "every approval was used once"),
    (lambda batch: first(Payment.objects.all()).update(amount=1), "every card was charged once"),
    (
        lambda batch: Payment.objects.create(
            order_number=batch.refused_orders[0].number, amount=1, reference="BNK-1", idempotency_key="1"
        ),
        "every card was charged once",
    ),
    (lambda batch: first(Receipt.objects.all()).delete(), "every receipt was written once"),
    (lambda batch: first(OrderItem.objects.filter(picked=1)).update(picked=2), "every item was picked once"),
    (lambda batch: batch.refused_orders[0].items.update(picked=1), "every item was picked once"),
    (lambda batch: first(Stock.objects.all()).update(quantity=F("quantity") + 1), "the stock was lowered exactly"),
    (lambda batch: Order.objects.filter(status="declined").update(note=""), "failed executions are declined cards"),
    (lambda batch: first(batch.parents).update(attempt=2), "parents waited without using up attempts"),
]


def test_each_check_notices_what_went_wrong(batch: Batch) -> None:
    for damage, promise in DAMAGE:
        with transaction.atomic():
            damage(batch)
            assert promise in broken(batch)
            transaction.set_rollback(True)
    assert broken(batch) == set()
    assert {promise for _, promise in DAMAGE} == {check.promise for check in check_all(batch, None)} - {RECOVERY}


def test_what_is_left_of_an_earlier_run_changes_no_check(batch: Batch) -> None:
    earlier = Batch()
    list(earlier.place(2))
    later = Batch()
    list(later.place(2))
    run_until_idle(app)
    assert broken(later) == set()


def test_the_tree_and_the_time_line_show_each_item_and_the_approval(batch: Batch) -> None:
    root_id = next(pk for pk, order in batch.orders.items() if order.total > 200 and order in batch.good_orders)
    children = Execution.objects.filter(root_id=root_id).count() - 1
    paper = io.StringIO()
    console = Console(width=100, file=paper)
    console.print(draw_tree(root_id, None))
    console.print(draw_time_line(root_id, None, 100))
    lines = paper.getvalue().splitlines()
    assert sum("pick_item" in line for line in lines) == 2 * batch.orders[root_id].items.count() == 4
    assert any("event approval" in line for line in lines)
    assert children == 6
