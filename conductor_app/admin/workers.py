"""The page of workers and queues: who is at work, what runs there, and which queues nobody serves."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from django.utils.translation import gettext as _

from conductor_app.admin import access, subpages
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.text import ago, pill, shown, task_name
from conductor_app.telling import workers
from conductor_app.telling.labels import Label
from conductor_app.telling.words import duration
from conductor_app.telling.workers import Attendance, SeenQueue, SeenWorker

#: A queue names so many of its workers.
MOST_NAMES = 5
#: A worker names so many of its queues.
MOST_QUEUES = 10

_PILLS = {
    workers.ALIVE: Label("✓", "alive"),
    workers.STOPPING: Label("◐", "stopping"),
    workers.SILENT: Label("✕", "silent"),
    workers.SERVED: Label("✓", "served"),
    workers.BUSY: Label("◐", "all busy"),
    workers.PAUSED: Label("‖", "paused"),
    workers.UNSERVED: Label("✕", "served by nobody"),
}


def urls(owner: ReadOnlyAdmin) -> list[URLPattern]:
    """Return the addresses of the page and of its twin for programs."""
    return subpages.urls(owner, "workers", show, lambda owner, request: _permitted(owner, request).document())


def show(owner: ReadOnlyAdmin, request: HttpRequest) -> HttpResponse:
    """Return the page.

    Raises:
        PermissionDenied: The user may not see executions.
    """
    seen = _permitted(owner, request)
    return subpages.answer(
        owner,
        request,
        "workers",
        _("Workers and queues"),
        overview_url=owner.address("overview"),
        **_for_page(owner, seen),
    )


def _permitted(owner: ReadOnlyAdmin, request: HttpRequest) -> Attendance:
    subpages.check_permission(owner, request)
    return workers.read(access.executions(owner, request))


def _for_page(owner: ReadOnlyAdmin, seen: Attendance) -> dict[str, Any]:
    """Return the words and links of the page."""
    return {
        "read_at": seen.now,
        "workers": [_worker(owner, worker, seen.now) for worker in seen.workers],
        "more_workers": seen.more_workers,
        "queues": [_queue(queue, seen.now) for queue in seen.queues],
        "more_queues": seen.more_queues,
        "throughput": duration(seen.throughput_seconds),
        "minutes": int(workers.SHOWN_FOR.total_seconds() // 60),
    }


def _worker(owner: ReadOnlyAdmin, worker: SeenWorker, now: dt.datetime) -> dict[str, Any]:
    row = worker.row
    return {
        "name": shown(worker.name, title=worker.id),
        "pill": pill(_PILLS[worker.state]),
        "host": row and shown(row.host),
        "pid": row and row.pid,
        "pool": row and shown(row.pool),
        "busy": worker.busy,
        "slots": worker.slots,
        "lapsed": worker.lapsed,
        "queues": [shown(name) for name in worker.queues[:MOST_QUEUES]],
        "more_queues": max(len(worker.queues) - MOST_QUEUES, 0),
        "release": row and shown(row.release),
        "versions": row
        and [
            (name, shown(version))
            for name, version in (
                ("conductor_app", row.package),
                ("Celery", row.celery),
                ("Django", row.django),
                ("Python", row.python),
            )
        ],
        "started": row and ago(row.started_at, now),
        "seen": row and ago(row.seen_at, now),
        "runs": [owner.link(run.id, text=task_name(run.task)) for run in worker.runs],
        "more_runs": max(worker.running + worker.lapsed - len(worker.runs), 0),
    }


def _queue(queue: SeenQueue, now: dt.datetime) -> dict[str, Any]:
    return {
        "queue": queue.name,
        "name": shown(queue.name),
        "pill": pill(_PILLS[queue.state]),
        "queued": _bounded(queue.queued),
        "due": _bounded(queue.due),
        "oldest": queue.oldest_due_at and duration((now - queue.oldest_due_at).total_seconds()),
        "running": queue.running,
        "per_minute": f"{queue.per_minute:,g}",
        "workers": [shown(name) for name in queue.workers[:MOST_NAMES]],
        "more_workers": max(len(queue.workers) - MOST_NAMES, 0),
    }


def _bounded(count: int) -> str:
    return f"{workers.MOST_QUEUED:,}+" if count > workers.MOST_QUEUED else f"{count:,}"
