"""Programs that are killed at one point, and the points: before and after each statement that commits something.

A point belongs to a tree: the Celery ``root_id`` of the task that the process runs. The test writes the number of the
point at which a process is to die into a file that has the root's id for a name; ``0`` is for none, and counts them.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.signals import task_prerun, worker_process_init
from django.db import connection, transaction

from conductor_app import ExecutionContext, durable_task
from conductor_app.host import durable_runs, plain_runs
from tests.app.ledger import note

#: The environment variable that names the directory of the files.
DIRECTORY = "CONDUCTOR_TEST_CRASHES"
#: Statements that write nothing, or are part of a transaction whose COMMIT is a point.
QUIET = ("SELECT", "BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK", "SET", "PRAGMA")


@durable_task(max_retries=2, retry_backoff=0.1)
def leaf(ctx: ExecutionContext, n: int) -> int:
    """Return 2n, with a side effect in a transaction."""
    return int(ctx.atomic_step("inside", _double, ctx.execution_id, n))


def _double(execution_id: Any, n: int) -> int:
    note(execution_id, "inside")
    return 2 * n


@shared_task(acks_late=True, max_retries=2)
def plain_leaf(n: int) -> int:
    """Return 2n."""
    return 2 * n


@durable_task(max_retries=2, retry_backoff=0.1)
def mapping(ctx: ExecutionContext) -> int:
    """Children side by side, of which some are held back."""
    return sum(ctx.map("leaves", leaf, [{"n": n} for n in range(3)], max_parallel=2))


@durable_task(max_retries=2, retry_backoff=0.1)
def gathering(ctx: ExecutionContext) -> int:
    """Different children, one of them a plain task."""
    return sum(ctx.gather(ctx.start("durable", leaf, {"n": 1}), ctx.start("plain", plain_leaf, {"n": 2})))


@durable_task(max_retries=2, retry_backoff=0.1)
def waiting(ctx: ExecutionContext) -> list[Any]:
    """Events, a sleep, and an invocation."""
    first = ctx.wait_for("first", "item")
    ctx.sleep("nap", 0.1)
    return [first, ctx.wait_for("second", "item"), ctx.invoke("leaf", leaf, {"n": first})]


def start(task: Any, directory: Path, point: int) -> Any:
    """Start a tree of which a process dies at ``point``; return the result of ``delay()``."""
    with transaction.atomic():
        result = task.delay()
        (directory / result.id).write_text(str(point))
    return result


def points(directory: Path, root_id: str) -> int:
    """Return how many points a tree has passed."""
    path = directory / f"{root_id}.passed"
    return path.stat().st_size if path.exists() else 0


def died_at(directory: Path, root_id: str) -> str:
    """Return where a process of the tree died; empty if none did."""
    path = directory / f"{root_id}.died"
    return path.read_text() if path.exists() else ""


class _Points:
    """What a pool process passes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._root_id = ""

    def install(self, **_kwargs: Any) -> None:
        task_prerun.connect(lambda task, **_: self._begin(task.request.root_id), weak=False)
        claim = plain_runs._claim

        def begin_and_claim(task: Any, execution_id: Any, request: dict[str, Any]) -> Any:
            self._begin(request.get("root_id"))
            return claim(task, execution_id, request)

        plain_runs._claim = begin_and_claim
        run = durable_runs._run_delivered

        def begin_and_run(*delivered: Any) -> Any:
            self._begin(delivered[-1].get("root_id"))
            return run(*delivered)

        durable_runs._run_delivered = begin_and_run
        commit = connection._commit

        def commit_between_points() -> None:
            self._pass("before COMMIT")
            commit()
            self._pass("after COMMIT")

        connection._commit = commit_between_points
        connection.execute_wrappers.append(self._execute)

    def _begin(self, root_id: str | None) -> None:
        self._root_id = root_id or ""

    def _execute(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if connection.in_atomic_block or sql.startswith(QUIET):
            return execute(sql, params, many, context)
        self._pass(f"before {sql[:60]}")
        result = execute(sql, params, many, context)
        self._pass(f"after {sql[:60]}")
        return result

    def _pass(self, where: str) -> None:
        plan = self._directory / self._root_id
        if not self._root_id or not plan.exists():
            return
        with (self._directory / f"{self._root_id}.passed").open("ab", buffering=0) as passed:
            passed.write(b".")
            number = passed.tell()
        if number == int(plan.read_text()):
            (self._directory / f"{self._root_id}.died").write_text(where)
            os.kill(os.getpid(), signal.SIGKILL)


if directory := os.environ.get(DIRECTORY):
    worker_process_init.connect(_Points(Path(directory)).install, weak=False)
