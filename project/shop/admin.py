"""The shop in the admin."""

from __future__ import annotations

from django.contrib import admin

from project.shop.models import Order, Receipt


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Orders, with how far they are."""

    list_display = ["number", "customer", "total", "status", "note", "updated_at"]
    list_filter = ["status"]
    search_fields = ["number", "customer"]
    readonly_fields = ["created_at", "updated_at"]


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
