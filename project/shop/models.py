"""The shop's tables, and the bank's books."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    """What a customer wants, and how far it is."""

    class Status(models.TextChoices):
        """The stages of an order."""

        NEW = "new"
        AWAITING_APPROVAL = "awaiting approval"
        APPROVED = "approved"
        REFUSED = "refused"
        PAID = "paid"
        SHIPPED = "shipped"
        DECLINED = "declined"
        PAYMENT_PENDING = "payment pending"

    number = models.PositiveIntegerField(unique=True)
    customer = models.CharField(max_length=100)
    email = models.EmailField()
    #: The bank's token for the card; a shop never sees the card's number.
    card = models.CharField(max_length=64)
    #: The sum of the items.
    total = models.DecimalField(max_digits=9, decimal_places=2)
    status = models.CharField(max_length=20, choices=Status, default=Status.NEW)
    #: Why the order stands where it stands, if that needs a word.
    note = models.CharField(max_length=200, blank=True)
    #: The execution that has asked for an approval: whom to tell.
    execution_id = models.UUIDField(null=True, editable=False)
    #: Who has approved or refused the order.
    answered_by = models.CharField(max_length=150, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["-number"]

    def __str__(self) -> str:
        return f"Order {self.number}"


class OrderItem(models.Model):
    """One line of an order."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="items")
    name = models.CharField(max_length=60)
    quantity = models.PositiveIntegerField(default=1)
    #: Of one piece.
    price = models.DecimalField(max_digits=9, decimal_places=2)
    #: How many pieces have been taken from the stock for it.
    picked = models.PositiveIntegerField(default=0)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.quantity} × {self.name}"


class Stock(models.Model):
    """How many pieces of one thing are on the shelf."""

    name = models.CharField(max_length=60, unique=True)
    quantity = models.PositiveIntegerField(default=0)

    class Meta:
        ordering = ["name"]
        verbose_name_plural = "stock"

    def __str__(self) -> str:
        return self.name


class Receipt(models.Model):
    """The shop's proof that an order was paid."""

    order = models.OneToOneField(Order, models.PROTECT, related_name="receipt")
    amount = models.DecimalField(max_digits=9, decimal_places=2)
    #: The bank's name for the payment.
    bank_reference = models.CharField(max_length=32)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"Receipt {self.bank_reference}"


class Payment(models.Model):
    """The bank's books: money that moved. Written by ``project.shop.bank`` alone."""

    #: The bank's promise: one key, one payment, however often it is asked.
    idempotency_key = models.CharField(max_length=255, unique=True)
    reference = models.CharField(max_length=32)
    card = models.CharField(max_length=64)
    amount = models.DecimalField(max_digits=9, decimal_places=2)
    #: The order's number, as the shop gave it. Not unique: a shop that asks with a second key is charged twice.
    order_number = models.PositiveIntegerField(db_index=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"Payment {self.reference}"


class BankCall(models.Model):
    """The bank's log: each request that reached it, and its answer. Written by ``project.shop.bank`` alone."""

    class Answer(models.TextChoices):
        """What the bank said."""

        CHARGED = "charged"
        #: The key was known: nothing moved, the first answer was given again.
        REPEATED = "repeated"
        DECLINED = "declined"

    order_number = models.PositiveIntegerField(db_index=True)
    idempotency_key = models.CharField(max_length=255)
    answer = models.CharField(max_length=16, choices=Answer)
    received_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"Order {self.order_number}: {self.answer}"
