"""What is held and paused is seen wherever somebody would wonder why nothing happens, and is ended from there."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from conductor_app import api, transitions
from conductor_app.engine import sweeper
from conductor_app.models import Execution, PausedTask
from conductor_app.store import clock
from conductor_app.telling.headlines import headline
from conductor_app.telling.history import history
from conductor_app.telling.story import read
from tests.app import scenarios
from tests.support.command import told
from tests.support.executions import TASK, family, fresh, napping, queued, running

pytestmark = pytest.mark.django_db

WHY = "bank incident"
LIST = "admin:conductor_app_execution_changelist"
PAUSES = "admin:conductor_app_pausedtask"


def line(execution: Execution) -> str:
    story = read(execution.pk, preview=None)
    assert story is not None
    return str(headline(story.situation))


def hold(execution: Execution) -> None:
    assert api.hold(execution, WHY, actor="ana")


def late(execution: Execution) -> Execution:
    Execution.objects.filter(pk=execution.pk).update(due_at=clock.after(-300))
    return fresh(execution)


# ---------------------------------------------------------------------------------------------------------- headlines


def test_a_headline_says_since_when_by_whom_and_why() -> None:
    execution = late(queued())
    hold(execution)
    assert line(execution).startswith("‖ Held since ")
    assert line(execution).endswith("ago), by ana: bank incident.")
    api.hold(napping(), WHY)
    story = read(execution.pk, preview=None)
    assert story is not None
    assert headline(story.situation).hints == (f"Let it go on: manage.py conductor release {execution.pk}",)
    assert "held by ana: bank incident" in [moment.text for moment in history(story)]


def test_a_headline_goes_on_with_what_is_waited_for() -> None:
    parent, _child = family()
    run, later = running(), queued(countdown=600)
    for execution in (parent, run, later):
        hold(execution)
    assert "by ana: bank incident. Waiting for echo" in line(parent)
    assert line(run).endswith("by ana: bank incident. Its run ends at its next ctx call.")
    assert "by ana: bank incident. Scheduled for" in line(later)


def test_a_headline_of_a_paused_task() -> None:
    execution = late(queued())
    api.pause(TASK, WHY, actor="ana")
    assert line(execution).startswith("‖ Its task is paused since ")
    assert line(execution).endswith("ago), by ana: bank incident.")
    assert f"unpause {TASK}" in told("show", execution.pk).out
    api.cancel(execution)
    assert "paused" not in line(execution)


# ----------------------------------------------------------------------------------------------------------- commands


def test_the_commands_hold_and_release_by_filters() -> None:
    parent, child = family()
    other = queued(task="shop.tasks.other")
    assert told("hold", "--task", TASK).code == 2
    answer = told("hold", "--task", TASK, "--reason", WHY, "--as", "ana")
    assert answer.code == 0, answer.out
    assert [fresh(one).is_held for one in (parent, child, other)] == [True, True, False]
    assert fresh(parent).held_by == "ana"
    listed = told("ls", "--held", "--json").json["executions"]
    assert {row["id"] for row in listed} == {str(parent.pk), str(child.pk)}
    assert {row["held"]["reason"] for row in listed} == {WHY}
    assert "‖ held" in told("ls", "--held").out
    assert told("hold", parent.pk, "--reason", WHY).code == 1
    assert told("release", "--held").code == 0
    assert not Execution.objects.held().exists()
    assert told("release", parent.pk).code == 1


def test_many_are_held_as_an_operation() -> None:
    executions = [queued() for _ in range(3)]
    assert told("hold", "--task", TASK, "--background", "--reason", WHY, "--as", "ana").code == 0
    sweeper.sweep(publish=False)
    assert [(row.held_by, row.hold_reason) for row in map(fresh, executions)] == [("ana", WHY)] * 3
    assert told("release", "--held", "--background").code == 0
    sweeper.sweep(publish=False)
    assert not Execution.objects.held().exists()


def test_the_commands_pause_list_and_unpause() -> None:
    queued()
    assert told("pause").out.strip() == "No task is paused."
    assert told("pause", scenarios.echo.name).code == 2
    paused = told("pause", TASK, "--reason", WHY, "--as", "ana")
    assert "tests.app.scenarios.echo is paused, with 1 execution queued." in paused.out
    assert "is paused already" in told("pause", TASK, "--reason", "another").out
    (row,) = told("pause", "--json").json["paused"]
    assert (row["task"], row["by"], row["reason"], row["queued"]) == (TASK, "ana", WHY, 1)
    assert "bank incident" in told("pause").out
    assert told("unpause", TASK).code == 0
    assert told("unpause", TASK).code == 1
    assert told("pause", "pass_through", "--reason", WHY).out.startswith("tests.app.scenarios.pass_through is paused")
    assert told("pause", "no.such.task", "--reason", WHY).code == 1


def test_doctor_tells_of_both_and_takes_neither_for_late() -> None:
    held, paused = late(queued()), late(queued(task="tests.app.scenarios.boom"))
    hold(held)
    api.pause(paused.task, WHY, actor="ana")
    checks = {check["name"]: check for check in told("doctor", "--json").json["checks"]}
    assert checks["queue"]["message"] == "No execution waits for a worker."
    assert checks["held"]["level"] == checks["paused"]["level"] == "WARN"
    assert "1 execution held" in checks["held"]["message"]
    assert "by ana: bank incident." in checks["held"]["message"]
    assert "1 task paused: tests.app.scenarios.boom (1 execution queued)." in checks["paused"]["message"]


def test_a_queue_of_what_is_stopped_is_paused_and_not_served_by_nobody() -> None:
    execution = late(queued())
    (before,) = told("workers", "--json").json["queues"]
    hold(execution)
    (after,) = told("workers", "--json").json["queues"]
    assert (before["state"], before["due"], before["stopped"]) == ("unserved", 1, 0)
    assert (after["state"], after["due"], after["stopped"], after["oldest_due_at"]) == ("paused", 0, 1, None)


def test_what_is_parked_for_a_pause_is_listed_as_paused() -> None:
    execution = queued()
    api.pause(TASK, WHY)
    Execution.objects.update(dispatch_at=clock.after(-1))
    transitions.take_for_dispatch(10)
    (row,) = told("ls", "--json").json["executions"]
    assert row["shown_as"] == "paused"
    api.unpause(TASK)
    assert fresh(execution).status == "queued"
    assert told("ls", "--json").json["executions"][0]["shown_as"] == "queued"


# -------------------------------------------------------------------------------------------------------------- admin


@pytest.fixture
def ana(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


def ben(client: Client, *codenames: str) -> Client:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_execution", *codenames]))
    client.force_login(user)
    return client


def act(client: Client, name: str, execution: Execution, **data: Any) -> Any:
    return client.post(reverse("admin:conductor_app_execution_act", args=[execution.pk, name]), data, follow=True)


def test_the_admin_holds_and_releases(ana: Client) -> None:
    execution = queued()
    assert "This field is required." in act(ana, "hold", execution).content.decode()
    assert not fresh(execution).is_held
    page = act(ana, "hold", execution, reason=WHY).content.decode()
    assert (fresh(execution).held_by, fresh(execution).hold_reason) == ("ana", WHY)
    assert "by ana: bank incident." in page
    listed = ana.get(reverse(LIST) + "?held=1").content.decode()
    assert str(execution.pk) in listed
    assert "cd-pill--held" in listed
    act(ana, "release", execution)
    assert not fresh(execution).is_held
    assert str(execution.pk) not in ana.get(reverse(LIST) + "?held=1").content.decode()


def test_holding_takes_its_permission(client: Client) -> None:
    execution = queued()
    ben(client, "cancel_execution")
    assert act(client, "hold", execution, reason=WHY).status_code == 403
    assert client.get(reverse(f"{PAUSES}_add")).status_code == 403
    assert client.get(reverse(f"{PAUSES}_changelist")).status_code == 403


def test_the_admin_pauses_and_unpauses(client: Client, django_capture_on_commit_callbacks: Any) -> None:
    ben(client, "hold_execution")
    execution = queued()
    refused = client.post(reverse(f"{PAUSES}_add"), {"name": "no.such.task", "reason": WHY})
    assert "No task of this name is registered" in refused.content.decode()
    assert "This field is required." in client.post(reverse(f"{PAUSES}_add"), {"name": TASK}).content.decode()
    assert client.post(reverse(f"{PAUSES}_add"), {"name": TASK, "reason": WHY}, follow=True).status_code == 200
    row = PausedTask.objects.get()
    assert (row.name, row.paused_by, row.reason) == (TASK, "ben", WHY)
    assert WHY in client.get(reverse(f"{PAUSES}_changelist")).content.decode()
    overview = client.get(reverse("admin:conductor_app_execution_overview")).content.decode()
    assert "Paused tasks" in overview
    assert WHY in overview
    assert transitions.claim(execution.pk, "test@host/1") is None
    with django_capture_on_commit_callbacks(execute=True):
        client.post(reverse(f"{PAUSES}_delete", args=[TASK]), {"post": "yes"}, follow=True)
    assert not PausedTask.objects.exists()
    assert transitions.claim(execution.pk, "test@host/1") is not None


def test_an_executions_document_tells_of_a_hold_and_a_pause(ana: Client) -> None:
    held, paused = queued(), queued(task="tests.app.scenarios.boom")
    hold(held)
    api.pause(paused.task, WHY)
    url = "admin:conductor_app_execution_detail_json"
    first = ana.get(reverse(url, args=[held.pk])).json()
    second = ana.get(reverse(url, args=[paused.pk])).json()
    assert (first["held"]["by"], first["held"]["reason"], first["paused"]) == ("ana", WHY, None)
    assert (second["held"], second["paused"]["task"], second["paused"]["reason"]) == (None, paused.task, WHY)
