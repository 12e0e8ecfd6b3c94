"""What an operator does to executions in the admin: one at a time from its page, or many from a list.

Nothing is edited: each action asks ``api``, whose transitions are compare-and-sets, so that a row that has changed
since the operator looked is skipped and counted. A ``GET`` shows what would happen, a ``POST`` does it.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import helpers
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import IS_POPUP_VAR, IncorrectLookupParameters
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.db import transaction
from django.db.models import BooleanField, Case, F, QuerySet, Value, When
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect, QueryDict
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.decorators import method_decorator
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.utils.translation import gettext, override
from django.views.decorators.cache import never_cache

from conductor_app.admin import access, forking, selection
from conductor_app.admin.operations import (
    ACTIONS,
    CANCEL,
    FORK,
    RERUN,
    RETRY,
    SEND,
    Action,
    ForkForm,
    Outcomes,
    Unchanged,
)
from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, FailedExecution, database
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.states import OPEN_STATUSES, ItemState, OperationKind, OperationSource
from conductor_app.telling.possible import RETRIED_STATUSES
from conductor_app.telling.words import short_name, visible
from conductor_app.transitions import operating
from conductor_app.transitions.waits.event import awaited_names


@dataclass(frozen=True)
class Button:
    """An action that an execution's page offers."""

    name: str
    label: str
    url: str
    is_destructive: bool = False


# --------------------------------------------------------------------------------------------------------- the mixins


class Acting(admin.ModelAdmin):  # type: ignore[type-arg]
    """Actions on executions, for a list whose rows' primary keys are executions' ids."""

    #: Names of the actions that the list offers.
    acts: ClassVar[tuple[str, ...]] = ()

    action_confirmation_template = "admin/conductor_app/execution/action_confirmation.html"

    # Permissions

    def may(self, request: HttpRequest, action: Action) -> bool:
        """Tell whether somebody may see these rows, and do this to executions."""
        permission = f"{Execution._meta.app_label}.{action.permission}"
        return self.has_view_permission(request) and request.user.has_perm(permission)

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """Return what may be done to selected rows; Django's own actions would change or delete them.

        Django 6.1 also asks for a row's own page, which has its buttons.
        """
        if IS_POPUP_VAR in request.GET or getattr(action_location, "value", "CHANGE_LIST") != "CHANGE_LIST":
            return {}
        return {
            f"{name}_selected": (_confirm_selected(ACTIONS[name]), f"{name}_selected", ACTIONS[name].label)
            for name in self.acts
            if self.may(request, ACTIONS[name])
        }

    # Rows

    @admin.display(description=format_html('<input type="checkbox" id="{}">', "action-toggle"))
    def action_checkbox(self, row: Execution | FailedExecution) -> SafeString:
        """Return a row's checkbox, named without what lists leave in the database, and without invisible characters."""
        name = gettext("Select %(task)s %(id)s") % {"task": visible(short_name(row.task)), "id": row.pk}
        checkbox = forms.CheckboxInput({"class": "action-select", "aria-label": name}, lambda value: False)
        return checkbox.render(helpers.ACTION_CHECKBOX_NAME, str(row.pk))

    # URLs

    def get_urls(self) -> list[URLPattern]:
        """Add the pages that ask and act."""
        info = (self.opts.app_label, self.opts.model_name)
        # Each row is a transaction of its own: a thousand are not to be one, whatever ATOMIC_REQUESTS says.
        view = transaction.non_atomic_requests(using=database())(_view_of(self))
        wrapped = self.admin_site.admin_view(view)
        return [
            path("act/<slug:name>/", wrapped, name="{}_{}_act_selected".format(*info)),
            path("<uuid:pk>/act/<slug:name>/", wrapped, name="{}_{}_act".format(*info)),
            *super().get_urls(),
        ]

    def _address_of(self, name: str, *args: Any) -> str:
        prefix = f"admin:{self.opts.app_label}_{self.opts.model_name}"
        return reverse(f"{prefix}_{name}", args=args, current_app=self.admin_site.name)

    # Pages

    @method_decorator(never_cache)
    def act_view(self, request: HttpRequest, name: str, pk: uuid.UUID | None = None) -> HttpResponse:
        """Ask about an action on one execution (GET), or do it to one or to those that were selected (POST)."""
        action = ACTIONS.get(name)
        if action is None:
            raise Http404(gettext("There is no such action."))
        if not self.may(request, action):
            raise PermissionDenied
        if action.is_for_one and pk is None:
            raise Http404(gettext("This is done to one execution at a time."))
        if request.method == "POST" and pk is None and request.POST.get("ids") == selection.ALL:
            return self._begin(request, action)
        if request.method == "POST":
            ids = [pk] if pk is not None else selection.parse_ids(request.POST.get("ids", ""))
        elif request.method in ("GET", "HEAD") and pk is not None:
            ids = [pk]
        else:
            return HttpResponseNotAllowed(["POST"] if pk is None else ["GET", "POST"])
        ids = self._visible(request, ids)
        if pk is not None and not ids:
            raise Http404(gettext("There is no such execution. It may have been pruned."))
        data = request.POST if request.method == "POST" else None
        form = self._form(action, ids, data, before=request.GET.get("before", ""))
        if not form.is_bound or not form.is_valid():
            return self._ask(request, action, ids, form, is_single=pk is not None)
        outcomes = self._act(request, action, ids, form.cleaned_data)
        if pk is None:
            self.message_user(request, outcomes.sentence(action), outcomes.level)
            return HttpResponseRedirect(self._list_again(request.POST.get("list", "")))
        return self._tell(request, action, pk, outcomes, form.cleaned_data)

    def ask_about_selected(self, request: HttpRequest, action: Action, rows: QuerySet[Any]) -> HttpResponse:
        """Return the page that asks about rows that were selected in the list."""
        if action.in_background and request.POST.get("select_across") == "1":
            total = rows.order_by()[: selection.MOST + 1].values("pk").count()
            if total > selection.AT_ONCE:
                fitting = selection.fitting(action.fits(), rows)[: selection.MOST + 1].count()
                return self._ask_about_all(request, action, action.form(), total, fitting)
        # One more than are taken tells that there are more; their number may be in the millions.
        ids = list(rows.values_list("pk", flat=True)[: selection.BULK_LIMIT + 1])
        is_cut = len(ids) > selection.BULK_LIMIT
        ids = ids[: selection.BULK_LIMIT]
        return self._ask(request, action, ids, self._form(action, ids, None), is_cut=is_cut)

    def _ask_about_all(
        self, request: HttpRequest, action: Action, form: forms.Form, total: int, fitting: int
    ) -> HttpResponse:
        """Return the page that asks about more than a request can act on."""
        most = selection.MOST
        query = request.POST.get("list") or request.GET.urlencode()
        context = {
            **self.admin_site.each_context(request),
            "title": gettext("%(action)s?") % {"action": capfirst(str(action.label))},
            "opts": self.opts,
            "media": self.media,
            "action": action,
            "total": min(total, most),
            "fitting": min(fitting, most),
            "skipped": max(min(total, most) - fitting, 0),
            "is_all": True,
            "is_cut": total > most,
            "limit": most,
            "form": form,
            "ids": selection.ALL,
            "list": query,
            "act_url": self._address_of("act_selected", action.name),
            "back_url": self._list_again(query),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, self.action_confirmation_template, context)

    def _begin(self, request: HttpRequest, action: Action) -> HttpResponse:
        """Store an operation on all that the list's address matches now; sweepers work it off."""
        query = request.POST.get("list", "")
        form = action.form(request.POST)
        if not action.in_background:
            raise Http404(gettext("This is not done to all that match."))
        try:
            found, words = self._matching(request, query)
        except (IncorrectLookupParameters, SuspiciousOperation):
            self.message_user(request, gettext("The list's address has no meaning. Nothing was done."), messages.ERROR)
            return HttpResponseRedirect(self._list_again(""))
        if not form.is_valid():
            fitting = selection.fitting(action.fits(), found)[: selection.MOST + 1].count()
            return self._ask_about_all(request, action, form, found.order_by()[: selection.MOST + 1].count(), fitting)
        operation = operating.start(
            OperationKind(action.name),
            selection.fitting(action.fits(), found),
            self._by(request, form.cleaned_data),
            filters=words,
        )
        text = gettext("%(operation)s has begun, on %(number)s executions. Workers do it; this page shows how far.") % {
            "operation": capfirst(f"{operation.get_kind_display()} {operation.pk}"),
            "number": f"{operation.total:,}",
        }
        self.message_user(request, text, messages.SUCCESS)
        page = selection.page_of(operation, self.admin_site.name)
        may_see = request.user.has_perm(f"{self.opts.app_label}.view_operation")
        return HttpResponseRedirect(page if page and may_see else self._list_again(query))

    def _matching(self, request: HttpRequest, query: str) -> tuple[QuerySet[Any], str]:
        """Return the rows of the list with this address, and its filters in words."""
        asked = copy.copy(request)
        asked.method = "GET"
        asked.GET = QueryDict(query)
        with override(None):  # they are stored, and read by others, in their languages
            found: Any = self.get_changelist_instance(asked)
            return found.queryset, selection.in_words(found, asked.GET)

    def _by(self, request: HttpRequest, data: dict[str, Any], *, is_together: bool = False) -> operating.By:
        name = request.user.get_username()[:ACTOR_LENGTH]
        return operating.By(name, data.get("reason") or "", OperationSource.ADMIN, is_together=is_together)

    def _ask(
        self,
        request: HttpRequest,
        action: Action,
        ids: list[uuid.UUID],
        form: forms.Form,
        *,
        is_single: bool = False,
        is_cut: bool = False,
    ) -> HttpResponse:
        fitting = sum(selection.executions(chunk).filter(action.fits()).count() for chunk in selection.chunks(ids))
        only = selection.executions(ids).select_related("parent").first() if len(ids) == 1 else None
        seen = access.executions(self, request)
        access.conceal(seen, [] if only is None else [only], ["parent_id", "root_id"])
        context = {
            **self.admin_site.each_context(request),
            "title": gettext("%(action)s?") % {"action": capfirst(str(action.label))},
            "opts": self.opts,
            "media": self.media,
            "action": action,
            "execution": only,
            "task": short_name(only.task) if only else "",
            "total": len(ids),
            "fitting": fitting,
            "skipped": len(ids) - fitting,
            "is_cut": is_cut,
            "limit": selection.BULK_LIMIT,
            "form": form,
            "ids": "" if is_single else ",".join(map(str, ids)),
            "list": request.POST.get("list") or request.GET.urlencode(),
            "act_url": self._address_of("act", ids[0], action.name)
            if is_single
            else self._address_of("act_selected", action.name),
            "back_url": self._page_of(ids[0]) if is_single else self._list_again(request.GET.urlencode()),
            **(selection.family(ids, only) if action is CANCEL else {}),
            **(forking.choice(only, str(form["before"].value() or "")) if action is FORK and only is not None else {}),
        }
        if action is RETRY and only is not None and only.parent_id is not None and only.root_id is not None:
            context["root_url"] = self._page_of(only.root_id)
        request.current_app = self.admin_site.name
        return TemplateResponse(request, self.action_confirmation_template, context)

    def _form(self, action: Action, ids: list[uuid.UUID], data: Any, *, before: str = "") -> forms.Form:
        if data is not None or action not in (SEND, RERUN, FORK):
            form = action.form(data)
            if isinstance(form, ForkForm):
                form.execution = selection.executions(ids).first()
            return form
        key = f"admin-{uuid.uuid4().hex}"
        if action is RERUN:
            return action.form(initial={"key": key})
        if action is FORK:
            return action.form(initial={"key": key, "before": before})
        names = set(awaited_names(ids[: selection.CHUNK]))
        event = names.pop() if len(names) == 1 else ""
        return action.form(initial={"event": event, "key": key})

    def _page_of(self, pk: uuid.UUID) -> str:
        return reverse("admin:conductor_app_execution_change", args=[pk], current_app=self.admin_site.name)

    def _list_again(self, query: str) -> str:
        url = self._address_of("changelist")
        return f"{url}?{query}" if query else url

    # Acting

    def _visible(self, request: HttpRequest, ids: Iterable[uuid.UUID]) -> list[uuid.UUID]:
        """Return those of ``ids`` that this list shows to this person, roots before their descendants."""
        found: list[tuple[int, uuid.UUID]] = []
        depth = "depth" if self.model is Execution else "execution__depth"
        for chunk in selection.chunks(list(ids)):
            rows = self.get_queryset(request).filter(pk__in=chunk).order_by()
            found += rows.values_list(depth, "pk")
        return [pk for _depth, pk in sorted(found, key=lambda row: row[0])]

    def _act(self, request: HttpRequest, action: Action, ids: list[uuid.UUID], data: dict[str, Any]) -> Outcomes:
        with operating.acting_for(self._by(request, data, is_together=len(ids) > 1)) as by:
            return self._act_as(by, request, action, ids, data)

    def _act_as(
        self, by: operating.By, request: HttpRequest, action: Action, ids: list[uuid.UUID], data: dict[str, Any]
    ) -> Outcomes:
        outcomes = Outcomes()
        kind = OperationKind(action.name)
        for chunk in selection.chunks(ids):
            rows = selection.executions(chunk).only("id", "task").in_bulk()
            for pk in chunk:
                try:
                    execution = rows[pk]
                    action.act(execution, data)
                except (KeyError, Execution.DoesNotExist):
                    outcomes.skipped[gettext("deleted meanwhile")] += 1
                    operating.note_refusal(kind, pk, by, ItemState.GONE, "")
                except Unchanged as found:
                    outcomes.skipped[str(found)] += 1
                    outcomes.why = gettext("Nothing was done: %(reason)s.") % {"reason": found}
                    with override(None):  # what is stored is read by others, in their languages
                        operating.note_refusal(kind, pk, by, ItemState.REFUSED, str(found))
                except ActionRefused as error:
                    (outcomes.skipped if error.is_elsewhere else outcomes.refused)[str(error.reason)] += 1
                    with override(None):
                        operating.note_refusal(kind, pk, by, ItemState.REFUSED, str(error.reason))
                    # In full it names the root, which a narrowed site may not show.
                    is_narrowed = access.executions(self, request) is not None
                    outcomes.why = f"{capfirst(error.reason)}." if is_narrowed else str(error)
                else:
                    outcomes.done.append(execution)
                    self._log(request, execution, action.audit(data))
        return outcomes

    def _log(self, request: HttpRequest, execution: Execution, message: str) -> None:
        """Note who did what to which execution, in Django's own log; the execution's history page shows it."""
        LogEntry.objects.log_actions(
            user_id=cast(int, request.user.pk),
            queryset=[execution],
            action_flag=CHANGE,
            change_message=message,
            single_object=True,
        )

    def _tell(
        self, request: HttpRequest, action: Action, pk: uuid.UUID, outcomes: Outcomes, data: dict[str, Any]
    ) -> HttpResponse:
        """Say what became of one execution, on its page, or on that of the one that was started."""
        if not outcomes.done:
            self.message_user(request, outcomes.why or outcomes.sentence(action), messages.ERROR)
            return HttpResponseRedirect(self._page_of(pk))
        if action in (RERUN, FORK):
            text = gettext("This is the new execution, started from %(old)s.") % {"old": pk}
            pk = data["created"].pk
        elif (
            action is CANCEL
            and Execution.objects.using(database()).filter(pk=pk, status__in=sorted(OPEN_STATUSES)).exists()
        ):
            text = gettext("The execution is to be cancelled: its body stops at its next ctx call.")
        else:
            text = str(action.told)
        self.message_user(request, text, messages.SUCCESS)
        return HttpResponseRedirect(self._page_of(pk))


class ExecutionActions(Acting):
    """Actions from the list of executions, and the buttons of an execution's page."""

    acts = tuple(name for name, action in ACTIONS.items() if not action.is_for_one)

    def conductor_actions(self, request: HttpRequest, execution: Execution) -> list[Button]:
        """Return what an execution's page offers to this person, in one query."""
        allowed = [action for action in ACTIONS.values() if self.may(request, action)]
        if not allowed:
            return []
        offers = {
            f"offers_{action.name}": Case(
                When((action.offered or action.fits)(), then=Value(True)),
                default=Value(False),
                output_field=BooleanField(),
            )
            for action in allowed
        }
        row = (
            Execution.objects.using(database())
            .filter(pk=execution.pk)
            .annotate(**offers, root_status=F("root__status"))
            .values("root_status", *offers)
            .first()
        )
        if row is None:
            return []
        buttons = [
            Button(
                action.name,
                str(action.label),
                self._address_of("act", execution.pk, action.name),
                action.is_destructive,
            )
            for action in allowed
            if row[f"offers_{action.name}"]
        ]
        is_behind = execution.parent_id is not None and row["root_status"] in RETRIED_STATUSES
        seen = access.executions(self, request) if is_behind else None
        is_behind = is_behind and (seen is None or bool(access.ids(seen, [execution.root_id])))
        if is_behind and RETRY in allowed and execution.status in RETRIED_STATUSES:
            url = self._address_of("act", execution.root_id, RETRY.name)
            buttons.insert(0, Button("retry-root", gettext("Retry the root"), url))
        return buttons

    def render_change_form(self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Give the page its buttons."""
        execution = kwargs.get("obj")
        if execution is not None:
            buttons = context["conductor_actions"] = self.conductor_actions(request, execution)
            context["fork_url"] = next((button.url for button in buttons if button.name == FORK.name), None)
        return super().render_change_form(request, context, *args, **kwargs)


class FailureActions(Acting):
    """Actions from the list of failed executions."""

    acts = (RETRY.name, RERUN.name)


def _view_of(model_admin: Acting) -> Callable[..., HttpResponse]:
    def act_view(request: HttpRequest, **kwargs: Any) -> HttpResponse:
        return model_admin.act_view(request, **kwargs)

    return act_view


def _confirm_selected(action: Action) -> Callable[[Acting, HttpRequest, QuerySet[Any]], HttpResponse]:
    def confirm(model_admin: Acting, request: HttpRequest, rows: QuerySet[Any]) -> HttpResponse:
        return model_admin.ask_about_selected(request, action, rows)

    return confirm
