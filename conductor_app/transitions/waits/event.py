"""``ctx.wait_for``: an event that somebody sends to the execution."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from django.db import transaction
from django.db.models import F
from django.utils.translation import gettext as _

from conductor_app.exceptions import CancelExecution, ExecutionFinished, IdempotencyConflict
from conductor_app.models import Event, Execution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.transitions import guards, mailbox, running, steps, waking
from conductor_app.transitions.kinds import Kind, Next, Walk, Words
from conductor_app.transitions.waits.wait import Wait
from conductor_app.values.payloads import digest


@dataclass(frozen=True)
class AwaitEvent(Wait):
    """An event for which no step waits yet; it may have been sent already."""

    event: str
    timeout: float | None

    kind = StepKind.EVENT

    @property
    def opens_first(self) -> bool:
        """It does: an event that it took needs no wait."""
        return True

    def is_there(self, execution: Execution) -> bool:
        """Open the step; tell whether it is decided."""
        return _is_there(execution, self)

    @property
    def due_in(self) -> float | None:
        """Its timeout."""
        return self.timeout or None

    @property
    def detail(self) -> str:
        """The event's name."""
        return f" (event {self.event!r})"


def _is_there(execution: Execution, wait: AwaitEvent) -> bool:
    """Open the step of an event; tell whether it is decided: the event was sent before, or the step only looks.

    The execution's row is locked first, and looked at the mailbox in a new statement: whoever sends an event writes
    this row too, so either that commit is visible here, or it will find the step.
    """
    if running.lock_held(execution):
        raise CancelExecution
    step = _open(execution, wait.step, wait.event, timeout=wait.timeout)
    if deliver(step):
        return True
    if wait.timeout != 0:
        return False
    steps.settle(execution.pk, wait.step, StepStatus.TIMED_OUT)
    return True


def _open(execution: Execution, name: str, event: str, *, timeout: float | None) -> Step:
    """Insert the pending step that an event of the name ``event`` will settle."""
    return steps.insert(
        execution,
        name,
        StepKind.EVENT,
        task=event,
        timeout_seconds=timeout,
        deadline_at=steps.deadline(timeout),
    )


#: The kinds of steps that an event settles.
_EVENTS = (StepKind.EVENT, StepKind.MESSAGE)


def awaiting(execution_id: uuid.UUID, event: str) -> Step | None:
    """Return the oldest pending step that waits for an event of this name, as of now."""
    pending = Step.objects.using(database()).filter(
        execution_id=execution_id, kind__in=_EVENTS, task=event, status=StepStatus.PENDING
    )
    return pending.order_by("id").only("id", "execution_id", "name", "kind", "group_id").first()


def awaited_names(execution_ids: Iterable[uuid.UUID]) -> list[str]:
    """Return the names of the events for which executions wait."""
    pending = Step.objects.using(database()).filter(
        execution_id__in=execution_ids, kind__in=_EVENTS, status=StepStatus.PENDING
    )
    return list(pending.order_by("id").values_list("task", flat=True))


_ENDED = {
    ExecutionStatus.SUCCEEDED: "has succeeded",
    ExecutionStatus.FAILED: "has failed",
    ExecutionStatus.CANCELLED: "was cancelled",
}


def send(execution_id: uuid.UUID, event: str, payload: str, key: str | None = None) -> bool:
    """Store an event, in the current transaction if there is one; wakes the execution if it waits for that event.

    Args:
        event: Its name.
        payload: Stored text.
        key: The sender's own id of the event.

    Returns:
        ``False`` if it was sent with this ``key`` before.

    Raises:
        Execution.DoesNotExist: There is none.
        ExecutionFinished: It is final. Nothing is stored.
        IdempotencyConflict: ``key`` was sent with another payload.
    """
    # Without a key, one of its own: a repetition after a lost COMMIT has to recognise what it has stored.
    own = key or uuid.uuid4().hex
    is_mine = False

    def work() -> bool | None:
        nonlocal is_mine
        # Outside of the transaction: its first statement is to be a write, so that its snapshot is not older.
        known = mailbox.find(execution_id, event, own)
        if known is not None:
            _check_same(known, payload)
            return is_mine
        step = awaiting(execution_id, event)
        with transaction.atomic(using=database()):
            # What waits for it beside other things comes before it: if one of those has decided that, the event stays.
            if step is not None and step.group_id is not None and not steps.lock_pending(step.group_id):
                step = None
            # The step before the execution, as everywhere: somebody may just be deciding its timeout.
            if step is not None and not steps.settle(execution_id, step.name, StepStatus.SUCCEEDED, result=payload):
                step = None
            # A write, although it changes nothing: at REPEATABLE READ a suspension that has not seen the event has to
            # fail and be run again. Its lock also puts the events of one execution in order.
            if not Execution.objects.using(database()).filter(pk=execution_id).open().update(fence=F("fence")):
                raise _refusal(execution_id, event)
            # In a new statement: a suspension for which this has waited may have opened a step.
            has_missed_step = step is None and awaiting(execution_id, event) is not None
            if has_missed_step or not mailbox.put(execution_id, event, payload, own, taken_by=step):
                transaction.set_rollback(True, using=database())
                return None
            if step is not None:
                waking.pass_on(step, execution_id, StepStatus.SUCCEEDED, error=None, root_id=None)
            is_mine = True
        return True

    sent = None
    while sent is None:
        # Each time round, somebody else has come first: a suspension, or a sender of the same event.
        sent = guards.persist_briefly(work)
    return sent


def deliver(step: Step) -> bool:
    """Settle a pending step with the oldest event for which it waits, if there is one.

    Call it while the execution's row is locked, or while nobody can send to the execution because it is final.
    """
    payload = mailbox.take(step)
    if payload is None:
        return False
    settled = steps.settle(step.execution_id, step.name, StepStatus.SUCCEEDED, result=payload)
    return settled is not None


def _check_same(known: Event, payload: str) -> None:
    if digest(known.payload) != digest(payload):
        raise IdempotencyConflict(
            f"The id {known.key!r} belongs to an event {known.name!r} of execution {known.execution_id} with another "
            "payload. Use another id."
        )


def _refusal(execution_id: uuid.UUID, event: str) -> Exception:
    status = Execution.objects.using(database()).filter(pk=execution_id).values_list("status", flat=True).first()
    if status is None:
        return Execution.DoesNotExist(f"There is no execution {execution_id}. It has been pruned.")
    # Open again, if an operator has just retried it: it was final when the event was refused.
    how = _ENDED.get(ExecutionStatus(status), "had ended")
    return ExecutionFinished(f"Execution {execution_id} {how} and takes no more events: {event!r} was not stored.")


class EventKind(Kind):
    """A wait for an event."""

    is_lasting = True
    ends_with_execution = True
    wakes_alone = True
    noun, verb = "event", "waits for"

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Wait again, unless an event is there by now."""
        yield from ()
        steps.reopen(step)
        return Next.ANYTHING if deliver(step) else Next.WAIT

    def named(self, step: Step) -> str:
        """Return the event's name."""
        return f'event "{step.task}"'

    def words(self, step: Step) -> Words:
        """Return what is said of a wait for an event."""
        hint = _("Send it: %(command)s") % {
            "command": "manage.py conductor send %(execution)s %(event)s --payload JSON"
        }
        return Words(
            begun=_('step "%(step)s": waits for the event "%(event)s"; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_('Waiting for the event "%(event)s" (step "%(step)s") since %(time)s ago. No worker is held.'),
            resumes=_("when the event is sent"),
            what=_('The event "%(event)s".'),
            then=(_("It resumes with the event's payload."), hint),
            at_deadline=_("At %(instant)s (%(when)s) it times out: EventTimedOut is raised here."),
            hint=hint,
        )


KIND = EventKind()
