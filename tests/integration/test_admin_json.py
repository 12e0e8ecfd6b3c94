"""Each page of the admin has a twin for programs: the same rows, by the same permissions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from conductor_app import api, transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, Step
from tests.support import executions

BASE = "/admin/conductor_app"
SECRET = "4111 1111 1111 1111"


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


@pytest.fixture
def rows(db: None) -> dict[str, Any]:
    """A row of each kind, with a secret in each payload and result."""
    parent = executions.running(payload=json.dumps([[], {"card": SECRET}]))
    transitions.record_step(parent, "look", result=json.dumps(SECRET))
    api.send_event(parent, "approved", SECRET, id="mail-7")
    failed = executions.running(payload=json.dumps([[], {"card": SECRET}]))
    transitions.fail(failed, Failure(type="shop.CardDeclined", message="card declined", traceback="Traceback …"))
    transitions.succeed(parent, json.dumps({"card": SECRET}))
    return {
        "execution": parent.pk,
        "step": Step.objects.get(execution=parent).pk,
        "event": Event.objects.get().pk,
        "failedexecution": failed.pk,
    }


def get(client: Client, address: str, status: int = 200) -> Any:
    answer = client.get(f"{BASE}/{address}")
    assert answer.status_code == status, answer.content
    assert answer.headers["Content-Type"] == "application/json"
    assert "no-store" in answer.headers["Cache-Control"]
    return answer.json()


def test_a_list_has_rows_a_count_and_where_it_goes_on(staff: Client) -> None:
    for _ in range(51):
        executions.queued()
    first = get(staff, "execution/json/?status__exact=queued")
    assert (len(first["rows"]), first["count"], first["is_complete"], first["older"]) == (50, 51, True, None)
    assert first["next"].endswith("/admin/conductor_app/execution/json/?p=2&status__exact=queued")
    second = staff.get(first["next"]).json()
    assert (len(second["rows"]), second["next"]) == (1, None)
    assert not {row["id"] for row in first["rows"]} & {row["id"] for row in second["rows"]}


def test_a_row_of_the_list_says_what_the_page_says(staff: Client) -> None:
    parent, child = executions.family()
    found = {row["id"]: row for row in get(staff, "execution/json/")["rows"]}
    assert found[str(parent.pk)]["status"] == "waiting"
    assert found[str(parent.pk)]["waiting_for"] == ["child"]
    assert found[str(parent.pk)]["finished_steps"] == 0
    assert found[str(child.pk)]["parent"] == str(parent.pk)
    assert found[str(child.pk)]["worker"] == executions.OWNER


def test_an_execution_has_its_headline_steps_children_and_failure(staff: Client) -> None:
    parent, child = executions.family()
    transitions.fail(child, Failure(type="shop.CardDeclined", message="card declined", traceback="Traceback …"))
    found = get(staff, f"execution/{parent.pk}/json/")
    assert found["headline"].startswith("○ Queued for")
    assert [(step["name"], step["status"], step["child"]) for step in found["steps"]] == [
        ("child", "failed", str(child.pk))
    ]
    assert [row["id"] for row in found["children"]] == [str(child.pk)]
    assert found["children_are_complete"] is True
    found = get(staff, f"execution/{child.pk}/json/")
    assert found["failure"]["message"] == "card declined"
    assert found["headline"] == "✕ Failed: card declined (CardDeclined, attempt 1 of 4)."
    assert found["payload"] == [[], {}]


def test_an_execution_takes_as_many_queries_for_fifty_children_as_for_one(staff: Client) -> None:
    few, _ = executions.mapping(1)
    many, _ = executions.mapping(50)
    counts = []
    for parent in (few, many):
        with CaptureQueriesContext(connection) as queries:
            get(staff, f"execution/{parent.pk}/json/")
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 12


def test_payloads_and_results_take_a_permission_of_their_own(client: Client, rows: dict[str, Any]) -> None:
    user = User.objects.create_user("ben", is_staff=True)
    codes = [f"view_{model}" for model in rows]
    user.user_permissions.add(*Permission.objects.filter(codename__in=codes))
    client.force_login(user)
    addresses = [f"{model}/{key}/json/" for model, key in rows.items()] + [f"{model}/json/" for model in rows]
    for address in addresses:
        get(client, address)
        assert SECRET not in client.get(f"{BASE}/{address}").content.decode(), address
    for model, key in rows.items():
        if model != "execution":
            assert SECRET not in client.get(f"{BASE}/{model}/{key}/change/").content.decode(), model
    permission, _ = Permission.objects.get_or_create(
        codename="view_payload", content_type=ContentType.objects.get_for_model(Execution)
    )
    user.user_permissions.add(permission)
    assert get(client, f"execution/{rows['execution']}/json/")["payload"] == [[], {"card": SECRET}]
    assert get(client, f"execution/{rows['execution']}/json/")["result"] == {"card": SECRET}
    assert get(client, f"step/{rows['step']}/json/")["result"] == SECRET
    assert get(client, f"event/{rows['event']}/json/")["payload"] == SECRET
    assert SECRET in client.get(f"{BASE}/step/{rows['step']}/change/").content.decode()
    for model in rows:
        assert SECRET not in client.get(f"{BASE}/{model}/json/").content.decode()


def test_what_the_setting_names_is_masked(staff: Client, rows: dict[str, Any]) -> None:
    text = json.dumps({"card": SECRET, "api_key": "s3cr3t-1"})
    Execution.objects.update(payload=json.dumps([[], json.loads(text)]), result='["api_key", s3cr3t-1')
    Step.objects.update(result=text)
    Event.objects.update(payload=text)
    for model, key in rows.items():
        for page in ("json", "change"):
            content = staff.get(f"{BASE}/{model}/{key}/{page}/").content.decode()
            assert "s3cr3t-1" not in content, (model, page)
            if page == "change" and model in ("step", "event"):
                assert "{\n  &quot;card&quot;" in content, "the value is not indented"
    masked = {"card": SECRET, "api_key": "********"}
    assert get(staff, f"execution/{rows['execution']}/json/")["payload"] == [[], masked]
    assert get(staff, f"step/{rows['step']}/json/")["result"] == masked
    assert get(staff, f"event/{rows['event']}/json/")["payload"] == masked


def test_what_a_page_refuses_its_twin_refuses(client: Client, rows: dict[str, Any]) -> None:
    addresses = [f"{model}/{key}/json/" for model, key in rows.items()] + [f"{model}/json/" for model in rows]
    for address in addresses:
        assert client.get(f"{BASE}/{address}").status_code == 302, "nobody is logged in"
    client.force_login(User.objects.create_user("ben", is_staff=True))
    for address in addresses:
        assert client.get(f"{BASE}/{address}").status_code == 403


@pytest.mark.parametrize("key", ["0192a3b4-0000-7000-8000-000000000000", "nonsense", "_3Cscript_3E"])
def test_a_row_that_is_not_there_is_not_found(staff: Client, key: str) -> None:
    for model in ("execution", "failedexecution", "step", "event"):
        assert get(staff, f"{model}/{key}/json/", 404) == {"error": "There is no such row."}


def test_an_address_without_a_meaning_is_refused(staff: Client) -> None:
    assert "error" in get(staff, "execution/json/?nonsense=1", 400)


def test_a_broken_payload_is_shown_as_it_is(staff: Client, rows: dict[str, Any]) -> None:
    Execution.objects.filter(pk=rows["execution"]).update(payload="not JSON", result="[NaN]", error="not JSON either")
    found = get(staff, f"execution/{rows['execution']}/json/")
    assert (found["payload"], found["result"]) == ("not JSON", ["NaN"])


def test_a_failure_has_all_of_its_message(staff: Client, rows: dict[str, Any]) -> None:
    found = get(staff, f"failedexecution/{rows['failedexecution']}/json/")
    assert (found["message"], found["traceback"]) == ("card declined", "Traceback …")
