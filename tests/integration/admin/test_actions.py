"""What an operator does in the admin: who may, what is asked, what happens, and what is said and noted afterwards."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from conductor_app import api, transitions
from conductor_app.admin import selection
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.process import process
from tests.support import executions
from tests.support.process import NotingBroker, note_published

LIST = "admin:conductor_app_execution_changelist"
FAILURES = "admin:conductor_app_failedexecution_changelist"
ALL = ["retry", "rerun", "fork", "cancel", "wake", "send", "publish"]
#: What lists do not offer.
FOR_ONE = ["fork"]
PERMISSIONS = {
    "retry_execution": ["retry", "rerun", "wake", "publish"],
    "fork_execution": ["fork"],
    "cancel_execution": ["cancel"],
    "send_event": ["send"],
}


@pytest.fixture(autouse=True)
def published(db: None) -> list[uuid.UUID]:
    """Ids of the executions whose messages were published; there is no broker."""
    return note_published()


@pytest.fixture
def ana(client: Client) -> Client:
    """A browser of somebody who may do everything."""
    client.force_login(User.objects.create_superuser("ana"))
    return client


def who_may(client: Client, *codenames: str) -> Client:
    """Log somebody in who may see executions and failures, and has these permissions."""
    user = User.objects.create_user("ben", is_staff=True)
    wanted = ["view_execution", "view_failedexecution", *codenames]
    user.user_permissions.set(Permission.objects.filter(codename__in=wanted))
    assert user.user_permissions.count() == len(wanted)
    client.force_login(user)
    return client


def act_url(name: str, pk: uuid.UUID) -> str:
    return reverse("admin:conductor_app_execution_act", args=[pk, name])


def page_url(pk: uuid.UUID) -> str:
    return reverse("admin:conductor_app_execution_change", args=[pk])


def buttons(client: Client, pk: uuid.UUID) -> list[str]:
    response = client.get(page_url(pk))
    assert response.status_code == 200
    return [button.name for button in response.context["conductor_actions"]]


def said(response: Any) -> str:
    """The message that the next page shows."""
    return " | ".join(str(message) for message in response.context["messages"])


def post(client: Client, name: str, pk: uuid.UUID, **data: Any) -> Any:
    return client.post(act_url(name, pk), {"key": "k", **data}, follow=True)


def ask(client: Client, name: str, *pks: uuid.UUID, url: str = LIST, query: str = "", **data: Any) -> Any:
    """Choose an action for rows of a list, and return the page that asks."""
    form = {"action": f"{name}_selected", "index": "0", "_selected_action": [str(pk) for pk in pks], **data}
    return client.post(reverse(url) + query, form)


def confirm(client: Client, asked: Any, **data: Any) -> Any:
    """Say yes on the page that asks."""
    form = {"ids": asked.context["ids"], "list": asked.context["list"], "key": "k", **data}
    return client.post(asked.context["act_url"], form, follow=True)


def failed(**fields: Any) -> Execution:
    run = executions.running(**fields)
    transitions.fail(run, executions.FAILURE)
    return run


def failed_family() -> tuple[Execution, Execution]:
    parent, child = executions.family()
    transitions.fail(child, executions.FAILURE)
    parent = executions.claimed(parent)
    transitions.fail(parent, executions.FAILURE, step="child", child_id=child.pk)
    return parent, child


def fresh(execution: Execution) -> Execution:
    return Execution.objects.get(pk=execution.pk)


# --------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("codename", [None, *PERMISSIONS])
def test_each_action_takes_its_permission(client: Client, codename: str | None) -> None:
    ben = who_may(client, *([codename] if codename else []))
    parent, _child = executions.family()
    late = executions.queued()
    Execution.objects.filter(pk=late.pk).update(due_at=clock.after(-100))
    ended, asleep = failed(), executions.napping()
    shown = {name for row in (parent, late, ended, asleep) for name in buttons(ben, row.pk)}
    allowed = set(PERMISSIONS.get(codename or "", []))
    assert shown == allowed
    offered = ben.get(reverse(LIST)).content.decode()
    before = list(Execution.objects.order_by("pk").values())
    for name in ALL:
        is_offered = name in allowed and name not in FOR_ONE
        assert (f'value="{name}_selected"' in offered) == is_offered, name
        if name not in allowed:
            assert ben.get(act_url(name, ended.pk)).status_code == 403
            assert ben.post(act_url(name, ended.pk), {"event": "x", "key": "k"}).status_code == 403
            url = reverse("admin:conductor_app_execution_act_selected", args=[name])
            assert ben.post(url, {"ids": str(ended.pk)}).status_code == 403
            assert ask(ben, name, ended.pk).status_code in (200, 302)  # the list again: there is no such action
    assert list(Execution.objects.order_by("pk").values()) == before
    assert not LogEntry.objects.exists()


def test_who_may_not_see_executions_may_not_act_on_them(client: Client) -> None:
    user = User.objects.create_user("ben", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=PERMISSIONS))
    client.force_login(user)
    ended = failed()
    assert client.post(act_url("retry", ended.pk)).status_code == 403
    assert client.post(reverse(LIST), {"action": "retry_selected", "_selected_action": [ended.pk]}).status_code == 403
    user.is_staff = False
    user.save()
    assert client.post(act_url("retry", ended.pk)).status_code == 302  # to the login
    assert fresh(ended).status == ExecutionStatus.FAILED


def test_a_post_without_the_csrf_token_is_refused(ana: Client) -> None:
    ended = failed()
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = ana.cookies
    assert strict.post(act_url("retry", ended.pk)).status_code == 403
    selected = reverse("admin:conductor_app_execution_act_selected", args=["retry"])
    assert strict.post(selected, {"ids": str(ended.pk)}).status_code == 403
    assert fresh(ended).status == ExecutionStatus.FAILED


@pytest.mark.parametrize("name", ALL)
def test_asking_changes_nothing(ana: Client, name: str) -> None:
    rows = [executions.running(), failed(), executions.napping(), executions.queued(countdown=100), executions.queued()]
    before = list(Execution.objects.order_by("pk").values()), list(Step.objects.values())
    for row in rows:
        assert ana.get(act_url(name, row.pk)).status_code == 200
    asked = ask(ana, name, *(row.pk for row in rows))
    assert asked.status_code == (302 if name in FOR_ONE else 200)  # the list again: it does not offer that
    assert (list(Execution.objects.order_by("pk").values()), list(Step.objects.values())) == before
    selected = reverse("admin:conductor_app_execution_act_selected", args=[name])
    assert ana.get(selected).status_code == (404 if name in FOR_ONE else 405)
    assert ana.put(act_url(name, rows[0].pk)).status_code == 405


def test_what_does_not_exist_is_not_found(ana: Client) -> None:
    assert ana.post(act_url("retry", uuid.uuid4())).status_code == 404
    assert ana.post(act_url("drop-table", failed().pk)).status_code == 404


def test_an_execution_is_still_not_edited(ana: Client) -> None:
    ended = failed()
    assert ana.post(page_url(ended.pk), {"status": "succeeded"}).status_code == 403
    page = ana.get(page_url(ended.pk)).content.decode()
    assert 'name="_save"' not in page
    assert "delete_selected" not in ana.get(reverse(LIST)).content.decode()


# ------------------------------------------------------------------------------------------------- one execution's page


def test_a_page_offers_what_is_possible(ana: Client) -> None:
    parent, child = executions.family()
    assert buttons(ana, parent.pk) == buttons(ana, child.pk) == ["cancel", "send", "hold"]
    assert buttons(ana, executions.napping().pk) == ["cancel", "wake", "send", "hold"]
    assert buttons(ana, executions.queued(countdown=100).pk) == ["cancel", "wake", "send", "hold"]
    assert buttons(ana, executions.queued().pk) == ["cancel", "send", "hold"]
    held = executions.queued(countdown=100)
    api.hold(held, "bank incident")
    assert buttons(ana, held.pk) == ["cancel", "send", "release"]
    late = executions.queued()
    Execution.objects.filter(pk=late.pk).update(due_at=clock.after(-100))
    assert buttons(ana, late.pk) == ["cancel", "send", "publish", "hold"]
    done = executions.running()
    transitions.succeed(done, "1")
    assert buttons(ana, done.pk) == ["rerun", "fork"]
    assert buttons(ana, failed().pk) == ["retry", "rerun", "fork"]
    api.cancel(child)
    assert buttons(ana, child.pk) == ["send"]  # it is asked to stop already


def test_a_failed_childs_page_leads_to_its_root(ana: Client) -> None:
    parent, child = failed_family()
    assert buttons(ana, child.pk) == ["retry-root"]
    assert act_url("retry", parent.pk) in ana.get(page_url(child.pk)).content.decode()
    assert page_url(parent.pk) in ana.get(act_url("retry", child.pk)).content.decode()
    answer = post(ana, "retry", child.pk)
    assert f"Retry the root {parent.pk} instead" in said(answer)
    assert fresh(child).status == ExecutionStatus.FAILED
    post(ana, "retry", parent.pk)
    assert buttons(ana, child.pk) == ["cancel", "send", "hold"]


def test_the_buttons_take_one_query(ana: Client, rf: Any) -> None:
    request = rf.get("/")
    request.user = User.objects.get()
    request.user.has_perm("x")
    admin = site_admin()
    with CaptureQueriesContext(connection) as queries:
        assert admin.conductor_actions(request, failed())
    assert len([query for query in queries if query["sql"].startswith("SELECT") and "offers_" in query["sql"]]) == 1


def site_admin() -> Any:
    from django.contrib.admin import site

    return site._registry[Execution]


def test_a_retry_runs_it_again(ana: Client) -> None:
    parent, child = failed_family()
    asked = ana.get(act_url("retry", parent.pk)).content.decode()
    assert "Finished steps keep their results" in asked
    answer = post(ana, "retry", parent.pk)
    assert answer.redirect_chain == [(page_url(parent.pk), 302)]
    assert said(answer) == "The execution is retried."
    assert (fresh(parent).status, fresh(child).status) == ("waiting", "queued")
    answer = post(ana, "retry", parent.pk)
    assert said(answer) == f"Execution {parent.pk} is waiting. Only a failed or cancelled one can be retried."


def test_a_rerun_leads_to_the_new_execution(ana: Client) -> None:
    ended = failed(payload='[[7],{"a":1}]')
    answer = post(ana, "rerun", ended.pk)
    created = Execution.objects.exclude(pk=ended.pk).get()
    assert answer.redirect_chain == [(page_url(created.pk), 302)]
    assert said(answer) == f"This is the new execution, started from {ended.pk}."
    assert (created.status, created.payload) == ("queued", ended.payload)
    assert str(LogEntry.objects.get().change_message) == f"Run again as new execution {created.pk}."


def test_the_same_form_sent_twice_starts_one_new_execution(ana: Client) -> None:
    ended, other = failed(), failed()
    (key,) = re.findall(r'name="key" value="([^"]+)"', ana.get(act_url("rerun", ended.pk)).content.decode())
    first, second = (post(ana, "rerun", ended.pk, key=key) for _ in range(2))
    created = Execution.objects.exclude(pk__in=[ended.pk, other.pk]).get()
    assert first.redirect_chain == second.redirect_chain == [(page_url(created.pk), 302)]
    # The key is the form's, and a form may be about several executions.
    post(ana, "rerun", other.pk, key=key)
    assert Execution.objects.count() == 4


def test_a_cancellation_says_who_else_is_concerned(ana: Client) -> None:
    root = executions.running()
    child = executions.claimed(executions.invoke(root))
    grandchild = executions.invoke(child)
    asked = ana.get(act_url("cancel", root.pk)).content.decode()
    assert "<strong>2</strong> unfinished descendants are cancelled too." in asked
    assert "ChildCancelled" not in asked
    asked = ana.get(act_url("cancel", child.pk)).content.decode()
    assert "<strong>1</strong> unfinished descendant is cancelled too." in asked
    assert "Its parent gets <code>ChildCancelled</code> at step &quot;child&quot;" in asked.replace('"', "&quot;")
    assert str(root.pk) in asked
    assert "There are no unfinished descendants." in ana.get(act_url("cancel", grandchild.pk)).content.decode()
    answer = post(ana, "cancel", child.pk, reason="wrong order")
    assert said(answer) == "The execution is cancelled."
    assert fresh(child).cancel_reason == "wrong order"
    assert fresh(grandchild).status == "cancelled"
    assert fresh(root).status == "queued"
    assert said(post(ana, "cancel", child.pk)) == "Nothing was done: ended already."


def test_a_running_body_is_only_asked_to_stop(ana: Client) -> None:
    run = executions.running()
    assert said(post(ana, "cancel", run.pk)) == (
        "The execution is to be cancelled: its body stops at its next ctx call."
    )
    assert fresh(run).status == "running"
    assert fresh(run).cancel_requested_at is not None


def test_what_a_person_writes_is_shown_as_text(ana: Client) -> None:
    run = executions.queued()
    script = "<script>alert(1)</script>"
    post(ana, "cancel", run.pk, reason=script)
    history = ana.get(reverse("admin:conductor_app_execution_history", args=[run.pk])).content.decode()
    assert script not in history
    assert "&lt;script&gt;" in history
    assert script not in ana.get(page_url(run.pk)).content.decode()
    answer = ana.post(act_url("send", executions.queued().pk), {"event": script, "payload": script, "key": "k"})
    assert answer.status_code == 200
    assert script not in answer.content.decode()


def test_a_sleeper_is_woken(ana: Client, published: list[uuid.UUID], django_capture_on_commit_callbacks: Any) -> None:
    asleep = executions.napping()
    with django_capture_on_commit_callbacks(execute=True):
        assert said(post(ana, "wake", asleep.pk)) == "The execution is woken."
    assert fresh(asleep).status == "queued"
    assert Step.objects.get(execution=asleep).status == StepStatus.SUCCEEDED
    assert published == [asleep.pk]
    assert "is queued and due already" in said(post(ana, "wake", asleep.pk))


def test_a_message_is_published_again(ana: Client, published: list[uuid.UUID]) -> None:
    late = executions.queued()
    assert said(post(ana, "publish", late.pk)) == "The message is published again."
    assert published == [late.pk]


def test_a_broker_that_is_away_is_no_success(ana: Client) -> None:
    process.broker = NotingBroker(is_away=True)
    late = executions.queued()
    assert "The broker did not take the message." in said(post(ana, "publish", late.pk))
    assert not LogEntry.objects.exists()


def test_an_event_is_sent_once_however_often_the_form_is(ana: Client) -> None:
    run = executions.running()
    assert transitions.suspend(run, transitions.AwaitEvent("approval", "approved", None))
    asked = ana.get(act_url("send", run.pk))
    form = asked.context["form"]
    assert form["event"].value() == "approved", "it is what the execution waits for"
    data = {"event": "approved", "payload": '{"yes": true}', "key": form["key"].value()}
    assert said(ana.post(act_url("send", run.pk), data, follow=True)) == "The event is sent."
    assert Step.objects.get(execution=run).get_result() == {"yes": True}
    assert said(ana.post(act_url("send", run.pk), data, follow=True)) == "Nothing was done: sent already."
    assert Event.objects.count() == 1
    assert str(LogEntry.objects.get().change_message) == "Sent the event 'approved'."


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"event": "approved", "payload": "yes"}, "This is not JSON: Expecting value: line 1 column 1 (char 0)."),
        ({"event": "approved", "payload": "NaN"}, "NaN at payload is not JSON. Pass None or a string."),
        ({"event": "approved", "payload": "[" * 100_000}, "This is not JSON"),
        ({"event": "a b"}, "Event name 'a b' must match"),
        ({"event": ""}, "This field is required."),
    ],
)
def test_a_bad_event_is_refused_with_the_form(ana: Client, data: dict[str, str], error: str) -> None:
    run = executions.queued()
    answer = ana.post(act_url("send", run.pk), {"key": "k", **data})
    assert answer.status_code == 200
    assert any(error in text for errors in answer.context["form"].errors.values() for text in errors)
    assert not Event.objects.exists()
    assert not LogEntry.objects.exists()


# ------------------------------------------------------------------------------------------------------------ in bulk


def test_selected_ones_are_retried_and_counted(ana: Client) -> None:
    (parent, child), alone, open_one = failed_family(), failed(), executions.queued()
    asked = ask(ana, "retry", parent.pk, child.pk, alone.pk, open_one.pk)
    page = asked.content.decode()
    assert "<strong>4</strong> executions are selected." in page
    assert "possible for <strong>2</strong> of them" in page
    answer = confirm(ana, asked)
    # The root first: by the time that the child's turn comes, it is queued again.
    assert said(answer) == "2 retried, 2 skipped: not failed or cancelled."
    assert answer.redirect_chain[-1][0] == reverse(LIST)
    assert {entry.object_id for entry in LogEntry.objects.all()} == {str(parent.pk), str(alone.pk)}


def test_refusals_are_counted_by_their_reasons(ana: Client) -> None:
    _parent, child = failed_family()
    done = executions.running()
    transitions.succeed(done, "1")
    answer = confirm(ana, ask(ana, "retry", failed().pk, child.pk, done.pk))
    assert said(answer) == (
        "1 retried, 1 skipped: not failed or cancelled, "
        "1 refused: a child, whose parent has seen the outcome: retry the root."
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rerun", {}, "1 run again as new, 4 skipped: not ended."),
        ("cancel", {"reason": "closing time"}, "4 cancelled, 1 skipped: ended already."),
        ("wake", {}, "2 woken, 3 skipped: "),
        ("send", {"event": "approved"}, "4 sent the event, 1 skipped: ended already."),
        ("publish", {}, "1 published again, 4 skipped: "),
    ],
)
def test_each_action_works_on_many(ana: Client, name: str, data: dict[str, str], message: str) -> None:
    rows = [executions.queued(), executions.queued(countdown=100), executions.napping(), executions.running(), failed()]
    asked = ask(ana, name, *(row.pk for row in rows))
    assert asked.context["skipped"] == 5 - int(message.split(maxsplit=1)[0])
    answer = confirm(ana, asked, **data)
    assert said(answer).startswith(message)
    assert LogEntry.objects.count() == int(message.split(maxsplit=1)[0])


def test_what_has_changed_between_the_question_and_the_answer_is_skipped(ana: Client) -> None:
    first, second, third = failed(), failed(), failed()
    asked = ask(ana, "retry", first.pk, second.pk, third.pk)
    api.retry(first)
    FailedExecution.objects.filter(pk=third.pk)._raw_delete(connection.alias)
    Execution.objects.filter(pk=third.pk)._raw_delete(connection.alias)
    assert said(confirm(ana, asked)) == "1 retried, 1 skipped: not failed or cancelled."


def test_what_changes_during_the_work_is_skipped(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [failed(), failed()]
    asked = ask(ana, "retry", *(row.pk for row in rows))
    retry = api.retry

    def retry_both(execution: Execution) -> None:
        monkeypatch.setattr(api, "retry", retry)
        for row in rows:
            retry(row)

    monkeypatch.setattr(api, "retry", retry_both)
    assert said(confirm(ana, asked)) == "1 retried, 1 skipped: not failed or cancelled."


def test_an_event_for_many_needs_a_valid_form_and_keeps_the_selection(ana: Client) -> None:
    rows = [executions.queued(), executions.queued()]
    asked = ask(ana, "send", *(row.pk for row in rows), query="?status__exact=queued")
    again = confirm(ana, asked, event="approved", payload="yes")
    assert "This is not JSON" in again.content.decode()
    assert sorted(again.context["ids"].split(",")) == sorted(str(row.pk) for row in rows)
    answer = confirm(ana, again, event="approved", payload='"yes"')
    assert said(answer) == "2 sent the event."
    assert answer.redirect_chain[-1][0] == reverse(LIST) + "?status__exact=queued"


def test_all_that_match_are_taken_whatever_page_they_stand_on(ana: Client) -> None:
    for _ in range(55):
        failed()
    other = executions.queued()
    first = Execution.objects.filter(status="failed").first()
    asked = ask(ana, "retry", first.pk, query="?status__exact=failed", select_across="1")
    assert asked.context["total"] == 55
    assert said(confirm(ana, asked)) == "55 retried."
    assert not Execution.objects.filter(status="failed").exists()
    assert fresh(other).status == "queued"


def test_more_than_the_limit_are_not_taken_and_that_is_said(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BULK_LIMIT", 3)
    rows = [failed() for _ in range(5)]
    asked = ask(ana, "retry", rows[0].pk, select_across="1")
    assert asked.context["total"] == 3
    assert "More match. These are the first 3" in asked.content.decode()
    assert said(confirm(ana, asked)) == "3 retried."
    assert Execution.objects.filter(status="failed").count() == 2
    forged = {"ids": ",".join(str(failed().pk) for _ in range(5))}
    assert said(ana.post(asked.context["act_url"], forged, follow=True)) == "3 retried."


def test_failed_executions_are_retried_from_their_own_list(ana: Client) -> None:
    (parent, child), alone = failed_family(), failed()
    page = ana.get(reverse(FAILURES)).content.decode()
    assert 'value="retry_selected"' in page
    assert 'value="rerun_selected"' in page
    assert 'value="cancel_selected"' not in page
    asked = ask(ana, "retry", parent.pk, child.pk, alone.pk, url=FAILURES)
    answer = confirm(ana, asked)
    assert answer.redirect_chain[-1][0] == reverse(FAILURES)
    assert said(answer).startswith("2 retried")
    assert not FailedExecution.objects.exists()
    assert set(LogEntry.objects.values_list("content_type__model", flat=True)) == {"execution"}


def test_a_list_that_hides_rows_acts_on_none_of_them(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that narrows ``get_queryset``, by tenant for example, narrows the actions with it."""
    mine, other = failed(), failed()
    admin = site_admin()
    monkeypatch.setattr(
        type(admin), "get_queryset", lambda self, request: Execution.objects.filter(pk=mine.pk), raising=False
    )
    url = reverse("admin:conductor_app_execution_act_selected", args=["retry"])
    assert said(ana.post(url, {"ids": f"{mine.pk},{other.pk},nonsense"}, follow=True)) == "1 retried."
    assert ana.post(act_url("retry", other.pk)).status_code == 404
    assert fresh(other).status == "failed"


def test_the_work_is_not_one_transaction_with_atomic_requests() -> None:
    view: Callable[..., Any] = next(
        pattern.callback
        for pattern in site_admin().get_urls()
        if pattern.name == "conductor_app_execution_act_selected"
    )
    assert view._non_atomic_requests == {"default"}


def test_a_page_counts_descendants_up_to_a_limit(ana: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "COUNT_LIMIT", 2)
    parent, _children = executions.mapping(4)
    asked = ana.get(act_url("cancel", parent.pk)).content.decode()
    assert "More than <strong>2</strong> unfinished descendants are cancelled too." in asked


def test_parents_that_are_told_are_counted(ana: Client) -> None:
    families = [executions.family() for _ in range(2)]
    asked = ask(ana, "cancel", *(child.pk for _parent, child in families)).content.decode()
    assert "<strong>2</strong> parents that wait get <code>ChildCancelled</code>" in asked
    everybody = [row.pk for family in families for row in family]
    assert "ChildCancelled" not in ask(ana, "cancel", *everybody).content.decode()


def test_the_history_of_an_execution_says_who_did_what(ana: Client) -> None:
    ended = failed()
    post(ana, "retry", ended.pk)
    entry = LogEntry.objects.get()
    assert (entry.user.get_username(), entry.object_id) == ("ana", str(ended.pk))
    assert entry.get_edited_object() == ended
    history = ana.get(reverse("admin:conductor_app_execution_history", args=[ended.pk])).content.decode()
    assert "Retried from the failed step." in history
