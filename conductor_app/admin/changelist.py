"""Lists that stay quick beside millions of rows.

A list is in the order of an index, newest first. Without a filter, its pages are read from that index. With filters,
one of two things bounds the work: an index finds few rows (an id, a tree, a rare task, the open executions), or only
the latest ``WINDOW`` rows are looked through, and the page says so and leads further back.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Any

from django.contrib.admin.exceptions import DisallowedModelAdminLookup
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ERROR_FLAG, ORDER_VAR, ChangeList
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db import DataError, connections
from django.db.models import QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest
from django.utils.formats import number_format
from django.utils.text import capfirst
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.admin import access
from conductor_app.admin.filters import AgeFilter, IndexedFilter
from conductor_app.admin.paginator import COUNTED, estimated_count
from conductor_app.admin.rows import RowsAdmin

#: The latest so many rows are looked through by filters that no index serves.
WINDOW = 50_000
BEFORE_VAR = "before"
REFRESH_VAR = "refresh"


@dataclass(frozen=True)
class Window:
    """The part of a table that a filtered list has looked through."""

    #: Its oldest row: the value of the ordering column, and when it was written.
    bound: Any
    written_at: dt.datetime
    #: The query string of the part before it.
    older: str


class BoundedChangeList(ChangeList):
    """A list that leaves long texts in the database, and reads a bounded number of rows."""

    model_admin: RowsAdmin
    #: Set if filters have looked through a part of the table only.
    window: Window | None = None

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        given = request.GET
        if any("\x00" in text for name, values in given.lists() for text in (name, *values)):
            raise IncorrectLookupParameters("There is no NUL in any text here.")  # PostgreSQL would refuse it
        try:
            super().__init__(request, *args, **kwargs)
        except (ArithmeticError, DataError, TypeError, ValueError) as error:
            if not set(given) - {ERROR_FLAG, REFRESH_VAR}:
                raise
            # Somebody's filter, a date hierarchy or a driver did not bear a value of the address.
            raise IncorrectLookupParameters(error) from error

    def _read(self, column: str, text: str) -> Any:
        """Return a column's value as an address has it."""
        field: Any = self.lookup_opts.get_field(column)
        try:
            value = field.to_python(text)
            if isinstance(value, dt.datetime) and value.tzinfo is not None:
                # PostgreSQL, too, gives up at the ends of the calendar, and then takes no other statement.
                value.astimezone(dt.UTC)
        except (OverflowError, ValidationError) as error:
            raise IncorrectLookupParameters(error) from error
        if isinstance(value, float) and not math.isfinite(value):
            raise IncorrectLookupParameters("Not every database knows a number like this.")
        return value

    def get_filters(self, request: HttpRequest) -> Any:
        """Return the filters of the address.

        Raises:
            DisallowedModelAdminLookup: A parameter is not one of those that are declared.
            IncorrectLookupParameters: A parameter has no meaning.
        """
        for name in self.get_filters_params():
            column = name.split(LOOKUP_SEP, 1)[0]
            if not any(self.model_admin.lookup_allowed(name, value, request) for value in self.filter_params[name]):
                try:
                    self.lookup_opts.get_field(self.lookup_opts.pk.name if column == "pk" else column)
                except FieldDoesNotExist as error:
                    raise IncorrectLookupParameters(error) from error
        for name, values in self.get_filters_params().items():
            column, _separator, lookup = name.partition(LOOKUP_SEP)
            if lookup in ("", "exact") and column in {field.name for field in self.lookup_opts.concrete_fields}:
                for value in values:
                    self._read(column, value)
        found: Any = super().get_filters(request)
        # What no filter has taken: of a filter's own column, other lookups than those it knows.
        for name in found[2]:
            if not all(self.model_admin.is_named(name, value) for value in self.filter_params.get(name, [None])):
                raise DisallowedModelAdminLookup(f"Filtering by {name} not allowed")
        return found

    def get_filters_params(self, params: Any = None) -> Any:
        """Return the parameters that are filters."""
        found = super().get_filters_params(params)
        return {name: value for name, value in found.items() if name not in (BEFORE_VAR, REFRESH_VAR)}

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[Any]:
        """Return the order of the index, whatever the address says: any other would sort the whole table."""
        self.params.pop(ORDER_VAR, None)
        return list(super().get_ordering(request, queryset))

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        """Return the rows of the list.

        Raises:
            IncorrectLookupParameters: A parameter has no meaning.
        """
        # ``exclude_parameters`` is for counts beside filters, which ``show_facets`` rules out.
        rows = super().get_queryset(request, exclude_parameters)
        rows = self.model_admin.for_list(rows.defer(*self.model_admin.deferred_in_lists))
        column = self.model_admin.order_column
        before = self._before()
        if before is not None:
            rows = rows.filter(**{f"{column}__lt": before})
        is_bounded, sets = self._sets(request, rows)
        return rows if is_bounded else self._within(rows, before, sets)

    def get_results(self, request: HttpRequest) -> None:
        """Read one page, and all that its rows show, in a fixed number of queries."""
        super().get_results(request)
        # Stock templates would show the count a second time, without saying that it is bounded.
        self.full_result_count = self.result_count
        self.result_list: Any = list(self.result_list)
        self.model_admin.complete(self.result_list)
        access.conceal(self.model_admin.seen(request), self.result_list, self.model_admin.references)
        self.is_capped = bool(self.paginator.is_capped)
        self.count_text = self._count_text(request)
        self.older = None
        if self.is_capped and self.result_list:
            self.older = self._query_string_before(getattr(self.result_list[-1], self.model_admin.order_column))
        self.newest = self.get_query_string(remove=[BEFORE_VAR]) if BEFORE_VAR in self.params else None

    # ------------------------------------------------------------------------------------------------------- bounds

    def _before(self) -> Any:
        if BEFORE_VAR not in self.params:
            return None
        return self._read(self.model_admin.order_column, self.params[BEFORE_VAR])

    def _sets(self, request: HttpRequest, rows: QuerySet[Any]) -> tuple[bool, list[QuerySet[Any]]]:
        """Tell whether the order's index is all that the filters need, and what other indexes find."""
        is_bounded, sets = True, []
        searched = self.model_admin.searched(self.query)
        if searched is not None:
            is_bounded = False
            sets.append(self.root_queryset.filter(searched))
        for spec in self.filter_specs:
            if isinstance(spec, IndexedFilter) and spec.value() is not None:
                is_bounded = is_bounded and spec.is_ordered
                sets += [found for found in [spec.found_by_index()] if found is not None]
        others = set(self.get_filters_params()) - {
            name for spec in self.filter_specs for name in spec.expected_parameters() if name is not None
        }
        for name in sorted(others):
            is_bounded = False
            if name in self.model_admin.indexed_lookups:
                sets.append(self.root_queryset.filter(**{name: self.params[name]}))
        if access.is_narrowed(self.root_queryset):
            sets = [self.root_queryset.filter(pk__in=found.order_by().values("pk")) for found in sets]
        return is_bounded, sets

    def _within(self, rows: QuerySet[Any], before: Any, sets: list[QuerySet[Any]]) -> QuerySet[Any]:
        """Bound what is read: by the few rows that an index finds, or else by the latest ones."""
        column, written = self.model_admin.order_column, self.model_admin.written_column
        order: Any = self.model_admin.ordering
        latest = self.root_queryset.order_by(*order)
        if before is not None:
            latest = latest.filter(**{f"{column}__lt": before})
        few = next((found for found in sets if self._are_few(found)), None)
        if few is not None:
            if connections[rows.db].features.allow_sliced_subqueries_with_in:
                # The slice is a fence: without it a planner may walk through the whole table in the list's order.
                rows = rows.filter(pk__in=few.order_by().values("pk")[: COUNTED + 1])
            return self._refined(rows, None)
        bounds = list(latest.values_list(column, written)[WINDOW : WINDOW + 1])
        if not bounds:
            return self._refined(rows, None)
        bound, written_at = bounds[0]
        floors = [spec.floor for spec in self.filter_specs if isinstance(spec, AgeFilter) and spec.floor is not None]
        if not floors or max(floors) < written_at:
            self.window = Window(bound, written_at, self._query_string_before(bound))
        return self._refined(rows.filter(**{f"{column}__gte": bound}), bound)

    def _are_few(self, found: QuerySet[Any]) -> bool:
        return bool(found.order_by().values("pk")[: COUNTED + 1].count() <= COUNTED)

    def _refined(self, rows: QuerySet[Any], bound: Any) -> QuerySet[Any]:
        for spec in self.filter_specs:
            if isinstance(spec, IndexedFilter):
                rows = spec.bounded(rows, bound)
        return rows

    def _query_string_before(self, value: Any) -> str:
        text = value.isoformat() if isinstance(value, dt.datetime) else str(value)
        return self.get_query_string({BEFORE_VAR: text})

    # -------------------------------------------------------------------------------------------------------- words

    def title_text(self) -> str:
        """Return what the list is of: ``Executions: waiting, charge``."""
        chosen = [
            str(dict(spec.lookup_choices).get(value, value))
            for spec in self.filter_specs
            if isinstance(spec, IndexedFilter) and (value := spec.value()) is not None
        ]
        name = capfirst(str(self.opts.verbose_name_plural))
        return f"{name}: {', '.join(chosen)}" if chosen else name

    def _count_text(self, request: HttpRequest) -> str:
        name = self.opts.verbose_name if self.result_count == 1 else self.opts.verbose_name_plural
        number = number_format(self.result_count, force_grouping=True)
        if not self.is_capped:
            return f"{number} {name}"
        is_whole = not self.get_filters_params() and not self.query and BEFORE_VAR not in self.params
        if is_whole and not access.is_narrowed(self.root_queryset):
            estimate = estimated_count(self.root_queryset)
            if estimate is not None and estimate > COUNTED:
                number = number_format(estimate, force_grouping=True)
                return _("about %(number)s %(name)s") % {"number": number, "name": name}
        return f"{number}+ {name}"

    @property
    def window_text(self) -> str:
        """What a reader has to know of the window."""
        return ngettext(
            "Looked through the latest %(number)s row only.", "Looked through the latest %(number)s rows only.", WINDOW
        ) % {"number": number_format(WINDOW, force_grouping=True)}
