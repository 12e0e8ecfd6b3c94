"""Two executions side by side."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import ExecutionContext
from conductor_app.models import Execution
from conductor_app.telling import comparison, story
from tests.support.bodies import durable, run

pytestmark = pytest.mark.django_db


@durable
def child(ctx: ExecutionContext, fails: bool) -> int:
    if fails:
        raise ValueError("the card is not valid")
    return 1


@durable(max_retries=0)
def order(ctx: ExecutionContext, number: int, is_gift: bool = False, fails: bool = False) -> None:
    ctx.step("check", int)
    if is_gift:
        ctx.step("wrap", int)
    ctx.invoke("charge", child, {"fails": fails})
    ctx.step("ship", int)


@pytest.fixture
def staff(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def address(execution: Execution) -> str:
    return reverse("admin:conductor_app_execution_compare", args=[execution.pk])


def seen(client: Client, execution: Execution, **parameters: Any) -> str:
    response = client.get(address(execution), parameters)
    assert response.status_code == 200
    return response.content.decode()


def test_it_is_compared_with_the_latest_that_succeeded(staff: Client) -> None:
    run(order, number=1)
    worked = run(order, number=2, is_gift=True)
    failed = run(order, number=3, fails=True)
    page = seen(staff, failed)
    assert str(worked.pk) in page
    assert "the card is not valid" in page
    rows = re.findall(r'<th scope="row"><bdi>(.*?)</bdi></th>(.*?)</tr>', page, re.DOTALL)
    assert [name for name, _ in rows] == ["check", "wrap", "charge", "ship"]
    assert {name: "not there" in row for name, row in rows} == {
        "check": False,
        "wrap": True,
        "charge": False,
        "ship": True,
    }
    assert {name: ">differs<" in row for name, row in rows} == {
        "check": False,
        "wrap": True,
        "charge": True,
        "ship": True,
    }


def test_payloads_differ_line_by_line(staff: Client) -> None:
    one, other = run(order, number=1), run(order, number=2)
    page = seen(staff, one, **{"with": other.pk})
    differing = re.findall(r'<tr class="cd-compare__differs">(.*?)</tr>', page, re.DOTALL)
    assert len(differing) == 1
    assert "number" in differing[0]


def test_who_may_not_see_payloads_compares_without_them(client: Client) -> None:
    run(order, number=41)
    failed = run(order, number=42, fails=True)
    ben = User.objects.create_user("ben", is_staff=True)
    ben.user_permissions.add(Permission.objects.get(codename="view_execution"))
    client.force_login(ben)
    page = seen(client, failed)
    assert "42" not in re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", page.partition('id="cd-steps"')[2])
    assert "the card is not valid" not in page
    assert "ChildFailed" in page


def test_no_permission_no_comparison(client: Client) -> None:
    execution = run(order, number=1)
    client.force_login(User.objects.create_user("eve", is_staff=True))
    assert client.get(address(execution)).status_code == 403


@pytest.mark.parametrize("wanted", ["01a204f6-723a-74c3-823f-e677cee24b51", "nonsense", "<script>"])
def test_an_id_of_nothing_is_told(staff: Client, wanted: str) -> None:
    page = seen(staff, run(order, number=1), **{"with": wanted})
    assert "There is no execution" in page
    assert "<script>" not in page.replace("<script src", "")


def test_without_one_that_succeeded_it_asks_for_an_id(staff: Client) -> None:
    assert "has succeeded lately" in seen(staff, run(order, number=1, fails=True))


def test_an_execution_that_is_not_there_is_not_found(staff: Client) -> None:
    missing = reverse("admin:conductor_app_execution_compare", args=["01a204f6-723a-74c3-823f-e677cee24b51"])
    assert staff.get(missing).status_code == 404


def test_only_the_latest_are_looked_through(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    run(order, number=1)
    failed = run(order, number=2, fails=True)
    for _ in range(3):
        run(order, number=3, fails=True)
    monkeypatch.setattr(comparison, "LATEST", 4)
    assert "has succeeded lately" in seen(staff, failed)


def test_the_number_of_queries_does_not_grow(staff: Client) -> None:
    def queries(execution: Execution) -> int:
        with CaptureQueriesContext(connection) as captured:
            seen(staff, execution)
        return len(captured)

    @durable
    def long(ctx: ExecutionContext, steps: int) -> None:
        for number in range(steps):
            ctx.invoke(f"child-{number}", child, {"fails": False})

    run(long, steps=1)
    few = queries(run(long, steps=1))
    run(long, steps=12)
    assert queries(run(long, steps=12)) == few <= 30


def test_totals_add_up(staff: Client) -> None:
    told = story.read(run(order, number=1).pk, preview=None)
    assert told is not None
    found = comparison.totals(told)
    assert found["queued"] + found["running"] + found["waiting"] == pytest.approx(found["total"], abs=0.5)
