"""The page of workers and queues, and its twin for programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import transitions
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.telling import workers
from tests.support import executions
from tests.support.attendance import attends, lapses, runs, since
from tests.support.command import told
from tests.support.process import NotingBroker

URL = "/admin/conductor_app/execution/workers/"
HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture(autouse=True)
def _steady_clock() -> Iterator[None]:
    process.broker = NotingBroker()
    yield
    clock.reset()


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def text_of(client: Client) -> str:
    return client.get(URL).content.decode()


def test_without_workers_it_says_so(staff: Client) -> None:
    page = text_of(staff)
    assert "None was seen in the last 10 minutes." in page
    assert "No queue is served, and nothing is queued." in page


def test_it_shows_each_worker_and_what_it_runs(staff: Client) -> None:
    row = attends(queues=["celery", "mail"])
    first = runs(row, queue="celery")
    lapses(runs("celery@web2/0123abcd", queue="celery"))
    page = text_of(staff)
    for text in (
        "celery@web1",
        "web1</bdi>, process 4711",
        "prefork",
        "1 of 2",
        "2026.11.3",
        "conductor_app <bdi>0.1.0</bdi>, Celery <bdi>5.7.0</bdi>, Django <bdi>5.2.19</bdi>, Python <bdi>3.11.2</bdi>",
        "<bdi>celery</bdi>, <bdi>mail</bdi>",
        "by its leases alone",
        f'href="{reverse("admin:conductor_app_execution_change", args=[first.pk])}"',
    ):
        assert text in page, text
    assert page.count("cd-pill--alive") == 1
    assert page.count("cd-pill--silent") == 1


def test_it_tells_queues_without_a_worker_from_those_whose_workers_are_busy(staff: Client) -> None:
    runs(attends(queues=["busy"], slots=1), queue="busy")
    for name in ("busy", "nobody"):
        since(executions.queued(queue=name), 90)
    page = text_of(staff)
    assert page.count("served by nobody") == 1
    assert page.count("all busy") == 1
    assert "/admin/conductor_app/execution/?status__exact=queued&amp;queue=nobody" in page
    assert "90 s" in page


def test_it_says_how_much_a_queue_does(staff: Client) -> None:
    row = attends()
    for _ in range(3):
        transitions.succeed(runs(row, queue="celery"), "1")
    page = text_of(staff)
    assert "Runs a minute" in page
    assert "those that ended in the last 5 min" in page
    assert "<td>0.6</td>" in page


def test_its_twin_says_the_same_as_the_command(staff: Client) -> None:
    runs(attends())
    since(executions.queued(queue="nobody"), 90)
    twin, command = staff.get(f"{URL}json/").json(), told("workers", "--json").json
    for found in (twin, command):
        del found["read_at"]
    assert twin == command


def test_it_is_for_those_who_may_see_executions(client: Client, db: None) -> None:
    user = User.objects.create_user("bob", is_staff=True)
    client.force_login(user)
    for address in (URL, f"{URL}json/"):
        assert client.get(address).status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="view_step"))
    assert client.get(URL).status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="view_execution"))
    for address in (URL, f"{URL}json/"):
        assert client.get(address).status_code == 200
    client.logout()
    assert client.get(URL).status_code == 302


def test_it_takes_nine_queries_with_one_worker_and_with_200(staff: Client) -> None:
    """Two of them are about the session and the user."""

    def queries(address: str) -> int:
        with CaptureQueriesContext(connection) as captured:
            assert staff.get(address).status_code == 200
        return len(captured)

    runs(attends(), queue="q0")
    assert [queries(address) for address in (URL, f"{URL}json/")] == [9, 9]
    for number in range(200):
        runs(attends(f"w{number}@h", queues=[f"q{number}"]), queue=f"q{number}")
        executions.queued(queue=f"q{number}")
    assert [queries(address) for address in (URL, f"{URL}json/")] == [9, 9]


def test_there_is_an_end_to_it(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST", 3)
    for number in range(5):
        attends(f"w{number}@h", queues=[f"q{name}" for name in range(12)])
    page = text_of(staff)
    assert "And 2 more." in page
    assert "And 9 more." in page
    assert "and 2 more" in page


def test_hostile_names_are_text(staff: Client) -> None:
    row = attends(HOSTILE, queues=[HOSTILE], release=HOSTILE, host=HOSTILE)
    runs(row, task=f"shop.{HOSTILE}", queue=HOSTILE)
    page = text_of(staff)
    assert "<script>alert" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize("page", ["", "execution/", "execution/overview/"])
def test_other_pages_link_to_it(staff: Client, page: str) -> None:
    assert f'href="{URL}"' in staff.get(f"/admin/conductor_app/{page}").content.decode()


def test_nobody_is_led_to_it_who_may_not_see_it(client: Client, db: None) -> None:
    user: Any = User.objects.create_user("bob", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_step"))
    client.force_login(user)
    assert URL not in client.get("/admin/conductor_app/").content.decode()
