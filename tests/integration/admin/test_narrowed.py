"""A project that narrows ``ExecutionAdmin.get_queryset``, by tenant for example, narrows all of its site with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.core.cache import cache
from django.db import connection
from django.db.models import QuerySet
from django.http import HttpRequest
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import clear_url_caches, path

from conductor_app import api, transitions
from conductor_app.admin import EventAdmin, ExecutionAdmin, FailedExecutionAdmin, StepAdmin, changelist, paginator
from conductor_app.admin import names as known_names
from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store import clock
from tests.support import executions
from tests.support.attendance import attends, runs

BASE = "/admin/conductor_app"
MODELS = ("execution", "step", "event", "failedexecution")
#: Stands in all that is the other tenant's.
RIVAL = "rival"


class TenantAdmin(ExecutionAdmin):
    """Shows each person the executions of the queue that is named like the person."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if request.user.username == "nobody":
            return rows.none()
        return rows.filter(queue=request.user.username)


class FailedTenantAdmin(FailedExecutionAdmin):
    """Shows each person the failures of some tasks."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        return rows.filter(task__startswith=request.user.username)


tenants = admin.AdminSite(name="tenants")
tenants.register(Execution, TenantAdmin)
tenants.register(Step, StepAdmin)
tenants.register(Event, EventAdmin)
tenants.register(FailedExecution, FailedExecutionAdmin)
failures_only = admin.AdminSite(name="failures")
failures_only.register(Execution, ExecutionAdmin)
failures_only.register(FailedExecution, FailedTenantAdmin)
urlpatterns = [path("admin/", tenants.urls), path("failures/", failures_only.urls)]


@pytest.fixture(autouse=True)
def _site(db: None) -> Iterator[None]:
    cache.clear()
    with override_settings(ROOT_URLCONF=__name__):
        clear_url_caches()
        yield
    clear_url_caches()


@pytest.fixture
def acme(client: Client) -> Client:
    """A browser of somebody who may do everything to what the site shows."""
    client.force_login(User.objects.create_superuser("acme"))
    return client


def fail(execution: Execution, message: str, step: str = "", child: Execution | None = None) -> None:
    failure = Failure(f"{execution.queue}.Error", message, f"Traceback: {message}")
    transitions.fail(execution, failure, step=step, child_id=None if child is None else child.pk)


def family(queue: str, child_queue: str) -> tuple[Execution, Execution]:
    """A failed parent and the failed child behind it."""
    parent = executions.running(queue=queue, task=f"{queue}.tasks.parent")
    child = executions.claimed(executions.invoke(parent, "charge", queue=child_queue, task="shop.tasks.charge"))
    fail(child, f"{child_queue} declined")
    again = executions.claimed(executions.fresh(parent))
    fail(again, "a child failed", "charge", child)
    return executions.fresh(parent), executions.fresh(child)


def alone(queue: str) -> list[Execution]:
    """Executions of one tenant in each state."""
    found = [executions.queued(queue=queue, task=f"{queue}.tasks.queued")]
    running = executions.claimed(executions.queued(queue=queue, task=f"{queue}.tasks.running"), f"{queue}@host/1")
    transitions.record_step(running, f"{queue}-look", result="1")
    api.send_event(running, f"{queue}-approved", queue, id=f"{queue}-mail")
    asleep = executions.running(queue=queue, task=f"{queue}.tasks.asleep")
    assert transitions.suspend(asleep, transitions.Sleep(f"{queue}-nap", seconds=60))
    done = executions.running(queue=queue, task=f"{queue}.tasks.done")
    transitions.succeed(done, "1")
    failed = executions.running(queue=queue, task=f"{queue}.tasks.failed")
    fail(failed, f"{queue} failed for 7 reasons")
    return [*found, running, asleep, done, failed]


@pytest.fixture
def world() -> dict[str, Any]:
    """Two tenants, and two trees that have executions of both."""
    mine, theirs = alone("acme"), alone(RIVAL)
    for _ in range(3):
        fail(executions.running(queue=RIVAL, task="rival.tasks.failed"), "rival failed again")
    above, below_theirs = family("acme", RIVAL)
    above_theirs, below = family(RIVAL, "acme")
    Execution.objects.filter(status="queued").update(due_at=clock.after(-90), dispatch_at=clock.after(-30))
    return {
        "mine": [*mine, above, below],
        "theirs": [*theirs, below_theirs, above_theirs, *Execution.objects.filter(queue=RIVAL)],
        "above": above,
        "below": below,
        "failed": mine[-1],
    }


def addresses(world: dict[str, Any]) -> list[str]:
    """All pages of the site that show something of one tenant."""
    rows = [
        *(f"execution/{row.pk}" for row in world["mine"]),
        *(f"failedexecution/{row.pk}" for row in world["mine"] if row.status == "failed"),
        *(f"failedexecution/{row.pk}" for row in (world["failed"], world["above"], world["below"])),
        *(f"step/{key}" for key in Step.objects.filter(execution__queue="acme").values_list("pk", flat=True)),
        *(f"event/{key}" for key in Event.objects.filter(execution__queue="acme").values_list("pk", flat=True)),
    ]
    acts = [f"execution/{row.pk}/act/{name}/" for row in world["mine"] for name in ("cancel", "retry", "rerun", "send")]
    return [
        *(f"{BASE}/{model}/{page}" for model in MODELS for page in ("", "json/", "?within=1h", "?p=1", "?q=charge")),
        *(f"{BASE}/execution/{query}" for query in ("?failed_child=1", "?kind=child", "?status__exact=failed")),
        *(f"{BASE}/execution/json/{query}" for query in ("?failed_child=1", "?kind=root", "?task=shop.tasks.charge")),
        *(f"{BASE}/failedexecution/{query}" for query in ("?scope=causes", "?scope=roots", "?error_class=acme.Error")),
        *(f"{BASE}/execution/{name}/{page}" for name in ("overview", "workers") for page in ("", "json/")),
        *(f"{BASE}/{row}/{page}/" for row in rows for page in ("change", "json", "history")),
        *(f"{BASE}/{act}" for act in acts),
        "/admin/autocomplete/?app_label=conductor_app&model_name=step&field_name=execution&term=shop",
    ]


def test_no_page_shows_anything_of_another_tenant(acme: Client, world: dict[str, Any]) -> None:
    ids = {str(row.pk) for row in world["theirs"]}
    for address in addresses(world):
        response = acme.get(address)
        assert response.status_code == 200, address
        content = response.content.decode()
        assert RIVAL not in content, address
        # The trees that both have a part in begin alike.
        assert not ids & set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", content)), address
        assert not [key for key in ids if f"…{key[-12:]}" in content], address


def test_rows_of_another_tenant_are_not_there(acme: Client, world: dict[str, Any]) -> None:
    rows = [
        *(f"execution/{row.pk}" for row in world["theirs"]),
        *(
            f"failedexecution/{key}"
            for key in FailedExecution.objects.exclude(execution__queue="acme").values_list("pk", flat=True)
        ),
        *(f"step/{key}" for key in Step.objects.exclude(execution__queue="acme").values_list("pk", flat=True)),
        *(f"event/{key}" for key in Event.objects.exclude(execution__queue="acme").values_list("pk", flat=True)),
    ]
    assert len(rows) > 20
    for row in rows:
        assert acme.get(f"{BASE}/{row}/json/").status_code == 404
        assert acme.get(f"{BASE}/{row}/change/").status_code == 302
        if row.startswith("execution"):
            assert acme.get(f"{BASE}/{row}/payload.json").status_code in (403, 404)
    before = list(Execution.objects.filter(queue=RIVAL).order_by("pk").values())
    ids = ",".join(str(row.pk) for row in world["theirs"])
    for model, name in (("execution", "cancel"), ("execution", "retry"), ("failedexecution", "retry")):
        acme.post(f"{BASE}/{model}/act/{name}/", {"ids": ids, "reason": "x"})
        for row in world["theirs"]:
            assert acme.post(f"{BASE}/{model}/{row.pk}/act/{name}/", {"reason": "x"}).status_code == 404
    assert list(Execution.objects.filter(queue=RIVAL).order_by("pk").values()) == before


def test_the_overview_counts_what_the_list_shows(acme: Client, world: dict[str, Any]) -> None:
    found = acme.get(f"{BASE}/execution/overview/json/").json()
    assert found["open"] == {"queued": 1, "running": 1, "waiting": 1}
    assert found["ended_in_the_last_hour"] == {"succeeded": 1, "failed": 3, "cancelled": 0}
    assert sum(row["failed"] for row in found["ended_by_minute"]) == 3
    assert [worker["worker"] for worker in found["workers"]] == ["acme@host"]
    assert [(queue["queue"], queue["queued"]) for queue in found["queues"]] == [("acme", 1)]
    assert {(group["message"], group["count"]) for group in found["failures"]} == {
        ("acme failed for 7 reasons", 1),
        ("acme declined", 1),
    }


def test_people_who_see_other_rows_share_no_cached_overview(acme: Client, world: dict[str, Any]) -> None:
    first = acme.get(f"{BASE}/execution/overview/json/").json()
    other = Client()
    other.force_login(User.objects.create_superuser(RIVAL))
    second = other.get(f"{BASE}/execution/overview/json/").json()
    assert first["ended_in_the_last_hour"]["failed"] == 3
    assert second["ended_in_the_last_hour"]["failed"] == 6
    assert "acme" not in json.dumps(second)
    with CaptureQueriesContext(connection) as queries:
        assert acme.get(f"{BASE}/execution/overview/json/").json() == first
    assert not any('"conductor_app_' in query["sql"] and "auth_" not in query["sql"] for query in queries)


def test_whoever_sees_nothing_has_an_empty_site(client: Client, world: dict[str, Any]) -> None:
    client.force_login(User.objects.create_superuser("nobody"))
    found = client.get(f"{BASE}/execution/overview/json/").json()
    assert found["open"] == {"queued": 0, "running": 0, "waiting": 0}
    assert (found["failures"], found["queues"], found["workers"], found["overdue"]) == ([], [], [], {})
    attends(queues=["acme"])
    found = client.get(f"{BASE}/execution/workers/json/").json()
    assert (found["workers"], found["queues"]) == ([], [])
    assert client.get(f"{BASE}/execution/overview/").status_code == 200
    for model in MODELS:
        assert client.get(f"{BASE}/{model}/json/").json()["rows"] == []
        assert "rival" not in client.get(f"{BASE}/{model}/").content.decode()


def test_a_tree_has_the_executions_that_are_shown_and_no_trace_of_others(acme: Client, world: dict[str, Any]) -> None:
    above = acme.get(f"{BASE}/execution/{world['above'].pk}/json/").json()
    assert above["children"] == []
    assert [(step["name"], step["child"]) for step in above["steps"]] == [("charge", None)]
    assert above["failure"]["root_cause"] is None
    assert above["headline"] == '✕ Failed at step "charge": a child failed.'
    below = acme.get(f"{BASE}/execution/{world['below'].pk}/json/").json()
    assert (below["parent"], below["root"]) == (None, None)
    page = acme.get(f"{BASE}/execution/{world['below'].pk}/change/").content.decode()
    assert "is gone" not in page, "a parent that is not shown has not been deleted"
    assert page.count('aria-current="true"') >= 1
    assert "Retry the root" not in page
    rows = acme.get(f"{BASE}/execution/json/?kind=child").json()["rows"]
    assert [(row["id"], row["parent"], row["root"]) for row in rows] == [(str(world["below"].pk), None, None)]
    assert acme.get(f"{BASE}/execution/json/?failed_child=1").json()["rows"] == []


def test_an_own_tree_is_whole(acme: Client) -> None:
    parent, child = family("acme", "acme")
    found = acme.get(f"{BASE}/execution/{parent.pk}/json/").json()
    assert [row["id"] for row in found["children"]] == [str(child.pk)]
    assert found["steps"][0]["child"] == str(child.pk)
    assert found["failure"]["root_cause"] == str(child.pk)
    page = acme.get(f"{BASE}/execution/{child.pk}/change/").content.decode()
    assert f"/execution/{parent.pk}/change/" in page
    assert "Retry the root" in page
    [row] = acme.get(f"{BASE}/execution/json/?kind=child").json()["rows"]
    assert (row["parent"], row["root"]) == (str(parent.pk), str(parent.pk))
    with CaptureQueriesContext(connection) as queries:
        acme.get(f"{BASE}/execution/{parent.pk}/change/")
    assert len(queries) <= 15


def test_filters_offer_no_names_of_others(acme: Client, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has published to, and what a project's code names, is known to Celery for all tenants."""
    monkeypatch.setattr(known_names, "known_queues", lambda: ["acme", RIVAL])
    monkeypatch.setattr(known_names, "known_tasks", lambda: ["acme.tasks.failed", "rival.tasks.failed"])
    for model in ("execution", "failedexecution"):
        page = acme.get(f"{BASE}/{model}/").content.decode()
        assert "?task=acme.tasks.failed" in page
        assert RIVAL not in page
    assert "?queue=acme" in acme.get(f"{BASE}/execution/").content.decode()


def test_a_list_says_nothing_of_the_size_of_the_table(
    acme: Client, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(9):
        executions.queued(queue=RIVAL, task="shop.tasks.common")
    for module in (changelist, paginator):
        monkeypatch.setattr(module, "COUNTED", 5)
    monkeypatch.setattr(changelist, "WINDOW", 8)
    monkeypatch.setattr(changelist, "estimated_count", lambda rows: 302_489)
    page = acme.get(f"{BASE}/execution/").content.decode()
    assert "302,489" not in page
    assert "5+ executions" in page
    # As many rows as are looked through are all of this tenant's.
    assert "Looked through" not in acme.get(f"{BASE}/execution/?kind=root").content.decode()
    found = acme.get(f"{BASE}/execution/json/?task=shop.tasks.common").json()
    assert (found["count"], found["is_complete"], found["older"]) == (0, True, None)


def test_narrowed_failures_narrow_the_overview(client: Client, world: dict[str, Any]) -> None:
    client.force_login(User.objects.create_superuser("acme"))
    found = client.get("/failures/conductor_app/execution/overview/json/").json()
    assert [group["message"] for group in found["failures"]] == ["acme failed for 7 reasons"]
    assert found["open"]["queued"] == 2


def test_a_list_takes_as_many_queries_for_fifty_rows_as_for_one(acme: Client) -> None:
    def queries() -> dict[str, int]:
        found = {}
        for model in MODELS:
            for page in ("", "json/"):
                with CaptureQueriesContext(connection) as captured:
                    assert acme.get(f"{BASE}/{model}/{page}").status_code == 200
                found[model + page] = len(captured)
        return found

    alone("acme")
    family("acme", "acme")
    before = queries()
    for _ in range(9):
        alone("acme")
        family("acme", RIVAL)
    assert queries() == before
    assert max(before.values()) <= 11


def test_workers_are_shown_with_what_they_do_for_a_tenant(acme: Client, world: dict[str, Any]) -> None:
    attends("shared@host", queues=["acme", RIVAL, "celery"], slots=4)
    attends(f"{RIVAL}@host", queues=[RIVAL])
    runs("shared@host/0123abcd", queue=RIVAL)
    mine = runs("shared@host/0123abcd", queue="acme")
    answer = acme.get(f"{BASE}/execution/workers/json/")
    assert RIVAL not in answer.content.decode()
    found = {worker["name"]: worker for worker in answer.json()["workers"]}
    assert set(found) == {"acme@host", "shared@host"}
    assert found["shared@host"]["queues"] == ["acme"]
    assert [run["id"] for run in found["shared@host"]["runs"]] == [str(mine.pk)]
    assert [queue["queue"] for queue in answer.json()["queues"]] == ["acme"]
    assert RIVAL not in acme.get(f"{BASE}/execution/workers/").content.decode()
