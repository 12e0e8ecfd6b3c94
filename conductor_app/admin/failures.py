"""Failed executions in the admin."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import F, QuerySet, TextField, Value
from django.db.models.functions import Substr
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import filters
from conductor_app.admin.access import VIEW_PAYLOAD, may_see_payloads
from conductor_app.admin.actions import FailureActions
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.text import or_dash, shown, tail, task_name
from conductor_app.models import FailedExecution
from conductor_app.telling.words import first_line, short_name

#: Characters of an error message that a list reads.
MESSAGE_LENGTH = 200


@admin.register(FailedExecution)
class FailedExecutionAdmin(FailureActions, ReadOnlyAdmin):
    """Executions that failed for good, the latest first."""

    list_display = (
        "failed",
        "task_text",
        "step_text",
        "error_text",
        "summary",
        "attempts",
        "execution_short",
        "root_cause_short",
    )
    list_display_links = ("failed",)
    list_filter = (
        filters.FailureAgeFilter,
        filters.ScopeFilter,
        filters.CauseFilter,
        filters.ErrorClassFilter,
        filters.TaskFilter,
    )
    # What falls into one microsecond is in the order of the index, which ends with the primary key.
    ordering = ("-failed_at", "execution_id")
    order_column = written_column = "failed_at"
    search_fields = ("execution_id",)
    searched_id = "execution_id"
    indexed_lookups = frozenset({"execution", "execution__id__exact", "execution_id", "root_cause__id__exact"})
    references = ("root_cause_id",)
    deferred_in_lists = ("message", "traceback")
    fields = readonly_fields = (
        "execution_link",
        "task",
        "failed_at",
        "attempts",
        "step",
        "error_class",
        "message",
        "root_cause_link",
        "traceback",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows, each with the beginning of its message for who may see that."""
        rows: QuerySet[Any] = super().get_queryset(request)
        nothing = Value(None, output_field=TextField())
        shown = Substr(F("message"), 1, MESSAGE_LENGTH + 1) if may_see_payloads(request) else nothing
        beginnings: QuerySet[Any] = rows.annotate(beginning=shown)
        return beginnings

    def get_list_display(self, request: HttpRequest) -> Any:
        """Leave the messages out for who may not see them."""
        columns: Any = super().get_list_display(request)
        return columns if may_see_payloads(request) else [name for name in columns if name != "summary"]

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Show the list, and say which permission shows more."""
        context = {"needs_permission": None if may_see_payloads(request) else VIEW_PAYLOAD}
        return super().changelist_view(request, {**context, **(extra_context or {})})

    @admin.display(description=_("failed"))
    def failed(self, failure: FailedExecution) -> str | None:
        """Return how long ago it failed."""
        return self.created(failure)

    @admin.display(description=_("task"))
    def task_text(self, failure: FailedExecution) -> str:
        """Return the last part of the task's name."""
        return task_name(failure.task)

    @admin.display(description=_("failing step"), empty_value="-")
    def step_text(self, failure: FailedExecution) -> str | None:
        """Return the step at which it failed."""
        return shown(failure.step) if failure.step else None

    @admin.display(description=_("error class"))
    def error_text(self, failure: FailedExecution) -> str:
        """Return the last part of the class's name."""
        return shown(short_name(failure.error_class), title=failure.error_class)

    @admin.display(description=_("message"), empty_value="-")
    def summary(self, failure: FailedExecution) -> str | None:
        """Return the first line of the message."""
        beginning: str | None = failure.beginning  # type: ignore[attr-defined]  # annotated in get_queryset
        return None if beginning is None else shown(first_line(beginning, MESSAGE_LENGTH))

    @admin.display(description=_("execution"))
    def execution_link(self, failure: FailedExecution) -> str | None:
        """Return a link to the execution that failed."""
        return self.link(failure.execution_id)

    @admin.display(description=_("root cause"))
    @or_dash
    def root_cause_link(self, failure: FailedExecution) -> str | None:
        """Return a link to the deepest descendant whose failure is behind this one."""
        return self.link(failure.root_cause_id)

    @admin.display(description=_("execution"))
    def execution_short(self, failure: FailedExecution) -> str | None:
        """Return the link to the execution in little room."""
        return self.link(failure.execution_id, text=tail(failure.execution_id))

    @admin.display(description=_("root cause"), empty_value="-")
    def root_cause_short(self, failure: FailedExecution) -> str | None:
        """Return the link to the root cause in little room."""
        return self.link(failure.root_cause_id, text=tail(failure.root_cause_id))

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return a failure as plain data."""
        return {
            "execution": row.execution_id,
            "task": row.task,
            "failed_at": row.failed_at,
            "attempts": row.attempts,
            "step": row.step or None,
            "error_class": row.error_class,
            "message": None if row.beginning is None else first_line(row.beginning, MESSAGE_LENGTH),
            "root_cause": row.root_cause_id,
        }

    def in_full(self, row: FailedExecution, request: HttpRequest) -> dict[str, Any]:
        """Return a failure with all of its message and traceback, for who may see them."""
        is_open = may_see_payloads(request)
        document = super().in_full(row, request)
        return {
            **document,
            "message": row.message if is_open else None,
            "traceback": row.traceback if is_open else None,
        }
