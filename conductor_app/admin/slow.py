"""One page that tells what takes long: each task's runs of the last hour or day, and the slowest executions of now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from django.utils.http import urlencode
from django.utils.translation import gettext as _

from conductor_app.admin import access, figures, subpages
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.figures_cache import cached
from conductor_app.admin.steps import waits_url
from conductor_app.admin.text import shown, task_name
from conductor_app.store import owners
from conductor_app.telling import slow, words

_PERIODS: dict[str, Callable[[], str]] = {"hour": lambda: _("the last hour"), "day": lambda: _("the last day")}


def urls(owner: ReadOnlyAdmin) -> list[URLPattern]:
    """Return the addresses of the page and of its twin for programs."""
    return subpages.urls(owner, "slow", show, _permitted)


def show(owner: ReadOnlyAdmin, request: HttpRequest) -> HttpResponse:
    """Return the page.

    Raises:
        PermissionDenied: The user may not see executions.
    """
    document = _permitted(owner, request)
    now = document["read_at"]
    lists = owner.address("changelist")

    def row(found: dict[str, Any]) -> dict[str, Any]:
        return {
            "url": owner.address("change", found["id"]),
            "id": str(found["id"]),
            "task": task_name(found["task"]),
            "since": words.duration(words.seconds_between(found["since"], now)),
            "age": words.duration(words.seconds_between(found["created_at"], now)),
            "waits_for": shown(found["waits_for"]) if found.get("waits_for") else "",
            "worker": shown(owners.shown(found["lease_owner"])) if found.get("lease_owner") else "",
        }

    return subpages.answer(
        owner,
        request,
        "slow",
        _("What takes long"),
        json_url=f"{owner.address('slow_json')}?{urlencode({'period': document['period']})}",
        read_at=now,
        periods=[
            {"name": name, "words": period(), "is_chosen": name == document["period"]}
            for name, period in _PERIODS.items()
        ],
        is_complete=document["is_complete"],
        looked_through=f"{slow.LATEST:,}",
        more_tasks=document["more_tasks"],
        tasks=[
            {
                "name": task_name(one["task"]),
                "url": f"{lists}?{urlencode({'task': one['task']})}" if lists else None,
                "waits_url": waits_url(owner, one["task"]),
                "runs": f"{one['runs']:,}",
                "failures": f"{one['failures']:,}" if one["failures"] else "",
                "columns": [
                    _duration(one[column], share)
                    for column in ("run_seconds", "queue_seconds", "whole_seconds")
                    for share in slow.SHARES
                ],
            }
            for one in document["tasks"]
        ],
        shares=[f"p{share}" for share in slow.SHARES] * 3,
        running=[row(found) for found in document["running"]],
        waiting=[row(found) for found in document["waiting"]],
    )


def _permitted(owner: ReadOnlyAdmin, request: HttpRequest) -> dict[str, Any]:
    subpages.check_permission(owner, request)
    period = request.GET.get("period", "hour")
    if period not in slow.PERIODS:
        period = "hour"
    sight = figures.Sight(access.executions(owner, request))
    return cached(f"{sight.key}:slow:{period}", lambda: slow.read(period, sight.executions))


def _duration(found: dict[str, float] | None, share: int) -> str:
    return "" if found is None else words.duration(found[f"p{share}"])
