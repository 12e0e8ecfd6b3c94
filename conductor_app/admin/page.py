"""An execution's page: what it is doing, in plain words first, then everything that is stored about it.

All texts that tasks and their callers have written pass through ``words.visible`` and the template's escaping.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.core.exceptions import PermissionDenied
from django.db.models import Model
from django.db.models.functions import Length, Substr
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.urls import NoReverseMatch, path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from conductor_app.admin import refresh, timeline, tree
from conductor_app.admin.access import VIEW_PAYLOAD, may_see_payloads
from conductor_app.admin.base import ReadOnlyAdmin
from conductor_app.admin.rows import NEEDS_PERMISSION
from conductor_app.models import Event, Execution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import owners
from conductor_app.telling import headlines, labels, waits, words
from conductor_app.telling.history import history, shortened
from conductor_app.telling.story import Story, tell
from conductor_app.telling.tree import Branch
from conductor_app.values.failures import load_failure
from conductor_app.values.redaction import decode, readable, redact

#: Characters of a payload or result on the page; the download has all of it.
LONG_PREVIEW = 65_536
#: Characters of a step's result and of an event's payload.
PREVIEW = 500
MOST_EVENTS = 100
MOST_MOMENTS = 200

_ID = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
#: Whatever language and punctuation stand before it.
_COMMAND = re.compile(r"(?:manage\.py conductor|celery -A) .*\Z", re.DOTALL)
_FRAME = re.compile(r'^\s*[|+ ]*File "(?P<file>[^"\n]*)", line \d+')
#: Where code lives that is not the project's own.
_FOREIGN = re.compile(
    r"[/\\](site-packages|dist-packages|lib[/\\]python3[^/\\]*|conductor_app)[/\\]|^<frozen ", re.IGNORECASE
)


@dataclass(frozen=True)
class Pill:
    """A status as a shape and a word, and the classes that colour them."""

    mark: str
    word: str
    classes: str


@dataclass(frozen=True)
class Value:
    """A payload or result as it is shown."""

    name: str
    text: str
    #: How many characters all of it has, if the text is only its beginning.
    cut_from: str
    url: str


@dataclass(frozen=True)
class Frame:
    """Some lines of a traceback: one frame, or what stands between frames."""

    text: str
    is_own: bool


def pill(label: labels.Label, status: str) -> Pill:
    """Return a status as the stylesheets know it: ``cd-pill--failed``, and ``cd-pill--held-back`` for a finer word."""
    classes = dict.fromkeys(f"cd-pill--{word}" for word in (status, re.sub(r"\W+", "-", label.word)))
    return Pill(label.mark, _(label.word), " ".join(["cd-pill", *classes]))


def step_pill(step: Step) -> Pill:
    """Return a step's status."""
    status = StepStatus(step.status)
    word = step.get_status_display()
    return Pill(labels.STEP_MARKS[status], word, f"cd-pill cd-pill--{status.value.replace('_', '-')}")


def frames(traceback: str) -> list[Frame]:
    """Return a traceback in pieces, each with whether it is a frame of the project's own code."""
    found: list[Frame] = []
    lines: list[str] = []
    is_own = False

    def close() -> None:
        if lines:
            found.append(Frame("".join(lines), is_own))
            lines.clear()

    for line in traceback.splitlines(keepends=True):
        frame = _FRAME.match(line)
        # A frame is its line and the source below it, which stands further to the right.
        if frame is not None or not line.startswith("    "):
            close()
            is_own = frame is not None and _FOREIGN.search(frame["file"]) is None
        lines.append(line)
    close()
    return found


class ExecutionPage(ReadOnlyAdmin):
    """The change page of ``Execution``, which changes nothing."""

    change_form_template = "admin/conductor_app/execution/change_form.html"

    def get_urls(self) -> list[Any]:
        """Add the downloads."""
        view = self.admin_site.admin_view(self.download_view)
        downloads = [
            path(f"<uuid:object_id>/{name}.json", view, {"name": name}, name=f"conductor_app_execution_{name}")
            for name in ("payload", "result")
        ]
        return [*downloads, *super().get_urls()]

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
            preview=PREVIEW if is_open else 0,
            seen=self.seen(request),
            with_messages=is_open,
        )
        drawn = timeline.timeline(story)
        now = story.now
        label = labels.label(execution, now, story.situation.pending)
        name = words.visible(words.short_name(execution.task))
        headline = headlines.headline(story.situation)
        return {
            "title": _("Execution of %(task)s") % {"task": name},
            "subtitle": str(execution.pk),
            "story": story,
            "headline": {
                "mark": headline.mark,
                "text": self._with_links(headline.text),
                "hints": [_with_command(hint) for hint in headline.hints],
            },
            "pill": pill(label, execution.status),
            "facts": list(self._facts(request, story)),
            "refresh_links": refresh.links(request),
            "now": words.exact(now),
            "timeline_hidden": _more(drawn.hidden),
            "timeline_svg": timeline.svg(drawn),
            "timeline_lanes": [
                {
                    "lane": lane,
                    "url": self._url("change", lane.execution.pk) if lane.execution and not lane.is_current else None,
                    "took": words.duration(lane.seconds) if lane.seconds > 0 else "",
                    "task": words.visible(lane.execution.task) if lane.execution else "",
                    "outcome": lane.outcome.replace("_", " ") or _("under way"),
                    "begin": words.exact(lane.begin),
                    "totals": times,
                }
                for lane, *times in timeline.totals(drawn)
            ],
            "tree": [self._tree_item(item, story) for item in tree.items(story.branches())],
            "tree_hidden": _more(story.node_count - len(story.tree)),
            "tree_url": self._list_url(root__id__exact=execution.root_id),
            "children_url": self._list_url(parent__id__exact=execution.pk),
            "steps_url": self._list_url("step", q=execution.pk),
            "log_url": self._url("history", execution.pk),
            "events_url": self._list_url("event", q=execution.pk),
            "is_orphan": execution.parent_id is not None and execution.parent_id not in story.tree,
            "waiting": [self._awaited(step, story) for step in waits.awaited(story.situation)],
            **self._error(story),
            "steps": [self._step(step, story, number, is_open) for number, step in enumerate(story.steps, 1)],
            "steps_hidden": _more(story.step_count - len(story.steps)),
            "events": self._events(execution, is_open),
            "most_events": MOST_EVENTS,
            "may_view_payload": is_open,
            "needs_permission": NEEDS_PERMISSION % {"permission": VIEW_PAYLOAD},
            "values": list(self._values(execution)) if is_open else [],
            "history": [
                {
                    "after": _after((moment.at - execution.created_at).total_seconds()),
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
        yield _("task"), _text(execution.task)
        attempt = labels.attempts(execution)
        runs = _("%(attempt)s, in %(runs)d runs") if execution.fence != 1 else _("%(attempt)s, in 1 run")
        yield _("attempt"), runs % {"attempt": attempt, "runs": execution.fence}
        yield _("queue"), _text(execution.queue)
        if execution.priority is not None:
            yield _("priority"), execution.priority
        if execution.lease_owner:
            yield _("worker"), _text(owners.shown(execution.lease_owner))
        if execution.parent_id is not None:
            step = _('step "%(name)s"') % {"name": execution.step}
            yield _("parent"), format_html("{} · {}", self._linked(execution.parent_id), _text(step))
            yield _("root"), self._linked(execution.root_id)
        if execution.idempotency_key:
            yield _("idempotency key"), _text(execution.idempotency_key)
        for name, when in (
            (_("created"), execution.created_at),
            (_("started"), execution.started_at),
            (_("finished"), execution.finished_at),
            (_("due"), execution.due_at if execution.status == ExecutionStatus.QUEUED else None),
            (_("to be started before"), execution.deadline_at),
            (_("lease expires"), execution.lease_expires_at),
            (_("cancel requested"), execution.cancel_requested_at),
        ):
            if when is not None:
                yield name, _time(when, now)
        if execution.cancel_reason:
            yield _("cancel reason"), _text(execution.cancel_reason)
        if url := self._celery_result_url(request, execution):
            yield _("Celery result"), format_html('<a href="{}">{}</a>', url, _("in django-celery-results"))

    def _tree_item(self, item: tree.Item, story: Story) -> dict[str, Any]:
        shown: dict[str, Any] = {"tag": item.tag, "is_open": item.is_open}
        if item.tag in ("leaf", "branch", "fold"):
            shown |= self._node(item.branch, story)
        elif item.tag == "more":
            key = item.branch.execution.pk
            shown |= {"hidden": _more(item.branch.hidden), "url": self._list_url(parent__id__exact=key)}
        return shown

    def _node(self, branch: Branch, story: Story) -> dict[str, Any]:
        row = branch.execution
        label = labels.label(row, story.now, story.situation.pending if branch.is_current else ())
        place = "" if row.position is None else f"[{row.position}]"
        error = ""
        if row.error and row.status != ExecutionStatus.SUCCEEDED:
            error = _in_short(row.error, 120)
        return {
            "url": None if branch.is_current else self._url("change", row.pk),
            "name": words.visible(words.short_name(row.task)),
            "task": words.visible(row.task),
            "step": words.visible(f"{row.step}{place}") if row.step else "",
            "pill": pill(label, row.status),
            "attempt": labels.attempts(row) if row.attempt > 1 else "",
            "took": words.duration((row.finished_at - row.created_at).total_seconds()) if row.finished_at else "",
            "error": error,
            "is_current": branch.is_current,
        }

    def _awaited(self, awaited: waits.Awaited, story: Story) -> dict[str, Any]:
        step, child, now = awaited.step, awaited.child, story.now
        shown: dict[str, Any] = {
            "step": words.visible(step.name),
            "kind": step.get_kind_display(),
            "what": words.visible(awaited.what),
            "since": _time(step.created_at, now),
            "until": None if step.deadline_at is None else _time(step.deadline_at, now),
            "then": [_with_command(sentence) for sentence in awaited.then],
        }
        if child is not None:
            shown["child"] = self._linked(child.pk)
            shown["pill"] = pill(labels.label(child, now), child.status)
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
                "message": words.visible(words.first_line(cause.message, PREVIEW)),
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
        child = story.child_of(step)
        error = step.error or (child.error if child is not None and step.status == StepStatus.FAILED else None)
        is_instant = step.finished_at is None or step.finished_at == step.created_at
        shown: dict[str, Any] = {
            "number": story.step_count - len(story.steps) + number,
            "name": words.visible(step.name),
            "kind": step.get_kind_display(),
            "task": words.visible(step.task),
            "pill": step_pill(step),
            "attempt": step.attempt,
            "took": "" if is_instant else words.duration((step.finished_at - step.created_at).total_seconds()),  # type: ignore[operator]
            "child": None if step.child_id is None else self._linked(step.child_id),
            "error": _in_short(error, PREVIEW) if error else "",
            "preview": "",
            "note": "",
        }
        if step.total is not None:
            shown["note"] = _("%(done)d of %(total)d ended") % {
                "done": step.total - (step.remaining or 0),
                "total": step.total,
            }
        if step.status == StepStatus.SUCCEEDED and is_open:
            shown["preview"] = _preview(step.value, step.value_length)  # type: ignore[attr-defined]  # annotated
        return shown

    def _events(self, execution: Execution, is_open: bool) -> list[dict[str, Any]]:
        rows = Event.objects.using(database()).filter(execution_id=execution.pk).select_related("step")
        rows = rows.defer("payload", "step__result", "step__error")
        beginnings = rows.annotate(value=Substr("payload", 1, PREVIEW + 1), value_length=Length("payload"))
        return [
            {
                "name": words.visible(event.name),
                "key": words.visible(event.key),
                "sent": words.exact(event.created_at),
                "taken": words.exact(event.taken_at) if event.taken_at else None,
                "step": words.visible(event.step.name) if event.step is not None else "",
                "preview": _preview(event.value, event.value_length) if is_open else "",
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
            shown = words.visible(_pretty(name, text))
            cut_from = _more(len(shown)) if len(shown) > LONG_PREVIEW else ""
            yield Value(title, shown[:LONG_PREVIEW], cut_from, self._url(name, execution.pk) or "")

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


def _in_short(error: str, limit: int) -> str:
    """Return the first line of an error's message, or its class if the message may not be seen."""
    failure = load_failure(error)
    return words.visible(words.first_line(failure.message or words.short_name(failure.type), limit))


def _with_command(hint: str) -> SafeString:
    """Return a hint with the command at its end as code."""
    hint = words.visible(hint)
    command = _COMMAND.search(hint)
    if command is None:
        return format_html("{}", hint)
    return format_html("{}<code>{}</code>", hint[: command.start()], command[0])


def _more(number: int) -> str:
    """Return how many are left out, with separators; nothing if none is."""
    return f"{number:,}" if number > 0 else ""


def _after(seconds: float) -> str:
    """Return the time since the beginning: ``+1.250 s``, ``+2:46:40``, ``+3 d 0:00:10``."""
    if abs(seconds) < 1_000:
        return f"{seconds:+.3f} s"
    days, rest = divmod(round(abs(seconds)), 86_400)
    clock = f"{rest // 3_600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{'+' if seconds > 0 else '-'}{f'{days} d ' if days else ''}{clock}"


def _text(text: str) -> SafeString:
    return format_html("<bdi>{}</bdi>", words.visible(text))


def _time(when: dt.datetime, now: dt.datetime) -> SafeString:
    seconds = (now - when).total_seconds()
    near = words.duration(abs(seconds))
    relative = _("%(time)s ago") % {"time": near} if seconds >= 0 else _("in %(time)s") % {"time": near}
    return format_html(
        '<time datetime="{}">{}</time> <span class="cd-quiet">({})</span>',
        when.isoformat(),
        words.exact(when),
        relative,
    )


def _preview(value: str | None, length: int | None) -> str:
    if value is None:
        return ""
    text = words.visible(readable(value, is_cut=len(value) < (length or 0)))
    if len(text) <= PREVIEW and len(value) >= (length or 0):
        return text
    return _("%(beginning)s… (%(length)s characters)") % {"beginning": text[:PREVIEW], "length": f"{length:,}"}


def _pretty(name: str, text: str) -> str:
    """Return a value on several lines; of a payload the keyword arguments alone, if there are no others."""
    if name == "payload":
        try:
            args, kwargs = decode(text)
            shown = {"args": args, "kwargs": kwargs} if args else kwargs
            return json.dumps(shown, indent=2, default=str, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):  # damaged
            pass
    return readable(text, indent=2)
