"""What one person may see: which rows, and of which rows what tasks were given, returned and raised.

A project that narrows ``ExecutionAdmin.get_queryset``, by tenant for example, narrows everything on its site with it:
every page that reads rows of ours without going through that method asks here for what it may read.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from django.contrib.admin import ModelAdmin
from django.core.exceptions import FieldDoesNotExist
from django.db.models import Model, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import HttpRequest

from conductor_app.models import Event, Execution, FailedExecution, Step, database

#: Who has it may see what tasks were given, what they returned and what they raised.
VIEW_PAYLOAD = "conductor_app.view_payload"
#: The columns that it takes. A digest tells a guess from another.
PRIVATE_COLUMNS: dict[type[Model], frozenset[str]] = {
    Execution: frozenset({"payload", "result", "error", "options"}),
    Step: frozenset({"payload_digest", "result", "error"}),
    Event: frozenset({"payload"}),
    FailedExecution: frozenset({"message", "traceback"}),
}


def may_see_payloads(request: HttpRequest) -> bool:
    """Tell whether the user may see payloads and results, and the messages and tracebacks of errors."""
    return bool(request.user.has_perm(VIEW_PAYLOAD))


def is_private(model: type[Model], path: str) -> bool:
    """Tell whether a lookup or a column's path leads to a private column, over whatever relations."""
    for part in path.split(LOOKUP_SEP):
        try:
            field: Any = model._meta.pk if part == "pk" else model._meta.get_field(part)
        except FieldDoesNotExist:
            return False  # a transform or a lookup
        if field.name in PRIVATE_COLUMNS.get(field.model._meta.concrete_model, ()):
            return True
        if field.related_model is None:
            return False
        model = field.related_model
    return False


# ------------------------------------------------------------------------------------------------------------- rows


def is_narrowed(rows: QuerySet[Any]) -> bool:
    """Tell whether a query leaves rows of its table out."""
    query = rows.query
    return bool(query.where or query.is_sliced or query.combinator or query.extra_tables)


def executions(owner: ModelAdmin[Any], request: HttpRequest) -> QuerySet[Execution] | None:
    """Return the executions that an admin's site shows to a person; ``None`` if it shows all of them."""
    if owner.model is not Execution:
        if not owner.admin_site.is_registered(Execution):
            return None
        owner = owner.admin_site.get_model_admin(Execution)
    rows: QuerySet[Any] = owner.get_queryset(request)
    return _alone(rows) if is_narrowed(rows) else None


def failures(owner: ModelAdmin[Any], request: HttpRequest) -> QuerySet[FailedExecution] | None:
    """Return the failures that an admin's site shows to a person; ``None`` if it shows all of them."""
    found: QuerySet[FailedExecution] | None = None
    if owner.admin_site.is_registered(FailedExecution):
        rows: QuerySet[Any] = owner.admin_site.get_model_admin(FailedExecution).get_queryset(request)
        found = _alone(rows) if is_narrowed(rows) else None
    seen = executions(owner, request)
    if seen is None:
        return found
    return (FailedExecution.objects.using(database()) if found is None else found).filter(
        execution__in=seen.values("pk")
    )


def _alone(rows: QuerySet[Any]) -> QuerySet[Any]:
    """Return the rows without the joins, orders and columns that they were narrowed with."""
    found: QuerySet[Any] = rows.model._meta.concrete_model._default_manager.using(database())
    return found.filter(pk__in=rows.using(database()).order_by().values("pk"))


def ids(seen: QuerySet[Execution], keys: Iterable[uuid.UUID | None]) -> set[uuid.UUID]:
    """Return which of some executions are among those that are seen, in one query."""
    wanted = {key for key in keys if key is not None}
    return set(seen.filter(pk__in=wanted).values_list("pk", flat=True)) if wanted else set()


def conceal(seen: QuerySet[Execution] | None, rows: Iterable[Any], references: Iterable[str]) -> None:
    """Take from rows in memory the ids of executions that are not seen; one query at most."""
    if seen is None:
        return
    rows, references = list(rows), list(references)
    found = ids(seen, (getattr(row, name) for row in rows for name in references))
    for row in rows:
        for name in references:
            if getattr(row, name) not in found:
                setattr(row, name, None)
