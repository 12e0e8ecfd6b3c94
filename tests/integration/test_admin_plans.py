"""Beside 100,000 executions, each page of the admin reads the few thousand rows that it may, whatever is filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache
from django.db import connection, transaction
from django.test import Client

from conductor_app.admin import causes, changelist, figures, filters, paginator
from conductor_app.models import Attempt, Execution, Tag
from conductor_app.telling import workers
from tests.integration.test_query_plans import EVENTS, EXECUTIONS, FAILURES, STEPS, open_ids  # noqa: F401
from tests.support.command import told

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(connection.vendor == "mysql", reason="looks into PostgreSQL and SQLite"),
]

ATTEMPTS, TAGS = Attempt._meta.db_table, Tag._meta.db_table

trusts_the_index = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="SQLite has no statistics, and reads all that has the task"
)

needs_times = pytest.mark.skipif(
    connection.vendor == "sqlite",
    reason="all ids here begin with one instant: no window bounds the children",
)

#: Instead of 50,000 and 10,000, so that 100,000 rows are many.
WINDOW = 2_000
COUNTED = 500
#: A page counts, looks for the window's end, and reads the window twice.
MOST_ROWS = 4 * WINDOW
#: Steps of SQLite's machine: some 20 for each row that a filter looks at, and Python's part of TRUNC.
MOST_STEPS = 40 * MOST_ROWS


@pytest.fixture(scope="module")
def filled(open_ids: dict[str, Any], django_db_blocker: Any) -> Iterator[dict[str, Any]]:  # noqa: F811
    """Failures and events beside the executions and steps; all are deleted with them."""
    failed_at = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || (rowid / 100.0) || ' seconds')"
    if connection.vendor == "postgresql":
        failed_at = "now() - interval '10 ms' * row_number() OVER (ORDER BY id)"
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(
            f"""INSERT INTO {FAILURES} (execution_id, task, attempts, error_class, message, traceback, step, failed_at)
            SELECT id, task, 1, 'shop.CardDeclined', 'card declined', '', '', {failed_at} FROM {EXECUTIONS}
            WHERE status = 'failed'"""
        )
        cursor.execute(
            f"""INSERT INTO {EVENTS} (execution_id, name, key, payload, taken_at, created_at)
            SELECT id, 'approved', 'mail-7', '1', finished_at, created_at FROM {EXECUTIONS}"""
        )
        cursor.execute(
            f"""INSERT INTO {ATTEMPTS} (execution_id, attempt, run, worker, due_at, started_at, finished_at, outcome,
                step, error_class, message, traceback)
            SELECT id, 1, 1, 'w@h/1', created_at, created_at, created_at, 'succeeded', '', '', '', ''
            FROM {EXECUTIONS}"""
        )
        number = "row_number() OVER (ORDER BY id)"
        for key, value in (("order", f"{number}"), ("tenant", f"{number} % 10")):
            text = "text" if connection.vendor == "postgresql" else "TEXT"
            cursor.execute(
                f"INSERT INTO {TAGS} (root_id, key, value) "
                f"SELECT id, '{key}', CAST({value} AS {text}) FROM {EXECUTIONS}"
            )
        if connection.vendor == "postgresql":
            cursor.execute(f"ANALYZE {FAILURES}, {EVENTS}, {TAGS}, {ATTEMPTS}")
        yield open_ids
        cursor.execute(f"DELETE FROM {ATTEMPTS}")
        cursor.execute(f"DELETE FROM {TAGS}")
        cursor.execute(f"DELETE FROM {EVENTS}")
        cursor.execute(f"DELETE FROM {FAILURES}")


@pytest.fixture(autouse=True)
def _bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changelist, "WINDOW", WINDOW)
    for module in (changelist, paginator):
        monkeypatch.setattr(module, "COUNTED", COUNTED)
    # More keys than that are not worth an index to PostgreSQL, in a table of 10,000 rows.
    monkeypatch.setattr(causes, "LATEST", 50)
    monkeypatch.setattr(filters, "LATEST_FAILURES", COUNTED)
    monkeypatch.setattr(figures, "LATEST", WINDOW)
    monkeypatch.setattr(figures, "MOST_OPEN", COUNTED)
    monkeypatch.setattr(workers, "LATEST_RUNS", COUNTED)
    cache.clear()


@pytest.mark.parametrize(
    "page",
    [
        "execution/",
        "execution/?p=10",
        *(f"execution/?status__exact={status}" for status in ("queued", "running", "waiting")),
        *(f"execution/?status__exact={status}" for status in ("succeeded", "failed", "cancelled")),
        "execution/?status__exact=failed&queue=none&kind=child",
        "execution/?status__exact=waiting&task=none",
        "execution/?within=1h",
        "execution/?kind=root",
        "execution/?kind=child",
        pytest.param("execution/?failed_child=1", marks=needs_times),
        pytest.param("execution/?task=task", marks=trusts_the_index),
        "execution/?task=none",
        "execution/?queue=none",
        "execution/?depth=7",
        "execution/?root__id__exact={waiting}",
        "execution/?q={waiting}",
        "execution/?q=key:order-7",
        pytest.param("execution/?q=task", marks=trusts_the_index),
        "execution/?q=none",
        "execution/?tag=order%3D7",
        "execution/?tag=tenant%3D7",
        "execution/?tag=tenant%3D7&status__exact=waiting",
        "execution/?tag=tenant%3D7&status__exact=succeeded",
        "execution/?tag=tenant%3Dnone",
        "execution/json/?tag=tenant%3D7",
        "execution/?o=2.-3",
        "execution/json/?queue=none",
        "execution/overview/",
        "execution/workers/",
        "execution/{waiting}/json/",
        "step/",
        "step/?status__exact=pending",
        "step/?status__exact=failed",
        "step/?kind__exact=map",
        "step/?within=1h",
        "step/?q={waiting}",
        "event/",
        "event/?taken_at__isempty=1",
        "event/?q={waiting}",
        "failedexecution/",
        "failedexecution/?within=1h",
        "failedexecution/?scope=roots",
        "failedexecution/?scope=causes",
        "failedexecution/?error_class=none",
        "failedexecution/?task=none",
        "failedexecution/?cause=none",
        "failedexecution/?cause={cause}&scope=roots",
        "failedexecution/?q={waiting}",
    ],
)
def test_a_page_reads_a_bounded_number_of_rows(client: Client, filled: dict[str, Any], page: str) -> None:
    client.force_login(User.objects.create_superuser("ana"))
    cause = causes.cause_of("shop.CardDeclined", "card declined")
    address = f"/admin/conductor_app/{page.format(waiting=filled['waiting'], cause=cause)}"
    if connection.vendor == "sqlite":
        ticks: list[int] = []
        connection.connection.set_progress_handler(lambda: ticks.append(1), 100)
        try:
            assert client.get(address).status_code == 200
        finally:
            connection.connection.set_progress_handler(None, 0)
        assert 100 * len(ticks) <= MOST_STEPS
        return
    for sql, plan in _plans(lambda: client.get(address).status_code == 200):
        read = max(_rows(node) for node in _nodes(plan))
        assert read <= MOST_ROWS, f"{read} rows are read by {sql}"


def _plans(look: Callable[[], object]) -> Iterator[tuple[str, Any]]:
    statements: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if any(table in sql for table in (EXECUTIONS, STEPS, FAILURES, EVENTS, TAGS, ATTEMPTS)):
            statements.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        assert look()
    assert statements
    for sql, params in statements:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {sql}", params)
            yield sql, cursor.fetchone()[0][0]["Plan"]


def _rows(node: dict[str, Any]) -> float:
    """How many rows a node has looked at, over all its rounds."""
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float((node["Actual Rows"] + removed) * node["Actual Loops"])


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def test_the_tables_are_as_full_as_these_tests_believe(filled: dict[str, Any]) -> None:
    assert Execution.objects.count() > 10 * MOST_ROWS


def test_a_command_finds_the_trees_with_a_rare_tag_by_its_index(filled: dict[str, Any]) -> None:
    words = ("ls", "--json", "--tag", "order=7", "--tag", "tenant=7")
    if connection.vendor == "sqlite":
        ticks: list[int] = []
        connection.connection.set_progress_handler(lambda: ticks.append(1), 100)
        try:
            assert len(told(*words).json["executions"]) == 1
        finally:
            connection.connection.set_progress_handler(None, 0)
        assert 100 * len(ticks) <= MOST_STEPS
        return
    for sql, plan in _plans(lambda: told(*words).json["executions"]):
        read = max(_rows(node) for node in _nodes(plan))
        assert read <= 1_000, f"{read} rows are read by {sql}"
