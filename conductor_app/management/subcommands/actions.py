"""Subcommands that act on executions, by ids or filters: each says what it does, and to which."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import Q

from conductor_app import api
from conductor_app.engine.acting import fork_plan
from conductor_app.exceptions import ActionRefused, ConductorError
from conductor_app.management.subcommands.acting import Acting, Outcome, awaited_event
from conductor_app.management.subcommands.acting_as import must_have_reason
from conductor_app.management.subcommands.base import USAGE, json_value
from conductor_app.models import Execution, database
from conductor_app.states import FINAL_STATUSES, OPEN_STATUSES, ExecutionStatus
from conductor_app.telling import possible


class Retry(Acting):
    """Runs failed and cancelled executions again."""

    name = "retry"
    help = "Run failed or cancelled root executions again, from what failed; finished steps keep their results."
    done = "retried"
    whom = "failed and cancelled root executions"
    statuses = possible.RETRIED_STATUSES

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_retry()

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Retry one execution."""
        del options
        api.retry(execution_id)
        status = _status(execution_id)
        message = "It is queued."
        if status == ExecutionStatus.WAITING:
            message = "It waits for what failed, which is queued."
            if event := awaited_event(execution_id):
                message = f"It waits again for the event {event!r}."
        return Outcome(execution_id, True, "retried", message)


class Rerun(Acting):
    """Runs executions that have ended again, as new ones."""

    name = "rerun"
    help = "Start new executions with the tasks and payloads of root executions that have ended; no step is kept."
    done = "started anew"
    whom = "root executions that have ended"
    statuses = FINAL_STATUSES
    #: What has been rerun still has ended.
    goes_on = False

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_rerun()

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Rerun one execution."""
        del options
        created = api.rerun(execution_id)
        return Outcome(execution_id, True, "started", f"The new execution is {created.pk}.", created.pk)


class Fork(Acting):
    """Runs executions that have ended again from a step, as new ones."""

    name = "fork"
    help = "Run root executions that have ended again from a step, as new ones; what was recorded before it is copied."
    done = "forked"
    whom = "root executions that have ended"
    statuses = FINAL_STATUSES
    goes_on = False
    in_background = False

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the step and the payload, too."""
        super().add_arguments(parser)
        parser.add_argument("--before", required=True, metavar="STEP", help="the first step that runs again")
        parser.add_argument(
            "--payload",
            type=json_value,
            metavar="JSON",
            help="another payload: an object has the task's keyword arguments (default: the old one)",
        )

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_rerun()

    def foretold(self, outcome: Outcome, options: dict[str, Any]) -> Outcome:
        """Say what would be kept, and what would run again."""
        try:
            planned = fork_plan(api.find(outcome.id), options["before"], options["payload"])
        except ActionRefused as error:
            return replace(outcome, ok=False, outcome="would be refused", message=str(error))
        except ConductorError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        kept, again = ([step.name for step in steps] for steps in (planned.kept, planned.again))
        message = f"Kept: {_names(kept)}. Runs again: {_names(again)}, and what follows."
        return replace(outcome, message=message, plan={"kept": kept, "again": again})

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Fork one execution."""
        try:
            created = api.fork(execution_id, options["before"], options["payload"])
        except ActionRefused:
            raise
        except ConductorError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        return Outcome(execution_id, True, "forked", f"The new execution is {created.pk}.", created.pk)


#: So many steps are named in a line.
_NAMED_STEPS = 20


def _names(steps: list[str]) -> str:
    named = ", ".join(steps[:_NAMED_STEPS])
    more = len(steps) - _NAMED_STEPS
    return f"{named} and {more:,} more" if more > 0 else named or "nothing"


class Wake(Acting):
    """Wakes executions that wait for an instant."""

    name = "wake"
    help = "Let executions go on now that sleep, or are queued for a retry or a countdown."
    done = "woken"
    whom = "executions that sleep, or are queued for later"
    statuses = frozenset({ExecutionStatus.QUEUED, ExecutionStatus.WAITING})

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_wake()

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Wake one execution."""
        del options
        api.wake(execution_id)
        return Outcome(execution_id, True, "woken", "It is queued, and due now.")


class Publish(Acting):
    """Publishes the messages of queued executions again."""

    name = "publish"
    help = "Publish the messages of queued executions again; a message too many changes nothing."
    done = "published"
    whom = "executions that are queued and due"
    statuses = frozenset({ExecutionStatus.QUEUED})
    in_background = False
    #: Those that were published last come last.
    order = ("dispatch_at", "id")

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_publish()

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Publish one message."""
        del options
        if not api.publish_again(execution_id):
            return Outcome(execution_id, False, "refused", "The broker did not take it. Workers will publish it later.")
        return Outcome(execution_id, True, "published", "A worker may take it now.")


class Cancel(Acting):
    """Cancels executions and their unfinished descendants."""

    name = "cancel"
    help = "Cancel executions and their unfinished descendants."
    done = "cancelled"
    whom = "executions that have not ended"
    statuses = OPEN_STATUSES

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_cancel()

    def not_done_yet(self) -> Q:
        """Return those of which nobody has asked it."""
        return Q(cancel_requested_at__isnull=True)

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Cancel one execution."""
        changed = api.cancel(execution_id, reason=options["reason"])
        status = _status(execution_id)
        if not changed:
            # Chosen by a filter, it was open a moment ago, and may have ended with its parent.
            return Outcome(execution_id, not options["ids"], "unchanged", f"It is {status} already.")
        if status == ExecutionStatus.CANCELLED:
            return Outcome(execution_id, True, "cancelled", "It and its unfinished descendants are cancelled.")
        return Outcome(execution_id, True, "requested", f"It is {status}: its body stops at its next ctx call.")


class Hold(Acting):
    """Holds executions and all below them."""

    name = "hold"
    help = "Hold executions and all below them: no run begins until they are released. --reason says why."
    done = "held"
    whom = "executions that have not ended"
    statuses = OPEN_STATUSES

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_cancel()

    def not_done_yet(self) -> Q:
        """Return those that nobody holds."""
        return Q(held_at__isnull=True)

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Hold one execution."""
        changed = api.hold(execution_id, options["reason"])
        status = _status(execution_id)
        if not changed:
            # Chosen by a filter, it may have been held with its root.
            return Outcome(execution_id, not options["ids"], "unchanged", "It is held already.")
        if status == ExecutionStatus.RUNNING:
            return Outcome(execution_id, True, "held", "It is running: its run ends at its next ctx call.")
        return Outcome(execution_id, True, "held", f"It is {status}, and goes on when it is released.")

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        must_have_reason(options)


class Release(Acting):
    """Lets executions go on that are held."""

    name = "release"
    help = "Let executions go on that are held, and all below them that was held with them."
    done = "released"
    whom = "executions that are held"
    statuses = OPEN_STATUSES

    def fits(self) -> Q:
        """Return which executions these are."""
        return possible.to_release()

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Release one execution."""
        if api.release(execution_id):
            return Outcome(execution_id, True, "released", f"It is {_status(execution_id)}, and goes on.")
        # Chosen by a filter, it may have been released with its root.
        return Outcome(execution_id, not options["ids"], "unchanged", "It is not held.")


def _status(execution_id: uuid.UUID) -> str:
    return Execution.objects.using(database()).values_list("status", flat=True).get(pk=execution_id)
