"""Payloads and results as files."""

from __future__ import annotations

import json
import uuid
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.urls import path

from conductor_app.admin.access import may_see_payloads
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.values.redaction import readable, redact


class Downloads(ReadOnlyAdmin):
    """The downloads of an execution's page."""

    def get_urls(self) -> list[Any]:
        """Add the downloads."""
        view = self.admin_site.admin_view(self.download_view)
        downloads = [
            path(f"<uuid:object_id>/{name}.json", view, {"name": name}, name=f"conductor_app_execution_{name}")
            for name in ("payload", "result")
        ]
        return [*downloads, *super().get_urls()]

    def download_view(self, request: HttpRequest, object_id: uuid.UUID, name: str) -> HttpResponseBase:
        """Send a payload or a result as stored, masked, as a file."""
        execution = self.get_object(request, str(object_id))
        if not self.has_view_permission(request, execution) or not may_see_payloads(request):
            raise PermissionDenied
        text: str | None = None if execution is None else getattr(execution, name)
        if text is None:
            raise Http404
        kind, suffix = "application/json", "json"
        try:
            content = json.dumps(redact(json.loads(text)), indent=2)
        except (ValueError, RecursionError):
            content, kind, suffix = readable(text), "text/plain; charset=utf-8", "txt"
        headers = {
            "Content-Disposition": f'attachment; filename="{name}-{object_id}.{suffix}"',
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return HttpResponse(content.encode("utf-8", "backslashreplace"), content_type=kind, headers=headers)
