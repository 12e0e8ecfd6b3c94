"""The pages of figures in the index and the sidebar of the admin."""

from __future__ import annotations

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.checks import run_checks
from django.test import Client, RequestFactory
from django.urls import reverse

from conductor_app.admin import ExecutionAdmin, register_pages
from conductor_app.models import Execution

pytestmark = pytest.mark.django_db

PAGES = {"overview": "Overview", "slow": "What takes long", "atwork": "Workers and queues"}


@pytest.mark.parametrize("name", PAGES)
def test_an_entry_shows_its_page(admin_client: Client, name: str) -> None:
    address = reverse(f"admin:conductor_app_{name}_changelist")
    for index in (reverse("admin:index"), reverse("admin:app_list", args=["conductor_app"])):
        assert f'href="{address}"' in admin_client.get(index).content.decode()
    assert f'<h1 class="cd-title">{PAGES[name]}</h1>' in admin_client.get(address).content.decode()


def test_an_entry_is_for_those_who_may_see_executions(client: Client) -> None:
    ben = User.objects.create_user("ben", is_staff=True)
    ben.user_permissions.set(Permission.objects.filter(codename="view_step"))
    client.force_login(ben)
    page = client.get(reverse("admin:index")).content.decode()
    for name in PAGES:
        address = reverse(f"admin:conductor_app_{name}_changelist")
        assert f'href="{address}"' not in page
        assert client.get(address).status_code == 403


def test_a_site_of_ones_own_gets_them_too() -> None:
    site = admin.AdminSite(name="other")
    site.register(Execution, ExecutionAdmin)
    register_pages(site)
    request = RequestFactory().get("/")
    request.user = User(is_superuser=True, is_staff=True, is_active=True)
    (app,) = site._build_app_dict(request).values()
    assert set(PAGES.values()) <= {model["name"] for model in app["models"]}


def test_django_has_nothing_against_them() -> None:
    assert run_checks() == []
