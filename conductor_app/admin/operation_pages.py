"""Operations in the admin: who has asked for what, how far it is, and what became of each execution."""

from __future__ import annotations

import uuid
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.urls import URLPattern, path
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import access, filters, refresh
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.operations import ACTIONS
from conductor_app.admin.text import WORDS, or_dash, shown
from conductor_app.models import Execution, Operation, OperationItem, database
from conductor_app.states import OperationSource
from conductor_app.telling import operations, words
from conductor_app.transitions import operating

#: Executions of an operation on one page.
ITEMS_PER_PAGE = 100
#: Executions that an operation's JSON document has.
MOST_ITEMS = 1_000
PAGE_VAR = "p"


@admin.register(Operation)
class OperationAdmin(ReadOnlyAdmin):
    """What people have asked for, the latest first."""

    list_display = ("kind_text", "actor_text", "source", "progress", "filters_text", "reason_text", "created")
    list_display_links = ("kind_text",)
    list_filter = (filters.OperationKindFilter, filters.AgeFilter)
    ordering = ("-id",)
    search_fields = ("id",)
    search_help_text = _("An execution's id finds what was asked for it; a name in full, what somebody has asked for.")
    change_form_template = "admin/conductor_app/operation/change_form.html"
    fields = readonly_fields = (
        "kind_text",
        "actor_text",
        "source",
        "reason_text",
        "filters_text",
        "created_at",
        "finished_at",
        "stop_requested_at",
    )

    # --------------------------------------------------------------------------------------------------------- rows

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the operations; where a site shows some executions alone, those that this person has asked for here.

        Others are about executions of which this person is to know nothing, not even their number.
        """
        rows: QuerySet[Any] = admin.ModelAdmin.get_queryset(self, request).using(database())
        if self.seen(request) is None:
            return rows
        return rows.filter(actor=request.user.get_username()[:150], source=OperationSource.ADMIN)

    def searched(self, term: str) -> Q | None:
        """Find by an execution, or by who has asked."""
        term = term.strip()
        if not term:
            return None
        try:
            key = uuid.UUID(term)
        except ValueError:
            return Q(actor=term)
        return Q(pk__in=OperationItem.objects.using(database()).filter(execution=key).values("operation_id"))

    def complete(self, rows: list[Any]) -> None:
        """Add how far each one is: one query for the page."""
        found = operations.in_short(rows)
        for row in rows:
            row.progress = found[row.pk]

    # ------------------------------------------------------------------------------------------------------ columns

    @admin.display(description=_("operation"))
    def kind_text(self, operation: Operation) -> str:
        """Return what it does, and its number."""
        return f"{operation.get_kind_display()} {operation.pk}"

    @admin.display(description=_("by"))
    @or_dash
    def actor_text(self, operation: Operation) -> SafeString | None:
        """Return who has asked for it."""
        return shown(operation.actor) if operation.actor else None

    @admin.display(description=_("reason"))
    @or_dash
    def reason_text(self, operation: Operation) -> SafeString | None:
        """Return why."""
        return shown(operation.reason) if operation.reason else None

    @admin.display(description=_("filters"))
    @or_dash
    def filters_text(self, operation: Operation) -> SafeString | None:
        """Return what has chosen its executions."""
        return shown(operation.filters) if operation.filters else None

    @admin.display(description=_("progress"))
    def progress(self, operation: Any) -> SafeString:
        """Return how far it is."""
        return shown(operation.progress.sentence)

    # -------------------------------------------------------------------------------------------------------- pages

    def get_urls(self) -> list[URLPattern]:
        """Add the button that stops one."""
        name = f"{self.opts.app_label}_{self.opts.model_name}_stop"
        return [path("<int:pk>/stop/", self.admin_site.admin_view(self.stop_view), name=name), *super().get_urls()]

    def may_stop(self, request: HttpRequest, operation: Operation) -> bool:
        """Tell whether somebody may stop it: whoever may do to executions what it does."""
        permission = f"{Execution._meta.app_label}.{ACTIONS[operation.kind].permission}"
        return self.has_view_permission(request, operation) and request.user.has_perm(permission)

    def stop_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Stop an operation (POST)."""
        operation = self.get_object(request, str(pk))
        if operation is None:
            raise Http404(gettext("There is no such operation. It may have been pruned."))
        if not self.may_stop(request, operation):
            raise PermissionDenied
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if operating.stop(operation.pk):
            self.message_user(request, gettext("The operation is stopped."), messages.SUCCESS)
        else:
            self.message_user(request, gettext("The operation had ended already."), messages.WARNING)
        return HttpResponseRedirect(self.address("change", operation.pk) or "..")

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Show how far it is, and what became of each execution."""
        operation: Operation | None = kwargs.get("obj")
        if operation is not None:
            context |= self._page(request, operation)
        response = super().render_change_form(request, context, *args, **kwargs)
        refresh.apply_refresh(request, response)
        return response

    def _page(self, request: HttpRequest, operation: Operation) -> dict[str, Any]:
        progress = operations.progress(operation)
        page = Paginator(self._items(request, operation), ITEMS_PER_PAGE).get_page(request.GET.get(PAGE_VAR))
        is_going_on = operation.finished_at is None
        query = request.GET.copy()
        query.pop(PAGE_VAR, None)
        return {
            "title": self.kind_text(operation).capitalize(),
            "subtitle": None,
            "progress": words.visible(progress.sentence),
            "is_going_on": is_going_on,
            "is_rerun": operation.kind in operations.STARTING,
            "refresh": refresh.links(request),
            "stop_url": self.address("stop", operation.pk)
            if is_going_on and self.may_stop(request, operation)
            else None,
            "items": self._rows(request, list(page.object_list)),
            "page": page,
            "page_query": f"{query.urlencode()}&" if query else "",
        }

    def _items(self, request: HttpRequest, operation: Operation) -> QuerySet[OperationItem]:
        """Return its items, as far as this site shows their executions."""
        items = OperationItem.objects.using(database()).filter(operation_id=operation.pk).order_by("pk")
        seen = self.seen(request)
        return items if seen is None else items.filter(execution__in=seen.values("pk"))

    def _rows(self, request: HttpRequest, items: list[OperationItem]) -> list[dict[str, Any]]:
        found = operations.executions_of(items)
        seen = self.seen(request)
        visible = None if seen is None else access.ids(seen, [item.created_id for item in items])
        return [
            {
                "link": self.link(item.execution_id) if item.execution_id in found else item.execution_id,
                "task": words.visible(words.short_name(found[item.execution_id].task))
                if item.execution_id in found
                else "",
                "state": item.get_state_display(),
                "message": words.visible(item.message),
                "status": WORDS.get(operations.status_now(item, found) or ""),
                "created": self.link(item.created_id) if visible is None or item.created_id in visible else None,
                "decided": words.exact(item.decided_at) if item.decided_at else "",
            }
            for item in items
        ]

    # --------------------------------------------------------------------------------------------------------- JSON

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return an operation as plain data."""
        progress = getattr(row, "progress", None) or operations.progress(row)
        return operations.document(row, progress)

    def in_full(self, row: Operation, request: HttpRequest) -> dict[str, Any]:
        """Return an operation with what became of each execution."""
        items = list(self._items(request, row)[: MOST_ITEMS + 1])
        return {
            **self.as_json(row),
            "items": operations.item_documents(items[:MOST_ITEMS]),
            "items_are_complete": len(items) <= MOST_ITEMS,
        }
