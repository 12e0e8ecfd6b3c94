"""What the pages of figures beside a list have in common: their addresses, who may see them, and their frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path

from conductor_app.admin import refresh, twins
from conductor_app.admin.base import ReadOnlyAdmin


def urls(
    owner: ReadOnlyAdmin,
    name: str,
    show: Callable[[ReadOnlyAdmin, HttpRequest], HttpResponse],
    document: Callable[[ReadOnlyAdmin, HttpRequest], Any],
) -> list[URLPattern]:
    """Return the addresses of a page and of its twin for programs.

    Args:
        owner: Whose page it is.
        name: In the addresses.
        show: Returns the page.
        document: Returns what the twin tells.
    """
    view: Callable[..., Any] = owner.admin_site.admin_view

    def page(request: HttpRequest) -> HttpResponse:
        return show(owner, request)

    def twin(request: HttpRequest) -> HttpResponse:
        return twins.answer(document(owner, request))

    return [
        path(f"{name}/", view(page), name=f"conductor_app_execution_{name}"),
        path(f"{name}/json/", view(twin), name=f"conductor_app_execution_{name}_json"),
    ]


def check_permission(owner: ReadOnlyAdmin, request: HttpRequest) -> None:
    """Let pass who may see executions.

    Raises:
        PermissionDenied: The user may not.
    """
    if not owner.has_view_permission(request):
        raise PermissionDenied


def answer(owner: ReadOnlyAdmin, request: HttpRequest, name: str, title: str, **more: Any) -> HttpResponse:
    """Return a page, loaded again as its address says.

    Args:
        owner: Whose page it is.
        request: The request.
        name: As in the addresses; the template's as well.
        title: What stands above it, and at the end of the trail.
        more: What else the template shows.
    """
    context = {
        **owner.admin_site.each_context(request),
        "opts": owner.opts,
        "title": title,
        "media": owner.media,
        "refresh": refresh.links(request),
        "list_url": owner.address("changelist"),
        "json_url": owner.address(f"{name}_json"),
        **more,
    }
    response = TemplateResponse(request, f"admin/conductor_app/execution/{name}.html", context)
    refresh.apply_refresh(request, response)
    return response
