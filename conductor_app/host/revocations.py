"""Revokes that cancel executions, by an id or by stamps, and what Celery is to forget of them."""

from __future__ import annotations

import datetime as dt
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from django.db import DatabaseError

from conductor_app import api
from conductor_app.engine import announcements, calls
from conductor_app.host import news
from conductor_app.host.news import Revocation
from conductor_app.models import Execution, OperationItem, database
from conductor_app.states import ExecutionStatus, ItemState, OperationKind
from conductor_app.store import clock
from conductor_app.store.ids import as_child_id, of_task_id
from conductor_app.transitions import dispatch

logger = logging.getLogger("conductor_app.worker")


#: Why an execution was cancelled that was revoked; in the rows, and told by history.
REASON = "revoked through Celery"


class Revoker:
    """Cancels what was revoked, in the sweeper's thread."""

    def __init__(self) -> None:
        #: When this worker has last obeyed a revoke of each execution, by the database's clock. The next is younger.
        self._obeyed: dict[uuid.UUID, dt.datetime] = {}
        #: Stamps that were revoked, and when, by the database's clock.
        self._stamps: list[tuple[Mapping[str, Any], dt.datetime]] = []

    def cancel(self, revocation: Revocation) -> None:
        """Cancel what was revoked, and tell whoever waits for that."""
        if not revocation.stamps:
            if not self._cancel_named(revocation) and revocation.instead is not None:
                revocation.instead()
        elif revocation.task_id:
            self._cancel_late(revocation)
        else:
            self._cancel_stamped(revocation)
        revocation.done.set()

    def _cancel_named(self, revocation: Revocation) -> bool:
        is_known = False
        for execution_id in calls.named(revocation.task_id):
            is_known |= self._obey(execution_id, revocation)
        if is_known:
            news.news().settled.append(revocation.task_id)
        return is_known

    def _cancel_stamped(self, revocation: Revocation) -> None:
        revoked_at = clock.read(database())
        found = _stamped(revocation.stamps)
        self._stamps.append((revocation.stamps, revoked_at))
        for execution_id in found:
            news.news().spared.add(str(execution_id))
            self._obey(execution_id, revocation)

    def _obey(self, execution_id: uuid.UUID, revocation: Revocation) -> bool:
        """Cancel an execution, unless others have obeyed the same command, and an operator has retried it since."""
        sent_at = clock.read(database()) - dt.timedelta(seconds=time.monotonic() - revocation.since)
        if self._is_outdated(execution_id, max(sent_at, self._obeyed.get(execution_id, sent_at))):
            logger.info(
                "A revoke of execution %s was heard too late: it has been cancelled and retried since.", execution_id
            )
            revocation.outdated.add(execution_id)
            is_known = True
        else:
            is_known = _cancel(execution_id)
        self._obeyed.pop(execution_id, None)
        self._obeyed[execution_id] = clock.read(database())
        if len(self._obeyed) > worker_state.REVOKES_MAX:
            del self._obeyed[next(iter(self._obeyed))]
        return is_known

    @staticmethod
    def _is_outdated(execution_id: uuid.UUID, since: dt.datetime) -> bool:
        """Tell whether an execution was cancelled by a revoke and retried after that, both since an instant."""
        done = OperationItem.objects.using(database()).filter(
            execution_id=execution_id, state=ItemState.DONE, decided_at__gte=since
        )
        revoked = done.filter(operation__kind=OperationKind.CANCEL, operation__reason=REASON).order_by("pk").first()
        return revoked is not None and done.filter(operation__kind=OperationKind.RETRY, pk__gt=revoked.pk).exists()

    def _cancel_late(self, late: Revocation) -> None:
        """Cancel an execution that was created after its stamp was revoked. An older one has been retried since."""
        execution_id = of_task_id(late.task_id)
        execution = Execution.objects.using(database()).filter(pk=execution_id).first()
        if execution is None:
            return
        instants = [at for stamps, at in self._stamps if share_a_stamp(late.stamps, stamps)]
        is_late = bool(instants) and execution.created_at > max(instants)
        if is_late:
            _cancel(execution_id)
        news.news().spared.add(late.task_id)
        if not is_late and execution.status == ExecutionStatus.QUEUED:
            dispatch.publish(execution)


def unrevoke(task_id: object) -> None:
    """Let Celery forget that a child was revoked: its row knows, and an operator's retry can undo it there.

    Celery would drop the id for as long as any worker remembers it. On the main thread alone: the set has no lock.
    """
    if as_child_id(task_id) is not None:
        worker_state.revoked.discard(task_id)


def forget_settled() -> None:
    """Let Celery forget the revoked ids of which the database knows. On the main thread alone: the set has no lock.

    What it goes on to remember, keeps for its next start, and tells other workers that begin, is what did not exist.
    """
    while news.news().settled:
        worker_state.revoked.discard(news.news().settled.popleft())


def _cancel(execution_id: uuid.UUID) -> bool:
    """Cancel an execution because it was revoked; tell whether there is one."""
    try:
        if not api.cancel(execution_id, reason=REASON):
            _restore(execution_id)
    except Execution.DoesNotExist:
        return False
    return True


def _restore(execution_id: uuid.UUID) -> None:
    """Write the outcome of an execution that has ended once more: Celery 5.6 has stored "revoked" over it."""
    try:
        announcements.restore(api.find(execution_id))
    except DatabaseError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the result backend raises, there are others to cancel
        logger.warning("What Celery knows of execution %s may be wrong: %s", execution_id, error)


def _stamped(stamps: Mapping[str, Any]) -> list[uuid.UUID]:
    """Return the open executions that bear one of these stamps."""
    rows = Execution.objects.using(database()).open().filter(options__contains='"stamps"')
    return [row.pk for row in rows.only("options") if share_a_stamp(row.get_options().get("stamps"), stamps)]


def share_a_stamp(own: Mapping[str, Any] | None, revoked: Mapping[str, Any]) -> bool:
    """Tell whether a task with the stamps ``own`` is meant; either side may have one value or several."""
    return any(
        stamp in (maybe_list(value) or [])
        for name, value in (own or {}).items()
        for stamp in maybe_list(revoked.get(name)) or []
    )
