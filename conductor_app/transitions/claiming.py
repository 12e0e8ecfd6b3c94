"""Begin a run: claim an execution, for a message or in the commit that makes it runnable."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from django.db import transaction
from django.db.models import BooleanField, F, Q
from django.db.models.functions import Coalesce

from conductor_app import signals
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus
from conductor_app.store.moves import Move, Update
from conductor_app.store.opened import is_transaction
from conductor_app.store.slots import NOW, Given, given
from conductor_app.transitions import dispatch, guards, parts, steps

#: What a run needs to know of the execution that it claims, in the order of the model's fields (as ``from_db`` takes
#: them); steps are read separately, and only if there can be any.
CLAIM_FIELDS = (
    "id",
    "task",
    "queue",
    "priority",
    "payload",
    "status",
    "attempt",
    "max_attempts",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "position",
    "fence",
    "lease_owner",
    "due_at",
    "options",
    "held_at",
    "created_at",
    "started_at",
    "run_started_at",
)

_NAMED = Q(id=given(Execution, "id"), task=Coalesce(given(Execution, "task"), F("task")))
#: As ``ExecutionQuerySet.claimable``.
CLAIMABLE = (
    _NAMED
    & parts.has_status(ExecutionStatus.QUEUED)
    & parts.IS_LET
    & (Q(deadline_at__isnull=True) | Q(deadline_at__gt=NOW) | Q(started_at__isnull=False))
)
#: Whether who runs an execution may be forgotten once it has been seen: then its body begins once more than its
#: attempts say. Not the last attempt, nor what may be too late to begin again.
_MAY_BEGIN_AGAIN = Q(deadline_at__isnull=True) & (Q(max_attempts__isnull=True) | Q(attempt__lt=F("max_attempts")))


def _claim(where: Q, **more: Any) -> Move:
    return Move(Update("claimed", Execution, where, parts.CLAIMED, returning=CLAIM_FIELDS), **more)


_CLAIM = _claim(
    CLAIMABLE & Q(due_at__lte=NOW),
    may_be_lost=Q(Given("is_alone", BooleanField())) & _MAY_BEGIN_AGAIN,
    brings=steps.brought("claimed"),
)
_CLAIM_ATTEMPT = _claim(CLAIMABLE & Q(due_at__isnull=False, attempt=given(Execution, "attempt")))
_CLAIM_AGAIN = _claim(_NAMED & Q(lease_owner=given(Execution, "lease_owner", "owner"), status=ExecutionStatus.RUNNING))


def claim(
    execution_id: uuid.UUID,
    owner: str,
    task: str | None = None,
    attempt: int | None = None,
    *,
    savepoint: bool = True,
) -> Execution | None:
    """queued → running: take the lease for one run.

    Args:
        savepoint: Whether a transaction around it stays usable if it fails.
        task: The task that a message names; a forged one may name another than the execution's.
        attempt: The attempt that a plain task's message is about. Celery's own retry message comes by a worker's clock,
            so being due does not count; being about this attempt does, or a copy of the last one's message would take
            it early.

    Returns:
        The execution with its new fence, or ``None``: it is not there, not due, cancelled, held, of a paused task, or
        another run has it.
    """
    named = {"id": execution_id, "task": task, **parts.lease(owner)}
    if attempt is not None:
        return started(_CLAIM_ATTEMPT.make(database(), attempt=attempt, **named))
    rows = _CLAIM.make(database(), savepoint=savepoint, is_alone=is_transaction(database()), **named)
    execution = started([row[:-1] for row in rows])
    if execution is not None and rows[0][-1] is not None:
        execution.claimed_steps = json.loads(rows[0][-1])
    return execution


def claim_again(execution_id: uuid.UUID, owner: str, task: str | None = None) -> Execution | None:
    """running → running: take over the lease of a claim of this owner's whose COMMIT got no answer.

    Without it the row would be nobody's until the lease ends, and the loss would cost an attempt of a body that never
    began. The caller knows that no run in this process holds the lease. Should another thread have taken it just now,
    the new fence makes that run's writes fail, as with any lease that is taken over.

    Returns:
        The execution with its new fence, or ``None``: the claim had not been made.
    """
    return started(_CLAIM_AGAIN.make(database(), id=execution_id, task=task, **parts.lease(owner)))


def started(rows: Sequence[Sequence[Any]]) -> Execution | None:
    """Return the execution that a claim has told of, and say that its run begins; ``None`` if it was refused."""
    if not rows:
        return None
    execution = Execution.from_db(database(), CLAIM_FIELDS, rows[0])
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
        guards.send_signal(signals.execution_started, taken)

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
