"""Schedules in the admin: what starts by itself and when, and who has paused it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.urls import URLPattern, path
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from conductor_app import api
from conductor_app.admin import refresh
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.operations import ReasonForm
from conductor_app.admin.text import ago, or_dash, shown, task_name
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Schedule, database
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.states import OperationSource
from conductor_app.store import clock
from conductor_app.telling import schedules
from conductor_app.transitions.operating import By, acting_for

PERMISSION = "conductor_app.pause_schedule"


@admin.register(Schedule)
class ScheduleAdmin(ReadOnlyAdmin):
    """The schedules of all tasks, by name."""

    list_display = ("name_text", "task_text", "line_text", "coming", "state_text", "last_tick", "execution_link")
    list_display_links = ("name_text",)
    ordering = ("name",)
    search_fields = ("name",)
    search_help_text = _("A schedule's name, or a task's, in full")
    written_column = "declared_at"
    references = ("last_execution_id",)
    change_form_template = "admin/conductor_app/schedule/change_form.html"
    fields = readonly_fields = (
        "task_text",
        "line_text",
        "overlap",
        "catch_up",
        "next_at",
        "last_tick_at",
        "execution_link",
        "note_text",
        "paused_at",
        "actor_text",
        "reason_text",
        "absent_at",
        "seen_at",
    )

    # --------------------------------------------------------------------------------------------------------- rows

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the schedules: they are of the code, and nobody's executions."""
        rows: QuerySet[Any] = admin.ModelAdmin.get_queryset(self, request).using(database())
        return rows

    def searched(self, term: str) -> Q | None:
        """Find by name."""
        term = term.strip()
        return Q(name=term) | Q(task=term) if term else None

    # ------------------------------------------------------------------------------------------------------ columns

    @admin.display(description=_("name"))
    def name_text(self, row: Schedule) -> SafeString:
        """Return its name."""
        return shown(row.name)

    @admin.display(description=_("task"))
    def task_text(self, row: Schedule) -> SafeString:
        """Return the task that it starts."""
        return task_name(row.task)

    @admin.display(description=_("line"))
    def line_text(self, row: Schedule) -> SafeString:
        """Return when, as the code says it."""
        return shown(f"{row.line} ({row.zone})")

    @admin.display(description=_("next"), empty_value="-")
    def coming(self, row: Any) -> str | None:
        """Return its next instant."""
        return schedules.following(row, row.read_at) or None

    @admin.display(description=_("state"))
    def state_text(self, row: Any) -> SafeString:
        """Return how it stands."""
        return shown(schedules.sentence(row, row.read_at))

    @admin.display(description=_("last tick"), empty_value="-")
    def last_tick(self, row: Any) -> str | None:
        """Return how long ago the last instant was that was acted on."""
        return ago(row.last_tick_at, row.read_at)

    @admin.display(description=_("last execution"))
    @or_dash
    def execution_link(self, row: Schedule) -> str | None:
        """Return a link to what it has started last."""
        key = row.last_execution_id
        return self.link(key, text=f"{str(key)[:8]}…") if key else None

    @admin.display(description=_("note"))
    @or_dash
    def note_text(self, row: Schedule) -> SafeString | None:
        """Return what was left out, or waits, and why."""
        return shown(row.note) if row.note else None

    @admin.display(description=_("paused by"))
    @or_dash
    def actor_text(self, row: Schedule) -> SafeString | None:
        """Return who has paused it."""
        return shown(row.paused_by) if row.paused_by else None

    @admin.display(description=_("reason"))
    @or_dash
    def reason_text(self, row: Schedule) -> SafeString | None:
        """Return why."""
        return shown(row.pause_reason) if row.pause_reason else None

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return a schedule as plain data."""
        return schedules.document(row, getattr(row, "read_at", None) or clock.read(database()))

    # -------------------------------------------------------------------------------------------------------- pages

    def get_urls(self) -> list[URLPattern]:
        """Add the buttons."""
        info = f"{self.opts.app_label}_{self.opts.model_name}"
        view = self.admin_site.admin_view
        buttons = [
            path(f"<int:pk>/{name}/", view(act), name=f"{info}_{name}")
            for name, act in (("pause", self.pause_view), ("unpause", self.unpause_view), ("run", self.run_view))
        ]
        return [*buttons, *super().get_urls()]

    def may_act(self, request: HttpRequest) -> bool:
        """Tell whether somebody may pause, unpause and run schedules."""
        return self.has_view_permission(request) and request.user.has_perm(PERMISSION)

    def pause_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Pause a schedule (POST)."""

        def act(row: Schedule) -> tuple[str, bool]:
            is_new = api.pause_schedule(row.name)
            return (gettext("The schedule is paused."), True) if is_new else (gettext("It was paused already."), False)

        return self._act(request, pk, act)

    def unpause_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Let a schedule go on (POST)."""

        def act(row: Schedule) -> tuple[str, bool]:
            was_paused = api.unpause_schedule(row.name)
            return (gettext("The schedule goes on."), True) if was_paused else (gettext("It was not paused."), False)

        return self._act(request, pk, act)

    def run_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Start a schedule's task now (POST)."""

        def act(row: Schedule) -> tuple[str, bool]:
            started = api.run_schedule(row.name)
            if started is None:
                return gettext("The task is started when its last execution has ended."), True
            return gettext("Execution %(execution)s is started.") % {"execution": started.pk}, True

        return self._act(request, pk, act)

    def _act(self, request: HttpRequest, pk: int, act: Callable[[Schedule], tuple[str, bool]]) -> HttpResponse:
        row = self.get_object(request, str(pk))
        if row is None:
            raise Http404(gettext("There is no such schedule."))
        if not self.may_act(request):
            raise PermissionDenied
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        form = ReasonForm(request.POST)
        if form.is_valid():
            by = By(request.user.get_username()[:ACTOR_LENGTH], form.cleaned_data["reason"], OperationSource.ADMIN)
            try:
                with acting_for(by):
                    text, is_done = act(row)
            except (ActionRefused, Schedule.DoesNotExist) as error:
                text, is_done = str(error), False
        else:
            text, is_done = " ".join(map(str, form.errors["reason"])), False
        self.message_user(request, text, messages.SUCCESS if is_done else messages.WARNING)
        return HttpResponseRedirect(self.address("change", pk) or "..")

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Show how it stands, and the buttons."""
        row: Schedule | None = kwargs.get("obj")
        if row is not None:
            may_act = self.may_act(request)
            context |= {
                "title": row.name,
                "subtitle": None,
                "state": schedules.sentence(row, clock.read(database())),
                "refresh": refresh.links(request),
                "form": ReasonForm() if may_act else None,
                "pause_url": self.address("pause", row.pk) if may_act and row.paused_at is None else None,
                "unpause_url": self.address("unpause", row.pk) if may_act and row.paused_at is not None else None,
                "run_url": self.address("run", row.pk) if may_act else None,
            }
        response = super().render_change_form(request, context, *args, **kwargs)
        refresh.apply_refresh(request, response)
        return response
