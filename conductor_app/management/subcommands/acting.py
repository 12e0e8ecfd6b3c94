"""What subcommands that act share: which executions are meant, what would be done, and what became of each."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from django.core.management.base import CommandError, CommandParser
from django.db import InterfaceError, OperationalError
from django.db.models import Q
from rich.table import Table
from rich.text import Text

from conductor_app.exceptions import ActionRefused
from conductor_app.management.output import STYLES, Output, plain
from conductor_app.management.subcommands import filters
from conductor_app.management.subcommands.acting_as import accept_actor, by_whom
from conductor_app.management.subcommands.base import (
    OK,
    PROBLEM,
    USAGE,
    Subcommand,
    accept_quiet,
    counted,
    execution_ids,
    not_found,
)
from conductor_app.management.subcommands.findings import line
from conductor_app.models import Execution, database
from conductor_app.states import ExecutionStatus, ItemState, OperationKind
from conductor_app.store import clock
from conductor_app.telling.labels import label
from conductor_app.telling.words import duration, short_name
from conductor_app.transitions import operating
from conductor_app.transitions.operating import By, acting_for, note_refusal
from conductor_app.transitions.waits.event import awaited_names

#: Most executions that one call by filters acts on, unless it says another number.
LIMIT = 100
#: More than so many are left to the workers, where they can do it.
AT_ONCE = 1_000
#: The word that stands for the ids on stdin.
STDIN = "-"
#: Most ids in one query.
_CHUNK = 500
_REFUSED = {"refused", "would be refused", "not found", "interrupted"}
_STYLES = {**dict.fromkeys(_REFUSED, STYLES["FAIL"]), "unchanged": STYLES["WARN"]}


@dataclass(frozen=True)
class Outcome:
    """What became of one id, or would."""

    id: uuid.UUID
    ok: bool
    #: One word or a few.
    outcome: str
    message: str
    #: The new execution, if the action starts one.
    created: uuid.UUID | None = None
    #: What the action would keep and what it would do again, by name, if it does either.
    plan: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Meant:
    """The executions that a call is about."""

    ids: list[uuid.UUID]
    #: How many more match the filters.
    more: int = 0


class Acting(Subcommand):
    """A subcommand that takes ids or filters, and acts on each execution."""

    #: What is done to one: "retried".
    done: ClassVar[str]
    #: Which executions it is for, and their statuses.
    whom: ClassVar[str]
    statuses: ClassVar[frozenset[ExecutionStatus]]
    #: Which come first if more match than it may act on.
    order: ClassVar[tuple[str, ...]] = ("id",)
    #: Whether the next call with the same filters goes on with others.
    goes_on: ClassVar[bool] = True
    #: Whether sweepers can do it to many.
    in_background: ClassVar[bool] = True

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the ids and the filters."""
        parser.add_argument(
            "ids", nargs="*", metavar="id", help="an execution's id, or its beginning; several; - reads them from stdin"
        )
        filters.add_filters(parser, limit=LIMIT)
        parser.add_argument("--dry-run", action="store_true", help="change nothing; list what would be done")
        if self.in_background:
            parser.add_argument(
                "--background",
                action="store_true",
                help="store it as an operation on all that match the filters, which workers do, and return at once",
            )
        accept_actor(parser)
        accept_quiet(parser)

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Act on each execution; one that is refused does not stop the others."""
        self._check(options)
        by = by_whom(options)
        if self._is_for_workers(options):
            return self._begin(out, options, by)
        by_filter = not options["ids"]
        meant = self._matching(options) if by_filter else Meant(execution_ids(_given_ids(options["ids"])))
        if not meant.ids:
            what = f"No execution{filters.described(options)} to {self.name}" if by_filter else "No id was read"
            out.remark(f"{what}. Nothing was done.")
        if options["dry_run"]:
            outcomes = [self.foretold(item, options) if item.ok else item for item in self._foretell(meant.ids)]
        else:
            by.is_together = len(meant.ids) > 1
            kind = OperationKind(self.name)
            with acting_for(by):
                outcomes = act_on_each(meant.ids, lambda execution_id: self.act(execution_id, options), kind, by)
        code = tell(out, outcomes, dry_run=options["dry_run"], more=meant.more)
        if meant.more:
            leave = " With --background, workers do all of them." if self.in_background else ""
            out.note(f"… {meant.more:,} more match: repeat the call, or raise --limit.{leave}")
        return code

    def _is_for_workers(self, options: dict[str, Any]) -> bool:
        """Tell whether it is more than a call does itself."""
        if not self.in_background or options["ids"] or options["dry_run"]:
            return False
        return bool(options["background"]) or (options["limit"] or 0) > AT_ONCE

    def _begin(self, out: Output, options: dict[str, Any], by: By) -> int:
        """Store an operation on all that match now, or on so many of them."""
        rows = filters.chosen(options, clock.read(database())).filter(self.fits() & self.not_done_yet())
        words = filters.described(options).strip().removeprefix("of ")
        operation = operating.start(OperationKind(self.name), rows, by, filters=words, limit=options["limit"])
        out.document({"ok": True, "operation": operation.pk, "total": operation.total})
        out.quietly(operation.pk)
        if not operation.total:
            out.remark(f"No execution{filters.described(options)} to {self.name}. Nothing was done.")
            return OK
        out.print(
            Text(
                f"Operation {operation.pk} has begun, on {counted(operation.total, 'execution')}. Workers do it. "
                f"How far it is: manage.py conductor operations {operation.pk}"
            )
        )
        return OK

    def act(self, execution_id: uuid.UUID, options: dict[str, Any]) -> Outcome:
        """Act on one execution.

        Raises:
            Execution.DoesNotExist: There is none.
            ActionRefused: It is impossible for this one.
        """
        raise NotImplementedError

    def foretold(self, outcome: Outcome, options: dict[str, Any]) -> Outcome:
        """Return what would become of an execution that fits, if there is more to say of it."""
        del options
        return outcome

    def fits(self) -> Q:
        """Return for which executions it is possible, as they stand now."""
        raise NotImplementedError

    def not_done_yet(self) -> Q:
        """Return for which executions that fit it has not been done already; filters choose among these."""
        return Q()

    def _check(self, options: dict[str, Any]) -> None:
        """Refuse a call that does not say which executions are meant, or cannot mean any."""
        given = filters.given(options)
        if options["ids"] and options.get("background"):
            raise _wrong("--background is for filters; ids are acted on at once.")
        if options["ids"]:
            if given:
                raise _wrong(f"Give ids or filters, not both: {', '.join(given)} would not count for ids.")
            return
        if not filters.is_chosen(options):
            raise _wrong(
                f"Which executions? Give ids, - for ids on stdin, or a filter such as --task, --status or --since. "
                f"`manage.py conductor {self.name} --help` lists them."
            )
        allowed = sorted(status.value for status in self.statuses)
        if options["status"] and not set(options["status"]) & set(allowed):
            raise _wrong(f"{self.name} is for {self.whom}: no --status but {' and '.join(allowed)} matches any.")
        if options["worker"] and ExecutionStatus.RUNNING not in self.statuses:
            raise _wrong(f"--worker finds what a worker runs now; {self.name} is for {self.whom}, which none runs.")

    def _matching(self, options: dict[str, Any]) -> Meant:
        limit = options["limit"] or LIMIT
        rows = filters.chosen(options, clock.read(database())).filter(self.fits() & self.not_done_yet())
        found = list(rows.order_by(*self.order).values_list("depth", "pk")[: limit + 1])
        more = rows.count() - limit if len(found) > limit else 0
        if more > 0 and not self.goes_on:
            raise _wrong(
                f"{limit + more:,} executions match, and {self.name} would take {limit:,} of them. The next call would "
                "take the same ones again, so nothing was done. Narrow the filters, or raise --limit."
            )
        # Parents first: what is done to a parent may settle what becomes of its children.
        return Meant([pk for _depth, pk in sorted(found[:limit], key=lambda row: row[0])], max(more, 0))

    def _foretell(self, ids: list[uuid.UUID]) -> Iterator[Outcome]:
        """Say of each what would become of it, as it stands now."""
        rows = Execution.objects.using(database())
        now = clock.read(database())
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            fitting = set(rows.filter(self.fits(), pk__in=chunk).values_list("pk", flat=True))
            fields = ("id", "task", "status", "attempt", "due_at", "dispatch_at", "held_at", "created_at")
            found = rows.only(*fields).in_bulk(chunk)
            for execution_id in chunk:
                row = found.get(execution_id)
                if row is None:
                    yield Outcome(execution_id, False, "not found", not_found(execution_id))
                    continue
                age = duration((now - row.created_at).total_seconds())
                state = f"{short_name(row.task)} {label(row, now)}, created {age} ago."
                if execution_id in fitting:
                    yield Outcome(execution_id, True, f"would be {self.done}", state)
                else:
                    yield Outcome(execution_id, False, "would be refused", f"{state} {self.name} is for {self.whom}.")


def act_on_each(
    ids: Iterable[uuid.UUID], act: Callable[[uuid.UUID], Outcome], kind: OperationKind, by: By
) -> list[Outcome]:
    """Act on each, and return what became of each; after Ctrl+C or an outage, what was done until then is told."""
    outcomes: list[Outcome] = []
    for execution_id in ids:
        try:
            outcomes.append(act(execution_id))
        except Execution.DoesNotExist:
            outcomes.append(Outcome(execution_id, False, "not found", not_found(execution_id)))
            note_refusal(kind, execution_id, by, ItemState.GONE, "")
        except ActionRefused as error:
            note_refusal(kind, execution_id, by, ItemState.REFUSED, error.reason)
            outcomes.append(Outcome(execution_id, False, "refused", str(error)))
        except (KeyboardInterrupt, OperationalError, InterfaceError) as error:
            if not outcomes:
                raise
            why = "Ctrl+C" if isinstance(error, KeyboardInterrupt) else f"the database: {line(error)}"
            message = f"Stopped here by {why}. Look at it, it may be done. Those after it were not begun."
            outcomes.append(Outcome(execution_id, False, "interrupted", message))
            break
    return outcomes


def tell(out: Output, outcomes: list[Outcome], **about: Any) -> int:
    """Write what became of each, and return the exit code.

    Args:
        out: Where to.
        outcomes: One for each id.
        about: What the JSON document says beside them.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for item in outcomes:
        table.add_row(str(item.id), Text(item.outcome, _STYLES.get(item.outcome, "green")), plain(item.message))
    if outcomes:
        out.print(table)
    for item in outcomes:
        if item.ok:
            out.quietly(item.created or item.id)
        elif out.is_quiet:
            out.note(f"{item.id} {item.outcome}: {item.message}")
    ok = all(item.ok for item in outcomes)
    out.document({"ok": ok, **about, "results": [_document(item) for item in outcomes]})
    return OK if ok else PROBLEM


def awaited_event(execution_id: uuid.UUID) -> str | None:
    """Return the name of an event for which an execution waits, if it waits for one."""
    return next(iter(awaited_names([execution_id])), None)


def _document(item: Outcome) -> dict[str, Any]:
    fields = asdict(item)
    created, plan = fields.pop("created"), fields.pop("plan")
    return {**fields, **({} if created is None else {"created": created}), **(plan or {})}


def _given_ids(words: list[str]) -> Iterator[str]:
    """Return the ids that the user gave, and in the place of ``-`` those on stdin."""
    for word in words:
        if word != STDIN:
            yield word
        elif sys.stdin is None:
            raise _wrong("There is no stdin to read ids from.")
        else:
            try:
                yield from sys.stdin.read().split()
            except UnicodeDecodeError:
                raise _wrong(
                    "What stdin has is no text. Ids are read from it, as `conductor ls -q` writes them."
                ) from None


def _wrong(message: str) -> CommandError:
    return CommandError(message, returncode=USAGE)
