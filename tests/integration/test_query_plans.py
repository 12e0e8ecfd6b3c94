"""Beside 100,000 finished executions, whatever runs all the time, or is looked at, reads the few that are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from conductor_app import transitions
from conductor_app.engine import sweeper
from conductor_app.metrics import DatabaseCollector
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.telling import story
from conductor_app.transitions import steps
from conductor_app.transitions.leases import Lease, renew
from tests.support.executions import OWNER

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.skipif(connection.vendor == "mysql", reason="looks into PostgreSQL and SQLite"),
]

FINISHED = 100_000
OPEN = 1_000

EXECUTIONS, STEPS, FAILURES, EVENTS = (model._meta.db_table for model in (Execution, Step, FailedExecution, Event))


@pytest.fixture(scope="module")
def open_ids(django_db_setup: None, django_db_blocker: Any) -> Iterator[dict[str, Any]]:
    """Fill the tables for the tests of this module; an open execution's id for each status."""
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # What tests with thousands of rows have rolled back is in the indexes still, and would be counted.
            cursor.execute(f"TRUNCATE {EXECUTIONS}, {STEPS}, {FAILURES}, {EVENTS}")
        for statement in _filling():
            cursor.execute(statement)
        if connection.vendor == "postgresql":
            cursor.execute(f"ANALYZE {EXECUTIONS}, {STEPS}")
        rows = Execution.objects.filter(finished_at=None).order_by("id")
        yield {row.status: row.pk for row in rows.only("status")}
        if connection.vendor == "postgresql":
            cursor.execute(f"TRUNCATE {EXECUTIONS}, {STEPS}, {FAILURES}, {EVENTS}")
        else:
            cursor.execute(f"DELETE FROM {STEPS}")
            cursor.execute(f"DELETE FROM {EXECUTIONS}")


def _filling() -> list[str]:
    """SQL for finished executions, half of them cancelled by request, and for open ones; each with a step."""
    if connection.vendor == "postgresql":
        numbers = f"generate_series(1, {FINISHED + OPEN}) AS numbers(n)"
        key = "lpad(to_hex(n), 32, '0')::uuid"
        now, later = "now()", "now() + interval '1 day'"
    else:
        numbers = (
            f"(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {FINISHED + OPEN}) "
            "SELECT n FROM numbers)"
        )
        key = "printf('%032x', n)"
        now, later = "strftime('%Y-%m-%d %H:%M:%f', 'now')", "strftime('%Y-%m-%d %H:%M:%f', 'now', '+1 day')"
    status = f"""CASE WHEN n > {FINISHED} THEN CASE n % 3 WHEN 0 THEN 'queued' WHEN 1 THEN 'running' ELSE 'waiting' END
        WHEN n % 2 = 0 THEN 'cancelled' WHEN n % 10 = 1 THEN 'failed' ELSE 'succeeded' END"""
    executions = f"""
        INSERT INTO {EXECUTIONS} (id, task, queue, payload, status, attempt, max_attempts, root_id, depth, step, fence,
            lease_owner, lease_expires_at, due_at, dispatch_at, dispatches, cancel_requested_at, cancel_reason, options,
            created_at, started_at, finished_at)
        SELECT id, 'task', 'queue', '[[],{{}}]', status, 1, 1, id, 0, '', 1, '{OWNER}',
            CASE status WHEN 'running' THEN {later} END, {now},
            CASE status WHEN 'queued' THEN {later} END, 0,
            CASE status WHEN 'cancelled' THEN {now} END, '', '', {now}, {now},
            CASE WHEN status IN ('succeeded', 'failed', 'cancelled') THEN {now} END
        FROM (SELECT {key} AS id, {status} AS status FROM {numbers}) AS to_insert"""
    naps = f"""
        INSERT INTO {STEPS} (execution_id, name, kind, status, task, payload_digest, on_timeout, deadline_at, attempt,
            fence, created_at, finished_at)
        SELECT id, 'nap', 'sleep', CASE status WHEN 'waiting' THEN 'pending' ELSE 'succeeded' END, '', '', '', {later},
            1, 1, {now}, CASE status WHEN 'waiting' THEN NULL ELSE {now} END
        FROM {EXECUTIONS}"""
    return [executions, naps]


# What runs all the time, on the id of an open execution of some status


def sweep_and_audit(ids: dict[str, Any]) -> None:
    sweeper.sweep(audit=True, publish=False)


def take_messages_to_publish(ids: dict[str, Any]) -> None:
    transitions.take_for_dispatch(500)


def feed_a_worker(ids: dict[str, Any]) -> None:
    transitions.take_for_dispatch(8, ["queue", "other"])


def claim_one(ids: dict[str, Any]) -> None:
    assert transitions.claim(ids["queued"], OWNER, "task")


def recall_its_steps(ids: dict[str, Any]) -> None:
    assert steps.recall(ids["waiting"])


def renew_a_lease(ids: dict[str, Any]) -> None:
    renew([Lease(Execution(pk=ids["running"], fence=1, lease_owner=OWNER))])


def take_from_a_dead_process(ids: dict[str, Any]) -> None:
    assert transitions.lose(ids["running"], owner=OWNER)


def cancel_one(ids: dict[str, Any]) -> None:
    assert transitions.request_cancel(ids["waiting"], "")
    assert transitions.cancel_flagged(ids["waiting"])


def send_an_event(ids: dict[str, Any]) -> None:
    assert transitions.send(ids["waiting"], "approved", "1", "mail-7")
    assert not transitions.send(ids["waiting"], "approved", "1", "mail-7")


def scrape_the_gauges(ids: dict[str, Any]) -> None:
    assert list(DatabaseCollector().collect())


def tell_about_one(ids: dict[str, Any]) -> None:
    assert story.read(ids["waiting"], preview=500)


@pytest.mark.parametrize(
    "act",
    [
        sweep_and_audit,
        take_messages_to_publish,
        feed_a_worker,
        claim_one,
        recall_its_steps,
        renew_a_lease,
        take_from_a_dead_process,
        cancel_one,
        send_an_event,
        scrape_the_gauges,
        tell_about_one,
    ],
)
def test_it_reads_only_what_is_open(open_ids: dict[str, Any], act: Callable[[dict[str, Any]], None]) -> None:
    if connection.vendor == "sqlite":
        assert _work_of_sqlite(act, open_ids) < FINISHED, "SQLite's machine needs more than one step to read a row"
        return
    for sql, plan in _plans_of_postgresql(act, open_ids):
        nodes = list(_nodes(plan))
        scanned = {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}
        assert not scanned - EMPTY, sql
        # Two indexes on the status count what each of them finds; more than that is not "what is open".
        read = max(node["Actual Rows"] + node.get("Rows Removed by Filter", 0) for node in nodes)
        assert read <= 2 * OPEN, f"{read} rows are read by {sql}"


#: Tables that are empty here, so that PostgreSQL takes no index for them.
EMPTY = {f"conductor_app_{name}" for name in ("limitkey", "operation", "pausedtask", "place", "schedule")}


def _work_of_sqlite(act: Callable[[dict[str, Any]], None], ids: dict[str, Any]) -> int:
    """How many steps SQLite's virtual machine makes."""
    ticks: list[int] = []
    with transaction.atomic():
        connection.connection.set_progress_handler(lambda: ticks.append(1), 100)
        try:
            act(ids)
        finally:
            connection.connection.set_progress_handler(None, 0)
        transaction.set_rollback(True)
    return 100 * len(ticks)


def _plans_of_postgresql(act: Callable[[dict[str, Any]], None], ids: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each statement about our tables, and what PostgreSQL did to carry it out."""
    statements: list[tuple[str, Any]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if EXECUTIONS in sql or STEPS in sql:
            statements.append((sql, params))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note), transaction.atomic():
        act(ids)
        transaction.set_rollback(True)
    assert statements
    for sql, params in statements:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {sql}", params)
            yield sql, cursor.fetchone()[0][0]["Plan"]
            transaction.set_rollback(True)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
