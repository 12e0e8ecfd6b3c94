"""The admin's lists: what they show, what they find, and how much they read."""

from __future__ import annotations

import datetime as dt
import html.parser
import re
import uuid
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.core.cache import cache
from django.db import connection
from django.db.models import F
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import clear_url_caches, include, path, reverse

from conductor_app import api, transitions
from conductor_app.admin import ExecutionAdmin, changelist, paginator
from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store import ids
from tests.support import executions

LISTS = {model: f"/admin/conductor_app/{model}/" for model in ("execution", "step", "event", "failedexecution")}
OVERVIEW = "/admin/conductor_app/execution/overview/"
WORKERS = "/admin/conductor_app/execution/workers/"
ECHO = executions.TASK
HOSTILE = '"><script>alert(1)</script>\x1b\u202e'


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ana"))
    return client


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test can reach."""
    for module in (changelist, paginator):
        monkeypatch.setattr(module, "COUNTED", 4)
    monkeypatch.setattr(changelist, "WINDOW", 6)
    monkeypatch.setattr(ExecutionAdmin, "list_per_page", 2)


def fail(execution: Execution, message: str = "card declined", error_class: str = "shop.CardDeclined") -> Execution:
    transitions.fail(execution, Failure(type=error_class, message=message, traceback=""))
    return execution


def failed_tree() -> tuple[Execution, Execution]:
    parent, child = executions.family()
    fail(child)
    parent = executions.claimed(executions.fresh(parent))
    failure = Failure("conductor_app.exceptions.ChildFailed", "Child execution failed: card declined", "")
    transitions.fail(parent, failure, step="child", child_id=child.pk)
    return parent, child


def listed(client: Client, model: str = "execution", **parameters: Any) -> list[str]:
    """The keys of the rows, in their order."""
    answer = client.get(f"{LISTS[model]}json/", parameters)
    assert answer.status_code == 200, answer.content
    return [str(row.get("id", row.get("execution"))) for row in answer.json()["rows"]]


def text_of(client: Client, address: str, **parameters: Any) -> str:
    """What a reader sees of a page's main part."""
    page = client.get(address, parameters).content.decode()
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page[page.index('id="content-main"') :])).split())


# ------------------------------------------------------------------------------------------------------------ columns


def test_a_row_tells_how_far_an_execution_has_come(staff: Client) -> None:
    parent = executions.running()
    for name in ("validate", "pick", "pack"):
        transitions.record_step(parent, name, result="1")
    executions.invoke(parent, "charge")
    assert "waiting for charge 3 steps" in text_of(staff, LISTS["execution"])


def test_a_row_tells_at_which_step_an_execution_failed(staff: Client) -> None:
    failed_tree()
    assert "failed at child" in text_of(staff, LISTS["execution"])


def test_a_row_tells_why_to_who_may_see_messages(staff: Client, client: Client) -> None:
    fail(executions.running(), "card declined", "shop.CardDeclined")
    transitions.retry_later(executions.running(), executions.FAILURE, 3_600)
    executions.queued(queue="payments")
    api.cancel(executions.queued().pk, "wrong order")
    shown = text_of(staff, LISTS["execution"])
    for words in ("CardDeclined: card declined", "ValueError: card declined", "in queue payments", "wrong order"):
        assert words in shown
    ben = User.objects.create_user("ben", is_staff=True)
    ben.user_permissions.set(Permission.objects.filter(codename="view_execution"))
    client.force_login(ben)
    shown = text_of(client, LISTS["execution"])
    assert "CardDeclined" in shown
    assert "card declined" not in shown


def test_a_long_name_is_shortened_in_the_middle(staff: Client) -> None:
    task = f"shop.tasks.{'recalculate_' * 9}stock"
    executions.queued(task=task)
    page = staff.get(LISTS["execution"]).content.decode()
    assert f'<bdi title="{task}">recalculate_re…lculate_stock</bdi>' in page


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("", "Executions"),
        ("?status__exact=failed&task=shop.tasks.charge", "Executions: failed, shop.tasks.charge"),
    ],
)
def test_a_list_has_a_title_of_its_own(staff: Client, query: str, title: str) -> None:
    assert f"<title>{title} |" in staff.get(f"{LISTS['execution']}{query}").content.decode()


def test_the_lists_lead_to_who_waits_for_a_task(staff: Client) -> None:
    parent, child = executions.family()
    address = f"{LISTS['step']}?status__exact=pending&task={child.task}"
    assert address.replace("&", "&amp;") in staff.get(f"{LISTS['execution']}?task={child.task}").content.decode()
    page = staff.get(address).content.decode()
    assert f"/execution/{parent.pk}/change/" in page


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (executions.queued, "○ queued"),
        (lambda: executions.queued(countdown=60), "○ scheduled"),
        (executions.running, "▶ running"),
        (executions.napping, "◐ sleeping"),
        (lambda: executions.family()[0], "◐ waiting"),
        (lambda: fail(executions.running()), "✕ failed"),
        (lambda: transitions.retry_later(executions.running(), executions.FAILURE, 60), "↻ retrying"),
    ],
)
def test_a_status_is_a_shape_and_a_word(staff: Client, make: Any, shown: str) -> None:
    make()
    page = staff.get(LISTS["execution"]).content.decode()
    word = shown.partition(" ")[2]
    assert f'class="cd-pill cd-pill--{word}"' in page
    assert shown in text_of(staff, LISTS["execution"])


def test_a_row_shows_when_how_long_which_attempt_and_who(staff: Client) -> None:
    execution = executions.running()
    Execution.objects.update(
        created_at=F("created_at") - dt.timedelta(minutes=5), started_at=F("started_at") - dt.timedelta(minutes=3)
    )
    execution = executions.fresh(execution)
    page = staff.get(LISTS["execution"]).content.decode()
    assert (
        f'<time datetime="{execution.created_at.isoformat()}" title="{execution.created_at:%Y-%m-%d %H:%M:%S} UTC">'
        in page
    )
    shown = text_of(staff, LISTS["execution"])
    assert f"echo …{str(execution.pk)[-8:]} 0 steps 5 min ago 3 min test@host" in shown
    assert f'title="{ECHO}"' in page


def test_a_list_takes_as_many_queries_for_fifty_rows_as_for_one(staff: Client) -> None:
    def queries(address: str) -> int:
        with CaptureQueriesContext(connection) as found:
            assert staff.get(address).status_code == 200
        return len(found)

    failed_tree()
    addresses = [
        *LISTS.values(),
        f"{LISTS['execution']}?status__exact=failed&task={ECHO}&kind=root&failed_child=1&within=1h",
        f"{LISTS['failedexecution']}?scope=roots&error_class=shop.CardDeclined&cause=nothing",
        *(f"{address}json/" for address in LISTS.values()),
    ]
    before = {address: queries(address) for address in addresses}
    for _ in range(25):
        failed_tree()
    assert {address: queries(address) for address in addresses} == before
    assert max(before.values()) <= 8


# ------------------------------------------------------------------------------------------------------------ filters


def test_executions_are_filtered(staff: Client) -> None:
    parent, child = failed_tree()
    asleep = executions.napping()
    other = executions.queued(task="shop.tasks.other", queue="payments")
    tree = [str(key) for key in sorted([parent.pk, child.pk], reverse=True)]
    for parameters, found in [
        ({"status__exact": "failed"}, tree),
        ({"status__exact": "waiting"}, [str(asleep.pk)]),
        ({"status__exact": "succeeded"}, []),
        ({"kind": "child"}, [str(child.pk)]),
        ({"kind": "root", "status__exact": "failed"}, [str(parent.pk)]),
        ({"failed_child": "1"}, [str(parent.pk)]),
        ({"task": "shop.tasks.other"}, [str(other.pk)]),
        ({"queue": "payments"}, [str(other.pk)]),
        ({"root__id__exact": str(parent.pk)}, tree),
        ({"parent__id__exact": str(parent.pk)}, [str(child.pk)]),
        ({"depth": "1"}, [str(child.pk)]),
    ]:
        assert listed(staff, **parameters) == found, parameters


@pytest.mark.parametrize(("span", "found"), [("1h", 1), ("24h", 2), ("7d", 3), ("30d", 4), ("any", 5)])
def test_executions_are_filtered_by_when_their_tree_was_created(staff: Client, span: str, found: int) -> None:
    now = dt.datetime.now(dt.UTC)
    for days in (0, 0.5, 5, 25, 45):
        then = now - dt.timedelta(days=days)
        execution = executions.queued(id=ids.first_at(then))
        Execution.objects.filter(pk=execution.pk).update(created_at=then)
    assert len(listed(staff, within=span)) == found


def test_an_execution_with_a_foreign_id_is_filtered_by_its_own_time(staff: Client) -> None:
    """Ids that do not begin with a time sort anywhere; most of them after all others."""
    execution = executions.queued(id=uuid.UUID("f47ac10b-58cc-4372-a567-0e02b2c3d479"))
    assert listed(staff, within="1h") == [str(execution.pk)]
    Execution.objects.update(created_at=F("created_at") - dt.timedelta(hours=2))
    assert listed(staff, within="1h") == []


def test_the_choices_of_tasks_and_queues_come_from_celery(staff: Client) -> None:
    executions.queued(task="shop.tasks.unknown", queue="unknown")
    with CaptureQueriesContext(connection) as queries:
        page = staff.get(LISTS["execution"]).content.decode()
    # They are too many to be listed, so a box finds them.
    assert f'<option value="{ECHO}">' in page
    assert '<option value="celery.' not in page
    assert "shop.tasks.unknown" not in page.partition("<datalist")[2].partition("</datalist>")[0]
    assert 'form="cd-filter-task-form"' in page
    assert '<form method="get" id="cd-filter-task-form">' in page
    assert "?queue=celery" in page
    assert not any("DISTINCT" in query["sql"] for query in queries)
    # What an address asks for is shown as chosen, known or not.
    assert (
        "?queue=unknown&amp;task=shop.tasks.unknown"
        in staff.get(LISTS["execution"], {"task": "shop.tasks.unknown", "queue": "unknown"}).content.decode()
    )


def test_failures_are_filtered(staff: Client) -> None:
    parent, child = failed_tree()
    other = fail(executions.running(task="shop.tasks.other"), "no stock", "shop.NoStock")
    FailedExecution.objects.filter(pk=other.pk).update(failed_at=F("failed_at") - dt.timedelta(hours=2))
    for parameters, found in [
        ({}, [str(parent.pk), str(child.pk), str(other.pk)]),
        ({"error_class": "shop.NoStock"}, [str(other.pk)]),
        ({"task": "shop.tasks.other"}, [str(other.pk)]),
        ({"within": "1h"}, [str(parent.pk), str(child.pk)]),
        ({"scope": "roots"}, [str(parent.pk), str(other.pk)]),
        ({"scope": "causes"}, [str(child.pk), str(other.pk)]),
    ]:
        assert listed(staff, "failedexecution", **parameters) == found, parameters


def test_steps_and_events_are_filtered(staff: Client) -> None:
    parent, _child = failed_tree()
    executions.napping()
    pending = Step.objects.get(status="pending")
    assert listed(staff, "step", status__exact="pending") == [str(pending.pk)]
    assert listed(staff, "step", kind__exact="sleep") == [str(pending.pk)]
    assert listed(staff, "step", status__exact="failed") == [str(executions.step_of(parent).pk)]
    Step.objects.filter(pk=pending.pk).update(created_at=F("created_at") - dt.timedelta(hours=2))
    assert listed(staff, "step", within="1h") == [str(executions.step_of(parent).pk)]
    api.send_event(pending.execution_id, "approved", 1)
    event = Event.objects.get()
    assert listed(staff, "event", taken_at__isempty="1") == [str(event.pk)]
    assert listed(staff, "event", taken_at__isempty="0") == []


# ------------------------------------------------------------------------------------------------------------- search


def test_a_search_finds_an_execution_a_tree_a_key_or_a_task(staff: Client) -> None:
    parent, child = failed_tree()
    keyed = executions.queued(idempotency_key="order-7")
    other = executions.queued(task="shop.tasks.unknown")
    tree = sorted([str(parent.pk), str(child.pk)], reverse=True)
    for term, found in [
        (str(parent.pk), tree),
        (f"  {child.pk.hex}", [str(child.pk)]),
        ("key:order-7", [str(keyed.pk)]),
        ("key: order-7 ", [str(keyed.pk)]),
        ("key:order", []),
        ("tests.app.scenarios.ec", sorted([*tree, str(keyed.pk)], reverse=True)),
        ("ech", sorted([*tree, str(keyed.pk)], reverse=True)),
        ("shop.tasks.unknown", [str(other.pk)]),
        ("%", []),
    ]:
        assert listed(staff, q=term) == found, term


# ------------------------------------------------------------------------------------------------------------- bounds


def test_counting_stops_and_says_so(staff: Client, few: None) -> None:
    rows = [executions.queued() for _ in range(5)]
    shown = text_of(staff, LISTS["execution"], q="")
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(f"ANALYZE {Execution._meta.db_table}")
        assert "about 5 executions" in text_of(staff, LISTS["execution"])
    assert "4+ executions" in shown
    # Two pages of two; then the next ones, from where these end.
    assert staff.get(LISTS["execution"], {"p": 3}).status_code == 302
    second = staff.get(f"{LISTS['execution']}json/", {"p": 2}).json()
    assert second["is_complete"] is False
    assert second["next"] is None
    assert [row["id"] for row in staff.get(second["older"]).json()["rows"]] == [str(rows[0].pk)]
    page = staff.get(LISTS["execution"], {"p": 2}).content.decode()
    assert f"?before={rows[1].pk}" in page


def test_a_filter_without_an_index_looks_through_the_latest_rows_and_leads_to_older_ones(
    staff: Client, few: None
) -> None:
    wanted = executions.queued(queue="payments")
    for _ in range(7):
        executions.queued()
    answer = staff.get(f"{LISTS['execution']}json/", {"queue": "payments"}).json()
    assert answer["rows"] == []
    assert answer["is_complete"] is False
    page = text_of(staff, LISTS["execution"], queue="payments")
    assert "Looked through the latest 6 rows only." in page
    assert [row["id"] for row in staff.get(answer["older"]).json()["rows"]] == [str(wanted.pk)]
    # All that is older than the address says is fewer than that.
    newest = Execution.objects.order_by("-id")[0].pk
    assert "Looked through the latest" in text_of(staff, LISTS["execution"], queue="payments", before=str(newest))
    assert "Looked through" not in text_of(staff, LISTS["execution"], queue="payments", before=str(wanted.pk))


@pytest.mark.parametrize(
    "parameters",
    [
        {"task": "shop.tasks.rare"},
        {"status__exact": "running"},
        {"status__exact": "running", "queue": "payments"},
        {"q": "shop.tasks.rare"},
    ],
)
def test_an_index_finds_few_rows_however_old(staff: Client, few: None, parameters: dict[str, str]) -> None:
    wanted = executions.running(task="shop.tasks.rare", queue="payments")
    for _ in range(7):
        executions.queued()
    assert listed(staff, **parameters) == [str(wanted.pk)]
    assert "Looked through" not in text_of(staff, LISTS["execution"], **parameters)


def test_a_frequent_task_is_looked_for_among_the_latest(staff: Client, few: None) -> None:
    for _ in range(5):
        executions.queued(task="shop.tasks.retired")
    for _ in range(7):
        executions.queued()
    assert listed(staff, task="shop.tasks.retired") == []
    assert "Looked through the latest 6 rows only." in text_of(staff, LISTS["execution"], task="shop.tasks.retired")


def test_no_address_sorts_a_table(staff: Client) -> None:
    older, newer = executions.queued(queue="a"), executions.queued(queue="b")
    for order in ("1", "-3", "2.-1", "nonsense"):
        assert listed(staff, o=order) == [str(newer.pk), str(older.pk)]


@pytest.mark.parametrize("parameters", [{"before": "nonsense"}, {"nonsense": "1"}])
def test_an_address_without_a_meaning_is_refused(staff: Client, parameters: dict[str, str]) -> None:
    for address in LISTS.values():
        assert staff.get(f"{address}json/", parameters).status_code == 400
        assert staff.get(address, parameters).headers["Location"] == f"{address}?e=1"


# ------------------------------------------------------------------------------------------------- page and browser


class Strict(html.parser.HTMLParser):
    """Finds what ``default-src 'self'`` would not let pass."""

    def __init__(self) -> None:
        super().__init__()
        self.offences: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "style" or (tag == "script" and not given.get("src") and given.get("type") != "application/json"):
            self.offences.append(tag)
        self.offences += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        self.offences += [f"{tag} {value}" for value in given.values() if (value or "").startswith("javascript:")]


@pytest.mark.parametrize("address", [*LISTS.values(), OVERVIEW, WORKERS, "/admin/conductor_app/"])
def test_pages_obey_a_strict_content_security_policy(staff: Client, address: str) -> None:
    failed_tree()
    page = staff.get(address).content.decode()
    strict = Strict()
    strict.feed(page)
    assert not strict.offences
    assert 'href="/static/conductor_app/admin.css"' in page or address.endswith("conductor_app/")


@pytest.mark.parametrize("address", [*LISTS.values(), OVERVIEW, WORKERS])
def test_a_page_loads_itself_again_if_it_is_told_to(staff: Client, address: str) -> None:
    assert "Refresh" not in staff.get(address).headers
    answer = staff.get(address, {"refresh": "15"})
    assert answer.headers["Refresh"] == "15"
    page = answer.content.decode()
    assert '<a href="?refresh=5">5 s</a>' in page
    assert '<strong aria-current="true">15 s</strong>' in page
    assert staff.get(address, {"refresh": "1"}).headers["Refresh"] == "5"
    for nonsense in ("0", "-5", "5; url=https://example.com", ""):
        assert "Refresh" not in staff.get(address, {"refresh": nonsense}).headers


def test_refreshing_keeps_the_filters_and_the_filters_keep_refreshing(staff: Client) -> None:
    page = staff.get(LISTS["execution"], {"refresh": "5", "status__exact": "failed"}).content.decode()
    assert '<a href="?status__exact=failed&amp;refresh=15">15 s</a>' in page
    assert "?refresh=5&amp;status__exact=running" in page


def test_hostile_names_are_isolated_text(staff: Client) -> None:
    parent = executions.running(task=f"shop.{HOSTILE}", queue=HOSTILE)
    transitions.record_step(parent, HOSTILE, result="1")
    child = executions.claimed(executions.invoke(parent, f"charge {HOSTILE}"), owner=f"{HOSTILE}/1")
    api.send_event(parent, "approved", HOSTILE, id="mail-7")
    Event.objects.update(name=HOSTILE, key=HOSTILE)
    fail(executions.running(task=f"shop.{HOSTILE}"), HOSTILE, error_class=f"shop.{HOSTILE}")
    for model, address in LISTS.items():
        page = staff.get(address).content.decode()
        assert "<script>alert" not in page, model
        assert not {"\x1b", "\u202e"} & set(page), model
        assert re.search(r"<bdi[^>]*>[^<]*&lt;script&gt;alert\(1\)&lt;/script&gt;\\x1b\\u202e", page), model
    address = f"{LISTS['execution']}?queue={HOSTILE}&q={HOSTILE}"
    assert "<script>alert" not in staff.get(address).content.decode()
    assert str(child.pk) in staff.get(LISTS["execution"]).content.decode()


def test_a_table_says_what_its_columns_are(staff: Client) -> None:
    failed_tree()
    api.send_event(executions.running(), "approved")
    for address in LISTS.values():
        page = staff.get(address).content.decode()
        table = page[page.index('<table id="result_list"') : page.index("<tbody>")]
        assert table.count('<th scope="col"') == len(re.findall(r"<th\b", table)) > 3


# ----------------------------------------------------------------------------------------------------- another site


class OtherSite(admin.AdminSite):
    pass


other_site = OtherSite(name="operations")
other_site.register(Execution, ExecutionAdmin)
urlpatterns = [path("admin/", admin.site.urls), path("ops/", include([path("admin/", other_site.urls)]))]


@pytest.fixture
def both_sites() -> Any:
    with override_settings(ROOT_URLCONF=__name__):
        clear_url_caches()
        yield
    clear_url_caches()


def test_it_works_on_a_site_of_ones_own_that_has_executions_alone(both_sites: None, staff: Client) -> None:
    cache.clear()
    parent, _child = failed_tree()
    lists = reverse("operations:conductor_app_execution_changelist")
    assert lists == "/ops/admin/conductor_app/execution/"
    page = staff.get(lists).content.decode()
    assert f'href="/ops/admin/conductor_app/execution/{parent.pk}/change/' in page
    assert 'href="/ops/admin/conductor_app/execution/overview/"' in page
    overview = staff.get(f"{lists}overview/").content.decode()
    assert 'href="/ops/admin/conductor_app/execution/?status__exact=failed"' in overview
    assert 'href="/admin/' not in page + overview
    assert "card declined" in overview
    assert staff.get(f"{lists}json/").json()["count"] == 2
