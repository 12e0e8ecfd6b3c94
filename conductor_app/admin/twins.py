"""What the pages show, as JSON: the same rows, by the same permissions, for programs."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.http import HttpRequest, HttpResponse, JsonResponse

from conductor_app.admin.rows import RowsAdmin


def list_response(owner: RowsAdmin, request: HttpRequest) -> HttpResponse:
    """Answer with one page of a list, and the address of the next one.

    Raises:
        PermissionDenied: The user may not see the list.
    """
    if not owner.has_view_permission(request):
        raise PermissionDenied
    try:
        found: Any = owner.get_changelist_instance(request)
    except (IncorrectLookupParameters, SuspiciousOperation):
        return refused(400, "A parameter of this address has no meaning here.")
    owner.complete_for_json(found.result_list)
    # What it has looked through ends, but the table does not.
    older = found.older or (found.window.older if found.window else None)
    following = None
    if found.page_num < found.paginator.num_pages:
        following = found.get_query_string({"p": found.page_num + 1})
    return answer(
        {
            "rows": [owner.as_json(row) for row in found.result_list],
            "count": found.result_count,
            "is_complete": not found.is_capped and found.window is None,
            "next": absolute(request, following),
            "older": absolute(request, older),
        }
    )


def row_response(owner: RowsAdmin, request: HttpRequest, object_id: str) -> HttpResponse:
    """Answer with one row.

    Raises:
        PermissionDenied: The user may not see it.
    """
    if not owner.has_view_permission(request):
        raise PermissionDenied
    row = owner.get_object(request, unquote(object_id))
    if row is None:
        return refused(404, "There is no such row.")
    if not owner.has_view_permission(request, row):
        raise PermissionDenied
    return answer(owner.in_full(row, request))


def answer(document: Any, status: int = 200) -> JsonResponse:
    """Return a document that no cache keeps."""
    return JsonResponse(document, status=status, json_dumps_params={"indent": 2})


def refused(status: int, message: str) -> JsonResponse:
    """Return why there is no document."""
    return answer({"error": message}, status)


def absolute(request: HttpRequest, query: str | None) -> str | None:
    """Return the address of this document with another query string."""
    return None if query is None else request.build_absolute_uri(f"{request.path}{query}")
