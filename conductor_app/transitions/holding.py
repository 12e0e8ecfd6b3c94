"""Hold executions: no run of them begins until somebody releases them.

A hold is no status. What is queued is not claimed; what waits is told of ends, events and timeouts as ever, and is
queued then; a run ends at its next ``ctx`` call. Deadlines and cancels go on.

A run whose execution is held stores no children (``parts.MAY_HAVE_CHILDREN``). So a tree is held when each of its
executions is: none can be added.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from django.db import transaction
from django.db.models import Case, F, Q, QuerySet, When
from django.db.models.functions import Greatest

from conductor_app.exceptions import ActionRefused
from conductor_app.models import Execution, database
from conductor_app.models.execution import PARKED_AT
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.locks import locked
from conductor_app.transitions import dispatch, guards, parts
from conductor_app.values.texts import clean_text

#: How many are written in one statement.
_TOGETHER = 500
#: How many a call of ``release`` publishes itself, for which a web request waits; the sweeper publishes the others.
_PUBLISHED_AT_ONCE = 100
#: Bytes of a reason that are kept.
_REASON_BYTES = 1_000

_IS_QUEUED = Q(status=ExecutionStatus.QUEUED, due_at__isnull=False)


def hold(
    execution_id: uuid.UUID, reason: str, by: str, *, tree: bool = True, note: Callable[[], object] = lambda: None
) -> bool:
    """Let no run of an execution begin, nor of those below it; tell whether anything is held that was not.

    Args:
        tree: Whether those below it are held, too.
        note: Called in the transaction if so.

    Raises:
        Execution.DoesNotExist: There is none.
        ActionRefused: It is final.
    """
    using = database()

    def work() -> bool:
        with transaction.atomic(using=using):
            top = Execution.objects.using(using).get(pk=execution_id)
            if top.is_final:
                raise _final(top)
            is_any = False
            # Those of one hold have one instant, by which a release finds them; those that joined it later, too.
            since, by_whom, why = clock.read(using), by, clean_text(reason, _REASON_BYTES)
            if top.is_held:
                assert top.held_at is not None
                since, by_whom, why = top.held_at, top.held_by or "", top.hold_reason or ""
            values = {
                "held_at": since,
                "held_by": by_whom,
                "hold_reason": why,
                "dispatch_at": Case(When(_IS_QUEUED, then=PARKED_AT), default=F("dispatch_at")),
            }
            # A run may have stored children before this had its row: they are there when it is held. Then none follow.
            while keys := _locked(_of(top, tree=tree).open().filter(held_at__isnull=True)):
                _update(keys, values)
                is_any = True
            if not is_any and not top.is_held:
                # It has ended meanwhile.
                raise _final(Execution.objects.using(using).get(pk=execution_id))
            if is_any:
                note()
        return is_any

    return guards.persist_briefly(work)


def release(execution_id: uuid.UUID, *, note: Callable[[], object] = lambda: None) -> bool:
    """Let an execution go on, and what was held with it below; tell whether it was held.

    What is due now is dispatched: the first messages after the commit, the others by the sweeper.

    Args:
        note: Called in the transaction if so.

    Raises:
        Execution.DoesNotExist: There is none.
    """
    using = database()

    def work() -> bool:
        with transaction.atomic(using=using):
            top = Execution.objects.using(using).get(pk=execution_id)
            if not top.is_held:
                return False
            keys = _locked(_of(top).open().filter(held_at=top.held_at))
            if not keys:
                return False
            now = clock.now()
            # In this order: MySQL assigns from left to right. In their old order, as they were to be published.
            values = {
                "dispatch_at": Case(When(_IS_QUEUED, then=F("due_at")), default=F("dispatch_at")),
                "due_at": Case(When(_IS_QUEUED, then=Greatest("due_at", now)), default=F("due_at")),
                "dispatches": 0,
                **parts.RELEASED,
            }
            _update(keys, values)
            _publish_first(keys)
            note()
        return True

    return guards.persist_briefly(work)


def _publish_first(keys: Sequence[uuid.UUID]) -> None:
    """Publish the first of those that are due, when the current transaction is committed."""
    if dispatch.is_embedded() or dispatch.is_inline():
        return
    rows = Execution.objects.using(database()).filter(pk__in=keys[-_TOGETHER:])
    due = list(rows.claimable().order_by("dispatch_at")[:_PUBLISHED_AT_ONCE])
    if due:
        next_publish = dispatch.first_instant(clock.now(), is_due=True, root_id=due[0].root_id)
        Execution.objects.using(database()).filter(pk__in=[row.pk for row in due]).update(dispatch_at=next_publish)
        dispatch.on_commit(*due)


def _locked(rows: QuerySet[Execution]) -> list[uuid.UUID]:
    """Lock rows, children before parents as everywhere, and return their keys in that order."""
    return list(locked(rows.order_by("-depth", "pk")).values_list("pk", flat=True))


def _update(keys: Sequence[uuid.UUID], values: dict[str, Any]) -> None:
    for start in range(0, len(keys), _TOGETHER):
        Execution.objects.using(database()).filter(pk__in=keys[start : start + _TOGETHER]).update(**values)


def _of(top: Execution, *, tree: bool = True) -> Any:
    """Return an execution, and with ``tree`` those below it."""
    executions = Execution.objects.using(database())
    if not tree:
        return executions.filter(pk=top.pk)
    if top.parent_id is None:
        return executions.filter(root_id=top.pk)
    found = [top.pk]
    level: Iterable[uuid.UUID] = found
    while level := list(executions.filter(parent_id__in=level).values_list("pk", flat=True)):
        found += level
    return executions.filter(pk__in=found)


def _final(execution: Execution) -> ActionRefused:
    return ActionRefused(
        f"Execution {execution.pk} is {execution.status}. Only one that has not ended is held.",
        reason="ended already",
        is_elsewhere=True,
    )
