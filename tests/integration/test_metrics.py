"""Prometheus metrics: what is counted, what is read from the database, and who may see it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.test import RequestFactory
from django.test.utils import CaptureQueriesContext
from prometheus_client import CollectorRegistry

from conductor_app import ChildFailed, ExecutionContext, api, apps, metrics, transitions
from conductor_app.conf import ConductorSettings
from conductor_app.engine import sweeper
from conductor_app.metrics import DatabaseCollector, EngineMetrics
from conductor_app.models import Execution, Step
from conductor_app.states import RunOutcome
from conductor_app.store import clock
from conductor_app.store.process import process
from tests.support.bodies import advance, durable, start
from tests.support.executions import FAILURE as FAILURE_OF_A_RUN
from tests.support.executions import OWNER, TASK, claimed, committing, family, napping, queued, running
from tests.support.process import NotingBroker
from tests.support.worker import ROOT


@pytest.fixture(autouse=True)
def db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    with committing(django_db_blocker):
        yield
        User.objects.all().delete()
        clock.reset()


@pytest.fixture(autouse=True)
def published() -> list[Any]:
    """Ids of the executions whose messages were published, in the place of a broker."""
    process.broker = broker = NotingBroker()
    return broker.ids


class Counts:
    """What was counted since the test began, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"conductor_{name}", labels)


@pytest.fixture
def counts() -> Iterator[Counts]:
    counted = Counts()
    counted.metrics.connect()
    yield counted
    counted.metrics.disconnect()


def gauges() -> dict[str, Any]:
    """What the database's gauges say now, without their prefix."""
    return {
        "-".join([sample.name.removeprefix("conductor_"), *sample.labels.values()]): sample.value
        for metric in DatabaseCollector().collect()
        for sample in metric.samples
    }


@durable(max_retries=1, retry_jitter=False, retry_backoff=2)
def breaks(ctx: ExecutionContext) -> None:
    raise ValueError("card declined")


@durable(max_retries=0)
def survives(ctx: ExecutionContext) -> str:
    try:
        ctx.invoke("breaks", breaks)
    except ChildFailed:
        return "survived"
    return "?"


# ------------------------------------------------------------------------------------------------------------- counters


def test_a_tree_is_counted(counts: Counts) -> None:
    queue = start(survives).queue
    advance(5)
    assert counts("new_executions_total", task=survives.name, queue=queue) == 1
    assert counts("new_executions_total", task=breaks.name, queue=queue) == 1
    assert counts("runs_total", task=survives.name, queue=queue) == 2
    assert counts("runs_total", task=breaks.name, queue=queue) == 2
    assert counts("suspensions_total", task=survives.name) == 1
    assert counts("retries_total", task=breaks.name) == 1
    assert counts("executions_total", task=breaks.name, status="failed") == 1
    assert counts("executions_total", task=survives.name, status="succeeded") == 1
    assert counts("runs_lost_total", task=breaks.name) is None


def test_each_run_is_measured(counts: Counts) -> None:
    start(survives)
    assert counts("run_seconds_count", task=survives.name) == 1
    assert 0 < (counts("run_seconds_sum", task=survives.name) or 0) < 10


def test_the_time_in_the_queue_is_measured_from_the_instant_at_which_it_was_due(counts: Counts) -> None:
    execution = queued()
    Execution.objects.filter(pk=execution.pk).update(due_at=clock.after(-100))
    claimed(execution)
    assert counts("queue_wait_seconds_count", queue=execution.queue) == 1
    assert counts("queue_wait_seconds_sum", queue=execution.queue) == pytest.approx(100, abs=5)


def test_the_time_from_creation_to_end_is_measured_of_roots_and_children(counts: Counts) -> None:
    start(survives)
    advance(5)
    for task in (survives, breaks):
        assert counts("execution_seconds_count", task=task.name) == 1
        assert 5 <= (counts("execution_seconds_sum", task=task.name) or 0) < 60
        assert counts("execution_seconds_bucket", task=task.name, le="2.5") == 0
        assert counts("execution_seconds_bucket", task=task.name, le="60.0") == 1


def test_the_time_of_what_no_run_has_started_is_measured_too(counts: Counts) -> None:
    execution = queued()
    Execution.objects.filter(pk=execution.pk).update(created_at=clock.after(-100))
    transitions.waking.cancel_unstarted(Execution.objects.filter(pk=execution.pk), "enough")
    assert counts("execution_seconds_sum", task=TASK) == pytest.approx(100, abs=5)


def test_the_ends_of_runs_are_counted_by_their_outcomes(counts: Counts) -> None:
    start(survives)
    advance(5)

    def ends(task: str) -> dict[str, float]:
        outcomes = {outcome.value: counts("run_ends_total", task=task, outcome=outcome.value) for outcome in RunOutcome}
        return {outcome: count for outcome, count in outcomes.items() if count}

    assert ends(survives.name) == {"suspended": 1, "succeeded": 1}
    assert ends(breaks.name) == {"retried": 1, "failed": 1}
    transitions.release(running())
    assert transitions.lose(running().pk, owner=OWNER)
    flagged = running()
    transitions.request_cancel(flagged.pk, "enough")
    transitions.cancel_running(flagged)
    assert ends(TASK) == {"released": 1, "lost": 1, "cancelled": 1}
    # What has ended without a run is no end of one.
    waiting = queued()
    transitions.request_cancel(waiting.pk, "enough")
    transitions.cancel_flagged(waiting.pk)
    assert ends(TASK) == {"released": 1, "lost": 1, "cancelled": 1}


def test_a_cancel_is_counted(counts: Counts) -> None:
    execution = queued()
    transitions.request_cancel(execution.pk, "enough")
    transitions.cancel_flagged(execution.pk)
    assert counts("executions_total", task=TASK, status="cancelled") == 1


def test_a_lost_run_is_counted_whatever_follows(counts: Counts) -> None:
    assert transitions.lose(running().pk, owner=OWNER)
    assert counts("runs_lost_total", task=TASK) == 1
    assert counts("retries_total", task=TASK) == 1
    assert transitions.lose(running(max_attempts=1).pk, owner=OWNER)
    assert counts("runs_lost_total", task=TASK) == 2
    assert counts("executions_total", task=TASK, status="failed") == 1
    flagged = running()
    transitions.request_cancel(flagged.pk, "enough")
    assert transitions.lose(flagged.pk, owner=OWNER)
    assert counts("runs_lost_total", task=TASK) == 3
    assert counts("executions_total", task=TASK, status="cancelled") == 1


def test_what_is_undone_is_not_counted(counts: Counts) -> None:
    from django.db import transaction

    with transaction.atomic():
        queued()
        transaction.set_rollback(True)
    assert counts("new_executions_total", task=TASK, queue=queued().queue) == 1


def test_a_message_that_is_published_again_is_counted_and_one_that_became_due_is_not(
    counts: Counts, published: list[Any]
) -> None:
    process.worker.is_embedded = False
    unanswered = queued()
    queued(countdown=1)
    published.clear()
    clock.shift(clock.dt.timedelta(seconds=100))
    assert sweeper.publish_due() == 2
    assert counts("redispatches_total", queue=unanswered.queue) == 1
    clock.shift(clock.dt.timedelta(seconds=100))
    assert sweeper.publish_due() == 2
    assert counts("redispatches_total", queue=unanswered.queue) == 3


def test_a_sweep_is_measured_and_its_findings_are_counted(counts: Counts) -> None:
    assert counts("wakeups_healed_total") == 0
    assert counts("sweep_seconds_count") == 0
    napping(seconds=0)
    parent = napping()
    Step.objects.filter(execution=parent).delete()
    sweeper.sweep(audit=True)
    assert counts("sweep_seconds_count") == 1
    assert counts("sweep_actions_total", action="overdue_steps") == 1
    assert counts("sweep_actions_total", action="stranded") == 1
    assert counts("wakeups_healed_total") == 1


def test_no_label_is_an_id(counts: Counts) -> None:
    start(survives)
    advance(5)
    napping(seconds=0)
    sweeper.sweep()
    labels = {label for metric in counts.registry.collect() for sample in metric.samples for label in sample.labels}
    assert labels == {"task", "queue", "status", "outcome", "action", "le"}


def test_counting_that_is_taken_out_is_gone(counts: Counts) -> None:
    counts.metrics.disconnect()
    queue = start(survives).queue
    assert counts("runs_total", task=survives.name, queue=queue) is None
    assert counts("run_seconds_count", task=survives.name) is None


# --------------------------------------------------------------------------------------------------------------- gauges


def test_the_gauges_of_an_empty_database() -> None:
    assert gauges() == {
        "unfinished_executions-queued": 0,
        "unfinished_executions-running": 0,
        "unfinished_executions-waiting": 0,
        "oldest_due_seconds": 0,
        "held_executions": 0,
        "lapsed_leases": 0,
        "overdue_steps": 0,
        "overdue_schedules": 0,
        "busy_workers": 0,
    }


def test_the_gauges_tell_how_things_stand() -> None:
    queued()
    old = queued()
    Execution.objects.filter(pk=old.pk).update(due_at=clock.after(-300))
    queued(countdown=1_000)
    family()
    claimed(queued(), "celery@one/11")
    claimed(queued(), "celery@one/12")
    lapsed = claimed(queued(), "celery@two/7")
    Execution.objects.filter(pk=lapsed.pk).update(lease_expires_at=clock.after(-1))
    napping(seconds=0)
    transitions.succeed(running(), "1")
    transitions.fail(running(), FAILURE_OF_A_RUN)
    found = gauges()
    assert found.pop("oldest_due_seconds") == pytest.approx(300, abs=5)
    assert found.pop(f"queue_oldest_due_seconds-{old.queue}") == pytest.approx(300, abs=5)
    assert found == {
        f"queue_executions-{old.queue}-queued": 3,
        f"queue_executions-{old.queue}-running": 4,
        f"queue_executions-{old.queue}-waiting": 2,
        "unfinished_executions-queued": 3,
        "unfinished_executions-running": 4,
        "unfinished_executions-waiting": 2,
        "held_executions": 0,
        "lapsed_leases": 1,
        "overdue_steps": 1,
        "overdue_schedules": 0,
        "busy_workers": 3,
    }


def test_what_is_not_due_yet_has_no_age() -> None:
    queue = queued(countdown=1_000).queue
    assert gauges()["oldest_due_seconds"] == 0
    assert gauges()[f"queue_oldest_due_seconds-{queue}"] == 0


def test_what_is_held_or_of_a_paused_task_is_counted_and_is_not_late() -> None:
    held, paused = queued(), queued(task="shop.tasks.charge")
    Execution.objects.update(due_at=clock.after(-300))
    api.hold(held, "bank incident")
    api.pause(paused.task, "bank incident")
    found = gauges()
    assert (found["held_executions"], found["paused_task_executions-shop.tasks.charge"]) == (1, 1)
    assert found["unfinished_executions-queued"] == 2
    assert found["oldest_due_seconds"] == found[f"queue_oldest_due_seconds-{held.queue}"] == 0


def in_queue(queue: str, age: float | None = None) -> None:
    values = {"queue": queue} if age is None else {"queue": queue, "due_at": clock.after(-age)}
    Execution.objects.filter(pk=queued().pk).update(**values)


def test_each_queue_has_its_gauges() -> None:
    in_queue("slow", 300)
    in_queue("slow", 200)
    in_queue("fast", 10)
    Execution.objects.filter(pk=running().pk).update(queue="busy")
    # Held back by its map: it is queued, and not due.
    Execution.objects.filter(pk=queued().pk).update(queue="held", due_at=None, dispatch_at=None)
    found = gauges()
    assert found["queue_oldest_due_seconds-slow"] == pytest.approx(300, abs=5)
    assert found["queue_oldest_due_seconds-fast"] == pytest.approx(10, abs=5)
    assert found["queue_oldest_due_seconds-busy"] == found["queue_oldest_due_seconds-held"] == 0
    assert found["oldest_due_seconds"] == found["queue_oldest_due_seconds-slow"]
    assert [found[f"queue_executions-slow-{status}"] for status in ("queued", "running", "waiting")] == [2, 0, 0]
    assert [found[f"queue_executions-busy-{status}"] for status in ("queued", "running", "waiting")] == [0, 1, 0]
    assert found["queue_executions-held-queued"] == 1


def test_more_queues_than_the_limit_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_QUEUES", 2)
    in_queue("late", 300)
    in_queue("large", 100)
    in_queue("large")
    in_queue("a", 50)
    in_queue("b", 70)
    # It is shown with them, by chance.
    in_queue("other", 20)
    found = gauges()
    assert {name for name in found if name.startswith("queue_oldest")} == {
        "queue_oldest_due_seconds-late",
        "queue_oldest_due_seconds-large",
        "queue_oldest_due_seconds-other",
    }
    assert found["queue_oldest_due_seconds-other"] == pytest.approx(70, abs=5)
    assert found["queue_executions-other-queued"] == 3
    assert found["unfinished_executions-queued"] == 6


def test_no_gauge_looks_at_more_rows_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_ROWS", 2)
    for _ in range(3):
        queued()
        running()
        napping(seconds=0)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        found = gauges()
    of_all = [name for name in found if not name.startswith("queue_")]
    counted = {name: found[name] for name in of_all if name not in ("oldest_due_seconds", "busy_workers")}
    assert counted == {
        **dict.fromkeys(counted, 2),
        "lapsed_leases": 0,
        "held_executions": 0,
        "overdue_schedules": 0,
    }
    selects = [query["sql"] for query in queries if "conductor_app_" in query["sql"]]
    assert len(selects) == 10
    assert all("LIMIT 2" in sql for sql in selects)


# ----------------------------------------------------------------------------------------------------------------- view


def get(user: Any = None, token: str | None = None, **headers: str) -> Any:
    request = RequestFactory().get("/metrics", headers={**({"Authorization": token} if token else {}), **headers})
    if user is not None:
        request.user = user
    return metrics.view(request)


@pytest.fixture
def token(settings: Any) -> str:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "METRICS_TOKEN": "s3cret"}
    return "s3cret"


def test_the_view_shows_counts_and_gauges_to_who_bears_the_token(token: str) -> None:
    queued()
    response = get(token=f"Bearer {token}")
    text = response.content.decode()
    assert response.status_code == 200
    assert response["Content-Type"].startswith("text/plain; version=")
    assert 'conductor_unfinished_executions{status="queued"} 1.0' in text
    assert "python_info" in text
    assert "no-store" in response["Cache-Control"]


def test_the_view_speaks_openmetrics(token: str) -> None:
    response = get(token=f"Bearer {token}", Accept="application/openmetrics-text; version=1.0.0")
    assert response["Content-Type"].startswith("application/openmetrics-text")
    assert response.content.decode().endswith("# EOF\n")


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3crét"]
)
def test_the_view_is_closed_to_everybody_else(token: str, given: str | None) -> None:
    with CaptureQueriesContext(connection) as queries:
        response = get(token=given)
    assert response.status_code == 401
    assert response["WWW-Authenticate"].startswith("Bearer")
    assert b"conductor_unfinished" not in response.content
    assert b"METRICS_TOKEN" in response.content
    assert not len(queries)


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer "])
def test_without_a_token_in_the_settings_no_token_opens_the_view(given: str | None) -> None:
    assert get(token=given).status_code == 401
    assert get(AnonymousUser(), token=given).status_code == 401


def test_the_view_is_open_to_users_who_may_view_executions() -> None:
    user = User.objects.create_user("ops")
    assert get(user).status_code == 401
    user.user_permissions.add(
        Permission.objects.get(codename="view_execution", content_type__app_label="conductor_app")
    )
    assert get(User.objects.get(pk=user.pk)).status_code == 200


def test_the_view_only_reads() -> None:
    assert metrics.view(RequestFactory().post("/metrics")).status_code == 405


def test_the_view_is_not_sent_to_a_login_form(settings: Any, token: str) -> None:
    from django.contrib.auth.middleware import LoginRequiredMiddleware

    request = RequestFactory().get("/metrics")
    request.user = AnonymousUser()
    middleware = LoginRequiredMiddleware(lambda _request: None)
    assert middleware.process_view(request, metrics.view, (), {}) is None


# ------------------------------------------------------------------------------------------------------------- settings


def test_without_the_settings_neither_package_is_imported() -> None:
    code = (
        "import django, sys; django.setup()\n"
        "from conductor_app.host import bootsteps, inline, request\n"
        "assert 'django' in sys.modules\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('prometheus_client', 'opentelemetry')])"
    )
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
    env["CONDUCTOR_TEST_OVERRIDES"] = '{"METRICS": true, "TRACING": true}'
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "'prometheus_client'" in done.stdout
    assert "'opentelemetry'" in done.stdout


@pytest.mark.parametrize("key", ["METRICS", "TRACING"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    key: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, package, extra = {
        "METRICS": ("metrics", "prometheus_client", "metrics"),
        "TRACING": ("tracing", "opentelemetry", "otel"),
    }[key]
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"conductor_app.{name}", raising=False)
    monkeypatch.delattr(f"conductor_app.{name}", raising=False)
    settings.CONDUCTOR = {**settings.CONDUCTOR, key: True}
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "conductor-app\[{extra}\]"'):
        apps.observe()


def test_where_to_listen_is_checked() -> None:
    for wrong in ("9464", ":9464", "localhost:", "localhost:http", "localhost:70000"):
        with pytest.raises(ImproperlyConfigured, match='must be "host:port"'):
            ConductorSettings.from_dict({"METRICS": True, "METRICS_LISTEN": wrong})
    with pytest.raises(ImproperlyConfigured, match=r'needs CONDUCTOR\["METRICS"\] = True'):
        ConductorSettings.from_dict({"METRICS_LISTEN": "127.0.0.1:9464"})


def test_a_wrong_token_is_not_shown() -> None:
    for wrong in (b"hunter2", "hunter2\n", " hunter2", "hunter\u00e9"):
        with pytest.raises(ImproperlyConfigured) as refused:
            ConductorSettings.from_dict({"METRICS_TOKEN": wrong})
        assert "hunter" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- worker


def consumer(pool: str) -> Any:
    cls = type("TaskPool", (), {"__module__": f"celery.concurrency.{pool}"})
    return SimpleNamespace(pool=cls())


def test_a_prefork_worker_without_a_common_directory_serves_nothing_and_says_why(
    settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "METRICS": True, "METRICS_LISTEN": "127.0.0.1:0"}
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(metrics, "start_http_server", lambda *_args, **_kwargs: pytest.fail("served"))
    metrics.serve(consumer("prefork"))
    assert "needs the environment variable PROMETHEUS_MULTIPROC_DIR" in caplog.text


def test_a_port_that_is_taken_does_not_stop_the_worker(
    settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        settings.CONDUCTOR = {**settings.CONDUCTOR, "METRICS": True, "METRICS_LISTEN": listen}
        metrics.serve(consumer("threads"))
    assert f'Metrics are not served, CONDUCTOR["METRICS_LISTEN"] = "{listen}"' in caplog.text
