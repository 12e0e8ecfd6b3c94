"""What every page of the admin has in common: rows to look at, never to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import Model
from django.forms.widgets import Script
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import refresh, twins
from conductor_app.admin.changelist import BoundedChangeList
from conductor_app.admin.paginator import BoundedPaginator
from conductor_app.admin.rows import RowsAdmin


class ReadOnlyAdmin(RowsAdmin):
    """Shows rows and changes none, in a number of queries that does not grow with the rows."""

    actions = None
    list_per_page = 50
    list_max_show_all = 50
    list_select_related = ()
    paginator = BoundedPaginator
    search_help_text = _("An execution's id, in full")
    show_facets = admin.ShowFacets.NEVER
    show_full_result_count = False
    sortable_by = ()

    class Media:
        css: ClassVar[Mapping[str, Sequence[str]]] = {"all": ("conductor_app/admin.css",)}
        js: ClassVar[Sequence[Any]] = (Script("conductor_app/refresh.js", defer=True),)

    # ------------------------------------------------------------------------------------------------- permissions

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody adds rows here."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nobody changes rows here."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nobody deletes rows here: ``manage.py conductor prune`` deletes whole trees."""
        return False

    # -------------------------------------------------------------------------------------------------------- pages

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the kind of list."""
        return BoundedChangeList

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Show the list, again and again if the address says so."""
        context = {"refresh": refresh.links(request), "conductor_json": self.address("json")}
        response = super().changelist_view(request, {**context, **(extra_context or {})})
        data: dict[str, Any] = getattr(response, "context_data", None) or {}
        if "cl" in data:
            # Django's "Select execution to view" is the same for every list of filters.
            data["title"] = data["cl"].title_text()
        refresh.apply_refresh(request, response)
        return response

    def get_urls(self) -> list[URLPattern]:
        """Return the pages, each with its twin for programs."""
        info = f"{self.opts.app_label}_{self.opts.model_name}"
        view = self.admin_site.admin_view
        return [
            path("json/", view(self.list_as_json), name=f"{info}_json"),
            path("<path:object_id>/json/", view(self.row_as_json), name=f"{info}_detail_json"),
            *super().get_urls(),
        ]

    def list_as_json(self, request: HttpRequest) -> HttpResponse:
        """Answer with the rows that the list shows, for programs."""
        return twins.list_response(self, request)

    def row_as_json(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Answer with what a row's own page shows, for programs."""
        return twins.row_response(self, request, object_id)
