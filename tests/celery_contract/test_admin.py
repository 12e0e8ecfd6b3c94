"""Django's admin: relied on by ``conductor_app.admin``."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.test import RequestFactory


class Named(admin.SimpleListFilter):
    title = "name"
    parameter_name = "named"

    def lookups(self, request: Any, model_admin: Any) -> list[tuple[str, str]]:
        return [("ben", "ben")]

    def queryset(self, request: Any, queryset: Any) -> Any:
        return queryset


class PeopleAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_filter = (Named, "is_staff", ("last_login", admin.DateFieldListFilter))
    date_hierarchy = "date_joined"

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        asked.append((lookup, value))
        return True


asked: list[tuple[str, str]] = []


@pytest.mark.django_db
def test_a_list_asks_for_each_parameter_and_its_filters_take_those_that_they_know(rf: RequestFactory) -> None:
    """``changelist.BoundedChangeList.get_filters``: what is left in the third place is for the query."""
    asked.clear()
    given = {"named": "ben", "is_staff__exact": "1", "is_staff__gt": "0", "username": ["x", "y"], "q": "z", "p": "1"}
    request = rf.get("/", {**given, "last_login__gte": "2026-01-01 00:00:00+00:00", "date_joined__year": "2026"})
    request.user = User(is_superuser=True, is_active=True)
    found: Any = PeopleAdmin(User, admin.site).get_changelist_instance(request)
    expected = {*given, "last_login__gte", "date_joined__year"} - {"q", "p"}
    assert {name for name, _ in asked} == expected
    assert ("username", "x") in asked
    assert ("username", "y") in asked
    left = found.get_filters(request)[2]
    assert set(left) == {"is_staff__gt", "username", "date_joined__gte", "date_joined__lt"}


def test_filters_say_which_parameters_they_take() -> None:
    """``rows.RowsAdmin.lookup_allowed`` tells by this whether ``parameter_name`` is all of them."""
    assert Named.expected_parameters is admin.SimpleListFilter.expected_parameters
    assert admin.SimpleListFilter.expected_parameters is not admin.ListFilter.expected_parameters


def test_a_query_that_leaves_nothing_out_has_no_condition() -> None:
    """``access.is_narrowed``."""
    for everything in (User.objects.all(), User.objects.order_by("pk").defer("email").select_related()):
        assert not everything.query.where
    some = User.objects.filter(is_staff=True)
    for narrowed in (some, User.objects.exclude(pk=1), User.objects.none(), User.objects.extra(where=["1 = 0"])):
        assert narrowed.query.where
    assert not some.query.is_sliced
    assert some[:3].query.is_sliced
    assert some.union(some).query.combinator == "union"
    assert User.objects.extra(tables=["auth_group"]).query.extra_tables
    assert not Permission._meta.related_fkey_lookups
