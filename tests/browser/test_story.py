"""An operator finds the parent that waits, cancels its slow child, sees the parent fail, and retries it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.urls import reverse

from conductor_app import api, transitions
from conductor_app.models import Event, Execution
from tests.app import operators
from tests.app.ledger import note
from tests.browser.conftest import Tab
from tests.support import executions
from tests.support.polling import wait_until
from tests.support.worker import Worker

pytestmark = pytest.mark.django_db(transaction=True)

LIST = reverse("admin:conductor_app_execution_changelist")


def wait_for(execution: Any, status: str) -> Execution:
    """Return an execution when a worker has brought it so far."""
    wait_until(lambda: api.find(execution).status == status, 30, message=lambda: f"{api.find(execution).status}")
    return api.find(execution)


def reload_until(page: Any, word: str) -> None:
    """Load a page again until it says a word."""
    wait_until(lambda: page.reload() and word in page.inner_text("body"), 30, 0.2, lambda: page.inner_text("body"))


def test_a_slow_child_is_cancelled_and_its_parent_retried(
    worker: Callable[..., Worker], tab: Callable[..., Tab]
) -> None:
    worker()
    other = operators.deliver.delay(order_id=8)
    order = operators.deliver.delay(order_id=7)
    User.objects.create_superuser("ana", password="secret")
    wait_until(lambda: Execution.objects.filter(task__endswith=".pack", status="running").count() == 2, 30)
    child = Execution.objects.get(parent_id=order.id, step="pack")

    operator = tab(username=None)
    page = operator.open(reverse("admin:index"))
    page.get_by_label("Username").fill("ana")
    page.get_by_label("Password").fill("secret")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("link", name="Executions", exact=True).first.click()

    # Both orders wait, and the list tells for what.
    text = page.inner_text("#result_list")
    assert "waiting" in text
    page.locator(f"#result_list a[href*='{order.id}/change/']").first.click()
    page.wait_for_url(f"**/{order.id}/**")
    body = page.inner_text("#content")
    assert "waiting" in body.lower()
    assert "pack" in body
    assert page.get_by_role("button", name=re.compile("^Retry")).count() == 0

    # On to the child that it waits for.
    page.locator(f"a[href*='{child.pk}/change/']").first.click()
    page.wait_for_url(f"**/{child.pk}/**")
    page.get_by_role("button", name="Cancel").click()
    body = page.inner_text("#content")
    assert "There are no unfinished descendants." in body
    assert "Its parent gets ChildCancelled at step" in body
    assert str(order.id) in body
    page.get_by_label("Reason").fill("the packer is ill")
    page.get_by_role("button", name="Yes, cancel").click()
    page.wait_for_url(f"**/{child.pk}/change/**")
    body = page.inner_text("body")
    # On a slow machine the body has stopped by now.
    assert "to be cancelled: its body stops" in body or "The execution is cancelled." in body

    # The parent fails, whoever else goes on.
    wait_for(order.id, "failed")
    page = operator.open(reverse("admin:conductor_app_failedexecution_changelist"))
    assert "ChildCancelled" in page.inner_text("#result_list")
    page = operator.open(reverse("admin:conductor_app_execution_change", args=[order.id]))
    assert "failed" in page.inner_text("#content").lower()
    assert "the packer is ill" in page.inner_text("#content")
    assert api.find(other.id).status == "waiting"

    # What it needed is there now: it goes on where it stopped.
    note(None, operators.PACKER_IS_BACK)
    page.get_by_role("button", name="Retry from the failed step").click()
    assert "Finished steps keep their results" in page.inner_text("#content")
    page.get_by_role("button", name="Retry from the failed step").click()
    page.wait_for_url(f"**/{order.id}/change/**")
    assert "The execution is retried." in page.inner_text("body")
    wait_for(order.id, "succeeded")
    reload_until(page, "succeeded")
    assert api.get_result(order.id) == {"weight": 49, "parcel": "PKG-7"}
    assert Execution.objects.filter(parent_id=order.id, step="weigh").get().fence == 1, "it was not run again"
    assert list(LogEntry.objects.order_by("id").values_list("user__username", "object_id")) == [
        ("ana", str(child.pk)),
        ("ana", order.id),
    ]
    assert operator.complaints == []


@pytest.mark.parametrize("javascript", [True, False], ids=["with scripts", "without scripts"])
def test_many_are_acted_on_from_the_list(tab: Callable[..., Tab], javascript: bool) -> None:
    waiting = []
    for _ in range(3):
        run = executions.running()
        assert transitions.suspend(run, transitions.AwaitEvent("approval", "approved", None))
        waiting.append(run)
    ended = executions.running()
    transitions.succeed(ended, "1")
    operator = tab(java_script_enabled=javascript)
    page = operator.open(LIST)
    for box in page.locator("input.action-select").all():
        box.check()
    page.get_by_label("Action:").select_option(label="Send an event")
    page.get_by_role("button", name=re.compile("Go|Run")).click()
    body = page.inner_text("#content")
    assert "4 executions are selected." in body
    assert "This is possible for 3 of them as of now; the others are skipped." in body
    assert page.get_by_label("Event").input_value() == "approved"
    page.get_by_label("Payload").fill("yes")
    page.get_by_role("button", name="Send an event").click()
    assert "This is not JSON" in page.inner_text("#content")
    assert not Event.objects.exists()
    page.get_by_label("Payload").fill('{"yes": true}')
    page.get_by_role("button", name="Send an event").click()
    page.wait_for_url(f"**{LIST}")
    assert "3 sent the event, 1 skipped: ended already." in page.inner_text("body")
    assert Event.objects.count() == 3
    assert operator.complaints == []


def test_somebody_who_may_only_look_sees_no_buttons(tab: Callable[..., Tab]) -> None:
    from django.contrib.auth.models import Permission

    ben = User.objects.create_user("ben", is_staff=True)
    ben.user_permissions.set(Permission.objects.filter(codename="view_execution"))
    run = executions.queued()
    visitor = tab(username="ben")
    page = visitor.open(reverse("admin:conductor_app_execution_change", args=[run.pk]))
    assert page.get_by_role("group", name="Actions").count() == 0
    page = visitor.open(LIST)
    assert page.locator("input.action-select").count() == 0
    assert page.get_by_label("Action:").count() == 0
