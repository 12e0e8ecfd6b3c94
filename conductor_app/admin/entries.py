"""Entries for the pages of figures in the index of the admin and in its sidebar, whatever theme draws them.

Both list what is registered, and only models are. So an entry says the same of itself as a model does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from django.apps import apps
from django.contrib import admin
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import limits, overview, slow, workers
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.models import Execution

_APP = "conductor_app"
_PAGES: tuple[tuple[str, Any, Callable[[ReadOnlyAdmin, HttpRequest], HttpResponse]], ...] = (
    ("Overview", _("overview"), overview.show),
    ("Slow", _("what takes long"), slow.show),
    ("AtWork", _("workers and queues"), workers.show),
    ("Limits", _("limits"), limits.show),
)


class EntryAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Shows one of the pages that belong to the executions of the same site."""

    actions = None

    def get_urls(self) -> list[URLPattern]:
        """Return the page in the place of a list, and nothing else."""
        view: Callable[..., Any] = self.admin_site.admin_view(self._page)
        return [path("", view, name=f"{_APP}_{self.opts.model_name}_changelist")]

    def get_model_perms(self, request: HttpRequest) -> dict[str, bool]:
        """Return what shows the entry, to who may see executions."""
        owner = self._owner()
        may_view = owner is not None and owner.has_view_permission(request)
        return {"add": False, "change": False, "delete": False, "view": may_view}

    def _page(self, request: HttpRequest) -> HttpResponse:
        owner = self._owner()
        if owner is None:
            raise Http404
        show: Callable[[ReadOnlyAdmin, HttpRequest], HttpResponse] = self.opts.show  # type: ignore[attr-defined]  # _entry
        return show(owner, request)

    def _owner(self) -> Any:
        site = self.admin_site
        return site.get_model_admin(Execution) if site.is_registered(Execution) else None


def register_pages(site: admin.AdminSite) -> None:
    """Let the index and the sidebar of a site list the overview, what takes long, workers and queues, and limits.

    Args:
        site: One on which ``ExecutionAdmin``, or a subclass of it, is registered.
    """
    for name, words, show in _PAGES:
        site.register([_entry(name, words, show)], EntryAdmin)


def _entry(name: str, words: Any, show: Callable[..., HttpResponse]) -> Any:
    """Return what a site takes for a model."""
    key = name.lower()
    meta = SimpleNamespace(
        app_label=_APP,
        app_config=apps.get_app_config(_APP),
        object_name=name,
        model_name=key,
        label=f"{_APP}.{name}",
        label_lower=f"{_APP}.{key}",
        verbose_name=words,
        verbose_name_plural=words,
        abstract=False,
        swapped=False,
        is_composite_pk=False,
        proxy=False,
        managed=False,
        get_field=None,
        fields=(),
        show=show,
    )
    return type(name, (), {"_meta": meta, "__module__": __name__})


register_pages(admin.site)
