"""Prometheus metrics; needs the extra ``metrics``.

Two kinds. What happens is counted in the process in which it happens, by hooks that ``CONDUCTOR["METRICS"]`` puts in.
How things stand is read from the database when somebody asks, by ``view`` or a ``DatabaseCollector`` in a registry.

Labels are names of tasks, queues, statuses and the like, never ids.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from django.db import models
from django.db.models import Count, Min
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from conductor_app import signals
from conductor_app.conf import conductor_settings, host_and_port
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, observing, owners
from conductor_app.transitions import steps

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import GaugeMetricFamily, Metric
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'The metrics of conductor_app need the package prometheus-client: pip install "conductor-app[metrics]"',
        name=error.name,
    ) from error

logger = logging.getLogger("conductor_app.worker")

#: The database's gauges look at so many rows of each kind and no further, so that a scrape stays cheap.
MAX_ROWS = 100_000
#: Environment variable of prometheus-client: the directory in which processes put their counts together.
MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

#: From 5 ms, about what a run takes that only suspends, to an hour.
_RUN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_SWEEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class EngineMetrics:
    """The counters and histograms of this process.

    Args:
        registry: Where they are found; prometheus-client's own by default, as any exporter expects.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.created = Counter(
            "conductor_new_executions", "Executions that were stored.", ["task", "queue"], registry=registry
        )
        self.ended = Counter(
            "conductor_executions",
            "Executions that ended: succeeded, failed or cancelled.",
            ["task", "status"],
            registry=registry,
        )
        self.runs = Counter("conductor_runs", "Runs that began.", ["task", "queue"], registry=registry)
        self.suspended = Counter("conductor_suspensions", "Runs that ended to wait.", ["task"], registry=registry)
        self.retries = Counter(
            "conductor_retries",
            "Attempts that failed or were lost, with another one to follow.",
            ["task"],
            registry=registry,
        )
        self.lost = Counter(
            "conductor_runs_lost", "Runs whose process died or whose lease lapsed.", ["task"], registry=registry
        )
        self.redispatches = Counter(
            "conductor_redispatches",
            "Messages of queued executions that were published again, since no worker had answered.",
            ["queue"],
            registry=registry,
        )
        self.healed = Counter(
            "conductor_wakeups_healed",
            "Executions that waited for nothing and were woken: each one is a bug of conductor_app.",
            registry=registry,
        )
        self.swept = Counter(
            "conductor_sweep_actions", "Findings of sweeps that were acted on.", ["action"], registry=registry
        )
        self.run_seconds = Histogram(
            "conductor_run_seconds",
            "How long runs took, from their claim to their end or suspension.",
            ["task"],
            buckets=_RUN_BUCKETS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "conductor_queue_wait_seconds",
            "How long executions that were due waited for a worker, by the worker's clock.",
            ["queue"],
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.sweep_seconds = Histogram(
            "conductor_sweep_seconds", "How long sweeps took.", buckets=_SWEEP_BUCKETS, registry=registry
        )
        self._receivers: tuple[tuple[Any, Callable[..., None]], ...] = (
            (signals.execution_created, self._on_created),
            (signals.execution_started, self._on_started),
            (signals.execution_suspended, self._on_suspended),
            (signals.execution_retrying, self._on_retrying),
            (signals.execution_lost, self._on_lost),
            (signals.execution_redispatched, self._on_redispatched),
            (signals.execution_finished, self._on_finished),
            (signals.sweep_finished, self._on_sweep),
        )

    def connect(self) -> None:
        """Begin to count."""
        for signal, receiver in self._receivers:
            signal.connect(receiver)
        observing.running.add(self._measure_run)

    def disconnect(self) -> None:
        """Count no more."""
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)
        observing.running.remove(self._measure_run)

    def _on_created(self, execution: Execution, **_kwargs: Any) -> None:
        self.created.labels(execution.task, execution.queue).inc()

    def _on_started(self, execution: Execution, **_kwargs: Any) -> None:
        self.runs.labels(execution.task, execution.queue).inc()
        if execution.due_at is not None:
            waited = (clock.aware(timezone.now()) - execution.due_at).total_seconds()
            self.wait_seconds.labels(execution.queue).observe(max(waited, 0.0))

    def _on_suspended(self, execution: Execution, **_kwargs: Any) -> None:
        self.suspended.labels(execution.task).inc()

    def _on_retrying(self, execution: Execution, **_kwargs: Any) -> None:
        self.retries.labels(execution.task).inc()

    def _on_lost(self, execution: Execution, **_kwargs: Any) -> None:
        self.lost.labels(execution.task).inc()

    def _on_redispatched(self, execution: Execution, **_kwargs: Any) -> None:
        self.redispatches.labels(execution.queue).inc()

    def _on_finished(self, execution: Execution, status: str, **_kwargs: Any) -> None:
        self.ended.labels(execution.task, str(status)).inc()

    def _on_sweep(self, found: Tally[str], seconds: float, **_kwargs: Any) -> None:
        self.sweep_seconds.observe(seconds)
        for action, count in found.items():
            self.swept.labels(action).inc(count)
        self.healed.inc(found["stranded"])

    @contextmanager
    def _measure_run(self, execution: Execution) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.run_seconds.labels(execution.task).observe(time.perf_counter() - started)


@cache
def _engine_metrics() -> EngineMetrics:
    directory = os.environ.get(MULTIPROCESS_DIRECTORY)
    if directory:
        # prometheus-client would raise a bare FileNotFoundError, at the first count.
        os.makedirs(directory, exist_ok=True)
    return EngineMetrics()


def install() -> None:
    """Count in this process from now on; what ``CONDUCTOR["METRICS"] = True`` does in each."""
    _engine_metrics().connect()


class DatabaseCollector(Collector):
    """Reads how things stand from the database, whenever the registry that it is in is asked.

    Only unfinished executions are looked at, by indexes, and ``MAX_ROWS`` of each kind at most.
    """

    def collect(self) -> Iterable[Metric]:
        """Return the gauges.

        Raises:
            DatabaseError: The database is away; a scrape that fails says so best.
        """
        rows = Execution.objects.using(database())
        now = clock.read(database())
        queued = rows.with_status(ExecutionStatus.QUEUED)
        running = rows.with_status(ExecutionStatus.RUNNING)
        executions = GaugeMetricFamily(
            "conductor_unfinished_executions",
            f"Executions that have not ended; at most {MAX_ROWS} of each status are counted.",
            labels=["status"],
        )
        # Those that are to be published first: what is due is among them.
        oldest = (
            queued.order_by("dispatch_at").values("due_at")[:MAX_ROWS].aggregate(count=Count("*"), due=Min("due_at"))
        )
        executions.add_metric([ExecutionStatus.QUEUED.value], oldest["count"])
        executions.add_metric([ExecutionStatus.RUNNING.value], _count(running))
        executions.add_metric([ExecutionStatus.WAITING.value], _count(rows.with_status(ExecutionStatus.WAITING)))
        yield executions
        yield GaugeMetricFamily(
            "conductor_oldest_due_seconds",
            "How long the oldest queued execution that is due has been waiting for a worker; 0 if there is none.",
            value=0.0 if oldest["due"] is None else max((now - oldest["due"]).total_seconds(), 0.0),
        )
        yield GaugeMetricFamily(
            "conductor_lapsed_leases",
            "Running executions whose worker has not renewed its lease and that no sweeper has taken away yet.",
            value=_count(rows.lapsed()),
        )
        yield GaugeMetricFamily(
            "conductor_overdue_steps",
            "Timeouts and sleeps that have ended and that no sweeper has noticed yet.",
            value=_count(steps.overdue_rows()),
        )
        holders = running.order_by().values_list("lease_owner", flat=True).distinct()[:MAX_ROWS]
        yield GaugeMetricFamily(
            "conductor_busy_workers",
            "Workers that hold a lease of a running execution.",
            value=len({owners.worker_of(holder) for holder in holders}),
        )


def _count(rows: models.QuerySet[Any]) -> int:
    return rows.values("pk")[:MAX_ROWS].count()


def process_registry() -> CollectorRegistry:
    """Return what is to be asked for the counts of this process, or of all that share its multi-process directory."""
    if not os.environ.get(MULTIPROCESS_DIRECTORY):
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


@never_cache
@require_safe
def view(request: HttpRequest) -> HttpResponse:
    """Show all metrics to Prometheus: those of this process, and those of the database.

    For whoever sends ``CONDUCTOR["METRICS_TOKEN"]`` as a bearer token, and for logged-in users who may view executions.
    """
    if not _has_token(request) and not _may_view(request):
        response = HttpResponse(
            'These metrics are for requests with the header "Authorization: Bearer …" and the token of '
            'CONDUCTOR["METRICS_TOKEN"], and for users with the permission conductor_app.view_execution.\n',
            content_type="text/plain; charset=utf-8",
            status=401,
        )
        response["WWW-Authenticate"] = 'Bearer realm="conductor_app"'
        return response
    registry = CollectorRegistry()
    registry.register(process_registry())
    registry.register(DatabaseCollector())
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return HttpResponse(encode(registry), content_type=content_type)


# It has a key of its own: LoginRequiredMiddleware must not redirect Prometheus to a form.
view.login_required = False  # type: ignore[attr-defined]


def _has_token(request: HttpRequest) -> bool:
    token = conductor_settings().METRICS_TOKEN
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # compare_digest takes no text beyond ASCII; the time that it takes tells nothing of where they differ.
    return bool(token) and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _may_view(request: HttpRequest) -> bool:
    user: Any = getattr(request, "user", None)
    return user is not None and bool(user.has_perm("conductor_app.view_execution"))


def serve(sender: Any = None, **_kwargs: Any) -> None:
    """Serve the counts of a worker over HTTP; receiver of ``celery.signals.worker_ready``.

    Args:
        sender: The worker's consumer.
    """
    host, port = host_and_port(conductor_settings().METRICS_LISTEN)
    pool = getattr(sender, "pool", None)
    if _forks(pool) and not os.environ.get(MULTIPROCESS_DIRECTORY):
        # Its pool processes count for themselves; and one that is forked during a scrape would inherit a held lock.
        logger.error(
            'CONDUCTOR["METRICS_LISTEN"] is without effect: a prefork worker needs the environment variable %s, the '
            "name of a directory in which its processes put their counts together.",
            MULTIPROCESS_DIRECTORY,
        )
        return
    try:
        server, _thread = start_http_server(port, addr=host, registry=process_registry())
    except OSError as error:
        logger.error('Metrics are not served, CONDUCTOR["METRICS_LISTEN"] = "%s:%s": %s', host, port, error)
        return
    logger.info("Metrics are served at http://%s:%s/metrics", host, server.server_port)


def _forks(pool: Any) -> bool:
    return type(pool).__module__.endswith(".prefork")
