"""An execution's page: what it is doing, in plain words first, then everything that is stored about it.

All texts that tasks and their callers have written pass through ``words.visible`` and the template's escaping.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.db.models import Model
from django.db.models.functions import Length, Substr
from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html, format_html_join
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from conductor_app.admin import attempts, links, pieces, refresh, timeline, tree, waterfall
from conductor_app.admin.access import VIEW_PAYLOAD, may_see_payloads
from conductor_app.admin.downloads import Downloads
from conductor_app.admin.rows import NEEDS_PERMISSION
from conductor_app.admin.tracebacks import Frame, frames
from conductor_app.models import Event, Execution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import owners
from conductor_app.telling import headlines, labels, waits, words
from conductor_app.telling.history import history, shortened
from conductor_app.telling.keys import shown_key
from conductor_app.telling.story import Story, tell
from conductor_app.telling.tree import Branch
from conductor_app.values.failures import load_failure

#: Characters of a payload or result on the page; the download has all of it.
LONG_PREVIEW = 65_536
MOST_EVENTS = 100
MOST_MOMENTS = 200

_ID = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


@dataclass(frozen=True)
class Value:
    """A payload or result as it is shown."""

    name: str
    text: str
    #: How many characters all of it has, if the text is only its beginning.
    cut_from: str
    url: str


class ExecutionPage(Downloads):
    """The change page of ``Execution``, which changes nothing."""

    change_form_template = "admin/conductor_app/execution/change_form.html"

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Execution | None:
        """Return the execution with its failure, and without its payload and result for those who may not see them."""
        rows = self.get_queryset(request).using(database()).select_related("failure")
        if not may_see_payloads(request):
            rows = rows.defer("payload", "result")
        try:
            found: Execution | None = rows.filter(pk=uuid.UUID(str(object_id))).first()
        except ValueError:
            return None
        return found

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Execution | None = None,
    ) -> HttpResponse:
        """Render the page."""
        if obj is not None:
            context.update(self.page_context(request, obj))
        response = super().render_change_form(request, context, add=add, change=change, form_url=form_url, obj=obj)
        refresh.apply_refresh(request, response)
        return response

    def page_context(self, request: HttpRequest, execution: Execution) -> dict[str, Any]:
        """Return what the template shows of an execution."""
        is_open = may_see_payloads(request)
        story = tell(
            execution,
            preview=pieces.PREVIEW if is_open else 0,
            seen=self.seen(request),
            with_messages=is_open,
        )
        drawn = timeline.timeline(story)
        now, asked = story.now, story.asked_for
        label = labels.label(execution, now, story.situation.pending)
        name = words.visible(words.short_name(execution.task))
        headline = headlines.headline(story.situation)
        is_running = execution.status == ExecutionStatus.RUNNING
        return {
            "title": _("Execution of %(task)s") % {"task": name},
            "subtitle": str(execution.pk),
            "story": story,
            "headline": {
                "mark": headline.mark,
                "text": self._with_links(headline.text),
                "hints": [pieces.with_command(hint) for hint in headline.hints],
            },
            "deed": _latest_deed(story),
            "pill": pieces.pill(label, execution.status),
            "facts": list(self._facts(request, story)),
            "refresh_links": refresh.links(request),
            "now": words.exact(now),
            "timeline_hidden": pieces.left_out(drawn.hidden),
            "timeline_svg": timeline.svg(drawn),
            "timeline_lanes": [
                {
                    "lane": lane,
                    "url": self._url("change", lane.execution.pk) if lane.execution and not lane.is_current else None,
                    "took": words.duration(lane.seconds) if lane.seconds > 0 else "",
                    "task": words.visible(lane.execution.task) if lane.execution else "",
                    "outcome": _outcome(lane),
                    "begin": words.exact(lane.begin),
                    "totals": times,
                }
                for lane, *times in timeline.totals(drawn)
            ],
            "name": name,
            **waterfall.context(request, story, lambda key: self._url("change", key)),
            "tree": [self._tree_item(item, story) for item in tree.items(story.branches())],
            "tree_hidden": pieces.left_out(story.node_count - len(story.tree)),
            "tree_url": self._list_url(root__id__exact=execution.root_id),
            "children_url": self._list_url(parent__id__exact=execution.pk),
            "steps_url": self._list_url("step", q=execution.pk),
            "compare_url": self._url("compare", execution.pk),
            "log_url": self._url("history", execution.pk),
            "events_url": self._list_url("event", q=execution.pk),
            "is_orphan": execution.parent_id is not None and execution.parent_id not in story.tree,
            "waiting": [self._awaited(step, story) for step in waits.awaited(story.situation)],
            **self._error(story),
            "attempts": [
                attempts.shown(row, [deed.text(execution) for deed in asked.get(row.run, ())], is_open=is_open)
                for row in reversed(story.attempts)
            ],
            "attempts_hidden": pieces.left_out(story.execution.fence - len(story.attempts) - is_running),
            "steps": [self._step(step, story, number, is_open) for number, step in enumerate(story.steps, 1)],
            "steps_hidden": pieces.left_out(story.step_count - len(story.steps)),
            "events": self._events(execution, is_open),
            "most_events": MOST_EVENTS,
            "may_view_payload": is_open,
            "needs_permission": NEEDS_PERMISSION % {"permission": VIEW_PAYLOAD},
            "values": list(self._values(execution)) if is_open else [],
            "history": [
                {
                    "after": pieces.elapsed((moment.at - execution.created_at).total_seconds()),
                    "at": words.exact(moment.at),
                    "iso": moment.at.isoformat(),
                    "text": words.visible(moment.text),
                    "is_future": moment.at > now,
                }
                for moment in shortened(history(story), MOST_MOMENTS)
            ],
        }

    # ------------------------------------------------------------------------------------------------------- sections

    def _facts(self, request: HttpRequest, story: Story) -> Iterator[tuple[str, Any]]:
        execution, now = story.execution, story.now
        yield _("id"), format_html('<code class="cd-page__id">{}</code>', execution.pk)
        yield _("task"), pieces.isolated(execution.task)
        attempt = labels.attempts(execution)
        runs = _("%(attempt)s, in %(runs)d runs") if execution.fence != 1 else _("%(attempt)s, in 1 run")
        yield _("attempt"), runs % {"attempt": attempt, "runs": execution.fence}
        yield _("queue"), pieces.isolated(execution.queue)
        if execution.priority is not None:
            yield _("priority"), execution.priority
        if execution.lease_owner:
            yield _("worker"), pieces.isolated(owners.shown(execution.lease_owner))
        if execution.parent_id is not None:
            step = _('step "%(name)s"') % {"name": execution.step}
            yield _("parent"), format_html("{} · {}", self._linked(execution.parent_id), pieces.isolated(step))
            yield _("root"), self._linked(execution.root_id)
        if execution.idempotency_key:
            yield _("idempotency key"), pieces.isolated(execution.idempotency_key)
        if (key := shown_key(execution)) is not None:
            yield _("unique key"), self._unique_key(key, story)
        if story.tags:
            tags = ((self._list_url(tag=f"{key}={value}"), key, value) for key, value in story.tags.items())
            yield _("tags"), format_html_join(" ", "{}", ((_chip(*tag),) for tag in tags))
        if (progress := story.progress_of(execution)) is not None:
            yield _("progress"), pieces.bar(progress, with_note=may_see_payloads(request))
        if story.published and may_see_payloads(request):
            yield _("published"), pieces.isolated(pieces.preview(story.published, len(story.published)))
        if story.forks.forked_from is not None:
            yield _("forked from"), self._forked(story.forks.forked_from, story.forks.before)
        if story.forks.forks:
            shown_forks = ((self._forked(*fork),) for fork in story.forks.forks.items())
            yield _("forks"), format_html_join(SafeString("<br>"), "{}", shown_forks)
        for name, when in (
            (_("created"), execution.created_at),
            (_("started"), execution.started_at),
            (_("finished"), execution.finished_at),
            (_("due"), execution.told_due_at),
            (_("due at the earliest"), execution.due_then),
            (_("to be started before"), execution.deadline_at),
            (_("deadline of its tree"), story.situation.deadline),
            (_("lease expires"), execution.lease_expires_at),
            (_("cancel requested"), execution.cancel_requested_at),
        ):
            if when is not None:
                yield name, pieces.instant(when, now)
        if execution.cancel_reason:
            yield _("cancel reason"), pieces.isolated(execution.cancel_reason)
        if elsewhere := list(links.links(execution, now)):
            shown = ((url, words.visible(label)) for label, url in elsewhere)
            yield _("links"), format_html_join(" · ", '<a href="{}" rel="noreferrer">{}</a>', shown)
        if url := self._celery_result_url(request, execution):
            yield _("Celery result"), format_html('<a href="{}">{}</a>', url, _("in django-celery-results"))

    def _forked(self, key: uuid.UUID, before: str) -> SafeString:
        """Return a link to the other one of a source and a fork, with the step before which that was made."""
        step = _('before step "%(name)s"') % {"name": before}
        return format_html("{} · {}", self._linked(key), pieces.isolated(step))

    def _unique_key(self, key: str, story: Story) -> Any:
        execution, holder = story.execution, story.key_holder
        shown = pieces.isolated(key)
        if holder == execution.pk and execution.predecessor is not None:
            text = _("{key} · waits for the end of {execution}")
            return format_html(text, key=shown, execution=self._linked(execution.predecessor))
        if holder is None or holder == execution.pk:
            return shown
        return format_html(_("{key} · by now of {execution}"), key=shown, execution=self._linked(holder))

    def _tree_item(self, item: tree.Item, story: Story) -> dict[str, Any]:
        shown: dict[str, Any] = {"tag": item.tag, "is_open": item.is_open}
        if item.tag in ("leaf", "branch", "fold"):
            shown |= self._node(item.branch, story)
        elif item.tag == "more":
            key = item.branch.execution.pk
            shown |= {"hidden": pieces.left_out(item.branch.hidden), "url": self._list_url(parent__id__exact=key)}
        return shown

    def _node(self, branch: Branch, story: Story) -> dict[str, Any]:
        row = branch.execution
        label = labels.label(row, story.now, story.situation.pending if branch.is_current else ())
        place = "" if row.position is None else f"[{row.position}]"
        error = ""
        if row.error and row.status != ExecutionStatus.SUCCEEDED:
            error = pieces.in_short(row.error, 120)
        return {
            "url": None if branch.is_current else self._url("change", row.pk),
            "name": words.visible(words.short_name(row.task)),
            "task": words.visible(row.task),
            "step": words.visible(f"{row.step}{place}") if row.step else "",
            "pill": pieces.pill(label, row.status),
            "attempt": labels.attempts(row) if row.attempt > 1 else "",
            "took": words.duration((row.finished_at - row.created_at).total_seconds()) if row.finished_at else "",
            "error": error,
            "bar": self._bar(row, story),
            "is_current": branch.is_current,
        }

    def _bar(self, row: Execution, story: Story) -> SafeString:
        """Return how far an execution of the tree is, while it is open."""
        progress = None if row.is_final else story.progress_of(row)
        return SafeString("") if progress is None else pieces.bar(progress, with_note=False)

    def _awaited(self, awaited: waits.Awaited, story: Story) -> dict[str, Any]:
        step, child, now = awaited.step, awaited.child, story.now
        shown: dict[str, Any] = {
            "step": words.visible(step.name),
            "kind": step.get_kind_display(),
            "what": words.visible(awaited.what),
            "since": pieces.instant(step.created_at, now),
            "until": None if step.deadline_at is None else pieces.instant(step.deadline_at, now),
            "then": [pieces.with_command(sentence) for sentence in awaited.then],
        }
        if child is not None:
            shown["child"] = self._linked(child.pk)
            shown["pill"] = pieces.pill(labels.label(child, now), child.status)
        elif step.child_id is not None:
            shown["gone"] = step.child_id
        return shown

    def _error(self, story: Story) -> dict[str, Any]:
        execution = story.execution
        if not execution.error or execution.status == ExecutionStatus.SUCCEEDED:
            return {"error": None}
        failure = load_failure(execution.error)
        causes = [
            {
                "name": words.visible(words.short_name(cause.task)),
                "link": self._linked(cause.execution_id) if number else None,
                "step": words.visible(cause.step),
                "error_class": words.visible(cause.error_class),
                "message": words.visible(words.first_line(cause.message, pieces.PREVIEW)),
                "attempts": cause.attempts,
            }
            for number, cause in enumerate(story.causes)
        ]
        traced = [cause for cause in story.causes if cause.traceback.strip()]
        return {
            "error": {
                "error_class": words.visible(failure.type),
                "message": words.visible(failure.message),
                "is_last": execution.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED),
            },
            "causes": causes if len(causes) > 1 else [],
            "tracebacks": [
                {
                    "name": words.visible(words.short_name(cause.task)),
                    "frames": [Frame(words.visible(frame.text), frame.is_own) for frame in frames(cause.traceback)],
                }
                # That of the root cause first: it says where the trouble is.
                for cause in reversed(traced)
            ],
        }

    def _step(self, step: Step, story: Story, number: int, is_open: bool) -> dict[str, Any]:
        error = story.error_of(step)
        is_instant = step.finished_at is None or step.finished_at == step.created_at
        shown: dict[str, Any] = {
            "number": story.step_count - len(story.steps) + number,
            "key": step.name,
            "name": words.visible(step.name),
            "kind": step.get_kind_display(),
            "task": words.visible(step.task),
            "pill": pieces.step_pill(step),
            "attempt": _("copied") if step.is_copied else step.attempt,
            "took": "" if is_instant else words.duration((step.finished_at - step.created_at).total_seconds()),  # type: ignore[operator]
            "child": None if step.child_id is None else self._linked(step.child_id),
            "error": pieces.in_short(error, pieces.PREVIEW) if error else "",
            "preview": "",
            "note": "",
        }
        if step.total is not None:
            shown["note"] = _("%(done)d of %(total)d ended") % {
                "done": step.total - (step.remaining or 0),
                "total": step.total,
            }
        if step.status == StepStatus.SUCCEEDED and is_open:
            shown["preview"] = pieces.preview(step.value, step.value_length)  # type: ignore[attr-defined]  # annotated
        return shown

    def _events(self, execution: Execution, is_open: bool) -> list[dict[str, Any]]:
        rows = Event.objects.using(database()).filter(execution_id=execution.pk).select_related("step")
        rows = rows.defer("payload", "step__result", "step__error")
        beginnings = rows.annotate(value=Substr("payload", 1, pieces.PREVIEW + 1), value_length=Length("payload"))
        return [
            {
                "name": words.visible(event.name),
                "key": words.visible(event.key),
                "sent": words.exact(event.created_at),
                "taken": words.exact(event.taken_at) if event.taken_at else None,
                "step": words.visible(event.step.name) if event.step is not None else "",
                "preview": pieces.preview(event.value, event.value_length) if is_open else "",
            }
            for event in reversed(beginnings.order_by("-id")[:MOST_EVENTS])
        ]

    def _values(self, execution: Execution) -> Iterator[Value]:
        for name, title, text in (
            ("payload", _("Payload"), execution.payload),
            ("result", _("Result"), execution.result),
        ):
            if text is None:
                continue
            shown = words.visible(pieces.pretty(name, text))
            cut_from = pieces.left_out(len(shown)) if len(shown) > LONG_PREVIEW else ""
            yield Value(title, shown[:LONG_PREVIEW], cut_from, self._url(name, execution.pk) or "")

    # ---------------------------------------------------------------------------------------------------------- links

    def _url(self, view: str, key: Any, model: str = "execution") -> str | None:
        try:
            return reverse(f"admin:conductor_app_{model}_{view}", args=[key], current_app=self.admin_site.name)
        except NoReverseMatch:
            return None

    def _linked(self, key: Any) -> SafeString:
        return SafeString(self.link(key) or "")

    def _with_links(self, text: str) -> SafeString:
        """Return a sentence in which the ids of executions lead to their pages."""
        parts = _ID.split(words.visible(text))
        return format_html_join("", "{}", ((self._linked(part) if _ID.fullmatch(part) else part,) for part in parts))

    def _list_url(self, model: str = "execution", **query: Any) -> str | None:
        try:
            url = reverse(f"admin:conductor_app_{model}_changelist", current_app=self.admin_site.name)
        except NoReverseMatch:
            return None
        return f"{url}?{urlencode(query)}"

    def _celery_result_url(self, request: HttpRequest, execution: Execution) -> str | None:
        """Return the page of the task's row in django-celery-results, if there is one that the user may see."""
        if not apps.is_installed("django_celery_results"):
            return None
        model: type[Model] = apps.get_model("django_celery_results", "TaskResult")
        if not self.admin_site.is_registered(model):
            return None
        if not self.admin_site.get_model_admin(model).has_view_permission(request):
            return None
        rows = model._default_manager.filter(task_id=str(execution.pk))
        key = rows.values_list("pk", flat=True).first()
        try:
            name = "admin:django_celery_results_taskresult_change"
            return None if key is None else reverse(name, args=[key], current_app=self.admin_site.name)
        except NoReverseMatch:
            return None


def _latest_deed(story: Story) -> SafeString | None:
    """Return what somebody has last done to it, and when."""
    if not story.deeds:
        return None
    deed = max(story.deeds, key=lambda deed: deed.at)
    text = words.first_line(deed.text(story.execution), pieces.PREVIEW)
    return format_html("{} · {}", pieces.isolated(text), pieces.instant(deed.at, story.now))


def _outcome(lane: timeline.Lane) -> str:
    """Return in a word how the execution or the step of a lane has ended."""
    if not lane.outcome:
        return _("under way")
    row = Step(status=lane.outcome) if lane.execution is None else Execution(status=lane.outcome)
    return row.get_status_display()


def _chip(url: str | None, key: str, value: str) -> SafeString:
    """Return a tag as a link to the list of what has it, if this site has one."""
    text = pieces.isolated(f"{key}={value}")
    if url is None:
        return format_html('<span class="cd-tag">{}</span>', text)
    return format_html('<a class="cd-tag" href="{}">{}</a>', url, text)
