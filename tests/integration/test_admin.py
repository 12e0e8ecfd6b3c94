"""The admin shows executions, steps and failures, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import api, transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, FailedExecution, Step
from tests.support import executions

MODELS = ["execution", "step", "event", "failedexecution"]
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    """A browser of somebody who may see everything."""
    client.force_login(User.objects.create_superuser("ana"))
    return client


def failed(**fields: Any) -> Execution:
    """A root that failed at a step, with everything that a page can show of it."""
    parent = executions.running(**fields)
    child = executions.claimed(executions.invoke(parent, "charge", task=fields.get("task", executions.TASK)))
    failure = Failure(type="shop.CardDeclined", message=f"card declined {SCRIPT}", traceback=f"Traceback {SCRIPT}")
    transitions.fail(child, failure)
    run = executions.claimed(Execution.objects.get(pk=parent.pk))
    for number in (1, 2):
        api.send_event(run, "approved", SCRIPT, id=f"{number} {SCRIPT}")
    assert not transitions.suspend(run, transitions.AwaitEvent("approval", "approved", None))
    transitions.fail(run, failure, step="charge", child_id=child.pk)
    return Execution.objects.get(pk=parent.pk)


def list_url(model: str) -> str:
    return reverse(f"admin:conductor_app_{model}_changelist")


def page_url(model: str, pk: Any) -> str:
    return reverse(f"admin:conductor_app_{model}_change", args=[pk])


@pytest.mark.parametrize("model", MODELS)
def test_a_list_takes_as_many_queries_for_fifty_rows_as_for_one(staff: Client, model: str) -> None:
    failed()
    with CaptureQueriesContext(connection) as few:
        staff.get(list_url(model))
    for _ in range(25):
        failed()
    with CaptureQueriesContext(connection) as many:
        page = staff.get(list_url(model)).content.decode()
    assert page.count("<tr>") > 25
    assert len(many) == len(few) <= 8


@pytest.mark.parametrize(
    ("model", "long"),
    [
        ("execution", ["payload", "result"]),
        ("step", ["result"]),
        ("event", ["payload"]),
        ("failedexecution", ["traceback"]),
    ],
)
def test_a_list_leaves_long_texts_in_the_database(staff: Client, model: str, long: list[str]) -> None:
    failed()
    with CaptureQueriesContext(connection) as queries:
        staff.get(list_url(model))
    quote = connection.ops.quote_name
    for name in long:
        column = f"{quote(f'conductor_app_{model}')}.{quote(name)}"
        assert not any(column in query["sql"] for query in queries), column


def test_no_list_filter_reads_a_whole_column(staff: Client) -> None:
    failed()
    for model in MODELS:
        with CaptureQueriesContext(connection) as queries:
            staff.get(list_url(model))
        assert not any("DISTINCT" in query["sql"] for query in queries)


def test_what_tasks_wrote_is_shown_as_text(staff: Client) -> None:
    execution = failed(
        task=f"shop.{SCRIPT}", queue=SCRIPT, payload=json.dumps([[], {"name": SCRIPT}]), idempotency_key=SCRIPT
    )
    Step.objects.update(result=json.dumps(SCRIPT))
    pages = [
        *(list_url(model) for model in MODELS),
        page_url("execution", execution.pk),
        page_url("failedexecution", execution.pk),
        page_url("step", Step.objects.get(execution=execution, name="charge").pk),
        page_url("event", Event.objects.filter(execution=execution).first().pk),
    ]
    for url in pages:
        page = staff.get(url)
        assert page.status_code == 200, url
        assert SCRIPT not in page.content.decode(), url
    for url in pages[3:]:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in staff.get(url).content.decode(), url


def test_a_page_shows_the_payload_the_error_and_links_to_the_family(staff: Client) -> None:
    execution = failed()
    child = Execution.objects.get(parent=execution)
    page = staff.get(page_url("execution", child.pk)).content.decode()
    assert page_url("execution", execution.pk) in page
    assert "card declined" in page
    assert 'aria-label="Payload">{}</pre>' in page
    assert page_url("execution", child.pk) in staff.get(page_url("failedexecution", execution.pk)).content.decode()


def test_a_page_takes_a_bounded_number_of_queries(staff: Client) -> None:
    execution = failed()
    urls = [
        page_url("execution", execution.pk),
        page_url("failedexecution", execution.pk),
        page_url("step", Step.objects.get(execution=execution, name="charge").pk),
        page_url("event", Event.objects.filter(execution=execution).first().pk),
    ]
    for url in urls:
        with CaptureQueriesContext(connection) as queries:
            staff.get(url)
        assert len(queries) <= 15, url


@pytest.mark.parametrize("model", MODELS)
def test_nobody_adds_changes_or_deletes_rows(staff: Client, model: str) -> None:
    execution = failed()
    rows: dict[str, Callable[[], Any]] = {
        "execution": lambda: execution,
        "event": lambda: Event.objects.filter(execution=execution).first(),
        "step": lambda: Step.objects.get(execution=execution, name="charge"),
        "failedexecution": lambda: FailedExecution.objects.get(pk=execution.pk),
    }
    row = rows[model]()
    assert staff.get(reverse(f"admin:conductor_app_{model}_add")).status_code == 403
    assert staff.post(reverse(f"admin:conductor_app_{model}_delete", args=[row.pk]), {"post": "yes"}).status_code == 403
    assert staff.post(page_url(model, row.pk), {"status": "succeeded"}).status_code == 403
    page = staff.get(page_url(model, row.pk)).content.decode()
    assert 'name="_save"' not in page
    assert "<textarea" not in page
    assert "delete_selected" not in staff.get(list_url(model)).content.decode()
    assert Execution.objects.get(pk=execution.pk).status == "failed"


@pytest.mark.parametrize("model", MODELS)
def test_the_search_finds_an_exact_id_and_nothing_else(staff: Client, model: str) -> None:
    wanted, other = failed(), failed()
    page = staff.get(list_url(model), {"q": f" {str(wanted.pk).upper()} "}).content.decode()
    assert str(wanted.pk) in page
    assert str(other.pk) not in page
    for nonsense in ("card", "1' OR '1'='1", "%"):
        page = staff.get(list_url(model), {"q": nonsense}).content.decode()
        assert str(wanted.pk) not in page


def test_an_event_shows_its_payload_and_which_step_has_taken_it(staff: Client) -> None:
    execution = executions.running()
    api.send_event(execution, "approved", {"by": "ana"}, id="mail-7")
    api.send_event(execution, "approved", {"by": "ben"})
    assert not transitions.suspend(execution, transitions.AwaitEvent("approval", "approved", None))
    taken, kept = Event.objects.order_by("id")
    page = staff.get(page_url("event", taken.pk)).content.decode()
    for text in ("&quot;ana&quot;", "mail-7", page_url("execution", execution.pk), page_url("step", taken.step_id)):
        assert text in page
    page = staff.get(list_url("event"), {"taken_at__isempty": "1"}).content.decode()
    assert page_url("event", kept.pk) in page
    assert page_url("event", taken.pk) not in page


def test_executions_are_listed_newest_first_and_filtered_by_status(staff: Client) -> None:
    first, second = executions.queued(), executions.running()
    page = staff.get(list_url("execution")).content.decode()
    assert page.index(str(second.pk)) < page.index(str(first.pk))
    page = staff.get(list_url("execution"), {"status__exact": "running"}).content.decode()
    assert str(second.pk) in page
    assert str(first.pk) not in page


def test_seeing_takes_the_view_permission(client: Client, db: None) -> None:
    execution = failed()
    user = User.objects.create_user("ben", is_staff=True)
    client.force_login(user)
    assert client.get(list_url("execution")).status_code == 403
    assert client.get(page_url("execution", execution.pk)).status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="view_execution"))
    assert client.get(list_url("execution")).status_code == 200
    assert client.get(page_url("execution", execution.pk)).status_code == 200
    assert client.get(list_url("failedexecution")).status_code == 403


def test_a_broken_payload_and_a_deleted_child_do_not_break_a_page(staff: Client) -> None:
    execution = failed()
    FailedExecution.objects.exclude(pk=execution.pk).delete()
    Execution.objects.filter(parent=execution)._raw_delete(connection.alias)
    Execution.objects.filter(pk=execution.pk).update(payload="not JSON", error="not JSON either", options="{")
    for model in MODELS:
        assert staff.get(list_url(model)).status_code == 200
    assert staff.get(page_url("execution", execution.pk)).status_code == 200
    assert staff.get(page_url("failedexecution", execution.pk)).status_code == 200
