"""The page of limits: who has a place of a key, who waits for one, and since when."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.admin import access, subpages
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.text import ago, shown, task_name
from conductor_app.states import LimitKind
from conductor_app.telling import limits
from conductor_app.telling.limits import Seen, SeenKey, SeenPlace
from conductor_app.telling.words import duration


def urls(owner: ReadOnlyAdmin) -> list[URLPattern]:
    """Return the addresses of the page and of its twin for programs."""
    return subpages.urls(owner, "limits", show, lambda owner, request: _permitted(owner, request).document())


def show(owner: ReadOnlyAdmin, request: HttpRequest) -> HttpResponse:
    """Return the page; ``?limit=`` and ``?key=`` choose.

    Raises:
        PermissionDenied: The user may not see executions.
    """
    seen = _permitted(owner, request)
    return subpages.answer(
        owner,
        request,
        "limits",
        _("Limits"),
        overview_url=owner.address("overview"),
        read_at=seen.now,
        keys=[_key(owner, key, seen) for key in seen.keys],
        more=seen.more,
        is_narrowed="limit" in request.GET,
        all_url=owner.address("limits"),
    )


def _permitted(owner: ReadOnlyAdmin, request: HttpRequest) -> Seen:
    subpages.check_permission(owner, request)
    given = request.GET
    return limits.read(
        access.executions(owner, request),
        limit=given.get("limit"),
        key=given.get("key") if "limit" in given else None,
    )


def _key(owner: ReadOnlyAdmin, key: SeenKey, seen: Seen) -> dict[str, Any]:
    oldest = key.oldest_parked_at
    return {
        "limit": shown(key.limit),
        "key": shown(key.key),
        "url": f"{owner.address('limits')}?{urlencode({'limit': key.limit, 'key': key.key})}",
        "taken": _taken(key),
        "parked": f"{key.parked:,}",
        "oldest": oldest and duration((seen.now - oldest).total_seconds()),
        "holders": [_place(owner, place, seen) for place in key.holders],
        "waiting": [_place(owner, place, seen) for place in key.waiting],
    }


def _taken(key: SeenKey) -> str:
    values = {"taken": f"{key.taken:,}", "number": f"{key.number:,}"}
    if key.kind == LimitKind.RUN:
        return _("%(taken)s of %(number)s run") % values
    if key.kind == LimitKind.OPEN:
        return _("%(taken)s of %(number)s open") % values
    every = duration(key.seconds or 0.0)
    return ngettext("one each %(time)s", "one each %(time)s, %(number)s at once", key.number) % {
        **values,
        "time": every,
    }


def _place(owner: ReadOnlyAdmin, place: SeenPlace, seen: Seen) -> dict[str, Any]:
    return {"link": owner.link(place.id, text=task_name(place.task)), "since": ago(place.since, seen.now)}
