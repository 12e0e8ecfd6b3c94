"""``conductor send``: send an event to an execution."""

from __future__ import annotations

import uuid
from typing import Any

from django.core.management.base import CommandError, CommandParser

from conductor_app import api
from conductor_app.exceptions import ConductorError, ExecutionFinished, IdempotencyConflict
from conductor_app.management.output import Output
from conductor_app.management.subcommands.acting import Outcome, act_on_each, awaited_event, tell
from conductor_app.management.subcommands.acting_as import accept_actor, by_whom
from conductor_app.management.subcommands.base import USAGE, Subcommand, execution_ids, json_value
from conductor_app.models import Event, database
from conductor_app.states import OperationKind
from conductor_app.telling.mailbox import mailbox_of, unclaimed
from conductor_app.transitions.operating import acting_for


class Send(Subcommand):
    """Sends an event to an execution."""

    name = "send"
    help = "Send an event to an execution, for the step that waits for it or will wait for it."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the execution, the event and what it carries."""
        parser.add_argument("execution", metavar="id", help="the execution's id, or its beginning")
        parser.add_argument("event", help="name of the event, as in ctx.wait_for")
        parser.add_argument(
            "--payload", type=json_value, metavar="JSON", help="what ctx.wait_for returns; null by default"
        )
        parser.add_argument("--id", dest="key", metavar="KEY", help="your own id: sent twice, it is one event")
        accept_actor(parser)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Send it, and say what became of it."""
        ids = execution_ids([options["execution"]])
        by = by_whom(options)
        with acting_for(by):
            outcomes = act_on_each(ids, lambda execution_id: self.act(execution_id, options), OperationKind.SEND, by)
        return tell(out, outcomes)

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
            if (event := awaited_event(execution_id)) and event != options["event"]:
                kept = f"{kept} The execution waits for the event {event!r} now."
            if others := unclaimed(mailbox_of(execution_id)):
                kept = f"{kept} It has {others}."
            return Outcome(execution_id, True, "sent", kept)
        return Outcome(execution_id, True, "sent", "The step that waited for it has taken it.")
