"""Executions in the admin."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from typing import Any

from django.contrib import admin
from django.db.models import Count, F, Max, Q, QuerySet
from django.http import HttpRequest
from django.urls import URLPattern
from django.utils.html import format_html
from django.utils.translation import gettext as _now
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from conductor_app.admin import access, filters, names, overview
from conductor_app.admin.actions import ExecutionActions
from conductor_app.admin.page import ExecutionPage
from conductor_app.admin.plain_data import masked
from conductor_app.admin.text import pill, shown, task_name
from conductor_app.models import Execution, FailedExecution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.owners import node_name
from conductor_app.telling.headlines import headline
from conductor_app.telling.labels import attempts, document, label
from conductor_app.telling.queues import with_queue
from conductor_app.telling.situation import Situation
from conductor_app.telling.withholding import withhold
from conductor_app.telling.words import duration
from conductor_app.values.failures import load_failure

KEY_PREFIX = "key:"
#: Children that an execution's JSON document has.
MOST_CHILDREN = 1_000


@admin.register(Execution)
class ExecutionAdmin(ExecutionActions, ExecutionPage):
    """Executions, newest first."""

    list_display = (
        "status_pill",
        "task_link",
        "progress",
        "parent_link",
        "attempts",
        "created",
        "took",
        "worker",
    )
    list_display_links = ("task_link",)
    list_filter = (
        filters.StatusFilter,
        filters.TreeAgeFilter,
        filters.KindFilter,
        filters.FailedChildFilter,
        filters.ExecutionTaskFilter,
        filters.QueueFilter,
    )
    # Ids sort by time, so the primary key's index is enough.
    ordering = ("-id",)
    search_fields = ("id",)
    search_help_text = _(
        "An id finds an execution, or the whole tree of a root. key:order-7 finds an idempotency key, "
        "and the beginning of a task's name, or of its last part, the task."
    )
    indexed_lookups = frozenset({"root", "root__id__exact", "root_id", "parent", "parent__id__exact", "parent_id"})
    references = ("parent_id", "root_id")
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
        "cancel_requested_at",
        "cancel_reason",
        "idempotency_key",
        "created_at",
        "started_at",
        "finished_at",
    )

    # ---------------------------------------------------------------------------------------------------------- list

    def get_urls(self) -> list[URLPattern]:
        """Return the pages, the overview among them."""
        return [*overview.urls(self), *super().get_urls()]

    def for_list(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        """Return executions with the step at which they failed."""
        with_step: QuerySet[Any] = super().for_list(rows).annotate(failed_at_step=F("failure__step"))
        return with_step

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

    def searched(self, term: str) -> Q | None:
        """Find by id, root, idempotency key, or the beginning of a task's name."""
        term = term.strip()
        if not term:
            return None
        if term.startswith(KEY_PREFIX):
            # The index begins with the task, so the known ones are asked for.
            return Q(task__in=names.known_tasks(), idempotency_key=term.removeprefix(KEY_PREFIX).strip())
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
        """Return the last part of the task's name, and the id."""
        return format_html('{} <span class="cd-id">{}</span>', task_name(execution.task), execution.pk)

    @admin.display(description=_("progress"))
    def progress(self, execution: Any) -> str:
        """Return how many steps are done, and what is awaited or where it failed."""
        done = execution.finished_steps
        text = ngettext("%(count)d step", "%(count)d steps", done) % {"count": done}
        awaited = [step.name for step in execution.pending_steps if step.kind != StepKind.START]
        if execution.status == ExecutionStatus.WAITING and awaited:
            return shown(_now("%(steps)s, waiting for %(names)s") % {"steps": text, "names": ", ".join(awaited)})
        if execution.status == ExecutionStatus.FAILED and execution.failed_at_step:
            return shown(_now("%(steps)s, failed at %(name)s") % {"steps": text, "name": execution.failed_at_step})
        return shown(text)

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
        return self.link(execution.parent_id, text=f"…{str(execution.parent_id)[-12:]}")

    @admin.display(description=_("root"))
    def root_link(self, execution: Execution) -> str | None:
        """Return a link to the root."""
        return self.link(execution.root_id)

    # ---------------------------------------------------------------------------------------------------------- JSON

    def as_json(self, row: Any) -> dict[str, Any]:
        """Return an execution of the list as plain data."""
        return {
            **document(row, row.read_at, row.pending_steps),
            "finished_steps": row.finished_steps,
            "failed_at_step": row.failed_at_step or None,
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
        said = headline(situation)
        failure = failures.get(row.pk)
        return {
            **document(row, now, situation.pending),
            "root": root_id,
            "headline": str(said),
            "hints": list(said.hints),
            "priority": row.priority,
            "depth": row.depth,
            "idempotency_key": row.idempotency_key,
            "deadline_at": row.deadline_at,
            "cancel_requested_at": row.cancel_requested_at,
            "cancel_reason": row.cancel_reason or None,
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
                    "attempt": step.attempt,
                    "deadline_at": step.deadline_at,
                    "created_at": step.created_at,
                    "finished_at": step.finished_at,
                }
                for step in own
            ],
            "children": [document(child, now, []) for child in family.values()],
            "children_are_complete": len(children) <= MOST_CHILDREN,
            **({name: masked(getattr(row, name)) for name in self.payload_fields} if is_open else {}),
        }
