"""Executions in the admin."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db.models import Count, F, Max, Q, QuerySet
from django.db.models.functions import Substr
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import access, comparison, filters, limits, names, overview, slow, steps, workers
from conductor_app.admin.actions import ExecutionActions
from conductor_app.admin.page import ExecutionPage
from conductor_app.admin.plain_data import masked
from conductor_app.admin.text import LONGEST_NAME, pill, shown, tail, task_name
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.owners import node_name
from conductor_app.telling.errors import ERROR_LENGTH, whole_failure
from conductor_app.telling.forks import read_forks
from conductor_app.telling.headlines import headline
from conductor_app.telling.keys import holder_of_key, shown_key
from conductor_app.telling.labels import attempts, document, label
from conductor_app.telling.limits import with_limit
from conductor_app.telling.operations import read_deeds
from conductor_app.telling.queues import with_queue
from conductor_app.telling.situation import Situation
from conductor_app.telling.state import progress_document, progress_of, stored_state
from conductor_app.telling.stops import document_of_pause
from conductor_app.telling.tags import tags_of_trees
from conductor_app.telling.withholding import withhold
from conductor_app.telling.words import clean, due_in, duration, first_line, middle, short_name
from conductor_app.transitions import kinds
from conductor_app.values.failures import load_failure

KEY_PREFIX = "key:"
UNIQUE_PREFIX = "unique:"
TAG_PREFIX = "tag:"
#: Characters of a reason in the list.
WHY_LENGTH = 100
#: Children that an execution's JSON document has.
MOST_CHILDREN = 1_000


@admin.register(Execution)
class ExecutionAdmin(ExecutionActions, ExecutionPage):
    """Executions, newest first."""

    list_display = (
        "status_pill",
        "task_link",
        "progress",
        "created",
        "took",
        "worker",
    )
    list_display_links = ("task_link",)
    list_filter = (
        filters.TagFilter,
        filters.StatusFilter,
        filters.TreeAgeFilter,
        filters.KindFilter,
        filters.FailedChildFilter,
        filters.HeldFilter,
        filters.ExecutionTaskFilter,
        filters.QueueFilter,
    )
    # Ids sort by time, so the primary key's index is enough.
    ordering = ("-id",)
    search_fields = ("id",)
    search_help_text = _(
        "An id finds an execution, or the whole tree of a root. key:order-7 finds an idempotency key, "
        "unique:order-7 the open execution with a unique key, "
        "tag:order=7 the trees with a tag, and the beginning of a task's name, or of its last part, the task."
    )
    indexed_lookups = frozenset({"root", "root__id__exact", "root_id", "parent", "parent__id__exact", "parent_id"})
    references = ("parent_id", "root_id", "predecessor")
    deferred_in_lists = ("payload", "result", "error", "options", "cancel_reason")
    payload_fields = ("payload", "result")
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
        "tree_deadline_at",
        "cancel_requested_at",
        "cancel_reason",
        "held_at",
        "held_by",
        "hold_reason",
        "idempotency_key",
        "unique_key",
        "predecessor",
        "due_then",
        "created_at",
        "started_at",
        "finished_at",
    )

    # ---------------------------------------------------------------------------------------------------------- list

    def get_urls(self) -> list[URLPattern]:
        """Return the pages, the overview among them."""
        own = (overview, slow, workers, limits, comparison)
        return [*(url for page in own for url in page.urls(self)), *super().get_urls()]

    def for_list(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        """Return executions with the step at which they failed, and the beginnings of what says why."""
        told: QuerySet[Any] = (
            super()
            .for_list(rows)
            .annotate(
                failed_at_step=F("failure__step"),
                error_head=Substr("error", 1, ERROR_LENGTH),
                reason_head=Substr("cancel_reason", 1, WHY_LENGTH + 1),
            )
        )
        return told

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """Return the list; without the messages of errors for who may not see them."""
        found: Any = super().get_changelist_instance(request)
        for row in found.result_list:
            row.error = whole_failure(row.error_head)
        if not access.may_see_payloads(request):
            withhold(found.result_list)
        return found

    def complete(self, rows: list[Any]) -> None:
        """Add how far each execution has come: one query for the page."""
        finished: Counter[uuid.UUID] = Counter()
        pending: dict[uuid.UUID, list[Step]] = defaultdict(list)
        # An execution waits for one step at a time, so one name of each kind is enough.
        grouped = (
            Step.objects.using(database())
            .filter(execution__in=[row.pk for row in rows])
            .values("execution_id", "status", "kind")
        )
        for group in grouped.annotate(count=Count("pk"), name=Max("name")).order_by("execution_id", "kind"):
            if group["status"] == StepStatus.PENDING:
                step = Step(name=group["name"], kind=group["kind"], status=group["status"])
                pending[group["execution_id"]].append(step)
            else:
                finished[group["execution_id"]] += group["count"]
        for row in rows:
            row.finished_steps = finished[row.pk]
            # What is undecided of one that was cancelled, its children's ends decide: it waits for nothing.
            row.pending_steps = pending[row.pk] if row.status == ExecutionStatus.WAITING else []

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Show the list; a tag in the search box is one for the filter, which knows how to read few rows."""
        term = request.GET.get(SEARCH_VAR, "").strip()
        if request.method == "GET" and term.startswith(TAG_PREFIX):
            query = request.GET.copy()
            del query[SEARCH_VAR]
            query[filters.TagFilter.parameter_name] = term.removeprefix(TAG_PREFIX).strip()
            return HttpResponseRedirect(f"{request.path}?{query.urlencode()}")
        task = request.GET.get(filters.TaskFilter.parameter_name)
        context = {"waits_url": steps.waits_url(self, task) if task else None}
        return super().changelist_view(request, {**context, **(extra_context or {})})

    def searched(self, term: str) -> Q | None:
        """Find by id, root, idempotency key, unique key, or the beginning of a task's name."""
        term = term.strip()
        if not term:
            return None
        if term.startswith(KEY_PREFIX):
            # The index begins with the task, so the known ones are asked for.
            return Q(task__in=names.known_tasks(), idempotency_key=term.removeprefix(KEY_PREFIX).strip())
        if term.startswith(UNIQUE_PREFIX):
            return Q(unique_key=term.removeprefix(UNIQUE_PREFIX).strip())
        try:
            found = uuid.UUID(term)
        except ValueError:
            return Q(task__in=names.tasks_like(term))
        return Q(pk=found) | Q(root=found)

    @admin.display(description=_("status"))
    def status_pill(self, execution: Any) -> str:
        """Return the status as a shape and a word."""
        return pill(label(execution, execution.read_at, execution.pending_steps))

    @admin.display(description=_("task"))
    def task_link(self, execution: Execution) -> str:
        """Return the last part of the task's name, the end of the id, and the step whose child it is."""
        place = "" if execution.position is None else f"[{execution.position}]"
        step = (
            format_html(" · <bdi>{}</bdi>", middle(clean(execution.step), LONGEST_NAME) + place)
            if execution.step
            else ""
        )
        return format_html(
            '{} <span class="cd-id" title="{}">{}{}</span>',
            task_name(execution.task),
            execution.pk,
            tail(execution.pk),
            step,
        )

    @admin.display(description=_("waits for, or why"))
    def progress(self, execution: Any) -> str:
        """Return what is awaited, or why it failed, and how many steps are done."""
        done = execution.finished_steps
        note = ngettext("%(count)d step", "%(count)d steps", done) % {"count": done}
        if execution.attempt > 1:
            attempt = gettext("attempt %(attempt)s") % {"attempt": attempts(execution)}
            note = f"{attempt}, {note}" if done else attempt
        what, why = self._what(execution)
        lines = [shown(what)] if what else []
        if why:
            classes = "cd-why cd-why--error" if execution.error else "cd-why"
            lines.append(format_html('<span class="{}">{}</span>', classes, shown(why)))
        if not lines:
            return shown(note)
        if done or execution.attempt > 1:
            lines.append(format_html('<span class="cd-why">{}</span>', note))
        return format_html_join("", "{}", ((line,) for line in lines))

    def _what(self, execution: Any) -> tuple[str, str]:
        """Return what it is about, and why; both may be empty."""
        status = ExecutionStatus(execution.status)
        why = _why(execution.error) if execution.error and status != ExecutionStatus.SUCCEEDED else ""
        if status == ExecutionStatus.WAITING:
            awaited = [step.name for step in execution.pending_steps if kinds.of(step.kind).suspends]
            return (gettext("waiting for %(names)s") % {"names": ", ".join(awaited)} if awaited else ""), ""
        if status == ExecutionStatus.FAILED:
            at = execution.failed_at_step
            return (gettext("failed at %(name)s") % {"name": at} if at else ""), why
        if status == ExecutionStatus.CANCELLED:
            return first_line(execution.reason_head, WHY_LENGTH), ""
        if status == ExecutionStatus.QUEUED:
            due = execution.due_at
            if due is not None and due > execution.read_at:
                return due_in(due, execution.read_at), why
            return gettext("in queue %(name)s") % {"name": execution.queue}, why
        return "", ""

    @admin.display(description=_("duration"), empty_value="-")
    def took(self, execution: Any) -> str | None:
        """Return how long it has taken since it was first started, waiting included."""
        if execution.started_at is None:
            return None
        return duration(((execution.finished_at or execution.read_at) - execution.started_at).total_seconds())

    @admin.display(description=_("worker"), empty_value="-")
    def worker(self, execution: Execution) -> str | None:
        """Return the worker that runs it."""
        return shown(node_name(execution.lease_owner), title=execution.lease_owner) if execution.lease_owner else None

    # -------------------------------------------------------------------------------------------------------- common

    @admin.display(description=_("attempt"))
    def attempts(self, execution: Execution) -> str:
        """Return the attempt and how many there may be."""
        return attempts(execution)

    @admin.display(description=_("parent"), empty_value="-")
    def parent_link(self, execution: Execution) -> str | None:
        """Return a link to the parent."""
        # Ids of a tree begin alike.
        return self.link(execution.parent_id, text=tail(execution.parent_id))

    @admin.display(description=_("root"))
    def root_link(self, execution: Execution) -> str | None:
        """Return a link to the root."""
        return self.link(execution.root_id)

    # ---------------------------------------------------------------------------------------------------------- JSON

    def complete_for_json(self, rows: list[Any]) -> None:
        """Add the tags of each execution's tree."""
        tags = tags_of_trees(row.root_id for row in rows)
        for row in rows:
            row.tree_tags = tags[row.root_id]

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return an execution of the list as plain data."""
        return {
            **document(row, row.read_at, row.pending_steps),
            "finished_steps": row.finished_steps,
            "failed_at_step": row.failed_at_step or None,
            "tags": row.tree_tags,
        }

    def in_full(self, row: Execution, request: HttpRequest) -> dict[str, Any]:
        """Return an execution with its headline, steps, children and failure as plain data."""
        using = database()
        seen, is_open = self.seen(request), access.may_see_payloads(request)
        now = clock.read(using)
        own = list(Step.objects.using(using).filter(execution=row).defer("result").order_by("id"))
        # The list's order is that of the index.
        children = list(
            (Execution.objects.using(using) if seen is None else seen)
            .filter(parent=row)
            .defer(*self.deferred_in_lists)
            .order_by("step", "position")[: MOST_CHILDREN + 1]
        )
        failures = {found.pk: found for found in FailedExecution.objects.using(using).filter(pk=row.pk)}
        family = {child.pk: child for child in children[:MOST_CHILDREN]}
        access.conceal(seen, failures.values(), ["root_cause_id"])
        access.conceal(seen, own, ["child_id"])
        access.conceal(seen, [row], self.references)
        root_id: uuid.UUID | None = row.root_id
        row.root_id = root_id or row.pk  # for the headline
        if not is_open:
            withhold([row], failures=failures.values())
        situation = with_queue(Situation(row, now, steps=own, tree=family, failures=failures), seen)
        situation = with_limit(situation, seen)
        said = headline(situation)
        told = stored_state(row.pk)
        failure = failures.get(row.pk)
        return {
            **document(row, now, situation.pending),
            "root": root_id,
            "headline": str(said),
            "hints": list(said.hints),
            "priority": row.priority,
            "depth": row.depth,
            "idempotency_key": row.idempotency_key,
            "unique_key": shown_key(row),
            "unique_key_holder": holder_of_key(row, seen),
            "waits_for_end_of": row.predecessor,
            "deadline_at": row.deadline_at,
            "tree_deadline_at": row.tree_deadline_at,
            "cancel_requested_at": row.cancel_requested_at,
            "cancel_reason": row.cancel_reason or None,
            "paused": None if situation.paused is None else document_of_pause(situation.paused),
            "tags": tags_of_trees([root_id])[root_id],
            "progress": progress_document(progress_of(row, told, own), with_note=is_open),
            **read_forks(row, seen).document(),
            "error": row.error_message or None,
            "error_class": load_failure(row.error).type if row.error else None,
            "failure": None
            if failure is None
            else {
                "error_class": failure.error_class,
                "message": failure.message if is_open else None,
                "traceback": failure.traceback if is_open else None,
                "step": failure.step or None,
                "root_cause": failure.root_cause_id,
                "failed_at": failure.failed_at,
            },
            "steps": [
                {
                    "id": step.pk,
                    "name": step.name,
                    "kind": step.kind,
                    "status": step.status,
                    "task": step.task or None,
                    "child": step.child_id,
                    "copied": step.is_copied,
                    "attempt": step.attempt,
                    "deadline_at": step.deadline_at,
                    "created_at": step.created_at,
                    "finished_at": step.finished_at,
                }
                for step in own
            ],
            "operations": [deed.document() for deed in read_deeds(row, seen)],
            "children": [document(child, now, []) for child in family.values()],
            "children_are_complete": len(children) <= MOST_CHILDREN,
            **({name: masked(getattr(row, name)) for name in self.payload_fields} if is_open else {}),
            **({"published": masked(told.published if told else None)} if is_open else {}),
        }


def _why(error: str) -> str:
    """Return an error's class, and the first line of its message if that may be seen."""
    failure = load_failure(error)
    message = first_line(failure.message, WHY_LENGTH)
    name = clean(short_name(failure.type))
    return f"{name}: {message}" if message else name
