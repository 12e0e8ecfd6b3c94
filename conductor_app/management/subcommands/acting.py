"""``conductor retry`` and ``conductor cancel``: act on executions by id, and say for each what happened."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table
from rich.text import Text

from conductor_app import api
from conductor_app.exceptions import RetryRefused
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands.base import OK, PROBLEM, Subcommand, execution_ids, not_found
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus

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
        parser.add_argument("ids", nargs="+", metavar="id", help="an execution's id; several may be given")

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Act on each id; one that is refused does not stop the others."""
        outcomes = []
        for execution_id in execution_ids(options["ids"]):
            try:
                outcomes.append(self.act(execution_id, options))
            except Execution.DoesNotExist:
                outcomes.append(Outcome(execution_id, False, "not found", not_found(execution_id)))
        table = Table.grid(padding=(0, 2, 0, 0))
        for item in outcomes:
            table.add_row(str(item.id), Text(item.outcome, _STYLES.get(item.outcome, "green")), plain(item.message))
        out.print(table)
        ok = all(item.ok for item in outcomes)
        out.document({"ok": ok, "results": [asdict(item) for item in outcomes]})
        return OK if ok else PROBLEM

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Act on one execution.

        Raises:
            Execution.DoesNotExist: There is none.
        """
        raise NotImplementedError


class Retry(Acting):
    """Runs failed and cancelled executions again."""

    name = "retry"
    help = "Run failed or cancelled root executions again, from what failed; finished steps keep their results."

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Retry one execution."""
        del options
        try:
            api.retry(execution_id)
        except RetryRefused as error:
            return Outcome(execution_id, False, "refused", str(error))
        status = _status(execution_id)
        message = "It waits for what failed, which is queued." if status == ExecutionStatus.WAITING else "It is queued."
        return Outcome(execution_id, True, "retried", message)


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


def _status(execution_id: uuid.UUID) -> str:
    return Execution.objects.using(database()).values_list("status", flat=True).get(pk=execution_id)
