"""The shop in the admin."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import F, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from project.shop import approvals
from project.shop.models import Order, OrderItem, Receipt, Stock

#: How many pieces come at once.
DELIVERY = 100


class OrderItemInline(admin.TabularInline):  # type: ignore[type-arg]
    """What is in an order, and what of it is picked."""

    model = OrderItem
    extra = 0
    readonly_fields = ["picked"]


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Orders, with how far they are; here they are approved or refused."""

    list_display = ["number", "customer", "total", "status", "answered_by", "note", "updated_at"]
    list_filter = ["status"]
    search_fields = ["number", "customer"]
    # Only the tasks write these: they tell how far the order is.
    readonly_fields = ["status", "note", "approval", "answered_by", "created_at", "updated_at"]
    inlines = [OrderItemInline]
    actions = ["approve", "refuse"]

    @admin.display(description="approval asked for by")
    def approval(self, order: Order) -> str:
        """Link the execution that waits, or has waited, for the approval."""
        if order.execution_id is None:
            return self.get_empty_value_display()
        url = reverse("admin:conductor_app_execution_change", args=[order.execution_id])
        return format_html('<a href="{}">{}</a>', url, order.execution_id)

    @admin.action(description="Approve selected orders", permissions=["change"])
    def approve(self, request: HttpRequest, orders: QuerySet[Order]) -> None:
        """Let the orders be charged and shipped."""
        self._answer(request, orders, yes=True)

    @admin.action(description="Refuse selected orders", permissions=["change"])
    def refuse(self, request: HttpRequest, orders: QuerySet[Order]) -> None:
        """End the orders."""
        self._answer(request, orders, yes=False)

    def _answer(self, request: HttpRequest, orders: QuerySet[Order], yes: bool) -> None:
        for order in orders:
            try:
                approvals.answer(order, by=request.user.get_username(), yes=yes)
            except approvals.NotWaiting as error:
                self.message_user(request, str(error), messages.WARNING)
            else:
                self.message_user(request, f"{order}: the answer is sent.", messages.SUCCESS)


@admin.register(Stock)
class StockAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """What is on the shelf; here somebody fills it."""

    list_display = ["name", "quantity"]
    search_fields = ["name"]
    actions = ["fill"]

    def get_readonly_fields(self, request: HttpRequest, stock: Stock | None = None) -> list[str]:
        # A form would write back what it has read, and so undo what was picked meanwhile.
        return ["quantity"] if stock else []

    @admin.action(description=f"Put {DELIVERY} pieces more on selected shelves", permissions=["change"])
    def fill(self, request: HttpRequest, shelves: QuerySet[Stock]) -> None:
        """Take in what was delivered."""
        shelves.update(quantity=F("quantity") + DELIVERY)


@admin.register(Receipt)
class ReceiptAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Receipts, to look at: only ``project.shop.tasks.save_receipt`` writes them."""

    list_display = ["bank_reference", "order", "amount", "created_at"]
    list_select_related = ["order"]
    search_fields = ["bank_reference", "order__number"]

    def has_add_permission(self, request: object) -> bool:
        return False

    def has_change_permission(self, request: object, obj: object = None) -> bool:
        return False
