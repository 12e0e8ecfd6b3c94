"""Operations in the admin: all that match at once, their pages, who may see and stop them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import api
from conductor_app.admin import operation_pages, selection
from conductor_app.engine import sweeper
from conductor_app.models import Execution, FailedExecution, Operation, OperationItem
from conductor_app.states import OperationKind, OperationSource
from conductor_app.transitions import operating
from conductor_app.transitions.operating import By
from tests.integration.admin.test_actions import (
    FAILURES,
    ask,
    confirm,
    failed,
    fresh,
    page_url,
    post,
    said,
    site_admin,
)
from tests.support import executions
from tests.support.process import note_published

OPERATIONS = "admin:conductor_app_operation_changelist"


@pytest.fixture(autouse=True)
def _published(db: None) -> None:
    note_published()


@pytest.fixture
def ana(client: Client) -> Client:
    """A browser of somebody who may do everything."""
    client.force_login(User.objects.create_superuser("ana"))
    return client


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let two executions be as many as a request acts on."""
    monkeypatch.setattr(selection, "AT_ONCE", 2)
    return 2  # type: ignore[return-value]


def who_may(client: Client, *codenames: str) -> Client:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_execution", *codenames]))
    client.force_login(user)
    return client


def operation_url(operation: Operation, page: str = "change") -> str:
    return reverse(f"admin:conductor_app_operation_{page}", args=[operation.pk])


def began(*rows: Execution, kind: OperationKind = OperationKind.RETRY, **by: Any) -> Operation:
    return operating.start(kind, Execution.objects.filter(pk__in=[row.pk for row in rows]), By(**by))


# ------------------------------------------------------------------------------------------------------ one and several


def test_a_button_keeps_who_has_pressed_it_and_why(ana: Client) -> None:
    row = failed()
    assert said(post(ana, "retry", row.pk, reason="stock is back")) == "The execution is retried."
    operation = Operation.objects.get()
    assert (operation.actor, operation.reason, operation.source) == ("ana", "stock is back", OperationSource.ADMIN)
    assert "retried by ana: stock is back" in ana.get(page_url(row.pk)).content.decode()
    (deed,) = json.loads(ana.get(reverse("admin:conductor_app_execution_detail_json", args=[row.pk])).content)[
        "operations"
    ]
    assert (deed["actor"], deed["reason"], deed["source"]) == ("ana", "stock is back", "admin")


def test_several_at_once_are_one_operation_and_what_was_refused_is_in_it(ana: Client) -> None:
    rows = [failed(), failed(), executions.queued()]
    assert said(confirm(ana, ask(ana, "retry", *(row.pk for row in rows)), reason="again")).startswith("2 retried, 1")
    operation = Operation.objects.get()
    assert (operation.total, operation.done, operation.refused, operation.reason) == (3, 2, 1, "again")
    messages = dict(OperationItem.objects.values_list("execution_id", "message"))
    assert messages == {rows[0].pk: "", rows[1].pk: "", rows[2].pk: "not failed or cancelled"}


# ------------------------------------------------------------------------------------------------------ all that match


def test_all_that_match_are_an_operation_which_workers_do(ana: Client, few: int) -> None:
    rows, other = [failed() for _ in range(4)], executions.queued()
    asked = ask(ana, "retry", rows[0].pk, query="?status__exact=failed", select_across="1")
    page = asked.content.decode()
    assert asked.context["total"] == asked.context["fitting"] == 4
    assert "It is stored as an operation" in page
    answer = confirm(ana, asked, reason="stock is back")
    operation = Operation.objects.get()
    assert said(answer).startswith(f"Retry {operation.pk} has begun, on 4 executions.")
    assert answer.redirect_chain[-1][0] == operation_url(operation)
    assert (operation.actor, operation.reason, operation.filters) == ("ana", "stock is back", "status: failed")
    assert operation.finished_at is None
    assert {fresh(row).status for row in rows} == {"failed"}
    sweeper.sweep()
    assert {fresh(row).status for row in rows} == {"queued"}
    assert not OperationItem.objects.filter(execution=other).exists()
    assert "4 retried: 4 go on." in ana.get(operation_url(operation)).content.decode()


def test_those_for_which_it_is_impossible_are_left_out(ana: Client, few: int) -> None:
    row = failed()
    for _ in range(3):
        executions.queued()
    asked = ask(ana, "retry", row.pk, select_across="1")
    assert (asked.context["total"], asked.context["fitting"]) == (4, 1)
    confirm(ana, asked)
    assert list(OperationItem.objects.values_list("execution_id", flat=True)) == [row.pk]
    assert Operation.objects.get().filters == "all of the list executions"


def test_all_of_the_list_of_failures_are_taken_from_there(ana: Client, few: int) -> None:
    rows = [failed() for _ in range(3)]
    confirm(ana, ask(ana, "retry", rows[0].pk, url=FAILURES, select_across="1"))
    assert Operation.objects.get().total == 3
    sweeper.sweep()
    assert not FailedExecution.objects.exists()


def test_an_address_that_means_nothing_begins_nothing(ana: Client) -> None:
    failed()
    url = reverse("admin:conductor_app_execution_act_selected", args=["retry"])
    for query in ("payload__contains=4", "status__exact=%00", "created_at__year=99999999999"):
        assert "Nothing was done" in said(ana.post(url, {"ids": "all", "list": query}, follow=True))
    assert not Operation.objects.exists()


def test_an_event_is_not_sent_to_all_that_match(ana: Client) -> None:
    executions.queued()
    url = reverse("admin:conductor_app_execution_act_selected", args=["send"])
    assert ana.post(url, {"ids": "all", "list": "", "event": "x", "key": "k"}).status_code == 404


def test_a_list_that_hides_rows_begins_nothing_on_them(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = failed(), failed()
    seen = lambda self, request: Execution.objects.filter(pk=mine.pk)  # noqa: E731
    monkeypatch.setattr(type(site_admin()), "get_queryset", seen, raising=False)
    url = reverse("admin:conductor_app_execution_act_selected", args=["retry"])
    ana.post(url, {"ids": "all", "list": ""})
    assert list(OperationItem.objects.values_list("execution_id", flat=True)) == [mine.pk]
    theirs = began(other, actor="ana", source=OperationSource.COMMAND)
    assert ana.get(operation_url(theirs)).status_code == 302
    own = Operation.objects.get(source="admin")
    assert ana.get(operation_url(own)).status_code == 200
    assert [row["id"] for row in json.loads(ana.get(reverse(OPERATIONS) + "json/").content)["rows"]] == [own.pk]


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_page_tells_what_became_of_each(ana: Client) -> None:
    good, changed = failed(), failed()
    operation = began(good, changed, actor="bob", reason="<b>why</b>")
    api.retry(changed)
    sweeper.sweep()
    page = ana.get(operation_url(operation)).content.decode()
    assert "1 retried: 1 go on; 1 refused: not failed or cancelled." in page
    assert "refused: <bdi>not failed or cancelled</bdi>" in page
    assert f'href="{page_url(good.pk)}"' in page
    assert "&lt;b&gt;why" in page
    assert "Stop</button>" not in page


def test_the_executions_of_a_page_are_bounded(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation_pages, "ITEMS_PER_PAGE", 2)
    operation = began(*(failed() for _ in range(5)))
    first, last = (ana.get(operation_url(operation) + query) for query in ("", "?p=3"))
    assert (len(first.context["items"]), len(last.context["items"])) == (2, 1)
    assert "Page 1 of 3" in first.content.decode()
    assert ana.get(operation_url(operation) + "?p=x").status_code == 200


def test_pages_take_as_many_queries_for_many_as_for_few(ana: Client) -> None:
    numbers: list[tuple[int, int]] = []
    for count in (1, 30):
        operation = began(*(failed() for _ in range(count)))
        for _ in range(count):
            api.cancel(executions.queued(), actor="ana")
        ana.get(operation_url(operation))
        with CaptureQueriesContext(connection) as of_page:
            ana.get(operation_url(operation))
        with CaptureQueriesContext(connection) as of_list:
            assert ana.get(reverse(OPERATIONS)).status_code == 200
        numbers.append((len(of_page), len(of_list)))
    assert numbers[0] == numbers[1]
    assert max(numbers[0]) <= 10, numbers


def test_the_list_finds_what_was_asked_for_an_execution_or_by_somebody(ana: Client) -> None:
    row, other = failed(), failed()
    mine = began(row, actor="bob", kind=OperationKind.RERUN)
    began(other, actor="cara")
    for query in (f"q={row.pk}", "q=bob", "kind__exact=rerun"):
        rows = json.loads(ana.get(f"{reverse(OPERATIONS)}json/?{query}").content)["rows"]
        assert [found["id"] for found in rows] == [mine.pk], query


def test_the_twin_for_programs_tells_the_same(ana: Client) -> None:
    row = failed()
    operation = began(row, actor="bob")
    sweeper.sweep()
    document = json.loads(ana.get(operation_url(operation, "detail_json")).content)
    assert document["results"]["done"] == document["total"] == 1
    assert document["statuses"]["queued"] == 1
    assert not document["is_settled"]
    assert document["items"][0]["execution"] == str(row.pk)
    assert document["items"][0]["status"] == "queued"


# --------------------------------------------------------------------------------------------------------- permissions


def test_it_takes_a_permission_to_see_operations(client: Client) -> None:
    operation = began(failed())
    ben = who_may(client, "retry_execution")
    assert ben.get(reverse(OPERATIONS)).status_code == 403
    assert ben.get(operation_url(operation)).status_code == 403
    assert ben.get(operation_url(operation, "detail_json")).status_code == 403
    assert ben.post(operation_url(operation, "stop")).status_code == 403
    assert Operation.objects.get().finished_at is None


@pytest.mark.parametrize(("permission", "may"), [("retry_execution", True), ("cancel_execution", False)])
def test_whoever_may_do_it_may_stop_it(client: Client, permission: str, may: bool) -> None:
    row = failed()
    operation = began(row)
    ben = who_may(client, "view_operation", permission)
    assert ("Stop</button>" in ben.get(operation_url(operation)).content.decode()) is may
    answer = ben.post(operation_url(operation, "stop"), follow=True)
    operation.refresh_from_db()
    assert (operation.stopped == 1) is may
    if may:
        assert said(answer) == "The operation is stopped."
        assert said(ben.post(operation_url(operation, "stop"), follow=True)) == "The operation had ended already."
        sweeper.sweep()
        assert fresh(row).status == "failed"
    else:
        assert answer.status_code == 403


def test_a_look_stops_nothing(ana: Client) -> None:
    operation = began(failed())
    assert ana.get(operation_url(operation, "stop")).status_code == 405
    assert ana.post(reverse("admin:conductor_app_operation_stop", args=[0])).status_code == 404
    assert Operation.objects.get().finished_at is None


def test_without_the_permission_all_that_match_are_left_alone(client: Client) -> None:
    failed()
    ben = who_may(client)
    url = reverse("admin:conductor_app_execution_act_selected", args=["retry"])
    assert ben.post(url, {"ids": "all", "list": ""}).status_code == 403
    assert not Operation.objects.exists()


def test_nobody_changes_operations_by_hand(ana: Client) -> None:
    operation = began(failed())
    assert ana.get(reverse("admin:conductor_app_operation_add")).status_code == 403
    assert ana.post(operation_url(operation), {"actor": "x"}).status_code == 403
    assert ana.post(operation_url(operation, "delete"), {"post": "yes"}).status_code == 403
