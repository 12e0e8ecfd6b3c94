"""Paused tasks in the admin: to add one pauses a task, and to delete one unpauses it."""

from __future__ import annotations

from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from conductor_app import api
from conductor_app.admin import access, names
from conductor_app.admin.text import ago, shown, task_name
from conductor_app.models import Execution, PausedTask, database
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.store import clock


class PauseForm(forms.ModelForm):  # type: ignore[type-arg]
    """Which task, and why."""

    class Meta:
        model = PausedTask
        fields = ("name", "reason")
        widgets: ClassVar[dict[str, Any]] = {
            "name": forms.TextInput(attrs={"class": "vTextField", "autocomplete": "off"}),
            "reason": forms.TextInput(attrs={"class": "vTextField"}),
        }
        help_texts: ClassVar[dict[str, Any]] = {
            "name": _("Its full name, such as shop.tasks.charge."),
            "reason": _("Shown with your name wherever its executions are, as long as it is paused."),
        }

    def clean_name(self) -> str:
        """Refuse what names no task."""
        name = str(self.cleaned_data["name"])
        is_known = name in names.known_tasks() or Execution.objects.using(database()).filter(task=name).exists()
        if not is_known:
            raise forms.ValidationError(_("No task of this name is registered, and no execution of it is stored."))
        return name


@admin.register(PausedTask)
class PausedTaskAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Paused tasks, the latest first; nothing is edited."""

    form = PauseForm
    list_display = ("task", "paused", "by", "why")
    ordering = ("-paused_at",)
    sortable_by = ()
    readonly_fields = ()

    # Permissions: whoever may hold executions may pause tasks, where executions are not narrowed.

    def _may(self, request: HttpRequest) -> bool:
        holds = request.user.has_perm(f"{Execution._meta.app_label}.hold_execution")
        return holds and access.executions(self, request) is None

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Tell whether somebody may see them."""
        return self._may(request) or (
            super().has_view_permission(request, obj) and access.executions(self, request) is None
        )

    def has_module_permission(self, request: HttpRequest) -> bool:
        """Tell whether the index names them."""
        return self.has_view_permission(request)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Tell whether somebody may pause a task."""
        return self._may(request)

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Nobody edits a pause."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Tell whether somebody may unpause a task."""
        return self._may(request)

    # Rows

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return them where the engine writes them."""
        rows: QuerySet[Any] = super().get_queryset(request).using(database()).annotate(read_at=clock.now())
        return rows

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Pause the task."""
        del form, change
        api.pause(obj.name, obj.reason, actor=request.user.get_username()[:ACTOR_LENGTH])

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        """Unpause the task; when the request's transaction is over, since claims look at the row."""
        name = str(obj.pk)
        transaction.on_commit(lambda: api.unpause(name), using=database())

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Unpause some tasks."""
        for obj in queryset:
            self.delete_model(request, obj)

    # Columns

    @admin.display(description=_("task"))
    def task(self, row: PausedTask) -> str:
        """Return the task."""
        return task_name(row.name)

    @admin.display(description=_("since"))
    def paused(self, row: Any) -> str | None:
        """Return how long ago it was paused."""
        return ago(row.paused_at, row.read_at)

    @admin.display(description=_("by"), empty_value="-")
    def by(self, row: PausedTask) -> str | None:
        """Return who has paused it."""
        return shown(row.paused_by) if row.paused_by else None

    @admin.display(description=_("reason"))
    def why(self, row: PausedTask) -> str:
        """Return why."""
        return shown(row.reason)
