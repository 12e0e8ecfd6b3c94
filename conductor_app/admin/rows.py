"""Which rows of ours somebody sees in the admin, what of each, and by which parameters of an address."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin import widgets
from django.db.models import Field, ForeignKey, Model, Q, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import access
from conductor_app.admin.access import VIEW_PAYLOAD, may_see_payloads
from conductor_app.admin.plain_data import masked
from conductor_app.admin.text import ago
from conductor_app.models import Execution, database
from conductor_app.store import clock

#: Stands where something is left out.
NEEDS_PERMISSION: Any = _("Hidden: seeing it takes the permission “%(permission)s”.")
#: What follows a date hierarchy's column in an address.
_HIERARCHY = ("year", "month", "day", "gte", "lt")


class RowsAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """What lists, pages and their twins for programs ask of an admin about its rows."""

    #: Fields that may be long.
    deferred_in_lists: ClassVar[tuple[str, ...]] = ()
    #: The field that the search box looks for, by its exact value.
    searched_id: ClassVar[str] = "pk"
    #: The column that orders the list, descending, and has an index; and the one that says when a row was written.
    order_column: ClassVar[str] = "id"
    written_column: ClassVar[str] = "created_at"
    #: Lookups in an address that an index serves.
    indexed_lookups: ClassVar[frozenset[str]] = frozenset()
    #: Lookups that an address may have besides exact values of columns that everybody sees, and what ``list_filter``
    #: and ``date_hierarchy`` declare. For subclasses: ``frozenset({"order__number__exact"})``.
    named_lookups: ClassVar[frozenset[str]] = frozenset()
    #: Columns with the id of another execution.
    references: ClassVar[tuple[str, ...]] = ()
    #: Fields that hold payloads and results; a page shows them as ``readable_<name>``.
    payload_fields: ClassVar[tuple[str, ...]] = ()

    # --------------------------------------------------------------------------------------------------------- rows

    def get_fields(self, request: HttpRequest, obj: Model | None = None) -> Any:
        """Say for who may not see payloads, results and errors that they are left out."""
        fields: Any = super().get_fields(request, obj)
        if may_see_payloads(request):
            return fields
        kept = [name for name in fields if not access.is_private(self.model, name.removeprefix("readable_"))]
        return kept if len(kept) == len(fields) else [*kept, "withheld"]

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """Return a row without the ids of executions that this site does not show to this person."""
        row = super().get_object(request, object_id, from_field)
        if row is not None:
            access.conceal(self.seen(request), [row], self.references)
        return row

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows of those executions that this site shows to this person, where the engine writes them."""
        rows: QuerySet[Any] = super().get_queryset(request).using(database())
        if self.model is Execution:
            return rows
        seen = access.executions(self, request)
        return rows if seen is None else rows.filter(execution__in=seen.values("pk"))

    def seen(self, request: HttpRequest) -> QuerySet[Execution] | None:
        """Return the executions that this site shows to this person; ``None`` if it shows all of them."""
        return access.executions(self, request)

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:
        """Tell whether an address may have a parameter: what is declared, and nothing else.

        Of a filter in ``list_filter`` all parameters are allowed here that begin with its column; ``BoundedChangeList``
        refuses those that it does not take.
        """
        if access.is_private(self.model, lookup) and (request is None or not may_see_payloads(request)):
            return False
        if self.is_named(lookup, value):
            return True
        declared: Iterable[Any] = self.list_filter if request is None else self.get_list_filter(request)
        for item in declared:
            if isinstance(item, type) and issubclass(item, admin.ListFilter):
                # Which ones a filter with several parameters takes, only an instance of it knows.
                takes_several = item.expected_parameters is not admin.SimpleListFilter.expected_parameters
                if takes_several or lookup == getattr(item, "parameter_name", None):
                    return True
                continue
            column = item[0] if isinstance(item, (list, tuple)) else item
            name = column.name if isinstance(column, Field) else str(column)
            if lookup == name or lookup.startswith(f"{name}{LOOKUP_SEP}"):
                return True
        return False

    def is_named(self, lookup: str, value: Any) -> bool:
        """Tell whether an address may have a parameter although no filter takes it."""
        if lookup in self.named_lookups or lookup in self.indexed_lookups:
            return True
        if self.date_hierarchy and lookup in {f"{self.date_hierarchy}{LOOKUP_SEP}{part}" for part in _HIERARCHY}:
            return True
        # What ``limit_choices_to`` of somebody's foreign key puts into the address of its popup.
        for limit in self.opts.related_fkey_lookups:
            chosen: Any = limit() if callable(limit) else limit
            if (lookup, value) in widgets.url_params_from_lookup_dict(chosen).items():
                return True
        return lookup in self._exact_lookups()

    def _exact_lookups(self) -> set[str]:
        """Return the exact lookups of the columns that whoever sees the rows sees, too."""
        found: set[str] = set()
        for column in self.opts.concrete_fields:
            if access.is_private(self.model, column.name):
                continue
            found |= {column.name, column.attname, f"{column.name}__exact"}
            if isinstance(column, ForeignKey):
                found |= {f"{column.name}__{column.target_field.name}__exact", f"{column.name}__pk__exact"}
        return found

    @admin.display(description=_("more"))
    def withheld(self, row: Any) -> str:
        """Say why something is missing."""
        return str(NEEDS_PERMISSION % {"permission": VIEW_PAYLOAD})

    # -------------------------------------------------------------------------------------------------------- lists

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
        # PostgreSQL refuses a NUL, with which no name begins.
        condition = self.searched(search_term) if "\x00" not in search_term else Q(pk__in=[])
        return (queryset if condition is None else queryset.filter(condition)), False

    @admin.display(description=_("created"), empty_value="-")
    def created(self, row: Any) -> str | None:
        """Return how long ago the row was written."""
        return ago(getattr(row, self.written_column), row.read_at)

    # ------------------------------------------------------------------------------------------------------ as data

    def complete_for_json(self, rows: list[Any]) -> None:
        """Add to the rows of one page what only their documents have, read for all of them at once."""

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return a row of the list as plain data."""
        raise NotImplementedError

    def in_full(self, row: Any, request: HttpRequest) -> dict[str, Any]:
        """Return what a row's own page shows to a person as plain data."""
        document = self.as_json(row)
        for name in self.payload_fields if may_see_payloads(request) else ():
            document[name] = masked(getattr(row, name))
        return document

    # -------------------------------------------------------------------------------------------------------- links

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
