"""Steps in the admin."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import F, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import filters
from conductor_app.admin.access import may_see_payloads
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.plain_data import masked
from conductor_app.admin.rows import RowsAdmin
from conductor_app.admin.text import or_dash, readable_value, shown, step_pill, tail, task_name
from conductor_app.models import Step
from conductor_app.states import StepStatus
from conductor_app.telling.words import duration
from conductor_app.values.failures import load_failure


def waits_url(owner: RowsAdmin, task: str) -> str | None:
    """Return the address of the list of the steps that wait for a task: who waits, and since when."""
    steps = owner.address("changelist", model="step")
    return f"{steps}?{urlencode({'status__exact': StepStatus.PENDING.value, 'task': task})}" if steps else None


@admin.register(Step)
class StepAdmin(ReadOnlyAdmin):
    """What executions remember, the latest first."""

    list_display = (
        "status_pill",
        "name_text",
        "kind",
        "execution_short",
        "task_text",
        "child_short",
        "created",
        "took",
    )
    list_display_links = ("name_text",)
    list_filter = (filters.StepStatusFilter, filters.StepKindFilter, filters.AgeFilter)
    ordering = ("-id",)
    search_fields = ("execution_id",)
    searched_id = "execution_id"
    indexed_lookups = frozenset({"execution", "execution__id__exact", "execution_id"})
    deferred_in_lists = ("result", "error")
    references = ("child_id",)
    payload_fields = ("result",)
    fields = readonly_fields = (
        "id",
        "execution_link",
        "name_text",
        "kind",
        "status",
        "task",
        "child_link",
        "readable_result",
        "error_type",
        "readable_error",
        "timeout_seconds",
        "on_timeout",
        "deadline_at",
        "attempt",
        "created_at",
        "finished_at",
    )

    @admin.display(description=_("result"))
    @or_dash
    def readable_result(self, step: Step) -> str | None:
        """Return the result, masked, for who may see it."""
        return readable_value(step.result)

    @admin.display(description=_("error class"))
    @or_dash
    def error_type(self, step: Step) -> str | None:
        """Return the class of the error."""
        return shown(load_failure(step.error).type) if step.error else None

    @admin.display(description=_("error"))
    @or_dash
    def readable_error(self, step: Step) -> str | None:
        """Return the error with its message, arguments and attributes, masked, for who may see it."""
        return readable_value(step.error)

    @admin.display(description=_("status"))
    def status_pill(self, step: Step) -> str:
        """Return the status as a shape and a word."""
        return step_pill(step.status)

    @admin.display(description=_("name"))
    def name_text(self, step: Step) -> str:
        """Return the name."""
        return shown(step.name)

    @admin.display(description=_("task or event"), empty_value="-")
    def task_text(self, step: Step) -> str | None:
        """Return what an invocation names, or what is waited for."""
        return task_name(step.task) if step.task else None

    @admin.display(description=_("duration"))
    def took(self, step: Any) -> str:
        """Return how long it has taken."""
        return duration(((step.finished_at or step.read_at) - step.created_at).total_seconds())

    @admin.display(description=_("execution"))
    def execution_link(self, step: Step) -> str | None:
        """Return a link to the execution that remembers the step."""
        return self.link(step.execution_id)

    @admin.display(description=_("child"))
    @or_dash
    def child_link(self, step: Step) -> str | None:
        """Return a link to the child that the step stands for."""
        return self.link(step.child_id)

    def for_list(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        """Return steps with the task of the execution that remembers each."""
        with_task: QuerySet[Any] = super().for_list(rows).annotate(execution_task=F("execution__task"))
        return with_task

    @admin.display(description=_("execution"))
    def execution_short(self, step: Any) -> str | None:
        """Return the task of the execution, and the link to it."""
        link = self.link(step.execution_id, text=tail(step.execution_id))
        return (
            None
            if link is None
            else format_html('{} <span class="cd-line">{}</span>', task_name(step.execution_task), link)
        )

    @admin.display(description=_("child"), empty_value="-")
    def child_short(self, step: Step) -> str | None:
        """Return the link to the child in little room."""
        return self.link(step.child_id, text=tail(step.child_id))

    def as_json(self, row: Step) -> dict[str, Any]:
        """Return a step as plain data."""
        return {
            "id": row.pk,
            "execution": row.execution_id,
            "name": row.name,
            "kind": row.kind,
            "status": row.status,
            "task": row.task or None,
            "child": row.child_id,
            "copied": row.is_copied,
            "attempt": row.attempt,
            "timeout_seconds": row.timeout_seconds,
            "deadline_at": row.deadline_at,
            "created_at": row.created_at,
            "finished_at": row.finished_at,
        }

    def in_full(self, row: Step, request: HttpRequest) -> dict[str, Any]:
        """Return a step with its error, of which only the class is for everybody, and its result."""
        error = masked(row.error)
        if row.error and not may_see_payloads(request):
            error = {"type": load_failure(row.error).type}
        return {**super().in_full(row, request), "error": error}
