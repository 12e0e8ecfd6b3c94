"""Prometheus metrics; needs the extra ``metrics``.

Two kinds. What happens is counted in the process in which it happens, by hooks that ``CONDUCTOR["METRICS"]`` puts in.
How things stand is read from the database when somebody asks, by ``view`` or a ``DatabaseCollector`` in a registry.

Labels are names of tasks, queues, statuses and the like, never ids.
"""

from __future__ import annotations

import datetime as dt
import hmac
import logging
import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from django.db import connections, models
from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from conductor_app import signals
from conductor_app.conf import conductor_settings, host_and_port
from conductor_app.models import Execution, Place, database
from conductor_app.models.execution import IS_STOPPED
from conductor_app.states import ExecutionStatus, PlaceState
from conductor_app.store import clock, observing, owners
from conductor_app.telling import schedules
from conductor_app.telling.stops import read_paused
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
#: So many queues have gauges of their own: those with the oldest due executions, then those with the most. All others
#: are one queue by the name ``OTHERS``.
MAX_QUEUES = 50
OTHERS = "other"
#: Environment variable of prometheus-client: the directory in which processes put their counts together.
MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

#: From 5 ms, about what a run takes that only suspends, to an hour.
_RUN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
#: To a week: an execution may wait for people.
_EXECUTION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21_600, 86_400, 604_800)
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
        self.run_ends = Counter("conductor_run_ends", "Runs that ended.", ["task", "outcome"], registry=registry)
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
        self.execution_seconds = Histogram(
            "conductor_execution_seconds",
            "How long executions took, from their creation to their end, by the clock of who ends them.",
            ["task"],
            buckets=_EXECUTION_BUCKETS,
            registry=registry,
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
            (signals.run_ended, self._on_run_ended),
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
            self.wait_seconds.labels(execution.queue).observe(clock.elapsed_since(execution.due_at))

    def _on_run_ended(self, execution: Execution, outcome: str, **_kwargs: Any) -> None:
        self.run_ends.labels(execution.task, str(outcome)).inc()

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
        # Not by the attribute, which would be read from the database if it is not loaded.
        if isinstance(created_at := vars(execution).get("created_at"), dt.datetime):
            self.execution_seconds.labels(execution.task).observe(clock.elapsed_since(created_at))

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
        # Those that are to be published first: what is due is among them.
        queued = _by_queue(rows.with_status(ExecutionStatus.QUEUED).order_by("dispatch_at"))
        paused = read_paused(most=MAX_ROWS, counted=MAX_ROWS)
        running = rows.with_status(ExecutionStatus.RUNNING)
        by_status = {
            ExecutionStatus.QUEUED.value: _counts(queued),
            ExecutionStatus.RUNNING.value: _counts(_by_queue(running)),
            ExecutionStatus.WAITING.value: _counts(_by_queue(rows.with_status(ExecutionStatus.WAITING))),
        }
        ages = {
            queue: 0.0 if due is None else max((now - due).total_seconds(), 0.0)
            for queue, (_count, due) in queued.items()
        }
        executions = GaugeMetricFamily(
            "conductor_unfinished_executions",
            f"Executions that have not ended; at most {MAX_ROWS} of each status are counted.",
            labels=["status"],
        )
        for status, queues in by_status.items():
            executions.add_metric([status], sum(queues.values()))
        yield executions
        yield from _of_queues(by_status, ages)
        yield GaugeMetricFamily(
            "conductor_oldest_due_seconds",
            "How long the oldest queued execution that is due has been waiting for a worker; 0 if there is none.",
            value=max(ages.values(), default=0.0),
        )
        yield GaugeMetricFamily(
            "conductor_held_executions",
            f"Executions that somebody holds; at most {MAX_ROWS} are counted.",
            value=_count(rows.held().order_by("held_at")),
        )
        tasks = GaugeMetricFamily(
            "conductor_paused_task_executions",
            "Queued executions of each task that somebody has paused; 0 if it is paused and none is queued.",
            labels=["task"],
        )
        for task in paused:
            tasks.add_metric([task.row.name], task.queued)
        yield tasks
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
        yield from _of_limits(now)
        yield GaugeMetricFamily(
            "conductor_overdue_schedules",
            "Schedules that are not paused, and whose instant came two minutes ago or more and was not acted on.",
            value=_count(schedules.overdue()),
        )
        holders = running.order_by().values_list("lease_owner", flat=True).distinct()[:MAX_ROWS]
        yield GaugeMetricFamily(
            "conductor_busy_workers",
            "Workers that hold a lease of a running execution.",
            value=len({owners.worker_of(holder) for holder in holders}),
        )


def _by_queue(rows: models.QuerySet[Execution]) -> dict[str, tuple[int, dt.datetime | None]]:
    """Return, of ``MAX_ROWS`` of ``rows``, how many are of each queue, and since when the first of those is due.

    What is held, or of a paused task, is counted, and is not due.
    """
    connection = connections[database()]
    startable = models.Case(models.When(IS_STOPPED, then=None), default=models.F("due_at"))
    some = rows.annotate(startable_at=startable).values("queue", "startable_at")[:MAX_ROWS]
    compiler: Any = some.query.get_compiler(connection=connection)
    few, params = compiler.as_sql()
    queue, due = connection.ops.quote_name("queue"), connection.ops.quote_name("startable_at")
    # In SQL: Django cannot group what it has sliced, and MySQL takes no LIMIT in ``IN (SELECT …)``.
    sql = f"SELECT {queue}, COUNT(*), MIN({due}) FROM ({few}) few GROUP BY {queue}"  # noqa: S608 - quoted above
    converters = compiler.get_converters([None, None, Execution._meta.get_field("due_at").cached_col])
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        found = list(compiler.apply_converters(cursor.fetchall(), converters))
    return {name: (count, first) for name, count, first in found}


def _counts(queues: dict[str, tuple[int, dt.datetime | None]]) -> dict[str, int]:
    return {queue: count for queue, (count, _due) in queues.items()}


def _of_queues(by_status: dict[str, dict[str, int]], ages: dict[str, float]) -> Iterator[Metric]:
    """Return the gauges that have a label for the queue; of ``MAX_QUEUES`` queues, and one for all others."""
    total: Tally[str] = Tally()
    for counts in by_status.values():
        total.update(counts)
    kept = set(sorted(total, key=lambda queue: (-ages.get(queue, 0.0), -total[queue], queue))[:MAX_QUEUES])
    executions = GaugeMetricFamily(
        "conductor_queue_executions",
        f"Executions of a queue that have not ended; {MAX_QUEUES} queues, and the sum of all others.",
        labels=["queue", "status"],
    )
    for status, counts in by_status.items():
        shown: Tally[str] = Tally()
        for queue in total:
            # Of a queue that has any, all three: an expression of Prometheus finds no 0 that is not there.
            shown[queue if queue in kept else OTHERS] += counts.get(queue, 0)
        for queue, count in sorted(shown.items()):
            executions.add_metric([queue, status], count)
    yield executions
    oldest = GaugeMetricFamily(
        "conductor_queue_oldest_due_seconds",
        "How long the oldest queued execution of a queue that is due has been waiting for a worker.",
        labels=["queue"],
    )
    longest: dict[str, float] = {}
    for queue in total:
        name = queue if queue in kept else OTHERS
        longest[name] = max(longest.get(name, 0.0), ages.get(queue, 0.0))
    for queue, age in sorted(longest.items()):
        oldest.add_metric([queue], age)
    yield oldest


def _of_limits(now: dt.datetime) -> Iterator[Metric]:
    """Return the gauges of those who wait for a place of a limit; a limit for which nobody waits has none."""
    parked = GaugeMetricFamily(
        "conductor_parked_executions", "Executions that wait for a place of a limit.", labels=["limit"]
    )
    oldest = GaugeMetricFamily(
        "conductor_oldest_parked_seconds",
        "How long the first of them has been waiting since it was due.",
        labels=["limit"],
    )
    places = Place.objects.using(database()).filter(state=PlaceState.PARKED)
    for limit in places.order_by().values_list("limit", flat=True).distinct()[:MAX_ROWS]:
        of_limit = places.filter(limit=limit)
        first = of_limit.order_by("since").values_list("since", flat=True).first()
        if first is not None:
            parked.add_metric([limit], _count(of_limit))
            oldest.add_metric([limit], max((now - first).total_seconds(), 0.0))
    yield parked
    yield oldest


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
