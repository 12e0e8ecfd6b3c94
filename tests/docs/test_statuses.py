"""The diagram of statuses is made from the moves that the code names, and these are the moves that it makes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from conductor_app import transitions
from conductor_app.states import MOVES, ExecutionStatus
from tests.docs import statuses

#: ``a, b → c or d``, and then what makes it: from which statuses a move goes to which.
ARROW = re.compile(r"^([a-z, ]+) → ([a-z, ]+)")
STATUSES = {status.value for status in ExecutionStatus}


def said() -> set[tuple[str, str]]:
    """The moves that the docstrings of ``transitions`` name."""
    found = set()
    for path in Path(transitions.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := ARROW.match(ast.get_docstring(node) or "")):
                before, after = (STATUSES.intersection(re.split(r", | or ", side)) for side in match.groups())
                found |= {(one, other) for one in before for other in after}
    return found


@pytest.mark.django_db
def test_the_page_shows_what_is_made_of_the_moves_and_of_the_constraint() -> None:
    """``python -m tests.docs.statuses`` writes it."""
    page = statuses.PAGE.read_text()
    assert page.partition(statuses.BEGIN)[2].partition(statuses.END)[0] == statuses.written()


def test_each_function_that_says_from_where_to_where_it_moves_is_known() -> None:
    known = {(before.value, after.value) for before, after in MOVES if before is not None}
    moves = {(before, after) for before, after in said() if before != after}
    assert moves <= known
    # Those that a move makes beside another one, and that no function is named after.
    assert known - moves <= {("waiting", "running")}
