"""Schedules in the admin: the list, a schedule's page, its buttons, and who may press them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import DurableTask
from conductor_app.engine import sweeper
from conductor_app.models import Execution, Schedule
from conductor_app.store import clock
from tests.integration.admin.test_actions import said
from tests.support.schedules import row
from tests.support.schedules import schedules as scheduling_tasks

pytestmark = pytest.mark.django_db

LIST = "admin:conductor_app_schedule_changelist"


@pytest.fixture
def scheduled() -> Iterator[Callable[..., DurableTask[..., Any]]]:
    """Decorates as ``@durable_task(cron=…)``, and stores the schedule."""
    with scheduling_tasks() as decorate:

        def store(**options: Any) -> DurableTask[..., Any]:
            task = decorate(**options)
            sweeper.sweep()
            return task

        yield store


@pytest.fixture
def ana(client: Client) -> Client:
    """A browser of somebody who may do everything."""
    client.force_login(User.objects.create_superuser("ana"))
    return client


def url(task: DurableTask[..., Any], page: str = "change") -> str:
    return reverse(f"admin:conductor_app_schedule_{page}", args=[row(task).pk])


def text(response: Any) -> str:
    return str(response.content.decode())


def who_may(client: Client, *codenames: str) -> Client:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    client.force_login(user)
    return client


def test_the_list_shows_each_one_in_a_number_of_queries_that_does_not_grow(ana: Client, scheduled: Any) -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as found:
            page = text(ana.get(reverse(LIST)))
        assert "0 * * * * (UTC)" in page
        assert "goes on" in page
        return len(found)

    scheduled(schedule="report")
    queries()
    before = queries()
    for _ in range(5):
        scheduled()
    assert queries() == before
    assert "report" in text(ana.get(reverse(LIST) + "?q=report"))
    assert "report" not in text(ana.get(reverse(LIST) + "?q=repo")).split("<tbody>")[-1].split("</main>")[0]


def test_buttons_pause_unpause_and_run(ana: Client, scheduled: Any) -> None:
    task = scheduled()
    page = text(ana.get(url(task)))
    assert ("Pause</button>" in page, "Unpause</button>" in page, "Run now</button>" in page) == (True, False, True)
    assert said(ana.post(url(task, "pause"), {"reason": "incident"}, follow=True)) == "The schedule is paused."
    assert (row(task).paused_by, row(task).pause_reason) == ("ana", "incident")
    assert said(ana.post(url(task, "pause"), follow=True)) == "It was paused already."
    page = text(ana.get(url(task)))
    assert "by ana: incident" in page
    assert ("Pause</button>" in page, "Unpause</button>" in page) == (False, True)
    answer = ana.post(url(task, "run"), {"reason": "the bank asked"}, follow=True)
    started = Execution.objects.get()
    assert said(answer) == f"Execution {started.pk} is started."
    assert "run now by ana: the bank asked" in text(answer)
    assert reverse("admin:conductor_app_execution_change", args=[started.pk]) in text(answer)
    assert "which is open" in said(ana.post(url(task, "run"), follow=True))
    assert said(ana.post(url(task, "unpause"), follow=True)) == "The schedule goes on."
    assert said(ana.post(url(task, "unpause"), follow=True)) == "It was not paused."


def test_one_that_waits_for_its_turn_says_so(ana: Client, scheduled: Any) -> None:
    task = scheduled(overlap="queue")
    ana.post(url(task, "run"), follow=True)
    told = said(ana.post(url(task, "run"), follow=True))
    assert told == "The task is started when its last execution has ended."
    assert "waits for the end of its last execution" in text(ana.get(url(task)))


def test_a_reason_that_is_too_long_changes_nothing(ana: Client, scheduled: Any) -> None:
    task = scheduled()
    told = said(ana.post(url(task, "pause"), {"reason": "x" * 251}, follow=True))
    assert "at most 250 characters" in told
    assert row(task).paused_at is None


def test_a_paused_an_absent_and_an_overdue_one_say_so(ana: Client, scheduled: Any) -> None:
    task = scheduled()
    Schedule.objects.update(next_at=clock.after(-600))
    assert "overdue for 10 min: does a worker have its task?" in text(ana.get(url(task)))
    Schedule.objects.update(absent_at=clock.after(-700))
    assert "paused: no worker’s code has had it for 11 min" in text(ana.get(url(task))).replace("&#x27;", "’")


def test_json_says_the_same(ana: Client, scheduled: Any) -> None:
    task = scheduled(overlap="queue")
    ana.post(url(task, "run"))
    (listed,) = json.loads(ana.get(reverse("admin:conductor_app_schedule_json")).content)["rows"]
    alone = json.loads(ana.get(url(task, "detail_json")).content)
    for found in (listed, alone):
        assert (found["name"], found["line"], found["zone"], found["state"]) == (
            *(row(task).name, "0 * * * *", "UTC", "goes on"),
        )
        assert found["last_execution"] == str(Execution.objects.get().pk)


def test_it_takes_a_permission_to_look_and_another_one_to_act(client: Client, scheduled: Any) -> None:
    task = scheduled()
    ben = who_may(client)
    assert ben.get(reverse(LIST)).status_code == 403
    assert ben.post(url(task, "pause")).status_code in (403, 404)
    ben = who_may_also(client, "view_schedule")
    page = ben.get(url(task))
    assert page.status_code == 200
    assert "Run now</button>" not in text(page)
    for name in ("pause", "unpause", "run"):
        assert ben.post(url(task, name)).status_code == 403
    assert (row(task).paused_at, Execution.objects.count()) == (None, 0)
    ben = who_may_also(client, "pause_schedule")
    assert ben.post(url(task, "pause")).status_code == 302
    assert row(task).paused_by == "ben"


def who_may_also(client: Client, codename: str) -> Client:
    user = User.objects.get(username="ben")
    user.user_permissions.add(Permission.objects.get(codename=codename))
    client.force_login(user)
    return client


def test_a_look_changes_nothing_and_nobody_edits(ana: Client, scheduled: Any) -> None:
    task = scheduled()
    for name in ("pause", "unpause", "run"):
        assert ana.get(url(task, name)).status_code == 405
    assert ana.post(reverse("admin:conductor_app_schedule_pause", args=[0])).status_code == 404
    assert ana.get(reverse("admin:conductor_app_schedule_add")).status_code == 403
    assert ana.post(url(task), {"line": "* * * * *"}).status_code == 403
    assert ana.post(url(task, "delete"), {"post": "yes"}).status_code == 403
