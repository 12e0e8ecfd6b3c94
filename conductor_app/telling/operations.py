"""What people have done to an execution, and how far an operation is."""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from django.db.models import Count, QuerySet
from django.utils.translation import gettext as _
from django.utils.translation import pgettext

from conductor_app.models import Execution, Operation, OperationItem, database
from conductor_app.states import OPEN_STATUSES, ExecutionStatus, ItemState, OperationKind, OperationSource
from conductor_app.transitions import operating

#: Most of them that are told of one execution: the latest.
MOST_DEEDS = 100

#: What starts executions, and leaves those that it is about as they are.
STARTING = frozenset({OperationKind.RERUN, OperationKind.FORK})

_DONE = {
    OperationKind.RETRY: lambda: _("retried"),
    OperationKind.RERUN: lambda: _("run again as new"),
    OperationKind.FORK: lambda: _("run again from a step"),
    OperationKind.CANCEL: lambda: _("cancelled"),
    OperationKind.WAKE: lambda: _("woken"),
    OperationKind.SEND: lambda: _("sent an event"),
    OperationKind.PUBLISH: lambda: _("published again"),
    OperationKind.HOLD: lambda: _("held"),
    OperationKind.RELEASE: lambda: pgettext("operation", "released"),
}
_SOURCES = {
    OperationSource.ADMIN: lambda: _("in the admin"),
    OperationSource.COMMAND: lambda: _("on the command line"),
    OperationSource.API: lambda: _("by the API"),
}


@dataclass(frozen=True)
class Deed:
    """What somebody has done to an execution, or to the root of its tree."""

    at: dt.datetime
    operation: Operation
    execution_id: uuid.UUID
    #: What a rerun or a fork has started.
    created_id: uuid.UUID | None

    def text(self, execution: Execution) -> str:
        """Return it as a line of an execution's history: ``retried by ana: stock is back``."""
        done = self.done
        if self.created_id == execution.pk:
            started = _("started as a rerun of %(execution)s")
            if self.operation.kind == OperationKind.FORK:
                started = _("started as a fork of %(execution)s")
            done = started % {"execution": self.execution_id}
        elif self.created_id is not None:
            done = _("%(done)s, %(execution)s,") % {"done": done, "execution": self.created_id}
        if self.execution_id != execution.pk and self.created_id != execution.pk:
            done = _("its root %(done)s") % {"done": done}
        return f"{done} {by(self.operation)}"

    @property
    def done(self) -> str:
        """The deed in a word or a few."""
        return done(self.operation)

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "id": self.operation.pk,
            "kind": self.operation.kind,
            "at": self.at,
            "actor": self.operation.actor or None,
            "reason": self.operation.reason or None,
            "source": self.operation.source,
            "execution": self.execution_id,
            "created": self.created_id,
        }


def done(operation: Operation) -> str:
    """Return what an operation does, as what was done."""
    return _DONE[OperationKind(operation.kind)]()


def by(operation: Operation) -> str:
    """Return by whom and why, after what was done."""
    who = _("by %(actor)s") % {"actor": operation.actor}
    who = who if operation.actor else _SOURCES[OperationSource(operation.source)]()
    return f"{who}: {operation.reason}" if operation.reason else who


def read_deeds(execution: Execution, seen: QuerySet[Execution] | None = None) -> list[Deed]:
    """Return what people have done to an execution and to the root of its tree, the latest, in their order.

    Args:
        execution: Which one.
        seen: The executions that may be told of.
    """
    keys = {execution.pk}
    if execution.parent_id is not None and (seen is None or seen.filter(pk=execution.root_id).exists()):
        keys.add(execution.root_id)
    items = OperationItem.objects.using(database()).filter(state=ItemState.DONE).select_related("operation").order_by()
    of_it = items.filter(execution__in=keys)
    if execution.parent_id is None:
        # Each by its own index: for a condition with OR, a planner may walk through the whole table.
        of_it = of_it.union(items.filter(created=execution.pk), all=True)
        latest = list(of_it.order_by("-id")[:MOST_DEEDS])
    else:
        # In the order of the index, for the same reason.
        latest = sorted(of_it.order_by("execution_id", "-id")[: 2 * MOST_DEEDS], key=lambda item: -item.pk)[:MOST_DEEDS]
    if seen is not None:
        latest = _as_seen(seen, execution, latest)
    return [
        Deed(item.decided_at, item.operation, item.execution_id, item.created_id)
        for item in reversed(latest)
        if item.decided_at is not None
    ]


def _as_seen(seen: QuerySet[Execution], execution: Execution, items: list[OperationItem]) -> list[OperationItem]:
    """Return what may be told of, without the ids of executions that are not seen."""
    keys = {key for item in items for key in (item.execution_id, item.created_id) if key not in (None, execution.pk)}
    found = {execution.pk, *(seen.filter(pk__in=keys).values_list("pk", flat=True) if keys else ())}
    for item in items:
        if item.created_id not in found:
            item.created_id = None
    return [item for item in items if item.execution_id in found]


# ------------------------------------------------------------------------------------------------------------ progress


@dataclass(frozen=True)
class Progress:
    """How far an operation is, and how what it has acted on stands now."""

    operation: Operation
    #: How many executions there are of each ``ItemState``.
    counts: Counter[str]
    #: How many there are of each status now, of those that it has acted on; empty if nobody has looked.
    statuses: Counter[str]
    #: How many were refused for which reason.
    refusals: Counter[str]

    @property
    def is_settled(self) -> bool:
        """Whether neither the operation goes on, nor anything that it has acted on."""
        return self.operation.finished_at is not None and not any(self.statuses[status] for status in OPEN_STATUSES)

    @property
    def sentence(self) -> str:
        """It in words: ``37 retried: 36 succeeded, 1 failed; 2 refused: not failed or cancelled``."""
        counts = self.counts
        parts = [f"{counts[ItemState.DONE]:,} {done(self.operation)}"]
        if told := self._ends():
            parts[0] += f": {told}"
        if counts[ItemState.REFUSED]:
            reasons = [
                text if len(self.refusals) == 1 else f"{number:,} {text}"
                for text, number in self.refusals.most_common()
            ]
            told = f": {' / '.join(reasons)}" if reasons else ""
            parts.append(_("%(number)s refused") % {"number": f"{counts[ItemState.REFUSED]:,}"} + told)
        words = {
            ItemState.GONE: _("not there any more"),
            ItemState.FAILED: _("not decided because of an error"),
            ItemState.STOPPED: _("stopped before their turn"),
            ItemState.PENDING: _("to come"),
        }
        parts += [f"{counts[state]:,} {text}" for state, text in words.items() if counts[state]]
        return f"{'; '.join(parts)}."

    def _ends(self) -> str:
        """Return how many have come to which end, of those that it lets go on."""
        if self.operation.kind == OperationKind.CANCEL and set(self.statuses) <= {ExecutionStatus.CANCELLED}:
            return ""
        names = {
            ExecutionStatus.SUCCEEDED: _("succeeded"),
            ExecutionStatus.FAILED: _("failed"),
            ExecutionStatus.CANCELLED: _("cancelled"),
        }
        told = [f"{self.statuses[status]:,} {name}" for status, name in names.items() if self.statuses[status]]
        if going := sum(self.statuses[status] for status in OPEN_STATUSES):
            told.append(_("%(number)s go on") % {"number": f"{going:,}"})
        pruned = self.counts[ItemState.DONE] - sum(self.statuses.values())
        if self.statuses and pruned > 0:
            told.append(_("%(number)s pruned") % {"number": f"{pruned:,}"})
        return ", ".join(told)

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "results": {state.value: self.counts[state] for state in ItemState},
            "statuses": {status.value: self.statuses[status] for status in ExecutionStatus},
            "refusals": dict(self.refusals),
            "text": self.sentence,
            "is_settled": self.is_settled,
        }


def progress(operation: Operation) -> Progress:
    """Return how far an operation is; what it has acted on is followed to its end."""
    items = OperationItem.objects.using(database()).filter(operation_id=operation.pk).order_by()
    # Read after the operation: of one that has ended, nothing changes any more.
    counts = operating.count([operation.pk])[operation.pk]
    followed = "created" if operation.kind in STARTING else "execution"
    statuses = items.filter(state=ItemState.DONE, **{f"{followed}__status__isnull": False})
    refused = items.filter(state=ItemState.REFUSED).values_list("message").annotate(number=Count("pk"))
    return Progress(
        operation,
        counts,
        Counter(dict(statuses.values_list(f"{followed}__status").annotate(number=Count("pk")))),
        Counter(dict(refused)),
    )


def in_short(operations: list[Operation]) -> dict[int, Progress]:
    """Return how far operations are, in one query, and without a look at the executions."""
    under_way = operating.count(operation.pk for operation in operations if operation.finished_at is None)
    states = [state for state in ItemState if state is not ItemState.PENDING]
    return {
        one.pk: Progress(
            one,
            under_way.get(one.pk) or Counter({state.value: getattr(one, state.value) for state in states}),
            Counter(),
            Counter(),
        )
        for one in operations
    }


# ------------------------------------------------------------------------------------------------------------- as data


def executions_of(items: list[OperationItem]) -> dict[uuid.UUID, Execution]:
    """Return those executions of items, and those that were started, that are still there; in one query."""
    keys = {key for item in items for key in (item.execution_id, item.created_id) if key is not None}
    return Execution.objects.using(database()).only("task", "status").in_bulk(sorted(keys)) if keys else {}


def status_now(item: OperationItem, found: dict[uuid.UUID, Execution]) -> str | None:
    """Return how what an item is about stands now, if anything of it is there."""
    row = found.get(item.created_id or item.execution_id)
    return None if row is None else str(row.status)


def document(operation: Operation, progress: Progress) -> dict[str, Any]:
    """Return an operation as plain data."""
    return {
        "id": operation.pk,
        "kind": operation.kind,
        "actor": operation.actor or None,
        "reason": operation.reason or None,
        "source": operation.source,
        "filters": operation.filters or None,
        "created_at": operation.created_at,
        "finished_at": operation.finished_at,
        "stop_requested_at": operation.stop_requested_at,
        "total": operation.total,
        **progress.document(),
    }


def item_documents(items: list[OperationItem]) -> list[dict[str, Any]]:
    """Return items as plain data, with how their executions stand now."""
    found = executions_of(items)
    return [
        {
            "execution": item.execution_id,
            "state": item.state,
            "message": item.message or None,
            "created": item.created_id,
            "status": status_now(item, found),
            "decided_at": item.decided_at,
        }
        for item in items
    ]
