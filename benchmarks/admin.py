"""How long the admin takes beside many executions.

python -m benchmarks.admin [--rows=1000000] [--rounds=7]: fills the tables of a test database, and times each page
through Django's test client. ``DATABASE_URL`` chooses the database; it has to be PostgreSQL.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

from rich.table import Table

from benchmarks import stack

BOUND_SECONDS = 0.3
#: One in so many fails, is cancelled, or is open.
EACH = 100
#: Runs of each execution.
RUNS = 3


def main() -> int:
    """Fill, measure, print; the exit code is 1 if a page takes longer than it may."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.admin")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    stack.setup()
    from django.db import connection

    if connection.vendor != "postgresql":
        parser.error("DATABASE_URL has to name a PostgreSQL database")
    with stack.fresh_database():
        stack.console.print(f"Filling the tables: {options.rows:,} executions ...")
        _fill(options.rows)
        return _measure(options.rows, options.rounds)


def _fill(rows: int) -> None:
    """Store executions of the last 30 days: trees of one root and one child, and a step for each child."""
    from django.db import connection

    roots = rows // 2
    with connection.cursor() as cursor:
        cursor.execute(
            """
            CREATE TEMPORARY TABLE filling AS
            SELECT n, at, status, (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
                || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid AS root
            FROM (
                SELECT n, now() - interval '30 days' * (1 - n::float / %(roots)s) - interval '1 minute' AS at,
                    CASE n %% %(each)s WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled'
                        WHEN 2 THEN CASE n / %(each)s %% 3 WHEN 0 THEN 'queued' WHEN 1 THEN 'running' ELSE 'waiting' END
                        ELSE 'succeeded' END AS status
                FROM generate_series(1, %(roots)s) AS n
            ) AS numbers
            """,
            {"roots": roots, "each": EACH},
        )
        for is_child in (False, True):
            key = "(overlay(root::text placing '8' from 15 for 1))::uuid" if is_child else "root"
            cursor.execute(
                f"""
                INSERT INTO conductor_app_execution (id, task, queue, payload, status, attempt, max_attempts, result,
                    error, parent_id, root_id, depth, step, fence, lease_owner, lease_expires_at, due_at, dispatch_at,
                    dispatches, cancel_reason, options, idempotency_key, created_at, started_at, finished_at)
                SELECT {key}, CASE WHEN n < %(roots)s / 20 THEN 'shop.tasks.retired' WHEN n %% 5000 = 7
                        THEN 'shop.tasks.rare' ELSE 'shop.tasks.{"charge" if is_child else "fulfil"}' END,
                    CASE n %% 10 WHEN 0 THEN 'payments' ELSE 'celery-benchmark' END, '[[],{{"order_id":' || n || '}}]',
                    status, 1, 4, CASE status WHEN 'succeeded' THEN '{{"receipt":"' || md5(n::text) || '"}}' END, NULL,
                    {"root" if is_child else "NULL"}, root, {int(is_child)}, '{"charge" if is_child else ""}', 2,
                    CASE status WHEN 'running' THEN 'celery@web' || n %% 4 || '/' || n %% 8 ELSE '' END,
                    CASE status WHEN 'running' THEN now() + interval '1 minute' END, at,
                    CASE status WHEN 'queued' THEN now() + interval '1 minute' END, 0, '', '',
                    {"NULL" if is_child else "'order-' || n"}, at, at + interval '1 second',
                    CASE WHEN status IN ('succeeded', 'failed', 'cancelled') THEN at + interval '3 seconds' END
                FROM filling ORDER BY n
                """,
                {"roots": roots},
            )
        cursor.execute(
            """
            INSERT INTO conductor_app_step (execution_id, name, kind, status, task, payload_digest, child_id,
                on_timeout, attempt, fence, created_at, finished_at)
            SELECT parent_id, 'charge', 'invoke', CASE status WHEN 'waiting' THEN 'pending' WHEN 'queued' THEN 'pending'
                    WHEN 'running' THEN 'pending' ELSE status END, task, '', id, 'cancel', 1, 1, created_at, finished_at
            FROM conductor_app_execution WHERE parent_id IS NOT NULL ORDER BY id
            """
        )
        cursor.execute(
            """
            INSERT INTO conductor_app_failedexecution (execution_id, task, attempts, error_class, message, traceback,
                step, root_cause_id, failed_at)
            SELECT execution.id, execution.task, 4, CASE WHEN child.id IS NULL THEN 'shop.errors.CardDeclined'
                ELSE 'conductor_app.exceptions.ChildFailed' END, 'card declined for order ' || md5(execution.id::text),
                repeat('File "shop/tasks.py", line 1', 50), CASE WHEN child.id IS NULL THEN '' ELSE 'charge' END,
                child.id, execution.finished_at
            FROM conductor_app_execution AS execution
            LEFT JOIN conductor_app_execution AS child ON child.parent_id = execution.id
            WHERE execution.status = 'failed' ORDER BY execution.finished_at
            """
        )
        cursor.execute(
            """
            INSERT INTO conductor_app_event (execution_id, name, key, payload, step_id, taken_at, created_at)
            SELECT id, 'approved', 'mail-1', 'true', NULL, CASE WHEN status <> 'waiting' THEN finished_at END,
                created_at
            FROM conductor_app_execution WHERE parent_id IS NULL ORDER BY id
            """
        )
        cursor.execute(
            """
            INSERT INTO conductor_app_attempt (execution_id, attempt, run, worker, due_at, started_at, finished_at,
                outcome, step, error_class, message, traceback)
            SELECT id, 1, run, 'celery@web' || run || '/' || run, created_at, created_at + interval '0.1 second' * run,
                created_at + interval '0.9 second' * run,
                CASE WHEN run < %(runs)s THEN 'suspended' WHEN status = 'failed' THEN 'failed' ELSE 'succeeded' END,
                CASE WHEN run < %(runs)s THEN 'charge' ELSE '' END, '', '', ''
            FROM conductor_app_execution, generate_series(1, %(runs)s) AS runs(run) ORDER BY id, run
            """,
            {"runs": RUNS},
        )
        cursor.execute(
            """
            INSERT INTO conductor_app_tag (root_id, key, value)
            SELECT root, key, CASE key WHEN 'tenant' THEN 'acme-' || n %% 10 WHEN 'order' THEN n::text
                WHEN 'kind' THEN 'web' ELSE 'north-' || n %% 100 END
            FROM filling, unnest(ARRAY['tenant', 'order', 'kind', 'region']) AS keys(key) ORDER BY n
            """,
            {},
        )
        cursor.execute("VACUUM ANALYZE")


def _addresses() -> Iterator[tuple[str, str]]:
    from conductor_app.admin import causes
    from conductor_app.models import Execution

    root = Execution.objects.filter(parent=None).order_by("-id")[1_000].pk
    old = Execution.objects.order_by("id")[1_000].pk
    lists = "/admin/conductor_app/execution/"
    for name, query in {
        "all": "",
        "page 200": "?p=200",
        "before an old one": f"?before={old}",
        **{
            f"status {status}": f"?status__exact={status}"
            for status in ("queued", "running", "waiting", "succeeded", "failed", "cancelled")
        },
        **{f"tree created {span}": f"?within={span}" for span in ("1h", "24h", "7d", "30d")},
        "kind root": "?kind=root",
        "kind child": "?kind=child",
        "failed child": "?failed_child=1",
        "task, frequent": "?task=shop.tasks.fulfil",
        "task, rare": "?task=shop.tasks.rare",
        "task, retired": "?task=shop.tasks.retired",
        "task, none": "?task=shop.tasks.none",
        "queue, frequent": "?queue=celery-benchmark",
        "queue, none": "?queue=none",
        "cancelled, queue, 30d": "?status__exact=cancelled&queue=payments&within=30d",
        "failed, task, child": "?status__exact=failed&task=shop.tasks.charge&kind=child",
        "search an id": f"?q={root}",
        "search a key": "?q=key:order-77",
        "search a task": "?q=shop.tasks.fulfil",
        "search nonsense": "?q=nonsense",
        "tag, frequent": "?tag=tenant:acme-3",
        "tag, rare": "?tag=order:77",
        "tag, none": "?tag=order:none",
        "tag and status": "?tag=tenant:acme-3&status__exact=failed",
        "JSON": "json/",
    }.items():
        yield f"executions: {name}", f"{lists}{query}"
    for name, query in {
        "all": "",
        "status pending": "?status__exact=pending",
        "status failed": "?status__exact=failed",
        "kind map (none)": "?kind__exact=map",
        "created 1h": "?within=1h",
        "search an id": f"?q={root}",
    }.items():
        yield f"steps: {name}", f"/admin/conductor_app/step/{query}"
    for name, query in {"all": "", "not taken": "?taken_at__isempty=1", "search an id": f"?q={root}"}.items():
        yield f"events: {name}", f"/admin/conductor_app/event/{query}"
    cause = causes.groups()[0].cause
    for name, query in {
        "all": "",
        "failed 24h": "?within=24h",
        "root failures": "?scope=roots",
        "root causes": "?scope=causes",
        "error class": "?error_class=shop.errors.CardDeclined",
        "error class, none": "?error_class=none",
        "task": "?task=shop.tasks.charge",
        "cause": f"?cause={cause}",
        "cause, roots": f"?cause={cause}&scope=roots",
    }.items():
        yield f"failed executions: {name}", f"/admin/conductor_app/failedexecution/{query}"
    yield "overview", f"{lists}overview/"
    yield "what takes long: an hour", f"{lists}slow/"
    yield "what takes long: a day", f"{lists}slow/?period=day"
    yield "workers and queues", f"{lists}workers/"
    yield "a comparison", f"{lists}{root}/compare/"
    yield "an execution's page", f"{lists}{root}/change/"
    yield "an execution's JSON", f"{lists}{root}/json/"


def _measure(rows: int, rounds: int) -> int:
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.core.cache import cache
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    settings.ALLOWED_HOSTS = ["testserver"]
    client = Client()
    client.force_login(User.objects.create_superuser("benchmark"))
    columns = ("page", "median ms", "fastest ms", "Python's processor ms", "database ms", "queries")
    table = Table(*columns, title=f"{rows:,} executions")
    late = 0
    for name, address in _addresses():
        times, processor = [], []
        for _ in range(rounds + 1):
            cache.clear()
            began, started = time.process_time(), time.perf_counter()
            with CaptureQueriesContext(connection) as queries:
                response = client.get(address)
            times.append(time.perf_counter() - started)
            processor.append(time.process_time() - began)
            if response.status_code != 200:
                raise RuntimeError(f"{address} answers with {response.status_code}")
        # The first one warms the server's cache.
        median = statistics.median(times[1:])
        late += median > BOUND_SECONDS
        ours = 1_000 * sum(float(query["time"]) for query in queries)
        table.add_row(
            name,
            f"{1_000 * median:.0f}",
            f"{1_000 * min(times[1:]):.0f}",
            f"{1_000 * statistics.median(processor[1:]):.0f}",
            f"{ours:.0f}",
            str(len(queries)),
            style="bold red" if median > BOUND_SECONDS else "",
        )
    stack.console.print(table)
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
