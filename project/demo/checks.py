"""What must hold after the run, with the figures that show it. Everything is read from the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from django.db.models import F, QuerySet, Sum

from conductor_app.models import Event, FailedExecution, Step
from conductor_app.states import FINAL_STATUSES, ExecutionStatus, StepKind, StepStatus
from project.demo.batch import Batch, count_picked
from project.demo.crash import Crash
from project.shop.models import BankCall, Order, OrderItem, Stock
from project.shop.tasks import APPROVAL_LIMIT, charge, pick_item


@dataclass(frozen=True)
class Check:
    """One promise, whether it was kept, and the figures."""

    promise: str
    holds: bool
    figures: str


def check_all(batch: Batch, crash: Crash | None) -> Iterator[Check]:
    """Check every promise."""
    yield check_orders(batch)
    yield check_executions(batch)
    yield check_approvals(batch)
    yield check_cards(batch)
    yield check_receipts(batch)
    yield check_picks(batch)
    yield check_stock(batch)
    yield check_failures(batch)
    yield check_attempts(batch, crash)
    yield check_recovery(batch, crash)


def check_orders(batch: Batch) -> Check:
    """Each order ended, as it should, and one execution ended it."""
    statuses = Counter(Order.objects.filter(number__in=batch.numbers).values_list("status", flat=True))
    parents = batch.parents.filter(status=ExecutionStatus.SUCCEEDED).count()
    expected = Counter(
        {
            Order.Status.SHIPPED.value: len(batch.good_orders),
            Order.Status.DECLINED.value: len(batch.declined_orders),
            Order.Status.REFUSED.value: len(batch.refused_orders),
        }
    )
    return Check(
        "every order finished once",
        statuses == expected and parents == len(batch.orders),
        f"{_by_name(statuses)}; {parents} of {len(batch.orders)} parents succeeded",
    )


def check_executions(batch: Batch) -> Check:
    """Nothing hangs."""
    statuses = Counter(batch.executions.values_list("status", flat=True))
    is_final = set(statuses) <= FINAL_STATUSES
    return Check("every execution is final", is_final, f"{_count(statuses.total(), 'execution')}: {_by_name(statuses)}")


def check_approvals(batch: Batch) -> Check:
    """Each large order was asked about once, one answer was given, it was used once, and the order went its way."""
    asked = Step.objects.filter(execution__in=batch.parents, kind=StepKind.EVENT)
    answers = Event.objects.filter(execution__in=batch.parents)
    used = Counter(answers.filter(step__status=StepStatus.SUCCEEDED).values_list("execution_id", flat=True))
    large = Counter(execution_id for execution_id, order in batch.orders.items() if order.total > APPROVAL_LIMIT)
    refused = sum(1 for answer in answers if not answer.get_payload()["yes"])
    return Check(
        "every approval was used once",
        used == large and asked.count() == answers.count() == large.total() and refused == len(batch.refused_orders),
        f"{_count(asked.count(), 'order')} over {APPROVAL_LIMIT} waited for a person;"
        f" {_count(answers.count(), 'answer')}, {used.total()} used: {used.total() - refused} yes, {refused} no",
    )


def check_cards(batch: Batch) -> Check:
    """The bank moved money once for each order that it should have, and the right amount."""
    good = batch.good_orders
    payments = Counter(batch.payments.values_list("order_number", "amount"))
    answers = Counter(batch.bank_calls.values_list("answer", flat=True))
    repeated = answers[BankCall.Answer.REPEATED]
    return Check(
        "every card was charged once",
        payments == Counter((order.number, order.total) for order in good),
        f"{_count(payments.total(), 'payment')} for {_count(len(good), 'good card')}; the bank was called"
        f" {_count(answers.total(), 'time')}, {repeated} of them again with the same idempotency key",
    )


def check_receipts(batch: Batch) -> Check:
    """One receipt for each payment."""
    receipts = Counter(batch.receipts.values_list("order__number", "bank_reference", "amount"))
    payments = Counter(batch.payments.values_list("order_number", "reference", "amount"))
    total = batch.receipts.aggregate(total=Sum("amount"))["total"] or 0
    return Check(
        "every receipt was written once",
        receipts == payments and receipts.total() == len(batch.good_orders),
        f"{_count(receipts.total(), 'receipt')} over {total:.2f}, as in the bank's books",
    )


def check_picks(batch: Batch) -> Check:
    """Each item of an order that is shipped was picked once, by one child of the map, and nothing else was."""
    shipped = batch.items.filter(order__number__in=[order.number for order in batch.good_orders])
    ordered, picked = shipped.aggregate(ordered=Sum("quantity", default=0), picked=Sum("picked", default=0)).values()
    children = batch.executions.filter(task=pick_item.name, status=ExecutionStatus.SUCCEEDED).count()
    all_once = not shipped.exclude(picked=F("quantity")).exists()
    return Check(
        "every item was picked once",
        all_once and children == shipped.count() and _picked(batch.items) == picked,
        f"{_count(children, 'child', 'children')} of maps for {_count(shipped.count(), 'item')};"
        f" {_count(ordered, 'piece')} ordered, {picked} picked",
    )


def check_stock(batch: Batch) -> Check:
    """What is missing on the shelves is what was picked."""
    on_shelf = Counter(dict(Stock.objects.values_list("name", "quantity")))
    left = on_shelf.total()
    return Check(
        "the stock was lowered exactly",
        on_shelf + count_picked() == batch.pieces,
        f"{_count(left, 'piece')} of {_count(len(on_shelf), 'thing')} left, after {_picked(batch.items)} were picked",
    )


def check_failures(batch: Batch) -> Check:
    """Only what the bank declined has failed, and each parent got to know."""
    declined = len(batch.declined_orders)
    failures = FailedExecution.objects.filter(execution__in=batch.executions)
    of_cards = failures.filter(task=charge.name, error_class__endswith=".CardDeclined").count()
    notes = Order.objects.filter(
        number__in=batch.numbers, note__startswith="Child execution failed: card declined: "
    ).count()
    return Check(
        "failed executions are declined cards",
        failures.count() == of_cards == notes == declined,
        f"{failures.count()} failed, {of_cards} of them CardDeclined; {_count(notes, 'parent')} caught ChildFailed",
    )


def check_attempts(batch: Batch, crash: Crash | None) -> Check:
    """Waiting for a child costs a parent no attempt; only the crash cost one."""
    runs, attempts = batch.parents.aggregate(runs=Sum("fence"), attempts=Sum("attempt")).values()
    crashed = int(crash is not None and crash.execution_id in batch.orders)
    return Check(
        "parents waited without using up attempts",
        attempts == len(batch.orders) + crashed,
        f"{_count(len(batch.orders), 'parent')}, {_count(runs, 'run')}, {_count(attempts, 'attempt')}",
    )


def check_recovery(batch: Batch, crash: Crash | None) -> Check:
    """What the killed process ran was run again, and nothing else was."""
    again = batch.executions.filter(attempt__gt=1)
    recovered = again.filter(status__in=FINAL_STATUSES, finished_at__isnull=False).count()
    lost = again.aggregate(lost=Sum(F("attempt") - 1))["lost"] or 0
    return Check(
        "what the killed process ran was recovered",
        crash is not None and recovered == lost == 1 and again.filter(pk=crash.execution_id).exists(),
        f"{_count(int(crash is not None), 'process killed', 'processes killed')}, {_count(lost, 'attempt')} lost,"
        f" {_count(recovered, 'execution')} recovered",
    )


def _picked(items: QuerySet[OrderItem]) -> int:
    picked: int = items.aggregate(picked=Sum("picked", default=0))["picked"]
    return picked


def _count(number: int, word: str, words: str = "") -> str:
    return f"{number} {word if number == 1 else words or word + 's'}"


def _by_name(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
