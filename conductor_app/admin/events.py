"""Events in the admin."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import filters
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.text import ago, or_dash, readable_value, shown
from conductor_app.models import Event


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    """What was sent to executions, the latest first."""

    list_display = ("name_text", "execution_link", "key_text", "created", "taken", "step_link")
    list_display_links = ("name_text",)
    list_filter = (filters.TakenFilter, filters.AgeFilter)
    ordering = ("-id",)
    search_fields = ("execution_id",)
    searched_id = "execution_id"
    indexed_lookups = frozenset({"execution", "execution__id__exact", "execution_id"})
    deferred_in_lists = ("payload",)
    payload_fields = ("payload",)
    fields = readonly_fields = (
        "id",
        "execution_link",
        "name_text",
        "key_text",
        "readable_payload",
        "created_at",
        "step_link",
        "taken_at",
    )

    @admin.display(description=_("name"))
    def name_text(self, event: Event) -> str:
        """Return the name."""
        return shown(event.name)

    @admin.display(description=_("key"))
    def key_text(self, event: Event) -> str:
        """Return the sender's own id."""
        return shown(event.key)

    @admin.display(description=_("payload"))
    def readable_payload(self, event: Event) -> str | None:
        """Return the payload, masked, for who may see it."""
        return readable_value(event.payload)

    @admin.display(description=_("taken"), empty_value="-")
    def taken(self, event: Any) -> str | None:
        """Return how long ago it was taken."""
        return ago(event.taken_at, event.read_at)

    @admin.display(description=_("execution"))
    def execution_link(self, event: Event) -> str | None:
        """Return a link to the execution that it was sent to."""
        return self.link(event.execution_id)

    @admin.display(description=_("taken by"))
    @or_dash
    def step_link(self, event: Event) -> str | None:
        """Return a link to the step that has taken it."""
        return self.link(event.step_id, "step")

    def as_json(self, row: Event) -> dict[str, Any]:
        """Return an event as plain data."""
        return {
            "id": row.pk,
            "execution": row.execution_id,
            "name": row.name,
            "key": row.key,
            "step": row.step_id,
            "created_at": row.created_at,
            "taken_at": row.taken_at,
        }
