"""``ExecutionFilter``: what it puts on the records of any logger; and the line of each move."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction

from conductor_app import ExecutionContext, logs, signals, transitions
from conductor_app.host import lines
from conductor_app.logs import NOTHING, ExecutionFilter
from conductor_app.models import Execution
from conductor_app.states import RunOutcome
from conductor_app.store import clock, observing
from tests.app import plain
from tests.integration.test_plain import deliver, plain_child
from tests.support.bodies import advance, child, durable, run, start
from tests.support.executions import FAILURE, OWNER, TASK, queued, running
from tests.support.worker import ROOT

pytestmark = pytest.mark.django_db(transaction=True)

#: A library's, which knows nothing of executions.
elsewhere = logging.getLogger("a.library.of.others")


class Kept(logging.Handler):
    """A handler with the filter, as in ``LOGGING``."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(ExecutionFilter())
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def said(self, text: str) -> list[dict[str, Any]]:
        """The filter's fields of the records that say ``text``."""
        return [_fields(record) for record in self.records if record.getMessage() == text]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in NOTHING}


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    root = logging.getLogger()
    root.addHandler(handler)
    level = elsewhere.level
    elsewhere.setLevel(logging.INFO)
    yield handler
    elsewhere.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    yield
    clock.reset()


def of(execution: Execution, **others: Any) -> dict[str, Any]:
    """The fields of a line about a first run."""
    ids = {"execution_id": str(execution.pk), "root_id": str(execution.root_id), "task": execution.task}
    return {**ids, "step": "", "attempt": 1, "run": 1, **others}


@durable
def inner(ctx: ExecutionContext) -> None:
    elsewhere.info("in the child")


@durable(max_retries=1, retry_jitter=False, retry_backoff=2)
def outer(ctx: ExecutionContext) -> None:
    elsewhere.info("in the body")
    ctx.step("reserve", elsewhere.info, "in a step")
    ctx.atomic_step("book", elsewhere.info, "in an atomic step")
    elsewhere.info("between steps")
    ctx.invoke("inner", inner)
    if ctx.attempt == 1:
        raise ValueError("no")


def test_every_line_of_a_run_bears_its_execution_whoever_logs(kept: Kept) -> None:
    elsewhere.info("before")
    root = start(outer)
    advance(5)
    elsewhere.info("after")
    assert kept.said("before") == kept.said("after") == [NOTHING]
    assert kept.said("in the body") == [of(root), of(root, run=2), of(root, attempt=2, run=3)]
    assert kept.said("in a step") == [of(root, step="reserve")]
    assert kept.said("in an atomic step") == [of(root, step="book")]
    assert kept.said("between steps")[0] == of(root)
    assert kept.said("in the child") == [of(child(root, "inner"))]


def test_a_child_that_runs_inside_its_parents_body_has_its_own_fields(kept: Kept) -> None:
    @durable
    def calls(ctx: ExecutionContext) -> None:
        inner.apply()
        elsewhere.info("again in the parent")

    root = run(calls)
    (other,) = kept.said("in the child")
    assert other["execution_id"] != str(root.pk)
    assert kept.said("again in the parent") == [of(root)]


def test_lines_of_a_plain_task_that_is_a_child_bear_its_execution(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.echo, "run", lambda value: elsewhere.info("in a plain task"))
    execution = plain_child()
    deliver(execution)
    assert kept.said("in a plain task") == [of(execution)]
    elsewhere.info("after")
    assert kept.said("after") == [NOTHING]


def test_a_thread_with_the_bodys_context_and_tasks_of_asyncio_bear_it_and_a_bare_thread_does_not(kept: Kept) -> None:
    async def both() -> None:
        await asyncio.gather(*(asyncio.to_thread(elsewhere.info, "from asyncio") for _ in range(2)))

    def threads() -> None:
        asyncio.run(both())
        context = contextvars.copy_context()
        for target in (lambda: context.run(elsewhere.info, "with context"), lambda: elsewhere.info("bare")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()

    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.step("threads", threads)

    root = run(body)
    assert kept.said("from asyncio") == [of(root, step="threads")] * 2
    assert kept.said("with context") == [of(root, step="threads")]
    assert kept.said("bare") == [NOTHING]


def test_runs_in_two_threads_do_not_mix(kept: Kept) -> None:
    barrier = threading.Barrier(2)

    def at_work(execution: Execution) -> None:
        with logs.about(execution):
            barrier.wait(10)
            elsewhere.info("at once")
            barrier.wait(10)

    both = [plain_child(), plain_child()]
    threads = [threading.Thread(target=at_work, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {fields["execution_id"] for fields in kept.said("at once")}
    assert found == {str(one.pk) for one in both}


def test_what_a_record_has_already_stays_and_a_line_about_another_execution_gets_nothing_of_the_run(
    kept: Kept,
) -> None:
    @durable
    def body(ctx: ExecutionContext) -> None:
        elsewhere.info("own", extra={"task": "the library's"})
        elsewhere.info("of another", extra={"execution_id": "other", "task": "t"})
        ctx.logger.info("by ctx")

    root = run(body)
    assert kept.said("own") == [of(root, task="the library's")]
    assert kept.said("of another") == [{**NOTHING, "execution_id": "other", "task": "t"}]
    assert kept.said("by ctx") == [of(root)]


def test_a_format_may_name_the_fields_everywhere() -> None:
    formatter = logging.Formatter("[%(execution_id)s/%(root_id)s %(task)s %(step)s %(attempt)s %(run)s] %(message)s")
    record = logging.LogRecord("any", logging.INFO, __file__, 1, "hello", None, None)
    assert ExecutionFilter().filter(record)
    assert formatter.format(record) == "[/  " + " None None] hello"


def test_django_can_set_it_up_before_the_apps_are_there() -> None:
    code = """
import json, logging, sys
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "conductor_app"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    LOGGING={
        "version": 1,
        "filters": {"execution": {"()": "conductor_app.logs.ExecutionFilter"}},
        "formatters": {"ids": {"format": "<%(execution_id)s> %(message)s"}},
        "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout",
                             "filters": ["execution"], "formatter": "ids"}},
        "root": {"handlers": ["out"], "level": "INFO"},
    },
)
import django
django.setup()
logging.getLogger("x").info("hello")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "<> hello\n"


def moves(caplog: pytest.LogCaptureFixture, execution: Execution) -> list[dict[str, Any]]:
    """The fields of the lines of an execution's moves."""
    found = []
    for record in caplog.records:
        if record.name == "conductor_app.execution" and record.__dict__["execution_id"] == str(execution.pk):
            found.append({name: record.__dict__[name] for name in (*NOTHING, "move", "worker", "seconds", "error")})
            found[-1]["level"] = record.levelname
    return found


def test_each_move_has_a_line_with_the_same_fields(caplog: pytest.LogCaptureFixture, kept: Kept) -> None:
    caplog.set_level(logging.DEBUG, "conductor_app.execution")
    root = start(outer)
    advance(5)
    found = moves(caplog, root)
    assert [(line["level"], line["move"], line["attempt"], line["run"]) for line in found] == [
        ("DEBUG", "created", 1, 0),
        ("DEBUG", "started", 1, 1),
        ("DEBUG", "suspended", 1, 1),
        ("DEBUG", "started", 1, 2),
        ("WARNING", "retrying", 1, 2),
        ("DEBUG", "started", 2, 3),
        ("INFO", "succeeded", 2, 3),
    ]
    assert [line["step"] for line in found] == ["", "", "inner", "", "", "", ""]
    assert [line["error"] for line in found] == ["", "", "", "", "builtins.ValueError", "", ""]
    assert found[0]["seconds"] is None
    assert all(0 <= line["seconds"] < 60 for line in found[1:])
    assert found[-1]["seconds"] >= 5
    assert {line["root_id"] for line in found} == {str(root.pk)}
    assert found[0]["worker"] == ""
    assert len({line["worker"] for line in found[1:]}) == 1
    assert found[1]["worker"]
    json.dumps(found)
    other = moves(caplog, child(root, "inner"))
    assert [line["move"] for line in other] == ["created", "started", "succeeded"]
    assert {line["root_id"] for line in other} == {str(root.pk)}
    # The filter leaves a line about a child alone, in the parent's run, too.
    created = [record for record in kept.records if getattr(record, "move", "") == "created"]
    assert [record.__dict__["run"] for record in created] == [0, 0]


def test_runs_that_are_lost_or_released_have_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "conductor_app.execution")
    lost = running()
    assert transitions.lose(lost.pk, owner=OWNER)
    assert [(line["level"], line["move"]) for line in moves(caplog, lost)][-2:] == [
        ("WARNING", "lost"),
        ("WARNING", "retrying"),
    ]
    assert moves(caplog, lost)[-1]["error"] == "conductor_app.exceptions.WorkerLost"
    released = running()
    transitions.release(released)
    assert moves(caplog, released)[-1]["move"] == "released"
    assert moves(caplog, released)[-1]["seconds"] is not None


def test_children_that_are_cancelled_unstarted_have_a_line_that_reads_nothing_more(
    caplog: pytest.LogCaptureFixture, django_assert_num_queries: Any
) -> None:
    caplog.set_level(logging.DEBUG, "conductor_app.execution")
    execution = queued()
    rows = Execution.objects.filter(pk=execution.pk)
    (row,) = transitions.waking.cancel_unstarted(rows, "enough")
    (line,) = [line for line in moves(caplog, execution) if line["move"] == "cancelled"]
    assert line["seconds"] is not None
    assert line["run"] is None
    with django_assert_num_queries(0):
        lines.on_finished(row, "cancelled")


def test_what_comes_with_each_run_costs_nothing_where_nobody_sees_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conductor_app.execution")
    for signal in observing.lines:
        assert not signal.has_listeners()
        assert not observing.is_noticed(signal, "any")
    root = start(inner)
    assert [line["move"] for line in moves(caplog, root)] == ["succeeded"]


def test_a_line_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_kwargs: Any) -> None:
        raise RuntimeError("no")

    caplog.set_level(logging.DEBUG, "conductor_app.execution")
    for signal in list(observing.lines):
        monkeypatch.setitem(observing.lines, signal, refuse)
    assert start(inner).status == "succeeded"
    assert "The line of a move failed." in caplog.text


def test_each_end_of_a_run_is_told_with_its_outcome() -> None:
    heard: list[tuple[str, str, int]] = []

    def hear(execution: Execution, outcome: RunOutcome, **_kwargs: Any) -> None:
        heard.append((execution.task, str(outcome), execution.fence))

    signals.run_ended.connect(hear)
    try:
        start(outer)
        advance(5)
        transitions.release(running())
        assert transitions.lose(running().pk, owner=OWNER)
        transitions.fail(running(), FAILURE)
        flagged = running()
        transitions.request_cancel(flagged.pk, "enough")
        transitions.cancel_running(flagged)
        with transaction.atomic():
            transitions.release(running())
            transaction.set_rollback(True)
    finally:
        signals.run_ended.disconnect(hear)
    assert [heard_of[1:] for heard_of in heard if heard_of[0] == outer.name] == [
        ("suspended", 1),
        ("retried", 2),
        ("succeeded", 3),
    ]
    assert [outcome for task, outcome, _run in heard if task == inner.name] == ["succeeded"]
    assert [outcome for task, outcome, _run in heard if task == TASK] == ["released", "lost", "failed", "cancelled"]


def test_its_fields_are_json() -> None:
    assert json.loads(json.dumps(NOTHING)) == NOTHING


def test_no_query_is_made_for_it(kept: Kept, django_assert_num_queries: Any) -> None:
    execution = plain_child()
    bare = Execution.objects.only("id", "task").get(pk=execution.pk)
    with django_assert_num_queries(0), logs.about(bare):
        elsewhere.info("hello")
    assert kept.said("hello")[0]["execution_id"] == str(execution.pk)
