"""What every page of the admin has in common: rows to look at, never to edit."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import Model, Q, QuerySet
from django.forms.widgets import Script
from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from conductor_app import clock
from conductor_app.admin import refresh, twins
from conductor_app.admin.changelist import BoundedChangeList
from conductor_app.admin.paginator import BoundedPaginator
from conductor_app.admin.text import ago

#: Who has it may see what tasks were given and what they returned.
VIEW_PAYLOAD = "conductor_app.view_payload"


def may_see_payloads(request: HttpRequest) -> bool:
    """Tell whether the user may see payloads and results."""
    return bool(request.user.has_perm(VIEW_PAYLOAD))


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Shows rows and changes none, in a number of queries that does not grow with the rows."""

    #: Fields that may be long.
    deferred_in_lists: ClassVar[tuple[str, ...]] = ()
    #: The field that the search box looks for, by its exact value.
    searched_id: ClassVar[str] = "pk"
    #: The column that orders the list, descending, and has an index; and the one that says when a row was written.
    order_column: ClassVar[str] = "id"
    written_column: ClassVar[str] = "created_at"
    #: Lookups in an address that an index serves.
    indexed_lookups: ClassVar[frozenset[str]] = frozenset()
    #: Fields that hold payloads and results; a page shows them as ``readable_<name>``.
    payload_fields: ClassVar[tuple[str, ...]] = ()

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

    def get_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        """Leave payloads and results out for who may not see them."""
        fields: Any = super().get_fields(request, obj)
        if not self.payload_fields or may_see_payloads(request):
            return fields
        return [name for name in fields if name.removeprefix("readable_") not in self.payload_fields]

    # -------------------------------------------------------------------------------------------------------- lists

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the kind of list."""
        return BoundedChangeList

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Show the list, again and again if the address says so."""
        context = {"refresh": refresh.links(request), "conductor_json": self.address("json")}
        response = super().changelist_view(request, {**context, **(extra_context or {})})
        refresh.apply_refresh(request, response)
        return response

    def for_list(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        """Return the rows of a list with what its columns need."""
        with_clock: QuerySet[Any] = rows.annotate(read_at=clock.now())
        return with_clock

    def complete(self, rows: list[Any]) -> None:
        """Add to the rows of one page what is read for all of them at once."""

    def searched(self, term: str) -> Q | None:
        """Return what the search box asks for, found by an index; ``None`` if it is empty."""
        term = term.strip()
        if not term:
            return None
        try:
            return Q(**{self.searched_id: uuid.UUID(term)})
        except ValueError:
            return Q(pk__in=[])

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find by what an index serves; anything else finds nothing."""
        condition = self.searched(search_term)
        return (queryset if condition is None else queryset.filter(condition)), False

    @admin.display(description=_("created"), empty_value="-")
    def created(self, row: Any) -> str | None:
        """Return how long ago the row was written."""
        return ago(getattr(row, self.written_column), row.read_at)

    # -------------------------------------------------------------------------------------------------------- links

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

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return a row of the list as plain data."""
        raise NotImplementedError

    def in_full(self, row: Any, *, with_payloads: bool) -> dict[str, Any]:
        """Return what a row's own page shows as plain data."""
        document = self.as_json(row)
        for name in self.payload_fields if with_payloads else ():
            document[name] = twins.masked(getattr(row, name))
        return document

    def address(self, page: str, *args: Any, model: str | None = None) -> str | None:
        """Return the address of a page of this model, or of another one, if this site has it."""
        name = f"admin:{self.opts.app_label}_{model or self.opts.model_name}_{page}"
        try:
            return reverse(name, args=args, current_app=self.admin_site.name)
        except NoReverseMatch:
            return None

    def link(self, key: uuid.UUID | int | None, model: str = "execution", text: str = "") -> str | None:
        """Return an id, by default an execution's, as a link to its page, if this site has one.

        Args:
            text: What to show in the place of the whole id, where there is little room.
        """
        if key is None:
            return None
        url = self.address("change", key, model=model)
        if url is None:
            return str(key)
        if not text:
            return format_html('<a href="{}">{}</a>', url, key)
        return format_html('<a href="{}" title="{}">{}</a>', url, key, text)
