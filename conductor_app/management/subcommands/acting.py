"""Subcommands that act on executions by id, and say for each what happened."""

from __future__ import annotations

import argparse
import json
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from django.core.management.base import CommandError, CommandParser
from rich.table import Table
from rich.text import Text

from conductor_app import api
from conductor_app.exceptions import ActionRefused, ConductorError, ExecutionFinished, IdempotencyConflict
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands.base import OK, PROBLEM, USAGE, Subcommand, execution_ids, not_found
from conductor_app.models import Event, Execution, Step, database
from conductor_app.states import ExecutionStatus, StepKind, StepStatus
from conductor_app.telling.mailbox import mailbox_of, unclaimed

_STYLES = {"refused": STYLES["FAIL"], "unchanged": STYLES["WARN"], "not found": STYLES["FAIL"]}


@dataclass(frozen=True)
class Outcome:
    """What became of one id."""

    id: uuid.UUID
    ok: bool
    #: One word or two.
    outcome: str
    message: str


class Acting(Subcommand):
    """A subcommand that takes ids and acts on each."""

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the ids."""
        parser.add_argument("ids", nargs="+", metavar="id", help="an execution's id, or its beginning; several")

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Act on each id; one that is refused does not stop the others."""
        outcomes = []
        for execution_id in execution_ids(self.given_ids(options)):
            try:
                outcomes.append(self.act(execution_id, options))
            except Execution.DoesNotExist:
                outcomes.append(Outcome(execution_id, False, "not found", not_found(execution_id)))
            except ActionRefused as error:
                outcomes.append(Outcome(execution_id, False, "refused", str(error)))
        table = Table.grid(padding=(0, 2, 0, 0))
        for item in outcomes:
            table.add_row(str(item.id), Text(item.outcome, _STYLES.get(item.outcome, "green")), plain(item.message))
        out.print(table)
        ok = all(item.ok for item in outcomes)
        out.document({"ok": ok, "results": [asdict(item) for item in outcomes]})
        return OK if ok else PROBLEM

    def given_ids(self, options: dict[str, Any]) -> list[str]:
        """Return the ids as the user wrote them."""
        return list(options["ids"])

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Act on one execution.

        Raises:
            Execution.DoesNotExist: There is none.
            ActionRefused: It is impossible for this one.
            CommandError: The call is wrong; the message is one line.
        """
        raise NotImplementedError


class Retry(Acting):
    """Runs failed and cancelled executions again."""

    name = "retry"
    help = "Run failed or cancelled root executions again, from what failed; finished steps keep their results."

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Retry one execution."""
        del options
        api.retry(execution_id)
        status = _status(execution_id)
        message = "It is queued."
        if status == ExecutionStatus.WAITING:
            message = "It waits for what failed, which is queued."
            if event := _awaited_event(execution_id):
                message = f"It waits again for the event {event!r}."
        return Outcome(execution_id, True, "retried", message)


class Rerun(Acting):
    """Runs executions that have ended again, as new ones."""

    name = "rerun"
    help = "Start new executions with the tasks and payloads of root executions that have ended; no step is kept."

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Rerun one execution."""
        del options
        created = api.rerun(execution_id)
        return Outcome(execution_id, True, "started", f"The new execution is {created.pk}.")


class Wake(Acting):
    """Wakes executions that wait for an instant."""

    name = "wake"
    help = "Let executions go on now that sleep, or are queued for a retry or a countdown."

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Wake one execution."""
        del options
        api.wake(execution_id)
        return Outcome(execution_id, True, "woken", "It is queued, and due now.")


class Publish(Acting):
    """Publishes the messages of queued executions again."""

    name = "publish"
    help = "Publish the messages of queued executions again; a message too many changes nothing."

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

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the ids and the reason."""
        super().add_arguments(parser)
        parser.add_argument("--reason", default="", help="stored with the executions and shown")

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Cancel one execution."""
        changed = api.cancel(execution_id, reason=options["reason"])
        status = _status(execution_id)
        if not changed:
            return Outcome(execution_id, False, "unchanged", f"It is {status} already.")
        if status == ExecutionStatus.CANCELLED:
            return Outcome(execution_id, True, "cancelled", "It and its unfinished descendants are cancelled.")
        return Outcome(execution_id, True, "requested", f"It is {status}: its body stops at its next ctx call.")


class Send(Acting):
    """Sends an event to an execution."""

    name = "send"
    help = "Send an event to an execution, for the step that waits for it or will wait for it."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the execution, the event and what it carries."""
        parser.add_argument("execution", metavar="id", help="the execution's id, or its beginning")
        parser.add_argument("event", help="name of the event, as in ctx.wait_for")
        parser.add_argument("--payload", type=_json, metavar="JSON", help="what ctx.wait_for returns; null by default")
        parser.add_argument("--id", dest="key", metavar="KEY", help="your own id: sent twice, it is one event")

    def given_ids(self, options: dict[str, Any]) -> list[str]:
        """Return the one id."""
        return [options["execution"]]

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Send the event."""
        try:
            is_new = api.send_event(execution_id, options["event"], options["payload"], id=options["key"])
        except (ExecutionFinished, IdempotencyConflict) as error:
            return Outcome(execution_id, False, "refused", str(error))
        except ConductorError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        if not is_new:
            return Outcome(execution_id, True, "unchanged", f"An event with the id {options['key']!r} was sent before.")
        sent = Event.objects.using(database()).filter(execution_id=execution_id, name=options["event"])
        if sent.filter(taken_at__isnull=True).exists():
            kept = "It is kept until a step waits for it."
            if (event := _awaited_event(execution_id)) and event != options["event"]:
                kept = f"{kept} The execution waits for the event {event!r} now."
            if others := unclaimed(mailbox_of(execution_id)):
                kept = f"{kept} It has {others}."
            return Outcome(execution_id, True, "sent", kept)
        return Outcome(execution_id, True, "sent", "The step that waited for it has taken it.")


def _json(text: str) -> Any:
    """Return a value given as JSON; for argparse."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}); a text needs its quotes: '\"yes\"'"
        ) from None


def _awaited_event(execution_id: uuid.UUID) -> str | None:
    pending = Step.objects.using(database()).filter(execution_id=execution_id, status=StepStatus.PENDING)
    return pending.filter(kind=StepKind.EVENT).values_list("task", flat=True).first()


def _status(execution_id: uuid.UUID) -> str:
    return Execution.objects.using(database()).values_list("status", flat=True).get(pk=execution_id)
