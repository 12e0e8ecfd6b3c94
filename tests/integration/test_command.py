"""``manage.py conductor``: what it shows, what it does, and how it ends."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.core.management import call_command
from django.core.management.base import CommandParser
from django.db import connection
from django.test.utils import CaptureQueriesContext

from conductor_app import api, checks, transitions
from conductor_app.exceptions import Failure
from conductor_app.host import inline
from conductor_app.management.commands.conductor import SUBCOMMANDS, Command
from conductor_app.management.subcommands import doctor, open_work
from conductor_app.models import Event, Execution, FailedExecution, Step, Worker
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.telling import steps, tree
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app import origin, scenarios
from tests.support import executions
from tests.support.command import Terminal, Told, told
from tests.support.polling import wait_until
from tests.support.process import NotingBroker
from tests.support.worker import ROOT

pytestmark = pytest.mark.django_db
EMBEDDED = dispatch.is_embedded(app)
NOBODY = "01a204e4-550f-76ed-ae8b-b0cbcb0a4470"


@pytest.fixture(autouse=True)
def _steady_clock() -> Iterator[None]:
    yield
    clock.reset()


@pytest.fixture
def quiet_broker() -> None:
    """Nothing is published: these tests are about the command."""
    process.broker = NotingBroker()


# ------------------------------------------------------------------------------------------------------------------- ls


def test_ls_lists_the_newest_first_with_status_attempt_step_and_error() -> None:
    failed = scenarios.parent_of_boom.delay(message="card declined\nsecond line").id
    waiting = scenarios.naps.delay(seconds=600).id
    inline.run_until_idle(app)
    queued = executions.queued().pk
    lines = told("ls", "--root-only").out.splitlines()
    assert lines[0].split() == ["id", "task", "status", "attempt", "step", "ran", "age", "error"]
    assert [line.split()[0] for line in lines[1:]] == [str(queued), waiting, failed]
    assert lines[1].split()[1:5] == ["echo", "○", "queued", "1/4"]
    assert lines[2].split()[1:6] == ["naps", "◐", "sleeping", "1/4", "nap"]
    assert lines[3].split()[1:6] == ["parent_of_boom", "✕", "failed", "1/1", "charge"]
    assert lines[3].endswith("Child execution failed: card declined")


def test_ls_filters() -> None:
    parent, child = executions.family(queue="payments")
    other = executions.queued(task="tests.app.scenarios.slow")

    def ids(*words: str) -> set[str]:
        return {row["id"] for row in told("ls", "--json", *words).json["executions"]}

    assert ids() == {str(parent.pk), str(child.pk), str(other.pk)}
    assert ids("--status", "waiting") == {str(parent.pk)}
    assert ids("--status", "waiting", "--status", "running") == {str(parent.pk), str(child.pk)}
    assert ids("--queue", "payments") == {str(child.pk)}
    assert ids("--root-only") == {str(parent.pk), str(other.pk)}
    assert ids("--task", "tests.app.scenarios.slow") == ids("--task", "slow") == {str(other.pk)}
    assert ids("--task", "nobody.knows") == set()
    assert told("ls", "--task", "nobody.knows", "--status", "failed").out.strip() == (
        "No executions of status failed, task nobody.knows."
    )


def test_ls_stops_at_its_limit_and_says_that_there_are_more() -> None:
    newest = [executions.queued().pk for _ in range(5)][-2:]
    answer = told("ls", "--limit", "2", "--json").json
    assert [row["id"] for row in answer["executions"]] == [str(key) for key in reversed(newest)]
    assert answer["more"] is True
    listed = told("ls", "--limit", "2")
    assert listed.notes == "… and older ones: --limit 10 shows more.\n"
    assert len(listed.out.splitlines()) == 3  # whatever counts lines counts executions
    assert told("ls", "--json").json["more"] is False


def test_ls_as_json_tells_all_that_the_table_tells() -> None:
    parent, child = executions.family()
    rows = {row["id"]: row for row in told("ls", "--json").json["executions"]}
    assert rows[str(parent.pk)]["waiting_for"] == ["child"]
    assert rows[str(parent.pk)]["task"] == executions.TASK
    assert rows[str(child.pk)]["parent"] == rows[str(child.pk)]["root"] == str(parent.pk)
    assert rows[str(child.pk)]["worker"] == executions.OWNER
    assert rows[str(child.pk)]["step_in_parent"] == "child"
    assert dt.datetime.fromisoformat(rows[str(child.pk)]["created_at"])


def test_ls_takes_as_many_queries_for_fifty_rows_as_for_three() -> None:
    def make() -> None:
        _parent, child = executions.family()
        executions.napping()
        transitions.fail(child, executions.FAILURE)

    make()
    with CaptureQueriesContext(connection) as few:
        told("ls", "--limit", "100")
    for _ in range(16):
        make()
    with CaptureQueriesContext(connection) as many:
        assert len(told("ls", "--limit", "100").out.splitlines()) == 52
    assert len(many) == len(few) <= 4
    assert not any('."payload"' in query["sql"] or "`payload`" in query["sql"] for query in many)


# ----------------------------------------------------------------------------------------------------------------- show


def test_show_begins_with_one_sentence_and_marks_the_execution_in_its_tree(settings: Any) -> None:
    # No heartbeat renews the lease here, and a busy machine takes more than two of them.
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 600, "HEARTBEAT_SECONDS": 200}
    parent, child = executions.family(timeout=300)
    for row, other in ((parent, child), (child, parent)):
        out = told("show", row.pk).out
        marked = [line for line in out.splitlines() if "← this one" in line]
        assert len(marked) == 1
        assert str(row.pk) in marked[0]
        assert str(other.pk) in out
    out = told("show", parent.pk).out
    assert out.splitlines()[0].startswith('◐ Waiting for echo (step "child") since ')
    assert "times out at" in out.splitlines()[0]
    assert out.index("Tree") < out.index("Timeline") < out.index("Steps")
    assert told("show", child.pk).out.startswith("▶ Running on test@host, attempt 1 of 4; first started ")


def test_show_tells_the_chain_of_causes_down_to_the_traceback() -> None:
    result = scenarios.grandparent_of_boom.delay(message="card declined")
    inline.run_until_idle(app)
    out = told("show", result.id).out
    boom = Execution.objects.get(task="tests.app.scenarios.boom")
    assert out.splitlines()[0] == (
        '✕ Failed at step "sub": Child execution failed: Child execution failed: card declined → root cause '
        f"ValueError in boom {boom.pk} (attempt 1 of 1)."
    )
    assert f"manage.py conductor retry {result.id}" in out
    error = out[out.index("\nError") :]
    places = [error.index(text) for text in ("grandparent_of_boom", "parent_of_boom at", "caused by boom", "Traceback")]
    assert places == sorted(places)
    document = told("show", result.id, "--json").json
    assert [cause["task"].rpartition(".")[2] for cause in document["errors"]] == [
        "grandparent_of_boom",
        "parent_of_boom",
        "boom",
    ]
    assert "raise ValueError" in document["errors"][-1]["traceback"]


def test_show_lists_the_steps_with_results_and_the_timeline() -> None:
    result = scenarios.steps_then_child.delay()
    inline.run_until_idle(app)
    out = told("show", result.id).out
    steps = [line.split() for line in out[out.index("\n  #  name") :].splitlines()[2:6]]
    assert [words[:3] for words in steps] == [
        ["1", "first", "step"],
        ["2", "second", "step"],
        ["3", "child", "invoke"],
        ["4", "last", "step"],
    ]
    assert [words[-1] for words in steps] == ["1", "2", "3", "4"]
    timeline = out[out.index("\nTimeline") : out.index("\nSteps")]
    for text in ("queued in queue", "first run started", 'step "child": echo queued', 'step "last" succeeded'):
        assert text in timeline
    document = told("show", result.id, "--json").json
    assert document["execution"]["result"] == [1, 2, 3, 4]
    assert [step["result"] for step in document["steps"]] == [1, 2, 3, 4]
    assert len(document["tree"]) == 2


def test_show_tells_what_event_is_waited_for_and_how_to_send_it(quiet_broker: None) -> None:
    execution = executions.running()
    assert transitions.suspend(execution, transitions.AwaitEvent("approval", "approved", 3_000))
    out = told("show", execution.pk).out
    first, hint = out.splitlines()[:2]
    assert first.startswith('◐ Waiting for the event "approved" (step "approval") since ')
    assert "times out at " in first
    assert hint == f"  → Send it: manage.py conductor send {execution.pk} approved --payload JSON"
    assert 'step "approval": waits for the event "approved"; no worker is held' in out
    assert out[out.index("\n  #  name") :].splitlines()[2].split()[1:5] == ["approval", "event", "◐", "pending"]
    document = told("show", execution.pk, "--json").json
    assert (document["steps"][0]["event"], document["steps"][0]["task"]) == ("approved", None)
    clock.shift(dt.timedelta(seconds=3_001))
    transitions.decide_overdue(Step.objects.get())
    transitions.fail(executions.claimed(execution), executions.FAILURE, step="approval")
    answer = told("retry", execution.pk)
    assert answer.out.strip().endswith("It waits again for the event 'approved'.")


@pytest.mark.parametrize("arrange", ["sleeping", "retrying", "scheduled", "cancelled", "timed out", "worker lost"])
def test_show_says_in_plain_words_how_things_stand(arrange: str, quiet_broker: None) -> None:
    if arrange == "sleeping":
        execution, expected = executions.napping(3_000), '◐ Sleeping (step "nap") until '
    elif arrange == "retrying":
        execution, expected = executions.running(), "↻ Attempt 1 of 4 failed (ValueError: card declined). Next try in "
        transitions.retry_later(execution, executions.FAILURE, 100)
    elif arrange == "scheduled":
        execution, expected = executions.queued(countdown=600), "○ Scheduled for "
    elif arrange == "cancelled":
        execution, _child = executions.family()
        api.cancel(execution.pk, reason="wrong order")
        expected = "⊘ Cancelled "
    elif arrange == "timed out":
        result = scenarios.waits_for_slow.delay(seconds=0, timeout=0.01)
        execution = Execution.objects.get(pk=result.id)
        inline.run_once(execution, app)
        clock.shift(dt.timedelta(seconds=1))
        inline.run_until_idle(app)
        expected = "✕ Timed out at step \"slow\": Child execution timed out after 0.01s (step 'slow')."
    else:
        execution, expected = executions.running(), "▶ Running, but worker test@host stopped sending heartbeats "
        clock.shift(dt.timedelta(seconds=2))
    out = told("show", execution.pk).out
    assert out.startswith(expected), out
    if arrange == "cancelled":
        assert 'while waiting for "child": wrong order; ' in out.splitlines()[0]


def test_show_takes_as_many_queries_for_a_large_tree_as_for_a_small_one() -> None:
    def tree_of(children: int) -> Execution:
        parent = executions.running()
        for number in range(children):
            child = executions.claimed(executions.invoke(parent, f"child-{number}"))
            transitions.succeed(child, "1")
            parent = executions.claimed(parent)
        return parent

    small, large = tree_of(2), tree_of(30)
    told("show", small.pk)  # a new connection has one more
    with CaptureQueriesContext(connection) as few:
        told("show", small.pk)
    with CaptureQueriesContext(connection) as many:
        assert told("show", large.pk).out.count("echo ✓ succeeded") == 30
    assert len(many) == len(few) <= 10


def test_show_draws_what_fits_of_a_large_tree_and_always_the_execution_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree, "MOST_NODES", 5)
    parent = executions.running()
    for number in range(12):
        child = executions.claimed(executions.invoke(parent, f"child-{number}"))
        transitions.succeed(child, "1")
        parent = executions.claimed(parent)
    out = told("show", child.pk).out
    assert "child-11: echo ✓ succeeded" in out
    assert "… 7 more" in out
    assert len(told("show", child.pk, "--json").json["tree"]) == 13


def test_show_lets_nothing_through_that_a_terminal_would_obey() -> None:
    nasty = "declined\x1b[2J\x07\r\u202e[bold]red[/bold]"
    execution = executions.running(task=f"shop.{nasty}", queue=nasty, idempotency_key=nasty)
    transitions.fail(execution, Failure(type=nasty, message=nasty, traceback=f"Traceback\n{nasty}"))
    for words in (("show", execution.pk), ("ls",), ("show", execution.pk, "--json")):
        out = told(*words).out
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out)
        assert "[bold]red[/bold]" in out or words[0] == "ls"
    assert r"declined\x1b[2J\x07" in told("show", execution.pk).out


def test_show_cuts_long_values_and_json_keeps_them() -> None:
    execution = executions.running(payload=json.dumps([["x" * 5_000], {}]))
    executions_step = "y" * 5_000
    transitions.record_step(execution, "long", result=json.dumps(executions_step))
    transitions.succeed(execution, json.dumps("z" * 5_000))
    out = told("show", execution.pk).out
    assert max(len(line) for line in out.splitlines()) < 700
    assert out.count("… (5,0") == 3
    document = told("show", execution.pk, "--json").json
    assert document["steps"][0]["result"] == executions_step
    assert document["execution"]["payload"] == [["x" * 5_000], {}]


def test_show_masks_what_the_settings_name_also_in_json() -> None:
    execution = executions.running(payload=json.dumps([[], {"card": {"CVC": "hunter2"}, "token": "hunter2"}]))
    transitions.record_step(execution, "login", result='{"Authorization": "hunter2", "ok": true}')
    transitions.succeed(execution, '{"secret": ["hunter2"], "total": 7}')
    out = told("show", execution.pk).out
    assert "hunter2" not in out
    assert 'token="********"' in out
    assert '{"secret": "********", "total": 7}' in out
    document = told("show", execution.pk, "--json")
    assert "hunter2" not in document.out
    assert document.json["execution"]["payload"] == [[], {"card": {"CVC": "********"}, "token": "********"}]


def test_json_has_the_whole_tree_all_steps_and_whole_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_NODES", "MOST_CHILDREN", "MOST_SIBLINGS"):
        monkeypatch.setattr(tree, name, 2)
    for name in ("MOST_STEPS", "MOST_WAITS"):
        monkeypatch.setattr(steps, name, 2)
    parent, children = executions.mapping(7, fails_fast=False)
    failure = Failure(type="builtins.ValueError", message="x" * 3_000, traceback="Traceback of a child")
    for child in children:
        transitions.fail(executions.claimed(child), failure)
    run = executions.claimed(parent)
    for number in range(7):
        transitions.record_step(run, f"step-{number}", result="1")
    transitions.fail(run, failure, step="child", child_id=children[0].pk)
    document = told("show", parent.pk, "--json").json
    assert len(document["tree"]) == 8
    assert len(document["steps"]) == 8
    assert [len(cause["message"]) for cause in document["errors"]] == [3_000, 3_000]
    assert document["tree"][1]["error"] == "x" * 3_000
    out = told("show", parent.pk).out
    assert re.search("… [45] more", out), "two children, and the root cause if it is none of them"
    assert "… 6 more, earlier ones: --json has them" in out


def test_show_survives_rows_that_are_damaged() -> None:
    execution, child = executions.family()
    transitions.fail(child, executions.FAILURE)
    FailedExecution.objects.filter(pk=child.pk).delete()
    Execution.objects.filter(pk=child.pk).delete()
    Step.objects.filter(execution=execution).update(error="not JSON")
    Execution.objects.filter(pk=execution.pk).update(payload="{broken", error="not JSON either", options="{")
    assert told("show", execution.pk).code == 0
    assert told("show", execution.pk, "--json").json["execution"]["payload"] == "{broken"


# ----------------------------------------------------------------------------------------------------- retry and cancel


def test_retry_says_for_each_id_what_became_of_it() -> None:
    failed = scenarios.parent_of_boom.delay().id
    alone = scenarios.boom.delay().id
    inline.run_until_idle(app)
    child = Execution.objects.get(parent_id=failed)
    queued = executions.queued()
    answer = told("retry", failed, alone, child.pk, queued.pk, NOBODY, "--json")
    assert answer.code == 1
    results = {result["id"]: result for result in answer.json["results"]}
    assert [results[key]["outcome"] for key in (failed, alone)] == ["retried", "retried"]
    assert results[failed]["message"] == "It waits for what failed, which is queued."
    assert results[alone]["message"] == "It is queued."
    assert results[str(child.pk)]["outcome"] == "refused"
    assert f"Execution {queued.pk} is queued." in results[str(queued.pk)]["message"]
    assert results[NOBODY]["outcome"] == "not found"
    assert answer.json["ok"] is False
    assert Execution.objects.get(pk=failed).status == ExecutionStatus.WAITING
    assert told("retry", alone).code == 1  # it is queued now
    api.cancel(alone)
    assert told("retry", alone).code == 0


def test_retry_of_a_child_names_the_root_only_where_that_can_be_retried(quiet_broker: None) -> None:
    parent, child = executions.family()
    transitions.fail(child, executions.FAILURE)
    parent = executions.claimed(parent)
    answer = told("retry", child.pk)
    assert f"The root {parent.pk} is running, and goes on without it" in answer.out
    transitions.succeed(parent, "1")
    answer = told("retry", child.pk)
    assert answer.code == 1
    assert f"The root {parent.pk} has succeeded without it, so there is nothing to retry." in answer.out
    assert "Retry the root" not in answer.out


def test_show_tells_a_busy_queue_from_one_that_nobody_serves(quiet_broker: None) -> None:
    parent, child = executions.family(queue="payments")
    alone = executions.queued(queue="payments")
    transitions.release(child)
    clock.shift(dt.timedelta(minutes=10))
    for key in (alone.pk, parent.pk):
        first, hint = told("show", key).out.splitlines()[:2]
        assert "no worker took it" in first
        assert hint == "  → Start a worker: celery -A project worker -Q payments"
    executions.running(queue="payments")
    executions.running(queue="mail")
    first, hint = told("show", alone.pk).out.splitlines()[:2]
    assert first == '○ Queued for 10 min in queue "payments", whose workers are busy (1 running).'
    assert hint == ("  → If it has to run sooner, start one more worker: celery -A project worker -Q payments")
    first, _hint = told("show", parent.pk).out.splitlines()[:2]
    assert 'for 10 min in queue "payments", whose workers are busy (1 running). It resumes when' in first
    clock.shift(dt.timedelta(minutes=10))  # the leases have ended
    assert "no worker took it" in told("show", alone.pk).out.splitlines()[0]


def test_cancel_says_for_each_id_what_became_of_it() -> None:
    parent, child = executions.family()
    waiting, busy, done = executions.napping(), executions.running(), executions.running()
    transitions.succeed(done, "1")
    answer = told("cancel", waiting.pk, busy.pk, "--reason", "wrong order")
    assert answer.code == 0
    assert "cancelled" in answer.out.splitlines()[0]
    assert answer.out.splitlines()[1].endswith("It is running: its body stops at its next ctx call.")
    assert Execution.objects.get(pk=waiting.pk).cancel_reason == "wrong order"
    answer = told("cancel", done.pk, NOBODY, "--json")
    assert answer.code == 1
    assert [result["outcome"] for result in answer.json["results"]] == ["unchanged", "not found"]
    assert answer.json["results"][0]["message"] == "It is succeeded already."
    assert told("cancel", parent.pk).code == 0
    assert Execution.objects.get(pk=child.pk).cancel_requested_at is not None


def test_rerun_names_the_new_execution(quiet_broker: None) -> None:
    run, done = executions.running(), executions.running()
    transitions.succeed(done, "1")
    answer = told("rerun", done.pk, run.pk, NOBODY, "--json")
    assert answer.code == 1
    assert [result["outcome"] for result in answer.json["results"]] == ["started", "refused", "not found"]
    created = Execution.objects.exclude(pk__in=[run.pk, done.pk]).get()
    assert answer.json["results"][0]["message"] == f"The new execution is {created.pk}."
    assert told("rerun", done.pk).code == 0


def test_wake_ends_a_sleep(quiet_broker: None) -> None:
    asleep, run = executions.napping(), executions.running()
    answer = told("wake", asleep.pk, run.pk, "--json")
    assert [result["outcome"] for result in answer.json["results"]] == ["woken", "refused"]
    assert answer.json["results"][1]["message"].startswith(f"Execution {run.pk} is running. Only one that sleeps")
    assert Execution.objects.get(pk=asleep.pk).status == ExecutionStatus.QUEUED


def test_publish_says_whether_the_broker_took_it() -> None:
    process.worker.is_embedded, process.broker = False, NotingBroker()
    due, later = executions.queued(), executions.queued(countdown=100)
    answer = told("publish", due.pk, later.pk, "--json")
    assert [result["outcome"] for result in answer.json["results"]] == ["published", "refused"]
    process.broker = NotingBroker(is_away=True)
    answer = told("publish", due.pk)
    assert answer.code == 1
    assert "The broker did not take it." in answer.out


def test_send_sends_an_event_and_says_what_became_of_it() -> None:
    execution = executions.running()
    assert transitions.suspend(execution, transitions.AwaitEvent("approval", "approved", None))
    answer = told("send", execution.pk, "approved", "--payload", '{"by": "ana"}', "--id", "mail-7")
    assert (answer.code, answer.out.split()[1]) == (0, "sent")
    assert answer.out.strip().endswith("The step that waited for it has taken it.")
    assert Step.objects.get(name="approval").get_result() == {"by": "ana"}
    answer = told("send", execution.pk, "approved", "--payload", '{"by": "ana"}', "--id", "mail-7", "--json")
    assert (answer.code, answer.json["results"][0]["outcome"]) == (0, "unchanged")
    assert answer.json["results"][0]["message"] == "An event with the id 'mail-7' was sent before."
    answer = told("send", execution.pk, "approved", "--id", "mail-7", "--json")
    assert (answer.code, answer.json["results"][0]["outcome"]) == (1, "refused")
    answer = told("send", execution.pk, "approved")
    assert "It is kept until a step waits for it. It has 1 event that nobody waits for: approved." in answer.out
    assert Event.objects.get(taken_at__isnull=True).payload == "null"


def test_send_refuses_what_it_cannot_send() -> None:
    execution, done = executions.queued(), executions.running()
    transitions.succeed(done, "1")
    answer = told("send", done.pk, "approved", "--json")
    assert (answer.code, answer.json["results"][0]["outcome"]) == (1, "refused")
    assert "has succeeded and takes no more events" in answer.json["results"][0]["message"]
    assert told("send", NOBODY, "approved", "--json").json["results"][0]["outcome"] == "not found"
    for words, message in [
        (["a b"], "event name 'a b' must match [A-Za-z0-9][A-Za-z0-9_.:-]*: ASCII letters, digits and _ . : -"),
        (["approved", "--payload", "NaN"], "NaN at payload is not JSON. Pass None or a string."),
        (["approved", "--id", ""], "id must have 1–255 characters, got 0"),
    ]:
        answer = told("send", execution.pk, *words)
        assert (answer.code, answer.error) == (2, message)
    answer = told("send", execution.pk, "approved", "--payload", "yes")
    assert answer.error.startswith("Error: argument --payload: 'yes' is not JSON (")
    assert told("send", "not-an-id", "approved").code == 2
    assert not Event.objects.exists()


def test_an_event_of_another_name_than_the_awaited_one_shows() -> None:
    execution = executions.running()
    assert transitions.suspend(execution, transitions.AwaitEvent("approval", "approved", None))
    answer = told("send", execution.pk, "aproved")
    assert answer.code == 0
    assert "The execution waits for the event 'approved' now. It has 1 event that nobody waits for: aproved." in (
        answer.out
    )
    told("send", execution.pk, "aproved")
    assert "\nEvents\n  2 events that nobody waits for: aproved\n" in told("show", execution.pk).out
    told("send", execution.pk, "Approved")
    assert "3 events that nobody waits for: Approved, aproved (2)" in told("show", execution.pk).out
    assert told("show", execution.pk, "--json").json["events_not_taken"] == {"Approved": 1, "aproved": 2}
    assert told("send", execution.pk, "approved").out.strip().endswith("The step that waited for it has taken it.")
    assert "nobody waits for" not in told("show", executions.napping().pk).out


def test_the_beginning_of_an_id_is_enough_if_no_other_begins_so() -> None:
    first, second, third = (
        executions.queued(id=uuid.UUID(text))
        for text in (
            "01a22337-550f-76ed-ae8b-b0cbcb0a4470",
            "01a22338-550f-76ed-ae8b-b0cbcb0a4470",
            "01a22338-550f-86ed-9e8b-b0cbcb0a4470",
        )
    )
    for text in ("01a22337", "01A22337-", "01a22337-550f-76ed", "01a22337-550f-76ed-ae8b-b0cbcb0a447"):
        assert str(first.pk) in told("show", text).out
    assert told("cancel", "01a22338-550f-8").code == 0
    assert [executions.fresh(row).status for row in (first, second, third)] == ["queued", "queued", "cancelled"]
    answer = told("cancel", "01a22337", "01a22338")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error == (
        f"More than one execution's id begins with 01a22338: {second.pk}, {third.pk}. Give more of it."
    )
    assert executions.fresh(first).status == "queued"
    answer = told("show", "01a22339")
    assert (answer.code, answer.error) == (1, "There is no execution whose id begins with 01a22339.")
    assert told("show", "01a22").code == 2  # too many begin so


def test_an_id_that_is_none_stops_a_call_before_it_does_anything() -> None:
    execution = executions.queued()
    answer = told("cancel", execution.pk, "not-an-id")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error == (
        "'not-an-id' is not an execution's id. An id is a UUID; `manage.py conductor ls` shows them. "
        "Its first 6 digits or more do if no other begins with them."
    )
    assert Execution.objects.get(pk=execution.pk).status == "queued"
    assert told("show", "not-an-id").code == 2


def test_an_unknown_id_is_one_line_and_with_json_a_document_too() -> None:
    answer = told("show", NOBODY)
    assert (answer.code, answer.out) == (1, "")
    assert answer.error.startswith(f"There is no execution {NOBODY}. ")
    answer = told("show", NOBODY, "--json")
    assert answer.code == 1
    assert answer.json == {"error": answer.error}


# ------------------------------------------------------------------------------------------------------ sweep and prune


def test_sweep_does_once_what_is_due_and_says_what(quiet_broker: None) -> None:
    executions.napping(10)
    run = executions.running()
    assert told("sweep").out.startswith("Swept. " if not EMBEDDED else "Swept. Nothing was due.")
    clock.shift(dt.timedelta(seconds=60))
    answer = told("sweep", "--json").json
    assert answer["done"]["overdue_steps"] == 1
    assert answer["done"]["lapsed_leases"] == 1
    assert answer["sweeps"] == 1
    assert Execution.objects.get(pk=run.pk).attempt == 2


def test_sweep_heals_an_execution_that_waits_for_nothing() -> None:
    execution = executions.napping(600)
    Step.objects.update(status="succeeded", finished_at=clock.read("default"))
    assert "Executions woken that waited for nothing: 1" in told("sweep").out
    assert Execution.objects.get(pk=execution.pk).status == "queued"


def test_sweep_publishes_only_where_there_is_a_broker() -> None:
    process.broker = broker = NotingBroker()
    execution = executions.queued()
    clock.shift(dt.timedelta(seconds=600))
    out = told("sweep").out
    assert broker.ids == ([] if EMBEDDED else [execution.pk])
    assert ("Nothing is published with the memory:// broker" in out) is EMBEDDED


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sweep_goes_on_until_it_is_told_to_stop(number: signal.Signals, quiet_broker: None) -> None:
    execution = executions.napping(0.001)
    stream = io.StringIO()
    before = signal.getsignal(number)

    ended = threading.Event()

    def stop_it() -> None:
        try:
            wait_until(lambda: ended.is_set() or "Timeouts and sleeps ended: 1" in stream.getvalue())
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop_it)
    stopper.start()
    try:
        answer = Told("sweep", "--loop", "--interval", "0.02", stdout=stream)
    finally:
        ended.set()
        stopper.join()
    assert answer.code == 0
    assert answer.out.startswith("Sweeping every 0.02 s; Ctrl-C stops.\n")
    assert "Stopped after " in answer.out
    assert signal.getsignal(number) is before
    assert Execution.objects.get(pk=execution.pk).status == "queued"


@pytest.mark.parametrize("words", [["--interval", "5"], ["--loop", "--interval", "0"], ["--loop", "--interval", "x"]])
def test_sweep_refuses_an_interval_that_means_nothing(words: list[str]) -> None:
    assert told("sweep", *words).code != 0


def test_prune_deletes_old_trees_and_says_how_many_executions() -> None:
    origin.process_order.delay(order_id=7)
    scenarios.boom.delay()
    inline.run_until_idle(app)
    open_one = executions.queued()
    clock.shift(dt.timedelta(days=31))
    assert told("prune", "--older-than", "40d").out.strip() == (
        "Deleted 0 executions in trees whose root ended more than 40 d ago."
    )
    counted = told("prune", "--older-than", "30d", "--dry-run", "--json").json
    assert counted == {
        "dry_run": True,
        "executions": 5,
        "held": [],
        "keep_failed": False,
        "operations": 0,
        "older_than_seconds": 2_592_000.0,
    }
    out = told("prune", "--older-than", "30d", "--keep-failed", "--batch", "1").out
    assert out.startswith("Deleted 4 executions in trees whose root ended more than 30 d ago, not counting failed ones")
    assert told("prune", "--older-than", "1w").out.startswith("Deleted 1 execution in trees")
    assert list(Execution.objects.values_list("pk", flat=True)) == [open_one.pk]


@pytest.mark.parametrize("age", ["30", "0d", "-1d", "d", "1y", "99999999999d", "1e9d", "", "\u0661d"])
def test_prune_refuses_an_age_that_is_none(age: str) -> None:
    answer = told("prune", f"--older-than={age}")
    assert answer.code != 0
    assert "--older-than" in answer.error


# --------------------------------------------------------------------------------------------------------------- doctor


def findings() -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in told("doctor", "--json").json["checks"]}


def test_doctor_finds_nothing_broken_in_this_project() -> None:
    answer = told("doctor")
    assert answer.code == 0, answer.out
    assert "FAIL" not in answer.out
    document = told("doctor", "--json").json
    assert document["ok"] is True
    names = [finding["name"] for finding in document["checks"]]
    assert names[:9] == [
        "settings",
        "database",
        "tables",
        "clock",
        "celery app",
        "broker",
        "result backend",
        "workers",
        "tasks",
    ]
    assert {"queue", "undeliverable", "stuck"} < set(names)
    assert {finding["level"] for finding in document["checks"]} <= {"OK", "WARN"}
    assert findings()["tasks"]["message"].endswith("durable tasks registered.")


def test_doctor_reports_wrong_settings_and_looks_at_the_rest(settings: Any) -> None:
    settings.CONDUCTOR = {"LEASE_SECOND": 5}
    answer = told("doctor", "--json")
    assert answer.code == 1
    found = {finding["name"]: finding for finding in answer.json["checks"]}
    assert found["settings"]["level"] == "FAIL"
    assert 'unknown key "LEASE_SECOND". Did you mean "LEASE_SECONDS"?' in found["settings"]["message"]
    assert found["database"]["level"] == "OK"
    assert "stuck" not in found


def test_doctor_reports_missing_tables_and_a_missing_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.schema, "missing_tables", lambda using: ["conductor_app_step"])
    made_up = Celery("default", loader="default", set_as_current=False)
    monkeypatch.setattr(checks.subject, "app", lambda: made_up)
    monkeypatch.setattr(doctor, "celery_app", lambda: made_up)
    answer = told("doctor")
    assert answer.code == 1
    assert "FAIL  tables" in answer.out
    assert 'conductor_app tables do not exist in database "default".' in answer.out
    assert "→ Run: python manage.py migrate conductor_app" in answer.out
    assert "No Celery app is configured" in answer.out
    assert answer.out.splitlines()[-1].startswith("2 problems, ")


def test_doctor_reports_a_broker_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = ask_broker(f"amqp://shop:secret@127.0.0.1:{port}//", monkeypatch)
    assert found.level == "FAIL"
    assert found.message.startswith(f"amqp://shop:**@127.0.0.1:{port}// cannot be reached: ")
    assert "stored as queued" in found.hint


def test_doctor_does_not_wait_for_a_broker_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        found = ask_broker(f"amqp://shop:secret@127.0.0.1:{silent.getsockname()[1]}//", monkeypatch)
    assert found.level == "FAIL"
    assert "secret" not in found.message


def ask_broker(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(doctor, "BROKER_SECONDS", 1)
    monkeypatch.setenv("CELERY_BROKER_URL", url)  # Celery prefers it to any other place.
    return doctor._broker(Celery("shop", broker=url, set_as_current=False))


def test_doctor_asks_the_workers_where_a_broker_can_reach_them(worker: Callable[..., Any]) -> None:
    if not EMBEDDED:
        assert findings()["workers"]["level"] == "WARN"
        assert "celery -A project worker" in findings()["workers"]["hint"]
    else:
        assert findings()["workers"]["message"].endswith("None is at work now.")
    started = worker(pool="solo", concurrency=1)
    wait_until(Worker.objects.exists)
    found = findings()["workers"]
    assert found["level"] == "OK"
    assert started.name in found["message"]


def test_doctor_names_the_workers_that_it_sees_in_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    executions.running()
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    embedded = Celery("shop", set_as_current=False)
    monkeypatch.setattr(doctor, "celery_app", lambda: embedded)
    found, served = doctor._workers(embedded, doctor._broker(embedded))
    assert served is None
    assert found.message.endswith("At work: test@host.")


def test_doctor_reports_executions_that_nobody_takes(quiet_broker: None) -> None:
    executions.queued(queue="payments")
    assert findings()["queue"]["level"] == "OK"
    clock.shift(dt.timedelta(minutes=10))
    found = findings()
    assert found["queue"]["level"] == "FAIL"
    assert found["queue"]["message"] == (
        "1 execution queued and due, the oldest for 10 min. No worker serves queue payments."
    )
    assert found["queue"]["hint"] == "Start a worker: celery -A project worker -Q payments"
    assert found["undeliverable"]["level"] == "OK"
    assert told("doctor").code == 1
    Execution.objects.update(dispatches=8)
    found = findings()
    assert found["undeliverable"]["level"] == "FAIL"
    assert "in queue payments" in found["undeliverable"]["message"]
    assert found["undeliverable"]["hint"].endswith("celery -A project worker -Q payments")
    assert told("doctor").code == 1


def test_doctor_tells_a_busy_queue_from_one_that_nobody_serves(quiet_broker: None) -> None:
    executions.queued(queue="payments")
    clock.shift(dt.timedelta(minutes=10))
    executions.running(queue="payments")
    Execution.objects.filter(status="queued").update(dispatches=8)
    found = findings()
    assert found["queue"]["level"] == "WARN"
    assert found["queue"]["message"].startswith("1 execution queued and due, the oldest for 10 min. ")
    assert found["queue"]["message"].endswith(" The workers of queue payments are busy: 1 execution running.")
    assert found["undeliverable"]["level"] == "OK"


@pytest.mark.parametrize(
    ("served", "at_work", "may_be"),
    [
        (frozenset({"a", "b"}), {}, True),
        (frozenset({"b"}), {}, False),
        (frozenset({"b"}), {"c": 1}, False),
        (frozenset({"b"}), {"a": 1}, True),  # in a solo pool, which answers nobody while it runs
        (frozenset(), {}, False),
        (frozenset(), {"c": 1}, True),
        (None, {}, False),
        (None, {"c": 1}, True),
    ],
)
def test_who_may_serve_a_queue(served: frozenset[str] | None, at_work: dict[str, int], may_be: bool) -> None:
    assert open_work.may_be_served("a", served, at_work) is may_be


def test_doctor_reports_what_no_sweeper_has_moved() -> None:
    executions.running()
    executions.napping(5)
    assert findings()["stuck"]["level"] == "OK"
    clock.shift(dt.timedelta(minutes=10))
    found = findings()["stuck"]
    assert found["level"] == "FAIL"
    assert "1 running with a lapsed lease, 1 waiting past a deadline" in found["message"]
    assert "manage.py conductor sweep" in found["hint"]


def test_doctor_shows_what_the_system_checks_say(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "task_always_eager", True)
    found = findings()["conductor.W013"]
    assert found["level"] == "WARN"
    settings.SILENCED_SYSTEM_CHECKS = ["conductor.W013"]
    assert "conductor.W013" not in findings()


# ---------------------------------------------------------------------------------------------------- how it is written


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    executions.queued()
    assert "\x1b[" not in told("ls").out
    assert "\x1b[" in Told("ls", stdout=Terminal()).out
    assert "\x1b[" in told("--force-color", "ls").out
    assert "\x1b[" not in Told("--no-color", "ls", stdout=Terminal()).out
    assert "\x1b[" not in Told("ls", "--json", stdout=Terminal()).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in Told("ls", stdout=Terminal()).out


def test_a_narrow_terminal_loses_the_error_and_a_pipe_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = executions.running()
    transitions.fail(execution, Failure(type="E", message=f"declined {'very ' * 30}"))
    for columns in (40, 80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        out = Told("ls", stdout=Terminal()).out
        assert max(len(line) for line in out.splitlines()) <= columns
    assert str(execution.pk) in out
    assert f"declined {'very ' * 30}".strip() in told("ls").out


def test_an_old_terminal_gets_question_marks_and_no_error() -> None:
    executions.queued()
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    call_command("conductor", "ls", stdout=stream)
    assert b"? queued" in raw.getvalue()


def test_every_subcommand_writes_one_json_document() -> None:
    execution = executions.queued()
    words = {
        "doctor": [],
        "alive": [],
        "ls": [],
        "show": [execution.pk],
        "retry": [execution.pk],
        "rerun": [execution.pk],
        "fork": [execution.pk, "--before", "charge"],
        "cancel": [execution.pk],
        "wake": [execution.pk],
        "publish": [execution.pk],
        "hold": [execution.pk, "--reason", "bank incident"],
        "release": [execution.pk],
        "pause": [],
        "unpause": ["shop.tasks.charge"],
        "send": [executions.queued().pk, "approved"],
        "operations": [],
        "schedules": [],
        "sweep": [],
        "workers": [],
        "limits": [],
        "prune": ["--older-than", "1d"],
    }
    assert set(words) == {subcommand.name for subcommand in SUBCOMMANDS}
    for name, arguments in words.items():
        assert isinstance(told(name, *arguments, "--json").json, dict), name


def test_each_subcommand_is_documented_with_all_its_options() -> None:
    sections = (ROOT / "docs/reference/commands.md").read_text().split("\n## ")
    pages = {section.partition("\n")[0]: section for section in sections[1:]}
    shared = pages.pop("Which executions")
    assert list(pages) == [subcommand.name for subcommand in SUBCOMMANDS]
    for subcommand in SUBCOMMANDS:
        page = pages[subcommand.name]
        page += shared if "(#which-executions)" in page else ""
        parser = CommandParser()
        subcommand.add_arguments(parser)
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in page, option


def test_djangos_own_options_may_stand_behind_the_subcommand() -> None:
    parser = Command().create_parser("manage.py", "conductor")
    options = parser.parse_args(["ls", "--settings=shop.settings", "--no-color", "-v", "2"])
    assert (options.settings, options.no_color, options.verbosity) == ("shop.settings", True, 2)
    assert parser.parse_args(["--settings=shop.settings", "ls"]).settings == "shop.settings"
    assert parser.parse_args(["ls"]).verbosity == 1


# ------------------------------------------------------------------------------------------------------- as a process


def manage(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", *words],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "project.settings", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_errors_are_one_line_and_exit_codes_tell_them_apart(tmp_path: Path) -> None:
    empty = {"DATABASE_URL": f"sqlite:///{tmp_path}/empty.sqlite3", "CELERY_BROKER_URL": "memory://"}
    away = {**empty, "DATABASE_URL": f"sqlite:///{tmp_path}/nowhere/db.sqlite3"}

    missing = manage("conductor", "ls", **empty)
    assert missing.returncode == 1
    assert missing.stderr == (
        'CommandError: conductor_app tables do not exist in database "default". '
        "Run: python manage.py migrate conductor_app\n"
    )
    gone = manage("conductor", "show", NOBODY, "--json", **away)
    assert gone.returncode == 1
    assert gone.stderr.startswith('CommandError: Database "default" does not answer: unable to open database file')
    assert gone.stderr.count("\n") == 1
    assert json.loads(gone.stdout)["error"] in gone.stderr


def test_a_reader_that_goes_away_ends_it_without_a_traceback(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run(
        [sys.executable, "manage.py", "conductor", "doctor", "--json"],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "DATABASE_URL": f"sqlite:///{tmp_path}/empty.sqlite3",
            "CELERY_BROKER_URL": "memory://",
        },
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write_end)
    assert ended.stderr == ""
    assert ended.returncode == 1


@pytest.mark.parametrize("words", [[], ["prune"], ["ls", "--status", "broken"], ["send"], ["fly"]])
def test_a_wrong_call_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Command().run_from_argv(["manage.py", "conductor", *words])
    assert ended.value.code == 2
    assert "usage: manage.py conductor" in capsys.readouterr().err
