"""The shop's tests: whole orders in a ``TestCase``, and one body alone without a database."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from unittest import mock

from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth.models import User
from django.core import mail
from django.test import SimpleTestCase
from django.urls import reverse

from conductor_app import ChildFailed, ChildTimedOut, api
from conductor_app.testing import ConductorMixin, ConductorTestCase, StepCall
from project.shop import bank
from project.shop.models import Order, Payment, Stock
from project.shop.tasks import OutOfStock, charge, fulfil

#: What ``validate`` returns.
VALID = {"total": Decimal(42), "items": [1, 2]}


class OrderTestCase(ConductorTestCase):
    """What the tests of whole orders need."""

    def place(self, *items: tuple[str, int], **fields: object) -> Order:
        """Store an order of ``items`` (names with quantities), and put five pieces of each on the shelf."""
        values = {"number": 1007, "customer": "Ann", "email": "ann@example.com", "card": "tok_1", "total": Decimal(42)}
        order = Order.objects.create(**{**values, **fields})
        for name, quantity in items:
            order.items.create(name=name, quantity=quantity, price=1)
            Stock.objects.create(name=name, quantity=5)
        return order


class OrderTest(OrderTestCase):
    """An order from the click to its end, with all children."""

    def test_an_order_is_charged_and_shipped(self) -> None:
        order = self.place()
        result = fulfil.delay(order_id=order.pk)
        self.conductor.drain()
        self.conductor.assert_succeeded(result)
        self.conductor.assert_invoked(
            result, "charge", task=charge, payload={"order_id": order.pk, "total": order.total}
        )
        order.refresh_from_db()
        self.assertEqual((order.status, order.receipt.amount), ("shipped", 42))
        self.assertEqual([message.to for message in mail.outbox], [["ann@example.com"]])

    def test_a_declined_card_declines_the_order(self) -> None:
        order = self.place(card=f"{bank.DECLINED_TOKEN}no_money")
        result = fulfil.delay(order_id=order.pk)
        self.conductor.drain()
        self.conductor.assert_succeeded(result, result={"status": "declined"})
        child = self.conductor.assert_invoked(result, "charge")
        self.conductor.assert_failed(child, error_class=bank.CardDeclined, message="no money")
        self.assertFalse(Payment.objects.exists())

    def test_a_bank_that_is_away_is_asked_again_with_the_same_key(self) -> None:
        order = self.place()
        answers = [ConnectionError("the bank is away"), {"reference": "BNK-1", "amount": "42.00"}]
        with mock.patch.object(bank, "charge", side_effect=answers) as asked:
            result = fulfil.delay(order_id=order.pk)
            self.conductor.advance(20)
        self.conductor.assert_succeeded(result)
        keys = {call.kwargs["idempotency_key"] for call in asked.call_args_list}
        self.assertEqual((asked.call_count, len(keys)), (2, 1))

    def test_an_order_without_a_total_fails(self) -> None:
        order = self.place(total=0)
        result = fulfil.delay(order_id=order.pk)
        self.conductor.advance(60)
        self.conductor.assert_failed(
            result, message="Child execution failed: Order 1007 has a total of 0", step="validate"
        )

    def test_each_item_is_picked_once_and_the_stock_is_lowered(self) -> None:
        order = self.place(("cup", 2), ("pot", 1), ("tray", 1))
        result = fulfil.delay(order_id=order.pk)
        self.conductor.drain()
        self.conductor.assert_succeeded(result)
        self.assertEqual(list(order.items.values_list("name", "picked")), [("cup", 2), ("pot", 1), ("tray", 1)])
        self.assertEqual(list(Stock.objects.values_list("name", "quantity")), [("cup", 3), ("pot", 4), ("tray", 4)])

    def test_an_empty_shelf_fails_the_order_until_it_is_filled_and_the_order_retried(self) -> None:
        order = self.place(("cup", 2), ("pot", 7))
        result = fulfil.delay(order_id=order.pk)
        self.conductor.advance(60)
        self.conductor.assert_failed(
            result, message="Child execution failed: 7 × pot ordered, 5 on the shelf", step="pick"
        )
        Stock.objects.filter(name="pot").update(quantity=10)
        api.retry(result.id)
        self.conductor.drain()
        self.conductor.assert_succeeded(result)
        self.assertEqual(Payment.objects.count(), 1)
        self.assertEqual(list(Stock.objects.values_list("name", "quantity")), [("cup", 3), ("pot", 3)])


class ApprovalTest(OrderTestCase):
    """A large order waits for a person, who answers in the admin."""

    def setUp(self) -> None:
        super().setUp()
        self.order = self.place(total=Decimal(201))
        self.result = fulfil.delay(order_id=self.order.pk)
        self.conductor.drain()

    def answer(self, action: str, user: str = "ana") -> str:
        """Choose an action for the order in the admin's list, and return what the admin says."""
        account, _ = User.objects.get_or_create(username=user, is_staff=True, is_superuser=True)
        self.client.force_login(account)
        data = {"action": action, ACTION_CHECKBOX_NAME: [self.order.pk]}
        page = self.client.post(reverse("admin:shop_order_changelist"), data, follow=True)
        (message,) = page.context["messages"]
        return str(message)

    def test_nothing_is_charged_before_somebody_answers(self) -> None:
        self.conductor.assert_waiting(self.result, step="approval")
        self.order.refresh_from_db()
        self.assertEqual((self.order.status, str(self.order.execution_id)), ("awaiting approval", self.result.id))
        self.assertFalse(Payment.objects.exists())

    def test_an_approved_order_is_charged_and_shipped(self) -> None:
        self.assertEqual(self.answer("approve"), "Order 1007: the answer is sent.")
        self.conductor.drain()
        self.conductor.assert_succeeded(self.result)
        self.order.refresh_from_db()
        self.assertEqual((self.order.status, self.order.answered_by), ("shipped", "ana"))

    def test_a_refused_order_is_not_charged(self) -> None:
        self.answer("refuse")
        self.conductor.drain()
        self.conductor.assert_succeeded(self.result, result={"status": "refused"})
        self.order.refresh_from_db()
        self.assertEqual((self.order.status, self.order.answered_by), ("refused", "ana"))
        self.assertFalse(Payment.objects.exists())

    def test_the_second_person_is_told_that_there_is_an_answer(self) -> None:
        self.answer("approve")
        self.assertEqual(self.answer("refuse", user="ben"), "Order 1007 has its answer already.")
        self.conductor.drain()
        self.assertEqual(self.answer("refuse"), "Order 1007 waits for no approval: it is shipped.")
        self.order.refresh_from_db()
        self.assertEqual(self.order.answered_by, "ana")

    def test_an_order_that_nobody_answers_is_refused_after_three_days(self) -> None:
        self.conductor.advance(timedelta(days=3))
        self.conductor.assert_succeeded(self.result, result={"status": "refused"})
        self.order.refresh_from_db()
        self.assertEqual((self.order.status, self.order.answered_by), ("refused", "the deadline"))

    def test_the_admin_shows_the_execution_that_waits(self) -> None:
        self.order.items.create(name="samovar", price=201)
        self.client.force_login(User.objects.create_superuser("ana"))
        page = self.client.get(reverse("admin:shop_order_change", args=[self.order.pk]))
        self.assertContains(page, reverse("admin:conductor_app_execution_change", args=[self.result.id]))
        self.assertContains(page, "samovar")

    def test_the_admin_fills_a_shelf(self) -> None:
        shelf = Stock.objects.create(name="samovar", quantity=1)
        self.client.force_login(User.objects.create_superuser("ana"))
        self.client.post(reverse("admin:shop_stock_changelist"), {"action": "fill", ACTION_CHECKBOX_NAME: [shelf.pk]})
        shelf.refresh_from_db()
        self.assertEqual(shelf.quantity, 101)


class AnnounceTest(OrderTestCase):
    """The mail, which a plain Celery task sends."""

    def test_a_mail_server_that_stays_away_fails_the_order_and_a_retry_sends_the_mail(self) -> None:
        order = self.place()
        with mock.patch("project.shop.tasks.send_mail", side_effect=ConnectionError("no mail server")):
            result = fulfil.delay(order_id=order.pk)
            self.conductor.drain()
        self.conductor.assert_failed(result, message="Child execution failed: no mail server", step="announce")
        api.retry(result.id)
        self.conductor.drain()
        self.conductor.assert_succeeded(result)
        self.assertEqual((len(mail.outbox), Payment.objects.count()), (1, 1))


class FulfilBodyTest(ConductorMixin, SimpleTestCase):
    """The body of ``fulfil`` alone: what it makes of what becomes of its children."""

    def test_a_bank_that_is_late_leaves_the_payment_pending(self) -> None:
        calls: list[StepCall] = []
        result = self.conductor.run(
            fulfil,
            {"order_id": 7},
            {"validate": VALID, "charge": ChildTimedOut},
            steps={"hold": None},
            calls=calls,
        )
        self.assertEqual(result, {"status": "payment pending"})
        self.assertEqual([call.step for call in calls], ["validate", "charge", "hold"])

    def test_a_failure_of_the_bank_other_than_a_refusal_fails_the_order(self) -> None:
        children = {"validate": VALID, "charge": ConnectionError("the bank is away")}
        with self.assertRaisesMessage(Exception, "Child execution failed: the bank is away"):
            self.conductor.run(fulfil, {"order_id": 7}, children)

    def test_a_part_that_cannot_be_picked_keeps_the_order_from_the_carrier(self) -> None:
        calls: list[StepCall] = []
        children = {"validate": VALID, "charge": {"reference": "BNK-1"}, "pick": [4, OutOfStock("no pot left")]}
        with self.assertRaisesMessage(ChildFailed, "Child execution failed: no pot left"):
            self.conductor.run(fulfil, {"order_id": 7}, children, calls=calls)
        self.assertEqual([call.step for call in calls], ["validate", "charge", "pick", "pick"])
