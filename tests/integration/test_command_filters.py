"""``manage.py conductor``: which executions are meant, by ids, by stdin, by filters."""

from __future__ import annotations

import datetime as dt
import io
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from conductor_app import api, transitions
from conductor_app.management.subcommands.actions import Cancel
from conductor_app.models import Execution
from conductor_app.states import FINAL_STATUSES
from conductor_app.store import clock
from conductor_app.store.process import process
from tests.support import executions
from tests.support.command import told
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db
NOBODY = "01a204e4-550f-76ed-ae8b-b0cbcb0a4470"
ACTING = ["retry", "rerun", "cancel", "wake", "publish"]


@pytest.fixture(autouse=True)
def _quiet_broker() -> Iterator[None]:
    process.worker.is_embedded, process.broker = False, NotingBroker()
    yield
    clock.reset()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write what the next call reads from stdin."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def failed(**fields: Any) -> Execution:
    run = executions.running(**fields)
    transitions.fail(run, executions.FAILURE)
    return run


def aged(row: Execution, **ago: float) -> Execution:
    """Let an execution have been created so long ago."""
    Execution.objects.filter(pk=row.pk).update(created_at=clock.after(-dt.timedelta(**ago)))
    return row


def listed(*words: str) -> set[str]:
    return set(told("ls", "-q", *words).out.split())


def keys(*rows: Execution) -> set[str]:
    return {str(row.pk) for row in rows}


def statuses(*rows: Execution) -> list[str]:
    return [executions.fresh(row).status for row in rows]


# -------------------------------------------------------------------------------------------------------- the filters


def test_a_worker_is_its_whole_node_name_or_the_beginning_of_an_owner() -> None:
    first = executions.claimed(executions.queued(), "celery@web1/aaaaaaaa/7")
    second = executions.claimed(executions.queued(), "celery@web10/bbbbbbbb/7")
    executions.queued()
    assert listed("--worker", "celery@web1") == keys(first)
    assert listed("--worker", "celery@web10") == keys(second)
    assert listed("--worker", "celery@web1/aaaaaaaa") == listed("--worker", "celery@web1/aaaaaaaa/7") == keys(first)
    assert listed("--worker", "celery@web") == listed("--worker", "celery@web1/bb") == set()
    assert listed("--worker", "%") == listed("--worker", "celery@web_") == set()


def test_since_and_until_are_about_the_creation() -> None:
    old, middle, new = (aged(executions.queued(), **ago) for ago in ({"days": 3}, {"hours": 2}, {"minutes": 1}))
    assert listed("--since", "15m") == keys(new)
    assert listed("--since", "1d") == keys(middle, new)
    assert listed("--until", "90m") == keys(old, middle)
    assert listed("--since", "1d", "--until", "30m") == keys(middle)
    instant = (clock.read("default") - dt.timedelta(hours=1)).isoformat()
    assert listed("--since", instant) == keys(new)
    assert listed("--until", instant.replace("+00:00", "Z")) == keys(old, middle)
    assert listed("--since", "2000-01-01") == keys(old, middle, new)
    assert listed("--until", "2000-01-01T12:30") == set()


def test_an_instant_without_a_zone_is_in_the_projects(settings: Any) -> None:
    row = executions.queued()
    Execution.objects.filter(pk=row.pk).update(created_at=dt.datetime(2026, 1, 1, 22, 30, tzinfo=dt.UTC))
    assert listed("--since", "2026-01-02") == set()
    settings.TIME_ZONE = "Asia/Tokyo"
    assert listed("--since", "2026-01-02", "--until", "2026-01-02T08:00") == keys(row)


def test_failures_are_found_by_their_own_rows() -> None:
    old, new, other = aged(failed(), hours=3), failed(), executions.running()
    transitions.succeed(other, "1")
    assert listed("--status", "failed") == keys(old, new)
    assert listed("--status", "failed", "--since", "1h") == keys(new)
    assert listed("--status", "failed", "--until", "1h") == keys(old)
    assert listed("--status", "failed", "--status", "succeeded", "--since", "1h") == keys(new, other)


def test_a_key_is_the_whole_idempotency_key() -> None:
    row = executions.queued(idempotency_key="order-7")
    executions.queued(idempotency_key="order-70")
    assert listed("--key", "order-7") == keys(row)
    assert listed("--key", "Order-7") == set()


def test_an_empty_list_names_its_filters() -> None:
    answer = told("ls", "--status", "failed", "--worker", "w", "--key", "k", "--since", "90m", "--until", "2026-01-02")
    assert answer.code == 2  # the second is before the first
    answer = told("ls", "--queue", "q", "--worker", "w", "--key", "k", "--since", "90m")
    assert answer.out == "No executions of queue q, worker w, key k created since 1.5h ago.\n"


@pytest.mark.parametrize("name", ["ls", *ACTING])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--since", "yesterday"], "'yesterday' is neither an instant such as 2026-11-22T20:33 nor a length of time"),
        (["--until", "2026-13-01"], "'2026-13-01' is no instant"),
        (["--since", "0001-01-01"], "'0001-01-01' is before 1970"),
        (["--since", "0m"], "is neither an instant"),
        (["--queue", ""], "argument --queue: it is empty"),
        (["--task", " "], "argument --task: it is empty"),
        (["--key", "\udcff"], "it has characters that no database takes"),
        (["--limit", "0"], "'0' must be a whole number of at least 1"),
        (["--limit", "99999999999"], "at most 9 digits"),
        (["--since", "1h", "--until", "2h"], ": --since comes first."),
        (["-q", "--json", "--status", "queued"], "Give --json or --quiet, not both."),
    ],
)
def test_a_filter_that_means_nothing_is_refused(name: str, words: list[str], message: str) -> None:
    answer = told(name, *words)
    assert answer.code != 0
    assert message in answer.error
    assert answer.out == "" or "--json" in words


# --------------------------------------------------------------------------------------------------- acting by filters


@pytest.mark.parametrize("name", ACTING)
@pytest.mark.parametrize("words", [[], ["--root-only"], ["--limit", "5"], ["--dry-run"], ["--json"]])
def test_nothing_is_everything_by_accident(name: str, words: list[str]) -> None:
    rows = [executions.queued(), failed(), executions.napping()]
    before = executions.snapshot()
    answer = told(name, *words)
    assert answer.code == 2
    assert answer.error.startswith("Which executions? Give ids, - for ids on stdin, or a filter such as ")
    assert executions.snapshot() == before
    assert len(rows) == Execution.objects.count()


def test_retry_by_filter_takes_the_roots_that_can_be_retried() -> None:
    parent, child = executions.family()
    transitions.fail(child, executions.FAILURE)
    transitions.fail(executions.claimed(parent), executions.FAILURE, step="child", child_id=child.pk)
    alone, other, open_one = failed(), failed(queue="payments"), executions.queued()
    answer = told("retry", "--task", "echo", "--queue", alone.queue, "--json")
    assert answer.code == 0, answer.out
    assert {result["id"] for result in answer.json["results"]} == keys(parent, alone)
    assert answer.json["more"] == 0
    assert statuses(parent, child, alone, other, open_one) == ["waiting", "queued", "queued", "failed", "queued"]
    assert told("retry", "--status", "failed", "-q").out == f"{other.pk}\n"


def test_cancel_by_filter_takes_parents_first_and_asks_nobody_twice() -> None:
    parent, child = executions.family()
    nap, done = executions.napping(), failed()
    answer = told("cancel", "--since", "1h", "--reason", "wrong order", "--json")
    assert answer.code == 0
    outcomes = {result["id"]: result["outcome"] for result in answer.json["results"]}
    assert outcomes == {str(parent.pk): "cancelled", str(nap.pk): "cancelled", str(child.pk): "requested"}
    assert answer.json["results"][-1]["id"] == str(child.pk)
    assert statuses(parent, child, nap, done) == ["cancelled", "running", "cancelled", "failed"]
    answer = told("cancel", "--since", "1h")
    assert (answer.code, answer.out) == (0, "No execution created since 1h ago to cancel. Nothing was done.\n")


def test_a_child_that_ends_with_its_parent_is_no_refusal() -> None:
    parent = executions.running()
    child = executions.invoke(parent)
    answer = told("cancel", "--since", "1h", "--json")
    assert answer.code == 0
    assert [(result["id"], result["outcome"]) for result in answer.json["results"]] == [
        (str(parent.pk), "cancelled"),
        (str(child.pk), "unchanged"),
    ]


def test_cancel_by_worker_takes_what_that_worker_runs() -> None:
    run, other = executions.running(), executions.claimed(executions.queued(), "celery@other/1")
    answer = told("cancel", "--worker", "test@host", "-q")
    assert (answer.code, answer.out) == (0, f"{run.pk}\n")
    assert executions.fresh(other).cancel_requested_at is None


def test_wake_by_filter_takes_what_waits_for_an_instant() -> None:
    nap, later, due, event = executions.napping(), executions.queued(countdown=600), executions.queued(), None
    event = executions.running()
    assert transitions.suspend(event, transitions.AwaitEvent("approval", "approved", None))
    answer = told("wake", "--task", executions.TASK, "-q")
    assert answer.code == 0
    assert set(answer.out.split()) == keys(nap, later)
    assert statuses(nap, later, due, event) == ["queued", "queued", "queued", "waiting"]


def test_publish_by_filter_comes_to_all_in_turn() -> None:
    process.broker = broker = NotingBroker()
    rows = [executions.queued() for _ in range(3)]
    executions.queued(countdown=600)
    broker.ids.clear()
    for _ in rows:
        clock.shift(dt.timedelta(seconds=0.01))
        answer = told("publish", "--status", "queued", "--limit", "1")
        assert (answer.code, answer.notes) == (0, "… 2 more match: repeat the call, or raise --limit.\n")
    assert sorted(broker.ids) == sorted(row.pk for row in rows)


def test_rerun_by_filter_takes_all_or_none() -> None:
    rows = [failed() for _ in range(3)]
    answer = told("rerun", "--status", "failed", "--limit", "2")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error == (
        "3 executions match, and rerun would take 2 of them. The next call would take the same ones again, so nothing "
        "was done. Narrow the filters, or raise --limit."
    )
    assert Execution.objects.count() == 3
    answer = told("rerun", "--status", "failed", "--limit", "3", "-q")
    created = Execution.objects.exclude(pk__in=[row.pk for row in rows])
    assert (answer.code, set(answer.out.split())) == (0, keys(*created))
    assert len(created) == 3
    answer = told("rerun", rows[0].pk, "--json").json["results"][0]
    assert answer["created"] in answer["message"]


def test_a_limit_says_how_many_more_match_and_the_next_call_goes_on() -> None:
    rows = [failed() for _ in range(5)]
    answer = told("retry", "--status", "failed", "--limit", "2", "--json")
    assert (answer.code, answer.json["more"], len(answer.json["results"])) == (0, 3, 2)
    answer = told("retry", "--status", "failed", "--limit", "2")
    assert answer.notes.startswith("… 1 more match: repeat the call, or raise --limit.")
    assert len(answer.out.splitlines()) == 2
    answer = told("retry", "--status", "failed", "--limit", "2")
    assert (answer.notes, len(answer.out.splitlines())) == ("", 1)
    assert statuses(*rows) == ["queued"] * 5
    answer = told("retry", "--status", "failed")
    assert (answer.code, answer.out) == (0, "No execution of status failed to retry. Nothing was done.\n")
    answer = told("retry", "--status", "failed", "--json")
    assert answer.json == {"ok": True, "dry_run": False, "more": 0, "results": []}
    answer = told("retry", "--status", "failed", "-q")
    assert (answer.out, answer.notes) == ("", "No execution of status failed to retry. Nothing was done.\n")


def test_one_that_is_refused_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [failed() for _ in range(3)]
    retry = api.retry

    def retried_by_somebody_else(execution_id: uuid.UUID) -> None:
        if execution_id == rows[1].pk:
            retry(execution_id)
        retry(execution_id)

    monkeypatch.setattr(api, "retry", retried_by_somebody_else)
    answer = told("retry", "--status", "failed", "-q")
    assert (answer.code, set(answer.out.split())) == (1, keys(rows[0], rows[2]))
    assert answer.notes.startswith(f"{rows[1].pk} refused: Execution {rows[1].pk} is queued.")
    assert statuses(*rows) == ["queued"] * 3


@pytest.mark.parametrize(
    ("error", "why"),
    [(KeyboardInterrupt(), "Ctrl+C."), (OperationalError("it is gone\n"), "the database: it is gone.")],
)
def test_whoever_is_stopped_tells_what_was_done(
    error: BaseException, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [executions.queued() for _ in range(3)]
    act = Cancel.act

    def interrupted(self: Cancel, execution_id: uuid.UUID, options: dict[str, Any]) -> Any:
        if execution_id == rows[1].pk:
            raise error
        return act(self, execution_id, options)

    monkeypatch.setattr(Cancel, "act", interrupted)
    answer = told("cancel", *(row.pk for row in rows), "--json")
    assert answer.code == 1
    assert [result["outcome"] for result in answer.json["results"]] == ["cancelled", "interrupted"]
    assert answer.json["results"][-1]["message"].startswith(f"Stopped here by {why} Look at it")
    assert statuses(*rows) == ["cancelled", "queued", "queued"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retry", "--status", "running"], "retry is for failed and cancelled root executions: no --status but "),
        (["cancel", "--status", "failed", "--status", "succeeded"], "no --status but queued and running and waiting "),
        (["retry", "--worker", "w"], "--worker finds what a worker runs now; retry is for "),
        (["publish", "--worker", "w"], "--worker finds what a worker runs now; publish is for "),
        (["retry", NOBODY, "--status", "failed"], "Give ids or filters, not both: --status would not count for ids."),
        (["retry", NOBODY, "--limit", "3"], "Give ids or filters, not both: --limit would not count for ids."),
    ],
)
def test_a_call_that_can_mean_nothing_is_refused(words: list[str], message: str) -> None:
    answer = told(*words)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.error


def test_acting_by_filter_takes_as_many_queries_to_choose_from_fifty_as_from_three() -> None:
    def dry() -> int:
        with CaptureQueriesContext(connection) as queries:
            assert told("cancel", "--since", "1h", "--dry-run").code == 0
        return len(queries)

    for _ in range(3):
        executions.queued()
    few = dry()
    for _ in range(47):
        executions.queued()
    assert dry() == few <= 5


# ------------------------------------------------------------------------------------------------------------ dry runs


@pytest.mark.parametrize("name", ACTING)
def test_a_dry_run_lists_what_would_be_done_and_writes_nothing(name: str) -> None:
    executions.family()
    executions.queued(countdown=600), executions.queued(), executions.napping()
    rows = [failed(), *Execution.objects.all()]
    before = executions.snapshot()
    by_filter = told(name, "--since", "1h", "--dry-run", "--json")
    assert by_filter.code == 0
    assert by_filter.json["dry_run"] is True
    assert by_filter.json["results"]
    assert {result["outcome"] for result in by_filter.json["results"]} <= {
        "would be retried",
        "would be started anew",
        "would be cancelled",
        "would be woken",
        "would be published",
    }
    by_ids = told(name, *keys(*rows), "--dry-run", "--json")
    assert executions.snapshot() == before
    would = {result["id"] for result in by_ids.json["results"] if result["ok"]}
    assert would == {result["id"] for result in by_filter.json["results"]}
    assert set(told(name, *keys(*rows), "--dry-run", "-q").out.split()) == would
    really = told(name, *keys(*rows), "--json")
    assert {result["id"] for result in really.json["results"] if result["ok"]} >= would


def test_a_dry_run_says_why_one_would_be_refused() -> None:
    done, nap = failed(), executions.napping()
    answer = told("retry", done.pk, nap.pk, NOBODY, "--dry-run")
    assert answer.code == 1
    lines = answer.out.splitlines()
    assert lines[0].split()[1:4] == ["would", "be", "retried"]
    assert "echo ✕ failed, created " in lines[0]
    assert lines[1].endswith("retry is for failed and cancelled root executions.")
    assert "not found" in lines[2]


# ------------------------------------------------------------------------------------------------- ids alone, and stdin


def test_what_ls_lists_quietly_another_call_reads(stdin: Any) -> None:
    rows = [failed() for _ in range(3)]
    executions.queued()
    ids = told("ls", "-q", "--status", "failed").out
    assert ids.split() == [str(row.pk) for row in reversed(rows)]
    stdin(ids)
    answer = told("retry", "-")
    assert (answer.code, len(answer.out.splitlines())) == (0, 3)
    assert statuses(*rows) == ["queued"] * 3
    stdin(f"  {rows[0].pk}\r\n\n{rows[1].pk!s}\t{rows[0].pk} ")
    assert told("cancel", "-", rows[2].pk, "-q").out.split() == [str(row.pk) for row in rows]


def test_ls_quietly_keeps_what_is_no_id_off_stdout() -> None:
    answer = told("ls", "-q")
    assert (answer.code, answer.out, answer.notes) == (0, "", "No executions.\n")
    for _ in range(2):
        executions.queued()
    answer = told("ls", "-q", "--limit", "1")
    assert (len(answer.out.splitlines()), answer.notes) == (1, "… and older ones: --limit 5 shows more.\n")


@pytest.mark.parametrize("words", [[], ["--json"], ["--dry-run"]])
def test_no_ids_on_stdin_is_no_error(stdin: Any, words: list[str]) -> None:
    row = failed()
    stdin("\n")
    answer = told("retry", "-", *words)
    assert answer.code == 0
    if words == ["--json"]:
        assert answer.json["results"] == []
    else:
        assert answer.out == "No id was read. Nothing was done.\n"
    assert statuses(row) == ["failed"]


def test_a_table_on_stdin_stops_a_call_before_it_does_anything(stdin: Any) -> None:
    row = failed()
    stdin(told("ls").out)
    answer = told("retry", "-")
    assert (answer.code, answer.out) == (2, "")
    assert answer.error.startswith("'id' is not an execution's id.")
    assert statuses(row) == ["failed"]


def test_bytes_on_stdin_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    answer = told("retry", "-")
    assert (answer.code, answer.error.startswith("What stdin has is no text.")) == (2, True)
    monkeypatch.setattr("sys.stdin", None)
    assert told("retry", "-").error == "There is no stdin to read ids from."


def test_every_final_status_is_one_that_rerun_takes() -> None:
    for status in sorted(FINAL_STATUSES):
        assert told("rerun", "--status", status).code == 0
