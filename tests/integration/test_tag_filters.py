"""Executions are found by their tags: by commands, in the admin."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.core.cache import cache
from django.db.models import QuerySet
from django.http import HttpRequest
from django.test import Client, override_settings
from django.urls import clear_url_caches, path

from conductor_app import api, transitions
from conductor_app.admin import ExecutionAdmin, FailedExecutionAdmin
from conductor_app.models import Execution, FailedExecution
from conductor_app.states import ExecutionStatus
from conductor_app.telling import tags
from tests.support import executions
from tests.support.command import told

pytestmark = pytest.mark.django_db

LIST = "/admin/conductor_app/execution/"


@pytest.fixture
def acme() -> Execution:
    """A root that runs, with two tags."""
    return executions.running(tags={"tenant": "acme", "order": "7"})


@pytest.fixture
def below(acme: Execution) -> Execution:
    """Its child."""
    return executions.invoke(acme, "charge")


@pytest.fixture
def other() -> Execution:
    return executions.queued(tags={"tenant": "acme", "order": "8"})


@pytest.fixture
def rival() -> Execution:
    return executions.queued(tags={"tenant": "rival", "note": "a=b:c, d"})


def listed(*words: str) -> set[str]:
    return set(told("ls", "-q", *words).out.split())


def keys(*rows: Execution) -> set[str]:
    return {str(row.pk) for row in rows}


# ----------------------------------------------------------------------------------------------------------- commands


def test_a_tag_lists_whole_trees(acme: Execution, below: Execution, other: Execution, rival: Execution) -> None:
    assert listed("--tag", "tenant=acme") == keys(acme, below, other)
    assert listed("--tag", "tenant:acme", "--root-only") == keys(acme, other)
    assert listed("--tag", "tenant=acme", "--tag", "order=7") == keys(acme, below)
    assert listed("--tag", "note=a=b:c, d") == keys(rival)
    assert listed("--tag", "tenant=Acme") == listed("--tag", "tenant=acm") == listed("--tag", "x=acme") == set()


def test_many_trees_with_a_tag_are_found_as_well(
    staff: Client,
    acme: Execution,
    below: Execution,
    other: Execution,
    rival: Execution,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tags, "FEW_TREES", 1)
    assert listed("--tag", "tenant=acme") == keys(acme, below, other)
    assert listed("--tag", "tenant=acme", "--tag", "order=7") == keys(acme, below)
    assert shown(staff, tag="tenant=acme") == keys(acme, below, other)


@pytest.mark.parametrize("name", ["ls", "retry", "rerun", "cancel", "wake", "publish"])
@pytest.mark.parametrize("text", ["tenant", "=acme", "tenant=", ""])
def test_a_tag_without_key_or_value_is_refused(name: str, text: str) -> None:
    answer = told(name, "--tag", text)

    assert "argument --tag: " in answer.error


def test_an_empty_list_names_the_tags() -> None:
    assert told("ls", "--tag", "a=b", "--tag", "c:d").out == "No executions of tag a=b, tag c=d.\n"


def test_everything_of_a_tenant_is_cancelled(acme: Execution, other: Execution, rival: Execution) -> None:
    answer = told("cancel", "--tag", "tenant=acme", "--json")

    assert {result["id"] for result in answer.json["results"]} == keys(acme, other)
    assert executions.fresh(other).status == ExecutionStatus.CANCELLED
    assert executions.fresh(acme).cancel_requested_at is not None
    assert executions.fresh(rival).status == ExecutionStatus.QUEUED


def test_failures_of_a_tenant_are_retried_and_run_again(acme: Execution) -> None:
    transitions.fail(acme, executions.FAILURE)

    (created,) = told("rerun", "--tag", "order=7", "-q", "--status", "failed").out.split()

    assert api.get_tags(created) == {"tenant": "acme", "order": "7"}
    assert told("retry", "--tag", "order=7", "-q").out.split() == [str(acme.pk)]


def test_tags_are_in_what_programs_and_people_read(below: Execution, rival: Execution) -> None:
    executions.queued()
    own = {"tenant": "acme", "order": "7"}

    assert [row["tags"] for row in told("ls", "--tag", "order=7", "--json").json["executions"]] == [own, own]
    assert {} in [row["tags"] for row in told("ls", "--json").json["executions"]]
    assert told("show", below.pk, "--json").json["execution"]["tags"] == own
    assert "order=7, tenant=acme" in told("show", below.pk).out


# -------------------------------------------------------------------------------------------------------------- admin


@pytest.fixture
def staff(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def shown(client: Client, **parameters: str) -> set[str]:
    answer = client.get(f"{LIST}json/", parameters)
    assert answer.status_code == 200, answer.content
    return {row["id"] for row in answer.json()["rows"]}


def test_a_list_is_filtered_and_searched_by_tags(
    staff: Client, acme: Execution, below: Execution, other: Execution, rival: Execution
) -> None:
    assert shown(staff, tag="tenant=acme") == shown(staff, tag="tenant:acme") == keys(acme, below, other)
    assert shown(staff, tag="tenant=acme", kind="root", status__exact="queued") == keys(other)
    assert shown(staff, tag="note=a=b:c, d") == keys(rival)
    assert shown(staff, tag="tenant=acme", q=str(below.pk)) == keys(below)
    assert shown(staff, tag="tenant=nobody") == set()
    page = staff.get(LIST, {"tag": "tenant=acme"}).content.decode()
    assert "tenant=acme" in page
    assert "3 executions" in page


def test_a_tag_in_the_search_box_is_one_for_the_filter(staff: Client) -> None:
    answer = staff.get(LIST, {"q": " tag: note=a b ", "kind": "root"})

    assert answer.url == f"{LIST}?kind=root&tag=note%3Da+b"


@pytest.mark.parametrize("tag", ["tenant", "=acme", "tenant=", ""])
def test_a_tag_without_key_or_value_has_no_meaning_in_an_address(staff: Client, tag: str) -> None:
    assert staff.get(f"{LIST}json/", {"tag": tag}).status_code == 400
    assert staff.get(LIST, {"tag": tag}).url == f"{LIST}?e=1"


def test_a_page_links_each_tag_to_what_has_it(staff: Client, below: Execution) -> None:
    hostile = '"><script>'
    api.tag(below, {"note": hostile})
    page = staff.get(f"{LIST}{below.pk}/change/").content.decode()

    assert f'<a class="cd-tag" href="{LIST}?tag=order%3D7"><bdi>order=7</bdi></a>' in page
    assert hostile not in page
    (link,) = re.findall(r'href="([^"]*\?tag=note[^"]*)"', page)
    assert str(below.pk) in staff.get(html.unescape(link)).content.decode()


def test_json_has_the_tags_of_a_tree(staff: Client, acme: Execution, below: Execution) -> None:
    own = {"tenant": "acme", "order": "7"}
    executions.queued()

    assert [row["tags"] for row in staff.get(f"{LIST}json/").json()["rows"]].count(own) == 2
    assert staff.get(f"{LIST}{below.pk}/json/").json()["tags"] == own


def test_an_action_takes_all_that_have_a_tag(staff: Client, other: Execution, rival: Execution) -> None:
    action = {"action": "cancel_selected", "select_across": "1", "index": "0", "_selected_action": [str(other.pk)]}
    page = staff.post(f"{LIST}?tag=tenant%3Dacme", action)

    assert str(other.pk) in page.content.decode()
    assert str(rival.pk) not in page.content.decode()


# ------------------------------------------------------------------------------------------- narrowed to what one sees


class TenantAdmin(ExecutionAdmin):
    """Shows each person the trees of the tenant that is named like the person."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: Any = super().get_queryset(request)
        return rows.tagged({"tenant": request.user.get_username()})


class QueueAdmin(ExecutionAdmin):
    """Shows executions of one queue, whatever their root's is."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        return rows.filter(queue="payments")


tenants, queues = admin.AdminSite(name="tenants"), admin.AdminSite(name="queues")
tenants.register(Execution, TenantAdmin)
tenants.register(FailedExecution, FailedExecutionAdmin)
queues.register(Execution, QueueAdmin)
urlpatterns = [path("admin/", tenants.urls), path("queues/", queues.urls)]


@pytest.fixture
def narrowed() -> Iterator[None]:
    cache.clear()
    with override_settings(ROOT_URLCONF=__name__):
        clear_url_caches()
        yield
    clear_url_caches()


@pytest.mark.usefixtures("narrowed")
def test_a_site_is_narrowed_by_a_tag(client: Client, below: Execution, other: Execution, rival: Execution) -> None:
    acme = executions.fresh(below).parent
    assert acme is not None
    transitions.fail(executions.running(tags={"tenant": "rival"}), executions.FAILURE)
    client.force_login(User.objects.create_superuser("acme"))

    assert shown(client) == keys(acme, below, other)
    assert shown(client, tag="tenant=rival") == set()
    assert "3 executions" in client.get(LIST).content.decode()
    overview = client.get(f"{LIST}overview/json/").json()
    assert overview["open"] == {"queued": 2, "running": 0, "waiting": 1}
    assert overview["failures"] == []
    assert client.get("/admin/conductor_app/failedexecution/json/").json()["rows"] == []
    assert client.get(f"{LIST}{rival.pk}/json/").status_code == 404
    assert client.get(f"{LIST}{below.pk}/json/").json()["tags"] == {"tenant": "acme", "order": "7"}


@pytest.mark.usefixtures("narrowed")
def test_tags_of_a_root_that_is_not_shown_are_not_told(client: Client, acme: Execution) -> None:
    below = executions.invoke(acme, "charge", queue="payments")
    client.force_login(User.objects.create_superuser("ana"))
    own = f"/queues/conductor_app/execution/{below.pk}"

    assert client.get(f"{own}/json/").json()["tags"] == {}
    assert "cd-tag" not in client.get(f"{own}/change/").content.decode()
    listing = "/queues/conductor_app/execution/json/"
    assert [row["tags"] for row in client.get(listing).json()["rows"]] == [{}]
    assert client.get(listing, {"tag": "tenant=acme"}).json()["rows"] == []
