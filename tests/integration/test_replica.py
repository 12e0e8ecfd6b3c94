"""A router that reads from a replica: engine and operations read where they write, or one that lags misleads them.

The replica here is always empty, which is as late as a replica can be.
"""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Iterator
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.core.cache import cache
from django.core.management import call_command
from django.db import connections
from django.test import Client
from django.test.utils import CaptureQueriesContext

from conductor_app import ChildFailed, EventTimedOut, ExecutionContext, api, metrics
from conductor_app.engine import pruner, sweeper
from conductor_app.models import Event, Execution, FailedExecution, Step
from conductor_app.store import clock
from tests.support.bodies import durable, go_on

OURS = (Execution, Step, Event, FailedExecution)


class Router:
    """Reads our tables from the replica, unless somebody says otherwise."""

    def db_for_read(self, model: Any, **_hints: Any) -> str | None:
        return "replica" if model._meta.app_label == "conductor_app" else None

    def db_for_write(self, model: Any, **_hints: Any) -> str:
        return "default"

    def allow_relation(self, *_objects: Any, **_hints: Any) -> bool:
        return True


@pytest.fixture
def replica(settings: Any, tmp_path: Any, db: None) -> Iterator[CaptureQueriesContext]:
    """Notes what is asked of the replica."""
    connections.settings["replica"] = {
        **connections.settings["default"],
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(tmp_path / "replica.sqlite3"),
        "OPTIONS": {},
    }
    settings.DATABASE_ROUTERS = [f"{__name__}.Router"]
    cache.clear()
    try:
        # Django's test cases forbid what is opened later, which is as good as a query that is noted.
        connections["replica"].connect()
        with connections["replica"].schema_editor() as editor:
            for model in apps.get_app_config("conductor_app").get_models():
                editor.create_model(model)
        with CaptureQueriesContext(connections["replica"]) as asked:
            yield asked
    finally:
        clock.reset()
        connections["replica"].close()
        del connections["replica"]
        del connections.settings["replica"]


def asked_of(replica: CaptureQueriesContext) -> list[str]:
    return [query["sql"] for query in replica.captured_queries]


@durable(max_retries=0)
def parent(ctx: ExecutionContext) -> Any:
    ctx.step("step", int, 1)
    ctx.atomic_step("atomic", int, 2)
    ctx.sleep("nap", 60)
    ctx.map("map", child, [{"fails": False}] * 3, max_parallel=2)
    try:
        ctx.wait_for("approval", "approved", timeout=60)
    except EventTimedOut:
        ctx.step("late", int, 3)
    handles = [ctx.start(f"child-{number}", child, {"fails": number == 1}) for number in range(2)]
    return ctx.gather(*handles)


@durable(max_retries=0)
def child(ctx: ExecutionContext, fails: bool) -> int:
    if fails:
        raise ValueError("no")
    return ctx.step("step", int, 1)


@durable(max_retries=1)
def waits(ctx: ExecutionContext) -> Any:
    try:
        ctx.invoke("child", child, {"fails": True}, timeout=60)
    except ChildFailed:
        ctx.step("refund", int, 1)
    return ctx.wait_for("approval", "approved")


def failed_tree() -> str:
    failed = parent.delay()
    go_on()
    api.wake(failed.id)
    go_on()
    clock.shift(dt.timedelta(seconds=61))
    go_on()
    assert api.find(failed.id).status == "failed"
    return str(failed.id)


def test_engine_and_operations_read_where_they_write(replica: CaptureQueriesContext) -> None:
    failed = failed_tree()
    api.retry(failed)
    go_on()
    assert api.find(failed).status == "failed"
    api.rerun(failed, idempotency_key="again")
    waiting, cancelled = waits.delay(), waits.delay()
    go_on()
    assert api.send_event(waiting.id, "approved", 7)
    assert api.cancel(cancelled.id)
    go_on()
    assert api.get_result(waiting.id) == 7
    sweeper.sweep()
    list(metrics.DatabaseCollector().collect())
    for words in (["ls"], ["show", failed], ["show", waiting.id], ["doctor"], ["sweep"]):
        call_command("conductor", *words, stdout=io.StringIO(), stderr=io.StringIO())
    clock.shift(dt.timedelta(days=1))
    assert pruner.prune(dt.timedelta(seconds=1), dry_run=True) == pruner.prune(dt.timedelta(seconds=1)) > 5
    assert asked_of(replica) == []


def test_the_admin_reads_where_the_engine_writes(replica: CaptureQueriesContext, client: Client) -> None:
    client.force_login(User.objects.create_superuser("ana"))
    failed = failed_tree()
    waiting = waits.delay()
    go_on()
    api.send_event(waiting.id, "other", 7)
    base = "/admin/conductor_app"
    shown = 0
    for model in OURS:
        address = f"{base}/{model._meta.model_name}/"
        for page in (address, f"{address}json/"):
            answer = client.get(page)
            assert answer.status_code == 200
            shown += failed in answer.content.decode() or waiting.id in answer.content.decode()
        row = model._default_manager.using("default").first()
        assert row is not None
        for page in (f"{address}{row.pk}/change/", f"{address}{row.pk}/json/"):
            assert client.get(page).status_code == 200, page
    assert shown == 2 * len(OURS)
    for page in (
        "execution/?status__exact=failed",
        "execution/?q=" + failed,
        "step/?q=" + failed,
        "failedexecution/?scope=all",
        "execution/overview/",
        "execution/overview/json/",
        f"execution/{failed}/act/retry/",
        f"execution/{failed}/act/cancel/",
    ):
        assert client.get(f"{base}/{page}", follow=True).status_code in (200, 403), page
    answer = client.post(f"{base}/execution/{failed}/act/retry/", {"confirmed": "1"})
    assert answer.status_code == 302
    for action in ("retry_selected", "cancel_selected"):
        data = {"action": action, "_selected_action": [failed, waiting.id]}
        assert client.post(f"{base}/execution/", data).status_code == 200
    assert asked_of(replica) == []
