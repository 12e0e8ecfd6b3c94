"""The sentences that tell an operator what an execution is doing. No database: rows are made up."""

from __future__ import annotations

import json
import sys
import uuid
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.telling import hints, words
from conductor_app.telling.headlines import headline
from conductor_app.telling.labels import attempts, label
from conductor_app.telling.situation import Census, Situation
from conductor_app.telling.waits import awaited
from conductor_app.telling.words import duration, first_line, instant, short_name, visible
from tests.support.instants import NOW, ago, ahead

ROOT = uuid.UUID("01a204e4-551c-7612-a2a5-dfa2a183dfde")
CHILD = uuid.UUID("01a204e4-551c-8d00-9390-f4c34f9e36ab")


def execution(status: str, **fields: Any) -> Execution:
    values: dict[str, Any] = {
        "id": ROOT,
        "root_id": ROOT,
        "task": "shop.tasks.fulfil",
        "queue": "celery",
        "status": status,
        "max_attempts": 4,
        "created_at": ago(60),
        "started_at": ago(59),
        "due_at": ago(60),
    }
    return Execution(**{**values, **fields})


def child(status: str, **fields: Any) -> Execution:
    values = {"id": CHILD, "parent_id": ROOT, "task": "shop.tasks.charge", "queue": "payments", "step": "charge"}
    return execution(status, **{**values, **fields})


def step(status: str = "pending", **fields: Any) -> Step:
    values: dict[str, Any] = {
        "name": "charge",
        "kind": "invoke",
        "status": status,
        "task": "shop.tasks.charge",
        "child_id": CHILD,
        "created_at": ago(12),
    }
    return Step(**{**values, **fields})


def error(message: str, type_: str = "shop.bank.CardDeclined") -> str:
    return json.dumps({"type": type_, "message": message})


def tell(row: Execution, *steps: Step, children: tuple[Execution, ...] = (), **more: Any) -> str:
    tree = {other.pk: other for other in (row, *children)}
    told = headline(Situation(row, NOW, steps, tree, app="shop", **more))
    return "\n".join([str(told), *told.hints])


def test_a_waiting_parent_says_for_whom_since_when_and_until_when() -> None:
    told = tell(execution("waiting"), step(deadline_at=ahead(18)), children=(child("running"),))
    assert told == (
        '◐ Waiting for charge (step "charge") since 12 s ago. No worker is held. It resumes when that execution '
        "finishes; times out at 14:05:18 (in 18 s). That execution is running, attempt 1 of 4."
    )


def test_a_parent_whose_child_no_worker_takes_says_which_worker_to_start() -> None:
    told = tell(execution("waiting"), step(), children=(child("queued", due_at=ago(400)),))
    assert told == (
        '◐ Waiting for charge (step "charge"), which has been queued for 6 min: no worker took it from queue '
        '"payments".\nStart a worker: celery -A shop worker -Q payments'
    )


def test_a_parent_that_waits_for_several_steps_names_them() -> None:
    steps = [step(name=f"item-{number}", deadline_at=None) for number in range(7)]
    told = tell(execution("waiting"), *steps)
    assert 'Waiting for 7 steps ("item-0", "item-1", "item-2", "item-3", "item-4" and 2 more)' in told


def test_a_sleeper_says_until_when() -> None:
    told = tell(execution("waiting"), step(kind="sleep", name="nap", child_id=None, deadline_at=ahead(3_000)))
    assert told == '◐ Sleeping (step "nap") until 14:55:00 (in 50 min). No worker is held.'


def test_one_who_waits_for_an_event_says_so() -> None:
    waits = step(kind="event", name="approval", task="approved", child_id=None, execution_id=ROOT)
    hint = f"Send it: manage.py conductor send {ROOT} approved --payload JSON"
    assert tell(execution("waiting"), waits) == (
        '◐ Waiting for the event "approved" (step "approval") since 12 s ago. No worker is held. '
        f"It resumes when the event is sent.\n{hint}"
    )
    waits.deadline_at = ahead(18)
    assert "when the event is sent; times out at 14:05:18 (in 18 s).\n" in tell(execution("waiting"), waits)
    assert tell(execution("waiting"), waits, step()).endswith(f"\n{hint}")


def test_one_whose_event_did_not_come_says_so() -> None:
    message = "Event 'approved' did not come within 30s (step 'approval')"
    row = execution("failed", error=error(message, "conductor_app.exceptions.EventTimedOut"))
    late = step("timed_out", kind="event", name="approval", task="approved", child_id=None)
    failure = FailedExecution(execution_id=ROOT, step="approval", message=message, attempts=1)
    assert tell(row, late, failures={ROOT: failure}).startswith(f'✕ Timed out at step "approval": {message}.\n')


def test_one_who_waits_for_nothing_says_who_heals_it() -> None:
    assert "The sweeper wakes it." in tell(execution("waiting"))


def test_a_retry_says_what_failed_and_when_the_next_try_is() -> None:
    row = execution("queued", attempt=3, due_at=ahead(8), error=error("no route\nto host", "builtins.ConnectionError"))
    assert tell(row) == "↻ Attempt 2 of 4 failed (ConnectionError: no route). Next try in 8.0 s."


def test_a_queued_execution_says_how_long_and_where() -> None:
    assert tell(execution("queued", due_at=ago(3))) == '○ Queued for 3.0 s in queue "celery".'
    assert tell(execution("queued", due_at=ahead(600))) == "○ Scheduled for 14:15:00 (in 10 min)."


def test_a_message_that_a_worker_cannot_read_is_named() -> None:
    refused = error("Worker celery@web1 could not read its message: no", "kombu.exceptions.ContentDisallowed")
    row = execution("queued", due_at=ago(3), error=refused)
    line = headline(Situation(row, NOW))
    assert line.text == 'Queued for 3.0 s in queue "celery". Worker celery@web1 could not read its message: no.'
    assert "conductor.E032" in line.hints[0]
    row.error = error("no route", "builtins.ConnectionError")
    assert tell(row) == '○ Queued for 3.0 s in queue "celery".'


@pytest.mark.parametrize("fields", [{"due_at": ago(120)}, {"due_at": ago(1), "dispatches": 8}])
def test_a_queued_execution_that_nobody_takes_says_which_worker_to_start(fields: dict[str, Any]) -> None:
    told = tell(execution("queued", **fields))
    assert "no worker took it." in told
    assert told.endswith("Start a worker: celery -A shop worker -Q celery")


def test_a_running_execution_says_where(settings: Any) -> None:
    settings.CONDUCTOR = {}
    row = execution("running", lease_owner="celery@web1/4711", lease_expires_at=ahead(50), attempt=2)
    assert tell(row) == "▶ Running on celery@web1, attempt 2 of 4; first started 59 s ago."
    row.cancel_requested_at = ago(4)
    assert "Its cancellation was requested 4.0 s ago: the body stops at its next ctx call." in tell(row)


def test_a_running_execution_whose_worker_is_silent_says_when_it_is_queued_again(settings: Any) -> None:
    settings.CONDUCTOR = {}
    row = execution("running", lease_owner="celery@web1/4711", lease_expires_at=ahead(20))
    assert tell(row) == (
        "▶ Running, but worker celery@web1 stopped sending heartbeats 40 s ago. It will be re-queued automatically "
        "at 14:05:20."
    )


def test_a_failure_of_a_child_names_the_step_and_the_root_cause() -> None:
    message = "Child execution failed: card declined"
    row = execution("failed", finished_at=ago(5), error=error(message, "conductor_app.exceptions.ChildFailed"))
    failures = {
        ROOT: FailedExecution(execution_id=ROOT, step="charge", root_cause_id=CHILD, attempts=1, message=message),
        CHILD: FailedExecution(
            execution_id=CHILD, task="shop.tasks.charge", error_class="shop.bank.CardDeclined", attempts=4
        ),
    }
    told = tell(row, step("failed"), children=(child("failed"),), failures=failures)
    assert told == (
        f'✕ Failed at step "charge": {message} → root cause CardDeclined in charge {CHILD} (attempt 4 of 4).\n'
        f"Run it again from where it stopped: manage.py conductor retry {ROOT}"
    )


def test_a_failure_of_its_own_names_class_and_attempts() -> None:
    row = execution("failed", finished_at=ago(5), attempt=4, error=error("no stock", "shop.NoStock"))
    failures = {ROOT: FailedExecution(execution_id=ROOT, attempts=4, error_class="shop.NoStock", message="no stock")}
    assert tell(row, failures=failures).startswith("✕ Failed: no stock (NoStock, attempt 4 of 4).")


def test_a_timeout_says_whether_the_child_still_runs() -> None:
    message = "Child execution timed out after 30s (step 'charge')"
    row = execution("failed", finished_at=ago(5), error=error(message, "conductor_app.exceptions.ChildTimedOut"))
    failures = {ROOT: FailedExecution(execution_id=ROOT, step="charge", root_cause_id=CHILD, attempts=1)}
    told = tell(row, step("timed_out"), children=(child("running"),), failures=failures)
    assert told.startswith(f'✕ Timed out at step "charge": {message}. The child is still running ({CHILD}).')
    assert f"Cancel the child: manage.py conductor cancel {CHILD}" in told
    told = tell(row, step("timed_out"), children=(child("cancelled"),), failures=failures)
    assert "still" not in told


def test_a_cancelled_execution_says_why_and_what_became_of_its_children() -> None:
    row = execution("cancelled", finished_at=ago(130), cancel_reason="wrong order")
    told = tell(row, step("cancelled"), children=(child("cancelled"),))
    assert told.startswith(
        '⊘ Cancelled 2 min ago while waiting for "charge": wrong order; 1 child cancelled, 0 left running.'
    )


def test_children_that_were_not_all_read_are_counted_all_the_same() -> None:
    row = execution("cancelled", finished_at=ago(130), cancel_reason="wrong order")
    told = tell(row, children=(child("cancelled"),), counted=Census(total=5_000, open=3, cancelled=4_700))
    assert "wrong order; 4,700 children cancelled, 3 left running." in told


def test_a_retry_keeps_the_results_of_the_steps_that_are_done() -> None:
    row = execution("failed", finished_at=ago(5), error=error("no stock", "shop.NoStock"))
    done = [step("succeeded", name=f"step-{number}", kind="step") for number in range(7)]
    assert tell(row, done[0], step("failed")).endswith(
        f'stopped, keeping the result of "step-0": manage.py conductor retry {ROOT}'
    )
    assert 'keeping the results of "step-0", "step-1", "step-2", "step-3", "step-4" and 2 more:' in tell(row, *done)


def test_a_step_that_does_not_match_says_what_to_do_about_the_code() -> None:
    row = execution("failed", finished_at=ago(5), error=error("Step 2", "conductor_app.exceptions.StepMismatch"))
    assert "\nThe code changed while this execution was in flight. Before it is run again, give " in tell(row)


def test_damaged_options_do_not_keep_a_sentence_from_being_written() -> None:
    for options in ('{"plain"', '{"plain": 7}', '["plain"]', '"plain"', '{"plain": {}}'):
        row = execution("running", lease_owner="celery@web1/1", lease_expires_at=ago(1), options=options)
        assert "stopped sending heartbeats" in tell(row)
        row.lease_expires_at, row.cancel_requested_at = ahead(3_000), ago(4)
        assert "Its cancellation was requested" in tell(row)


def test_what_is_awaited_says_what_happens_at_its_deadline() -> None:
    def then(*steps: Step, status: str = "waiting") -> list[str]:
        return [" ".join(item.then) for item in awaited(Situation(execution(status), NOW, steps))]

    (told,) = then(step(deadline_at=ahead(18)))
    assert told.endswith(
        "At 14:05:18 (in 18 s) it times out: ChildTimedOut is raised here, and what still runs is cancelled."
    )
    (told,) = then(step(deadline_at=ahead(18), on_timeout="abandon"))
    assert told.endswith("and what still runs goes on.")
    (told,) = then(step(kind="map", total=3, remaining=2, fails_fast=False))
    assert told == "It resumes once, when all have finished."
    assert then(step(kind="start"), step("succeeded")) == []
    assert then(step(), status="running") == []


def test_texts_are_shown_as_they_are_but_for_what_a_screen_would_obey() -> None:
    kept = "Zoë 日本\t\u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f467\nnext"
    assert visible(kept) == kept
    assert visible("a\x00\x1b[2J\r\x85\u202e\u200f\ufeff\ud83d") == r"a\x00\x1b[2J\r\x85\u202e\u200f\ufeff\ud83d"


def test_a_child_whose_root_goes_on_is_not_offered_for_a_retry() -> None:
    row = child("failed", error=error("no"), finished_at=ago(5))
    told = headline(Situation(row, NOW, tree={ROOT: execution("waiting"), CHILD: row}))
    assert told.hints == ()


def test_success_says_when_and_how_long_it_took() -> None:
    assert tell(execution("succeeded", finished_at=ago(30))) == "✓ Succeeded 30 s ago in 30 s."


def test_a_label_is_a_shape_and_a_word() -> None:
    assert str(label(execution("queued"), NOW)) == "○ queued"
    assert str(label(execution("queued", due_at=ahead(5)), NOW)) == "○ scheduled"
    assert str(label(execution("queued", due_at=ahead(5), attempt=2), NOW)) == "↻ retrying"
    assert str(label(execution("waiting"), NOW, [step(kind="sleep")])) == "◐ sleeping"
    assert str(label(execution("waiting"), NOW, [step(kind="sleep"), step()])) == "◐ waiting"
    shown = {status: label(execution(status), NOW).mark for status in ("running", "succeeded", "failed", "cancelled")}
    assert shown == {"running": "▶", "succeeded": "✓", "failed": "✕", "cancelled": "⊘"}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0 ms"),
        (0.04, "40 ms"),
        (0.24, "0.2 s"),
        (12.7, "12 s"),
        (119, "119 s"),
        (400, "6 min"),
        (7_300, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_a_duration_is_shown_in_its_largest_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_small_words() -> None:
    assert short_name("shop.tasks.charge") == "charge"
    assert short_name("charge") == "charge"
    assert attempts(execution("running", attempt=2)) == "2/4"
    assert attempts(execution("running", attempt=2, max_attempts=None)) == "2"
    assert first_line("  one\ntwo") == "one"
    assert first_line("") == ""
    assert first_line("x" * 30, 10) == "x" * 9 + "…"
    assert first_line("red \x1b[31m and \u202e back\r\nforged") == "red \\x1b[31m and \\u202e back"
    assert instant(ago(86_400), NOW) == "2026-11-21 14:05:00"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "+0.000 s"),
        (0.1234, "+0.123 s"),
        (-1.5, "-1.500 s"),
        (12.34, "+12.3 s"),
        (61, "+1 min 1 s"),
        (3_599.9, "+1 h 0 min"),
        (7_260, "+2 h 1 min"),
        (259_234.443, "+3 d 0 h"),
    ],
)
def test_an_offset_is_readable_at_any_length(seconds: float, said: str) -> None:
    assert words.offset(seconds) == said


def test_a_hint_names_what_celery_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    acme = Celery("acme", set_as_current=False)
    monkeypatch.setattr(hints, "current_app", SimpleNamespace(_get_current_object=lambda: acme))

    def project(**modules: dict[str, object]) -> None:
        for name, attributes in modules.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    assert hints.app_to_load() == "acme"  # nowhere to be found: its name is the best guess
    project(acme_urls={"celery_app": acme, "app": "another thing"})
    assert hints.app_to_load() == "acme"  # celery -A acme_urls would take what is called app
    project(acme_cfg__celery_app={"app": acme})
    assert hints.app_to_load() == "acme_cfg.celery_app"
    project(acme_cfg={"__path__": [], "celery_app": acme})
    assert hints.app_to_load() == "acme_cfg"
    project(acme={"__path__": []}, acme__celery={"app": acme})
    assert hints.app_to_load() == "acme"
