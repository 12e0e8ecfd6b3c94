"""``conductor prune``: delete old trees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from django.core.management.base import CommandParser
from rich.text import Text

from conductor_app.engine import pruner
from conductor_app.management.output import Output
from conductor_app.management.subcommands.base import OK, Subcommand, counted, parse_duration, positive_int
from conductor_app.telling.words import duration


class Prune(Subcommand):
    """Deletes whole trees whose root ended long ago."""

    name = "prune"
    help = "Delete whole trees of executions whose root ended long ago."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the age."""
        parser.add_argument(
            "--older-than",
            type=parse_duration,
            required=True,
            metavar="AGE",
            help="delete trees whose root ended longer ago than this: 30d, 12h, 45m",
        )
        parser.add_argument("--keep-failed", action="store_true", help="keep trees whose root failed")
        parser.add_argument("--dry-run", action="store_true", help="only count")
        parser.add_argument(
            "--batch", type=positive_int, default=500, help="most trees in one transaction (default: 500)"
        )

    def run(self, out: Output, options: dict[str, Any]) -> int:
        """Delete, or count."""
        age = options["older_than"]
        held: list[pruner.Held] = []
        number = pruner.prune(
            age,
            batch=options["batch"],
            keep_failed=options["keep_failed"],
            dry_run=options["dry_run"],
            on_held=held.append,
        )
        operations = pruner.prune_operations(age, batch=options["batch"], dry_run=options["dry_run"])
        holders = {by: [str(tree.root_id) for tree in trees] for by, trees in _by_holder(held)}
        out.document(
            {
                "dry_run": options["dry_run"],
                "executions": number,
                "held": [{"by": by, "example": ids[0], "trees": len(ids)} for by, ids in holders.items()],
                "keep_failed": options["keep_failed"],
                "operations": operations,
                "older_than_seconds": age.total_seconds(),
            }
        )
        did = "Would delete" if options["dry_run"] else "Deleted"
        kept = ", not counting failed ones" if options["keep_failed"] else ""
        ended = f"whose root ended more than {duration(age.total_seconds())} ago{kept}"
        out.print(Text(f"{did} {counted(number, 'execution')} in trees {ended}."))
        if operations:
            out.print(Text(f"{did} {counted(operations, 'operation')} that ended before that."))
        for by, ids in holders.items():
            out.print(Text(f"Left {counted(len(ids), 'tree')} that something refers to: {by} (for example {ids[0]})."))
        return OK


def _by_holder(held: list[pruner.Held]) -> Iterator[tuple[str, Iterator[pruner.Held]]]:
    return itertools.groupby(sorted(held, key=lambda tree: (tree.by, tree.root_id)), key=lambda tree: tree.by)
