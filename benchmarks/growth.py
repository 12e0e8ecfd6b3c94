"""An empty table against a full one: latency, what each statement touches, its plan, and what an idle system does.

The full one holds a million finished executions and 100,000 suspended parents, each with a child that waits for an
event, with all of their steps. Plans are those that PostgreSQL really used, from ``auto_explain``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import redis
from rich.console import Console
from rich.table import Table

from benchmarks.measure import IDLE_SECONDS, Failed, Run
from benchmarks.peers import ALL
from benchmarks.results import Results, number, percentile
from benchmarks.servers import Servers, servers
from benchmarks.systems.base import SEQUENCE, TRIVIAL

FINISHED, WAITING, CALLS = 1_000_000, 100_000, 30
#: How long nothing is asked of the system, and how often it audits itself meanwhile.
QUIET_SECONDS, AUDIT_SECONDS = 25, 10
SHOWN = 14

#: Ids as they are: time first, so that a tree lies together. ``n`` counts trees, ``k`` the executions of one.
_ID = (
    "(lpad(to_hex(1700000000000 + {n}), 12, '0') || '7000' || '8' || lpad(to_hex({k}), 3, '0')"
    " || lpad(to_hex({n}), 12, '0'))::uuid"
)
_EXECUTION = """
INSERT INTO conductor_app_execution (id, task, queue, payload, status, attempt, result, parent_id, root_id, depth, step,
    fence, lease_owner, dispatches, cancel_reason, options, created_at, started_at, finished_at)
SELECT {id}, {task}, 'elsewhere', '[[], {{"n": 1}}]', {status}, 1, {result}, {parent}, {root}, {depth}, {step},
    1, '', 0, '', '', now(), now(), {finished}
FROM generate_series({first}, {last}) AS n, generate_series({from_child}, {to_child}) AS k
"""
_BYTES_EACH = """
SELECT (pg_total_relation_size('conductor_app_execution') + pg_total_relation_size('conductor_app_step'))
    / greatest(count(*), 1) FROM conductor_app_execution
"""
_STEP = """
INSERT INTO conductor_app_step (execution_id, name, kind, status, task, payload_digest, child_id, on_timeout, attempt,
    fence, created_at, finished_at)
SELECT {execution}, 'child-' || k, {kind}, {status}, {task}, '', {child}, 'cancel', 1, 1, now(), {finished}
FROM generate_series({first}, {last}) AS n, generate_series({from_child}, {to_child}) AS k
"""


@dataclass
class Found:
    """What one table size gave."""

    w1: float
    w4: float
    #: While nothing is asked of it, for each second.
    statements: float
    rows: float
    blocks: float
    messages: float
    #: By text: calls, milliseconds and blocks for each call.
    by_text: dict[str, tuple[int, float, float]]
    #: By text: how tables are read.
    plans: dict[str, str]
    #: What an execution takes on disk, with its steps and all indexes.
    bytes_each: float | None


def growth(options: argparse.Namespace, console: Console) -> int:
    """Measure both, print them, and keep them with the other results."""
    finished = max(400, round(FINISHED * options.scale) // 4 * 4)
    waiting = max(100, round(WAITING * options.scale))
    # Versions before 16 have no query id in a plan, but in the prefix of its line.
    settings = {"pg_stat_statements.max": "20000", "compute_query_id": "on", "log_line_prefix": "q=%Q:"}
    with servers({"redis"}, settings) as started:
        if "redis" not in started.brokers:
            console.print(started.missing["redis"], style="red")
            return 1
        try:
            empty = _measure(started, options, console, 0, 0)
            full = _measure(started, options, console, finished, waiting)
        except Failed as error:
            console.print(str(error), style="red")
            return 1
    rows, statements = compare(empty, full)
    results = Results.load(options.output) if options.output.exists() else Results()
    results.growth = {"finished": finished, "waiting": waiting, "rows": rows, "statements": statements}
    results.save(options.output)
    heading = ["", "empty", f"{finished:,} finished, {waiting:,} waiting"]
    for lines in ([heading, *rows], statements):
        table = Table(*lines[0])
        for row in lines[1:]:
            table.add_row(*row)
        console.print(table)
    return 0


def compare(empty: Found, full: Found) -> tuple[list[list[str]], list[list[str]]]:
    """The two tables: the whole, and statement by statement, what touches the most first."""
    rows = [
        ["W1, p50 ms", number(empty.w1), number(full.w1)],
        ["W4, p50 ms", number(empty.w4), number(full.w4)],
        ["idle: statements/s, two workers", number(empty.statements), number(full.statements)],
        ["idle: rows returned/s", number(empty.rows), number(full.rows)],
        ["idle: 8 kB blocks looked at/s", number(empty.blocks), number(full.blocks)],
        ["idle: messages published/s", number(empty.messages), number(full.messages)],
        ["bytes on disk for each execution", number(empty.bytes_each), number(full.bytes_each)],
    ]
    statements = [["statement", "calls", "ms: empty → full", "blocks: empty → full", "reads"]]
    order = sorted(full.by_text, key=lambda text: -full.by_text[text][2])
    for text in order[:SHOWN]:
        calls, took, blocks = full.by_text[text]
        _, took_before, blocks_before = empty.by_text.get(text, (0, None, None))
        statements.append(
            [
                shorten(text),
                f"{calls:,}",
                f"{number(took_before)} → {number(took)}",
                f"{number(blocks_before)} → {number(blocks)}",
                full.plans.get(text, "–"),
            ]
        )
    return rows, statements


def shorten(text: str, length: int = 110) -> str:
    """One line of a statement, without what Django repeats, the columns."""
    text = " ".join(text.split()).replace('"', "").replace("conductor_app_", "")
    text = re.sub(r"^SELECT (?:(?!FROM ).)+ FROM", "SELECT … FROM", text)
    text = re.sub(r"^(INSERT INTO \w+) .*", r"\1 …", text).replace("|", "/")
    text = re.sub(r"\b(execution|step)\.", "", text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _measure(started: Servers, options: argparse.Namespace, console: Console, finished: int, waiting: int) -> Found:
    console.print(f"{finished:,} finished and {waiting:,} waiting executions", highlight=False)
    with Run(started, ALL["conductor-redis"], options.pool, timeout=options.timeout) as run:
        run.environment["CONDUCTOR_BENCHMARK_SETTINGS"] = json.dumps({"AUDIT_SECONDS": AUDIT_SECONDS})
        url = started.url(run.database)
        with psycopg.connect(url, autocommit=True) as connection:
            if finished:
                began = time.monotonic()
                _fill(connection, finished, waiting)
                console.print(f"filled within {time.monotonic() - began:.0f} s", style="dim")
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
            size = connection.execute(_BYTES_EACH).fetchone()
        run.start_workers()
        run.warm_up()
        _reset(started)
        w1, w4 = (_latency(run, body, size) for body, size in ((SEQUENCE, 3), (TRIVIAL, 0)))
        busy = _by_text(started, run.database)
        run.close_client()
        time.sleep(1)
        _reset(started)
        messages = _published(started)
        time.sleep(QUIET_SECONDS)
        idle = _by_text(started, run.database)
        rows = _total(started, run.database, "rows")
        blocks = _total(started, run.database, "shared_blks_hit + shared_blks_read")
        published = _published(started) - messages
        plans = _plans(started, run)
    return Found(
        w1=w1,
        w4=w4,
        statements=sum(calls for calls, _, _ in idle.values()) / QUIET_SECONDS,
        rows=rows / QUIET_SECONDS,
        blocks=blocks / QUIET_SECONDS,
        messages=published / QUIET_SECONDS,
        by_text={**idle, **busy},
        plans=plans,
        bytes_each=float(size[0]) if size and finished else None,
    )


def _fill(connection: psycopg.Connection[Any], finished: int, waiting: int) -> None:
    trees = finished // 4
    done, parked = {"first": 1, "last": trees}, {"first": trees + 1, "last": trees + waiting}
    root, child = _ID.format(n="n", k="0"), _ID.format(n="n", k="k")
    alone, three, one = ({"from_child": a, "to_child": b} for a, b in ((0, 0), (1, 3), (1, 1)))
    ended = {"status": "'succeeded'", "result": "'1'", "finished": "now()"}
    open_ = {"status": "'waiting'", "result": "NULL", "finished": "NULL"}
    of_root = {"id": root, "parent": "NULL::uuid", "root": root, "depth": 0, "step": "''", "task": "'shop.order'"}
    of_child = {"id": child, "parent": root, "root": root, "depth": 1, "step": "'child-' || k", "task": "'shop.part'"}
    # Ids are made to fit; looking up each of them again would take longer than all the rest.
    connection.execute("SET session_replication_role = replica")
    for where, state, children in ((done, ended, three), (parked, open_, one)):
        connection.execute(_EXECUTION.format(**of_root, **state, **where, **alone))
        connection.execute(_EXECUTION.format(**of_child, **state, **where, **children))
        step = {"status": "'succeeded'" if state is ended else "'pending'", "finished": state["finished"]}
        invoke = {"execution": root, "kind": "'invoke'", "task": "'shop.part'", "child": child}
        connection.execute(_STEP.format(**invoke, **step, **where, **children))
    event = {"execution": child, "kind": "'event'", "task": "'go'", "child": "NULL::uuid"}
    connection.execute(_STEP.format(**event, status="'pending'", finished="NULL::timestamptz", **parked, **one))
    connection.execute("RESET session_replication_role")


def _latency(run: Run, body: str, size: int) -> float:
    times = []
    for _ in range(CALLS):
        time.sleep(IDLE_SECONDS)
        ended = run.fresh_marks().roots
        began = run.start(body, size)
        times.append((run.wait(ended + 1).last - began) * 1_000)
    return percentile(times, 50)


def _reset(started: Servers) -> None:
    with started.admin() as connection:
        connection.execute("SELECT pg_stat_statements_reset()")


def _by_text(started: Servers, database: str) -> dict[str, tuple[int, float, float]]:
    query = """
        SELECT query, sum(calls), sum(total_exec_time) / sum(calls),
            sum(shared_blks_hit + shared_blks_read) / sum(calls)
        FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE datname = %s AND calls > 0 GROUP BY query
    """
    with started.admin() as connection:
        found = connection.execute(query, [database]).fetchall()
    return {text: (int(calls), float(took), float(blocks)) for text, calls, took, blocks in found}


def _total(started: Servers, database: str, column: str) -> float:
    query = f"SELECT sum({column}) FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE datname = %s"
    with started.admin() as connection:
        row = connection.execute(query, [database]).fetchone()
    return float(row[0] or 0) if row else 0.0


def _published(started: Servers) -> int:
    """How many messages Redis was given for the workers' queue since it started."""
    with redis.from_url(started.brokers["redis"].url) as client:
        found: Any = client.info("commandstats")
    return int(found.get("cmdstat_lpush", {}).get("calls", 0))


def _plans(started: Servers, run: Run) -> dict[str, str]:
    """Let new workers run and sweep once with ``auto_explain``, and return how each statement reads its tables."""
    run.stop_workers()
    before = len(started.postgres.log)
    name = run.database
    with started.admin() as connection:
        connection.execute(f"ALTER DATABASE {name} SET session_preload_libraries = 'auto_explain'")
        for setting, value in {"log_min_duration": "0", "log_format": "json", "log_verbose": "on"}.items():
            connection.execute(f"ALTER DATABASE {name} SET auto_explain.{setting} = '{value}'")
    run.start_workers()
    for _ in range(5):
        ended = run.fresh_marks().roots
        run.start(SEQUENCE, 3)
        run.wait(ended + 1)
    time.sleep(AUDIT_SECONDS * 1.5)
    run.stop_workers()
    with started.admin() as connection:
        texts = dict(connection.execute("SELECT queryid, query FROM pg_stat_statements").fetchall())
    found: dict[str, set[str]] = {}
    for query, plan in parse_plans(started.postgres.log[before:]):
        if text := texts.get(query):
            found.setdefault(text, set()).update(scans(plan["Plan"]))
    return {text: ", ".join(sorted(kinds)) or "nothing" for text, kinds in found.items()}


def parse_plans(log: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Query ids and plans from a server's log: JSON behind ``plan:``, each line of it after a tab."""
    for match in re.finditer(r"^q=(-?\d+):LOG: .*plan:\n((?:\t.*\n)+)", log, re.MULTILINE):
        try:
            yield int(match[1]), json.loads(match[2])
        except ValueError:  # the last one was being written when the log was read
            continue


def scans(plan: dict[str, Any]) -> set[str]:
    """How a plan reads tables: the index, or that it reads all of a table."""
    found = set()
    if index := plan.get("Index Name"):
        found.add(index.removeprefix("conductor_app_"))
    elif plan["Node Type"] == "Seq Scan":
        found.add(f"all of {plan['Relation Name'].removeprefix('conductor_app_')}")
    for inner in plan.get("Plans", []):
        found |= scans(inner)
    return found
