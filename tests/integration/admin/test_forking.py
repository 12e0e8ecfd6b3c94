"""*Run again from a step* in the admin: the step is chosen, what is kept is said, a new execution is started."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from conductor_app import ExecutionContext, api
from conductor_app.models import Execution, Fork, OperationItem, Step
from tests.app import scenarios
from tests.support.bodies import durable, run
from tests.support.executions import queued
from tests.support.process import note_published


@durable
def ordered(ctx: ExecutionContext, order: int = 1) -> Any:
    ctx.step("check", str, "checked")
    ctx.invoke("charge", scenarios.echo, {"value": order})
    return ctx.step("notify", str, "notified")


@pytest.fixture(autouse=True)
def published(db: None) -> list[uuid.UUID]:
    return note_published()


@pytest.fixture
def ana(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def act_url(execution: Execution) -> str:
    return reverse("admin:conductor_app_execution_act", args=[execution.pk, "fork"])


def page(client: Client, execution: Execution) -> str:
    return client.get(reverse("admin:conductor_app_execution_change", args=[execution.pk])).content.decode()


def listed(html: str) -> list[list[str]]:
    """Return the names in each list of steps."""
    lists = re.findall(r'<[uo]l class="cd-confirmation__steps">(.*?)</[uo]l>', html, re.DOTALL)
    return [re.findall(r"<li>(?:<a [^>]*>)?<bdi>([^<]+)</bdi>", one) for one in lists]


def test_a_step_is_chosen_and_the_page_says_what_is_kept(ana: Client) -> None:
    source = run(ordered)
    assert f'{act_url(source)}?before=charge"' in page(ana, source)
    asked = ana.get(act_url(source)).content.decode()
    assert listed(asked) == [["check", "charge", "notify"]]
    assert '<form method="post" action="/admin/conductor_app' not in asked
    chosen = ana.get(act_url(source), {"before": "charge"}).content.decode()
    assert listed(chosen) == [["check"], ["charge", "notify"]]
    assert listed(ana.get(act_url(source), {"before": "check"}).content.decode()) == [["check", "charge", "notify"]]
    assert "no such step" in ana.get(act_url(source), {"before": "chrage"}).content.decode()
    assert not Fork.objects.exists()


def test_it_is_started_once_and_both_pages_tell_of_the_other(ana: Client) -> None:
    source = run(ordered)
    asked = ana.get(act_url(source), {"before": "charge"}).content.decode()
    (key,) = re.findall(r'name="key" value="([^"]+)"', asked)
    form = {"before": "charge", "key": key, "reason": "charged twice", "payload": ""}
    for _ in range(2):
        answer = ana.post(act_url(source), form)
        assert answer.status_code == 302
    fork = Execution.objects.get(fork__forked_from=source)
    assert str(fork.pk) in answer["Location"]
    assert fork.payload == source.payload
    assert OperationItem.objects.get().operation.reason == "charged twice"
    assert f"Run again before 'charge' as new execution {fork.pk}: charged twice" in {
        entry.change_message for entry in LogEntry.objects.all()
    }
    assert str(fork.pk) in page(ana, source)
    told = page(ana, fork)
    assert str(source.pk) in told
    assert "before step “charge”" in told or "before step &quot;charge&quot;" in told
    assert "the outcome of 1 step was copied" in told
    assert "started as a fork of" in told
    for row, own in ((source, None), (fork, str(source.pk))):
        found = ana.get(f"/admin/conductor_app/execution/{row.pk}/json/").json()
        assert found["forked_from"] == own
        assert [one["execution"] for one in found["forks"]] == ([str(fork.pk)] if own is None else [])
    assert [step["copied"] for step in found["steps"]] == [True]


def test_another_payload_is_held_against_the_task(ana: Client) -> None:
    source = run(ordered)
    form = {"before": "charge", "key": "admin-1", "reason": ""}
    for payload, error in (("{", "This is not JSON"), ('{"oder": 2}', "does not fit")):
        again = ana.post(act_url(source), {**form, "payload": payload})
        assert again.status_code == 200
        assert error in again.content.decode()
        assert listed(again.content.decode()) == [["check"], ["charge", "notify"]]
    assert not Fork.objects.exists()
    ana.post(act_url(source), {**form, "payload": '{"order": 2}'})
    assert Fork.objects.get().execution.kwargs == {"order": 2}


def test_what_is_refused_meanwhile_is_told(ana: Client) -> None:
    source = queued()
    answer = ana.post(act_url(source), {"before": "check", "key": "admin-1", "payload": ""}, follow=True)
    assert "Only one that has ended is run again" in answer.content.decode()
    assert not Fork.objects.exists()


def test_it_is_done_to_one_at_a_time_and_takes_its_permission(client: Client) -> None:
    source = run(ordered)
    ben = User.objects.create_user("ben", is_staff=True)
    codenames = ["view_execution", "retry_execution"]
    ben.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    client.force_login(ben)
    assert "run again from here" not in page(client, source)
    assert client.get(act_url(source), {"before": "charge"}).status_code == 403
    ben.user_permissions.add(Permission.objects.get(codename="fork_execution"))
    assert "run again from here" in page(client, source)
    selected = reverse("admin:conductor_app_execution_act_selected", args=["fork"])
    assert client.post(selected, {"ids": str(source.pk), "before": "charge", "payload": ""}).status_code == 404
    assert not Fork.objects.exists()


def test_a_page_names_no_execution_that_is_pruned_as_if_it_were_there(ana: Client) -> None:
    source = run(ordered)
    fork = api.fork(source, "notify")
    Step.objects.filter(execution__root_id=source.pk)._raw_delete("default")
    for depth in (1, 0):
        Execution.objects.filter(root_id=source.pk, depth=depth)._raw_delete("default")
    told = page(ana, fork)
    assert str(source.pk) in told
    assert "2 steps" in told
