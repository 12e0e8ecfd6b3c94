"""An execution's page: what it says, what it holds back, and that nothing stored can break it."""

from __future__ import annotations

import datetime as dt
import html
import json
import re
import sys
import types
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.contrib.admin import AdminSite
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.http import HttpResponse
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse
from django_celery_results.models import TaskResult

from conductor_app import api, transitions
from conductor_app.admin import ExecutionAdmin, refresh
from conductor_app.admin.page import LONG_PREVIEW
from conductor_app.admin.tracebacks import frames
from conductor_app.admin.waterfall import MOST_ROWS
from conductor_app.exceptions import Failure
from conductor_app.host import inline
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store.ids import derive_child_id
from conductor_app.telling import steps as steps_of_story
from conductor_app.telling import tree as tree_of_story
from conductor_app.values.redaction import MASK, WITHHELD
from project.celery import app
from tests.app import scenarios
from tests.support import executions

EVIL = "</pre><script>alert(1)</script><b onclick=x>\u202etxt\u200f\x07\x1b[2J"
TRACEBACK = """Traceback (most recent call last):
  File "/srv/shop/tasks.py", line 41, in charge
    receipt = bank.charge(total)
  File "/srv/.venv/lib/python3.12/site-packages/requests/api.py", line 59, in request
    return session.request(method=method, url=url, **kwargs)
  File "/srv/shop/bank.py", line 17, in charge
    raise CardDeclined("no funds")
shop.bank.CardDeclined: no funds
"""


@pytest.fixture
def staff(db: None, client: Client) -> Client:
    """A browser of somebody who may see everything."""
    client.force_login(User.objects.create_superuser("ana"))
    return client


@pytest.fixture
def viewer(db: None, client: Client) -> Client:
    """A browser of somebody who may see executions, and no payloads."""
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_execution"))
    client.force_login(user)
    return client


def url_of(execution: Any) -> str:
    return reverse("admin:conductor_app_execution_change", args=[getattr(execution, "pk", execution)])


def list_url(**query: Any) -> str:
    (name, value), *_ = query.items()
    return f"{reverse('admin:conductor_app_execution_changelist')}?{name}={value}"


def page_of(client: Client, execution: Any, **query: Any) -> str:
    response = client.get(url_of(execution), query)
    assert response.status_code == 200
    return response.content.decode()


class Page(HTMLParser):
    """What a page consists of, and whether its tags match."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "hr", "rect", "line", "circle", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def links(self) -> list[str]:
        return [attrs["href"] or "" for tag, attrs in self.tags if tag == "a" and attrs.get("href")]


def section(page: str, name: str) -> str:
    """The part of a page under one heading."""
    found = re.search(rf'<section[^>]*aria-labelledby="cd-{name}".*?</section>', page, re.DOTALL)
    assert found is not None, f"no section {name}"
    return found[0]


def failed_tree(**fields: Any) -> tuple[Execution, Execution, Execution]:
    """Three levels, each failed for the one below it."""
    root = executions.running(**fields)
    middle = executions.claimed(executions.invoke(root, "pay"))
    leaf = executions.claimed(executions.invoke(middle, "charge"))
    failure = Failure(type="shop.bank.CardDeclined", message="no funds", traceback=TRACEBACK)
    transitions.fail(leaf, failure)
    for row, step, below in ((middle, "charge", leaf), (root, "pay", middle)):
        run = executions.claimed(row)
        message = f"Child execution failed: {Execution.objects.get(pk=below.pk).error_message}"
        failure = Failure(type="conductor_app.exceptions.ChildFailed", message=message)
        transitions.fail(run, failure, step=step, child_id=below.pk)
    return executions.fresh(root), executions.fresh(middle), executions.fresh(leaf)


def children_of(parent: Execution, count: int, status: str = "succeeded", **fields: Any) -> list[Execution]:
    """Rows of as many children at once."""
    values = {"finished_at": parent.created_at} if status in ("succeeded", "failed", "cancelled") else {}
    rows = [
        Execution(
            id=derive_child_id(parent.pk, f"{fields.get('step', 'pages')}[{number}]"),
            task="shop.tasks.page",
            queue="celery",
            payload="[[],{}]",
            status=status,
            parent=parent,
            root_id=parent.root_id,
            depth=parent.depth + 1,
            position=number,
            created_at=parent.created_at + dt.timedelta(milliseconds=number),
            started_at=parent.created_at + dt.timedelta(seconds=1),
            **{"step": "pages", **values, **fields},
        )
        for number in range(count)
    ]
    return Execution.objects.bulk_create(rows, batch_size=500)


# ------------------------------------------------------------------------------------------------------------ headline


def test_the_page_begins_with_what_is_going_on_and_what_can_be_done(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    page = page_of(staff, root)
    text = Page(page).text
    headline = (
        '✕ failed Failed at step "pay": Child execution failed: Child execution failed: no funds → root cause '
        f"CardDeclined in echo {leaf.pk} (attempt 1 of 4)."
    )
    assert headline in text
    assert f"Run it again from where it stopped: manage.py conductor retry {root.pk}" in text
    assert f'<a href="{url_of(leaf)}">{leaf.pk}</a>' in page[page.index("cd-headline") : page.index("cd-refresh")]
    assert page.index("cd-headline") < page.index("<section")
    assert "cd-pill--failed" in page
    assert str(middle.pk) in page


def test_an_operators_retry_says_what_it_keeps(staff: Client) -> None:
    row = executions.running()
    transitions.record_step(row, "validate", result="1")
    transitions.fail(row, executions.FAILURE)
    assert (
        'Run it again from where it stopped, keeping the result of "validate": manage.py conductor retry'
        in Page(page_of(staff, row)).text
    )


def test_a_change_of_code_is_explained(staff: Client) -> None:
    row = executions.running()
    failure = Failure(type="conductor_app.exceptions.StepMismatch", message='Step "charge" recorded task a')
    transitions.fail(row, failure)
    assert "The code changed while this execution was in flight." in Page(page_of(staff, row)).text


def test_the_facts_are_there_and_the_id_can_be_copied_whole(staff: Client) -> None:
    row = executions.running(queue="payments", priority=7, idempotency_key="order-7", countdown=0)
    facts = Page(section(page_of(staff, row), "facts")).text
    for text in (str(row.pk), "tests.app.scenarios.echo", "payments", "7", "order-7", "1/4, in 1 run", "test@host/1"):
        assert text in facts
    for name in ("created", "started", "lease expires"):
        assert re.search(rf"{name} \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(", facts), name
    assert f'<code class="cd-page__id">{row.pk}</code>' in page_of(staff, row)


def test_a_child_names_its_parent_root_and_step(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    facts = section(page_of(staff, leaf), "facts")
    assert url_of(root) in facts
    assert url_of(middle) in facts
    assert "step &quot;charge&quot;" in facts


def test_links_to_logs_and_traces_are_those_of_the_settings(staff: Client, settings: Any) -> None:
    row = executions.running()
    assert "<dt>links</dt>" not in page_of(staff, row)
    settings.CONDUCTOR = {
        **settings.CONDUCTOR,
        "LINKS": {
            "Logs <b>": "https://logs.example.com/?q={execution_id}&r={root_id}&t={task}&from={started}&to={finished}",
            "Trace": "/traces/{trace_id}",
            "Grafana": "/d?panes={{{started_ms}-{finished_ms}}}",
        },
    }
    task = "shop.tasks/ü & <x>"
    at = dt.datetime(2026, 11, 28, 10, 15, 2, 114_000, tzinfo=dt.UTC)
    Execution.objects.filter(pk=row.pk).update(task=task, started_at=at, created_at=at)
    facts = section(page_of(staff, row), "facts")
    first, last = re.findall(r'<a href="([^"]+)" rel="noreferrer">([^<]+(?:<b>)?)</a>', facts)
    assert first[1] == "Logs &lt;b&gt;"
    query = html.unescape(first[0]).replace("+", "%2B")
    asked = parse_qs(urlsplit(query).query, strict_parsing=True)
    assert asked["q"] == asked["r"] == [str(row.pk)]
    assert asked["t"] == [task]
    assert asked["from"] == ["2026-11-28T10:15:01.114Z"]
    # It has not ended: until now.
    until = dt.datetime.fromisoformat(asked["to"][0])
    assert abs((until - dt.datetime.now(dt.UTC)).total_seconds()) < 60
    found = re.fullmatch(r"/d\?panes=\{(\d+)-(\d+)\}", last[0])
    assert found
    assert found[1] == "1795860901114"
    assert "Trace" not in facts, "it has none"


@pytest.mark.parametrize(
    ("traceparent", "shown"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", ""),
        ("nonsense", ""),
        (7, ""),
    ],
)
def test_a_link_to_a_trace_has_the_id_that_the_execution_keeps(
    staff: Client, settings: Any, traceparent: Any, shown: str
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LINKS": {"Trace": "https://jaeger.example.com/trace/{trace_id}"}}
    row = executions.running(options=json.dumps({"headers": {"traceparent": traceparent}}))
    links = re.findall(r"https://jaeger.example.com/trace/(\w*)", page_of(staff, row))
    assert links == ([shown] if shown else [])


def test_the_row_of_django_celery_results_is_linked(staff: Client) -> None:
    row = executions.running()
    assert "django-celery-results" not in page_of(staff, row)
    kept = TaskResult.objects.create(task_id=str(row.pk), status="STARTED")
    assert reverse("admin:django_celery_results_taskresult_change", args=[kept.pk]) in page_of(staff, row)


def test_the_celery_result_is_not_linked_for_those_who_may_not_see_it(viewer: Client) -> None:
    row = executions.running()
    TaskResult.objects.create(task_id=str(row.pk), status="STARTED")
    assert "django-celery-results" not in page_of(viewer, row)


# ------------------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("kind", ["invoke", "map", "gather", "sleep", "event"])
def test_a_waiting_execution_says_for_what_since_when_until_when_and_what_then(staff: Client, kind: str) -> None:
    if kind == "invoke":
        row, child = executions.family(timeout=300)
        expected = ["echo, a child.", "If it fails for good, ChildFailed is raised", "ChildTimedOut", "is cancelled"]
    elif kind == "map":
        row, _children = executions.mapping(3, timeout=300, max_parallel=2)
        expected = ["3 of 3 echo, at most 2 at once.", "resumes once", "If one fails", "ChildTimedOut"]
    elif kind == "gather":
        row, _started = executions.starting(2)
        wait = transitions.Gather("all", ["child-0", "child-1"], fails_fast=True)
        assert transitions.suspend(row, wait)
        expected = ["2 of 2 started children.", "resumes once", "no limit"]
    elif kind == "sleep":
        row, expected = executions.napping(300), ["The end of a sleep.", "It resumes by itself."]
    else:
        row = executions.running()
        assert transitions.suspend(row, transitions.AwaitEvent("approval", "approved", 300))
        send = f"Send it: manage.py conductor send {row.pk} approved --payload JSON"
        expected = ['The event "approved".', send, "EventTimedOut is raised here."]
    page = page_of(staff, row)
    panel = Page(section(page, "waiting")).text
    for text in (*expected, "since", "until"):
        assert text in panel, panel
    assert ("no limit" in panel) == (kind == "gather")
    if kind == "invoke":
        assert url_of(child) in section(page, "waiting")
        assert "▶ running" in panel


def test_a_child_that_was_started_is_not_waited_for(staff: Client) -> None:
    row, _started = executions.starting(1)
    assert transitions.suspend(row, transitions.Sleep("nap", seconds=60))
    panel = Page(section(page_of(staff, row), "waiting")).text
    assert panel.count("since") == 1
    assert "The end of a sleep." in panel


def test_only_a_waiting_execution_has_the_panel(staff: Client) -> None:
    for row in (executions.queued(), executions.running(), failed_tree()[0]):
        assert 'id="cd-waiting"' not in page_of(staff, row)


# --------------------------------------------------------------------------------------------------------------- error


def test_the_chain_leads_from_the_execution_to_the_root_cause(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    error = section(page_of(staff, root), "error")
    chain = error[error.index("<ol") : error.index("</ol>")]
    places = [chain.index(text) for text in ("this execution", url_of(middle), url_of(leaf), "shop.bank.CardDeclined")]
    assert places == sorted(places)
    assert chain.count("<li") == 3
    assert "root cause:" in chain
    details = error[error.index("<details") :]
    assert "Traceback of <bdi>echo</bdi>" in details
    assert details.index("<summary") < details.index("bank.charge(total)")


def test_frames_of_the_projects_own_code_are_marked(staff: Client) -> None:
    pieces = frames(TRACEBACK)
    assert "".join(piece.text for piece in pieces) == TRACEBACK
    assert [piece.text.split('"')[1] for piece in pieces if piece.is_own] == ["/srv/shop/tasks.py", "/srv/shop/bank.py"]
    assert all("    " in piece.text for piece in pieces if piece.is_own), "with their source"
    for foreign in (
        "/usr/lib/python3.11/json/decoder.py",
        "<frozen importlib._bootstrap>",
        "C:\\v\\site-packages\\x.py",
    ):
        assert not any(piece.is_own for piece in frames(f'  File "{foreign}", line 1, in x\n    y\n'))
    page = page_of(staff, failed_tree()[0])
    assert page.count('<span class="cd-frame">') == 2


def test_a_real_traceback_marks_the_body_that_raised(staff: Client) -> None:
    result = scenarios.grandparent_of_boom.delay(message="card declined")
    inline.run_until_idle(app)
    error = section(page_of(staff, result.id), "error")
    own = re.findall(r'<span class="cd-frame">.*?</span>(.*?)</span>', error, re.DOTALL)
    assert "raise ValueError" in own[0]
    assert all("scenarios.py" in frame for frame in own), "the frames of this package and of Celery are not marked"


def test_an_execution_that_will_be_tried_again_shows_its_last_error(staff: Client) -> None:
    row = executions.running()
    transitions.retry_later(row, executions.FAILURE, 100)
    page = page_of(staff, row)
    assert "Last error" in section(page, "error")
    assert "card declined" in section(page, "error")
    assert "cd-pill--retrying" in page


# ---------------------------------------------------------------------------------------------------------------- tree


def test_the_current_node_is_marked_once_and_the_others_are_linked(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    tree = section(page_of(staff, middle), "tree")
    assert tree.count('aria-current="true"') == 1
    current = tree[tree.index('aria-current="true"') :]
    assert url_of(leaf) in current
    assert url_of(root) in tree[: tree.index('aria-current="true"')]
    assert url_of(middle) not in tree


def test_thousands_of_children_are_a_bounded_list_with_the_failed_ones_first(staff: Client) -> None:
    parent = executions.running()
    children = children_of(parent, 4_000)
    failed = [children[number].pk for number in (1_000, 3_999)]
    error = json.dumps({"type": "ValueError", "message": "no such page"})
    Execution.objects.filter(pk__in=failed).update(status="failed", error=error)
    page = page_of(staff, parent)
    tree = section(page, "tree")
    waterfall, _, tree = tree.partition('<ul class="cd-tree">')
    assert waterfall.count('<li class="cd-depth-') == MOST_ROWS
    assert "… 3,961 more" in waterfall
    assert tree.count("<li") == tree_of_story.MOST_CHILDREN + 2
    assert "… 3,950 more" in tree
    assert list_url(parent__id__exact=parent.pk) in tree
    for key in failed:
        assert url_of(key) in tree
    assert "no such page" in tree
    assert len(page) < 120_000
    assert staff.get(list_url(parent__id__exact=parent.pk)).status_code == 200
    assert staff.get(list_url(root__id__exact=parent.pk)).status_code == 200


def test_the_tree_is_a_waterfall_in_its_order_or_the_slowest_first(staff: Client) -> None:
    parent = executions.running()
    quick, slow = children_of(parent, 2, "succeeded")
    for row, seconds in ((quick, 2), (slow, 60)):
        end = row.created_at + dt.timedelta(seconds=seconds)
        Execution.objects.filter(pk=row.pk).update(
            started_at=row.created_at, finished_at=end, due_at=None, dispatch_at=None, lease_expires_at=None
        )
    for query, order in (("", [quick, slow]), ("?tree=slowest", [slow, quick])):
        waterfall = section(staff.get(url_of(parent) + query).content.decode(), "tree").partition(
            '<ul class="cd-tree">'
        )[0]
        places = [waterfall.index(url_of(row)) for row in order]
        assert places == sorted(places)
        assert 'class="cd-bar cd-bar--succeeded"' in waterfall
        assert "60 s" in waterfall


def test_the_way_from_the_root_is_never_cut(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_of_story, "MOST_NODES", 5)
    root = executions.running()
    children_of(root, 60, step="before")
    line = [root]
    for number in range(20):
        line += children_of(line[-1], 1, "running", step=f"level-{number}", lease_expires_at=root.lease_expires_at)
    children_of(line[-1], 60, step="after")
    tree = section(page_of(staff, line[-1]), "tree")
    for row in line[:-1]:
        assert url_of(row) in tree
    assert tree.count('aria-current="true"') == 1
    assert "more in the whole tree" in tree
    assert list_url(root__id__exact=root.pk) in tree


def test_branches_below_the_third_level_are_folded_but_not_on_the_way_to_the_execution(staff: Client) -> None:
    root = executions.running()
    line, side = [root], [root]
    for _ in range(5):
        line += children_of(line[-1], 1, step="line")
        side += children_of(side[-1], 1, step="side")
    tree = section(page_of(staff, line[-1]), "tree")
    assert tree.count("<details>") == 3
    assert tree.count("<details open>") == 3
    assert tree.index("<details open>") > tree.index(url_of(line[1]))
    assert section(page_of(staff, root), "tree").count("<details>") == 6


def test_a_tree_of_a_hundred_levels_is_drawn(staff: Client) -> None:
    line = [executions.running()]
    for _ in range(100):
        line += children_of(line[-1], 1, step="down")
    for row in (line[0], line[-1]):
        page = page_of(staff, row)
        Page(page)
        assert section(page, "tree").count("cd-pill--succeeded") == 100


# -------------------------------------------------------------------------------------------------------------- tables


def test_steps_are_listed_with_outcome_duration_and_the_beginning_of_their_result(staff: Client) -> None:
    row = executions.running()
    transitions.record_step(row, "long", result=json.dumps("y" * 5_000))
    transitions.record_step(row, "none", result="null")
    transitions.record_step(row, "bad", failure=executions.FAILURE)
    child = executions.claimed(executions.invoke(row, "charge"))
    transitions.succeed(child, '{"receipt": 7}')
    steps = section(page_of(staff, row), "steps")
    text = Page(steps).text
    assert f"{'y' * 499}… (5,002 characters)" in text
    assert "y" * 500 not in text
    assert "null" in text
    assert "card declined" in text
    assert '{"receipt": 7}' in text
    assert url_of(child) in steps
    statuses = re.findall(r"[✓✕] \w+", text)
    assert statuses == ["✓ succeeded", "✓ succeeded", "✕ failed", "✓ succeeded"]


def test_of_many_steps_the_latest_are_shown_and_those_that_are_pending(
    staff: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_of_story, "MOST_STEPS", 30)
    row = executions.running()
    started = transitions.start_child(row, executions.invocation(row, "pending-one"))
    for number in range(60):
        transitions.record_step(row, f"step-{number}", result="1")
    steps = section(page_of(staff, row), "steps")
    assert "… 31 earlier" in steps
    assert f"{reverse('admin:conductor_app_step_changelist')}?q={row.pk}" in steps
    assert "step-59" in steps
    assert "step-30<" not in steps
    assert url_of(started.child_id) in steps


def test_the_mailbox_shows_what_was_taken_and_what_was_not(staff: Client) -> None:
    row = executions.running()
    api.send_event(row, "approved", {"by": "ana"}, id="mail-7")
    api.send_event(row, "approved", {"by": "ben", "token": "hunter2"})
    assert not transitions.suspend(row, transitions.AwaitEvent("approval", "approved", None))
    text = Page(section(page_of(staff, row), "events")).text
    assert '“approval” {"by": "ana"}' in text
    assert f'in the mailbox {{"by": "ben", "token": "{MASK}"}}' in text
    assert "mail-7" in text


def test_the_history_tells_what_happened_and_what_is_to_come(staff: Client) -> None:
    row, _child = executions.family(timeout=300)
    text = Page(section(page_of(staff, row), "history")).text
    order = [
        "queued in queue",
        "first run started",
        'step "child": echo queued, waits for it; no worker is held',
        'step "child": echo started after',
        'step "child" times out (to come)',
    ]
    places = [text.index(moment) for moment in order]
    assert places == sorted(places)


def test_the_log_of_the_admin_is_linked(staff: Client) -> None:
    row = executions.running()
    log = reverse("admin:conductor_app_execution_history", args=[row.pk])
    assert log in section(page_of(staff, row), "history")
    assert staff.get(log).status_code == 200


def test_statuses_are_translated(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    row = executions.running()
    catalogue = {"running": "am Laufen"}
    monkeypatch.setattr("conductor_app.admin.pieces._", lambda text: catalogue.get(text, text))
    assert "▶</span> am Laufen" in page_of(staff, row)


def test_the_command_of_a_translated_hint_is_code(staff: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    row = executions.running()
    assert transitions.suspend(row, transitions.AwaitEvent("approval", "approved", None))
    command = f"manage.py conductor send {row.pk} approved --payload JSON"
    assert f"Send it: <code>{command}</code>" in page_of(staff, row)
    catalogue = {"Send it: %(command)s": "Senden mit %(command)s"}
    monkeypatch.setattr("conductor_app.transitions.waits.event._", lambda text: catalogue.get(text, text))
    assert f"Senden mit <code>{command}</code>" in page_of(staff, row)


def test_the_timeline_stands_beside_a_table_of_the_same_times(staff: Client) -> None:
    root, middle, _leaf = failed_tree()
    timeline = section(page_of(staff, root), "timeline")
    assert timeline.count('role="img"') == 1
    assert url_of(middle) in timeline
    table = timeline[timeline.index("<table") :]
    assert table.count("<tr>") == 3
    assert "✕ failed" in table


# ------------------------------------------------------------------------------------------------- payload and result


SECRETS = json.dumps([[], {"order": 7, "user": {"Password": "hunter2"}, "api-key": ["hunter2"]}])


def test_payload_and_result_are_readable_and_masked_also_in_the_download(staff: Client) -> None:
    row = executions.running(payload=SECRETS)
    transitions.record_step(row, "login", result='{"access_token": "hunter2", "ok": true}')
    api.send_event(row, "news", {"secret": "hunter2"})
    transitions.succeed(row, json.dumps({"price": {"__type__": "decimal", "__value__": "42.00"}, "token": "hunter2"}))
    page = page_of(staff, row)
    assert "hunter2" not in page
    values = Page(section(page, "values")).text
    assert f'{{ "order": 7, "user": {{ "Password": "{MASK}" }}, "api-key": "{MASK}" }}' in values
    assert f'{{ "price": "42.00", "token": "{MASK}" }}' in values
    assert '"ok": true' in page.replace("&quot;", '"')
    for name, kept in (("payload", '"order": 7'), ("result", '"__value__": "42.00"')):
        answer = staff.get(reverse(f"admin:conductor_app_execution_{name}", args=[row.pk]))
        assert answer["Content-Disposition"] == f'attachment; filename="{name}-{row.pk}.json"'
        assert (answer["Content-Type"], answer["X-Content-Type-Options"]) == ("application/json", "nosniff")
        assert "hunter2" not in answer.content.decode()
        assert kept in answer.content.decode()
        assert url_of(row).replace("change/", f"{name}.json") in page
        json.loads(answer.content)


def test_the_setting_chooses_what_is_masked(staff: Client, settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "REDACT": ("order",)}
    page = page_of(staff, executions.running(payload=SECRETS))
    assert "hunter2" in page
    assert f"&quot;order&quot;: &quot;{MASK}&quot;" in page


def test_positional_arguments_are_shown_beside_the_others(staff: Client) -> None:
    values = Page(section(page_of(staff, executions.running(payload='[[7],{"a":1}]')), "values")).text
    assert '{ "args": [ 7 ], "kwargs": { "a": 1 } }' in values


def test_a_megabyte_is_cut_on_the_page_and_whole_in_the_download(staff: Client) -> None:
    row = executions.running(payload=json.dumps([[], {"text": "x" * 1_000_000}]))
    page = page_of(staff, row)
    assert re.search(r"… cut: all of it has 1,000,0\d\d characters\.", page)
    assert LONG_PREVIEW < len(page) < 2 * LONG_PREVIEW
    assert len(staff.get(reverse("admin:conductor_app_execution_payload", args=[row.pk])).content) > 1_000_000


def test_without_the_permission_no_payload_result_or_preview_is_read_or_shown(viewer: Client) -> None:
    row = executions.running(payload='[[],{"a":"seen-p"}]')
    transitions.record_step(row, "one", result='"seen-s"')
    api.send_event(row, "news", "seen-e")
    transitions.succeed(row, '"seen-r"')
    with CaptureQueriesContext(connection) as queries:
        page = page_of(viewer, row)
    assert "seen-" not in page
    assert "conductor_app.view_payload" in page
    quote = connection.ops.quote_name
    payload = f"{quote('conductor_app_execution')}.{quote('payload')}"
    assert not any(payload in query["sql"] for query in queries)
    for name in ("payload", "result"):
        assert viewer.get(reverse(f"admin:conductor_app_execution_{name}", args=[row.pk])).status_code == 403


def test_the_permission_alone_shows_payloads_and_the_download_needs_the_view_permission_too(viewer: Client) -> None:
    row = executions.running(payload='[[],{"a":"seen"}]')
    user = User.objects.get()
    kind = ContentType.objects.get_for_model(Execution)
    permission, _ = Permission.objects.get_or_create(codename="view_payload", content_type=kind)
    user.user_permissions.add(permission)
    assert "seen" in page_of(viewer, row)
    download = reverse("admin:conductor_app_execution_payload", args=[row.pk])
    assert viewer.get(download).status_code == 200
    user.user_permissions.remove(Permission.objects.get(codename="view_execution"))
    assert viewer.get(download).status_code == 403
    assert viewer.get(url_of(row)).status_code == 403
    viewer.logout()
    assert viewer.get(download).status_code == 302


def test_what_is_not_there_cannot_be_downloaded(staff: Client) -> None:
    row = executions.running()
    assert staff.get(reverse("admin:conductor_app_execution_result", args=[row.pk])).status_code == 404
    gone = derive_child_id(row.pk, "nobody")
    assert staff.get(reverse("admin:conductor_app_execution_payload", args=[gone])).status_code == 404
    for key in (gone, "not-an-id"):
        assert staff.get(url_of(key)).status_code == 302


# ------------------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize("who", ["superuser", "viewer"])
def test_a_page_takes_at_most_sixteen_queries_whatever_the_size_of_the_tree(client: Client, db: None, who: str) -> None:
    user = User.objects.create_user("ben", is_staff=True, is_superuser=who == "superuser")
    user.user_permissions.set(Permission.objects.filter(codename__in=["view_execution", "view_taskresult"]))
    client.force_login(user)
    numbers = []
    for size in (0, 57):
        root, middle, leaf = failed_tree()
        children_of(root, size)
        api.send_event(executions.running(), "news", 1)
        for row in (root, middle, leaf):
            TaskResult.objects.create(task_id=str(row.pk), status="FAILURE")
        page_of(client, root)  # a process asks for its content types once
        with CaptureQueriesContext(connection) as queries:
            page = page_of(client, root)
        assert page.count('aria-current="true"') >= 1
        numbers.append(len(queries))
        assert Execution.objects.filter(root_id=root.pk).count() == 3 + size
    assert numbers[0] == numbers[1] <= 16, numbers


def test_a_running_page_and_one_of_a_deep_tree_take_no_more(staff: Client) -> None:
    line = [executions.running()]
    for _ in range(60):
        line += children_of(line[-1], 1, step="down")
    plain = executions.running(options='{"plain":{"acks_late":false}}')
    for row in (*line[::30], plain):
        with CaptureQueriesContext(connection) as queries:
            page_of(staff, row)
        assert len(queries) <= 15


def test_no_query_reads_the_payloads_of_the_tree(staff: Client) -> None:
    parent, _children = executions.mapping(3)
    Execution.objects.filter(parent=parent).update(payload='[["from the tree"],{}]')
    with CaptureQueriesContext(connection) as queries:
        page = page_of(staff, parent)
    assert "from the tree" not in page
    assert sum('"payload"' in query["sql"] or "`payload`" in query["sql"] for query in queries) <= 2


# ------------------------------------------------------------------------------------------------- whatever is stored


def hostile() -> Execution:
    """A tree in which every text that somebody can write is hostile."""
    row = executions.running(
        task=f"shop.{EVIL}", queue=EVIL, idempotency_key=EVIL, payload=json.dumps([[], {EVIL: EVIL}])
    )
    transitions.record_step(row, EVIL, result=json.dumps(EVIL))
    child = executions.claimed(executions.invoke(row, f"{EVIL} 2", task=f"shop.{EVIL}"))
    for target in (row, child):
        api.send_event(target, "approved", EVIL)
    failure = Failure(type=EVIL, message=EVIL, traceback=f'  File "{EVIL}", line 1\n    {EVIL}\n')
    transitions.fail(child, failure)
    run = executions.claimed(row)
    transitions.fail(run, failure, step=f"{EVIL} 2", child_id=child.pk)
    Execution.objects.filter(pk=row.pk).update(lease_owner=EVIL, cancel_reason=EVIL)
    Event.objects.update(name=EVIL, key=EVIL)
    return executions.fresh(row)


def test_hostile_texts_are_shown_and_not_obeyed(staff: Client) -> None:
    row = hostile()
    child = Execution.objects.get(parent=row)
    for execution in (row, child):
        page = page_of(staff, execution)
        parsed = Page(page)
        assert "<script>alert" not in page
        assert "onclick" not in {name for _, attrs in parsed.tags for name in attrs}
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", page)
        assert r"\u202etxt\u200f\x07\x1b[2J" in parsed.text
    answer = staff.get(reverse("admin:conductor_app_execution_payload", args=[row.pk]))
    assert "\u202e" not in answer.content.decode()


def test_halves_of_characters_are_spelled_out(staff: Client) -> None:
    row = executions.running(payload=r'[[],{"a":"\ud83d"}]')
    transitions.record_step(row, "one", result=r'"\udc00"')
    page = page_of(staff, row)
    assert r"\ud83d" in page
    assert r"\udc00" in page
    assert staff.get(reverse("admin:conductor_app_execution_payload", args=[row.pk])).status_code == 200


@pytest.mark.parametrize("text", ["not JSON", "{", "", "[]", "null", "7", '"x"', "[1,2]", "[" * 3_000, '[[],{"a":1}'])
@pytest.mark.parametrize("status", ["failed", "running"])
def test_broken_json_in_any_column_does_not_break_the_page(staff: Client, text: str, status: str) -> None:
    row = failed_tree()[0] if status == "failed" else executions.running()
    if status == "running":
        transitions.record_step(row, "one", result="1")
        api.send_event(row, "news", 1)
    Execution.objects.all().update(payload=text, result=text, error=text, options=f'"plain"{text}')
    Step.objects.all().update(result=text, error=text, kind="unheard-of")
    Event.objects.all().update(payload=text)
    Execution.objects.filter(status="running").update(lease_expires_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    Page(page_of(staff, row))
    for name in ("payload", "result"):
        assert staff.get(reverse(f"admin:conductor_app_execution_{name}", args=[row.pk])).status_code == 200


def test_a_secret_in_broken_json_is_withheld(staff: Client) -> None:
    row = executions.running(payload="{'password': 'hunter2'}")
    assert "hunter2" not in page_of(staff, row)
    assert WITHHELD in Page(page_of(staff, row)).text
    assert b"hunter2" not in staff.get(reverse("admin:conductor_app_execution_payload", args=[row.pk])).content


def test_a_child_a_failure_and_steps_that_were_deleted_leave_the_page_whole(staff: Client) -> None:
    root, _middle, leaf = failed_tree()
    FailedExecution.objects.filter(pk=leaf.pk).delete()
    page = page_of(staff, root)
    assert "no funds" in section(page, "error")
    Execution.objects.filter(pk=leaf.pk)._raw_delete(connection.alias)
    Page(page_of(staff, root))
    FailedExecution.objects.all().delete()
    Page(page_of(staff, root))


def test_a_waiting_execution_whose_child_is_gone_says_so(staff: Client) -> None:
    parent, child = executions.family()
    Execution.objects.filter(pk=child.pk)._raw_delete(connection.alias)
    assert f"The row of {child.pk} is gone." in Page(section(page_of(staff, parent), "waiting")).text


def test_a_child_whose_parent_is_gone_says_so(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    missing = derive_child_id(root.pk, "never")
    with connection.constraint_checks_disabled():
        Execution.objects.filter(pk=middle.pk).update(parent_id=missing, root_id=missing)
        Execution.objects.filter(pk=leaf.pk).update(root_id=missing)
        try:
            for row in (middle, leaf):
                page = page_of(staff, row)
                Page(page)
                assert ("The row of its parent is gone" in page) == (row.pk == middle.pk)
        finally:
            Execution.objects.filter(pk=middle.pk).update(parent_id=root.pk, root_id=root.pk)


def test_rows_that_are_each_others_parents_end_somewhere(staff: Client) -> None:
    root, middle, leaf = failed_tree()
    Execution.objects.filter(pk=middle.pk).update(parent_id=leaf.pk)
    for row in (root, middle, leaf):
        Page(page_of(staff, row))


# ----------------------------------------------------------------------------------------------------- rules of the web


@pytest.mark.parametrize("arrange", ["failed", "waiting", "hostile"])
def test_the_page_obeys_the_strictest_content_security_policy(staff: Client, arrange: str) -> None:
    arranged = {"failed": lambda: failed_tree()[0], "waiting": lambda: executions.mapping(3)[0], "hostile": hostile}
    row = arranged[arrange]()
    for tag, attrs in Page(page_of(staff, row)).tags:
        assert tag != "style"
        assert tag != "script" or (attrs.get("src") or "").startswith("/static/"), attrs
        assert "style" not in attrs, (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert not (attrs.get("href") or "").lower().startswith(("javascript:", "data:")), attrs


def test_the_page_changes_nothing_and_edits_nothing(staff: Client) -> None:
    row = executions.running()
    assert staff.post(url_of(row), {"status": "succeeded"}).status_code == 403
    page = page_of(staff, row)
    content = page[page.index('id="content-main"') : page.index("</main>")]
    assert 'method="post"' not in content, "its buttons only ask"
    assert "<script" not in content


def test_ids_on_the_page_are_unique_and_labels_lead_somewhere(staff: Client) -> None:
    tags = Page(page_of(staff, hostile())).tags
    ids = [attrs["id"] for _, attrs in tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for _, attrs in tags:
        for key in (attrs.get("aria-labelledby") or "").split():
            assert key in ids, key


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("5", 5), ("15", 15), ("1", 5), ("7", 15), ("99999999999999999999", 15), ("0", None), ("-5", None), ("x", None)],
)
def test_the_page_loads_itself_again_if_its_address_asks_for_it(staff: Client, asked: str, seconds: int | None) -> None:
    row = executions.running()
    response = staff.get(url_of(row), {"refresh": asked})
    assert response.headers.get("Refresh") == (None if seconds is None else str(seconds))


def test_the_links_for_loading_again_keep_the_rest_of_the_address() -> None:
    links = refresh.links(RequestFactory().get("/", {"q": "a b", "refresh": "5"}))
    assert [(link.url, link.is_current) for link in links] == [
        ("?q=a+b&refresh=5", True),
        ("?q=a+b&refresh=15", False),
        ("?q=a+b", False),
    ]
    assert [link.is_current for link in refresh.links(RequestFactory().get("/"))] == [False, False, True]


def test_only_a_page_that_was_found_loads_itself_again() -> None:
    request = RequestFactory().get("/", {"refresh": "5"})
    missing = HttpResponse(status=404)
    refresh.apply_refresh(request, missing)
    assert "Refresh" not in missing.headers


# ------------------------------------------------------------------------------------------------------- other projects


@pytest.fixture
def other_site(settings: Any) -> Iterator[AdminSite]:
    """A project whose only admin is a site of its own, with executions and nothing else."""
    site = AdminSite(name="ops")
    site.register(Execution, ExecutionAdmin)
    site.has_permission = lambda request: not isinstance(request.user, AnonymousUser)  # type: ignore[method-assign]
    urls = types.ModuleType("tests.ops_urls")
    urls.urlpatterns = [path("ops/", site.urls)]  # type: ignore[attr-defined]
    sys.modules[urls.__name__] = urls
    settings.ROOT_URLCONF = urls.__name__
    yield site
    del sys.modules[urls.__name__]


def test_a_site_of_ones_own_keeps_its_links(staff: Client, other_site: AdminSite) -> None:
    root, middle, leaf = failed_tree()
    TaskResult.objects.create(task_id=str(root.pk), status="FAILURE")
    page = page_of(staff, root)
    assert url_of(root).startswith("/ops/")
    links = [link for link in Page(page).links() if not link.startswith(("#", "?"))]
    assert all(link.startswith(("/ops/", "/")) and "/admin/" not in link for link in links), links
    assert url_of(leaf) in links
    assert url_of(middle) in links
    assert staff.get(reverse("admin:conductor_app_execution_payload", args=[root.pk])).status_code == 200


def test_a_project_in_another_language_with_separators_gets_a_whole_page(staff: Client, settings: Any) -> None:
    settings.LANGUAGE_CODE, settings.USE_THOUSAND_SEPARATOR, settings.USE_TZ = "de", True, True
    parent, _children = executions.mapping(3)
    page = page_of(staff, parent)
    Page(page)
    assert not re.search(r'(width|x|y|height)="[\d.]*,', page)
