"""What holds for each declared move: it goes from one status to another as the code names it, and its text is short."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.db.models import Q

from conductor_app import transitions
from conductor_app.models import Execution
from conductor_app.states import FINAL_STATUSES, MOVES, ExecutionStatus, StepKind
from conductor_app.store.moves import Insert, Lock, Move, Update
from conductor_app.transitions import recovering, succeeding

#: What psycopg keeps the parsed form of; it parses a longer statement anew each time.
KEPT_CHARACTERS = 4_096


def moves() -> dict[str, Move]:
    """All of them, by the names under which they stand in ``transitions``."""
    found: dict[str, Move] = {}
    for module in pkgutil.walk_packages(transitions.__path__, f"{transitions.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            of = {name: value} if isinstance(value, Move) else value if isinstance(value, dict) else {}
            at = module.name.removeprefix(f"{transitions.__name__}.")
            found |= {
                f"{at}.{name} {key}".removesuffix(f" {name}"): move
                for key, move in of.items()
                if isinstance(move, Move)
            }
    for kind in (StepKind.INVOKE, StepKind.MAP):
        found[f"succeeding.child of {kind}"] = succeeding._succeed_child(kind)
    for queues in (None, ("default", "urgent")):
        found[f"recovering.taking {queues or 'all'}"] = recovering._taking(queues)
    return found


MOVES_BY_NAME = moves()


def statuses_in(where: Any) -> Iterator[str]:
    """The statuses that a guard names."""
    for child in where.children if isinstance(where, Q) else []:
        if isinstance(child, tuple):
            if child[0] == "status":
                yield str(getattr(child[1], "value", child[1]))
        elif isinstance(child, Q):
            yield from statuses_in(child)
        elif getattr(child, "lookup_name", "") == "exact" and isinstance(child.rhs, str):
            yield child.rhs


def made_by(move: Move) -> set[tuple[str | None, str]]:
    """From which statuses of executions to which a move goes, as far as its guards and values say it."""
    made: set[tuple[str | None, str]] = set()
    for part in move.parts:
        after = None if isinstance(part, Lock) or part.model is not Execution else part.values.get("status")
        if not isinstance(after, str):
            continue  # it stays, or depends on what has been found: see `tests/moves/rows.txt`
        before: set[str | None] = set(statuses_in(part.where)) if isinstance(part, Update) else {None}
        made |= {(status, str(ExecutionStatus(after).value)) for status in before}
    return made


def test_there_are_moves() -> None:
    assert len(MOVES_BY_NAME) >= 15
    assert {("queued", "running"), ("running", "waiting"), ("running", "succeeded"), (None, "queued")} <= set().union(
        *map(made_by, MOVES_BY_NAME.values())
    )


@pytest.mark.parametrize("name", MOVES_BY_NAME)
def test_a_move_is_one_that_the_code_names(name: str) -> None:
    known = {(None if before is None else before.value, after.value) for before, after in MOVES}
    assert made_by(MOVES_BY_NAME[name]) - {("running", "running")} <= known  # a claim that is made again stays there


@pytest.mark.parametrize("name", MOVES_BY_NAME)
def test_a_move_locks_a_table_it_has_locked_in_the_order_of_all_moves(name: str) -> None:
    """A child before its parent's step, the step before the parent; what is new has no lock that anybody waits for."""
    order = [(part.model.__name__, part.name) for part in MOVES_BY_NAME[name].parts if not isinstance(part, Insert)]
    assert [model for model, _ in order] in (
        [],  # something new alone
        ["Execution"],
        ["Execution", "Execution"],  # found, and then changed
        ["Execution", "PublishedState"],  # a run, and what it tells: nobody locks that but behind the run's row
        ["Execution", "Step", "Step", "Execution", "Execution"],
    )


@pytest.mark.skipif(connection.vendor != "postgresql", reason="makes scripts")
@pytest.mark.parametrize("name", MOVES_BY_NAME)
def test_the_one_statement_is_short_enough_for_psycopg_to_keep(name: str) -> None:
    assert len(MOVES_BY_NAME[name].statement(connection.alias).sql) <= KEPT_CHARACTERS


def test_each_move_that_makes_an_execution_final_frees_its_unique_key() -> None:
    ends = {
        name: part
        for name, move in MOVES_BY_NAME.items()
        for part in move.parts
        if isinstance(part, Update) and part.model is Execution and part.values.get("status") in FINAL_STATUSES
    }

    assert ends
    assert [name for name, part in ends.items() if part.values.get("unique_key", "") is not None] == []
