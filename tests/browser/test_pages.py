"""Every page of ours, light and dark and on a narrow screen: readable by all, and with nothing inline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.urls import NoReverseMatch, reverse

from conductor_app import api
from conductor_app.models import Event, Execution, FailedExecution, Operation, Step
from tests.app import operators, origin, scenarios
from tests.browser import axe
from tests.browser.conftest import Tab
from tests.support.polling import wait_until
from tests.support.worker import Worker

pytestmark = pytest.mark.django_db(transaction=True)

#: What stock Django's own parts of these pages do not hold. The label of the search box is a picture:
STOCK = {("label-title-only", "#searchbar")}
#: And the links of the bread crumbs differ from the text around them by too little colour.
CONTEXT = {"exclude": [".breadcrumbs"]}


def change(model: str, pk: Any) -> str:
    return reverse(f"admin:conductor_app_{model}_change", args=[pk])


def changelist(model: str) -> str:
    return reverse(f"admin:conductor_app_{model}_changelist")


@pytest.fixture
def paths(worker: Callable[..., Worker]) -> dict[str, str]:
    """Pages of ours by name, over what a worker has done and is just doing."""
    worker()
    done = origin.process_order.delay(order_id=7)
    failed = scenarios.parent_of_boom.delay()
    asleep = scenarios.naps.delay(seconds=3_600)
    asking = operators.release.delay(order_id=1)
    waiting = operators.deliver.delay(order_id=2)
    later = operators.release.apply_async(kwargs={"order_id": 3}, countdown=3_600)
    wait_until(lambda: api.find(done).status == "succeeded" and api.find(failed).status == "failed", 40)
    wait_until(lambda: Execution.objects.filter(task__endswith=".pack", status="running").exists(), 30)
    wait_until(lambda: all(api.find(row).status == "waiting" for row in (asleep, asking)), 30)
    api.send_event(asking, "another", {"by": "ana"})
    cancelled = operators.release.delay(order_id=4)
    api.cancel(cancelled, "wrong order")
    child = Execution.objects.get(parent_id=waiting.id, step="pack")
    act = "admin:conductor_app_execution_act"
    found = {
        "index": reverse("admin:app_list", args=["conductor_app"]),
        "executions": changelist("execution"),
        "steps": changelist("step"),
        "events": changelist("event"),
        "failures": changelist("failedexecution"),
        "operations": changelist("operation"),
        "schedules": changelist("schedule"),
        "succeeded": change("execution", done.id),
        "failed": change("execution", failed.id),
        "sleeping": change("execution", asleep.id),
        "waiting for an event": change("execution", asking.id),
        "waiting for a child": change("execution", waiting.id),
        "running": change("execution", child.pk),
        "scheduled": change("execution", later.id),
        "cancelled": change("execution", cancelled.id),
        "step": change("step", Step.objects.filter(execution=failed.id).first().pk),
        "event": change("event", Event.objects.first().pk),
        "operation": change("operation", Operation.objects.first().pk),
        "failure": change("failedexecution", FailedExecution.objects.get(pk=failed.id).pk),
        "cancel": reverse(act, args=[child.pk, "cancel"]),
        "send": reverse(act, args=[asking.id, "send"]),
        "retry": reverse(act, args=[failed.id, "retry"]),
        "compare": reverse("admin:conductor_app_execution_compare", args=[failed.id]),
        "rerun": reverse(act, args=[done.id, "rerun"]),
    }
    for name, url_name in [
        ("overview", "execution_overview"),
        ("workers", "execution_workers"),
        ("slow", "execution_slow"),
        ("causes", "failedexecution_causes"),
    ]:
        try:
            found[name] = reverse(f"admin:conductor_app_{url_name}")
        except NoReverseMatch:
            continue
    return found


def violations(page: Any, **options: Any) -> list[str]:
    """What axe-core finds on a page, one line for each element."""
    found = axe.violations(page, CONTEXT, **options)
    return [f"{rule}: {target} {text}" for rule, target, text in found if (rule, target) not in STOCK]


def test_a_page_is_loaded_again_in_its_place(worker: Callable[..., Worker], tab: Callable[..., Tab]) -> None:
    worker()
    asking = operators.release.delay(order_id=1)
    wait_until(lambda: api.find(asking).status == "waiting", 30)
    watching = tab()
    page = watching.open(change("execution", asking.id))
    page.locator("#content-main details summary").first.click()
    page.evaluate("window.isTheSame = true")
    page.get_by_role("link", name="5 s", exact=True).click()
    page.get_by_text("5 s", exact=True).and_(page.locator("strong")).wait_for()
    api.send_event(asking, "approved", {"yes": True})
    page.locator(".cd-headline--succeeded").wait_for()
    assert page.evaluate("window.isTheSame")
    assert page.locator("#content-main details").first.evaluate("one => one.open")
    page.get_by_role("link", name="off", exact=True).click()
    page.get_by_text("off", exact=True).and_(page.locator("strong")).wait_for()
    assert watching.complaints == []


# Some seventy looks at pages, while a worker runs.
@pytest.mark.timeout(400)
def test_every_page_is_readable_by_all_and_has_nothing_inline(
    paths: dict[str, str], tab: Callable[..., Tab], subtests: Any
) -> None:
    light, dark = tab(), tab(color_scheme="dark")
    for name, path in paths.items():
        with subtests.test(msg=name):
            page = light.open(path)
            assert light.complaints == [], "violations of the policy, or errors of scripts"
            assert violations(page) == []
            fits_a_narrow_screen(page)
        with subtests.test(msg=f"{name}, dark"):
            assert violations(dark.open(path), **axe.COLOURS) == []
        light.complaints.clear()


def fits_a_narrow_screen(page: Any) -> None:
    """Make the window narrow: wide tables scroll inside of themselves, the page does not."""
    size = page.viewport_size
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    for button in page.get_by_role("group", name="Actions").get_by_role("button").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["height"] >= 24
    page.set_viewport_size(size)
