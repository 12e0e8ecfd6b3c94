"""Begin a run: claim an execution, for a message or in the commit that makes it runnable."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from django.db import connections, transaction
from django.db.models import F, QuerySet
from django.db.models.functions import Coalesce

from conductor_app import signals
from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock, waits
from conductor_app.store.statements import update_returning
from conductor_app.transitions import dispatch, guards, statements
from conductor_app.transitions.statements import CLAIM_FIELDS


def claim(execution_id: uuid.UUID, owner: str, task: str | None = None, attempt: int | None = None) -> Execution | None:
    """queued → running: take the lease for one run.

    Args:
        task: The task that a message names; a forged one may name another than the execution's.
        attempt: The attempt that a plain task's message is about; see ``ExecutionQuerySet.claimable``.

    Returns:
        The execution with its new fence, or ``None``: it is not there, not due, cancelled, or another run has it.
    """
    if attempt is None and statements.are_at_hand():
        return _started(statements.claim(execution_id, owner, task))
    named = Execution.objects.using(database()).filter(pk=execution_id)
    if task is not None:
        named = named.filter(task=task)
    return _start(named.claimable(attempt), owner)


def claim_again(execution_id: uuid.UUID, owner: str, task: str | None = None) -> Execution | None:
    """running → running: take over the lease of a claim of this owner's whose COMMIT got no answer.

    Without it the row would be nobody's until the lease ends, and the loss would cost an attempt of a body that never
    began. The caller knows that no run in this process holds the lease. Should another thread have taken it just now,
    the new fence makes that run's writes fail, as with any lease that is taken over.

    Returns:
        The execution with its new fence, or ``None``: the claim had not been made.
    """
    taken = Execution.objects.using(database()).filter(
        pk=execution_id, status=ExecutionStatus.RUNNING, lease_owner=owner
    )
    return _start(taken if task is None else taken.filter(task=task), owner)


def _start(claimable: QuerySet[Execution], owner: str) -> Execution | None:
    with waits.at_work(connections[database()]):
        rows = update_returning(
            claimable,
            CLAIM_FIELDS,
            status=ExecutionStatus.RUNNING,
            fence=F("fence") + 1,
            lease_owner=owner,
            lease_expires_at=clock.after(conductor_settings().LEASE_SECONDS, skipping=False),
            started_at=Coalesce("started_at", clock.now()),
            **guards.NOT_QUEUED,
        )
    return _started(rows[0] if rows else None)


def _started(execution: Execution | None) -> Execution | None:
    if execution is not None:
        guards.send_signal(signals.execution_started, execution)
    return execution


class HandOff:
    """A run that is about to end takes what its last commit makes runnable, and goes on with it.

    Args:
        owner: Who gets the lease.
        accepts: Whether this process may run a queued execution next; no message is published for it then.
        recalls: What this process knows of an execution that it has run, if it does.
    """

    def __init__(
        self,
        owner: str,
        accepts: Callable[[Execution], bool],
        recalls: Callable[[uuid.UUID], Execution | None] = lambda _: None,
    ) -> None:
        self.owner = owner
        self._accepts = accepts
        self.recalls = recalls
        #: What was to be claimed in the last try of the transaction, whether or not that was committed.
        self.wanted: Execution | None = None
        #: What is claimed; the commit has been made.
        self.claimed: Execution | None = None

    def wants(self, execution: Execution) -> bool:
        """Tell whether this process runs an execution next if it can be claimed, and note that it is to be."""
        if not self._accepts(execution):
            return False
        self.wanted = execution
        return True

    def take(self, execution: Execution) -> bool:
        """Claim an execution that has just been queued; tell whether it will be run here."""
        if not self.wants(execution):
            return False
        taken = claim(execution.pk, self.owner, execution.task)
        if taken is None:
            self.wanted = None
            return False
        self._confirm(taken)
        return True

    def confirm(self, taken: Execution) -> None:
        """Note an execution that the write claimed which made it runnable."""
        self._confirm(taken)
        _started(taken)

    def _confirm(self, taken: Execution) -> None:
        def note() -> None:
            self.claimed = taken

        transaction.on_commit(note, using=database())


_hand_off: ContextVar[HandOff | None] = ContextVar("conductor_app_hand_off", default=None)


@contextmanager
def handing_off(offer: HandOff | None) -> Iterator[None]:
    """Hand what the statements in the block make runnable to this process; ``None`` publishes messages.

    Inside the transaction: what receivers of signals do after the commit is no concern of the run that has ended.
    """
    token = _hand_off.set(offer)
    try:
        yield
    finally:
        _hand_off.reset(token)


def ring(execution: Execution) -> None:
    """Publish the message of an execution that the current transaction has queued, when that is committed.

    Unless the run that ends in this transaction goes on with it.
    """
    pass_on(execution, _hand_off.get())


def pass_on(execution: Execution, offer: HandOff | None) -> None:
    """Go on with an execution that has just been queued, or publish its message."""
    if offer is None or not offer.take(execution):
        dispatch.on_commit(execution)
