"""The overview says in one page, and in a handful of queries, whether all is well."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.cache import cache
from django.db import connection
from django.db.models import F
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse

from conductor_app import metrics, transitions
from conductor_app.admin import causes, figures, overview
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, FailedExecution, Step
from tests.support import executions
from tests.support.worker import ROOT

#: Of a site that shows its metrics.
urlpatterns = [path("monitoring/metrics", metrics.view), path("admin/", admin.site.urls)]

URL = "/admin/conductor_app/execution/overview/"
HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    cache.clear()


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def fail(message: str = "card declined", *, error_class: str = "shop.CardDeclined", **fields: Any) -> Execution:
    execution = executions.running(**fields)
    transitions.fail(execution, Failure(type=error_class, message=message, traceback=""))
    return execution


def document(client: Client) -> Any:
    cache.clear()
    return client.get(f"{URL}json/").json()


def test_an_empty_database_has_an_overview(staff: Client) -> None:
    page = staff.get(URL).content.decode()
    for text in ("Nothing has failed.", "Nothing is overdue.", "None. A worker shows here"):
        assert text in page


def test_it_counts_what_is_open_and_what_has_ended(staff: Client) -> None:
    executions.queued()
    executions.queued(countdown=60)
    executions.napping()
    executions.running()
    fail()
    transitions.succeed(executions.running(), "1")
    found = document(staff)
    assert found["open"] == {"queued": 2, "running": 1, "waiting": 1}
    assert found["ended_in_the_last_hour"] == {"succeeded": 1, "failed": 1, "cancelled": 0}
    assert sum(row["succeeded"] for row in found["ended_by_minute"]) == 1
    assert len(found["ended_by_minute"]) == figures.MINUTES
    assert found["ended_is_complete"] is True


def test_what_ended_more_than_an_hour_ago_is_not_counted(staff: Client) -> None:
    fail()
    Execution.objects.update(finished_at=F("finished_at") - dt.timedelta(minutes=61))
    assert document(staff)["ended_in_the_last_hour"]["failed"] == 0


def test_it_shows_who_works_and_when_they_last_said_so(staff: Client) -> None:
    for number in (1, 2):
        executions.claimed(executions.queued(), owner=f"celery@web1/{number}")
    executions.claimed(executions.queued(), owner="celery@web2/1")
    Execution.objects.filter(lease_owner="celery@web2/1").update(
        lease_expires_at=F("lease_expires_at") - dt.timedelta(seconds=40)
    )
    found = {worker["worker"]: worker for worker in document(staff)["workers"]}
    assert {name: (worker["running"], worker["lapsed"]) for name, worker in found.items()} == {
        "celery@web1": (2, 0),
        "celery@web2": (1, 1),
    }
    page = staff.get(URL).content.decode()
    assert "40 s ago" in page
    assert "A running execution&#x27;s lease has ended" in page


def test_it_says_whether_anybody_can_be_alerted(staff: Client, settings: Any) -> None:
    page = text_of(staff)
    assert "They count nothing: CONDUCTOR[&quot;METRICS&quot;] is off." in page
    assert "No address of this site leads to conductor_app.metrics.view." in page
    settings.CONDUCTOR = {**settings.CONDUCTOR, "METRICS": True}
    assert "CONDUCTOR[&quot;METRICS_LISTEN&quot;] is empty" in text_of(staff)
    settings.CONDUCTOR = {**settings.CONDUCTOR, "METRICS_LISTEN": "10.1.2.3:9464"}
    settings.ROOT_URLCONF = __name__
    page = text_of(staff)
    assert "Each worker serves it at the address of" in page
    assert "10.1.2.3" not in page, "whoever may see executions may not see the network"
    assert '<a href="/monitoring/metrics">' in page


def test_it_names_the_rules_that_there_are() -> None:
    rules = (ROOT / "docs/monitoring/alerts.yml").read_text(encoding="utf-8")
    assert tuple(re.findall(r"alert: (\w+)", rules)) == overview.ALERT_RULES


def text_of(client: Client) -> str:
    cache.clear()
    return client.get(URL).content.decode()


def test_it_shows_queues_that_nobody_serves(staff: Client) -> None:
    executions.queued(queue="payments")
    executions.queued(queue="mail & more")
    Execution.objects.filter(queue="mail & more").update(due_at=F("due_at") - dt.timedelta(seconds=90))
    found = {queue["queue"]: queue["unanswered"] for queue in document(staff)["queues"]}
    assert found == {"payments": 0, "mail & more": 1}
    page = staff.get(URL).content.decode()
    link = reverse("admin:conductor_app_execution_changelist") + "?status__exact=queued&amp;queue=mail%20%26%20more"
    assert link in page
    assert str(Execution.objects.get(queue="mail & more").pk) in staff.get(link.replace("&amp;", "&")).content.decode()


def test_a_queue_whose_workers_are_busy_is_none_that_nobody_serves(staff: Client) -> None:
    for queue in ("payments", "mail"):
        executions.queued(queue=queue)
    Execution.objects.update(due_at=F("due_at") - dt.timedelta(seconds=90))
    executions.claimed(executions.queued(queue="payments"))
    executions.claimed(executions.queued(queue="payments"), owner="celery@web2/7")
    lapsed = executions.claimed(executions.queued(queue="mail"), owner="celery@web3/7")
    Execution.objects.filter(pk=lapsed.pk).update(lease_expires_at=F("lease_expires_at") - dt.timedelta(minutes=5))
    found = {queue["queue"]: (queue["unanswered"], queue["running"]) for queue in document(staff)["queues"]}
    assert found == {"payments": (1, 2), "mail": (1, 0)}
    page = staff.get(URL).content.decode()
    nobody = page[page.index("Queues that nobody seems to serve") : page.index("Queues whose workers are busy")]
    assert "queue=mail" in nobody
    assert "queue=payments" not in nobody
    assert "queue=payments" in page[page.index("Queues whose workers are busy") :]


def test_it_counts_those_that_wait_for_longer_than_an_hour(staff: Client) -> None:
    executions.napping()
    old = executions.napping(7_200)
    Step.objects.filter(execution=old).update(created_at=F("created_at") - dt.timedelta(minutes=90))
    assert document(staff)["waiting_longer_than_an_hour"] == 1
    assert "the longest for 90 min" in staff.get(URL).content.decode()


def test_it_shows_what_no_sweeper_has_dealt_with(staff: Client) -> None:
    asleep = executions.napping()
    assert document(staff)["overdue"] == {}
    Step.objects.filter(execution=asleep).update(deadline_at=F("created_at") - dt.timedelta(minutes=5))
    assert list(document(staff)["overdue"]) == ["step"]
    assert "5 min ago" in staff.get(URL).content.decode()


def test_it_groups_failures_by_what_caused_them(staff: Client) -> None:
    for number in (7, 8):
        parent, child = executions.family()
        transitions.fail(child, Failure("shop.CardDeclined", f"card declined for order {number}", ""))
        parent = executions.claimed(Execution.objects.get(pk=parent.pk))
        transitions.fail(parent, Failure("conductor_app.ChildFailed", "…", ""), step="child", child_id=child.pk)
    fail("another thing")
    groups = document(staff)["failures"]
    assert [(group["count"], group["message"]) for group in groups] == [
        (2, "card declined for order 8"),
        (1, "another thing"),
    ]
    found = staff.get(
        "/admin/conductor_app/failedexecution/json/", {"cause": groups[0]["cause"], "scope": "roots"}
    ).json()
    roots = Execution.objects.filter(parent=None, steps__isnull=False).values_list("pk", flat=True)
    assert {row["execution"] for row in found["rows"]} == {str(pk) for pk in roots}
    assert f"?cause={groups[0]['cause']}&amp;scope=roots" in staff.get(URL).content.decode()


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("timeout after 3.5 s", "timeout after 12 s", True),
        ("order 0192a3b4-0000-7000-8000-000000000000", "order 0192a3b4-1111-7000-8000-000000000000", True),
        ("no user 'ana'", "no user 'ben'", True),
        ("<obj at 0x7f00aa>", "<obj at 0x7f00bb>", True),
        ("declined\nfor 7", "declined\nfor reasons", True),
        ("declined", "refused", False),
    ],
)
def test_numbers_ids_and_names_do_not_tell_causes_apart(first: str, second: str, is_same: bool) -> None:
    assert (causes.cause_of("E", first) == causes.cause_of("E", second)) is is_same
    assert causes.cause_of("E", first) != causes.cause_of("F", first)


def test_failures_are_for_those_who_may_see_them(client: Client, db: None) -> None:
    fail("a secret")
    user = User.objects.create_user("ben", is_staff=True)
    client.force_login(user)
    assert client.get(URL).status_code == 403
    assert client.get(f"{URL}json/").status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="view_execution"))
    assert "a secret" not in client.get(URL).content.decode()
    assert client.get(f"{URL}json/").json()["failures"] is None
    user.user_permissions.add(Permission.objects.get(codename="view_failedexecution"))
    page = client.get(URL).content.decode()
    assert "CardDeclined" in page
    assert "a secret" not in page
    user.user_permissions.add(Permission.objects.get(codename="view_payload"))
    assert "a secret" in client.get(URL).content.decode()


def test_it_takes_ten_queries_and_none_of_our_own_for_ten_seconds(client: Client, db: None) -> None:
    user = User.objects.create_user("ben", is_staff=True)
    permissions = Permission.objects.filter(codename__in=["view_execution", "view_failedexecution"])
    user.user_permissions.add(*permissions)
    client.force_login(user)
    fail()
    executions.running()
    executions.queued()
    executions.napping()
    with CaptureQueriesContext(connection) as first:
        client.get(URL)
    with CaptureQueriesContext(connection) as second:
        client.get(URL)
    assert len(first) <= 10
    assert not any("conductor_app_" in query["sql"] and "auth_" not in query["sql"] for query in second)


def test_a_cache_that_is_away_does_not_hide_it(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(cache, "get", refuse)
    assert staff.get(URL).status_code == 200


def test_hostile_names_are_text(staff: Client) -> None:
    fail(HOSTILE, error_class=f"shop.{HOSTILE}", task=f"shop.{HOSTILE}")
    executions.queued(queue=HOSTILE)
    executions.claimed(executions.queued(), owner=f"{HOSTILE}/1")
    Execution.objects.filter(status="queued").update(due_at=F("due_at") - dt.timedelta(seconds=90))
    page = staff.get(URL).content.decode()
    assert FailedExecution.objects.count() == 1
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;\\u202e") >= 4


def test_the_list_and_the_apps_page_link_to_it(staff: Client) -> None:
    for address in ("/admin/conductor_app/execution/", "/admin/conductor_app/"):
        assert f'href="{URL}"' in staff.get(address).content.decode()
