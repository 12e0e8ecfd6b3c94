"""The alias that the project's routers give to our tables."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext

import conductor_app
from conductor_app import ChildFailed, ExecutionContext, api
from conductor_app.models import (
    Attempt,
    Execution,
    FailedExecution,
    Operation,
    OperationItem,
    PausedTask,
    Place,
    Step,
    database,
)
from conductor_app.store import clock
from tests.support.bodies import durable, go_on

OURS = {
    "Attempt",
    "CopiedOutcome",
    "Event",
    "Execution",
    "FailedExecution",
    "Fork",
    "LimitKey",
    "Operation",
    "OperationItem",
    "PausedTask",
    "Place",
    "Schedule",
    "Step",
    "Worker",
}
#: Those that a second database needs here.
TABLES = (Execution, Attempt, Step, FailedExecution, Operation, OperationItem, PausedTask, Place)
SOURCES = sorted(Path(conductor_app.__file__).parent.rglob("*.py"))


class Router:
    """All of conductor_app lives in another database than the rest."""

    def db_for_read(self, model: Any, **_hints: Any) -> str | None:
        return "second" if model._meta.app_label == "conductor_app" else None

    db_for_write = db_for_read


@pytest.fixture
def second(settings: Any, tmp_path: Path, django_db_setup: None, django_db_blocker: Any) -> Iterator[str]:
    """A second database with our tables alone: a SQLite file, whatever the first one is.

    Without the fixture ``db``, which knows no database that is made later. The first database is not written to.
    """
    connections.settings["second"] = {
        **connections.settings["default"],
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(tmp_path / "second.sqlite3"),
        "OPTIONS": {},
    }
    settings.DATABASE_ROUTERS = [f"{__name__}.Router"]
    with django_db_blocker.unblock():
        try:
            with connections["second"].schema_editor() as editor:
                for model in TABLES:
                    editor.create_model(model)
            yield "second"
        finally:
            clock.reset()
            connections["second"].close()
            del connections["second"]
            del connections.settings["second"]


def test_all_of_it_happens_in_the_database_that_the_routers_name(second: str) -> None:
    @durable(max_retries=0)
    def parent(ctx: ExecutionContext) -> Any:
        first = ctx.step("step", int, 1)
        ctx.atomic_step("atomic", int, 2)
        ctx.sleep("nap", 60)
        with contextlib.suppress(TimeoutError):
            ctx.invoke("timed", naps, timeout=1)
        try:
            ctx.invoke("failed", failing)
        except ChildFailed as error:
            return [first, str(error)]

    @durable(ignore_result=True)
    def naps(ctx: ExecutionContext) -> None:
        ctx.sleep("nap", 3_600)

    @durable(max_retries=1, retry_backoff=60, retry_jitter=False, ignore_result=True)
    def failing(ctx: ExecutionContext) -> None:
        raise ValueError("no")

    assert database() == second
    with CaptureQueriesContext(connection) as elsewhere:
        result = parent.apply()
        assert result.get() == [1, "Child execution failed: no"]
        assert api.get_result(result.id) == result.get()
        failed = failing.apply()
        api.retry(failed.id)
        go_on()
        cancelled = naps.delay()
        go_on()
        assert api.cancel(cancelled.id)
        api.retry(cancelled.id)
        expired = failing.apply_async(expires=-1)
        go_on()
    assert elsewhere.captured_queries == []
    assert Execution.objects.db == second
    statuses = {row.pk: row.status for row in Execution.objects.all()}
    assert len(statuses) == 6
    assert [str(statuses[Execution.objects.get(pk=row.id).pk]) for row in (failed, cancelled, expired)] == [
        "queued",
        "waiting",
        "cancelled",
    ]


def test_without_routers_it_is_the_default_database() -> None:
    assert database() == "default"


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_every_query_of_the_engine_names_its_database(path: Path) -> None:
    """``Model.objects`` alone would read from a replica, where a router has one."""
    if "migrations" in path.parts:
        return
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in ("objects", "_base_manager", "_default_manager")):
            continue
        if "admin" in path.parts and ast.unparse(node.value) not in OURS:
            continue  # Django's log, the rows of the result backend
        follows = parents.get(node)
        assert isinstance(follows, ast.Attribute), f"{path.name}:{node.lineno}: a manager that is not asked for rows"
        assert follows.attr == "using", f"{path.name}:{node.lineno}: a query without .using(database())"
