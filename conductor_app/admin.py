"""Executions, steps and failures in the admin: to look at, never to edit. The rows belong to ``transitions.py``."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models import F, Model, QuerySet
from django.db.models.functions import Substr
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from conductor_app.explain import attempts, first_line, short_name
from conductor_app.models import Execution, FailedExecution, Step

#: Characters of an error message that a list reads.
MESSAGE_LENGTH = 200


class DeferringChangeList(ChangeList):
    """A list that leaves the long texts in the database."""

    def get_queryset(self, request: HttpRequest, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        """Return the rows of the list without the fields of ``deferred_in_lists``."""
        deferred: tuple[str, ...] = getattr(self.model_admin, "deferred_in_lists", ())
        return super().get_queryset(request, *args, **kwargs).defer(*deferred)


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Shows rows and changes none, in a number of queries that does not grow with the rows."""

    #: Fields that may be long.
    deferred_in_lists: ClassVar[tuple[str, ...]] = ()
    #: The field that the search box looks for, by its exact value.
    searched_id: ClassVar[str] = "pk"

    actions = None
    list_per_page = 50
    list_max_show_all = 50
    list_select_related = ()
    show_full_result_count = False
    search_help_text = _("An execution's id, in full")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody adds rows here."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nobody changes rows here."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nobody deletes rows here: ``manage.py conductor prune`` deletes whole trees."""
        return False

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the kind of list."""
        return DeferringChangeList

    def link(self, execution_id: uuid.UUID | None) -> str | None:
        """Return an execution's id as a link to its page, if this site has one."""
        if execution_id is None:
            return None
        try:
            url = reverse("admin:conductor_app_execution_change", args=[execution_id], current_app=self.admin_site.name)
        except NoReverseMatch:
            return str(execution_id)
        return format_html('<a href="{}">{}</a>', url, execution_id)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find by an exact id, which every index serves; anything else finds nothing."""
        term = search_term.strip()
        if not term:
            return queryset, False
        try:
            return queryset.filter(**{self.searched_id: uuid.UUID(term)}), False
        except ValueError:
            return queryset.none(), False


@admin.register(Execution)
class ExecutionAdmin(ReadOnlyAdmin):
    """Executions, newest first."""

    list_display = ("id", "task_name", "status", "attempts", "queue", "parent_link", "created_at", "finished_at")
    list_filter = ("status", ("parent", admin.EmptyFieldListFilter), "created_at")
    # Ids sort by time, so the primary key's index is enough.
    ordering = ("-id",)
    search_fields = ("id",)
    deferred_in_lists = ("payload", "result", "error", "options", "cancel_reason")
    fields = readonly_fields = (
        "id",
        "task",
        "status",
        "attempt",
        "max_attempts",
        "queue",
        "priority",
        "parent_link",
        "root_link",
        "step",
        "depth",
        "payload",
        "result",
        "error",
        "lease_owner",
        "lease_expires_at",
        "due_at",
        "deadline_at",
        "cancel_requested_at",
        "cancel_reason",
        "idempotency_key",
        "created_at",
        "started_at",
        "finished_at",
    )

    @admin.display(description=_("task"), ordering="task")
    def task_name(self, execution: Execution) -> str:
        """Return the last part of the task's name, and the whole of it to whoever points at it."""
        return format_html('<span title="{}">{}</span>', execution.task, short_name(execution.task))

    @admin.display(description=_("attempt"))
    def attempts(self, execution: Execution) -> str:
        """Return the attempt and how many there may be."""
        return attempts(execution)

    @admin.display(description=_("parent"), empty_value="-")
    def parent_link(self, execution: Execution) -> str | None:
        """Return a link to the parent."""
        return self.link(execution.parent_id)

    @admin.display(description=_("root"))
    def root_link(self, execution: Execution) -> str | None:
        """Return a link to the root."""
        return self.link(execution.root_id)


@admin.register(Step)
class StepAdmin(ReadOnlyAdmin):
    """What executions remember, the latest first."""

    list_display = ("id", "execution_link", "name", "kind", "status", "child_link", "attempt", "created_at")
    list_filter = ("kind", "status")
    ordering = ("-id",)
    search_fields = ("execution_id",)
    searched_id = "execution_id"
    deferred_in_lists = ("result", "error")
    fields = readonly_fields = (
        "id",
        "execution_link",
        "name",
        "kind",
        "status",
        "task",
        "child_link",
        "result",
        "error",
        "timeout_seconds",
        "on_timeout",
        "deadline_at",
        "attempt",
        "created_at",
        "finished_at",
    )

    @admin.display(description=_("execution"))
    def execution_link(self, step: Step) -> str | None:
        """Return a link to the execution that remembers the step."""
        return self.link(step.execution_id)

    @admin.display(description=_("child"), empty_value="-")
    def child_link(self, step: Step) -> str | None:
        """Return a link to the child that the step stands for."""
        return self.link(step.child_id)


@admin.register(FailedExecution)
class FailedExecutionAdmin(ReadOnlyAdmin):
    """Executions that failed for good, the latest first."""

    list_display = ("failed_at", "execution_link", "task", "step", "error_class", "summary", "root_cause_link")
    list_display_links = ("failed_at",)
    list_filter = ("failed_at", ("root_cause", admin.EmptyFieldListFilter))
    ordering = ("-failed_at",)
    search_fields = ("execution_id",)
    searched_id = "execution_id"
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
        """Return the rows with the beginning of each message."""
        rows: QuerySet[Any] = super().get_queryset(request)
        beginnings: QuerySet[Any] = rows.annotate(beginning=Substr(F("message"), 1, MESSAGE_LENGTH + 1))
        return beginnings

    @admin.display(description=_("message"))
    def summary(self, failure: FailedExecution) -> str:
        """Return the first line of the message."""
        beginning: str = failure.beginning  # type: ignore[attr-defined]  # annotated in get_queryset
        return first_line(beginning, MESSAGE_LENGTH)

    @admin.display(description=_("execution"))
    def execution_link(self, failure: FailedExecution) -> str | None:
        """Return a link to the execution that failed."""
        return self.link(failure.execution_id)

    @admin.display(description=_("root cause"), empty_value="-")
    def root_cause_link(self, failure: FailedExecution) -> str | None:
        """Return a link to the deepest descendant whose failure is behind this one."""
        return self.link(failure.root_cause_id)
