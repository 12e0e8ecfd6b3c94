"""One page that tells whether all is well: what is open, what is late, what fails, and who works.

Its figures are read at most once in ten seconds.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, URLPattern, reverse
from django.utils import timezone
from django.utils.translation import gettext as _

from conductor_app.admin import access, causes, figures, subpages
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.figures_cache import cached
from conductor_app.admin.sparkline import sparkline
from conductor_app.admin.text import pill, shown, task_name
from conductor_app.conf import conductor_settings
from conductor_app.states import ExecutionStatus
from conductor_app.telling.labels import MARKS, Label
from conductor_app.telling.words import first_line, short_name, since

#: Those of docs/monitoring/alerts.yml.
ALERT_RULES = (
    "ConductorQueueNotServed",
    "ConductorQueueIsLate",
    "ConductorTasksFail",
    "ConductorRunsAreLost",
    "ConductorNobodySweeps",
    "ConductorParkedForLong",
    "ConductorSchedulesAreOverdue",
    "ConductorGaugesAreMissing",
    "ConductorWakeupHealed",
)


def urls(owner: ReadOnlyAdmin) -> list[URLPattern]:
    """Return the addresses of the page and of its twin for programs."""
    return subpages.urls(owner, "overview", show, _permitted)


def show(owner: ReadOnlyAdmin, request: HttpRequest) -> HttpResponse:
    """Return the page.

    Raises:
        PermissionDenied: The user may not see executions.
    """
    document = _permitted(owner, request)
    return subpages.answer(
        owner,
        request,
        "overview",
        _("Overview"),
        slow_url=owner.address("slow"),
        workers_url=owner.address("workers"),
        counted=_counted(),
        metrics_url=_metrics_url(),
        alert_rules=ALERT_RULES,
        **_for_page(owner, document),
    )


def _permitted(owner: ReadOnlyAdmin, request: HttpRequest) -> dict[str, Any]:
    subpages.check_permission(owner, request)
    sight = figures.Sight(
        access.executions(owner, request), access.failures(owner, request), access.may_see_payloads(request)
    )
    document = cached(sight.key, lambda: figures.read(sight))
    if not request.user.has_perm("conductor_app.view_failedexecution"):
        document["failures"] = None
    return document


# ---------------------------------------------------------------------------------------------------------- the page


def _counted() -> str:
    """Return whether workers count what happens, and serve that."""
    settings = conductor_settings()
    if not settings.METRICS:
        return _('They count nothing: CONDUCTOR["METRICS"] is off.')
    if not settings.METRICS_LISTEN:
        return _('They count, and serve it nowhere: CONDUCTOR["METRICS_LISTEN"] is empty.')
    return _('Each worker serves it at the address of CONDUCTOR["METRICS_LISTEN"].')


def _metrics_url() -> str | None:
    """Return the address of the metrics' view, if this site has one."""
    # Whoever has it in a urlconf has imported it, and the package that it needs.
    metrics = sys.modules.get("conductor_app.metrics")
    try:
        return None if metrics is None else reverse(metrics.view)
    except NoReverseMatch:
        return None


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
    minutes = [_time_of_day(row["minute"]) for row in by_minute]
    ends = (minutes[0], minutes[-1])
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
        "held": _bounded(document["held"]) if document["held"] else "",
        "held_url": f"{lists}?held=1" if lists else None,
        "paused": [
            {
                **paused,
                "name": task_name(paused["task"]),
                "by": shown(paused["by"] or ""),
                "reason": shown(paused["reason"]),
                "queued": f"{paused['queued']:,}",
                "ago": _since(paused["since"], now),
            }
            for paused in document["paused_tasks"]
        ],
        "long_waits": _bounded(document["waiting_longer_than_an_hour"]),
        "longest_wait": _since(document["longest_waiting_since"], now),
        "throughput": sparkline(
            totals,
            "cd-throughput",
            _("Ended in each of the last 60 minutes: %(total)s in all, at most %(most)s in one.")
            % {"total": f"{sum(totals):,}", "most": f"{max(totals):,}"},
            minutes,
            ends,
        ),
        "failed": sparkline(
            [row["failed"] for row in by_minute],
            "cd-failed",
            _("Failed in each of the last 60 minutes: %(total)s in all, at most %(most)s in one.")
            % {
                "total": f"{sum(row['failed'] for row in by_minute):,}",
                "most": f"{max(row['failed'] for row in by_minute):,}",
            },
            minutes,
            ends,
        ),
        "minutes": [{**row, "total": total} for row, total in zip(by_minute, totals, strict=True)],
        "ended_is_complete": document["ended_is_complete"],
        "latest": f"{figures.LATEST:,}",
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


def _time_of_day(when: dt.datetime) -> str:
    return f"{timezone.localtime(when) if timezone.is_aware(when) else when:%H:%M}"


def _bounded(count: int) -> str:
    return f"{figures.MOST_OPEN:,}+" if count > figures.MOST_OPEN else f"{count:,}"


def _since(when: dt.datetime | None, now: dt.datetime) -> str | None:
    return None if when is None else since(when, now)
