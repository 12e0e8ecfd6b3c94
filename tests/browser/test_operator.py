"""What a new operator wants to know on a bad morning, from the index of the admin on; how many clicks it took is kept.

The number of clicks is a property of each test in the report (``--junit-xml``), and no promise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings
from django.urls import reverse

from conductor_app import api
from conductor_app.models import Execution
from tests.app import operators, scenarios
from tests.app.ledger import note
from tests.browser import scene
from tests.browser.conftest import Tab
from tests.support.polling import wait_until
from tests.support.worker import Worker

pytestmark = pytest.mark.django_db(transaction=True)

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER_TENANT = "tenant=globex"


class Operator:
    """Somebody who looks and clicks, and reads no documentation."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.clicks = 0

    def click(self, words: str | re.Pattern[str], role: str = "link") -> None:
        """Click at the first thing in the content, or else in the sidebar, that says so."""
        inside = self.page.locator("#content").get_by_role(role, name=words, exact=isinstance(words, str))
        found = inside if inside.count() else self.page.get_by_role(role, name=words, exact=isinstance(words, str))
        self.click_at(found.first)

    def click_at(self, found: Any) -> None:
        """Click at it, and wait for what comes."""
        self.clicks += 1
        found.click()
        self.page.wait_for_load_state()

    def select_all_and(self, action: str, confirm: str, *, everything: bool = False) -> None:
        """Let an action be done to all rows of a list, and confirm it."""
        self.click_at(self.page.locator("#action-toggle"))
        if everything:
            self.click(re.compile("Select all"))
        self.clicks += 1
        self.page.get_by_label("Action:").select_option(label=action)
        self.click(re.compile("Go|Run"), "button")
        self.click(confirm, "button")

    @property
    def text(self) -> str:
        """What the page says."""
        return str(self.page.inner_text("#container"))


@pytest.fixture
def operator(tab: Callable[..., Tab], record_property: Callable[[str, object], None]) -> Any:
    """An operator at the index of the admin."""
    found = Operator(tab().open(reverse("admin:index")))
    yield found
    record_property("clicks", found.clicks)


def test_orders_are_slow_since_ten_minutes(operator: Operator) -> None:
    scene.play()
    operator.click("Overview")
    assert re.search(r"payments\s+2\s+6\s+", operator.text), "the queue whose workers are busy"
    operator.click("What takes long")
    assert re.search(r"charge\s+\d+ min ago\s+\d+ min ago\s+celery@web-1", operator.text), "what runs for the longest"


def test_which_parents_wait_for_the_slow_task_and_since_when(operator: Operator) -> None:
    scene.play()
    operator.click("What takes long")
    row = operator.page.get_by_role("row").filter(has_text=re.compile("^charge"))
    operator.click_at(row.get_by_role("link", name="who waits for it"))
    assert "9 steps" in operator.text
    assert len(re.findall(r"fulfil\s+…\w{8}\s+charge", operator.text)) == 9


def test_the_failures_of_one_cause_are_retried_and_watched(operator: Operator) -> None:
    scene.play()
    operator.click("Overview")
    operator.click("Failed trees, to retry")
    operator.select_all_and("Retry from the failed step", "Retry from the failed step")
    assert f"{scene.FAILURES} retried" in operator.text
    # Nobody is at work here, so they stay queued; the list says so.
    operator.click("Executions")
    operator.click("queued")
    roots = Execution.objects.filter(task=scene.FULFIL, status__in=["queued", "waiting"]).count()
    assert roots >= scene.FAILURES


def test_the_failures_of_one_cause_are_watched_to_their_end(worker: Callable[..., Worker], operator: Operator) -> None:
    worker()
    orders = [operators.bill.delay(order_id=number) for number in range(37)]
    failed = Execution.objects.filter(pk__in=[order.id for order in orders], status="failed")
    wait_until(lambda: failed.count() == 37, 60, message=lambda: f"{failed.count()} have failed")
    note(None, operators.BANK_IS_OPEN)
    operator.click("Overview")
    operator.click("Failed trees, to retry")
    operator.select_all_and("Retry from the failed step", "Retry from the failed step")
    assert "37 retried" in operator.text
    operator.click("Operations")
    operator.click(re.compile("^retry"))
    end = "37 retried: 36 succeeded, 1 failed."
    wait_until(lambda: operator.page.reload() and end in operator.text, 60, 0.3, lambda: operator.text)


def test_where_one_finds_how_to_be_alerted(operator: Operator) -> None:
    operator.click("Overview")
    for words in ("Alerts", "ConductorTasksFail", "docs/howto/monitoring.md", 'CONDUCTOR["METRICS"] is off'):
        assert words.lower() in operator.text.lower()


def test_everything_of_a_tenant_is_cancelled(operator: Operator) -> None:
    scene.play()
    of_tenant = Execution.objects.filter(root__tags__key="tenant", root__tags__value="globex")
    others = set(Execution.objects.exclude(pk__in=of_tenant).values_list("pk", "status"))
    operator.click("Executions")
    operator.page.locator("#searchbar").fill(f"tag:{OTHER_TENANT}")
    operator.click("Search", "button")
    operator.click("waiting")
    operator.select_all_and("Cancel", "Yes, cancel")
    assert not of_tenant.filter(status="waiting").exists()
    assert not of_tenant.filter(status="queued").exists()
    assert set(Execution.objects.exclude(pk__in=of_tenant).values_list("pk", "status")) == others


def test_one_is_stuck_for_what_and_it_is_pushed(worker: Callable[..., Worker], operator: Operator) -> None:
    worker()
    order = operators.release.delay(order_id=1)
    wait_until(lambda: api.find(order).status == "waiting", 40)
    operator.click("Executions")
    assert "waiting for approval" in operator.text
    operator.click(re.compile("^release"))
    assert re.search(r"Waiting for (the )?event", operator.text)
    operator.click("Send an event", "button")
    operator.page.get_by_label("Payload").fill('{"yes": true}')
    operator.click("Send an event", "button")
    wait_until(lambda: api.find(order).status == "succeeded", 40)


def test_what_it_did_step_by_step_on_which_worker_with_which_logs(operator: Operator) -> None:
    played = scene.play()
    with override_settings(CONDUCTOR={"LINKS": {"logs": "https://logs.example.com/?root={root_id}"}}):
        operator.click("Executions")
        operator.click("succeeded")
        operator.click("root")
        operator.click_at(operator.page.locator(f"#result_list a[href*='{played.known['worked'].pk}']").first)
        for words in ("validate", "charge", "pick", "ship", "celery@web-1"):
            assert words in operator.text
        logs = operator.page.get_by_role("link", name="logs", exact=True).get_attribute("href")
        assert logs == f"https://logs.example.com/?root={played.known['worked'].pk}"


def test_a_trace_is_followed_across_suspensions(
    worker: Callable[..., Worker], operator: Operator, tmp_path: Path
) -> None:
    path = tmp_path / "spans"
    worker(
        conductor={"TRACING": True},
        env={"CONDUCTOR_TEST_SPANS": str(path)},
        args=["--include=tests.app.traced"],
    )
    # As an instrumented web process would pass it on.
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    root = scenarios.three_children.apply_async(kwargs={"value": 1}, headers=headers)
    wait_until(lambda: api.find(root).status == "succeeded", 40)
    with override_settings(CONDUCTOR={"LINKS": {"trace": "https://traces.example.com/{trace_id}"}}):
        operator.click("Executions")
        operator.click("root")
        operator.click(re.compile("^three_children"))
        of_root = operator.page.get_by_role("link", name="trace", exact=True).get_attribute("href")
        operator.click_at(operator.page.locator("a[href*='/change/']").filter(has_text=re.compile("^echo")).first)
        of_child = operator.page.get_by_role("link", name="trace", exact=True).get_attribute("href")
    assert of_root == of_child == f"https://traces.example.com/{TRACE}"
    # There it finds every run: four of the root, which three suspensions divide, and one of each child.
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) == 7)
    spans = [json.loads(line) for line in path.read_text().splitlines()]
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE}"}


def test_it_is_compared_with_the_run_that_worked(operator: Operator) -> None:
    scene.play()
    operator.click("Executions")
    operator.click("failed")
    operator.click(re.compile("^fulfil"))
    operator.click("Compare with one that succeeded")
    assert re.search(r"ship\s+.*failed.*\s+differs", operator.text, re.DOTALL)


def test_who_cancelled_it_when_and_why(operator: Operator) -> None:
    scene.play()
    operator.click("Executions")
    operator.click("cancelled")
    assert "customer called, wrong address" in operator.text
    operator.click(re.compile("^fulfil"))
    assert re.search(
        r"cancelled by ben: customer called, wrong address · [\d-]+ [\d:]+ UTC \(\d+ min ago\)", operator.text
    )


def test_which_workers_live_how_loaded_and_in_which_version(operator: Operator) -> None:
    scene.play()
    operator.click("Workers and queues")
    for words in ("celery@web-1", "2 of 2", "shop 2026.11.2", "all busy", "served by nobody"):
        assert words in operator.text


def test_one_that_failed_twice_was_retried_by_hand_and_succeeded(operator: Operator) -> None:
    played = scene.play()
    operator.page.goto(operator.page.url + f"conductor_app/execution/{played.known['retried'].pk}/change/")
    assert "retried by ana: the bank is open again" in operator.text
    assert operator.text.count("shop.bank.Maintenance: closed until noon") == 2
