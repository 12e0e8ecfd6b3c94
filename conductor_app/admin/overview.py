"""One page that tells whether all is well: what is open, what is late, what fails, and who works.

Everything is read in a handful of bounded queries, at most once in ``CACHE_SECONDS``.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.cache import cache
from django.core.exceptions import EmptyResultSet, PermissionDenied
from django.db.models import Case, Count, DateTimeField, F, Max, Min, Q, QuerySet, Subquery, TextField, Value, When
from django.db.models.functions import Coalesce, TruncMinute
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext as _

from conductor_app.admin import access, causes, refresh, twins
from conductor_app.admin.grouping import as_stored, grouped
from conductor_app.admin.sparkline import sparkline
from conductor_app.admin.text import pill, shown, task_name
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.owners import node_name
from conductor_app.store.statements import Literal
from conductor_app.telling.labels import MARKS, Label
from conductor_app.telling.queues import UNANSWERED_SECONDS
from conductor_app.telling.words import duration, first_line, short_name

if TYPE_CHECKING:
    from conductor_app.admin.base import ReadOnlyAdmin

logger = logging.getLogger(__name__)

CACHE_SECONDS = 10
CACHE_KEY = "conductor_app.overview"
#: The latest so many executions are looked through for what has ended.
LATEST = 50_000
#: Of queued and of waiting executions, so many are looked at.
MOST_OPEN = 10_000
MINUTES = 60
LONG_WAIT = dt.timedelta(hours=1)
MOST_WORKERS = 50
MOST_QUEUES = 50


@dataclass(frozen=True)
class Sight:
    """What somebody may see."""

    #: The executions, and the failures; ``None`` are all.
    executions: QuerySet[Execution] | None = None
    failures: QuerySet[FailedExecution] | None = None
    with_messages: bool = True

    @property
    def key(self) -> str:
        """The name of what is seen in the cache: people share it who see the same."""
        seen = repr([self.with_messages, _as_text(self.executions), _as_text(self.failures)])
        return f"{CACHE_KEY}:{database()}:{hashlib.sha256(seen.encode()).hexdigest()}"


def _as_text(rows: QuerySet[Any] | None) -> Any:
    try:
        return None if rows is None else rows.query.sql_with_params()
    except EmptyResultSet:
        return "nothing"


def urls(owner: ReadOnlyAdmin) -> list[URLPattern]:
    """Return the addresses of the page and of its twin for programs."""
    view: Callable[..., Any] = owner.admin_site.admin_view

    def page(request: HttpRequest) -> HttpResponse:
        return show(owner, request)

    def twin(request: HttpRequest) -> HttpResponse:
        return twins.answer(_permitted(owner, request))

    return [
        path("overview/", view(page), name="conductor_app_execution_overview"),
        path("overview/json/", view(twin), name="conductor_app_execution_overview_json"),
    ]


def show(owner: ReadOnlyAdmin, request: HttpRequest) -> HttpResponse:
    """Return the page.

    Raises:
        PermissionDenied: The user may not see executions.
    """
    document = _permitted(owner, request)
    context = {
        **owner.admin_site.each_context(request),
        "opts": owner.opts,
        "title": _("Overview"),
        "media": owner.media,
        "refresh": refresh.links(request),
        "list_url": owner.address("changelist"),
        "json_url": owner.address("overview_json"),
        **_for_page(owner, document),
    }
    response = TemplateResponse(request, "admin/conductor_app/execution/overview.html", context)
    refresh.apply_refresh(request, response)
    return response


def _permitted(owner: ReadOnlyAdmin, request: HttpRequest) -> dict[str, Any]:
    if not owner.has_view_permission(request):
        raise PermissionDenied
    sight = Sight(access.executions(owner, request), access.failures(owner, request), access.may_see_payloads(request))
    document = dict(_cached(sight))
    if not request.user.has_perm("conductor_app.view_failedexecution"):
        document["failures"] = None
    return document


def _cached(sight: Sight) -> dict[str, Any]:
    key = sight.key
    try:
        known = cache.get(key)
    except Exception:  # the cache is the project's, and this page is for when things are broken
        logger.warning("The cache does not answer; the overview is read from the database.", exc_info=True)
        return read(sight)
    if known is None:
        known = read(sight)
        cache.set(key, known, CACHE_SECONDS)
    return dict(known)


# ---------------------------------------------------------------------------------------------------------- reading


def read(sight: Sight) -> dict[str, Any]:
    """Read everything that the page shows to somebody, as plain data, in four queries."""
    waiting = _waiting(sight)
    now = waiting["now"]
    queues, workers = _open(sight)
    ended, by_minute, is_all = _ended(sight, now)
    queued = sum(queue["queued"] for queue in queues)
    due = [queue["oldest_due_at"] for queue in queues if queue["oldest_due_at"] is not None]
    overdue = {
        "message": _earliest(queue["next_message_at"] for queue in queues),
        "lease": _earliest(worker["first_lease_ends_at"] for worker in workers),
        "step": waiting["first_deadline_at"],
    }
    return {
        "read_at": now,
        "open": {
            "queued": queued,
            "running": sum(worker["running"] for worker in workers),
            "waiting": waiting["count"],
        },
        "open_are_bounded_at": MOST_OPEN,
        "oldest_queued_at": min(due, default=None),
        "waiting_longer_than_an_hour": waiting["long"],
        "longest_waiting_since": waiting["since"],
        "ended_in_the_last_hour": ended,
        "ended_by_minute": by_minute,
        "ended_is_complete": is_all,
        "failures": [
            {
                "cause": group.cause,
                "error_class": group.error_class,
                "message": group.sample if sight.with_messages else None,
                "count": group.count,
                "tasks": sorted(group.tasks),
                "first_at": group.first_at,
                "last_at": group.last_at,
            }
            for group in causes.groups(sight.failures, with_messages=sight.with_messages)
        ],
        "workers": workers[:MOST_WORKERS],
        "queues": queues[:MOST_QUEUES],
        "overdue": {name: instant for name, instant in overdue.items() if instant is not None and instant < now},
    }


def _executions(sight: Sight) -> Any:
    return Execution.objects.using(database()) if sight.executions is None else sight.executions


def _waiting(sight: Sight) -> dict[str, Any]:
    """Look at the awaited steps with the earliest deadlines: an execution waits for one at a time."""
    awaited = Step.objects.using(database()).filter(status=Literal(StepStatus.PENDING.value))
    # A step of a cancelled execution is undecided until its child has ended, and nobody waits for it.
    awaited = awaited.filter(execution__status=ExecutionStatus.WAITING)
    if sight.executions is not None:
        awaited = awaited.filter(execution__in=sight.executions.values("pk"))
    awaited = awaited.exclude(kind=StepKind.START).order_by(F("deadline_at").asc(nulls_last=True))
    nothing = Max(Case(When(pk__isnull=True, then=F("created_at"))))
    found: dict[str, Any] = awaited[: MOST_OPEN + 1].aggregate(
        count=Count("pk"),
        long=Count("pk", filter=Q(created_at__lt=clock.after(-LONG_WAIT))),
        since=Min("created_at"),
        first_deadline_at=Min("deadline_at"),
        # The database's clock, whether or not anything waits.
        now=Coalesce(nothing, clock.now(), output_field=DateTimeField()),
    )
    if found["now"] is None:  # somebody may see nothing, so the database was not asked
        found["now"] = clock.read(database())
    return found


def _open(sight: Sight) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Look at queued executions by queue and at running ones by process: one query, two partial indexes."""
    rows = _executions(sight).order_by()
    queued = rows.with_status(ExecutionStatus.QUEUED)
    nth = queued.order_by("dispatch_at").values("dispatch_at")[MOST_OPEN : MOST_OPEN + 1]
    queued = queued.filter(
        Q(dispatch_at__isnull=True)
        | Q(dispatch_at__lte=Coalesce(Subquery(nth), clock.after(dt.timedelta(days=36_500))))
    )
    unanswered = Q(due_at__lte=clock.after(-UNANSWERED_SECONDS))
    by_queue = queued.values(group=Value("queued", output_field=TextField()), name=F("queue"), of=F("queue")).annotate(
        count=Count("pk"),
        late=Count("pk", filter=unanswered),
        first=Min("due_at", filter=Q(due_at__lte=clock.now())),
        next=Min("dispatch_at"),
    )
    running = rows.with_status(ExecutionStatus.RUNNING)
    by_process = running.values(
        group=Value("running", output_field=TextField()), name=F("lease_owner"), of=F("queue")
    ).annotate(
        count=Count("pk"),
        late=Count("pk", filter=Q(lease_expires_at__lt=clock.now())),
        first=Min("lease_expires_at"),
        next=Max("lease_expires_at"),
    )
    queues: list[dict[str, Any]] = []
    processes: list[dict[str, Any]] = []
    for row in by_queue.union(by_process, all=True).order_by():
        (queues if row["group"] == "queued" else processes).append(dict(row))
    at_work: Counter[str] = Counter()
    for row in processes:
        at_work[row["of"]] += row["count"] - row["late"]
    return (
        sorted(
            (
                {
                    "queue": row["name"],
                    "queued": row["count"],
                    "unanswered": row["late"],
                    "running": at_work[row["name"]],
                    "oldest_due_at": as_stored(row["first"]),
                    "next_message_at": as_stored(row["next"]),
                }
                for row in queues
            ),
            key=lambda queue: (-queue["unanswered"], -queue["queued"], queue["queue"]),
        ),
        _by_worker(processes),
    )


def _by_worker(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the processes of each worker; a heartbeat moves a lease to ``LEASE_SECONDS`` from then."""
    lease = dt.timedelta(seconds=conductor_settings().LEASE_SECONDS)
    found: dict[str, dict[str, Any]] = {}
    for row in processes:
        first, last = as_stored(row["first"]), as_stored(row["next"])
        worker = found.setdefault(
            node_name(row["name"]),
            {
                "worker": node_name(row["name"]),
                "running": 0,
                "lapsed": 0,
                "last_heartbeat_at": last - lease,
                "first_lease_ends_at": first,
            },
        )
        worker["running"] += row["count"]
        worker["lapsed"] += row["late"]
        worker["last_heartbeat_at"] = max(worker["last_heartbeat_at"], last - lease)
        worker["first_lease_ends_at"] = min(worker["first_lease_ends_at"], first)
    return sorted(found.values(), key=lambda worker: worker["worker"])


def _ended(sight: Sight, now: dt.datetime) -> tuple[dict[str, int], list[dict[str, Any]], bool]:
    """Count what has ended in the last hour by status and minute, among the latest executions."""
    since = now.replace(second=0, microsecond=0) - dt.timedelta(minutes=MINUTES - 1)
    minute_of = TruncMinute("finished_at", tzinfo=dt.UTC if settings.USE_TZ else None)
    latest = _executions(sight).order_by("-id")
    latest = latest.annotate(minute=Case(When(finished_at__gte=since, then=minute_of)))
    counted = grouped(latest.values("status", "minute")[:LATEST], ["status", "minute"])
    ended: Counter[str] = Counter({"succeeded": 0, "failed": 0, "cancelled": 0})
    minutes = [since + dt.timedelta(minutes=number) for number in range(MINUTES)]
    by_minute: dict[dt.datetime, Counter[str]] = {minute: Counter() for minute in minutes}
    seen = 0
    for status, instant, count in counted:
        seen += count
        minute = as_stored(instant)
        if minute in by_minute:
            ended[status] += count
            by_minute[minute][status] += count
    listed = [{"minute": minute, **{status: found[status] for status in ended}} for minute, found in by_minute.items()]
    return dict(ended), listed, seen < LATEST


def _earliest(instants: Iterable[dt.datetime | None]) -> dt.datetime | None:
    return min((instant for instant in instants if instant is not None), default=None)


# ---------------------------------------------------------------------------------------------------------- the page


def _for_page(owner: ReadOnlyAdmin, document: dict[str, Any]) -> dict[str, Any]:
    """Return the words and links of the page."""
    now = document["read_at"]
    lists, failures = owner.address("changelist"), owner.address("changelist", model="failedexecution")
    by_minute = document["ended_by_minute"]
    late = [
        {"name": shown(queue["queue"]), "oldest": _since(queue["oldest_due_at"], now), **queue}
        for queue in document["queues"]
        if queue["unanswered"]
    ]
    totals = [sum(row[status] for status in ("succeeded", "failed", "cancelled")) for row in by_minute]
    cards = [
        {
            "pill": pill(Label(MARKS[ExecutionStatus(status)], status)),
            "count": _bounded(count),
            "url": f"{lists}?status__exact={status}" if lists else None,
        }
        for status, count in document["open"].items()
    ]
    cards += [
        {
            "pill": pill(Label(MARKS[ExecutionStatus(status)], status)),
            "count": f"{count:,}",
            "note": _("in the last hour"),
            "url": f"{lists}?status__exact={status}" if lists else None,
        }
        for status, count in document["ended_in_the_last_hour"].items()
    ]
    return {
        "cards": cards,
        "read_at": now,
        "oldest_queued": _since(document["oldest_queued_at"], now),
        "long_waits": _bounded(document["waiting_longer_than_an_hour"]),
        "longest_wait": _since(document["longest_waiting_since"], now),
        "throughput": sparkline(
            totals,
            "cd-throughput",
            _("Ended in each of the last 60 minutes: %(total)s in all, at most %(most)s in one.")
            % {"total": f"{sum(totals):,}", "most": f"{max(totals):,}"},
        ),
        "failed": sparkline(
            [row["failed"] for row in by_minute],
            "cd-failed",
            _("Failed in each of the last 60 minutes: %(total)s in all, at most %(most)s in one.")
            % {
                "total": f"{sum(row['failed'] for row in by_minute):,}",
                "most": f"{max(row['failed'] for row in by_minute):,}",
            },
        ),
        "minutes": [{**row, "total": total} for row, total in zip(by_minute, totals, strict=True)],
        "ended_is_complete": document["ended_is_complete"],
        "latest": f"{LATEST:,}",
        "days": causes.DAYS,
        "may_see_failures": document["failures"] is not None,
        "may_see_messages": all(group["message"] is not None for group in document["failures"] or ()),
        "groups": [
            {
                "error": shown(short_name(group["error_class"]), title=group["error_class"]),
                "message": shown(
                    short_name(group["error_class"])
                    if group["message"] is None
                    else first_line(group["message"], causes.MESSAGE_LENGTH)
                ),
                "count": f"{group['count']:,}",
                "tasks": [task_name(task) for task in group["tasks"][:3]],
                "first": _since(group["first_at"], now),
                "last": _since(group["last_at"], now),
                "first_at": group["first_at"],
                "last_at": group["last_at"],
                "url": f"{failures}?cause={group['cause']}" if failures else None,
                "roots_url": f"{failures}?cause={group['cause']}&scope=roots" if failures else None,
            }
            for group in document["failures"] or ()
        ],
        "workers": [
            {
                **worker,
                "name": shown(worker["worker"]),
                "heartbeat": _since(worker["last_heartbeat_at"], now),
            }
            for worker in document["workers"]
        ],
        "unserved": [queue for queue in late if not queue["running"]],
        "busy": [queue for queue in late if queue["running"]],
        "overdue": [
            {"what": _OVERDUE[name](), "since": _since(instant, now)} for name, instant in document["overdue"].items()
        ],
    }


_OVERDUE: dict[str, Callable[[], str]] = {
    "message": lambda: _("A queued execution's message was to be published"),
    "lease": lambda: _("A running execution's lease has ended"),
    "step": lambda: _("A timeout or the end of a sleep was due"),
}


def _bounded(count: int) -> str:
    return f"{MOST_OPEN:,}+" if count > MOST_OPEN else f"{count:,}"


def _since(when: dt.datetime | None, now: dt.datetime) -> str | None:
    return None if when is None else duration((now - when).total_seconds())
