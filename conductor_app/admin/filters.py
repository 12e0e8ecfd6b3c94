"""Filters of the lists. Their choices cost no query, or a bounded one; each says which index serves it."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import PAGE_VAR
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.translation import gettext_lazy as _

from conductor_app.admin import access, causes, names
from conductor_app.exceptions import InvalidArgument
from conductor_app.models import Execution, FailedExecution, Operation, Step, database
from conductor_app.states import OPEN_STATUSES, ExecutionStatus, StepStatus
from conductor_app.store import clock, ids
from conductor_app.store.statements import Literal
from conductor_app.telling.tags import trees_with
from conductor_app.telling.words import clean, first_line, short_name
from conductor_app.values.tags import parse_tag

#: The latest so many failures tell which error classes there are to choose from.
LATEST_FAILURES = 1_000
#: In a narrowed list, the latest so many rows tell which tasks and queues there are to choose from.
LATEST_ROWS = 1_000
MOST_CHOICES = 30
#: So many names are listed; of more, a box finds them.
MOST_LISTED = 12
SEARCHED = "admin/conductor_app/name_filter.html"
#: A value of each filter that has no others than its choices.
ANY = "any"
#: A machine that makes ids may have a clock that is off by so much.
CLOCK_SKEW = dt.timedelta(minutes=10)


class IndexedFilter(admin.SimpleListFilter):
    """A filter that knows what it costs."""

    #: Whether the index that orders the list finds the rows without reading others.
    is_ordered: bool = False
    #: Whether it knows no other values than its choices.
    is_closed: ClassVar[bool] = True

    def __init__(self, request: HttpRequest, params: dict[str, Any], model: type[Model], model_admin: Any) -> None:
        self.request, self.model_admin = request, model_admin
        super().__init__(request, params, model, model_admin)
        if self.is_closed and self.value() not in (None, ANY, *dict(self.lookup_choices)):
            raise IncorrectLookupParameters(f"{self.parameter_name} is none of its choices")

    def value(self) -> str | None:
        """Return what was chosen; an empty text is a text."""
        found = super().value()
        return None if found is None else str(found)

    def found_by_index(self) -> QuerySet[Any] | None:
        """Return the rows that some other index finds, if there is one."""
        return None

    def bounded(self, rows: QuerySet[Any], bound: Any) -> QuerySet[Any]:
        """Return what the filter leaves of ``rows``, if that needs to know the oldest row that may be looked at."""
        del bound
        return rows


class WordFilter(IndexedFilter):
    """A filter on one column, with choices that are known beforehand."""

    column: ClassVar[str]
    is_closed = False

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the choices."""
        raise NotImplementedError

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the choices, and the chosen one if it is none of them."""
        choices = self.seen(list(self.words()))
        chosen = self.value()
        if chosen is not None and chosen not in dict(choices):
            choices.append((chosen, clean(chosen)))
        return choices

    def seen(self, choices: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Return those choices that may be shown to this person."""
        return choices

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the rows with the chosen value."""
        chosen = self.value()
        return queryset if chosen is None else queryset.filter(**{self.column: chosen})


class StatusFilter(WordFilter):
    """By an execution's status."""

    title = _("status")
    parameter_name = "status__exact"
    column = "status"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the statuses."""
        return list(Execution._meta.get_field("status").flatchoices)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the executions of that status, in a form that a partial index serves."""
        chosen = self.value()
        if chosen == ExecutionStatus.FAILED:
            # The primary key of the failures has the order of the list.
            return queryset.filter(failure__isnull=False, status=ExecutionStatus.FAILED)
        if chosen in set(ExecutionStatus):
            return queryset.filter(status=Literal(str(chosen)))
        return super().queryset(request, queryset)

    @property
    def is_ordered(self) -> bool:  # type: ignore[override]
        """Failed ones are found in the order of the list."""
        return self.value() == ExecutionStatus.FAILED

    def found_by_index(self) -> QuerySet[Any] | None:
        """Return what a partial index finds."""
        chosen = self.value()
        return (
            Execution.objects.using(database()).with_status(ExecutionStatus(str(chosen)))
            if chosen in OPEN_STATUSES
            else None
        )


class OperationKindFilter(WordFilter):
    """By what an operation does."""

    title = _("operation")
    parameter_name = "kind__exact"
    column = "kind"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return what there is."""
        return list(Operation._meta.get_field("kind").flatchoices)


class StepStatusFilter(WordFilter):
    """By a step's status."""

    title = _("status")
    parameter_name = "status__exact"
    column = "status"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the statuses."""
        return list(Step._meta.get_field("status").flatchoices)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the steps of that status, in a form that a partial index serves."""
        if self.value() == StepStatus.PENDING:
            return queryset.filter(status=Literal(StepStatus.PENDING.value))
        return super().queryset(request, queryset)

    def found_by_index(self) -> QuerySet[Any] | None:
        """Return what the partial index of the sweeper finds."""
        if self.value() != StepStatus.PENDING:
            return None
        return Step.objects.using(database()).filter(status=Literal(StepStatus.PENDING.value))


class StepKindFilter(WordFilter):
    """By what stands behind a step."""

    title = _("kind")
    parameter_name = "kind__exact"
    column = "kind"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the kinds."""
        return list(Step._meta.get_field("kind").flatchoices)


class NameFilter(WordFilter):
    """A filter whose choices are names: in a narrowed list, those that its latest rows have."""

    @property
    def template(self) -> str:  # type: ignore[override]
        """A box that finds names, if they are too many to be listed."""
        return SEARCHED if self.is_searched else str(super().template)

    @property
    def is_searched(self) -> bool:
        """Whether there are so many."""
        return len(self.lookup_choices) > MOST_LISTED

    @property
    def others(self) -> list[tuple[str, str]]:
        """The rest of the address, which its form keeps: but not the page, which has other rows then."""
        given = self.request.GET.lists()
        return [
            (name, value) for name, values in given if name not in (self.parameter_name, PAGE_VAR) for value in values
        ]

    def seen(self, choices: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Return the names that are no news to whoever sees the rows."""
        rows: QuerySet[Any] = self.model_admin.get_queryset(self.request)
        if not access.is_narrowed(rows):
            return choices
        latest = rows.order_by(*self.model_admin.ordering).values_list(self.column, flat=True)[:LATEST_ROWS]
        found = set(latest)
        return [choice for choice in choices if choice[0] in found]


class TaskFilter(NameFilter):
    """By task, as Celery's registry names them."""

    title = _("task")
    parameter_name = "task"
    column = "task"

    def value(self) -> str | None:
        """Return what was chosen: the whole name, if the last part of it was typed and one task alone has it."""
        chosen = super().value()
        if chosen and "." not in chosen:
            found = [name for name in names.known_tasks() if short_name(name) == chosen]
            return found[0] if len(found) == 1 and chosen not in found else chosen
        return chosen

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the tasks that this project knows; the last part of a name if it tells them apart."""
        known = names.known_tasks()
        shared = Counter(map(short_name, known))
        return [(name, name if shared[short_name(name)] > 1 else short_name(name)) for name in known]


class ExecutionTaskFilter(TaskFilter):
    """By task, through the index of idempotency keys."""

    def found_by_index(self) -> QuerySet[Any] | None:
        """Return the task's executions."""
        return Execution.objects.using(database()).filter(task=self.value())


class QueueFilter(NameFilter):
    """By queue, as settings and tasks name them."""

    title = _("queue")
    parameter_name = "queue"
    column = "queue"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the queues that this project knows."""
        return [(name, clean(name)) for name in names.known_queues()]


class TagFilter(IndexedFilter):
    """Whole trees by a tag, as an address names it; an execution's page links to each."""

    title = _("tag")
    parameter_name = "tag"
    is_closed = False

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the chosen tag."""
        chosen = self.value()
        if chosen is None:
            return []
        try:
            self._tag = parse_tag(chosen)
        except InvalidArgument as error:
            raise IncorrectLookupParameters(error) from error
        return [(chosen, clean("=".join(self._tag)))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return all; ``bounded`` looks for the trees with that tag, once it knows where to begin."""
        return queryset

    def bounded(self, rows: QuerySet[Any], bound: Any) -> QuerySet[Any]:
        """Return the executions of trees with that tag; a child's id begins as its root's does."""
        if self.value() is None:
            return rows
        since = None if bound is None else ids.first_of_tree(bound)
        return rows.filter(root__in=self._trees if since is None else self._trees_with(since))

    def found_by_index(self) -> QuerySet[Any]:
        """Return the same, found by the indexes of tags and of roots."""
        return Execution.objects.using(database()).filter(root__in=self._trees)

    @cached_property
    def _trees(self) -> Any:
        return self._trees_with(None)

    def _trees_with(self, since: uuid.UUID | None) -> Any:
        return trees_with(*self._tag, since=since, seen=self.model_admin.seen(self.request))


class KindFilter(IndexedFilter):
    """Roots, or children."""

    title = _("kind")
    parameter_name = "kind"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the two kinds."""
        return [("root", _("root")), ("child", _("child"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the executions without, or with, a parent."""
        # By the depth, which says the same: the index of children would lead to all roots there have ever been.
        depth = {"root": Q(depth=0), "child": Q(depth__gt=0)}.get(self.value() or "")
        return queryset if depth is None else queryset.filter(depth)


class FailedChildFilter(IndexedFilter):
    """Executions that have a failed child, whatever became of themselves."""

    title = _("failed child")
    parameter_name = "failed_child"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the only choice."""
        return [("1", _("has a failed child"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return all; ``bounded`` looks for the parents of failures, once it knows where to begin."""
        return queryset

    def bounded(self, rows: QuerySet[Any], bound: Any) -> QuerySet[Any]:
        """Return the parents of failed children; a child's id begins as its parent's does."""
        if self.value() is None:
            return rows
        failed = Execution.objects.using(database()).filter(failure__isnull=False, parent__isnull=False)
        if bound is not None:
            failed = failed.filter(pk__gte=ids.first_of_tree(bound))
        seen = self.model_admin.seen(self.request)
        if seen is not None:
            failed = failed.filter(pk__in=seen.values("pk"))
        return rows.filter(pk__in=failed.values("parent"))


class HeldFilter(IndexedFilter):
    """Executions that somebody holds."""

    title = _("held")
    parameter_name = "held"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the only choice."""
        return [("1", _("held"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return what is held."""
        return queryset if self.value() is None else queryset.held()  # type: ignore[attr-defined]

    def found_by_index(self) -> QuerySet[Any] | None:
        """Return what a partial index finds."""
        return Execution.objects.using(database()).held() if self.value() is not None else None


class AgeFilter(IndexedFilter):
    """By the time of writing, back from now."""

    title = _("created")
    parameter_name = "within"
    column: ClassVar[str] = "created_at"
    SPANS: ClassVar[dict[str, tuple[Any, dt.timedelta]]] = {
        "1h": (_("past hour"), dt.timedelta(hours=1)),
        "24h": (_("past 24 hours"), dt.timedelta(hours=24)),
        "7d": (_("past 7 days"), dt.timedelta(days=7)),
        "30d": (_("past 30 days"), dt.timedelta(days=30)),
    }

    @property
    def span(self) -> dt.timedelta | None:
        """How far back."""
        found = self.SPANS.get(self.value() or "")
        return None if found is None else found[1]

    @property
    def floor(self) -> dt.datetime | None:
        """The oldest instant that is wanted, by this machine's clock."""
        return None if self.span is None else clock.aware(timezone.now() - self.span)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the spans."""
        return [(value, words) for value, (words, _span) in self.SPANS.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return what was written since."""
        if self.span is None:
            return queryset
        return queryset.filter(**{f"{self.column}__gte": clock.after(-self.span)})


class TreeAgeFilter(AgeFilter):
    """By the time at which an execution's tree was begun.

    Ids begin with the time of their root, so the primary key's index finds them. An execution that was adopted from a
    message with an id of another kind is found by its own time.
    """

    title = _("tree created")
    is_ordered = True

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the executions of trees that were begun since."""
        if self.floor is None:
            return queryset
        return super().queryset(request, queryset.filter(pk__gte=ids.first_at(self.floor - CLOCK_SKEW)))


class FailureAgeFilter(AgeFilter):
    """By the time of the failure, which is the order of the list."""

    title = _("failed")
    column = "failed_at"
    is_ordered = True


class ErrorClassFilter(WordFilter):
    """By error class, as the latest failures have them."""

    title = _("error class")
    parameter_name = "error_class"
    column = "error_class"

    def words(self) -> Iterable[tuple[str, Any]]:
        """Return the most frequent classes of the latest failures."""
        seen = access.failures(self.model_admin, self.request)
        rows = FailedExecution.objects.using(database()) if seen is None else seen
        latest = rows.order_by("-failed_at").values_list("error_class", flat=True)
        found = Counter(latest[:LATEST_FAILURES]).most_common(MOST_CHOICES)
        return [(name, clean(short_name(name) or name)) for name in sorted(name for name, _count in found)]


class ScopeFilter(IndexedFilter):
    """Whole trees that failed, or what failed by itself."""

    title = _("scope")
    parameter_name = "scope"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the two scopes."""
        return [("roots", _("root failures only")), ("causes", _("root causes only"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return failures of roots, or failures that no child's failure is behind."""
        if self.value() == "roots":
            return queryset.filter(execution__depth=0)
        return queryset.filter(root_cause__isnull=True) if self.value() == "causes" else queryset


class CauseFilter(IndexedFilter):
    """Failures behind which stands one cause: an error class with a message, numbers and names aside."""

    title = _("cause")
    parameter_name = "cause"
    is_closed = False

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the chosen cause; the overview links to each."""
        chosen = self.value()
        if chosen is None:
            return []
        seen = access.failures(self.model_admin, self.request)
        is_open = access.may_see_payloads(self.request)
        self._failures = causes.failures_of(chosen, seen, with_messages=is_open)
        sample: Any = _("none of the latest failures")
        if self._failures:
            sample = self._failures[0].sample or short_name(self._failures[0].error_class)
        return [(chosen, clean(first_line(str(sample), 80)))]

    def _condition(self) -> Q:
        keys = [failure.execution_id for failure in self._failures]
        return Q(pk__in=keys) | Q(root_cause__in=keys)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return those failures, and the failures of their parents."""
        return queryset if self.value() is None else queryset.filter(self._condition())

    def found_by_index(self) -> QuerySet[Any]:
        """Return the same, found by the primary key and the index of root causes."""
        return FailedExecution.objects.using(database()).filter(self._condition())


class TakenFilter(IndexedFilter):
    """Events that a step has taken, or none yet."""

    title = _("taken")
    parameter_name = "taken_at__isempty"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return the two states."""
        return [("1", _("not taken")), ("0", _("taken"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Return the events in that state."""
        chosen = self.value()
        return queryset if chosen is None else queryset.filter(taken_at__isnull=chosen == "1")
